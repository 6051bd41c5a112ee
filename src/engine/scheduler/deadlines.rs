//! Jobs that are due: whether one is accepted, when one is given up, and when one is made cheaper.

use std::time::{Duration, Instant};

use kiln_models::job::Job;

use super::Scheduler;
use crate::engine::auto::{choose_by_wait, choose_in_time};
use crate::engine::cost::{Progress, Work};
use crate::engine::deadline::{Due, late, lateness, urgent};
use crate::engine::entry::Entry;
use crate::engine::memory::Plans;
use crate::engine::policy::{Candidate, favourite};
use crate::engine::{Cheaper, SubmitError, SubmitOptions};

/// For how long after the last work the measured speed refuses and gives up jobs. Without this limit, a
/// device that was slow for a while would refuse jobs for ever.
const BELIEVED: Duration = Duration::from_mins(10);

/// A job, the memory that it takes, and the ways to make it cheaper with the work of each.
type Fitting = (Job, Plans, Vec<(Cheaper, Work)>);

impl Scheduler {
    /// Chooses how a job is decoded, so that it fits the memory however it is made cheaper, and
    /// checks that there is room for its adapters and that it can be finished before it is due.
    ///
    /// # Errors
    ///
    /// If it does not fit in any way, or would be late.
    pub(super) fn fit_due(
        &self,
        job: Job,
        options: &SubmitOptions,
        now: Instant,
    ) -> Result<Fitting, SubmitError> {
        let cheaper: Vec<_> = options
            .cheaper
            .iter()
            .map(|way| (way.clone(), self.work(&with(job.clone(), way))))
            .collect();
        self.adapter_room.check(&job)?;
        let own = self.work(&job);
        // Every cache keeps the same values, so the last way takes the memory of any.
        let cached = options.cheaper.last().map(|way| with(job.clone(), way));
        let cached = cached.and_then(|cached| self.fit(cached).ok());
        let (job, plans, cheaper) = if let Some((cached, plans)) = cached {
            let decoding = cached.decoding;
            (Job { decoding, ..job }, plans, cheaper)
        } else {
            // There is nothing to choose, or no memory for a cache.
            let (job, plans) = self.fit(job)?;
            (job, plans, Vec::new())
        };
        let cheapest = cheaper.last().map_or(own, |(_, work)| *work);
        self.admit_due(&job, (cheapest, &plans), options, now)?;
        Ok((job, plans, cheaper))
    }

    /// Checks that a job of this work can be finished before it is due.
    fn admit_due(
        &self,
        job: &Job,
        (work, plans): (Work, &Plans),
        options: &SubmitOptions,
        now: Instant,
    ) -> Result<(), SubmitError> {
        let Some(due) = options.due else {
            return Ok(());
        };
        let own = self.least_rest(&work, Progress::none(job.sampling.steps), now);
        let Some(own) = own else {
            return Ok(());
        };
        let left = due.saturating_duration_since(now);
        if own > left {
            return Err(SubmitError::DeadlineTooShort { work: own });
        }
        let mut candidates = self.candidates_made(true, now);
        candidates.push(Candidate {
            turn: self.speed.step(&work).unwrap_or_default(),
            due: Due {
                left: Some(left),
                rest: Some(own),
                share: self.speed.share(&work),
            },
            ..self.newcomer(job, plans, &work)
        });
        match lateness(&candidates, self.max_started) {
            None => Ok(()),
            Some(lateness) => Err(SubmitError::TooLate {
                wait: lateness.wait,
                work: own,
                retry_after: lateness.late,
            }),
        }
    }

    /// The candidates, with what is known of the times by which they are due. Waiting jobs count as
    /// they were asked for, or as the cheapest way of each if they would be late otherwise.
    pub(super) fn due_candidates(&self, now: Instant) -> Vec<Candidate> {
        if self.entries.iter().all(|entry| entry.due.is_none()) {
            return self.candidates();
        }
        let candidates = self.candidates_made(false, now);
        if late(&candidates).is_empty() {
            candidates
        } else {
            self.candidates_made(true, now)
        }
    }

    /// The candidates, all as they were asked for or all as the cheapest way of each.
    fn candidates_made(&self, cheapest: bool, now: Instant) -> Vec<Candidate> {
        let mut candidates = self.candidates();
        for (candidate, entry) in candidates.iter_mut().zip(&self.entries) {
            let work = entry.works().next_back().filter(|_| cheapest);
            let work = work.unwrap_or(&entry.work);
            candidate.due = Due {
                left: entry.due.map(|due| due.saturating_duration_since(now)),
                rest: self.speed.rest(work, entry.progress()),
                share: self.speed.share(work),
            };
        }
        candidates
    }

    /// Whether a job goes first because it would be late otherwise.
    pub(super) fn is_in_danger(&self, now: Instant) -> bool {
        let is_due = |entry: &Entry| entry.due.is_some();
        let candidates = if self.entries.iter().any(is_due) {
            self.due_candidates(now)
        } else {
            return false;
        };
        let usual = favourite(&candidates, self.max_started);
        usual.is_some_and(|usual| {
            urgent(&candidates, &candidates[usual], self.max_started).is_some()
        })
    }

    /// By how much a job will be too late at least; `None` if it may be in time.
    pub(super) fn too_late(&self, entry: &Entry, now: Instant) -> Option<Duration> {
        let due = entry.due?;
        let cheapest = entry.works().next_back()?;
        let rest = self.least_rest(cheapest, entry.progress(), now);
        let end = now.checked_add(rest.unwrap_or_default())?;
        Some(end.saturating_duration_since(due)).filter(|late| !late.is_zero())
    }

    /// How long the rest of a job takes at least. `None` if the speed was measured long ago, or not
    /// often enough.
    fn least_rest(&self, work: &Work, progress: Progress, now: Instant) -> Option<Duration> {
        let age = now.saturating_duration_since(self.worked?);
        let least = self.speed.least_rest(work, progress);
        least.filter(|_| age <= BELIEVED)
    }

    /// Makes a job that is about to be started cheaper, if there is too much to do.
    pub(super) fn make_cheaper(&mut self, index: usize, now: Instant) {
        let entry = &self.entries[index];
        if entry.is_started() || entry.cheaper.is_empty() {
            return;
        }
        let rest = |work: &Work| self.speed.rest(work, entry.progress());
        let rests: Option<Vec<Duration>> = entry.works().map(rest).collect();
        let Some(rests) = rests else {
            return;
        };
        let way = if entry.due.is_some() {
            choose_in_time(&self.candidates_made(true, now), index, &rests)
        } else {
            let candidates = self.candidates_made(false, now);
            let others = candidates.iter().enumerate().filter(|(it, _)| *it != index);
            let others: Duration = others.filter_map(|(_, job)| job.due.rest).sum();
            let waited = now.saturating_duration_since(entry.submitted);
            choose_by_wait(waited + others, &rests)
        };
        let entry = &mut self.entries[index];
        let ways = std::mem::take(&mut entry.cheaper);
        let way = way.checked_sub(1).and_then(|way| ways.into_iter().nth(way));
        if let Some((way, work)) = way {
            entry.waiting = entry.waiting.take().map(|job| with(job, &way));
            entry.work = entry.work.made(work);
            entry.made = Some(way);
            self.stats.made_cheaper += 1;
        }
    }
}

/// The job, made cheaper.
fn with(job: Job, way: &Cheaper) -> Job {
    Job {
        cache: way.cache.clone(),
        cfg_gate_step: way.cfg_gate_step.or(job.cfg_gate_step),
        ..job
    }
}
