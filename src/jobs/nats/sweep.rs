//! Deletes what has expired, and compares the queue with the records.

use std::collections::HashSet;
use std::time::Duration;

use super::mirror::Listed;
use super::names;
use super::records::Record;
use super::shared::{Shared, now_ms};
use crate::jobs::{JobId, StoreError};

/// Most jobs that one call deletes.
const DELETE_AT_ONCE: usize = 200;
/// Time after which all servers have seen that a record was deleted.
const MARKER_AGE: Duration = Duration::from_mins(10);
/// Time between two comparisons of the queue with the records.
const COMPARE_EVERY: Duration = Duration::from_secs(30);
/// Age from which a job without a message, or a message of an ended job, is not just being made.
const SETTLED: Duration = Duration::from_secs(30);

pub(super) async fn sweep(shared: &Shared) -> Result<(), StoreError> {
    shared.link.check()?;
    if !*shared.mirror.live().borrow() {
        return Ok(());
    }
    delete_expired(shared).await?;
    for (subject, revision) in shared.mirror.take_markers(MARKER_AGE) {
        shared.records.forget(&subject, revision).await?;
    }
    if shared.compare_is_due(COMPARE_EVERY) {
        compare(shared, SETTLED).await?;
    }
    Ok(())
}

/// Deletes expired jobs, and those that ended first while all files are too large.
async fn delete_expired(shared: &Shared) -> Result<(), StoreError> {
    let now_ms = now_ms();
    let mut ended: Vec<Listed> = shared.mirror.listed(None);
    let mut bytes: u64 = ended.iter().map(|job| job.meta.bytes).sum();
    ended.retain(|job| job.meta.status.is_ended());
    ended.sort_by_key(|job| job.meta.expires_ms);
    let mut expired = Vec::new();
    for job in ended {
        let is_expired = job.meta.expires_ms.is_some_and(|expires| expires <= now_ms);
        if !is_expired && (bytes <= shared.settings.max_bytes || job.meta.bytes == 0) {
            continue;
        }
        bytes = bytes.saturating_sub(job.meta.bytes);
        expired.push(job.id);
    }
    for id in expired.iter().take(DELETE_AT_ONCE) {
        delete(shared, id).await?;
    }
    Ok(())
}

/// Deletes an ended job: first its files, so that a job whose files are left is found again.
pub(super) async fn delete(shared: &Shared, id: &JobId) -> Result<bool, StoreError> {
    loop {
        let Some(record) = shared.records.find(id).await? else {
            shared.mirror.forget(id);
            return Ok(false);
        };
        if !record.job.status.is_ended() {
            return Ok(false);
        }
        delete_files(shared, &record).await?;
        if let Some(revision) = shared.records.delete(&record).await? {
            shared.mirror.apply_deleted(&record, revision);
            return Ok(true);
        }
    }
}

/// Deletes the files of all attempts: a worker that stopped may have left some.
async fn delete_files(shared: &Shared, record: &Record) -> Result<(), StoreError> {
    let job = &record.job;
    for (index, file) in job.files.iter().enumerate() {
        for attempt in 1..=job.attempt {
            let path = names::file_path(&job.id, attempt, index, &file.media_type);
            shared.results.delete(&path).await?;
        }
    }
    Ok(())
}

/// Adds messages that are missing, as a server stopped before it had added them, and removes messages
/// of ended jobs, as no worker has yet come to drop them.
pub(super) async fn compare(shared: &Shared, age: Duration) -> Result<(), StoreError> {
    let before_ms = now_ms().saturating_sub(age.as_millis() as u64);
    let jobs = shared.mirror.listed(None);
    let messages: HashSet<String> = shared.queue.subjects().await?.into_iter().collect();
    for job in jobs {
        let subject = names::job_subject(&job.meta.model, &job.id);
        let has_message = messages.contains(&subject);
        let is_ended = job.meta.status.is_ended();
        if has_message != is_ended || job.meta.created_ms > before_ms {
            continue;
        }
        let Some(record) = shared.records.find(&job.id).await? else {
            continue;
        };
        if record.job.status.is_ended() {
            if is_ended && record.job.ended_ms.is_some_and(|ended| ended <= before_ms) {
                shared.queue.remove(&record).await?;
            }
        } else if !is_ended {
            tracing::warn!("job {} was not in the queue: it is added again", job.id);
            shared.queue.add(&record).await?;
        }
    }
    Ok(())
}
