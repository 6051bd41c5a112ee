//! A durable job as a store keeps it, and its parts. All of them are stored as JSON.

use std::fmt;

use bytes::Bytes;
use ring::digest::{SHA256, digest};
use serde::{Deserialize, Serialize};

use super::Owner;
use super::caller::hex;
use crate::image::Encoding;
use crate::request::{GenerationRequest, random_u64};

/// The id of a durable job, such as `job-00c0ffee00c0ffee00c0ffee`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct JobId(String);

/// Text before the digits of an id.
const ID_PREFIX: &str = "job-";
/// Number of hexadecimal digits of an id.
const ID_DIGITS: usize = 24;

impl JobId {
    /// A new id. With an idempotency key it depends only on the owner and the key, so that every
    /// server gives a repeated request the same id.
    pub fn new(owner: &Owner, key: Option<&IdempotencyKey>) -> Self {
        let mut digits = match key {
            Some(IdempotencyKey { key, .. }) => {
                let text = format!("kiln job\n{owner}\n{key}");
                hex(digest(&SHA256, text.as_bytes()).as_ref())
            }
            None => format!("{:016x}{:016x}", random_u64(), random_u64()),
        };
        digits.truncate(ID_DIGITS);
        Self(format!("{ID_PREFIX}{digits}"))
    }

    /// Reads an id; `None` if no store can have made it.
    pub fn parse(text: &str) -> Option<Self> {
        let digits = text.strip_prefix(ID_PREFIX)?;
        let is_digit = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
        let is_id = digits.len() == ID_DIGITS && digits.bytes().all(is_digit);
        is_id.then(|| Self(text.to_owned()))
    }

    /// Letters, digits and one `-`.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for JobId {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

/// What makes a repeated request the same job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdempotencyKey {
    /// The client's own text.
    pub key: String,
    /// Hash of the request's body: the same key with another body is an error.
    pub body: String,
}

impl IdempotencyKey {
    /// The key of a request with this body.
    pub fn new(key: &str, body: &[u8]) -> Self {
        Self {
            key: key.to_owned(),
            body: hex(digest(&SHA256, body).as_ref()),
        }
    }
}

/// A checked request with its seed, so that every attempt makes the same files.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StoredRequest {
    pub request: GenerationRequest,
    pub encoding: Encoding,
    /// Name of the model in the answer.
    pub model: String,
}

/// W3C trace context of the request that made a job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TraceContext {
    pub traceparent: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tracestate: Option<String>,
}

impl TraceContext {
    /// The values of `traceparent` and `tracestate`.
    pub fn headers(&self) -> (&str, Option<&str>) {
        (&self.traceparent, self.tracestate.as_deref())
    }
}

/// A job that is to be stored.
#[derive(Debug, Clone, PartialEq)]
pub struct NewJob {
    pub owner: Owner,
    pub request: StoredRequest,
    pub idempotency: Option<IdempotencyKey>,
    /// Where the ended job is posted to.
    pub webhook: Option<String>,
    pub trace: Option<TraceContext>,
}

/// A durable job.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StoredJob {
    pub id: JobId,
    pub owner: Owner,
    /// Name of the model whose workers take it: that of the store's settings.
    pub model: String,
    pub status: JobStatus,
    /// How often a worker has begun it.
    pub attempt: u32,
    /// Unix times in milliseconds.
    pub created_ms: u64,
    /// Begin of the last attempt.
    pub started_ms: Option<u64>,
    /// When it was completed, failed or cancelled.
    pub ended_ms: Option<u64>,
    /// When it is deleted; `None` before its end.
    pub expires_ms: Option<u64>,
    pub request: StoredRequest,
    pub idempotency: Option<IdempotencyKey>,
    pub webhook: Option<String>,
    pub trace: Option<TraceContext>,
    /// Why it failed.
    pub error: Option<JobFailure>,
    /// The files of a completed job.
    pub files: Vec<ResultFile>,
    /// Name of the server that made the last attempt.
    pub instance: Option<String>,
}

/// How far a durable job is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum JobStatus {
    Queued,
    InProgress,
    Completed,
    Failed,
    Cancelled,
}

impl JobStatus {
    pub const ALL: [Self; 5] = [
        Self::Queued,
        Self::InProgress,
        Self::Completed,
        Self::Failed,
        Self::Cancelled,
    ];

    /// The name in answers.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::InProgress => "in_progress",
            Self::Completed => "completed",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }

    pub const fn is_ended(self) -> bool {
        matches!(self, Self::Completed | Self::Failed | Self::Cancelled)
    }
}

/// Why a job failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobFailure {
    /// A word for programs, such as `worker_lost`.
    pub code: String,
    /// What was wrong, where, and what to do.
    pub message: String,
}

impl JobFailure {
    /// The code of a job whose workers ended during each of its attempts.
    pub const WORKER_LOST: &'static str = "worker_lost";
}

/// What is known of a file of a completed job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResultFile {
    pub media_type: String,
    pub bytes: u64,
    /// SHA-256 in hexadecimal digits.
    pub sha256: String,
}

/// A file that a worker has made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JobFile {
    pub media_type: &'static str,
    /// Such as `png`.
    pub extension: &'static str,
    pub content: Bytes,
}

impl JobFile {
    pub fn describe(&self) -> ResultFile {
        ResultFile {
            media_type: self.media_type.to_owned(),
            bytes: self.content.len() as u64,
            sha256: ResultFile::hash(&self.content),
        }
    }
}

impl ResultFile {
    /// SHA-256 in hexadecimal digits.
    pub(super) fn hash(content: &[u8]) -> String {
        hex(digest(&SHA256, content).as_ref())
    }
}

/// Denoising steps of a running job.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    pub done: usize,
    pub total: usize,
}

impl NewJob {
    /// The record of this job before its first attempt.
    pub fn into_stored(self, model: &str, now_ms: u64) -> StoredJob {
        StoredJob {
            id: JobId::new(&self.owner, self.idempotency.as_ref()),
            owner: self.owner,
            model: model.to_owned(),
            status: JobStatus::Queued,
            attempt: 0,
            created_ms: now_ms,
            started_ms: None,
            ended_ms: None,
            expires_ms: None,
            request: self.request,
            idempotency: self.idempotency,
            webhook: self.webhook,
            trace: self.trace,
            error: None,
            files: Vec::new(),
            instance: None,
        }
    }
}

#[cfg(test)]
mod tests;
