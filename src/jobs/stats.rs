//! What this process has done with durable jobs, and what its store last said of them, for the metrics.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::webhook::WebhookStats;
use super::{JobCounts, JobStatus};

/// Counters of this process, and the last numbers of its store.
#[derive(Debug, Default)]
pub struct JobStats {
    submitted: AtomicU64,
    attempts: AtomicU64,
    completed: AtomicU64,
    cancelled: AtomicU64,
    /// Failed jobs by the code of the failure.
    failed: Mutex<BTreeMap<String, u64>>,
    counts: Mutex<Option<JobCounts>>,
    /// Tries to send webhooks.
    pub webhooks: Arc<WebhookStats>,
}

impl JobStats {
    /// Counts a job that was stored.
    pub fn count_submitted(&self) {
        self.submitted.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts an attempt of a worker.
    pub fn count_attempt(&self) {
        self.attempts.fetch_add(1, Ordering::Relaxed);
    }

    pub fn count_completed(&self) {
        self.completed.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts a job that this process has cancelled for its owner.
    pub fn count_cancelled(&self) {
        self.cancelled.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts a job that failed with this code.
    pub fn count_failed(&self, code: &str) {
        let mut failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner);
        *failed.entry(code.to_owned()).or_default() += 1;
    }

    /// Keeps what the store says of its jobs; `None` if it does not answer.
    pub fn set_counts(&self, counts: Option<JobCounts>) {
        *self.counts.lock().unwrap_or_else(PoisonError::into_inner) = counts;
    }

    /// What the store last said of its jobs; `None` before it has answered, and while it does not.
    pub fn counts(&self) -> Option<JobCounts> {
        *self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn submitted(&self) -> u64 {
        self.submitted.load(Ordering::Relaxed)
    }

    pub fn attempts(&self) -> u64 {
        self.attempts.load(Ordering::Relaxed)
    }

    /// Failed jobs by the code of the failure.
    pub fn failed(&self) -> BTreeMap<String, u64> {
        let failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner);
        failed.clone()
    }

    /// Jobs that this process has ended, by their status then.
    pub fn ended(&self) -> [(JobStatus, u64); 3] {
        [
            (JobStatus::Completed, self.completed.load(Ordering::Relaxed)),
            (JobStatus::Failed, self.failed().values().sum()),
            (JobStatus::Cancelled, self.cancelled.load(Ordering::Relaxed)),
        ]
    }
}
