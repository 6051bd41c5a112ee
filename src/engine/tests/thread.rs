//! The real thread, woken and joined.

use std::sync::{Arc, Mutex};

use super::bench::{
    Call, Logged, PANIC_IN_STEP, SimulatedClock, WELL, behaving, fake, job, settings,
};
use crate::engine::{
    Engine, EngineSettings, Event, Finished, JobError, JobHandle, StartError, State, SubmitError,
    SubmitOptions,
};

type Log = Arc<Mutex<Vec<Logged>>>;

/// An engine with a real thread. The pipeline's work takes simulated time only.
fn start(settings: EngineSettings) -> (Engine, Log) {
    let log = Log::default();
    let pipeline = fake(Arc::new(SimulatedClock::new()), Arc::clone(&log));
    (Engine::start(Box::new(pipeline), settings), log)
}

fn wait(mut handle: JobHandle) -> Result<Finished, JobError> {
    loop {
        match handle.blocking_next_event() {
            Event::Finished(finished) => return Ok(finished),
            Event::Failed(error) => return Err(error),
            _ => {}
        }
    }
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().build();
    runtime.unwrap().block_on(future)
}

#[test]
fn an_idle_thread_is_woken_by_each_job() {
    let (engine, _) = start(settings(0, 8));
    for seed in 0..20 {
        let handle = engine.submit(job(seed, 1, 1), SubmitOptions::default());
        let finished = wait(handle.unwrap()).unwrap();
        assert_eq!(finished.output.images[0].pixels[0], seed as u8);
    }
    assert_eq!(engine.stats().outcomes.finished, 20);
}

#[test]
fn ready_waits_for_the_warm_up() {
    let warm_up = |behaviour| EngineSettings {
        warm_up: Some(behaving(behaviour, job(9, 1, 3))),
        ..settings(0, 8)
    };
    let (engine, log) = start(warm_up(WELL));
    block_on(engine.ready()).unwrap();
    assert!(matches!(engine.state(), State::Ready));
    assert_eq!(log.lock().unwrap().last().unwrap().call, Call::Finish(9));

    let (engine, _) = start(warm_up(PANIC_IN_STEP));
    let error = block_on(engine.ready()).unwrap_err();
    assert!(matches!(error, StartError::WarmUp(JobError::Panicked(_))));
    let refused = engine.submit(job(1, 1, 1), SubmitOptions::default());
    assert!(matches!(refused, Err(SubmitError::Failed { .. })));
}

#[test]
fn an_engine_without_warm_up_is_ready_at_once() {
    let (engine, _) = start(settings(0, 8));
    assert!(matches!(engine.state(), State::Ready));
    block_on(engine.ready()).unwrap();
}

#[test]
fn a_drained_engine_stops() {
    let (engine, _) = start(settings(0, 8));
    let job = engine.submit(job(1, 1, 5), SubmitOptions::default());
    engine.drain(std::time::Duration::MAX);
    block_on(engine.stopped());
    wait(job.unwrap()).unwrap();
    assert!(matches!(engine.state(), State::Stopped));
}

#[test]
fn shutting_down_fails_the_jobs_and_drops_the_pipeline() {
    let (engine, log) = start(settings(8, 8));
    // Enough steps for the job to be unfinished when the engine is shut down.
    let running = engine.submit(job(1, 1, usize::MAX), SubmitOptions::default());
    let mut running = running.unwrap();
    while !matches!(running.blocking_next_event(), Event::Started) {}
    let waiting = engine.submit(job(2, 1, usize::MAX), SubmitOptions::default());
    engine.shutdown();
    // The pipeline, which held the other reference, has been dropped.
    assert_eq!(Arc::strong_count(&log), 1);
    assert!(matches!(wait(running), Err(JobError::Stopped)));
    assert!(matches!(wait(waiting.unwrap()), Err(JobError::Stopped)));
    let refused = engine.submit(job(3, 1, 1), SubmitOptions::default());
    assert_eq!(refused.unwrap_err(), SubmitError::Stopped);
    assert!(matches!(engine.state(), State::Stopped));
}

#[test]
fn dropping_the_last_engine_joins_the_thread() {
    let (engine, log) = start(settings(8, 8));
    let copy = engine.clone();
    drop(engine);
    let handle = copy.submit(job(1, 1, 1), SubmitOptions::default()).unwrap();
    wait(handle).unwrap();
    drop(copy);
    assert_eq!(Arc::strong_count(&log), 1);
}
