//! Jobs that are due: who goes first, what is refused, and what is given up.

use std::sync::Arc;
use std::time::Duration;

use kiln_models::job::Job;

use super::bench::{Bench, Call, cost, job, ms, outcome, settings, whole_cost};
use super::order::Numbers;
use crate::engine::cost::Stage;
use crate::engine::{JobError, JobHandle, SubmitError, SubmitOptions};

/// When a job with this seed was finished.
fn ended(bench: &Bench, seed: u64) -> Duration {
    bench.find(Call::Finish(seed)).ended
}

fn assert_close(actual: Duration, expected: Duration) {
    assert!(
        actual.abs_diff(expected) < ms(2),
        "{actual:?} for {expected:?}"
    );
}

#[test]
fn a_job_that_would_be_late_goes_first_and_one_that_has_time_does_not() {
    let own = whole_cost(&job(1, 16, 30));
    for (time, order) in [(own * 3 / 2, [2, 1]), (own * 4, [1, 2])] {
        let mut bench = Bench::measured();
        let first = bench.submit(job(1, 16, 30));
        let due = bench.clock.elapsed() + time;
        let second = bench.submit_due(job(2, 16, 30), due).unwrap();
        bench.run();
        assert_eq!(bench.finished()[2..], order, "{time:?}");
        assert!(ended(&bench, 2) <= due, "{time:?}");
        outcome(first).unwrap();
        outcome(second).unwrap();
    }
}

/// The jobs come in the order in which the plain rule finishes them, and are due in the opposite one.
#[test]
fn jobs_that_are_due_first_are_finished_first_if_all_can_be_in_time() {
    let own = whole_cost(&job(1, 8, 20));
    let dues = |bench: &Bench| [6, 5, 3, 2].map(|part| bench.clock.elapsed() + own * part);
    let late = |bench: &Bench, dues: [Duration; 4]| {
        let late = (1..)
            .zip(dues)
            .filter(|(seed, due)| ended(bench, *seed) > *due);
        late.count()
    };

    let mut plain = Bench::measured();
    let plain_dues = dues(&plain);
    let handles = [1, 2, 3, 4].map(|seed| plain.submit(job(seed, 8, 20)));
    plain.run();
    assert_eq!(plain.finished()[2..], [1, 2, 3, 4]);
    assert_eq!(late(&plain, plain_dues), 1);
    drop(handles);

    let mut bench = Bench::measured();
    let dues = dues(&bench);
    let handles: Vec<JobHandle> = (1..)
        .zip(dues)
        .map(|(seed, due)| bench.submit_due(job(seed, 8, 20), due).unwrap())
        .collect();
    bench.run();
    assert_eq!(late(&bench, dues), 0);
    for handle in handles {
        outcome(handle).unwrap();
    }
}

/// A mix of jobs with and without deadlines, as they come.
struct Mix {
    jobs: Vec<(Duration, Job, Option<Duration>)>,
}

impl Mix {
    fn random(numbers: &mut Numbers) -> Self {
        let mut came = Duration::ZERO;
        let jobs = (0..30).map(|seed| {
            came += ms(numbers.next(1200));
            let (side, steps) = (2 + numbers.next(12), 4 + numbers.next(30));
            let job = job(seed, side as usize, steps as usize);
            // From a fifth more than the job's own time to six times as much.
            let scale = 12 + numbers.next(50) as u32;
            let due = (numbers.next(3) > 0).then(|| came + whole_cost(&job) * scale / 10);
            (came, job, due)
        });
        Self {
            jobs: jobs.collect(),
        }
    }

    /// Number of jobs that are finished in time, if the engine is told when they are due or not.
    fn in_time(&self, tell: bool) -> usize {
        let mut bench = Bench::measured();
        let start = bench.clock.elapsed();
        for (came, job, due) in &self.jobs {
            let (shared, job) = (Arc::clone(&bench.shared), job.clone());
            let mut options = SubmitOptions::default();
            if let Some(due) = due.filter(|_| tell) {
                options = bench.due(start + due);
            }
            bench.at(start + *came, move || {
                // The handle of an accepted job is never dropped.
                if let Ok(handle) = shared.submit(job, options) {
                    std::mem::forget(handle);
                }
            });
        }
        let last = self.jobs.last().map(|(came, _, _)| start + *came).unwrap();
        while bench.turn() || bench.clock.elapsed() < last {
            if bench.shared.stats().running == 0 {
                bench.clock.advance(ms(1));
            }
        }
        let log = bench.log();
        let ended = |job: &Job| {
            let finish = Call::Finish(job.noise.seed);
            let call = log.iter().find(|logged| logged.call == finish)?;
            Some(call.ended)
        };
        let jobs = self.jobs.iter();
        let in_time = jobs.filter(|(_, job, due)| {
            due.is_some_and(|due| ended(job).is_some_and(|ended| ended <= start + due))
        });
        for (_, job, due) in &self.jobs {
            assert!(due.is_some() || ended(job).is_some(), "{job:?} is lost");
        }
        in_time.count()
    }

    fn due(&self) -> usize {
        self.jobs.iter().filter(|(_, _, due)| due.is_some()).count()
    }
}

#[test]
fn more_jobs_are_in_time_when_the_engine_knows_when_they_are_due() {
    let (mut all, mut plain, mut told) = (0, 0, 0);
    for seed in 0..40 {
        let mix = Mix::random(&mut Numbers(seed));
        let (before, after) = (mix.in_time(false), mix.in_time(true));
        println!("mix {seed}: {before} and {after} of {}", mix.due());
        all += mix.due();
        plain += before;
        told += after;
    }
    println!("{plain} and {told} of {all}");
    assert!(told > plain);
}

#[test]
fn a_deadline_that_the_job_cannot_keep_alone_is_refused_with_its_time() {
    let bench = Bench::measured();
    let asked = job(1, 16, 30);
    let own = whole_cost(&asked);
    let due = (bench.clock.elapsed() + own).saturating_sub(ms(10));
    let Err(SubmitError::DeadlineTooShort { work }) = bench.submit_due(asked.clone(), due) else {
        panic!("it was not refused");
    };
    assert_close(work, own);
    assert_eq!(bench.shared.stats().outcomes.rejected, 1);
    assert!(!bench.shared.forecast(&asked, &bench.due(due)).is_accepted);
    let due = due + ms(20);
    assert!(bench.shared.forecast(&asked, &bench.due(due)).is_accepted);
    bench.submit_due(asked, due).unwrap();
}

#[test]
fn a_deadline_that_the_queue_makes_late_is_refused_until_the_queue_is_shorter() {
    let mut bench = Bench::measured();
    let own = whole_cost(&job(1, 8, 20));
    let now = bench.clock.elapsed();
    let handles = [1, 2, 3].map(|seed| {
        bench
            .submit_due(job(seed, 8, 20), now + own * 7 / 2)
            .unwrap()
    });
    let asked = job(4, 8, 20);
    let refused = bench.submit_due(asked.clone(), now + own * 2);
    let Err(SubmitError::TooLate {
        wait,
        work,
        retry_after,
    }) = refused
    else {
        panic!("it was not refused: {refused:?}");
    };
    // It would go first, and make the three others late, which are due together.
    assert_close(work, own);
    assert!(wait < own / 2, "{wait:?}");
    assert!(retry_after < own, "{retry_after:?}");

    // After the others it is late itself.
    let refused = bench.submit_due(asked.clone(), now + own * 7 / 2);
    let Err(SubmitError::TooLate {
        wait, retry_after, ..
    }) = refused
    else {
        panic!("it was not refused: {refused:?}");
    };
    assert_close(wait, own * 3);
    while bench.clock.elapsed() < now + retry_after + ms(70) {
        bench.turn();
    }
    let time = own * 4;
    let due = bench.clock.elapsed() + time;
    let fourth = bench.submit_due(asked, due).unwrap();
    bench.run();
    for handle in handles.into_iter().chain([fourth]) {
        outcome(handle).unwrap();
    }
    assert!(ended(&bench, 4) <= due);
    assert_eq!(bench.shared.stats().outcomes.rejected, 2);
}

#[test]
fn jobs_without_a_deadline_do_not_make_one_late() {
    let mut bench = Bench::measured();
    let own = whole_cost(&job(9, 8, 20));
    let _queue: Vec<_> = (1..6).map(|seed| bench.submit(job(seed, 16, 30))).collect();
    let due = bench.clock.elapsed() + own * 3 / 2;
    let handle = bench.submit_due(job(9, 8, 20), due).unwrap();
    bench.turn_until(Call::Finish(9));
    assert!(ended(&bench, 9) <= due);
    outcome(handle).unwrap();
}

#[test]
fn nothing_is_refused_before_the_speed_is_known() {
    let mut bench = Bench::new(settings(8, 8));
    let asked = job(1, 8, 20);
    let handle = bench.submit_due(asked, ms(200)).unwrap();
    bench.run();
    // After two steps it is clear that the job cannot be in time.
    let (start, step) = (Call::Start(1), Call::Step(1));
    assert_eq!(bench.calls(), [start, step, step, Call::Discard(1)]);
    let Err(error) = outcome(handle) else {
        panic!("it was finished");
    };
    assert!(matches!(error, JobError::TooLate { .. }), "{error}");
}

#[test]
fn a_job_that_can_no_longer_be_in_time_is_given_up_after_the_step() {
    let mut bench = Bench::measured();
    let asked = job(1, 8, 20);
    let (own, step) = (whole_cost(&asked), cost(&asked, Stage::Step));
    let due = bench.clock.elapsed() + own + step / 2;
    let handle = bench.submit_due(asked, due).unwrap();
    let next = bench.submit(job(2, 8, 20));
    // In the middle of the third step the device stands still for a while.
    let clock = Arc::clone(&bench.clock);
    let middle = bench.clock.elapsed() + step * 5 / 2;
    bench.at(middle, move || clock.advance(ms(100)));
    bench.run();
    let Err(error) = outcome(handle) else {
        panic!("it was finished");
    };
    let JobError::TooLate { late } = error else {
        panic!("{error}");
    };
    // It stood still until 100 ms after that.
    assert_close(late, ms(100).saturating_sub(step));
    let text = error.to_string();
    let number = format!(
        "{} ms too late for its deadline_ms",
        late.as_micros().div_ceil(1000)
    );
    assert!(text.contains(&number), "{text}");
    let calls = &bench.calls()[10..];
    let (start, step) = (Call::Start(1), Call::Step(1));
    assert_eq!(calls[..5], [start, step, step, step, Call::Discard(1)]);
    outcome(next).unwrap();
    let outcomes = bench.shared.stats().outcomes;
    assert_eq!((outcomes.too_late, outcomes.deadline_passed), (1, 0));
}

#[test]
fn a_job_that_waits_too_long_never_reaches_the_pipeline() {
    let mut bench = Bench::measured();
    let own = whole_cost(&job(1, 8, 20));
    let now = bench.clock.elapsed();
    let first = bench.submit_due(job(1, 8, 20), now + own * 2).unwrap();
    let second = bench.submit_due(job(2, 8, 20), now + own * 5 / 2).unwrap();
    let clock = Arc::clone(&bench.clock);
    bench.at(now + own / 2, move || clock.advance(own * 3 / 4));
    bench.run();
    outcome(first).unwrap();
    assert!(matches!(outcome(second), Err(JobError::TooLate { .. })));
    assert!(!bench.calls().contains(&Call::Start(2)));
}

#[test]
fn slow_steps_do_not_end_a_job_that_can_still_be_in_time() {
    let mut bench = Bench::measured();
    let asked = job(1, 8, 20);
    let (own, step) = (whole_cost(&asked), cost(&asked, Stage::Step));
    let start = bench.clock.elapsed();
    let due = start + own * 3 / 2;
    let handle = bench.submit_due(asked, due).unwrap();
    // Every other step takes half as long again: at the speed of the last steps, the job would be late.
    for number in 0..10 {
        let clock = Arc::clone(&bench.clock);
        let began = (step * 5 / 2 + ms(2)) * number;
        bench.at(start + began + ms(3), move || clock.advance(step * 3 / 2));
    }
    bench.run();
    outcome(handle).unwrap();
    assert!(ended(&bench, 1) > start + own * 6 / 5);
}

#[test]
fn a_speed_that_was_measured_long_ago_refuses_nothing() {
    let mut bench = Bench::measured();
    let asked = job(1, 8, 20);
    let time = whole_cost(&asked) / 2;
    let submit = |bench: &Bench| bench.submit_due(job(1, 8, 20), bench.clock.elapsed() + time);
    submit(&bench).unwrap_err();
    bench.clock.advance(Duration::from_mins(11));
    let handle = submit(&bench).unwrap();
    bench.run();
    // The first turn measures the speed again.
    assert!(matches!(outcome(handle), Err(JobError::TooLate { .. })));
    assert_eq!(bench.calls()[10..], [Call::Start(1), Call::Discard(1)]);
}

#[test]
fn the_oldest_job_keeps_a_quarter_whatever_is_due() {
    let mut bench = Bench::new(settings(10, 8));
    for seed in [10_000, 10_001] {
        let handle = bench.submit(job(seed, 8, 4));
        bench.run();
        outcome(handle).unwrap();
    }
    let large = job(0, 16, 50);
    let start = bench.clock.elapsed();
    let handle = bench.submit(large.clone());
    let small = job(1, 8, 4);
    let every = whole_cost(&small) / 2;
    for index in 0..5000 {
        let came = start + every * index as u32;
        let (shared, job) = (Arc::clone(&bench.shared), job(1 + index, 8, 4));
        let options = bench.due(came + whole_cost(&small) * 5);
        bench.at(came, move || {
            if let Ok(handle) = shared.submit(job, options) {
                std::mem::forget(handle);
            }
        });
    }
    bench.turn_until(Call::Finish(0));
    let took = ended(&bench, 0).saturating_sub(start);
    let (alone, turn) = (whole_cost(&large), cost(&small, Stage::Step));
    assert!(took > alone * 2, "there was no crowd: {took:?}");
    assert!(took <= alone * 4 + turn * 52, "{took:?} and not {alone:?}");
    assert!(bench.shared.stats().outcomes.finished > 20);
    outcome(handle).unwrap();
}
