//! Jobs of several machines, in NATS JetStream.
//!
//! A job is a record in the key-value bucket `kiln-jobs` and, until it has ended, a message in the
//! work-queue stream `KILN`, which makes the servers offer it to one worker after the other. The record
//! is the truth: a change of it names the revision that it replaces, so that of a cancellation and a
//! completion one wins. A worker that receives the message of an ended job drops the message.

mod lease;
mod link;
mod mirror;
mod names;
mod queue;
mod records;
mod results;
mod settings;
mod setup;
mod sweep;
mod webhook;

#[cfg(test)]
mod tests;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use async_nats::jetstream::stream::Stream;
use async_nats::jetstream::{self, AckKind};
use async_trait::async_trait;
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};

pub use self::settings::NatsSettings;

use self::link::{Failure, Link, acknowledge};
use self::mirror::Mirror;
use self::queue::{Queue, Queued, WebhookTicket};
use self::records::{Record, Records, Replaced, Slot};
use self::results::{Found, Results};
use self::setup::Setup;
use super::{
    Content, JobCounts, JobFailure, JobId, JobLease, JobPage, JobStatus, JobStore, JobView,
    ListQuery, NewJob, Owner, StoreError, StoreSettings, StoredJob, Submitted, WebhookLease,
};

/// Most time that opening waits for the streams: a server starts without them.
const OPEN_WAIT: Duration = Duration::from_secs(10);
const SETUP_DELAY: Duration = Duration::from_millis(500);
const MAX_SETUP_DELAY: Duration = Duration::from_secs(5);
/// Records that a list reads at once.
const READ_AT_ONCE: usize = 16;
/// Time between two looks at the position of a followed job.
const POSITION_EVERY: Duration = Duration::from_secs(1);
/// Time between two looks at its record, in case that its change was missed.
const LOOK_EVERY: Duration = Duration::from_secs(5);

/// A store of jobs in NATS. Any number of servers can use it at once.
#[derive(Debug)]
pub struct NatsStore {
    shared: Arc<Shared>,
    keeper: JoinHandle<()>,
}

/// What the store, its leases and its tasks have in common.
#[derive(Debug)]
struct Shared {
    settings: StoreSettings,
    /// The model as part of a subject, and the name of its consumer.
    model: String,
    link: Link,
    records: Records,
    queue: Queue,
    results: Results,
    mirror: Mirror,
    compared: Mutex<Instant>,
    /// The newest creation time that this server has given.
    last_ms: AtomicU64,
    #[cfg(test)]
    killed: std::sync::atomic::AtomicBool,
}

impl NatsStore {
    /// Connects, and creates what the servers lack. If they do not answer within some seconds, the store
    /// is opened anyway and connects later: until then, its methods return
    /// [`StoreError::Unavailable`]. Wrong credentials, a server without JetStream and a stream of
    /// another program are errors.
    pub async fn open(nats: &NatsSettings, settings: StoreSettings) -> Result<Self, StoreError> {
        let link = Link::connect(nats, &settings.instance).await?;
        let records = stream_of(&link, names::RECORDS).await?;
        let shared = Arc::new(Shared {
            model: names::model_token(&settings.model),
            records: Records::new(link.clone(), records.clone()),
            queue: Queue::new(link.clone(), stream_of(&link, names::JOBS).await?),
            results: Results::open(nats.results.as_deref(), &link)?,
            mirror: Mirror::default(),
            compared: Mutex::new(Instant::now()),
            last_ms: AtomicU64::new(0),
            #[cfg(test)]
            killed: false.into(),
            settings,
            link,
        });
        let (fatal, mut broken) = watch::channel(None);
        let keeper = tokio::spawn(keep(Arc::clone(&shared), nats.replicas, records, fatal));
        let store = Self { shared, keeper };
        let mut live = store.shared.mirror.live();
        let decided = async {
            tokio::select! {
                _ = live.wait_for(|live| *live) => None,
                error = broken.wait_for(Option::is_some) => error.ok().and_then(|error| error.clone()),
            }
        };
        match timeout(OPEN_WAIT, decided).await {
            Ok(Some(error)) => Err(error),
            Ok(None) | Err(_) => Ok(store),
        }
    }

    /// Ends the store as the end of its process does: its leases make nothing available again.
    #[cfg(test)]
    pub(super) fn kill(&self) {
        self.keeper.abort();
        self.shared.killed.store(true, Ordering::Relaxed);
    }

    /// Compares the queue with the records, as the sweep does for jobs of some age.
    #[cfg(test)]
    pub(super) async fn compare(&self, age: Duration) -> Result<(), StoreError> {
        sweep::compare(&self.shared, age).await
    }

    /// The view of a record, which the mirror takes over.
    fn view(&self, record: Record) -> JobView {
        self.shared.mirror.apply(&record);
        self.shared.mirror.view(Arc::new(record.job))
    }

    /// The answer to a job whose idempotency key has a job already.
    async fn existing(&self, record: Record, job: &StoredJob) -> Result<Submitted, StoreError> {
        let body = |job: &StoredJob| job.idempotency.as_ref().map(|key| key.body.clone());
        if body(&record.job) != body(job) {
            return Ok(Submitted::OtherBody(record.job.id));
        }
        // The server that stored the record may have stopped before it had added the message.
        let is_open = !record.job.status.is_ended();
        if is_open && self.shared.queue.add(&record).await? == Queued::Full {
            return Err(self.shared.full(&record.model));
        }
        Ok(Submitted::Existing(self.view(record)))
    }
}

impl Drop for NatsStore {
    fn drop(&mut self) {
        self.keeper.abort();
    }
}

/// A handle of a stream that may not exist yet.
async fn stream_of(link: &Link, name: &str) -> Result<Stream<()>, StoreError> {
    let stream = link.jetstream.get_stream_no_info(name).await;
    stream.map_err(|error| StoreError::Broken(error.to_string()))
}

/// Sets up the streams and keeps the mirror up to date, as long as the store exists.
async fn keep(
    shared: Arc<Shared>,
    replicas: Option<usize>,
    records: Stream<()>,
    fatal: watch::Sender<Option<StoreError>>,
) {
    let setup = Setup {
        link: &shared.link,
        settings: &shared.settings,
        model: &shared.model,
        replicas,
        results: shared.results.is_nats(),
    };
    let mut known = None;
    let mut tries = 0;
    let mut last_failure = String::new();
    loop {
        let why = match setup.run(tries).await {
            Ok(found) => {
                tries = 0;
                if known.as_ref() != Some(&found) {
                    setup.report(&found);
                    known = Some(found);
                }
                // A lost connection was reported already.
                shared.mirror.run(&shared.link, &records).await;
                continue;
            }
            Err(Failure::Again(why)) => why,
            Err(Failure::Store(error)) => {
                fatal.send_replace(Some(error.clone()));
                error.to_string()
            }
        };
        if why != last_failure {
            tracing::warn!("jobs in NATS at {}: {why}", shared.link.servers);
            last_failure = why;
        }
        // A cluster that is just starting is given time before fewer replicas are taken.
        tries = if shared.link.is_connected() {
            tries + 1
        } else {
            0
        };
        let factor = u32::try_from(tries.max(1)).unwrap_or(u32::MAX);
        let delay = SETUP_DELAY.saturating_mul(factor).min(MAX_SETUP_DELAY);
        let mut connections = shared.link.connections();
        connections.mark_unchanged();
        tokio::select! {
            () = sleep(delay) => {}
            _ = connections.changed() => {}
        }
    }
}

impl Shared {
    /// Fails while not all jobs are known.
    fn check_live(&self) -> Result<(), StoreError> {
        if *self.mirror.live().borrow() {
            return Ok(());
        }
        Err(self.link.unavailable("the list of jobs is not read yet"))
    }

    /// Whether leases that are dropped make nothing available again.
    #[cfg(test)]
    fn is_killed(&self) -> bool {
        self.killed.load(Ordering::Relaxed)
    }

    #[cfg(not(test))]
    #[allow(clippy::unused_self, reason = "tests kill stores")]
    fn is_killed(&self) -> bool {
        false
    }

    /// A time for a new job, later than those of all jobs that this server has made.
    fn created_ms(&self) -> u64 {
        let now_ms = now_ms();
        let later = |last: u64| Some(now_ms.max(last + 1));
        let last = &self.last_ms;
        let last = last.fetch_update(Ordering::Relaxed, Ordering::Relaxed, later);
        last.map_or(now_ms, |last| now_ms.max(last + 1))
    }

    fn full(&self, model: &str) -> StoreError {
        StoreError::Full {
            queued: self.mirror.queued(model),
        }
    }

    /// Whether the queue was not compared with the records for this time; then it counts as compared.
    fn compare_is_due(&self, every: Duration) -> bool {
        let mut compared = self.compared.lock().unwrap_or_else(PoisonError::into_inner);
        let is_due = compared.elapsed() >= every;
        if is_due {
            *compared = Instant::now();
        }
        is_due
    }

    /// Replaces a record, as [`Records::replace`] does, for the mirror too.
    async fn replace(
        &self,
        revision: u64,
        model: &str,
        job: StoredJob,
    ) -> Result<Replaced, StoreError> {
        let replaced = self.records.replace(revision, model, job).await?;
        match &replaced {
            Ok(record) => self.mirror.apply(record),
            Err(Slot::Job(record)) => self.mirror.apply(record),
            Err(_) => {}
        }
        Ok(replaced)
    }

    /// Ends a job whose workers all stopped.
    async fn give_up(&self, record: Record) -> Result<Replaced, StoreError> {
        let mut job = record.job;
        self.end(&mut job, JobStatus::Failed);
        job.error = Some(JobFailure {
            code: JobFailure::WORKER_LOST.to_owned(),
            message: format!(
                "{} workers began the job, and each stopped before its end, the last one on {}",
                job.attempt,
                job.instance.as_deref().unwrap_or("an unknown server")
            ),
        });
        let replaced = self.replace(record.revision, &record.model, job).await?;
        if replaced.is_ok() {
            self.settings.stats.count_failed(JobFailure::WORKER_LOST);
        }
        Ok(replaced)
    }

    fn end(&self, job: &mut StoredJob, status: JobStatus) {
        let now_ms = now_ms();
        job.status = status;
        job.ended_ms = Some(now_ms);
        let keep_ms = u64::try_from(self.settings.keep.as_millis()).unwrap_or(u64::MAX);
        job.expires_ms = Some(now_ms.saturating_add(keep_ms));
    }

    async fn add_webhook(&self, record: &Record) -> Result<(), StoreError> {
        let ticket = WebhookTicket::new(record);
        self.queue.add_webhook(record, &ticket).await
    }

    /// Adds the webhook of an ended job, then acknowledges the job's message. Without an answer, the
    /// message is offered again, and the worker that receives it does the same.
    async fn finish(&self, record: &Record, message: &jetstream::Message) {
        if record.job.webhook.is_some()
            && let Err(error) = self.add_webhook(record).await
        {
            tracing::warn!("job {}: its webhook waits: {error}", record.job.id);
            return;
        }
        for _ in 0..3 {
            match message.double_ack().await {
                Ok(()) => return,
                Err(error) => {
                    tracing::debug!("job {}: not acknowledged: {error}", record.job.id);
                }
            }
        }
    }

    /// Makes a job available again, with `job` as its record, if its record is still the same; a job
    /// that was attempted too often is ended.
    async fn offer_again(
        &self,
        record: &Record,
        mut job: StoredJob,
        message: &jetstream::Message,
        after: Duration,
    ) -> Result<(), StoreError> {
        let replaced = if job.attempt >= self.settings.max_attempts {
            self.give_up(record.clone()).await?
        } else {
            job.status = JobStatus::Queued;
            job.started_ms = None;
            self.replace(record.revision, &record.model, job).await?
        };
        let is_offered = replaced.is_ok();
        let newest = replaced.or_else(|slot| match slot {
            Slot::Job(record) => Ok(*record),
            slot => Err(slot),
        });
        match newest {
            Ok(record) if record.job.status.is_ended() => {
                self.finish(&record, message).await;
                Ok(())
            }
            Ok(_) if is_offered => {
                let delay = (!after.is_zero()).then_some(after);
                let offered = acknowledge(message, AckKind::Nak(delay)).await;
                offered.map_err(|failure| self.link.failed(failure))
            }
            // Another worker has the job, or it was deleted.
            _ => Ok(()),
        }
    }

    /// Follows a job until it has ended or nobody listens.
    async fn follow(
        self: Arc<Self>,
        mut record: Record,
        mut changes: watch::Receiver<u64>,
        views: watch::Sender<JobView>,
    ) {
        let id = record.job.id.clone();
        let mut job = Arc::new(record.job.clone());
        let mut looked = Instant::now();
        while !job.status.is_ended() {
            tokio::select! {
                _ = changes.changed() => {}
                () = sleep(POSITION_EVERY) => {}
                () = views.closed() => return,
            }
            if looked.elapsed() >= LOOK_EVERY || self.mirror.revision(&id) != Some(record.revision)
            {
                match self.records.find(&id).await {
                    Ok(Some(newest)) => record = newest,
                    Ok(None) => return,
                    Err(_) => continue,
                }
                looked = Instant::now();
                self.mirror.apply(&record);
                job = Arc::new(record.job.clone());
            }
            let view = self.mirror.view(Arc::clone(&job));
            views.send_if_modified(|shown| {
                let is_new = *shown != view;
                *shown = view;
                is_new
            });
        }
    }
}

/// Unix time in milliseconds.
fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| {
        u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
    })
}

#[async_trait]
impl JobStore for NatsStore {
    fn settings(&self) -> &StoreSettings {
        &self.shared.settings
    }

    async fn submit(&self, job: NewJob) -> Result<Submitted, StoreError> {
        let shared = &self.shared;
        let job = job.into_stored(&shared.settings.model, shared.created_ms());
        let has_key = job.idempotency.is_some();
        let mut slot = Slot::Empty;
        if has_key {
            let subject = names::record_subject(&job.id, &job.owner);
            slot = shared.records.get(&subject).await?;
        }
        loop {
            let revision = match slot {
                Slot::Job(record) => return self.existing(*record, &job).await,
                Slot::Deleted(revision) => revision,
                Slot::Empty => 0,
            };
            if shared.mirror.queued(&shared.model) >= shared.settings.max_queued {
                return Err(shared.full(&shared.model));
            }
            let record = match shared.replace(revision, &shared.model, job.clone()).await? {
                Ok(record) => record,
                Err(other) => {
                    slot = other;
                    continue;
                }
            };
            let refused = match shared.queue.add(&record).await {
                Ok(Queued::Added | Queued::Present) => {
                    return Ok(Submitted::New(self.view(record)));
                }
                Ok(Queued::Full) => shared.full(&shared.model),
                Err(error) => error,
            };
            // A job with a key may have been returned to a repeated request by now.
            if !has_key && let Ok(Some(revision)) = shared.records.delete(&record).await {
                shared.mirror.apply_deleted(&record, revision);
            }
            return Err(refused);
        }
    }

    async fn get(&self, id: &JobId) -> Result<Option<JobView>, StoreError> {
        let record = self.shared.records.find(id).await?;
        Ok(record.map(|record| self.view(record)))
    }

    async fn watch(&self, id: &JobId) -> Result<Option<watch::Receiver<JobView>>, StoreError> {
        let changes = self.shared.mirror.follow(id);
        let Some(record) = self.shared.records.find(id).await? else {
            return Ok(None);
        };
        let (views, receiver) = watch::channel(self.view(record.clone()));
        tokio::spawn(Arc::clone(&self.shared).follow(record, changes, views));
        Ok(Some(receiver))
    }

    async fn list(&self, owner: &Owner, query: &ListQuery) -> Result<JobPage, StoreError> {
        let shared = &self.shared;
        shared.check_live()?;
        let mut jobs = shared.mirror.listed(Some(owner));
        jobs.sort_by(|a, b| (b.meta.created_ms, &b.id).cmp(&(a.meta.created_ms, &a.id)));
        if let Some(after) = &query.after {
            let at = jobs.iter().position(|job| job.id == *after);
            jobs.drain(..at.map_or(jobs.len(), |at| at + 1));
        }
        if let Some(status) = query.status {
            jobs.retain(|job| job.meta.status == status);
        }
        let has_more = jobs.len() > query.limit;
        jobs.truncate(query.limit);
        let read = jobs.into_iter().map(|job| async move {
            let subject = names::record_subject(&job.id, owner);
            shared.records.get(&subject).await
        });
        let slots: Vec<Slot> = stream::iter(read)
            .buffered(READ_AT_ONCE)
            .try_collect()
            .await?;
        let records = slots.into_iter().filter_map(|slot| match slot {
            Slot::Job(record) => Some(self.view(*record)),
            Slot::Empty | Slot::Deleted(_) => None,
        });
        Ok(JobPage {
            jobs: records.collect(),
            has_more,
        })
    }

    async fn cancel(&self, id: &JobId) -> Result<Option<JobView>, StoreError> {
        let shared = &self.shared;
        loop {
            let Some(record) = shared.records.find(id).await? else {
                return Ok(None);
            };
            if record.job.status.is_ended() {
                return Ok(Some(self.view(record)));
            }
            let was_queued = record.job.status == JobStatus::Queued;
            let mut job = record.job;
            shared.end(&mut job, JobStatus::Cancelled);
            let Ok(record) = shared.replace(record.revision, &record.model, job).await? else {
                continue;
            };
            // A worker that has the message does the same.
            let finished = async {
                if record.job.webhook.is_some() {
                    shared.add_webhook(&record).await?;
                }
                if was_queued {
                    shared.queue.remove(&record).await?;
                }
                Ok::<(), StoreError>(())
            };
            if let Err(error) = finished.await {
                tracing::warn!("cancelled job {id} is still in the queue: {error}");
            }
            return Ok(Some(self.view(record)));
        }
    }

    async fn delete(&self, id: &JobId) -> Result<bool, StoreError> {
        sweep::delete(&self.shared, id).await
    }

    async fn content(&self, id: &JobId, index: usize) -> Result<Option<Content>, StoreError> {
        let Some(record) = self.shared.records.find(id).await? else {
            return Ok(None);
        };
        let job = record.job;
        let Some(file) = job.files.get(index) else {
            return Ok(None);
        };
        let path = names::file_path(id, job.attempt, index, &file.media_type);
        Ok(match self.shared.results.get(&path).await? {
            Some(Found::Content(content)) => Some(Content::File {
                file: file.clone(),
                content,
            }),
            Some(Found::Url(url)) => Some(Content::Url(url)),
            None => None,
        })
    }

    async fn take(&self) -> Result<Box<dyn JobLease>, StoreError> {
        Ok(Box::new(lease::take(&self.shared).await?))
    }

    async fn take_webhook(&self) -> Result<Box<dyn WebhookLease>, StoreError> {
        Ok(Box::new(webhook::take(&self.shared).await?))
    }

    async fn sweep(&self) -> Result<(), StoreError> {
        sweep::sweep(&self.shared).await
    }

    async fn counts(&self) -> Result<JobCounts, StoreError> {
        self.shared.check_live()?;
        Ok(self.shared.mirror.counts(&self.shared.model))
    }
}
