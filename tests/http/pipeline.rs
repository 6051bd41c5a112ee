//! The fake pipeline of these tests.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use kiln_models::job::Job;
use kiln_models::pipeline::PipelineError;
use kiln_models::testing::{Call, FakePipeline, model_info};

/// Seed of a job that panics in its first step.
pub(super) const PANIC_IN_STEP: u64 = 1 << 40;
/// Seed of a job that fails when it is started.
pub(super) const FAIL_IN_START: u64 = 1 << 41;
/// Seed of a job in whose first step one of two devices is lost.
pub(super) const LOSE_DEVICE: u64 = 1 << 42;

#[derive(Debug, Clone, Copy)]
pub(super) enum Pace {
    Fast,
    /// A step takes 10 ms.
    Slow,
}

/// Calls of a pipeline.
#[derive(Debug, Default)]
pub(super) struct Record {
    pub(super) steps: AtomicUsize,
    pub(super) discards: AtomicUsize,
    pub(super) last_job: Mutex<Option<Job>>,
}

/// A pipeline that fills its images with the lowest byte of the seed.
pub(super) fn fake(pace: Pace, record: Arc<Record>) -> FakePipeline {
    let mut is_lost = false;
    FakePipeline::new(model_info()).on_call(move |call| {
        if let Call::Step(job) = call {
            is_lost |= job.noise.seed == LOSE_DEVICE;
        }
        if is_lost && matches!(call, Call::Step(_) | Call::Probe) {
            let report = "test:1 (fake): the driver answered nothing";
            return Err(PipelineError::Device(report.to_owned()));
        }
        match call {
            Call::Start(job) if job.noise.seed == FAIL_IN_START => {
                return Err(PipelineError::Device("secret detail".to_owned()));
            }
            Call::Start(job) => *record.last_job.lock().unwrap() = Some(job.clone()),
            Call::Step(job) => {
                if let Pace::Slow = pace {
                    std::thread::sleep(Duration::from_millis(10));
                }
                assert!(job.noise.seed != PANIC_IN_STEP, "secret detail");
                record.steps.fetch_add(1, Ordering::SeqCst);
            }
            Call::Discard(_) => {
                record.discards.fetch_add(1, Ordering::SeqCst);
            }
            Call::Encode(_)
            | Call::LoadAdapters(_)
            | Call::Upload(_)
            | Call::Steps(_)
            | Call::Preview(_)
            | Call::Finish(_)
            | Call::Probe => {}
        }
        Ok(())
    })
}
