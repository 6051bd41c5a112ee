//! What every server of a store does besides its own jobs: it deletes what has expired, and asks for the
//! numbers of the metrics.

use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinHandle;
use tokio::time::{MissedTickBehavior, interval, timeout};

use crate::jobs::{JobStats, JobStore};

/// How often a store is swept and its jobs are counted.
const INTERVAL: Duration = Duration::from_secs(5);
/// How long the store may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// The task that sweeps a store and counts its jobs. Dropping it ends the task.
#[derive(Debug)]
pub struct Housekeeping(JoinHandle<()>);

impl Housekeeping {
    /// Must be called in a tokio runtime.
    pub fn start(store: Arc<dyn JobStore>, stats: Arc<JobStats>) -> Self {
        Self(tokio::spawn(async move {
            let mut ticks = interval(INTERVAL);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            let mut complained = false;
            loop {
                ticks.tick().await;
                let round = async {
                    store.sweep().await?;
                    store.counts().await
                };
                match timeout(PATIENCE, round).await {
                    Ok(Ok(counts)) => {
                        stats.set_counts(counts);
                        complained = false;
                    }
                    // Once for each outage.
                    _ if complained => {}
                    Ok(Err(error)) => {
                        complained = true;
                        tracing::warn!("the store of jobs was not swept: {error}");
                    }
                    Err(_) => {
                        complained = true;
                        tracing::warn!("the store of jobs was not swept: it does not answer");
                    }
                }
            }
        }))
    }
}

impl Drop for Housekeeping {
    fn drop(&mut self) {
        self.0.abort();
    }
}
