use std::collections::HashMap;
use std::sync::mpsc::{Receiver, Sender, channel};

use kiln_models::noise::NoiseGenerator;
use kiln_models::painter::{ImageSizes, MemoryUse, RgbImage};

use super::*;

const WELL: u32 = 0;
const PANIC_IN_START: u32 = 1;
const PANIC_IN_STEP: u32 = 2;
const PANIC_IN_FINISH: u32 = 3;
const FAIL_IN_STEP: u32 = 4;

/// Paints 1x1 images that show the seed, and does what the first token of the prompt says.
struct Fake {
    info: ModelInfo,
    jobs: HashMap<JobId, (Job, usize)>,
    /// Each step waits for one permit; once the sender is gone all pass.
    permits: Receiver<()>,
    calls: Sender<Call>,
}

#[derive(Debug, PartialEq, Eq)]
enum Call {
    Start(u64),
    Step(u64),
    Finish(u64),
    Discard,
    Dropped,
}

impl Painter for Fake {
    fn info(&self) -> &ModelInfo {
        &self.info
    }

    fn start(&mut self, id: JobId, job: Job) -> Result<(), PaintError> {
        self.calls.send(Call::Start(job.seed)).ok();
        assert!(job.prompt[0] != PANIC_IN_START, "start went wrong");
        let steps = job.num_inference_steps;
        self.jobs.insert(id, (job, steps));
        Ok(())
    }

    fn step(&mut self, ids: &[JobId]) -> Result<Vec<usize>, PaintError> {
        self.permits.recv().ok();
        let mut steps_left = Vec::new();
        for id in ids {
            let (job, left) = self.jobs.get_mut(id).ok_or(PaintError::UnknownJob(*id))?;
            self.calls.send(Call::Step(job.seed)).ok();
            assert!(job.prompt[0] != PANIC_IN_STEP, "step {} went wrong", *left);
            if job.prompt[0] == FAIL_IN_STEP {
                return Err(PaintError::Device("out of memory".into()));
            }
            *left -= 1;
            steps_left.push(*left);
        }
        Ok(steps_left)
    }

    fn finish(&mut self, id: JobId) -> Result<Painting, PaintError> {
        let (job, _) = self.jobs.remove(&id).ok_or(PaintError::UnknownJob(id))?;
        self.calls.send(Call::Finish(job.seed)).ok();
        assert!(job.prompt[0] != PANIC_IN_FINISH, "finish went wrong");
        let image = RgbImage {
            height: 1,
            width: 1,
            pixels: vec![job.seed as u8; 3],
        };
        Ok(Painting {
            images: vec![image],
            trace: Vec::new(),
        })
    }

    fn discard(&mut self, id: JobId) {
        self.calls.send(Call::Discard).ok();
        self.jobs.remove(&id);
    }

    fn memory(&self) -> MemoryUse {
        MemoryUse::default()
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        self.calls.send(Call::Dropped).ok();
    }
}

struct Setup {
    engine: Engine,
    permits: Sender<()>,
    calls: Receiver<Call>,
}

fn setup(max_queue: usize) -> Setup {
    let (permits, receiver) = channel();
    let (sender, calls) = channel();
    let info = ModelInfo {
        sizes: ImageSizes {
            multiple: 16,
            max_side: 64,
            default_side: 16,
        },
        vocab_size: 8,
        device: "fake".into(),
        dtype: "f32",
    };
    let painter = Fake {
        info,
        jobs: HashMap::new(),
        permits: receiver,
        calls: sender,
    };
    Setup {
        engine: Engine::start(Box::new(painter), max_queue),
        permits,
        calls,
    }
}

fn job(behaviour: u32, seed: u64, steps: usize) -> Job {
    Job {
        prompt: vec![behaviour],
        negative_prompt: None,
        true_cfg_scale: 1.0,
        height: 16,
        width: 16,
        num_inference_steps: steps,
        num_images: 1,
        seed,
        noise_generator: NoiseGenerator::Cpu,
        record: false,
    }
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

/// Until the painter has a job in hand; it then waits for a permit.
fn wait_for(calls: &Receiver<Call>, call: &Call) {
    while calls.recv().unwrap() != *call {}
}

#[test]
fn a_job_tells_each_step_and_then_the_painting() {
    let Setup {
        engine, permits, ..
    } = setup(1);
    drop(permits);
    let mut handle = engine.submit(job(WELL, 7, 2)).unwrap();
    assert!(matches!(
        handle.blocking_next_event(),
        Event::Queued { position: 0 }
    ));
    assert!(matches!(handle.blocking_next_event(), Event::Started));
    assert!(matches!(
        handle.blocking_next_event(),
        Event::Step { done: 1, total: 2 }
    ));
    assert!(matches!(
        handle.blocking_next_event(),
        Event::Step { done: 2, total: 2 }
    ));
    let Event::Finished(finished) = handle.blocking_next_event() else {
        panic!("not finished")
    };
    assert_eq!(finished.painting.images[0].pixels, [7; 3]);
}

#[test]
fn jobs_run_in_the_order_they_came() {
    let Setup {
        engine,
        permits,
        calls,
    } = setup(2);
    let handles = [1, 2, 3].map(|seed| engine.submit(job(WELL, seed, 1)).unwrap());
    drop(permits);
    for handle in handles {
        wait(handle).unwrap();
    }
    let started: Vec<u64> = calls
        .try_iter()
        .filter_map(|call| {
            if let Call::Start(seed) = call {
                Some(seed)
            } else {
                None
            }
        })
        .collect();
    assert_eq!(started, [1, 2, 3]);
}

#[test]
fn a_full_queue_refuses_and_has_room_again_when_a_job_is_dropped() {
    let Setup {
        engine,
        permits,
        calls,
    } = setup(2);
    let first = engine.submit(job(WELL, 1, 1)).unwrap();
    wait_for(&calls, &Call::Start(1));
    let mut second = engine.submit(job(WELL, 2, 1)).unwrap();
    let mut third = engine.submit(job(WELL, 3, 1)).unwrap();
    assert!(matches!(
        second.blocking_next_event(),
        Event::Queued { position: 1 }
    ));
    assert!(matches!(
        third.blocking_next_event(),
        Event::Queued { position: 2 }
    ));
    let refused = engine.submit(job(WELL, 4, 1)).unwrap_err();
    assert!(matches!(refused, SubmitError::QueueFull { waiting: 2, .. }));

    drop(second);
    assert!(matches!(
        third.blocking_next_event(),
        Event::Queued { position: 1 }
    ));
    let fourth = engine.submit(job(WELL, 4, 1)).unwrap();
    drop(permits);
    for handle in [first, third, fourth] {
        wait(handle).unwrap();
    }
}

#[test]
fn no_queue_at_all_still_takes_a_job_when_idle() {
    let Setup {
        engine, permits, ..
    } = setup(0);
    drop(permits);
    for seed in 0..20 {
        wait(engine.submit(job(WELL, seed, 1)).unwrap()).unwrap();
    }
}

#[test]
fn a_dropped_job_is_discarded_within_a_step() {
    let Setup {
        engine,
        permits,
        calls,
    } = setup(1);
    let handle = engine.submit(job(WELL, 1, 1000)).unwrap();
    permits.send(()).unwrap();
    wait_for(&calls, &Call::Step(1));
    drop(handle);
    permits.send(()).unwrap();
    let after: Vec<Call> = calls
        .iter()
        .take_while(|call| *call != Call::Discard)
        .collect();
    assert!(
        after.len() <= 1,
        "painted on after the client had gone: {after:?}"
    );
    drop(permits);
    wait(engine.submit(job(WELL, 2, 1)).unwrap()).unwrap();
}

#[test]
fn a_failure_ends_that_job_and_the_next_one_runs() {
    let Setup {
        engine,
        permits,
        calls,
    } = setup(1);
    drop(permits);
    for (behaviour, expected) in [
        (PANIC_IN_START, "the painter panicked: start went wrong"),
        (PANIC_IN_STEP, "the painter panicked: step 2 went wrong"),
        (PANIC_IN_FINISH, "the painter panicked: finish went wrong"),
        (FAIL_IN_STEP, "the device failed: out of memory"),
    ] {
        let error = wait(engine.submit(job(behaviour, 1, 2)).unwrap()).unwrap_err();
        assert_eq!(error.to_string(), expected);
        wait(engine.submit(job(WELL, 2, 2)).unwrap()).unwrap();
        let discards = calls
            .try_iter()
            .filter(|call| *call == Call::Discard)
            .count();
        assert_eq!(discards, 1, "{expected}");
    }
}

#[test]
fn shutting_down_fails_the_jobs_and_drops_the_painter() {
    let Setup {
        engine,
        permits,
        calls,
    } = setup(1);
    let running = engine.submit(job(WELL, 1, 1000)).unwrap();
    wait_for(&calls, &Call::Start(1));
    let waiting = engine.submit(job(WELL, 2, 1)).unwrap();
    engine.stop();
    drop(permits);
    engine.shutdown();
    assert!(calls.try_iter().any(|call| call == Call::Dropped));
    assert!(matches!(wait(running), Err(JobError::Stopped)));
    assert!(matches!(wait(waiting), Err(JobError::Stopped)));
    assert_eq!(
        engine.submit(job(WELL, 3, 1)).unwrap_err(),
        SubmitError::Stopped
    );
    assert!(!engine.is_running());
}
