//! Which job the device works on next: pure decisions, without a clock and without a device.
//!
//! Two rules, applied before every step, and between them that of [`super::deadline`]: a job that would
//! be late otherwise goes first.
//!
//! 1. **Small jobs overtake.** The device works on the smallest started job until that job is
//!    finished; a waiting job is started before that only if it is at most half as large. So a
//!    small job waits for one step of a large one, jobs of comparable size are finished in the
//!    order of their submission, and each started job is at most half as large as the one started
//!    before it, which keeps their number small.
//! 2. **Nothing starves.** When the oldest job has been idle for three times as long as one of its
//!    turns takes, it has the next turn. So the oldest job has at least a quarter of the device's
//!    time, and a job is finished after at most four times the sum of its own work and the work of
//!    the jobs submitted before it.
//!
//! Started jobs take memory, so a job that does not fit beside them waits until they have ended, there
//! are at most `max_started` of them (and a job whose adapters do not fit beside those of the started jobs
//! waits until the ones with adapters have ended), and one of these places is reserved for the oldest job. With
//! eight places, the seventh job in a row of halves is smaller than one step of a job of 64 steps: a
//! small job waits no longer than that even when all places are taken.
//!
//! A job that was started only to share the steps of another (a rider, see [`super::riders`]) keeps its
//! place in the order: until its own turn comes it is treated like a waiting job that has memory.

use std::time::Duration;

use super::adapters::AdapterNeed;
use super::cost::{Stage, Work};
use super::deadline::{Due, urgent};

/// The oldest job is idle for at most this many times the duration of its turn.
pub(super) const MAX_IDLE: u32 = 3;

/// A job as the policy sees it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Candidate {
    /// The whole work of the job, done or not, in any unit; see [`Candidate::after_steps`].
    pub(super) size: f64,
    /// Whether the job has been started and so takes memory on the device.
    pub(super) started: bool,
    /// Whether the job has had a turn of its own. A started job that has had none is a rider.
    pub(super) led: bool,
    pub(super) steps_left: usize,
    /// Whether the job waits and does not fit the memory beside the started ones.
    pub(super) alone: bool,
    pub(super) adapters: AdapterNeed,
    /// How long the device has worked on other jobs since this job's last turn, or since its
    /// submission.
    pub(super) idle: Duration,
    /// How long a turn of the job takes: as long as its last turn, or as a step if a step is
    /// expected to take longer.
    pub(super) turn: Duration,
    /// What is known of the time by which the job is due.
    pub(super) due: Due,
}

impl Candidate {
    /// A job of this work that has not been submitted.
    pub(super) fn newcomer(work: &Work, steps: usize) -> Self {
        Self {
            size: work.total(),
            started: false,
            led: false,
            steps_left: steps,
            alone: false,
            adapters: AdapterNeed::None,
            idle: Duration::ZERO,
            turn: Duration::ZERO,
            due: Due::default(),
        }
    }

    /// The job when this many steps are left. A rider without steps left overtakes by the work that is
    /// left of it, so that its images do not wait for the job that it rode with.
    pub(super) fn after_steps(self, work: &Work, steps_left: usize) -> Self {
        let is_rider = self.started && !self.led;
        Self {
            steps_left,
            size: if steps_left == 0 && is_rider {
                work.of_stage(Stage::Decode)
            } else {
                work.total()
            },
            ..self
        }
    }
}

/// Index of the job that has the next turn. `jobs` are in the order of their submission.
pub(super) fn next_turn(jobs: &[Candidate], max_started: usize) -> Option<usize> {
    let oldest = jobs.first()?;
    let others_had_a_turn = !oldest.idle.is_zero();
    if others_had_a_turn && oldest.idle >= oldest.turn.saturating_mul(MAX_IDLE) {
        return Some(0);
    }
    let usual = favourite(jobs, max_started)?;
    let urgent = urgent(jobs, &jobs[usual], max_started);
    Some(urgent.unwrap_or(usual))
}

/// As [`next_turn`], of the started jobs alone: there is no memory for the one that it would be.
///
/// The oldest job has the next turn again and again while it waits for memory, so no other job is
/// started before it, and the started ones end.
pub(super) fn next_started(jobs: &[Candidate]) -> Option<usize> {
    let started = jobs
        .iter()
        .copied()
        .enumerate()
        .filter(|(_, job)| job.started);
    let (indices, started): (Vec<usize>, Vec<Candidate>) = started.unzip();
    next_turn(&started, usize::MAX).map(|index| indices[index])
}

/// The job that has the next turn by the first rule alone.
pub(super) fn favourite(jobs: &[Candidate], max_started: usize) -> Option<usize> {
    let led = || {
        let jobs = jobs.iter().enumerate();
        jobs.filter(|(_, job)| job.started && job.led)
    };
    let mut best = led()
        .min_by(|(_, a), (_, b)| a.size.total_cmp(&b.size))
        .map(|(index, _)| index);
    let has_room = has_room(jobs, max_started);
    for (index, job) in jobs.iter().enumerate() {
        if job.started && job.led {
            continue;
        }
        let overtakes = |best: usize| {
            // A rider without steps left waits for older jobs that have none left either.
            let is_in_turn = !job.started || job.steps_left > 0 || jobs[best].steps_left > 0;
            is_in_turn && 2.0 * job.size <= jobs[best].size
        };
        if best.is_none_or(overtakes) && may_run(jobs, index, has_room) {
            best = Some(index);
        }
    }
    best
}

/// Whether a job has been started or may be. `has_room` is that of [`has_room`].
pub(super) fn may_run(jobs: &[Candidate], index: usize, has_room: bool) -> bool {
    let job = &jobs[index];
    let has_memory = !job.alone || !jobs.iter().any(|job| job.started);
    let has_memory = has_memory && !waits_for_adapters(jobs, job);
    job.started || has_memory && (has_room || index == 0)
}

/// Whether the adapters of a job do not fit beside those of started jobs.
pub(super) fn waits_for_adapters(jobs: &[Candidate], job: &Candidate) -> bool {
    let has_adapters = |job: &Candidate| job.started && job.adapters != AdapterNeed::None;
    job.adapters == AdapterNeed::Waits && jobs.iter().any(has_adapters)
}

/// Whether there is a place for a waiting job that is not the oldest.
pub(super) fn has_room(jobs: &[Candidate], max_started: usize) -> bool {
    let started = jobs.iter().filter(|job| job.started).count();
    let kept_for_oldest = usize::from(jobs.first().is_some_and(|oldest| !oldest.started));
    started + kept_for_oldest < max_started
}
