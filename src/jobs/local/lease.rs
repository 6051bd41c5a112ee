//! What workers and senders of webhooks hold.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::watch;
use tokio::time::Instant;

use super::changes::Taken;
use super::core::{Core, blocking};
use crate::jobs::{
    JobFailure, JobFile, JobId, JobLease, Progress, Revoked, Settled, StoreError, StoredJob,
    WebhookLease,
};

/// A job that a worker has taken.
#[derive(Debug)]
pub(super) struct LocalLease {
    core: Arc<Core>,
    job: Arc<StoredJob>,
    token: u64,
    revoked: watch::Receiver<Option<Revoked>>,
    /// Whether a worker has the lease: one that nobody got does not count as an attempt.
    handed_over: bool,
    /// Whether the outcome could not be stored. If the lease is dropped then the attempt does not count, as
    /// the disk was to blame, and the next one waits.
    failed: AtomicBool,
}

impl LocalLease {
    pub(super) fn new(core: Arc<Core>, taken: Taken) -> Self {
        Self {
            core,
            job: taken.job,
            token: taken.token,
            revoked: taken.revoked,
            handed_over: false,
            failed: AtomicBool::new(false),
        }
    }

    /// The lease of a worker.
    pub(super) fn handed_over(mut self) -> Self {
        self.handed_over = true;
        self
    }

    /// Runs the last change of a lease.
    async fn end<T: Send + 'static>(
        &self,
        end: impl FnOnce(&Core, &JobId, u64) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let (job, token) = (Arc::clone(&self.job), self.token);
        let outcome = blocking(&self.core, move |core| end(core, &job.id, token)).await;
        self.failed.store(outcome.is_err(), Ordering::Relaxed);
        outcome
    }
}

#[async_trait]
impl JobLease for LocalLease {
    fn job(&self) -> &StoredJob {
        &self.job
    }

    async fn revoked(&self) -> Revoked {
        let mut revoked = self.revoked.clone();
        // The sender is dropped only with a value.
        let why = revoked.wait_for(Option::is_some).await;
        why.ok().and_then(|why| *why).unwrap_or(Revoked::Lost)
    }

    async fn extend(&self) -> Result<(), StoreError> {
        let deadline = Instant::now() + self.core.settings.lease;
        self.core.live().extend(&self.job.id, self.token, deadline);
        Ok(())
    }

    fn report(&self, progress: Progress) {
        self.core.live().report(&self.job.id, self.token, progress);
    }

    async fn complete(&self, files: Vec<JobFile>) -> Result<Settled, StoreError> {
        self.end(move |core, id, token| core.complete(id, token, &files))
            .await
    }

    async fn fail(&self, failure: JobFailure) -> Result<Settled, StoreError> {
        self.end(move |core, id, token| core.fail(id, token, failure))
            .await
    }

    async fn release(&self, after: Duration) -> Result<(), StoreError> {
        self.end(move |core, id, token| core.release(id, token, after))
            .await
    }
}

impl Drop for LocalLease {
    /// Does nothing if the lease was settled.
    fn drop(&mut self) {
        let failed = self.failed.load(Ordering::Relaxed);
        let delay = if failed {
            self.core.settings.lease
        } else {
            Duration::ZERO
        };
        let counts = self.handed_over && !failed;
        self.core
            .live()
            .abandon(&self.job.id, self.token, counts, delay);
        self.core.jobs_changed.notify_waiters();
    }
}

/// An ended job whose webhook is to be sent.
#[derive(Debug)]
pub(super) struct LocalWebhook {
    pub(super) held: HeldWebhook,
    pub(super) job: Arc<StoredJob>,
}

/// A webhook that is taken. When this is dropped, another one may take it.
#[derive(Debug)]
pub(super) struct HeldWebhook {
    pub(super) core: Arc<Core>,
    pub(super) id: JobId,
    pub(super) token: u64,
    pub(super) tries: u32,
    /// Whether a sender has it: if it is dropped then, the next try waits.
    pub(super) handed_over: bool,
}

impl LocalWebhook {
    async fn end(self: Box<Self>, next: Option<(Duration, u32)>) -> Result<(), StoreError> {
        let (id, token) = (self.held.id.clone(), self.held.token);
        let end = move |core: &Arc<Core>| core.settle_webhook(&id, token, next);
        blocking(&self.held.core, end).await
    }
}

#[async_trait]
impl WebhookLease for LocalWebhook {
    fn job(&self) -> &StoredJob {
        &self.job
    }

    fn tries(&self) -> u32 {
        self.held.tries
    }

    async fn settle(self: Box<Self>) -> Result<(), StoreError> {
        self.end(None).await
    }

    async fn retry(self: Box<Self>, after: Duration) -> Result<(), StoreError> {
        let tries = self.held.tries + 1;
        self.end(Some((after, tries))).await
    }
}

impl Drop for HeldWebhook {
    /// Does nothing if the webhook was settled or planned anew.
    fn drop(&mut self) {
        let wait = self.core.settings.lease;
        let not_before = self.handed_over.then(|| Instant::now() + wait);
        self.core
            .live()
            .abandon_webhook(&self.id, self.token, not_before);
        self.core.webhooks_changed.notify_waiters();
    }
}
