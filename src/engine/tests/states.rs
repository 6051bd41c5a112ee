//! Warm-up, draining, stopping.

use std::time::Duration;

use super::bench::{
    Bench, Call, FAIL_IN_STEP, LOSE_DEVICE_IN_STEP, PANIC_IN_STEP, behaving, cost, job, ms,
    outcome, settings, whole_cost,
};
use crate::engine::cost::Stage;
use crate::engine::plan::Plan;
use crate::engine::{EngineSettings, JobError, Outcomes, State, SubmitError};

fn with_warm_up(behaviour: u32) -> Bench {
    Bench::new(EngineSettings {
        warm_up: Some(behaving(behaviour, job(99, 16, 2))),
        ..settings(2, 8)
    })
}

fn state(bench: &Bench) -> State {
    bench.shared.state().borrow().clone()
}

#[test]
fn the_warm_up_is_generated_before_anything_else() {
    let mut bench = with_warm_up(super::bench::WELL);
    assert!(matches!(state(&bench), State::Starting));
    // Much smaller than the warm-up, but it waits.
    let small = bench.submit(job(1, 1, 1));
    while matches!(state(&bench), State::Starting) {
        assert!(bench.turn());
        assert!(!bench.calls().contains(&Call::Start(1)));
    }
    assert!(matches!(state(&bench), State::Ready));
    assert_eq!(bench.finished(), [99]);
    bench.run();
    let waited = outcome(small).unwrap().timings.queue;
    assert!(waited.abs_diff(whole_cost(&job(99, 16, 2))) < ms(1));
    // The warm-up is not counted.
    let stats = bench.shared.stats();
    assert_eq!(
        (stats.outcomes.finished, stats.images, stats.steps),
        (1, 1, 1)
    );
    assert_eq!(stats.step_time.count(), 1);
}

#[test]
fn the_warm_up_takes_nobodys_place_and_measures_the_speed() {
    let mut bench = with_warm_up(super::bench::WELL);
    let handles = [1, 2, 3].map(|seed| bench.submit(job(seed, 4, 2)));
    bench.try_submit(job(4, 4, 2)).unwrap_err();
    while matches!(state(&bench), State::Starting) {
        bench.turn();
    }
    let Err(SubmitError::QueueFull { retry_after, .. }) = bench.try_submit(job(4, 4, 2)) else {
        panic!("a fourth job was taken");
    };
    assert!(retry_after.abs_diff(whole_cost(&job(1, 4, 2))) < ms(1));
    bench.run();
    for handle in handles {
        outcome(handle).unwrap();
    }
}

#[test]
fn a_device_that_is_lost_fails_the_engine_and_every_job() {
    let mut bench = Bench::new(settings(8, 2));
    let waiting = [2, 3, 4].map(|seed| bench.submit(job(seed, 4, 3)));
    let fatal = bench.submit(behaving(LOSE_DEVICE_IN_STEP, job(1, 1, 1)));
    bench.run();
    let error = outcome(fatal).unwrap_err();
    assert!(matches!(error, JobError::Pipeline(_)), "{error}");
    for handle in waiting {
        let error = outcome(handle).unwrap_err();
        assert!(matches!(error, JobError::Lost { .. }), "{error}");
        assert_eq!(
            error.to_string(),
            "the image was not finished: the device failed: gone"
        );
    }
    let State::Failed(error) = state(&bench) else {
        panic!("{:?}", state(&bench));
    };
    assert_eq!(error.to_string(), "the device failed: gone");
    let refused = bench.try_submit(job(5, 1, 1)).unwrap_err();
    assert_eq!(
        refused.to_string(),
        "no requests are taken: the device failed: gone"
    );
    assert!(matches!(bench.shared.poll().plan, Plan::End));
}

#[test]
fn a_device_that_fails_once_goes_on() {
    let mut bench = Bench::new(EngineSettings {
        warm_up: None,
        ..settings(8, 2)
    });
    let failed = bench.submit(behaving(FAIL_IN_STEP, job(1, 1, 1)));
    bench.run();
    outcome(failed).unwrap_err();
    let next = bench.submit(job(2, 1, 1));
    bench.run();
    outcome(next).unwrap();
    assert!(matches!(state(&bench), State::Ready));
}

#[test]
fn a_failed_warm_up_fails_the_engine() {
    let mut bench = with_warm_up(PANIC_IN_STEP);
    let waiting = bench.submit(job(1, 1, 1));
    bench.run();
    let State::Failed(error) = state(&bench) else {
        panic!("{:?}", state(&bench));
    };
    assert_eq!(error.to_string(), "the pipeline panicked: step went wrong");
    assert!(matches!(outcome(waiting), Err(JobError::Stopped)));
    assert!(!bench.calls().contains(&Call::Start(1)));
    assert_eq!(
        bench.try_submit(job(2, 1, 1)).unwrap_err(),
        SubmitError::Failed {
            reason: "the pipeline panicked: step went wrong".to_owned()
        }
    );
    assert!(matches!(bench.shared.poll().plan, Plan::End));
    let outcomes = Outcomes {
        stopped: 1,
        rejected: 1,
        ..Outcomes::default()
    };
    assert_eq!(bench.shared.stats().outcomes, outcomes);
}

#[test]
fn draining_finishes_what_there_is_and_takes_nothing_new() {
    let mut bench = Bench::new(settings(8, 8));
    let handles = [1, 2].map(|seed| bench.submit(job(seed, 4, 5)));
    bench.turn();
    bench.shared.drain(Duration::from_hours(1));
    assert!(matches!(state(&bench), State::Draining));
    assert_eq!(
        bench.try_submit(job(3, 1, 1)).unwrap_err(),
        SubmitError::Draining
    );
    bench.run();
    for handle in handles {
        outcome(handle).unwrap();
    }
    assert!(matches!(state(&bench), State::Stopped));
    assert!(matches!(bench.shared.poll().plan, Plan::End));
}

#[test]
fn what_is_not_finished_when_draining_is_over_is_stopped() {
    let mut bench = Bench::new(settings(8, 8));
    let (one, step) = (
        whole_cost(&job(1, 8, 10)),
        cost(&job(1, 8, 10), Stage::Step),
    );
    let [first, second, third] = [1, 2, 3].map(|seed| bench.submit(job(seed, 8, 10)));
    let timeout = one * 3 / 2;
    bench.shared.drain(timeout);
    bench.run();
    outcome(first).unwrap();
    for handle in [second, third] {
        assert!(matches!(outcome(handle), Err(JobError::Stopped)));
    }
    assert!(bench.clock.elapsed() <= timeout + step);
    let calls = bench.calls();
    assert_eq!(calls.last(), Some(&Call::Discard(2)));
    assert!(!calls.contains(&Call::Start(3)));
    assert_eq!(bench.shared.stats().outcomes.stopped, 2);
}

#[test]
fn draining_can_be_made_shorter_and_not_longer() {
    let mut bench = Bench::new(settings(8, 8));
    let handle = bench.submit(job(1, 8, 100));
    bench.shared.drain(ms(500));
    bench.shared.drain(Duration::MAX);
    bench.at(ms(100), {
        let shared = std::sync::Arc::clone(&bench.shared);
        move || shared.drain(ms(200))
    });
    bench.run();
    assert!(matches!(outcome(handle), Err(JobError::Stopped)));
    assert!(bench.clock.elapsed() >= ms(300));
    assert!(bench.clock.elapsed() < ms(300) + cost(&job(1, 8, 100), Stage::Step));
}

#[test]
fn an_idle_engine_that_is_drained_ends_at_once() {
    let bench = Bench::new(settings(8, 8));
    assert!(matches!(bench.shared.poll().plan, Plan::Sleep));
    bench.shared.drain(Duration::from_hours(1));
    assert!(matches!(bench.shared.poll().plan, Plan::End));
    assert!(matches!(state(&bench), State::Stopped));
}

#[test]
fn an_engine_that_is_drained_while_it_starts_does_not_finish_its_warm_up() {
    let mut bench = with_warm_up(super::bench::WELL);
    let waiting = bench.submit(job(1, 1, 1));
    bench.turn();
    bench.shared.drain(Duration::from_hours(1));
    bench.run();
    outcome(waiting).unwrap();
    assert_eq!(bench.finished(), [1]);
    assert!(matches!(state(&bench), State::Stopped));
}

#[test]
fn stopping_ends_all_jobs_after_the_step() {
    let mut bench = Bench::new(settings(8, 8));
    let running = bench.submit(job(1, 8, 10));
    let waiting = bench.submit(job(2, 8, 10));
    bench.turn();
    bench.turn();
    bench.shared.stop();
    // A job that has not been started ends at once.
    assert!(matches!(outcome(waiting), Err(JobError::Stopped)));
    bench.run();
    assert!(matches!(outcome(running), Err(JobError::Stopped)));
    assert_eq!(
        bench.calls(),
        [Call::Start(1), Call::Step(1), Call::Discard(1)]
    );
    assert_eq!(
        bench.try_submit(job(3, 1, 1)).unwrap_err(),
        SubmitError::Stopped
    );
}
