//! Jobs that end before they are finished.

use std::time::Duration;

use super::bench::{
    Bench, Call, FAIL_IN_STEP, PANIC_IN_FINISH, PANIC_IN_START, PANIC_IN_STEP, behaving, cost, job,
    ms, outcome, received, settings,
};
use crate::engine::cost::Stage;
use crate::engine::{Event, JobError, Outcomes};

#[test]
fn a_job_that_is_dropped_while_it_waits_never_reaches_the_pipeline() {
    let mut bench = Bench::new(settings(8, 8));
    let first = bench.submit(job(1, 4, 2));
    drop(bench.submit(job(2, 4, 2)));
    bench.run();
    assert_eq!(bench.finished(), [1]);
    let calls = bench.calls();
    assert!(!calls.contains(&Call::Start(2)), "its prompt was encoded");
    assert!(!calls.contains(&Call::Discard(2)));
    outcome(first).unwrap();
    assert_eq!(bench.shared.stats().outcomes.cancelled, 1);
}

#[test]
fn a_job_that_is_dropped_while_it_is_generated_frees_the_device_after_the_step() {
    let mut bench = Bench::new(settings(8, 8));
    let (step, encode) = (
        cost(&job(1, 4, 9), Stage::Step),
        cost(&job(1, 4, 9), Stage::Encode),
    );
    let handle = bench.submit(job(1, 4, 9));
    bench.at(encode + step * 5 / 2, move || drop(handle));
    bench.run();
    // The handle was dropped during the third step.
    let (start, step) = (Call::Start(1), Call::Step(1));
    assert_eq!(bench.calls(), [start, step, step, step, Call::Discard(1)]);
    assert_eq!(bench.shared.stats().outcomes.cancelled, 1);
    assert_eq!(bench.shared.stats().memory.in_use, Some(0));
}

#[test]
fn a_job_that_is_dropped_in_its_last_step_is_not_decoded() {
    let mut bench = Bench::new(settings(8, 8));
    let handle = bench.submit(job(1, 4, 1));
    bench.turn();
    bench.turn();
    drop(handle);
    bench.run();
    let expected = [Call::Start(1), Call::Step(1), Call::Discard(1)];
    assert_eq!(bench.calls(), expected);
}

#[test]
fn a_deadline_that_passes_in_the_queue_ends_the_job_before_its_prompt_is_encoded() {
    let mut bench = Bench::new(settings(8, 8));
    let first = bench.submit(job(1, 8, 10));
    let late = bench.submit_with_deadline(job(2, 8, 10), ms(300));
    bench.run();
    assert!(matches!(outcome(late), Err(JobError::DeadlinePassed)));
    assert!(!bench.calls().contains(&Call::Start(2)));
    outcome(first).unwrap();
    assert_eq!(bench.shared.stats().outcomes.deadline_passed, 1);
}

#[test]
fn a_deadline_that_passes_ends_the_job_after_the_step() {
    let mut bench = Bench::new(settings(8, 8));
    let step = cost(&job(1, 8, 10), Stage::Step);
    let deadline = step * 4;
    let handle = bench.submit_with_deadline(job(1, 8, 10), deadline);
    bench.run();
    assert!(matches!(outcome(handle), Err(JobError::DeadlinePassed)));
    assert_eq!(bench.calls().last(), Some(&Call::Discard(1)));
    assert!(bench.clock.elapsed() < deadline + step);
    assert!(bench.finished().is_empty());
}

#[test]
fn a_deadline_that_is_met_changes_nothing() {
    let mut bench = Bench::new(settings(8, 8));
    let handle = bench.submit_with_deadline(job(1, 2, 2), Duration::from_secs(10));
    bench.run();
    outcome(handle).unwrap();
    assert_eq!(bench.shared.stats().outcomes.deadline_passed, 0);
}

#[test]
fn a_failure_ends_that_job_and_no_other() {
    for (behaviour, expected) in [
        (PANIC_IN_START, "the pipeline panicked: start went wrong"),
        (PANIC_IN_STEP, "the pipeline panicked: step went wrong"),
        (PANIC_IN_FINISH, "the pipeline panicked: finish went wrong"),
        (FAIL_IN_STEP, "the device failed: out of memory"),
    ] {
        let mut bench = Bench::new(settings(8, 8));
        // A started job that the failing job interrupts.
        let beside = bench.submit(job(1, 8, 10));
        bench.turn();
        bench.turn();
        let failing = bench.submit(behaving(behaviour, job(2, 4, 2)));
        let next = bench.submit(job(3, 4, 2));
        bench.run();
        assert_eq!(outcome(failing).unwrap_err().to_string(), expected);
        assert_eq!(outcome(beside).unwrap().output.images[0].pixels[0], 1);
        assert_eq!(outcome(next).unwrap().output.images[0].pixels[0], 3);
        let stats = bench.shared.stats();
        let outcomes = Outcomes {
            finished: 2,
            failed: 1,
            ..Outcomes::default()
        };
        assert_eq!(stats.outcomes, outcomes, "{expected}");
        // The failed job has been removed, and was not started again.
        assert_eq!(stats.memory.in_use, Some(0), "{expected}");
        let starts = bench.calls().into_iter();
        assert_eq!(starts.filter(|call| *call == Call::Start(2)).count(), 1);
    }
}

#[test]
fn the_events_of_a_job_come_in_order() {
    let mut bench = Bench::new(settings(8, 8));
    let mut handle = bench.submit(job(7, 2, 2));
    bench.run();
    let events = received(&mut handle);
    assert!(matches!(
        events.as_slice(),
        [
            Event::Queued { position: 0, .. },
            Event::Started,
            Event::Step { done: 1, total: 2, .. },
            Event::Step { done: 2, total: 2, .. },
            Event::Finished(finished),
        ] if finished.output.images[0].pixels[0] == 7
    ));
}
