//! Which job the device works on next: pure decisions, without a clock and without a device.
//!
//! Two rules, applied before every step, and a third between them: a job that would be late otherwise
//! goes first, see [`deadline`].
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
//! are at most `max_started` of them, and one of these places is reserved for the oldest job. With eight places, the seventh job in a row of halves is smaller
//! than one step of a job of 64 steps: a small job waits no longer than that even when all places
//! are taken.

use std::time::Duration;

use super::deadline;

/// The oldest job is idle for at most this many times the duration of its turn.
pub(super) const MAX_IDLE: u32 = 3;

/// A job as the policy sees it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Candidate {
    /// The whole work of the job, done or not, in any unit.
    pub(super) size: f64,
    /// Whether the job has been started and so takes memory on the device.
    pub(super) started: bool,
    /// Whether the job waits and does not fit the memory beside the started ones.
    pub(super) alone: bool,
    /// How long the device has worked on other jobs since this job's last turn, or since its
    /// submission.
    pub(super) idle: Duration,
    /// How long a turn of the job takes: as long as its last turn, or as a step if a step is
    /// expected to take longer.
    pub(super) turn: Duration,
    /// How long the device will probably work on the rest of the job, if that is known.
    pub(super) rest: Option<Duration>,
    /// How long it is until the job is due; `None` for a job that is not due at any time.
    pub(super) due_in: Option<Duration>,
}

/// Index of the job that has the next turn. `jobs` are in the order of their submission.
pub(super) fn next_turn(jobs: &[Candidate], max_started: usize) -> Option<usize> {
    let oldest = jobs.first()?;
    let others_had_a_turn = !oldest.idle.is_zero();
    if others_had_a_turn && oldest.idle >= oldest.turn.saturating_mul(MAX_IDLE) {
        return Some(0);
    }
    let usual = favourite(jobs, max_started)?;
    let urgent = deadline::urgent(jobs, &jobs[usual], |index| {
        jobs[index].started || may_start(jobs, index, max_started)
    });
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

/// The order in which the jobs will be finished if no other is submitted, by the first rule alone.
pub(super) fn expected_order(jobs: &[Candidate], max_started: usize) -> Vec<usize> {
    let mut left: Vec<usize> = (0..jobs.len()).collect();
    let mut order = Vec::with_capacity(jobs.len());
    let mut candidates = jobs.to_vec();
    while let Some(next) = favourite(&candidates, max_started) {
        candidates.remove(next);
        order.push(left.remove(next));
    }
    order
}

fn favourite(jobs: &[Candidate], max_started: usize) -> Option<usize> {
    let started = || jobs.iter().enumerate().filter(|(_, job)| job.started);
    let mut best = started()
        .min_by(|(_, a), (_, b)| a.size.total_cmp(&b.size))
        .map(|(index, _)| index);
    let has_room = has_room(jobs, max_started);
    for (index, job) in jobs.iter().enumerate().filter(|(_, job)| !job.started) {
        let may_start = has_memory(jobs, index) && (has_room || index == 0);
        if may_start && best.is_none_or(|best| 2.0 * job.size <= jobs[best].size) {
            best = Some(index);
        }
    }
    best
}

/// Whether a waiting job may be started.
pub(super) fn may_start(jobs: &[Candidate], index: usize, max_started: usize) -> bool {
    has_memory(jobs, index) && (index == 0 || has_room(jobs, max_started))
}

/// Whether there is a place for a waiting job that is not the oldest.
fn has_room(jobs: &[Candidate], max_started: usize) -> bool {
    let kept_for_oldest = usize::from(jobs.first().is_some_and(|oldest| !oldest.started));
    let started = jobs.iter().filter(|job| job.started).count();
    started + kept_for_oldest < max_started
}

fn has_memory(jobs: &[Candidate], index: usize) -> bool {
    !jobs[index].alone || !jobs.iter().any(|job| job.started)
}
