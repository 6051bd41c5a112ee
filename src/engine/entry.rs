//! What the scheduler knows of one job, from its submission to its end.

use std::num::NonZeroUsize;
use std::time::{Duration, Instant};

use kiln_models::job::{Job, JobId};
use kiln_models::memory::MemoryPlan;
use kiln_models::step_cache::StepCounts;

use super::adapters::{AdapterNeed, JobAdapter, Upload};
use super::cost::{Progress, Speed, Stage, Work};
use super::deadline::Due;
use super::memory::Plans;
use super::policy::Candidate;
use super::{Cheaper, SubmitOptions, Timings};

/// Whether a job's prompts were given to the pipeline together with those of other jobs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Encoding {
    Due,
    Tried,
}

#[derive(Debug)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is a fact of its own about the job"
)]
pub(super) struct Entry {
    pub(super) id: JobId,
    /// The job, until the pipeline is given it.
    pub(super) waiting: Option<Job>,
    pub(super) work: Work,
    /// The job is decoded in the first way. Empty if nothing is known about its memory.
    pub(super) plans: Plans,
    pub(super) adapters: Vec<JobAdapter>,
    pub(super) upload: Upload,
    /// Ways to make the job cheaper when it is started, the dearest first, and the work of each.
    pub(super) cheaper: Vec<(Cheaper, Work)>,
    /// How it was made cheaper.
    pub(super) made: Option<Cheaper>,
    pub(super) deadline: Option<Instant>,
    pub(super) due: Option<Instant>,
    preview_every: Option<NonZeroUsize>,
    pub(super) submitted: Instant,
    pub(super) total_steps: usize,
    pub(super) steps_left: usize,
    /// What the steps so far have run, and their work.
    pub(super) counts: StepCounts,
    pub(super) done: f64,
    /// Number of turns of its own, in which it did not ride with another job.
    pub(super) own_turns: usize,
    pub(super) encoding: Encoding,
    pub(super) timings: Timings,
    pub(super) is_warm_up: bool,
    /// [`SubmitOptions::outside_queue`].
    pub(super) outside_queue: bool,
    /// Whether the job's handle has been dropped.
    pub(super) is_abandoned: bool,
    /// Whether the pipeline should make a preview before anything else.
    pub(super) is_preview_due: bool,
    /// The position in the last `Queued` event.
    pub(super) reported_position: Option<usize>,
    /// How long the job's last turn took; zero before the first.
    last_turn: Duration,
    /// The scheduler's device time at the end of the job's last turn, or at its submission. A turn that
    /// jobs share counts as if each job had its part of the time at the beginning.
    last_turn_end: Duration,
}

impl Entry {
    pub(super) fn new(
        id: JobId,
        job: Job,
        (work, plans, adapters): (Work, Plans, Vec<JobAdapter>),
        options: &SubmitOptions,
        now: Instant,
        device_time: Duration,
    ) -> Self {
        Self {
            id,
            work,
            plans,
            adapters,
            upload: Upload::Due,
            cheaper: Vec::new(),
            made: None,
            deadline: options.deadline,
            due: options.due,
            preview_every: options.preview_every,
            submitted: now,
            total_steps: job.sampling.steps,
            steps_left: job.sampling.steps,
            waiting: Some(job),
            counts: StepCounts::default(),
            done: 0.0,
            own_turns: 0,
            encoding: Encoding::Due,
            timings: Timings::default(),
            is_warm_up: false,
            outside_queue: options.outside_queue,
            is_abandoned: false,
            is_preview_due: false,
            reported_position: None,
            last_turn: Duration::ZERO,
            last_turn_end: device_time,
        }
    }

    /// The memory that the job takes.
    pub(super) fn plan(&self) -> MemoryPlan {
        self.plans
            .first()
            .map_or_else(MemoryPlan::default, |(_, plan)| *plan)
    }

    pub(super) fn is_started(&self) -> bool {
        self.waiting.is_none()
    }

    pub(super) fn steps_done(&self) -> usize {
        self.total_steps.saturating_sub(self.steps_left)
    }

    pub(super) fn progress(&self) -> Progress {
        Progress {
            is_started: self.is_started(),
            steps_left: self.steps_left,
            done: self.done,
        }
    }

    pub(super) fn candidate(&self, device_time: Duration, speed: &Speed) -> Candidate {
        let candidate = Candidate {
            size: self.work.total(),
            started: self.is_started(),
            led: self.own_turns > 0,
            steps_left: self.steps_left,
            alone: false,
            adapters: AdapterNeed::None,
            idle: device_time.saturating_sub(self.last_turn_end),
            turn: speed
                .step(&self.work)
                .unwrap_or_default()
                .max(self.last_turn),
            due: Due::default(),
        };
        candidate.after_steps(&self.work, self.steps_left)
    }

    /// The work of the job as it is and, before its start, of each way to make it cheaper.
    pub(super) fn works(&self) -> impl DoubleEndedIterator<Item = &Work> {
        let cheaper = self.cheaper.iter().map(|(_, work)| work);
        std::iter::once(&self.work).chain(cheaper)
    }

    /// Books a turn that ended at `device_time`.
    pub(super) fn book_turn(&mut self, stage: Stage, took: Duration, device_time: Duration) {
        self.last_turn = took;
        self.last_turn_end = device_time;
        match stage {
            Stage::Encode => self.timings.encode += took,
            Stage::Step => self.timings.denoise += took,
            Stage::Decode => self.timings.decode = took,
        }
    }

    /// Books a preview, which belongs to the turn of the step before it.
    pub(super) fn book_preview(&mut self, took: Duration, device_time: Duration) {
        self.last_turn += took;
        self.last_turn_end = device_time;
        self.timings.previews += took;
    }

    /// Whether the step that was just made should be followed by a preview.
    pub(super) fn wants_preview(&self) -> bool {
        let is_turn = |every: NonZeroUsize| self.steps_done().is_multiple_of(every.get());
        !self.is_abandoned && self.steps_left > 0 && self.preview_every.is_some_and(is_turn)
    }
}
