//! Records of jobs in a key-value bucket. A record is replaced only if its revision is the expected one.

use async_nats::HeaderMap;
use async_nats::jetstream::message::{PublishMessage, StreamMessage};
use async_nats::jetstream::stream::{LastRawMessageErrorKind, Stream};
use serde::{Deserialize, Serialize};

use super::link::{Failure, Link, Published};
use super::names;
use crate::jobs::{JobId, JobStatus, StoreError, StoredJob};

/// Header of a record with what lists and counts need, so that they do not read the records.
const META_HEADER: &str = "Kiln-Job";
/// NATS' own header of a deleted key.
const OPERATION_HEADER: &str = "KV-Operation";
/// Bytes of a message besides the record: its headers, and some space.
const OVERHEAD: usize = 1024;

/// What lists and counts need of a job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Meta {
    pub(super) status: JobStatus,
    /// The model as part of a subject.
    pub(super) model: String,
    pub(super) owner: String,
    pub(super) created_ms: u64,
    pub(super) expires_ms: Option<u64>,
    /// Size of all files.
    pub(super) bytes: u64,
}

/// A record with its revision.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Record {
    pub(super) job: StoredJob,
    /// The model as part of a subject.
    pub(super) model: String,
    pub(super) revision: u64,
}

impl Record {
    pub(super) fn meta(&self) -> Meta {
        let job = &self.job;
        Meta {
            status: job.status,
            model: self.model.clone(),
            owner: job.owner.to_string(),
            created_ms: job.created_ms,
            expires_ms: job.expires_ms,
            bytes: job.files.iter().map(|file| file.bytes).sum(),
        }
    }
}

/// What a key holds.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Slot {
    Empty,
    /// The key was deleted, and the marker has this revision.
    Deleted(u64),
    Job(Box<Record>),
}

/// Why a record was not replaced: what is there instead.
pub(super) type Replaced = Result<Record, Slot>;

/// The bucket.
#[derive(Debug, Clone)]
pub(super) struct Records {
    link: Link,
    stream: Stream<()>,
}

/// The metadata in the headers of a record; `None` for the marker of a deleted one.
pub(super) fn read_meta(headers: Option<&HeaderMap>) -> Option<Meta> {
    serde_json::from_str(headers?.get(META_HEADER)?.as_str()).ok()
}

impl Records {
    pub(super) const fn new(link: Link, stream: Stream<()>) -> Self {
        Self { link, stream }
    }

    /// Reads a record from the leader of the bucket.
    pub(super) async fn get(&self, subject: &str) -> Result<Slot, StoreError> {
        self.link.retry(|| self.try_get(subject)).await
    }

    /// The job of this id, whoever owns it.
    pub(super) async fn find(&self, id: &JobId) -> Result<Option<Record>, StoreError> {
        Ok(match self.get(&names::record_filter(id)).await? {
            Slot::Job(record) => Some(*record),
            Slot::Empty | Slot::Deleted(_) => None,
        })
    }

    /// One try of [`Self::get`].
    pub(super) async fn try_get(&self, subject: &str) -> Result<Slot, Failure> {
        match self.stream.get_last_raw_message_by_subject(subject).await {
            Ok(message) => read(&message),
            Err(error) => match error.kind() {
                LastRawMessageErrorKind::NoMessageFound => Ok(Slot::Empty),
                _ => Err(Failure::again(error)),
            },
        }
    }

    /// Stores a record in place of what has this revision; 0 is an empty key.
    pub(super) async fn replace(
        &self,
        revision: u64,
        model: &str,
        job: StoredJob,
    ) -> Result<Replaced, StoreError> {
        let subject = names::record_subject(&job.id, &job.owner);
        let mut record = Record {
            job,
            model: model.to_owned(),
            revision: 0,
        };
        let text = serde_json::to_vec(&record.job).map_err(not_json)?;
        let meta = serde_json::to_string(&record.meta()).map_err(not_json)?;
        let max = self.link.client.max_payload().saturating_sub(OVERHEAD);
        if text.len() > max {
            return Err(StoreError::TooLarge {
                bytes: text.len(),
                max,
            });
        }
        let message = PublishMessage::build()
            .payload(text.into())
            .header(META_HEADER, meta.as_str());
        match self.publish(&subject, message, revision).await? {
            Some(revision) => {
                record.revision = revision;
                Ok(Ok(record))
            }
            None => match self.get(&subject).await? {
                // An earlier try was stored, and its answer was lost.
                Slot::Job(stored) if stored.job == record.job => Ok(Ok(*stored)),
                slot => Ok(Err(slot)),
            },
        }
    }

    /// Puts a marker in place of a record. Returns its revision, or `None` if the record has changed.
    pub(super) async fn delete(&self, record: &Record) -> Result<Option<u64>, StoreError> {
        let subject = names::record_subject(&record.job.id, &record.job.owner);
        let message = PublishMessage::build().header(OPERATION_HEADER, "DEL");
        self.publish(&subject, message, record.revision).await
    }

    /// Removes the marker of a deleted record.
    pub(super) async fn forget(&self, subject: &str, revision: u64) -> Result<(), StoreError> {
        let purge = self.stream.purge().filter(subject).sequence(revision + 1);
        let purged = purge.await;
        purged.map_err(|error| self.link.unavailable(error))?;
        Ok(())
    }

    async fn publish(
        &self,
        subject: &str,
        message: PublishMessage,
        revision: u64,
    ) -> Result<Option<u64>, StoreError> {
        let message = message.expected_last_subject_sequence(revision);
        let publish = || async {
            match self
                .link
                .publish(subject.to_owned(), message.clone())
                .await?
            {
                Published::Stored(revision) => Ok(Some(revision)),
                Published::Conflict => Ok(None),
                other @ (Published::Duplicate | Published::Full) => {
                    Err(Failure::Again(format!("bucket kiln-jobs: {other:?}")))
                }
            }
        };
        self.link.retry(publish).await
    }
}

fn read(message: &StreamMessage) -> Result<Slot, Failure> {
    if message.headers.get(OPERATION_HEADER).is_some() {
        return Ok(Slot::Deleted(message.sequence));
    }
    let broken = |why: String| {
        let subject = &message.subject;
        Failure::Store(StoreError::Broken(format!("the record {subject} {why}")))
    };
    let job = serde_json::from_slice(&message.payload)
        .map_err(|error| broken(format!("cannot be read: {error}")))?;
    let meta = read_meta(Some(&message.headers))
        .ok_or_else(|| broken(format!("has no header {META_HEADER}")))?;
    Ok(Slot::Job(Box::new(Record {
        job,
        model: meta.model,
        revision: message.sequence,
    })))
}

fn not_json(error: serde_json::Error) -> StoreError {
    StoreError::Broken(format!("the job cannot be written as JSON: {error}"))
}
