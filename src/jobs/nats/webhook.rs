//! Ended jobs whose webhooks are to be sent.

use std::sync::Arc;
use std::time::Duration;

use async_nats::jetstream::{self, AckKind};
use async_trait::async_trait;
use tokio::runtime::Handle;
use tokio::sync::oneshot;
use tokio::time::sleep;

use super::Shared;
use super::link::acknowledge;
use super::names;
use super::queue::Ticket;
use super::records::Slot;
use crate::jobs::{StoreError, StoredJob, WebhookLease};

/// Time for which the server holds a request.
const PULL_WAIT: Duration = Duration::from_secs(5);
const PULL_DELAY: Duration = Duration::from_millis(500);

/// A webhook and its message.
#[derive(Debug)]
pub(super) struct NatsWebhook {
    shared: Arc<Shared>,
    job: StoredJob,
    message: jetstream::Message,
    tries: u32,
    settled: bool,
}

type Caller = oneshot::Sender<Result<NatsWebhook, StoreError>>;

/// Waits for a webhook. If the caller goes, one that arrives is offered to other servers.
pub(super) async fn take(shared: &Arc<Shared>) -> Result<NatsWebhook, StoreError> {
    let (sender, receiver) = oneshot::channel();
    let shared = Arc::clone(shared);
    tokio::spawn(async move {
        let taken = take_next(&shared, &sender).await;
        // A webhook that nobody takes is offered again when it is dropped.
        drop(sender.send(taken));
    });
    let stopped = |_| StoreError::Unavailable("the runtime is stopping".to_owned());
    receiver.await.map_err(stopped)?
}

async fn take_next(shared: &Arc<Shared>, caller: &Caller) -> Result<NatsWebhook, StoreError> {
    let link = &shared.link;
    loop {
        let consumer = names::WEBHOOK_CONSUMER;
        let message = match link.pull(names::WEBHOOKS, consumer, PULL_WAIT).await {
            Ok(message) => message,
            Err(error) => {
                link.check()?;
                if caller.is_closed() {
                    return Err(error);
                }
                sleep(PULL_DELAY).await;
                continue;
            }
        };
        if let Some(message) = message
            && let Some(webhook) = begin(shared, message).await?
        {
            return Ok(webhook);
        }
        if caller.is_closed() {
            return Err(link.unavailable("nobody waits for a webhook"));
        }
    }
}

async fn begin(
    shared: &Arc<Shared>,
    message: jetstream::Message,
) -> Result<Option<NatsWebhook>, StoreError> {
    let ticket = serde_json::from_slice::<Ticket>(&message.payload);
    let (Some(id), Ok(ticket)) = (names::id_of(&message.subject), ticket) else {
        acknowledge(&message, AckKind::Term).await.ok();
        return Ok(None);
    };
    let delivered = message.info().map_or(1, |info| info.delivered);
    let tries = u32::try_from(delivered.saturating_sub(1)).unwrap_or(0);
    let subject = names::record_subject(&id, &ticket.owner);
    let record = shared.records.get(&subject).await;
    let webhook = |job| NatsWebhook {
        shared: Arc::clone(shared),
        job,
        message: message.clone(),
        tries,
        settled: false,
    };
    match record {
        Ok(Slot::Job(record)) if record.job.status.is_ended() => Ok(Some(webhook(record.job))),
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

#[async_trait]
impl WebhookLease for NatsWebhook {
    fn job(&self) -> &StoredJob {
        &self.job
    }

    fn tries(&self) -> u32 {
        self.tries
    }

    async fn settle(mut self: Box<Self>) -> Result<(), StoreError> {
        self.settled = true;
        let settled = self.message.double_ack().await;
        settled.map_err(|error| self.shared.link.unavailable(error))
    }

    async fn retry(mut self: Box<Self>, after: Duration) -> Result<(), StoreError> {
        self.settled = true;
        acknowledge(&self.message, AckKind::Nak(Some(after)))
            .await
            .map_err(|failure| self.shared.link.failed(failure))
    }
}

impl Drop for NatsWebhook {
    fn drop(&mut self) {
        if self.settled {
            return;
        }
        if let Ok(runtime) = Handle::try_current() {
            let message = self.message.clone();
            runtime.spawn(async move { acknowledge(&message, AckKind::Nak(None)).await.ok() });
        }
    }
}
