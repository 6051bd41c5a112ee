//! A registry of running requests by id, in memory: who owns a job, how far it is, how it ended, and a way to cancel it.
//!
//! [`JobRegistry::add`] returns a [`JobGuard`] to the task that runs the job; other tasks look the
//! job up by its id and its owner. Unfinished jobs always stay in the registry. Jobs that have
//! ended stay for as long as [`Retention`] says. Functions take the current time, so that tests
//! need no clock.

mod record;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::Notify;

pub use self::record::{JobRecord, JobState};

use super::Caller;

/// How long a registry keeps jobs that have ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Retention {
    /// Jobs that are kept after their end; the ones that ended first are dropped first.
    pub max_ended: usize,
    /// Time from a job's end until it is dropped.
    pub max_age: Duration,
}

impl Retention {
    /// Jobs are dropped when they end.
    pub const NONE: Self = Self {
        max_ended: 0,
        max_age: Duration::ZERO,
    };
}

/// Jobs by id. `R` is what a job may leave as its result.
///
/// A caller finds only its own jobs.
#[derive(Debug)]
pub struct JobRegistry<R> {
    retention: Retention,
    /// In the order in which they were added.
    jobs: Mutex<Vec<Entry<R>>>,
}

#[derive(Debug)]
struct Entry<R> {
    record: JobRecord<R>,
    cancel: Arc<Notify>,
}

/// The running side of a job. Dropping it ends the job as [`JobState::Cancelled`], unless it has
/// ended before.
#[derive(Debug)]
pub struct JobGuard<R> {
    registry: Arc<JobRegistry<R>>,
    id: String,
    cancel: Arc<Notify>,
}

impl<R> JobRegistry<R> {
    pub fn new(retention: Retention) -> Self {
        Self {
            retention,
            jobs: Mutex::new(Vec::new()),
        }
    }

    /// Adds a job of `steps` denoising steps. `id` must differ from the ids of all other jobs.
    pub fn add(
        self: &Arc<Self>,
        id: &str,
        owner: Caller,
        steps: usize,
        now: Instant,
    ) -> JobGuard<R> {
        let cancel = Arc::new(Notify::new());
        let mut jobs = self.lock();
        self.evict(&mut jobs, now);
        jobs.push(Entry {
            record: JobRecord::new(id, owner, steps, now),
            cancel: Arc::clone(&cancel),
        });
        JobGuard {
            registry: Arc::clone(self),
            id: id.to_owned(),
            cancel,
        }
    }

    /// Asks the task that runs a job to end it. Returns whether the caller has an unfinished job
    /// of this id.
    pub fn cancel(&self, id: &str, owner: Caller) -> bool {
        let jobs = self.lock();
        let job = jobs.iter().find(|job| {
            let record = &job.record;
            record.id == id && record.owner == owner && !record.state.is_ended()
        });
        job.inspect(|job| job.cancel.notify_one()).is_some()
    }

    /// No code that holds this lock can panic halfway through a change.
    fn lock(&self) -> MutexGuard<'_, Vec<Entry<R>>> {
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Drops ended jobs that are too old or too many.
    fn evict(&self, jobs: &mut Vec<Entry<R>>, now: Instant) {
        let Retention { max_ended, max_age } = self.retention;
        jobs.retain(|job| {
            let ended = job.record.ended;
            ended.is_none_or(|ended| now.saturating_duration_since(ended) < max_age)
        });
        let mut ends: Vec<Instant> = jobs.iter().filter_map(|job| job.record.ended).collect();
        ends.sort_unstable();
        let mut surplus = ends.len().saturating_sub(max_ended);
        let Some(last) = surplus.checked_sub(1).map(|index| ends[index]) else {
            return;
        };
        jobs.retain(|job| {
            let drops = surplus > 0 && job.record.ended.is_some_and(|ended| ended <= last);
            surplus -= usize::from(drops);
            !drops
        });
    }
}

impl<R: Clone> JobRegistry<R> {
    /// The caller's job of this id, unfinished or ended.
    pub fn get(&self, id: &str, owner: Caller, now: Instant) -> Option<JobRecord<R>> {
        let mut jobs = self.lock();
        self.evict(&mut jobs, now);
        let mut records = jobs.iter().map(|job| &job.record);
        records
            .find(|record| record.id == id && record.owner == owner)
            .cloned()
    }

    /// The caller's unfinished jobs, the oldest one first.
    pub fn unfinished(&self, owner: Caller) -> Vec<JobRecord<R>> {
        let jobs = self.lock();
        let records = jobs.iter().map(|job| &job.record);
        records
            .filter(|record| record.owner == owner && !record.state.is_ended())
            .cloned()
            .collect()
    }
}

impl<R> JobGuard<R> {
    /// Waits until the owner cancels the job.
    pub async fn cancelled(&self) {
        self.cancel.notified().await;
    }

    /// Records that the job waits in the queue, and the estimated wait.
    pub fn queued(&self, estimated_wait: Option<Duration>, now: Instant) {
        self.update(|record| record.progress.queued = (now, estimated_wait));
    }

    /// Records that `step` of `total` denoising steps are over.
    pub fn stepped(&self, step: usize, total: usize, now: Instant) {
        self.update(|record| {
            record.state = JobState::Running { step, total };
            let first = record.progress.stepped.map_or(now, |(first, _)| first);
            record.progress.stepped = Some((first, now));
        });
    }

    /// Replaces the job's preview, a PNG file.
    pub fn preview(&self, file: Bytes) {
        self.update(|record| record.preview = Some(file));
    }

    /// Ends the job as [`JobState::Done`].
    pub fn done(self, result: Option<R>, now: Instant) {
        self.end(JobState::Done, result, now);
    }

    /// Ends the job as [`JobState::Failed`].
    pub fn failed(self, result: Option<R>, now: Instant) {
        self.end(JobState::Failed, result, now);
    }

    fn end(&self, state: JobState, result: Option<R>, now: Instant) {
        self.update(|record| {
            record.state = state;
            record.preview = None;
            record.result = result;
            record.ended = Some(now);
        });
        self.registry.evict(&mut self.registry.lock(), now);
    }

    /// Changes the job unless it has ended.
    fn update(&self, change: impl FnOnce(&mut JobRecord<R>)) {
        let mut jobs = self.registry.lock();
        let mut records = jobs.iter_mut().map(|job| &mut job.record);
        let record = records.find(|record| record.id == self.id);
        if let Some(record) = record.filter(|record| !record.state.is_ended()) {
            change(record);
        }
    }
}

impl<R> Drop for JobGuard<R> {
    fn drop(&mut self) {
        self.end(JobState::Cancelled, None, Instant::now());
    }
}

#[cfg(test)]
mod tests;
