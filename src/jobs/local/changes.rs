//! The changes of jobs, each in one transaction.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use super::core::Core;
use super::fault::Fault;
use super::live::Next;
use super::tables::{Row, read_job};
use crate::jobs::{
    Content, JobFailure, JobFile, JobId, JobStatus, JobView, NewJob, Revoked, Settled, StoreError,
    StoredJob, Submitted,
};

/// Jobs that one transaction deletes.
const BATCH: usize = 100;

/// A job that was taken, and its lease.
#[derive(Debug)]
pub(super) struct Taken {
    pub(super) job: Arc<StoredJob>,
    pub(super) token: u64,
    pub(super) revoked: watch::Receiver<Option<Revoked>>,
}

impl Core {
    pub(super) fn view(&self, row: &Row) -> JobView {
        self.live().view(row)
    }

    pub(super) fn submit(&self, job: NewJob) -> Result<Submitted, StoreError> {
        let max = self.settings.max_queued;
        let outcome = self.write(|change| {
            let job = job.into_stored(&self.settings.model, change.now_ms);
            if let Some(row) = change.tables.find(&job.id)? {
                return Ok((row.job.idempotency == job.idempotency, row, false));
            }
            let (queued, _) = self.live().queued(&job.model);
            if queued >= max {
                return Err(StoreError::Full { queued }.into());
            }
            let row = Row {
                sequence: change.tables.next_sequence()?,
                job: Arc::new(job),
            };
            change.put(row.clone())?;
            Ok((true, row, true))
        });
        let (is_same, row, is_new) = outcome?;
        Ok(match (is_same, is_new) {
            (false, _) => Submitted::OtherBody(row.job.id.clone()),
            (true, true) => Submitted::New(self.view(&row)),
            (true, false) => Submitted::Existing(self.view(&row)),
        })
    }

    pub(super) fn cancel(&self, id: &JobId) -> Result<Option<JobView>, StoreError> {
        let row = self.write(|change| {
            let Some(mut row) = change.tables.find(id)? else {
                return Ok(None);
            };
            if !row.job.status.is_ended() {
                row.job = Arc::new(self.ended(&row, JobStatus::Cancelled, change.now_ms));
                change.put(row.clone())?;
            }
            Ok(Some(row))
        })?;
        Ok(row.map(|row| self.view(&row)))
    }

    pub(super) fn delete(&self, id: &JobId) -> Result<bool, StoreError> {
        self.write(|change| {
            let row = change.tables.find(id)?;
            let Some(row) = row.filter(|row| row.job.status.is_ended()) else {
                return Ok(false);
            };
            let expires_ms = row.job.expires_ms.unwrap_or(u64::MAX);
            change.remove(id, expires_ms, row.bytes())?;
            Ok(true)
        })
    }

    pub(super) fn content(&self, id: &JobId, index: usize) -> Result<Option<Content>, StoreError> {
        let find = || {
            let row = self.read(|tables| read_job(tables, id))?;
            let row = row.filter(|row| row.job.status == JobStatus::Completed);
            Ok(row.and_then(|row| row.job.files.get(index).cloned()))
        };
        let Some(file) = find()? else {
            return Ok(None);
        };
        match self.results.read(id, index, &file) {
            Ok(content) => Ok(Some(Content::File { file, content })),
            // The job may have been deleted after its record was read.
            Err(error) => match find()? {
                Some(_) => Err(error),
                None => Ok(None),
            },
        }
    }

    /// Takes the next job, if one may be taken now.
    pub(super) fn try_take(&self) -> Result<Next<Taken>, StoreError> {
        loop {
            let now = Instant::now();
            if self.live().any_lost(now) {
                self.recover()?;
            }
            if let Next::At(at) = self.live().next_job(&self.settings.model, now) {
                return Ok(Next::At(at));
            }
            if let Some(taken) = self.take_next(now)? {
                return Ok(Next::Now(taken));
            }
        }
    }

    /// `None` if another worker was faster, or the record cannot be read.
    fn take_next(&self, now: Instant) -> Result<Option<Taken>, StoreError> {
        let model = self.settings.model.as_str();
        self.write(|change| {
            let Next::Now((sequence, id)) = self.live().next_job(model, now) else {
                return Ok(None);
            };
            let Some(row) = self.readable(change.tables.find(&id))? else {
                let expires_ms = self.expires_ms(change.now_ms);
                change.set_aside(&id, Some((model, sequence)), expires_ms)?;
                return Ok(None);
            };
            let mut job = StoredJob::clone(&row.job);
            job.status = JobStatus::InProgress;
            job.attempt += 1;
            job.started_ms = Some(change.now_ms);
            job.instance = Some(self.settings.instance.clone());
            let job = Arc::new(job);
            let (lease, revoked) = self.live().lease(Instant::now() + self.settings.lease);
            let token = lease.token;
            let row = Row {
                sequence,
                job: Arc::clone(&job),
            };
            change.put_with(row, Some(lease), None)?;
            Ok(Some(Taken {
                job,
                token,
                revoked,
            }))
        })
    }

    /// Makes the jobs available again whose workers are gone, and ends those that were attempted too often.
    pub(super) fn recover(&self) -> Result<(), StoreError> {
        let now = Instant::now();
        self.write(|change| {
            for id in change.tables.running()? {
                let Some((counts, delay)) = self.live().lost(&id, now) else {
                    continue;
                };
                let Some(row) = self.readable(change.tables.find(&id))? else {
                    let expires_ms = self.expires_ms(change.now_ms);
                    change.set_aside(&id, None, expires_ms)?;
                    continue;
                };
                let job = if counts && row.job.attempt >= self.settings.max_attempts {
                    let mut job = self.ended(&row, JobStatus::Failed, change.now_ms);
                    job.error = Some(self.worker_lost(&job));
                    self.settings.stats.count_failed(JobFailure::WORKER_LOST);
                    job
                } else {
                    queued_again(&row.job, counts)
                };
                let row = Row {
                    sequence: row.sequence,
                    job: Arc::new(job),
                };
                change.put_with(row, None, Some(now + delay))?;
            }
            Ok(())
        })
    }

    fn worker_lost(&self, job: &StoredJob) -> JobFailure {
        let instance = job.instance.as_deref().unwrap_or("unknown");
        let attempts = match job.attempt {
            1 => "its only attempt".to_owned(),
            attempts => format!("each of {attempts} attempts"),
        };
        JobFailure {
            code: JobFailure::WORKER_LOST.to_owned(),
            message: format!(
                "the worker ended, or gave no sign of life for {} s, during {attempts}: look at the log of \
                 server {instance}, which made the last one",
                self.settings.lease.as_secs_f64()
            ),
        }
    }

    /// `None`, after a warning, for a job whose record cannot be read.
    fn readable(&self, found: Result<Option<Row>, Fault>) -> Result<Option<Row>, Fault> {
        match found {
            Err(fault @ Fault::Unreadable { .. }) => {
                tracing::warn!("a job is not run: {}", fault.into_error(self.path()));
                Ok(None)
            }
            found => found,
        }
    }

    pub(super) fn complete(
        &self,
        id: &JobId,
        token: u64,
        files: &[JobFile],
    ) -> Result<Settled, StoreError> {
        if !self.live().holds(id, token) {
            return Ok(Settled::Superseded);
        }
        let staged = self.results.stage(files)?;
        self.settle(id, token, |now_ms, row| {
            self.results.publish(staged, id)?;
            let mut job = self.ended(row, JobStatus::Completed, now_ms);
            job.files = files.iter().map(JobFile::describe).collect();
            Ok(job)
        })
    }

    pub(super) fn fail(
        &self,
        id: &JobId,
        token: u64,
        failure: JobFailure,
    ) -> Result<Settled, StoreError> {
        self.settle(id, token, |now_ms, row| {
            let mut job = self.ended(row, JobStatus::Failed, now_ms);
            job.error = Some(failure);
            Ok(job)
        })
    }

    pub(super) fn release(
        &self,
        id: &JobId,
        token: u64,
        after: Duration,
    ) -> Result<(), StoreError> {
        let ready = Instant::now() + after;
        self.write(|change| {
            if let Some(mut row) = self.leased(change.tables.find(id)?, token) {
                row.job = Arc::new(queued_again(&row.job, false));
                change.put_with(row, None, Some(ready))?;
            }
            Ok(())
        })
    }

    /// Ends a job whose lease is held.
    fn settle(
        &self,
        id: &JobId,
        token: u64,
        end: impl FnOnce(u64, &Row) -> Result<StoredJob, Fault>,
    ) -> Result<Settled, StoreError> {
        self.write(|change| {
            let Some(mut row) = self.leased(change.tables.find(id)?, token) else {
                return Ok(Settled::Superseded);
            };
            row.job = Arc::new(end(change.now_ms, &row)?);
            change.put(row)?;
            Ok(Settled::Recorded)
        })
    }

    /// A job, if it is in progress under this lease.
    fn leased(&self, row: Option<Row>, token: u64) -> Option<Row> {
        row.filter(|row| {
            row.job.status == JobStatus::InProgress && self.live().holds(&row.job.id, token)
        })
    }

    /// Plans the next try of a webhook, or forgets it, if its lease is held.
    pub(super) fn settle_webhook(
        &self,
        id: &JobId,
        token: u64,
        next: Option<(Duration, u32)>,
    ) -> Result<(), StoreError> {
        self.write(|change| {
            if !self.live().holds_webhook(id, token) {
                return Ok(());
            }
            let next = next.map(|(after, tries)| {
                let after_ms = u64::try_from(after.as_millis()).unwrap_or(u64::MAX);
                (change.now_ms.saturating_add(after_ms), tries)
            });
            change.set_webhook(id, next)
        })
    }

    /// Deletes ended jobs that have expired, then those that expire first until the files are small enough.
    pub(super) fn expire(&self) -> Result<(), StoreError> {
        loop {
            let removed = self.write(|change| {
                let mut rows = change.tables.expired(change.now_ms, BATCH)?;
                let excess = self.live().bytes.saturating_sub(self.settings.max_bytes);
                if rows.is_empty() && excess > 0 {
                    rows = change.tables.first_to_expire(excess, BATCH)?;
                }
                for (expires_ms, id, bytes) in &rows {
                    change.remove(id, *expires_ms, *bytes)?;
                }
                Ok(rows.len())
            })?;
            if removed == 0 {
                return Ok(());
            }
        }
    }

    /// Removes result folders that no completed job has.
    pub(super) fn remove_orphans(&self) -> Result<(), StoreError> {
        let is_kept =
            |row: Option<Row>| row.is_some_and(|row| row.job.status == JobStatus::Completed);
        for id in self.results.list()? {
            match self.read(|tables| Ok(is_kept(read_job(tables, &id)?))) {
                Ok(false) => {}
                // A record that cannot be read may be one of a newer version.
                _ => continue,
            }
            self.write(|change| {
                if !is_kept(change.tables.find(&id)?) {
                    self.results.remove(&id);
                }
                Ok(())
            })?;
        }
        Ok(())
    }
}

/// A job whose attempt ended without a result.
fn queued_again(job: &StoredJob, counts: bool) -> StoredJob {
    let mut job = job.clone();
    job.status = JobStatus::Queued;
    if !counts {
        job.attempt = job.attempt.saturating_sub(1);
    }
    if job.attempt == 0 {
        job.started_ms = None;
        job.instance = None;
    }
    job
}
