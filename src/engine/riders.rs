//! Which jobs share a step with the job that has the turn: pure decisions.
//!
//! A step of several jobs makes better use of a device than one step of each, up to a number of image
//! tokens: the budget. The job that has the turn is chosen by [`super::policy`]; the others ride along,
//! the oldest first. They may differ in size, steps, guidance and cache. Three rules hold:
//!
//! 1. **The budget.** No device has more image tokens than the budget, or than the job that has the
//!    turn has by itself and an eighth more.
//! 2. **The time.** The step is not expected to take more than twice as long as the job that has the
//!    turn would take alone, so that previews, cancels and small jobs do not wait much longer.
//! 3. **Idle devices.** With several devices, jobs are added whatever the budget is while every half
//!    of a job has a device for itself: nothing shares a forward pass then.

use super::adapters::AdapterNeed;
use super::cost::{Work, makespan};

/// Image tokens of a step when nothing has been measured: where an H100 reaches its best throughput.
pub(super) const DEFAULT_BUDGET: usize = 4096;

/// Steps without a failure after which a reduced budget doubles.
const STEPS_TO_RECOVER: u32 = 64;

/// A step is expected to take at most this many times as long as that of the first job alone.
pub(super) const MAX_STRETCH: f64 = 2.0;

/// How many image tokens a step of several jobs has.
///
/// The budget halves when such a step fails, because memory may be short. It doubles again after 64
/// steps without a failure, until it is whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Budget {
    /// 0 if jobs are never stepped together.
    tokens: usize,
    halvings: u32,
    good_steps: u32,
}

impl Budget {
    pub(super) fn new(tokens: usize) -> Self {
        Self {
            tokens,
            halvings: 0,
            good_steps: 0,
        }
    }

    /// Image tokens of a step now.
    pub(super) fn tokens(self) -> usize {
        self.tokens.checked_shr(self.halvings).unwrap_or(0)
    }

    /// Whether jobs are ever stepped together.
    pub(super) fn packs(self) -> bool {
        self.tokens > 0
    }

    /// A step of several jobs failed.
    pub(super) fn fail(&mut self) {
        if self.tokens() > 0 {
            self.halvings += 1;
        }
        self.good_steps = 0;
    }

    /// A step of any number of jobs succeeded.
    pub(super) fn succeed(&mut self) {
        self.good_steps += 1;
        if self.good_steps >= STEPS_TO_RECOVER {
            self.good_steps = 0;
            self.halvings = self.halvings.saturating_sub(1);
        }
    }

    /// The most tokens that a device may have when a job of this many has the turn. A reduced budget
    /// is kept to, because the step that failed may have been above it.
    fn limit(self, first: usize) -> f64 {
        let whole = if self.halvings == 0 {
            first + first / 8
        } else {
            0
        };
        self.tokens().max(whole) as f64
    }
}

/// What is shared by all choices of riders.
#[derive(Debug, Clone, Copy)]
pub(super) struct Room {
    pub(super) budget: Budget,
    pub(super) devices: usize,
    /// The fixed part of a step, as work.
    pub(super) fixed: f64,
    /// How many waiting jobs may be started so that they can ride.
    pub(super) places: usize,
}

impl Room {
    /// How many waiting jobs may be started to ride. Half of the places are left to small jobs that
    /// overtake, unless the devices need more.
    pub(super) fn places(max_started: usize, started: usize, devices: usize) -> usize {
        let for_riders = (max_started / 2).max(devices.min(max_started));
        for_riders.saturating_sub(started)
    }
}

/// A job that may ride.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rider<'a> {
    pub(super) work: &'a Work,
    pub(super) started: bool,
    /// Whether the job waits and does not fit the memory beside the started ones. No younger job is
    /// started to ride then: it would take the memory.
    pub(super) alone: bool,
    /// If the job waits for room for its adapters, no younger job with adapters is started to ride.
    pub(super) adapters: AdapterNeed,
    pub(super) has_steps: bool,
}

/// The jobs that share the step of the first one, oldest first. `jobs` are in the order of their
/// submission; `first` is the index of the one that has the turn.
pub(super) fn riders(jobs: &[Rider<'_>], first: usize, room: Room) -> Vec<usize> {
    let Some(leader) = jobs.get(first) else {
        return Vec::new();
    };
    let mut places = room.places;
    let mut units = leader.work.units();
    let mut tokens = leader.work.token_units();
    let most_tokens = room.budget.limit(leader.work.tokens());
    let alone = room.fixed + makespan(&units, room.devices);
    let most_work = MAX_STRETCH * alone * (1.0 + 1e-9);
    let mut riders = Vec::new();
    let mut is_adapter_awaited = false;
    for (index, job) in jobs.iter().enumerate() {
        if !job.started && job.alone {
            places = 0;
        }
        is_adapter_awaited |= !job.started && job.adapters == AdapterNeed::Waits;
        let has_room = places > 0 && !(is_adapter_awaited && job.adapters != AdapterNeed::None);
        if index == first || !job.has_steps || (!job.started && !has_room) {
            continue;
        }
        let more_units = [units.as_slice(), &job.work.units()].concat();
        let more_tokens = [tokens.as_slice(), &job.work.token_units()].concat();
        let is_apart = more_units.len() <= room.devices;
        let is_small = room.budget.packs() && makespan(&more_tokens, room.devices) <= most_tokens;
        let is_short = room.fixed + makespan(&more_units, room.devices) <= most_work;
        if is_short && (is_apart || is_small) {
            places -= usize::from(!job.started);
            riders.push(index);
            (units, tokens) = (more_units, more_tokens);
        }
    }
    riders
}
