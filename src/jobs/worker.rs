//! Runs the jobs of a store one after the other, or several at once.

use async_trait::async_trait;

use super::{JobFailure, JobFile, Progress, StoredJob};

/// Generates the images of jobs.
#[async_trait]
pub trait Runner: Send + Sync {
    /// Generates the images of one job. `report` is called after each step. Dropping the future
    /// cancels the work.
    async fn run(
        &self,
        job: &StoredJob,
        report: &(dyn Fn(Progress) + Send + Sync),
    ) -> Result<Vec<JobFile>, RunError>;
}

/// Why a job did not end with images.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RunError {
    /// Every worker would fail in the same way.
    Failed(JobFailure),
    /// This worker cannot run it now, as it is stopping or has no memory: another attempt may work.
    /// The text says why.
    NotNow(String),
}
