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
//! If not all can be in time, the longest ones are left out until the others can (Moore and Hodgson's
//! rule, by which the fewest are late). A job that was left out goes first only if no other job can be
//! in time; the estimate may be wrong. It is dropped when it can no longer be in time.

use std::time::Duration;

use super::policy::{Candidate, MAX_IDLE, has_room, may_run};
use super::riders::MAX_STRETCH;

/// Part of the work in danger by which estimates may be wrong.
const MARGIN: f64 = 0.05;

/// What is known of the time by which a job is due.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct Due {
    /// How long it is until then; `None` for a job that is not due at any time.
    pub(super) due_in: Option<Duration>,
    /// How long the devices will probably work on the rest of the job alone; `None` if that is not
    /// known.
    pub(super) rest: Option<Duration>,
    /// The part of the devices that works on the job then.
    pub(super) share: f64,
}

/// A job that is due, and all jobs that are due until then. In seconds.
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
/// that the `usual` job has its turn.
pub(super) fn urgent(jobs: &[Candidate], usual: &Candidate, max_started: usize) -> Option<usize> {
    if jobs.iter().all(|job| job.due.due_in.is_none()) {
        return None;
    }
    // Others may share the turn.
    let turn = usual.turn.as_secs_f64() * MAX_STRETCH;
    let has_room = has_room(jobs, max_started);
    let may_run = |index| may_run(jobs, index, has_room);
    let (demands, late) = demands(jobs);
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
    let least_late = || {
        let late = late.into_iter().filter(|&index| may_run(index) && demands.is_empty());
        late.max_by(|&a, &b| slack_alone(&jobs[a]).total_cmp(&slack_alone(&jobs[b])))
    };
    first.or_else(least_late)
}

/// Indices of the jobs that will be late, by the estimates.
pub(super) fn late(jobs: &[Candidate]) -> Vec<usize> {
    demands(jobs).1
}

/// Whether the last of `jobs`, which has just come and is due, would be late, or would make a job
/// late that is in time without it. `None` if not, or if a rest is not known.
pub(super) fn lateness(jobs: &[Candidate], max_started: usize) -> Option<Lateness> {
    let (newcomer, others) = jobs.split_last()?;
    let late_before = late(others);
    let blocked = blocked(jobs, newcomer, max_started);
    let mut sum = Sum::new(jobs);
    let (mut wait, mut late) = (0.0, 0.0_f64);
    for index in in_order(jobs).filter(|index| !late_before.contains(index)) {
        sum.add(index);
        let mut demand = sum.demand(index);
        if index == others.len() {
            demand.together += blocked;
            wait = demand.together - rest(newcomer);
        }
        late = late.max(demand.together - demand.due_in);
    }
    (late > 0.0).then(|| Lateness {
        wait: duration(wait),
        late: duration(late),
    })
}

/// Seconds until the newcomer can be started, where that takes the end of jobs that are due later.
fn blocked(jobs: &[Candidate], newcomer: &Candidate, max_started: usize) -> f64 {
    if may_run(jobs, jobs.len() - 1, has_room(jobs, max_started)) {
        return 0.0;
    }
    let due_in = newcomer.due.due_in;
    let later = |job: &&Candidate| job.due.due_in.is_none_or(|it| Some(it) > due_in);
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

/// The jobs that can all be in time, in the order in which they are due, and those that will be late.
fn demands(jobs: &[Candidate]) -> (Vec<Demand>, Vec<usize>) {
    let mut sum = Sum::new(jobs);
    let (mut demands, mut late) = (Vec::new(), Vec::new());
    for index in in_order(jobs) {
        sum.add(index);
        let demand = sum.demand(index);
        demands.push(demand);
        if demand.together <= demand.due_in {
            continue;
        }
        let longest = demands.iter().enumerate().max_by(|(_, a), (_, b)| {
            let [a, b] = [a, b].map(|it: &&Demand| rest(&jobs[it.index]));
            a.total_cmp(&b)
        });
        let Some((place, _)) = longest else { continue };
        late.push(demands[place].index);
        let kept: Vec<usize> = demands.drain(place..).map(|it| it.index).skip(1).collect();
        sum = Sum::new(jobs);
        for demand in &demands {
            sum.add(demand.index);
        }
        for index in kept {
            sum.add(index);
            demands.push(sum.demand(index));
        }
    }
    (demands, late)
}

/// The jobs that are due and whose rest is known, in the order in which they are due. Of jobs that are
/// due together, the older one comes first.
fn in_order(jobs: &[Candidate]) -> impl Iterator<Item = usize> {
    let is_known = |job: &Candidate| job.due.due_in.is_some() && job.due.rest.is_some();
    let mut due: Vec<usize> = (0..jobs.len()).filter(|&it| is_known(&jobs[it])).collect();
    due.sort_by_key(|&index| jobs[index].due.due_in);
    due.into_iter()
}

/// What must be done for jobs that are due one after the other.
struct Sum<'a> {
    jobs: &'a [Candidate],
    /// Seconds of all devices for the rest of all jobs up to each, in the order of their submission.
    older: Vec<f64>,
    /// Seconds of all devices for the jobs that were added.
    work: f64,
    /// Seconds of the longest of them.
    longest: f64,
    /// The youngest of them.
    youngest: usize,
    has_oldest: bool,
}

impl<'a> Sum<'a> {
    fn new(jobs: &'a [Candidate]) -> Self {
        let older = jobs.iter().scan(0.0, |sum, job| {
            *sum += rest(job) * job.due.share;
            Some(*sum)
        });
        Self {
            jobs,
            older: older.collect(),
            work: 0.0,
            longest: 0.0,
            youngest: 0,
            has_oldest: false,
        }
    }

    fn add(&mut self, index: usize) {
        let own = rest(&self.jobs[index]);
        self.work += own * self.jobs[index].due.share;
        self.longest = self.longest.max(own);
        self.youngest = self.youngest.max(index);
        self.has_oldest |= index == 0;
    }

    /// The demand of the job that was added last.
    fn demand(&self, index: usize) -> Demand {
        let own = rest(&self.jobs[index]);
        let share = self.jobs[index].due.share;
        let oldest = self.jobs.first().map_or(0.0, |job| job.turn.as_secs_f64());
        Demand {
            index,
            due_in: self.jobs[index]
                .due
                .due_in
                .unwrap_or_default()
                .as_secs_f64(),
            alone: self.with_oldest(own * share, own, index),
            together: self.with_oldest(self.work, self.longest, self.youngest),
            of_oldest: if self.has_oldest { 0.0 } else { oldest },
        }
    }

    /// The time of some work, which takes at least as long as its longest job, with the turns of the
    /// oldest job meanwhile.
    fn with_oldest(&self, work: f64, longest: f64, youngest: usize) -> f64 {
        let time = work.max(longest);
        if self.has_oldest {
            return time;
        }
        let others = (self.older[youngest] - work).max(0.0);
        time + (time / f64::from(MAX_IDLE)).min(others)
    }
}

/// Seconds until the job is due, less those that the rest of it takes. Infinite for a job that is not
/// due or whose rest is not known.
fn slack_alone(job: &Candidate) -> f64 {
    let slack = job.due.due_in.zip(job.due.rest);
    slack.map_or(f64::INFINITY, |(due_in, rest)| {
        due_in.as_secs_f64() - rest.as_secs_f64()
    })
}

fn rest(job: &Candidate) -> f64 {
    job.due.rest.unwrap_or_default().as_secs_f64()
}

fn duration(seconds: f64) -> Duration {
    Duration::try_from_secs_f64(seconds.max(0.0)).unwrap_or(Duration::MAX)
}
