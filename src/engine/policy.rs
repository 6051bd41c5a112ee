//! Which job the device works on next: pure decisions, without a clock and without a device.
//!
//! Two rules, applied before every step:
//!
//! 1. **Small jobs overtake.** The device stays with the smallest job in work until it is
//!    finished; a waiting job is begun before that only if it is at most half as large. So a small
//!    job waits for one step of a large one, comparable jobs are finished in the order they came,
//!    and of the jobs in work each is at most half the one before, which keeps them few.
//! 2. **Nothing starves.** Whenever the oldest job has been idle for three times as long as a turn
//!    of it takes, it has the next one. So it has at least a quarter of the device, and a job
//!    is done after at most four times the work of those that came before it and its own.
//!
//! Jobs in work take memory, so there are at most `max_started`, and one of these places is kept
//! for the oldest job. With eight, the seventh in a row of halves is smaller than one step of a
//! job of 64 steps: even when all places are taken, a small job waits no longer than that.

use std::time::Duration;

/// The oldest job is idle at most this many times as long as a turn of it takes.
const MAX_IDLE: u32 = 3;

/// A job as the policy sees it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Candidate {
    /// All of the job's work, done or not, in any unit.
    pub(super) size: f64,
    /// Whether it takes up memory on the device.
    pub(super) started: bool,
    /// How long the device has worked on other jobs since this one's last turn, or since it came.
    pub(super) idle: Duration,
    /// How long a turn of it takes: the last one, or a step if that is expected to take longer.
    pub(super) turn: Duration,
}

/// The job that has the next turn, of `jobs` in the order in which they came.
pub(super) fn next_turn(jobs: &[Candidate], max_started: usize) -> Option<usize> {
    let oldest = jobs.first()?;
    let others_had_a_turn = !oldest.idle.is_zero();
    if others_had_a_turn && oldest.idle >= oldest.turn.saturating_mul(MAX_IDLE) {
        return Some(0);
    }
    favourite(jobs, max_started)
}

/// The order in which jobs will be finished if no other comes, by the first rule alone.
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
    let kept_for_oldest = usize::from(jobs.first().is_some_and(|oldest| !oldest.started));
    let has_room = started().count() + kept_for_oldest < max_started;
    for (index, job) in jobs.iter().enumerate().filter(|(_, job)| !job.started) {
        let may_start = has_room || index == 0;
        if may_start && best.is_none_or(|best| 2.0 * job.size <= jobs[best].size) {
            best = Some(index);
        }
    }
    best
}
