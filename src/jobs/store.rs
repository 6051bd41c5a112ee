//! What a store of durable jobs can do, for servers ([`JobStore`]) and for workers ([`JobLease`]).

use std::fmt::Debug;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use tokio::sync::watch;

use super::{
    JobFailure, JobFile, JobId, JobStats, JobStatus, NewJob, Owner, Progress, ResultFile, StoredJob,
};

/// Settings of every store.
#[derive(Debug, Clone)]
pub struct StoreSettings {
    /// Name of the model: workers take only jobs of their model.
    pub model: String,
    /// Name of this server in the records of its jobs.
    pub instance: String,
    /// Time from a job's end until it and its files are deleted.
    pub keep: Duration,
    /// Size of all files; the jobs that ended first are deleted when it is exceeded.
    pub max_bytes: u64,
    /// Jobs that may wait; further ones are refused with [`StoreError::Full`].
    pub max_queued: usize,
    /// Attempts after which a job fails with [`JobFailure::WORKER_LOST`].
    pub max_attempts: u32,
    /// Time after the last sign of life of a worker until another one may take its job.
    pub lease: Duration,
    /// What this process does with jobs: the store counts the jobs that it ends itself.
    pub stats: Arc<JobStats>,
}

impl StoreSettings {
    /// The defaults for the model and the server of these names.
    pub fn new(model: &str, instance: &str) -> Self {
        Self {
            model: model.to_owned(),
            instance: instance.to_owned(),
            keep: Duration::from_hours(24),
            max_bytes: 10 << 30,
            max_queued: 10_000,
            max_attempts: 3,
            lease: Duration::from_secs(30),
            stats: Arc::default(),
        }
    }
}

/// A durable store of jobs. Every method may be called by several servers at once, as far as the
/// store can be used by several servers.
#[async_trait]
pub trait JobStore: Debug + Send + Sync {
    /// The settings with which the store was opened.
    fn settings(&self) -> &StoreSettings;

    /// Stores a job. When this returns, the job survives the end of every process, and, as far as the
    /// store promises it, of every machine.
    ///
    /// A job with the idempotency key of another one of the same owner is not stored.
    async fn submit(&self, job: NewJob) -> Result<Submitted, StoreError>;

    /// The job of this id, whoever owns it.
    async fn get(&self, id: &JobId) -> Result<Option<JobView>, StoreError>;

    /// Follows a job. The receiver has the newest view at once; its sender is dropped after the job has
    /// ended or is deleted. `None` if there is no such job.
    async fn watch(&self, id: &JobId) -> Result<Option<watch::Receiver<JobView>>, StoreError>;

    /// The jobs of an owner, the newest first.
    async fn list(&self, owner: &Owner, query: &ListQuery) -> Result<JobPage, StoreError>;

    /// Ends a job that has not ended as cancelled, at once; its worker is told. Returns the job as it is
    /// then: one that had ended before is not changed.
    async fn cancel(&self, id: &JobId) -> Result<Option<JobView>, StoreError>;

    /// Deletes an ended job and its files. Returns whether there was one: a job that has not ended is
    /// not deleted.
    async fn delete(&self, id: &JobId) -> Result<bool, StoreError>;

    /// A file of a completed job.
    async fn content(&self, id: &JobId, index: usize) -> Result<Option<Content>, StoreError>;

    /// Waits for the next job of the model and takes it: its status is `in_progress` and its attempt is
    /// counted. If the future is dropped, the job that it would have returned is not lost.
    async fn take(&self) -> Result<Box<dyn JobLease>, StoreError>;

    /// Waits for the next ended job whose webhook is due, and takes it.
    async fn take_webhook(&self) -> Result<Box<dyn WebhookLease>, StoreError>;

    /// Deletes what has expired, ends jobs that were attempted too often, and makes jobs available
    /// whose workers are gone. Called every few seconds.
    async fn sweep(&self) -> Result<(), StoreError>;

    /// Numbers for the metrics.
    async fn counts(&self) -> Result<JobCounts, StoreError>;
}

/// A job that a worker has taken. If it is dropped before one of its last three methods has succeeded, or
/// not extended in time, the job becomes available again.
#[async_trait]
pub trait JobLease: Debug + Send + Sync {
    fn job(&self) -> &StoredJob;

    /// Waits until the worker must stop: the job was cancelled, or the lease is lost.
    async fn revoked(&self) -> Revoked;

    /// Tells the store that the worker is alive. Called three times in [`StoreSettings::lease`].
    async fn extend(&self) -> Result<(), StoreError>;

    /// Publishes the progress to [`JobStore::watch`]. Does not wait and is not durable.
    fn report(&self, progress: Progress);

    /// Stores the files, then ends the job as completed. When this returns, both are durable. After an
    /// error the worker still has the lease, extends it, and may call this again.
    async fn complete(&self, files: Vec<JobFile>) -> Result<Settled, StoreError>;

    /// Ends the job as failed. May be called again after an error, as [`JobLease::complete`].
    async fn fail(&self, failure: JobFailure) -> Result<Settled, StoreError>;

    /// Makes the job available again, after this time; the attempt does not count. May be called again
    /// after an error.
    async fn release(&self, after: Duration) -> Result<(), StoreError>;
}

/// An ended job whose webhook is to be sent.
#[async_trait]
pub trait WebhookLease: Debug + Send + Sync {
    fn job(&self) -> &StoredJob;

    /// How often it was tried before.
    fn tries(&self) -> u32;

    /// No further try is made, as the receiver has the message or never will.
    async fn settle(self: Box<Self>) -> Result<(), StoreError>;

    /// Tries again after this time.
    async fn retry(self: Box<Self>, after: Duration) -> Result<(), StoreError>;
}

/// The outcome of [`JobStore::submit`].
#[derive(Debug, Clone, PartialEq)]
pub enum Submitted {
    /// The job was stored.
    New(JobView),
    /// There is a job of the same idempotency key and body.
    Existing(JobView),
    /// There is a job of the same idempotency key and another body.
    OtherBody(JobId),
}

/// A job and what is not stored of it.
#[derive(Debug, Clone, PartialEq)]
pub struct JobView {
    pub job: Arc<StoredJob>,
    /// Steps of the current attempt.
    pub progress: Progress,
    /// Number of jobs that come before a queued one; `None` if it is not queued or not known.
    pub position: Option<usize>,
}

/// Which jobs of an owner to list.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ListQuery {
    pub limit: usize,
    /// Only jobs that are older than this one.
    pub after: Option<JobId>,
    pub status: Option<JobStatus>,
}

/// Some jobs of an owner.
#[derive(Debug, Clone, PartialEq)]
pub struct JobPage {
    pub jobs: Vec<JobView>,
    pub has_more: bool,
}

/// A file of a completed job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Content {
    File {
        file: ResultFile,
        content: Bytes,
    },
    /// A URL at which the client can read it for some minutes without a key.
    Url(String),
}

/// Why a worker must stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Revoked {
    /// The owner cancelled the job.
    Cancelled,
    /// Another worker may have the job.
    Lost,
}

/// Whether the outcome of a lease was recorded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Settled {
    Recorded,
    /// The job had ended before, or another worker has it: this outcome was dropped.
    Superseded,
}

/// Numbers of a store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct JobCounts {
    pub queued: u64,
    pub in_progress: u64,
    /// Unix time in milliseconds at which the oldest queued job was made.
    pub oldest_queued_ms: Option<u64>,
    /// Size of all files; `None` if the store does not know it.
    pub bytes: Option<u64>,
}

/// Why a store did not do something.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    #[error("the job was not accepted, as {queued} jobs are waiting")]
    Full { queued: usize },
    /// The same call may work later: a server of the store is not there.
    #[error("the store of jobs does not answer: {0}")]
    Unavailable(String),
    /// The job is too large for the store.
    #[error("the job has {bytes} bytes, and the store takes {max} at most")]
    TooLarge { bytes: usize, max: usize },
    /// The store cannot be used; a person must look at it.
    #[error("{0}")]
    Broken(String),
}
