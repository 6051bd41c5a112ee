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

use super::adapters::AdapterNeed;
use super::policy::{Candidate, MAX_IDLE, has_room, may_run, waits_for_adapters};
use super::riders::MAX_STRETCH;

/// Part of the work in danger by which estimates may be wrong.
const MARGIN: f64 = 0.05;

/// What is known of the time by which a job is due.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct Due {
    /// How long it is until then; `None` for a job that is not due at any time.
    pub(super) left: Option<Duration>,
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
    if jobs.iter().all(|job| job.due.left.is_none()) {
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
        let late = late
            .into_iter()
            .filter(|&index| may_run(index) && demands.is_empty());
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
    let due_in = newcomer.due.left;
    let later = |job: &&Candidate| job.due.left.is_none_or(|it| Some(it) > due_in);
    let later = jobs.iter().filter(later);
    if max_started <= 1 {
        // Jobs are finished in the order of their submission.
        later.map(rest).sum()
    } else if newcomer.alone {
        later.filter(|job| job.started).map(rest).sum()
    } else if waits_for_adapters(jobs, newcomer) {
        let has_adapters = |job: &&Candidate| job.started && job.adapters != AdapterNeed::None;
        later.filter(has_adapters).map(rest).sum()
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
    let is_known = |job: &Candidate| job.due.left.is_some() && job.due.rest.is_some();
    let mut due: Vec<usize> = (0..jobs.len()).filter(|&it| is_known(&jobs[it])).collect();
    due.sort_by_key(|&index| jobs[index].due.left);
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
            due_in: self.jobs[index].due.left.unwrap_or_default().as_secs_f64(),
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
    let slack = job.due.left.zip(job.due.rest);
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

#[cfg(test)]
mod tests {
    use super::*;

    const ROOM: usize = 8;

    const fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    /// A started job with steps of a second.
    fn job(rest: u64, due_in: Option<u64>) -> Candidate {
        Candidate {
            size: rest as f64,
            started: true,
            led: true,
            steps_left: 1,
            alone: false,
            adapters: AdapterNeed::None,
            idle: Duration::ZERO,
            turn: seconds(1),
            due: Due {
                left: due_in.map(seconds),
                rest: Some(seconds(rest)),
                share: 1.0,
            },
        }
    }

    fn first(jobs: &[Candidate]) -> Option<usize> {
        urgent(jobs, &jobs[0], ROOM)
    }

    #[test]
    fn nobody_goes_first_while_all_have_time() {
        assert_eq!(first(&[job(100, None), job(50, None)]), None);
        // The oldest job takes a third of 50 seconds meanwhile.
        assert_eq!(first(&[job(100, None), job(50, Some(80))]), None);
        assert_eq!(first(&[job(100, None), job(50, Some(70))]), Some(1));
    }

    #[test]
    fn the_least_slack_goes_first_of_those_in_danger() {
        let jobs = [
            job(100, None),
            job(3, Some(6)),
            job(20, Some(31)),
            job(1, Some(90)),
        ];
        // Slacks of 2, 4.3 and 88.7 seconds, with the turns of the oldest job.
        assert_eq!(first(&jobs), Some(1));
        assert_eq!(
            first(&[job(100, None), job(20, Some(29)), job(1, Some(90))]),
            Some(1)
        );
    }

    #[test]
    fn jobs_that_are_in_danger_together_go_by_the_times_at_which_they_are_due() {
        let alone = [job(90, None), job(10, Some(100)), job(10, Some(95))];
        assert_eq!(first(&alone), None);
        let many = [
            job(90, None),
            job(20, Some(100)),
            job(20, Some(95)),
            job(20, Some(90)),
            job(10, Some(97)),
        ];
        assert_eq!(first(&many), Some(3));
    }

    #[test]
    fn the_longest_job_is_left_out_if_not_all_can_be_in_time() {
        let jobs = [job(10, Some(12)), job(30, Some(32)), job(10, Some(34))];
        assert_eq!(late(&jobs), [1]);
        assert_eq!(first(&jobs), Some(0));
        // A job that is late alone goes first if no other is due.
        assert_eq!(first(&[job(90, None), job(10, Some(9))]), Some(1));
        assert_eq!(
            first(&[job(90, None), job(10, Some(9)), job(5, Some(60))]),
            None
        );
    }

    #[test]
    fn the_oldest_job_takes_no_time_from_itself() {
        assert_eq!(first(&[job(50, Some(60)), job(90, None)]), None);
        assert!(late(&[job(50, Some(50))]).is_empty());
        assert_eq!(late(&[job(90, None), job(50, Some(60))]), [1]);
    }

    #[test]
    fn a_newcomer_is_late_by_what_must_be_done_before_it() {
        let before = [job(10, Some(25)), job(10, Some(25))];
        let with = |newcomer: Candidate| {
            let jobs = [before.as_slice(), &[newcomer]].concat();
            lateness(&jobs, ROOM)
        };
        assert_eq!(with(job(5, Some(25))), None);
        let expected = Lateness {
            wait: seconds(20),
            late: seconds(5),
        };
        assert_eq!(with(job(10, Some(25))), Some(expected));
        // It would be in time itself, and make the others late.
        let late = with(job(6, Some(12))).unwrap().late;
        assert_eq!(late, seconds(1));
    }

    #[test]
    fn a_newcomer_waits_for_a_place() {
        let waiting = Candidate {
            started: false,
            ..job(10, Some(20))
        };
        let jobs = [job(50, None), job(15, None), waiting];
        assert_eq!(lateness(&jobs, ROOM), None);
        // A place is free after 15 seconds.
        assert_eq!(lateness(&jobs, 2).unwrap().wait.as_secs(), 18);
        // Jobs run in the order of their submission.
        assert_eq!(lateness(&jobs, 1).unwrap().wait.as_secs(), 68);
        let alone = Candidate {
            alone: true,
            ..waiting
        };
        let jobs = [job(50, None), job(15, None), alone];
        assert_eq!(lateness(&jobs, ROOM).unwrap().wait.as_secs(), 68);
        // Room for its adapters is free after the job that has some.
        let with = |adapters, job| Candidate { adapters, ..job };
        let waits = with(AdapterNeed::Waits, waiting);
        let jobs = [job(50, None), with(AdapterNeed::Fits, job(15, None)), waits];
        assert_eq!(lateness(&jobs, ROOM).unwrap().wait.as_secs(), 18);
        let jobs = [job(50, None), job(15, None), waits];
        assert_eq!(lateness(&jobs, ROOM), None);
    }

    #[test]
    fn two_devices_do_two_jobs_at_a_time() {
        let half = |rest, due_in| {
            let mut job = job(rest, due_in);
            job.due.share = 0.5;
            job
        };
        assert!(late(&[half(10, Some(10)), half(10, Some(10))]).is_empty());
        assert_eq!(
            late(&[half(10, Some(10)), half(10, Some(10)), half(10, Some(12))]).len(),
            1
        );
    }
}
