//! Names of streams, subjects, keys and files.

use std::fmt::Write as _;

use crate::jobs::{JobId, Owner};

/// The work queue: one message per job that has not ended, without its request.
pub(super) const JOBS: &str = "KILN";
/// Ended jobs whose webhooks are to be sent.
pub(super) const WEBHOOKS: &str = "KILN_WEBHOOKS";
/// The stream below the key-value bucket `kiln-jobs`.
pub(super) const RECORDS: &str = "KV_kiln-jobs";
/// The object store of files, and the stream below it.
pub(super) const RESULTS_BUCKET: &str = "kiln-results";
pub(super) const RESULTS: &str = "OBJ_kiln-results";

pub(super) const ALL_JOBS: &str = "kiln.jobs.>";
pub(super) const ALL_WEBHOOKS: &str = "kiln.webhooks.>";
pub(super) const ALL_RECORDS: &str = "$KV.kiln-jobs.>";
pub(super) const ALL_PROGRESS: &str = "kiln.progress.*";
/// The durable consumer of all webhooks.
pub(super) const WEBHOOK_CONSUMER: &str = "webhooks";

const RECORD_PREFIX: &str = "$KV.kiln-jobs.";

/// A model's name as part of a subject and as the name of its consumer: bytes other than letters,
/// digits and `-` are written as `_` and two hexadecimal digits.
pub(super) fn model_token(model: &str) -> String {
    let mut token = String::with_capacity(model.len());
    for byte in model.bytes() {
        if byte.is_ascii_alphanumeric() || byte == b'-' {
            token.push(char::from(byte));
        } else {
            // Writing to a string cannot fail.
            let _ = write!(token, "_{byte:02X}");
        }
    }
    token
}

pub(super) fn model_filter(model: &str) -> String {
    format!("kiln.jobs.{model}.*")
}

pub(super) fn job_subject(model: &str, id: &JobId) -> String {
    format!("kiln.jobs.{model}.{id}")
}

pub(super) fn webhook_subject(id: &JobId) -> String {
    format!("kiln.webhooks.{id}")
}

pub(super) fn progress_subject(id: &JobId) -> String {
    format!("kiln.progress.{id}")
}

pub(super) fn record_subject(id: &JobId, owner: &Owner) -> String {
    format!("{RECORD_PREFIX}{id}.{owner}")
}

/// The subject of a record whose owner is not known.
pub(super) fn record_filter(id: &JobId) -> String {
    format!("{RECORD_PREFIX}{id}.*")
}

/// The id at the end of a subject of a job, a webhook or a progress.
pub(super) fn id_of(subject: &str) -> Option<JobId> {
    JobId::parse(subject.rsplit('.').next()?)
}

/// The id of a record's subject.
pub(super) fn record_id(subject: &str) -> Option<JobId> {
    let key = subject.strip_prefix(RECORD_PREFIX)?;
    JobId::parse(key.split('.').next()?)
}

/// Path of a file below the results.
pub(super) fn file_path(id: &JobId, attempt: u32, index: usize, media_type: &str) -> String {
    let extension = match media_type {
        "image/png" => "png",
        "image/jpeg" => "jpg",
        "image/webp" => "webp",
        _ => "bin",
    };
    format!("{id}/{attempt}/{index}.{extension}")
}
