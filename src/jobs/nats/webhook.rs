//! Ended jobs whose webhooks are to be sent.

use std::sync::Arc;
use std::time::Duration;

use async_nats::jetstream::{self, AckKind};
use async_trait::async_trait;
use tokio::runtime::Handle;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::sleep;

use super::link::{PULL_DELAY, acknowledge};
use super::names;
use super::queue::WebhookTicket;
use super::records::{Record, Slot};
use super::shared::{Shared, now_ms};
use crate::jobs::{StoreError, StoredJob, WebhookLease};

/// A webhook and its message.
#[derive(Debug)]
pub(super) struct NatsWebhook {
    shared: Arc<Shared>,
    record: Record,
    message: jetstream::Message,
    tries: u32,
    /// Tells the server that the webhook is being sent.
    keep_alive: JoinHandle<()>,
    settled: bool,
}

type Caller = oneshot::Sender<Result<NatsWebhook, StoreError>>;

/// Waits for a webhook. If the caller goes, one that arrives is offered to other servers.
pub(super) async fn take(shared: &Arc<Shared>) -> Result<NatsWebhook, StoreError> {
    let (mut sender, receiver) = oneshot::channel();
    let shared = Arc::clone(shared);
    tokio::spawn(async move {
        let taken = take_next(&shared, &mut sender).await;
        // A webhook that nobody takes is offered again when it is dropped.
        drop(sender.send(taken));
    });
    let stopped = |_| StoreError::Unavailable("the runtime is stopping".to_owned());
    receiver.await.map_err(stopped)?
}

async fn take_next(shared: &Arc<Shared>, caller: &mut Caller) -> Result<NatsWebhook, StoreError> {
    let link = &shared.link;
    loop {
        let message = link.next_message(names::WEBHOOKS, names::WEBHOOK_CONSUMER, caller);
        if let Some(webhook) = begin(shared, message.await?).await? {
            return Ok(webhook);
        }
    }
}

async fn begin(
    shared: &Arc<Shared>,
    message: jetstream::Message,
) -> Result<Option<NatsWebhook>, StoreError> {
    let ticket = serde_json::from_slice::<WebhookTicket>(&message.payload);
    let (Some(id), Ok(ticket)) = (names::id_of(&message.subject), ticket) else {
        acknowledge(&message, AckKind::Term).await.ok();
        return Ok(None);
    };
    let wait_ms = ticket.due_ms.saturating_sub(now_ms());
    if wait_ms > 0 {
        let wait = Duration::from_millis(wait_ms);
        acknowledge(&message, AckKind::Nak(Some(wait))).await.ok();
        return Ok(None);
    }
    let subject = names::record_subject(&id, &ticket.owner);
    match shared.records.get(&subject).await {
        Ok(Slot::Job(record)) if record.job.status.is_ended() => {
            let shared = Arc::clone(shared);
            Ok(Some(NatsWebhook::new(
                shared,
                *record,
                message,
                ticket.tries,
            )))
        }
        // The job was deleted, or made anew: there is nothing to send.
        Ok(_) => {
            acknowledge(&message, AckKind::Term).await.ok();
            Ok(None)
        }
        Err(error) => {
            acknowledge(&message, AckKind::Nak(Some(PULL_DELAY)))
                .await
                .ok();
            Err(error)
        }
    }
}

impl NatsWebhook {
    fn new(shared: Arc<Shared>, record: Record, message: jetstream::Message, tries: u32) -> Self {
        let every = shared.settings.lease / 3;
        let keep_alive = {
            let message = message.clone();
            tokio::spawn(async move {
                loop {
                    sleep(every).await;
                    acknowledge(&message, AckKind::Progress).await.ok();
                }
            })
        };
        Self {
            shared,
            record,
            message,
            tries,
            keep_alive,
            settled: false,
        }
    }

    async fn acknowledge(&self) -> Result<(), StoreError> {
        let acknowledged = self.message.double_ack().await;
        acknowledged.map_err(|error| self.shared.link.unavailable(error))
    }
}

#[async_trait]
impl WebhookLease for NatsWebhook {
    fn job(&self) -> &StoredJob {
        &self.record.job
    }

    fn tries(&self) -> u32 {
        self.tries
    }

    async fn settle(mut self: Box<Self>) -> Result<(), StoreError> {
        self.settled = true;
        self.acknowledge().await
    }

    async fn retry(mut self: Box<Self>, after: Duration) -> Result<(), StoreError> {
        let after_ms = u64::try_from(after.as_millis()).unwrap_or(u64::MAX);
        let ticket = WebhookTicket {
            owner: self.record.job.owner.clone(),
            tries: self.tries + 1,
            due_ms: now_ms().saturating_add(after_ms),
        };
        // A message that was offered again has no place for the number of tries.
        self.shared.queue.add_webhook(&self.record, &ticket).await?;
        self.settled = true;
        self.acknowledge().await
    }
}

impl Drop for NatsWebhook {
    fn drop(&mut self) {
        self.keep_alive.abort();
        if self.settled || self.shared.is_killed() {
            return;
        }
        if let Ok(runtime) = Handle::try_current() {
            let message = self.message.clone();
            runtime.spawn(async move { acknowledge(&message, AckKind::Nak(None)).await.ok() });
        }
    }
}
