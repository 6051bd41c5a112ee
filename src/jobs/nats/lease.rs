//! A job that a worker has taken from the queue.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_nats::jetstream::{self, AckKind};
use async_trait::async_trait;
use tokio::runtime::Handle;
use tokio::sync::{oneshot, watch};
use tokio::time::sleep;

use super::link::acknowledge;
use super::mirror::Report;
use super::names;
use super::queue::Ticket;
use super::records::{Record, Slot};
use super::shared::{Shared, now_ms};
use crate::jobs::{
    JobFailure, JobFile, JobLease, JobStatus, Progress, Revoked, Settled, StoreError, StoredJob,
};

/// Time between two looks at the record, in case that its change was missed.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// Time after which a job whose record could not be read is offered again.
const OFFER_AGAIN: Duration = Duration::from_secs(1);

/// A job and its message. The lease is valid while the record has this revision.
#[derive(Debug)]
pub(super) struct NatsLease {
    shared: Arc<Shared>,
    record: Record,
    message: jetstream::Message,
    progress: watch::Sender<Progress>,
    settled: AtomicBool,
}

/// Waits for a job. If the caller goes, a job that arrives is offered to other workers.
pub(super) async fn take(shared: &Arc<Shared>) -> Result<NatsLease, StoreError> {
    let (mut sender, receiver) = oneshot::channel::<Result<NatsLease, StoreError>>();
    let shared = Arc::clone(shared);
    tokio::spawn(async move {
        let taken = take_next(&shared, &mut sender).await;
        if let Err(Ok(lease)) = sender.send(taken) {
            lease.release(Duration::ZERO).await.ok();
        }
    });
    let stopped = |_| StoreError::Unavailable("the runtime is stopping".to_owned());
    receiver.await.map_err(stopped)?
}

type Caller = oneshot::Sender<Result<NatsLease, StoreError>>;

async fn take_next(shared: &Arc<Shared>, caller: &mut Caller) -> Result<NatsLease, StoreError> {
    let link = &shared.link;
    loop {
        let message = link.next_message(names::JOBS, &shared.model, caller);
        let message = message.await?;
        if caller.is_closed() {
            acknowledge(&message, AckKind::Nak(None)).await.ok();
            return Err(link.unavailable("nobody waits for a job"));
        }
        if let Some(lease) = begin(shared, message).await? {
            return Ok(lease);
        }
    }
}

/// Marks the job of a message as begun; `None` if it is not to be run.
async fn begin(
    shared: &Arc<Shared>,
    message: jetstream::Message,
) -> Result<Option<NatsLease>, StoreError> {
    let ticket = serde_json::from_slice::<Ticket>(&message.payload);
    let (Some(id), Ok(ticket)) = (names::id_of(&message.subject), ticket) else {
        tracing::error!(
            "a message of {} is not a job: it is dropped",
            message.subject
        );
        acknowledge(&message, AckKind::Term).await.ok();
        return Ok(None);
    };
    let subject = names::record_subject(&id, &ticket.owner);
    let begun = loop {
        let record = match shared.records.get(&subject).await {
            Ok(Slot::Job(record)) => *record,
            Ok(Slot::Empty | Slot::Deleted(_)) => {
                tracing::warn!("job {id} has no record: its message is dropped");
                acknowledge(&message, AckKind::Term).await.ok();
                return Ok(None);
            }
            Err(error) => break Err(error),
        };
        if record.job.status.is_ended() {
            shared.finish(&record, &message).await;
            return Ok(None);
        }
        if record.job.attempt >= shared.settings.max_attempts {
            match shared.give_up(record).await {
                Ok(Ok(record)) => {
                    shared.finish(&record, &message).await;
                    return Ok(None);
                }
                Ok(Err(_)) => continue,
                Err(error) => break Err(error),
            }
        }
        let mut job = record.job;
        job.status = JobStatus::InProgress;
        job.attempt += 1;
        job.started_ms = Some(now_ms());
        job.instance = Some(shared.settings.instance.clone());
        match shared.replace(record.revision, &record.model, job).await {
            Ok(Ok(record)) => break Ok(record),
            Ok(Err(_)) => {}
            Err(error) => break Err(error),
        }
    };
    match begun {
        Ok(record) => Ok(Some(NatsLease::new(Arc::clone(shared), record, message))),
        Err(error) => {
            acknowledge(&message, AckKind::Nak(Some(OFFER_AGAIN)))
                .await
                .ok();
            Err(error)
        }
    }
}

impl NatsLease {
    fn new(shared: Arc<Shared>, record: Record, message: jetstream::Message) -> Self {
        let (progress, reports) = watch::channel(Progress::default());
        tokio::spawn(publish_progress(
            Arc::clone(&shared),
            record.clone(),
            reports,
        ));
        Self {
            shared,
            record,
            message,
            progress,
            settled: AtomicBool::new(false),
        }
    }

    /// Stores the ended job. An outcome that an earlier call has stored, without an answer, counts.
    async fn end(
        &self,
        status: JobStatus,
        change: impl FnOnce(&mut StoredJob) + Send,
    ) -> Result<Settled, StoreError> {
        let mut job = self.record.job.clone();
        self.shared.end(&mut job, status);
        change(&mut job);
        let files = job.files.clone();
        let (revision, model) = (self.record.revision, &self.record.model);
        let settled = match self.shared.replace(revision, model, job).await? {
            Ok(record) => {
                self.shared.finish(&record, &self.message).await;
                Settled::Recorded
            }
            Err(Slot::Job(record)) if record.job.status.is_ended() => {
                self.shared.finish(&record, &self.message).await;
                let stored = (record.job.attempt, record.job.status, &record.job.files);
                if stored == (self.record.job.attempt, status, &files) {
                    Settled::Recorded
                } else {
                    Settled::Superseded
                }
            }
            Err(_) => Settled::Superseded,
        };
        self.settled.store(true, Ordering::Relaxed);
        Ok(settled)
    }

    async fn put_files(&self, files: &[JobFile]) -> Result<(), StoreError> {
        let job = &self.record.job;
        for (index, file) in files.iter().enumerate() {
            let path = names::file_path(&job.id, job.attempt, index, file.media_type);
            let content = file.content.clone();
            let results = &self.shared.results;
            results.put(&path, file.media_type, content).await?;
        }
        Ok(())
    }

    async fn delete_files(&self, files: &[JobFile]) {
        let job = &self.record.job;
        for (index, file) in files.iter().enumerate() {
            let path = names::file_path(&job.id, job.attempt, index, file.media_type);
            self.shared.results.delete(&path).await.ok();
        }
    }
}

#[async_trait]
impl JobLease for NatsLease {
    fn job(&self) -> &StoredJob {
        &self.record.job
    }

    async fn revoked(&self) -> Revoked {
        let job = &self.record.job;
        let subject = names::record_subject(&job.id, &job.owner);
        let mut changes = self.shared.mirror.follow(&job.id);
        loop {
            match self.shared.records.try_get(&subject).await {
                Ok(Slot::Job(record)) if record.revision == self.record.revision => {}
                Ok(Slot::Job(record)) if record.job.status == JobStatus::Cancelled => {
                    return Revoked::Cancelled;
                }
                Ok(_) => return Revoked::Lost,
                // The record is looked at again.
                Err(_) => {}
            }
            let changed = async {
                while changes.changed().await.is_ok() {
                    let revision = self.shared.mirror.revision(&job.id);
                    // Most changes are the progress of this job.
                    if revision.is_none_or(|revision| revision > self.record.revision) {
                        return;
                    }
                }
                std::future::pending::<()>().await;
            };
            tokio::select! {
                () = changed => {}
                () = sleep(LOOK_EVERY) => {}
            }
        }
    }

    async fn extend(&self) -> Result<(), StoreError> {
        if !self.shared.link.is_connected() {
            return Err(self.shared.link.unavailable("there is no connection"));
        }
        acknowledge(&self.message, AckKind::Progress)
            .await
            .map_err(|failure| self.shared.link.failed(failure))
    }

    fn report(&self, progress: Progress) {
        self.progress.send_replace(progress);
    }

    async fn complete(&self, files: Vec<JobFile>) -> Result<Settled, StoreError> {
        let described = files.iter().map(JobFile::describe).collect();
        self.put_files(&files).await?;
        let settled = self
            .end(JobStatus::Completed, |job| job.files = described)
            .await?;
        if settled == Settled::Superseded {
            self.delete_files(&files).await;
        }
        Ok(settled)
    }

    async fn fail(&self, failure: JobFailure) -> Result<Settled, StoreError> {
        self.end(JobStatus::Failed, |job| job.error = Some(failure))
            .await
    }

    async fn release(&self, after: Duration) -> Result<(), StoreError> {
        let mut job = self.record.job.clone();
        job.attempt = job.attempt.saturating_sub(1);
        let (shared, message) = (&self.shared, &self.message);
        shared
            .offer_again(&self.record, job, message, after)
            .await?;
        self.settled.store(true, Ordering::Relaxed);
        Ok(())
    }
}

impl Drop for NatsLease {
    /// Makes the job available again, if it is still this worker's.
    fn drop(&mut self) {
        if self.settled.load(Ordering::Relaxed) || self.shared.is_killed() {
            return;
        }
        let Ok(runtime) = Handle::try_current() else {
            return;
        };
        let shared = Arc::clone(&self.shared);
        let (record, message) = (self.record.clone(), self.message.clone());
        runtime.spawn(async move {
            let job = record.job.clone();
            let offered = shared.offer_again(&record, job, &message, Duration::ZERO);
            if let Err(error) = offered.await {
                // The job is offered again when its lease ends.
                tracing::debug!("job {}: {error}", record.job.id);
            }
        });
    }
}

/// Publishes the newest progress until the lease is dropped.
async fn publish_progress(
    shared: Arc<Shared>,
    record: Record,
    mut reports: watch::Receiver<Progress>,
) {
    let subject = names::progress_subject(&record.job.id);
    while reports.changed().await.is_ok() {
        let report = Report {
            attempt: record.job.attempt,
            progress: *reports.borrow_and_update(),
        };
        let Ok(payload) = serde_json::to_vec(&report) else {
            continue;
        };
        if shared.link.is_connected() {
            let client = &shared.link.client;
            client.publish(subject.clone(), payload.into()).await.ok();
        }
    }
}
