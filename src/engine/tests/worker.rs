//! The worker alone: what it makes of plans, those for several jobs included.

use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex};

use kiln_models::job::JobId;
use kiln_models::pipeline::PipelineError;
use kiln_models::testing::{self, FakePipeline};
use kiln_models::{FileFault, FileProblem};
use tracing::Span;

use super::bench::{
    Bench, Call, FAIL_IN_STEP, LOSE_DEVICE_IN_STEP, PANIC_IN_STEP, SimulatedClock, WELL, behaving,
    cost, job, outcome, settings,
};
use crate::engine::cost::Stage;
use crate::engine::plan::{Booked, Outcome, Plan};
use crate::engine::{JobError, State, SubmitOptions};

/// A bench whose pipeline has jobs 1 and 2, with five steps each; the second behaves like this.
fn with_two_jobs(behaviour: u32) -> Bench {
    let mut bench = Bench::new(settings(8, 8));
    start_two(&mut bench, behaviour);
    bench
}

fn start_two(bench: &mut Bench, behaviour: u32) {
    for (id, behaviour) in [(1, WELL), (2, behaviour)] {
        let plan = Plan::Start(id, behaving(behaviour, job(id, 4, 5)));
        let booked = bench.execute(plan);
        assert!(matches!(booked.outcome, Outcome::Started(_, Ok(()))));
    }
}

fn steps(booked: Booked) -> Vec<(JobId, Result<usize, JobError>)> {
    match booked.outcome {
        Outcome::Stepped(steps) => {
            let left = steps.into_iter();
            left.map(|(id, step)| (id, step.map(|step| step.steps_left)))
                .collect()
        }
        Outcome::SteppedAlone(steps) => {
            let left = steps.into_iter();
            left.map(|(id, step, _)| (id, step.map(|step| step.steps_left)))
                .collect()
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn jobs_are_stepped_together() {
    let mut bench = with_two_jobs(WELL);
    let booked = bench.execute(Plan::Step(vec![2, 1]));
    assert_eq!(booked.took, cost(&job(1, 4, 5), Stage::Step) * 2);
    assert_eq!(booked.holdings.memory.in_use, Some(2));
    let steps = steps(booked);
    assert!(matches!(steps.as_slice(), [(2, Ok(4)), (1, Ok(4))]));
}

#[test]
fn only_the_job_that_fails_alone_fails() {
    for (behaviour, expected) in [
        (FAIL_IN_STEP, "the device failed: out of memory"),
        (PANIC_IN_STEP, "the pipeline panicked: step went wrong"),
    ] {
        let mut bench = with_two_jobs(behaviour);
        let booked = bench.execute(Plan::Step(vec![1, 2]));
        // Together, and then each alone.
        assert_eq!(booked.took, cost(&job(1, 4, 5), Stage::Step) * 4);
        assert!(booked.lost.is_none());
        assert_eq!(booked.holdings.memory.in_use, Some(1));
        let steps = steps(booked);
        let [(1, Ok(4)), (2, Err(error))] = steps.as_slice() else {
            panic!("{steps:?}");
        };
        assert_eq!(error.to_string(), expected);
        let [first, second] = [Call::Step(1), Call::Step(2)];
        let calls = [first, second, first, second, Call::Discard(2)];
        assert_eq!(bench.calls()[2..], calls);
    }
}

#[test]
fn jobs_that_fail_only_together_go_on() {
    let mut steps_made = 0;
    let pipeline = FakePipeline::new(testing::model_info()).on_call(move |call| {
        steps_made += usize::from(matches!(call, testing::Call::Step(_)));
        match call {
            testing::Call::Step(_) if steps_made == 2 => {
                Err(PipelineError::Device("out of memory".into()))
            }
            _ => Ok(()),
        }
    });
    let clock = Arc::new(SimulatedClock::new());
    let log = Arc::new(Mutex::new(Vec::new()));
    let mut bench = Bench::with_pipeline(settings(8, 8), pipeline, clock, log);
    start_two(&mut bench, WELL);
    for steps_left in [4, 3] {
        let steps = steps(bench.execute(Plan::Step(vec![1, 2])));
        let left = steps.into_iter().map(|(_, step)| step.unwrap());
        assert_eq!(left.collect::<Vec<_>>(), [steps_left; 2]);
    }
}

#[test]
fn a_device_that_fails_for_every_job_is_lost() {
    let mut bench = with_two_jobs(LOSE_DEVICE_IN_STEP);
    let booked = bench.execute(Plan::Step(vec![1, 2]));
    let error = booked.lost.as_ref().unwrap();
    assert_eq!(error.to_string(), "the device failed: gone");
    assert_eq!(booked.holdings.memory.in_use, Some(0));
    assert!(steps(booked).iter().all(|(_, step)| step.is_err()));
}

#[test]
fn a_model_file_that_changed_fails_every_job_and_the_engine_with_its_name() {
    let pipeline = FakePipeline::new(testing::model_info()).on_call(|call| match call {
        testing::Call::Step(_) => Err(PipelineError::File(FileFault {
            file: "vae/weights".to_owned(),
            problem: FileProblem::Changed,
        })),
        testing::Call::Probe => panic!("the device is not at fault"),
        _ => Ok(()),
    });
    let (clock, log) = (Arc::new(SimulatedClock::new()), Arc::default());
    let mut bench = Bench::with_pipeline(settings(8, 8), pipeline, clock, log);
    let handles = [1, 2, 3].map(|seed| bench.submit(job(seed, 4, 2)));
    bench.run();
    for handle in handles {
        let error = outcome(handle).unwrap_err().to_string();
        assert!(error.contains("vae/weights changed"), "{error}");
    }
    let state = bench.shared.state().borrow().clone();
    assert!(matches!(state, State::Failed(_)), "{state:?}");
    let refused = bench.try_submit(job(4, 4, 2)).unwrap_err().to_string();
    let expected = "no requests are taken: vae/weights changed";
    assert!(refused.starts_with(expected), "{refused}");
}

#[test]
fn a_job_that_the_pipeline_does_not_have_fails() {
    let mut bench = with_two_jobs(WELL);
    let steps = steps(bench.execute(Plan::Step(vec![1, 7])));
    let [(1, Ok(4)), (7, Err(JobError::Pipeline(error)))] = steps.as_slice() else {
        panic!("{steps:?}");
    };
    assert!(matches!(**error, PipelineError::UnknownJob(7)));
}

#[test]
fn pipeline_calls_run_in_the_span_of_the_job() {
    tracing::subscriber::with_default(tracing_subscriber::registry(), || {
        let spans = Arc::new(Mutex::new(Vec::new()));
        let pipeline = {
            let spans = Arc::clone(&spans);
            FakePipeline::new(testing::model_info()).on_call(move |call| {
                if !matches!(call, testing::Call::Steps(_)) {
                    spans.lock().unwrap().push(Span::current().id());
                }
                Ok(())
            })
        };
        let (clock, log) = (Arc::new(SimulatedClock::new()), Arc::default());
        let mut bench = Bench::with_pipeline(settings(8, 8), pipeline, clock, log);
        let span = tracing::info_span!("request", id = "abc");
        let options = SubmitOptions {
            preview_every: NonZeroUsize::new(1),
            span: span.clone(),
            ..SubmitOptions::default()
        };
        let handle = bench.shared.submit(job(1, 4, 2), options).unwrap();
        let dropped = bench.shared.submit(job(2, 16, 9), SubmitOptions::default());
        // Start, step, preview, step, finish of the first, start and discard of the second.
        for _ in 0..6 {
            bench.turn();
        }
        drop(dropped);
        bench.run();
        outcome(handle).unwrap();
        let spans = spans.lock().unwrap();
        assert!(span.id().is_some());
        assert!(spans[..5].iter().all(|entered| *entered == span.id()));
        assert_eq!(spans[5..], [None, None]);
    });
}
