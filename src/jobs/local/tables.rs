//! The tables of the database, and the one function that keeps the indexes in step with the jobs.

use std::sync::Arc;

use redb::{ReadTransaction, ReadableTable, Table, TableDefinition, WriteTransaction};

use super::fault::Fault;
use crate::jobs::{JobId, JobStatus, StoredJob};

/// Version of the tables below. A store with a higher one is not opened.
pub(super) const FORMAT: u64 = 1;

/// Numbers by name: `format`, and `sequence`, the number of the next job.
const META: TableDefinition<&str, u64> = TableDefinition::new("meta");
/// Id to number, owner and the job as JSON.
const JOBS: TableDefinition<&str, (u64, &str, &[u8])> = TableDefinition::new("jobs");
/// Owner and number to id and status, for lists.
const OWNERS: TableDefinition<(&str, u64), (&str, u8)> = TableDefinition::new("owners");
/// Model and number of the queued jobs to id and time of creation.
const QUEUE: TableDefinition<(&str, u64), (&str, u64)> = TableDefinition::new("queue");
/// Ids of the jobs in progress.
const RUNNING: TableDefinition<&str, ()> = TableDefinition::new("running");
/// Time of deletion and id of the ended jobs to the size of their files.
const EXPIRY: TableDefinition<(u64, &str), u64> = TableDefinition::new("expiry");
/// Id of the ended jobs whose webhook is not settled to the time of the next try and the number of tries.
const WEBHOOKS: TableDefinition<&str, (u64, u32)> = TableDefinition::new("webhooks");

/// A stored job and its number: jobs are queued and listed in the order of their numbers.
#[derive(Debug, Clone)]
pub(super) struct Row {
    pub(super) sequence: u64,
    pub(super) job: Arc<StoredJob>,
}

impl Row {
    /// Size of the job's files.
    pub(super) fn bytes(&self) -> u64 {
        self.job.files.iter().map(|file| file.bytes).sum()
    }
}

/// The tables of a write transaction.
pub(super) struct Tables<'t> {
    meta: Table<'t, &'static str, u64>,
    jobs: Table<'t, &'static str, (u64, &'static str, &'static [u8])>,
    owners: Table<'t, (&'static str, u64), (&'static str, u8)>,
    queue: Table<'t, (&'static str, u64), (&'static str, u64)>,
    running: Table<'t, &'static str, ()>,
    expiry: Table<'t, (u64, &'static str), u64>,
    webhooks: Table<'t, &'static str, (u64, u32)>,
}

/// A queued job in the database.
pub(super) struct QueuedRow {
    pub(super) model: String,
    pub(super) sequence: u64,
    pub(super) id: JobId,
    pub(super) created_ms: u64,
}

impl<'t> Tables<'t> {
    /// Opens the tables, and makes those that do not exist.
    pub(super) fn open(transaction: &'t WriteTransaction) -> Result<Self, Fault> {
        Ok(Self {
            meta: transaction.open_table(META)?,
            jobs: transaction.open_table(JOBS)?,
            owners: transaction.open_table(OWNERS)?,
            queue: transaction.open_table(QUEUE)?,
            running: transaction.open_table(RUNNING)?,
            expiry: transaction.open_table(EXPIRY)?,
            webhooks: transaction.open_table(WEBHOOKS)?,
        })
    }

    /// Records the format of a new database. Returns the format of an existing one.
    pub(super) fn format(&mut self) -> Result<u64, Fault> {
        let stored = self.meta.get("format")?.map(|value| value.value());
        if stored.is_none() {
            self.meta.insert("format", FORMAT)?;
        }
        Ok(stored.unwrap_or(FORMAT))
    }

    /// A number that no job has had.
    pub(super) fn next_sequence(&mut self) -> Result<u64, Fault> {
        let next = self.meta.get("sequence")?.map_or(1, |value| value.value());
        self.meta.insert("sequence", next + 1)?;
        Ok(next)
    }

    pub(super) fn find(&self, id: &JobId) -> Result<Option<Row>, Fault> {
        find(&self.jobs, id)
    }

    /// Stores a job and its place in the indexes, which its status gives.
    pub(super) fn put(&mut self, row: &Row) -> Result<(), Fault> {
        let job = &*row.job;
        let (id, owner) = (job.id.as_str(), job.owner.as_str());
        let json = serde_json::to_vec(job).map_err(|error| Fault::Unreadable {
            id: job.id.clone(),
            error: error.to_string(),
        })?;
        self.jobs
            .insert(id, (row.sequence, owner, json.as_slice()))?;
        let status = status_number(job.status);
        self.owners.insert((owner, row.sequence), (id, status))?;
        let place = (job.model.as_str(), row.sequence);
        if job.status == JobStatus::Queued {
            self.queue.insert(place, (id, job.created_ms))?;
        } else {
            self.queue.remove(place)?;
        }
        if job.status == JobStatus::InProgress {
            self.running.insert(id, ())?;
        } else {
            self.running.remove(id)?;
        }
        if job.status.is_ended() {
            let expires_ms = job.expires_ms.unwrap_or(u64::MAX);
            self.expiry.insert((expires_ms, id), row.bytes())?;
            if job.webhook.is_some() {
                let due_ms = job.ended_ms.unwrap_or_default();
                self.webhooks.insert(id, (due_ms, 0))?;
            }
        }
        Ok(())
    }

    /// Removes an ended job. `expires_ms` is the time in its record.
    pub(super) fn remove(&mut self, id: &JobId, expires_ms: u64) -> Result<(), Fault> {
        let id = id.as_str();
        let place = self.jobs.remove(id)?.map(|row| {
            let (sequence, owner, _) = row.value();
            (owner.to_owned(), sequence)
        });
        if let Some((owner, sequence)) = place {
            self.owners.remove((owner.as_str(), sequence))?;
        }
        self.expiry.remove((expires_ms, id))?;
        self.webhooks.remove(id)?;
        Ok(())
    }

    /// Takes a job whose record cannot be read out of the queue. It is deleted at `expires_ms`.
    pub(super) fn set_aside(
        &mut self,
        id: &JobId,
        queued: Option<(&str, u64)>,
        expires_ms: u64,
    ) -> Result<(), Fault> {
        if let Some(place) = queued {
            self.queue.remove(place)?;
        }
        self.running.remove(id.as_str())?;
        self.expiry.insert((expires_ms, id.as_str()), 0)?;
        Ok(())
    }

    /// Ids of the jobs in progress.
    pub(super) fn running(&self) -> Result<Vec<JobId>, Fault> {
        let mut ids = Vec::new();
        for entry in self.running.iter()? {
            ids.extend(JobId::parse(entry?.0.value()));
        }
        Ok(ids)
    }

    /// The ended jobs with files that expire first, until `bytes` are together. Each entry is the time, the
    /// id, and the size of the files.
    pub(super) fn first_to_expire(
        &self,
        bytes: u64,
        limit: usize,
    ) -> Result<Vec<(u64, JobId, u64)>, Fault> {
        let (mut found, mut together) = (Vec::new(), 0);
        for entry in self.expiry.iter()? {
            if together >= bytes || found.len() == limit {
                break;
            }
            let (key, size) = entry?;
            let ((expires_ms, id), size) = (key.value(), size.value());
            if size > 0 {
                together += size;
                found.extend(JobId::parse(id).map(|id| (expires_ms, id, size)));
            }
        }
        Ok(found)
    }

    /// The ended jobs that expire at this time or before, as in [`Self::first_to_expire`].
    pub(super) fn expired(
        &self,
        now_ms: u64,
        limit: usize,
    ) -> Result<Vec<(u64, JobId, u64)>, Fault> {
        let mut found = Vec::new();
        for entry in self.expiry.range(..=(now_ms, "\u{10ffff}"))?.take(limit) {
            let (key, bytes) = entry?;
            let (expires_ms, id) = key.value();
            found.extend(JobId::parse(id).map(|id| (expires_ms, id, bytes.value())));
        }
        Ok(found)
    }

    /// Plans the next try of a webhook, or forgets it. Returns whether it was there.
    pub(super) fn set_webhook(
        &mut self,
        id: &JobId,
        next: Option<(u64, u32)>,
    ) -> Result<bool, Fault> {
        let known = self.webhooks.remove(id.as_str())?.is_some();
        if let Some(next) = next.filter(|_| known) {
            self.webhooks.insert(id.as_str(), next)?;
        }
        Ok(known)
    }

    /// The queue, in order.
    pub(super) fn queued(&self) -> Result<Vec<QueuedRow>, Fault> {
        let mut rows = Vec::new();
        for entry in self.queue.iter()? {
            let (key, value) = entry?;
            let ((model, sequence), (id, created_ms)) = (key.value(), value.value());
            rows.extend(JobId::parse(id).map(|id| QueuedRow {
                model: model.to_owned(),
                sequence,
                id,
                created_ms,
            }));
        }
        Ok(rows)
    }

    /// Webhooks that are not settled: id, time of the next try, number of tries.
    pub(super) fn webhooks(&self) -> Result<Vec<(JobId, u64, u32)>, Fault> {
        let mut rows = Vec::new();
        for entry in self.webhooks.iter()? {
            let (key, value) = entry?;
            let (due_ms, tries) = value.value();
            rows.extend(JobId::parse(key.value()).map(|id| (id, due_ms, tries)));
        }
        Ok(rows)
    }

    /// Size of all files.
    pub(super) fn bytes(&self) -> Result<u64, Fault> {
        let mut bytes = 0;
        for entry in self.expiry.iter()? {
            bytes += entry?.1.value();
        }
        Ok(bytes)
    }
}

/// The job of this id, as it was when the transaction began.
pub(super) fn read_job(transaction: &ReadTransaction, id: &JobId) -> Result<Option<Row>, Fault> {
    find(&transaction.open_table(JOBS)?, id)
}

/// Jobs of an owner with numbers below `before`, the newest first, and whether there are more. Records
/// that cannot be read are left out.
pub(super) fn read_list(
    transaction: &ReadTransaction,
    owner: &str,
    before: u64,
    limit: usize,
    status: Option<JobStatus>,
) -> Result<(Vec<Row>, bool), Fault> {
    let owners = transaction.open_table(OWNERS)?;
    let jobs = transaction.open_table(JOBS)?;
    let wanted = status.map(status_number);
    let mut rows = Vec::new();
    for entry in owners.range((owner, 0)..(owner, before))?.rev() {
        let (_, value) = entry?;
        let (id, status) = value.value();
        if wanted.is_some_and(|wanted| wanted != status) {
            continue;
        }
        if rows.len() == limit {
            return Ok((rows, true));
        }
        let Some(id) = JobId::parse(id) else { continue };
        match find(&jobs, &id) {
            Ok(row) => rows.extend(row),
            Err(Fault::Unreadable { id, error }) => {
                tracing::warn!(%id, "the record of a job cannot be read: {error}");
            }
            Err(fault) => return Err(fault),
        }
    }
    Ok((rows, false))
}

fn find(
    jobs: &impl ReadableTable<&'static str, (u64, &'static str, &'static [u8])>,
    id: &JobId,
) -> Result<Option<Row>, Fault> {
    let Some(found) = jobs.get(id.as_str())? else {
        return Ok(None);
    };
    let (sequence, _, json) = found.value();
    let job = serde_json::from_slice(json).map_err(|error| Fault::Unreadable {
        id: id.clone(),
        error: error.to_string(),
    })?;
    Ok(Some(Row { sequence, job }))
}

fn status_number(status: JobStatus) -> u8 {
    match status {
        JobStatus::Queued => 0,
        JobStatus::InProgress => 1,
        JobStatus::Completed => 2,
        JobStatus::Failed => 3,
        JobStatus::Cancelled => 4,
    }
}
