//! What `/v1/status` says about jobs.

use std::time::Duration;

use serde::Serialize;
use tokio::time::timeout;
use utoipa::ToSchema;

use super::super::App;

/// How long the answer waits for the store.
const PATIENCE: Duration = Duration::from_secs(2);

/// The durable jobs of the server, or of all servers that share its store.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = JobsStatus)]
pub(in super::super) struct JobsStatus {
    /// Whether the store answers.
    available: bool,
    /// Jobs that wait; null if the store does not answer.
    queued: Option<u64>,
    /// Jobs whose images are being generated; null if the store does not answer.
    in_progress: Option<u64>,
    /// Jobs that may wait; further ones are refused.
    max_queued: usize,
    /// Seconds from the end of a job until it and its files are deleted.
    keep_seconds: u64,
}

impl JobsStatus {
    /// `None` for a server without jobs.
    pub(in super::super) async fn of(app: &App) -> Option<Self> {
        let store = app.jobs.as_ref()?;
        let counts = timeout(PATIENCE, store.counts()).await;
        let counts = counts.ok().and_then(Result::ok);
        let settings = store.settings();
        Some(Self {
            available: counts.is_some(),
            queued: counts.map(|counts| counts.queued),
            in_progress: counts.map(|counts| counts.in_progress),
            max_queued: settings.max_queued,
            keep_seconds: settings.keep.as_secs(),
        })
    }
}
