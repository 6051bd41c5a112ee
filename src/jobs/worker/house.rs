//! What every server of a store does besides its own jobs: it deletes what has expired, asks for the
//! numbers of the metrics, and sends webhooks.

use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval, timeout};

use crate::jobs::JobStore;
use crate::jobs::webhook::{WebhookSettings, deliver};

/// How often a store is swept and its jobs are counted.
const INTERVAL: Duration = Duration::from_secs(5);
/// How long the store may take.
const PATIENCE: Duration = Duration::from_mins(1);

/// The tasks that sweep a store, count its jobs and send their webhooks. Dropping it ends them.
#[derive(Debug)]
pub struct Housekeeping {
    _tasks: JoinSet<()>,
}

impl Housekeeping {
    /// Must be called in a tokio runtime.
    pub fn start(store: Arc<dyn JobStore>, webhooks: WebhookSettings) -> Self {
        let stats = Arc::clone(&store.settings().stats.webhooks);
        let mut tasks = JoinSet::new();
        tasks.spawn(deliver(Arc::clone(&store), webhooks, stats));
        tasks.spawn(sweep(store));
        Self { _tasks: tasks }
    }
}

/// Never returns.
async fn sweep(store: Arc<dyn JobStore>) {
    let mut ticks = interval(INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut complained = false;
    loop {
        ticks.tick().await;
        let round = async {
            store.sweep().await?;
            store.counts().await
        };
        let problem = match timeout(PATIENCE, round).await {
            Ok(Ok(counts)) => {
                store.settings().stats.set_counts(Some(counts));
                complained = false;
                continue;
            }
            Ok(Err(error)) => error.to_string(),
            Err(_) => "it does not answer".to_owned(),
        };
        store.settings().stats.set_counts(None);
        // Once for each outage.
        if !complained {
            tracing::warn!("the store of jobs was not swept: {problem}");
        }
        complained = true;
    }
}
