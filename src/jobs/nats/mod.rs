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
mod shared;
mod sweep;
mod webhook;

#[cfg(test)]
mod tests;

use std::sync::atomic::AtomicU64;
#[cfg(test)]
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_nats::jetstream::stream::Stream;
use async_trait::async_trait;
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};

pub use self::settings::NatsSettings;

use self::link::{Failure, Link};
use self::mirror::Mirror;
use self::queue::{Queue, Queued};
use self::records::{Record, Records, Slot};
use self::results::{Found, Results};
use self::setup::Setup;
use self::shared::Shared;
use super::{
    Content, JobCounts, JobId, JobLease, JobPage, JobStatus, JobStore, JobView, ListQuery, NewJob,
    Owner, StoreError, StoreSettings, StoredJob, Submitted, WebhookLease,
};

/// Most time that opening waits for the streams: a server starts without them.
const OPEN_WAIT: Duration = Duration::from_secs(10);
const SETUP_DELAY: Duration = Duration::from_millis(500);
const MAX_SETUP_DELAY: Duration = Duration::from_secs(5);
/// Records that a list reads at once.
const READ_AT_ONCE: usize = 16;

/// A store of jobs in NATS. Any number of servers can use it at once.
#[derive(Debug)]
pub struct NatsStore {
    shared: Arc<Shared>,
    keeper: JoinHandle<()>,
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
