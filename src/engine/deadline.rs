//! Which job goes first so that jobs are finished before they are due: pure decisions over candidates.
//!
//! A job with a deadline changes nothing as long as it is not in danger. The slack of a job is the
//! time until it is due, less the time that the device takes for the rest of it; the slack of several
//! jobs together is that of the last one of them, less the rest of all others. The oldest job has a
//! quarter of the device (see [`policy`](super::policy)), so what is not the oldest job takes up to a
//! third longer. When a slack is smaller than the turn that some other job would have, plus a margin:
//!
//! 1. of the jobs that are in danger alone, the one with the least slack goes first;
//! 2. of jobs that are in danger only together, the one that is due first goes first.
//!
//! A job whose slack is negative goes first only if no other job is in danger: it will be late unless
//! the device is faster than it was. It is dropped when it can no longer be in time.

use std::time::Duration;

use super::policy::{Candidate, MAX_IDLE, may_start};

/// Part of the work in danger by which estimates may be wrong.
const MARGIN: f64 = 0.05;

/// A job that can be finished before it is due, and all jobs that are due until then. In seconds.
#[derive(Debug, Clone, Copy)]
struct Demand {
    index: usize,
    /// Time until the job is due.
    due_in: f64,
    /// What the device takes for the job, with the turns of the oldest job meanwhile.
    alone: f64,
    /// What it takes for all jobs that are due until then.
    together: f64,
    /// The longest turn that the oldest job can have meanwhile.
    of_oldest: f64,
}

impl Demand {
    /// What may be lost before the job has its next turn: the turn of another job, and the margin.
    fn threshold(&self, turn: f64, work: f64) -> f64 {
        turn + self.of_oldest + MARGIN * work
    }
}

/// How long a newcomer waits, and how much too late it makes itself or others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Lateness {
    /// How long the device works on other jobs before the newcomer is finished.
    pub(super) wait: Duration,
    /// By how much the newcomer, or a job that was in time without it, would be too late.
    pub(super) late: Duration,
}

/// Index of the job that goes first because a job is in danger of being late; `None` if none is, so
/// that the `usual` job has its turn. `may_run` says which jobs can have a turn.
pub(super) fn urgent(
    jobs: &[Candidate],
    usual: &Candidate,
    may_run: impl Fn(usize) -> bool,
) -> Option<usize> {
    let turn = usual.turn.as_secs_f64();
    let demands = demands(jobs);
    let slack = |demand: &Demand| demand.due_in - demand.alone;
    let runnable = |demand: &&Demand| may_run(demand.index);
    let in_danger = demands
        .iter()
        .filter(runnable)
        .filter(|demand| slack(demand) < demand.threshold(turn, demand.alone))
        .min_by(|a, b| slack(a).total_cmp(&slack(b)));
    let together = || {
        let end = demands.iter().position(|demand| {
            demand.due_in - demand.together < demand.threshold(turn, demand.together)
        })?;
        demands[..=end].iter().find(runnable)
    };
    let first = in_danger.or_else(together).map(|demand| demand.index);
    first.or_else(|| {
        let late = |&index: &usize| may_run(index) && slack_alone(&jobs[index]) < 0.0;
        (0..jobs.len())
            .filter(late)
            .max_by(|&a, &b| slack_alone(&jobs[a]).total_cmp(&slack_alone(&jobs[b])))
    })
}

/// Indices of the jobs that will be late, by the estimates.
pub(super) fn late(jobs: &[Candidate]) -> Vec<usize> {
    let hopeless = (0..jobs.len()).filter(|&index| slack_alone(&jobs[index]) < 0.0);
    let crowded = demands(jobs);
    let crowded = crowded.iter().filter(|it| it.due_in < it.together);
    hopeless.chain(crowded.map(|demand| demand.index)).collect()
}

/// Whether the last of `jobs`, which has just come and is due, would be late, or would make a job
/// late that is in time without it. `None` if not, or if a rest is not known.
pub(super) fn lateness(jobs: &[Candidate], max_started: usize) -> Option<Lateness> {
    let (newcomer, others) = jobs.split_last()?;
    let before = late(others);
    let all = demands(jobs);
    let own = all.iter().find(|demand| demand.index == others.len())?;
    let together = own.together + blocked(jobs, newcomer, max_started);
    let over = all.iter().map(|demand| {
        if demand.index == own.index {
            together - demand.due_in
        } else if before.contains(&demand.index) {
            0.0
        } else {
            demand.together - demand.due_in
        }
    });
    let late = over.fold(0.0, f64::max);
    let wait = together - newcomer.rest?.as_secs_f64();
    (late > 0.0).then(|| Lateness {
        wait: duration(wait),
        late: duration(late),
    })
}

/// Seconds until the newcomer can be started, where that takes the end of jobs that are due later.
fn blocked(jobs: &[Candidate], newcomer: &Candidate, max_started: usize) -> f64 {
    if may_start(jobs, jobs.len() - 1, max_started) {
        return 0.0;
    }
    let later = |job: &&Candidate| job.due_in.is_none_or(|due| Some(due) > newcomer.due_in);
    let later = jobs.iter().filter(later);
    if max_started <= 1 {
        // Jobs are finished in the order of their submission.
        later.map(rest).sum()
    } else if newcomer.alone {
        later.filter(|job| job.started).map(rest).sum()
    } else {
        let rests = later.filter(|job| job.started).map(rest);
        rests.min_by(f64::total_cmp).unwrap_or_default()
    }
}

/// The jobs that can be in time if they have the device alone, in the order in which they are due.
fn demands(jobs: &[Candidate]) -> Vec<Demand> {
    let mut due: Vec<(usize, f64)> = jobs
        .iter()
        .enumerate()
        .filter(|(_, job)| job.rest.is_some() && slack_alone(job) >= 0.0)
        .filter_map(|(index, job)| Some((index, job.due_in?.as_secs_f64())))
        .collect();
    // A stable sort: of jobs that are due together, the older one goes first.
    due.sort_by(|(_, a), (_, b)| a.total_cmp(b));
    // The rest of all jobs up to each.
    let mut sum = 0.0;
    let older: Vec<f64> = jobs
        .iter()
        .map(|job| {
            sum += rest(job);
            sum
        })
        .collect();
    let with_oldest = |work: f64, last: usize| {
        let others = (older[last] - work).max(0.0);
        work + (work / f64::from(MAX_IDLE)).min(others)
    };
    let oldest_turn = jobs.first().map_or(0.0, |job| job.turn.as_secs_f64());
    let (mut work, mut last, mut oldest_is_in) = (0.0, 0, false);
    due.into_iter()
        .map(|(index, due_in)| {
            let own = rest(&jobs[index]);
            work += own;
            last = last.max(index);
            oldest_is_in |= index == 0;
            Demand {
                index,
                due_in,
                alone: with_oldest(own, index),
                together: with_oldest(work, last),
                of_oldest: if oldest_is_in { 0.0 } else { oldest_turn },
            }
        })
        .collect()
}

/// Seconds until the job is due, less those that the rest of it takes. Infinite for a job that is not
/// due or whose rest is not known.
fn slack_alone(job: &Candidate) -> f64 {
    let slack = job.due_in.zip(job.rest);
    slack.map_or(f64::INFINITY, |(due_in, rest)| {
        due_in.as_secs_f64() - rest.as_secs_f64()
    })
}

fn rest(job: &Candidate) -> f64 {
    job.rest.unwrap_or_default().as_secs_f64()
}

fn duration(seconds: f64) -> Duration {
    Duration::try_from_secs_f64(seconds.max(0.0)).unwrap_or(Duration::MAX)
}
