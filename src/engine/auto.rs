//! How much cheaper a job is made when it is started: pure decisions.
//!
//! `rests` are the times that the device takes for the job as it was asked for and for each cheaper
//! way, the dearest first. The result is an index into them; 0 leaves the job as it is.

use std::time::Duration;

use super::deadline::late;
use super::policy::Candidate;

/// A job without a deadline may wait this many times as long as it takes itself.
const PATIENCE: u32 = 2;

/// A shorter wait is no reason to change an image.
const SHORT_WAIT: Duration = Duration::from_millis(250);

/// Of a job that is due: the first way for which it is in time and makes no other job late. If no way
/// is, the cheapest.
pub(super) fn choose_in_time(jobs: &[Candidate], index: usize, rests: &[Duration]) -> usize {
    let late_with = |rest: &Duration| {
        let mut jobs = jobs.to_vec();
        jobs[index].due.rest = Some(*rest);
        late(&jobs)
    };
    let unavoidable = rests.last().map(late_with).unwrap_or_default();
    let is_enough = |rest: &Duration| {
        let late = late_with(rest);
        !late.contains(&index) && late.iter().all(|job| unavoidable.contains(job))
    };
    first_or_last(rests, is_enough)
}

/// Of a job that is not due: the first way for which the wait would be short, or at most twice as long
/// as the job itself, if the whole queue were made so. If no way is, the cheapest.
pub(super) fn choose_by_wait(wait: Duration, rests: &[Duration]) -> usize {
    let own = rests.first().copied().unwrap_or_default();
    let patience = own.saturating_mul(PATIENCE).max(SHORT_WAIT).as_secs_f64();
    let is_enough = |rest: &Duration| {
        let part = rest.as_secs_f64() / own.as_secs_f64().max(f64::MIN_POSITIVE);
        wait.as_secs_f64() * part <= patience
    };
    first_or_last(rests, is_enough)
}

fn first_or_last(rests: &[Duration], is_enough: impl Fn(&Duration) -> bool) -> usize {
    let first = rests.iter().position(is_enough);
    first.unwrap_or_else(|| rests.len().saturating_sub(1))
}
