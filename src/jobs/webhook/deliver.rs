//! Sends the webhooks of a store as they become due.

use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;

use super::message::Message;
use super::schedule;
use super::send::{Sender, Sent};
use super::settings::WebhookSettings;
use super::stats::{WebhookOutcome, WebhookStats};
use crate::jobs::{JobStore, WebhookLease};

/// Webhooks that are sent at the same time: a receiver that does not answer holds up none of the others.
const MAX_PARALLEL: usize = 16;

/// First and longest wait after an error of the store.
const STORE_WAITS: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));

/// Sends the webhooks of the store's jobs until the future is dropped.
///
/// Returns at once if the settings allow no webhooks: the jobs' webhooks are left to other servers.
pub async fn deliver(
    store: Arc<dyn JobStore>,
    settings: WebhookSettings,
    stats: Arc<WebhookStats>,
) {
    if !settings.are_on() {
        return;
    }
    match Sender::new(settings) {
        Ok(sender) => send_all(store.as_ref(), sender, stats).await,
        Err(error) => {
            let error = crate::error_chain(&error);
            tracing::error!("no webhooks are sent, as there is no HTTP client: {error}");
        }
    }
}

/// [`deliver`] with this sender.
pub(super) async fn send_all(store: &dyn JobStore, sender: Sender, stats: Arc<WebhookStats>) {
    let (first_wait, longest_wait) = STORE_WAITS;
    let mut store_wait = first_wait;
    let sender = Arc::new(sender);
    let mut tasks = JoinSet::new();
    loop {
        while tasks.try_join_next().is_some() {}
        if tasks.len() >= MAX_PARALLEL {
            tasks.join_next().await;
        }
        match store.take_webhook().await {
            Ok(lease) => {
                store_wait = first_wait;
                let (sender, stats) = (Arc::clone(&sender), Arc::clone(&stats));
                tasks.spawn(async move { send_one(lease, &sender, &stats).await });
            }
            Err(error) => {
                tracing::warn!("webhooks cannot be read from the store of jobs: {error}");
                tokio::time::sleep(store_wait).await;
                store_wait = (2 * store_wait).min(longest_wait);
            }
        }
    }
}

/// Makes one try, and records what follows from it.
async fn send_one(lease: Box<dyn WebhookLease>, sender: &Sender, stats: &WebhookStats) {
    let id = lease.job().id.clone();
    let sent = match lease.job().webhook.as_deref() {
        Some(url) => sender.send(url, &Message::new(lease.job())).await,
        // The store returns no such job.
        None => Sent::Delivered,
    };
    let tries = lease.tries();
    let (outcome, again) = match sent {
        Sent::Delivered => {
            tracing::debug!("the webhook of {id} was delivered");
            (WebhookOutcome::Delivered, None)
        }
        Sent::Refused(error) => {
            tracing::warn!("the webhook of {id} is not sent: {error}");
            (WebhookOutcome::Refused, None)
        }
        Sent::Gone => {
            tracing::warn!("the webhook of {id} is given up, as its receiver answered 410 Gone");
            (WebhookOutcome::GivenUp, None)
        }
        Sent::Failed {
            reason,
            retry_after,
        } => {
            let number = tries.saturating_add(1);
            let again = schedule::wait(tries, retry_after);
            if let Some(wait) = again {
                let seconds = wait.as_secs();
                tracing::warn!(
                    "try {number} of the webhook of {id} failed, the next is in {seconds} s: {reason}"
                );
                (WebhookOutcome::Retried, again)
            } else {
                tracing::warn!("the webhook of {id} is given up, as try {number} failed: {reason}");
                (WebhookOutcome::GivenUp, None)
            }
        }
    };
    stats.add(outcome);
    let recorded = match again {
        Some(wait) => lease.retry(wait).await,
        None => lease.settle().await,
    };
    if let Err(error) = recorded {
        // The lease ends by itself, and the webhook is sent again.
        tracing::warn!("the state of the webhook of {id} was not stored: {error}");
    }
}
