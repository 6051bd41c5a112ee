//! The work queue: one message for each job that has not ended.

use async_nats::jetstream::message::PublishMessage;
use async_nats::jetstream::stream::{LastRawMessageErrorKind, Stream};
use serde::{Deserialize, Serialize};

use super::link::{Failure, Link, Published};
use super::names;
use super::records::Record;
use crate::jobs::{Owner, StoreError};

/// The content of a message: with the id in its subject, it leads to the record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Ticket {
    pub(super) owner: Owner,
}

/// The content of the message of a webhook.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct WebhookTicket {
    pub(super) owner: Owner,
    /// How often it was sent in vain.
    pub(super) tries: u32,
    /// Unix time in milliseconds before which it is not sent.
    pub(super) due_ms: u64,
}

impl WebhookTicket {
    /// Of a job that has just ended.
    pub(super) fn new(record: &Record) -> Self {
        Self {
            owner: record.job.owner.clone(),
            tries: 0,
            due_ms: 0,
        }
    }
}

/// Whether a message is in the queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Queued {
    Added,
    Present,
    Full,
}

/// The streams of jobs and of webhooks.
#[derive(Debug, Clone)]
pub(super) struct Queue {
    link: Link,
    jobs: Stream<()>,
}

impl Queue {
    pub(super) const fn new(link: Link, jobs: Stream<()>) -> Self {
        Self { link, jobs }
    }

    /// Adds a job's message, unless the queue has it. The id of the message differs from that of an
    /// earlier job that had the same idempotency key and was deleted.
    pub(super) async fn add(&self, record: &Record) -> Result<Queued, StoreError> {
        let job = &record.job;
        let message_id = format!("{}.{}", job.id, job.created_ms);
        let added = self.publish(record, Some(message_id)).await?;
        if added != Queued::Present || self.sequence(record).await?.is_some() {
            return Ok(added);
        }
        // The stream knows the id, and the message is gone although its job has not ended.
        self.publish(record, None).await
    }

    async fn publish(
        &self,
        record: &Record,
        message_id: Option<String>,
    ) -> Result<Queued, StoreError> {
        let subject = names::job_subject(&record.model, &record.job.id);
        let mut message = PublishMessage::build()
            .payload(ticket(record))
            .expected_last_subject_sequence(0);
        if let Some(id) = message_id {
            message = message.message_id(id);
        }
        let publish = || self.link.publish(subject.clone(), message.clone());
        Ok(match self.link.retry(publish).await? {
            Published::Stored(_) => Queued::Added,
            Published::Duplicate | Published::Conflict => Queued::Present,
            Published::Full => Queued::Full,
        })
    }

    /// Sequence of a job's message.
    async fn sequence(&self, record: &Record) -> Result<Option<u64>, StoreError> {
        let subject = names::job_subject(&record.model, &record.job.id);
        let read = || async {
            match self.jobs.get_last_raw_message_by_subject(&subject).await {
                Ok(message) => Ok(Some(message.sequence)),
                Err(error) => match error.kind() {
                    LastRawMessageErrorKind::NoMessageFound => Ok(None),
                    _ => Err(Failure::again(error)),
                },
            }
        };
        self.link.retry(read).await
    }

    /// Removes a job's message. A worker that has it already finds that its job has ended.
    pub(super) async fn remove(&self, record: &Record) -> Result<(), StoreError> {
        if let Some(sequence) = self.sequence(record).await? {
            let deleted = self.jobs.delete_message(sequence).await;
            deleted.map_err(|error| self.link.unavailable(error))?;
        }
        Ok(())
    }

    /// Subjects of all messages.
    pub(super) async fn subjects(&self) -> Result<Vec<String>, StoreError> {
        use futures_util::TryStreamExt as _;

        let info = self.jobs.info_with_subjects(names::ALL_JOBS).await;
        let info = info.map_err(|error| self.link.unavailable(error))?;
        let subjects: Result<Vec<_>, _> = info.try_collect().await;
        let subjects = subjects.map_err(|error| self.link.unavailable(error))?;
        Ok(subjects.into_iter().map(|(subject, _)| subject).collect())
    }

    /// Adds the message of an ended job's webhook. A repeated call with the same number of tries within
    /// some minutes adds no other one.
    pub(super) async fn add_webhook(
        &self,
        record: &Record,
        ticket: &WebhookTicket,
    ) -> Result<(), StoreError> {
        let job = &record.job;
        let message_id = format!("{}.{}.{}", job.id, job.created_ms, ticket.tries);
        let message = PublishMessage::build()
            // A struct of text and numbers cannot fail to be written.
            .payload(serde_json::to_vec(ticket).unwrap_or_default().into())
            .message_id(message_id);
        let subject = names::webhook_subject(&job.id);
        let publish = || self.link.publish(subject.clone(), message.clone());
        self.link.retry(publish).await?;
        Ok(())
    }
}

fn ticket(record: &Record) -> bytes::Bytes {
    let ticket = Ticket {
        owner: record.job.owner.clone(),
    };
    // A struct of text cannot fail to be written.
    serde_json::to_vec(&ticket).unwrap_or_default().into()
}
