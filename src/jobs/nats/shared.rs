//! What the store, its leases and its tasks have in common.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use async_nats::jetstream::{self, AckKind};
use tokio::sync::watch;
use tokio::time::{Instant, sleep};

use super::link::{Link, acknowledge};
use super::mirror::Mirror;
use super::queue::{Queue, WebhookTicket};
use super::records::{Record, Records, Replaced, Slot};
use super::results::Results;
use crate::jobs::{JobFailure, JobStatus, JobView, StoreError, StoreSettings, StoredJob};

/// Time between two looks at the position of a followed job.
const POSITION_EVERY: Duration = Duration::from_secs(1);
/// Time between two looks at its record, in case that its change was missed.
const LOOK_EVERY: Duration = Duration::from_secs(5);

/// What the store, its leases and its tasks have in common.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) settings: StoreSettings,
    /// The model as part of a subject, and the name of its consumer.
    pub(super) model: String,
    pub(super) link: Link,
    pub(super) records: Records,
    pub(super) queue: Queue,
    pub(super) results: Results,
    pub(super) mirror: Mirror,
    pub(super) compared: Mutex<Instant>,
    /// The newest creation time that this server has given.
    pub(super) last_ms: AtomicU64,
    #[cfg(test)]
    pub(super) killed: std::sync::atomic::AtomicBool,
}

impl Shared {
    /// Fails while not all jobs are known.
    pub(super) fn check_live(&self) -> Result<(), StoreError> {
        if *self.mirror.live().borrow() {
            return Ok(());
        }
        Err(self.link.unavailable("the list of jobs is not read yet"))
    }

    /// Whether leases that are dropped make nothing available again.
    #[cfg(test)]
    pub(super) fn is_killed(&self) -> bool {
        self.killed.load(Ordering::Relaxed)
    }

    #[cfg(not(test))]
    #[allow(clippy::unused_self, reason = "tests kill stores")]
    pub(super) fn is_killed(&self) -> bool {
        false
    }

    /// A time for a new job, later than those of all jobs that this server has made.
    pub(super) fn created_ms(&self) -> u64 {
        let now_ms = now_ms();
        let later = |last: u64| Some(now_ms.max(last + 1));
        let last = &self.last_ms;
        let last = last.fetch_update(Ordering::Relaxed, Ordering::Relaxed, later);
        last.map_or(now_ms, |last| now_ms.max(last + 1))
    }

    pub(super) fn full(&self, model: &str) -> StoreError {
        StoreError::Full {
            queued: self.mirror.queued(model),
        }
    }

    /// Whether the queue was not compared with the records for this time; then it counts as compared.
    pub(super) fn compare_is_due(&self, every: Duration) -> bool {
        let mut compared = self.compared.lock().unwrap_or_else(PoisonError::into_inner);
        let is_due = compared.elapsed() >= every;
        if is_due {
            *compared = Instant::now();
        }
        is_due
    }

    /// Replaces a record, as [`Records::replace`] does, for the mirror too.
    pub(super) async fn replace(
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
    pub(super) async fn give_up(&self, record: Record) -> Result<Replaced, StoreError> {
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

    pub(super) fn end(&self, job: &mut StoredJob, status: JobStatus) {
        let now_ms = now_ms();
        job.status = status;
        job.ended_ms = Some(now_ms);
        let keep_ms = u64::try_from(self.settings.keep.as_millis()).unwrap_or(u64::MAX);
        job.expires_ms = Some(now_ms.saturating_add(keep_ms));
    }

    pub(super) async fn add_webhook(&self, record: &Record) -> Result<(), StoreError> {
        let ticket = WebhookTicket::new(record);
        self.queue.add_webhook(record, &ticket).await
    }

    /// Adds the webhook of an ended job, then acknowledges the job's message. Without an answer, the
    /// message is offered again, and the worker that receives it does the same.
    pub(super) async fn finish(&self, record: &Record, message: &jetstream::Message) {
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
    pub(super) async fn offer_again(
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
    pub(super) async fn follow(
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
pub(super) fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| {
        u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
    })
}
