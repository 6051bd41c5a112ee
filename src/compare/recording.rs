use std::slice::from_ref;

use kiln_models::job::{Job, JobId, RgbImage, TraceTensor};
use kiln_models::pipeline::{Pipeline, PipelineError};
use serde::Serialize;

use crate::engine::{JobError, caught};

use super::cost::{Cost, CostMeter};

/// Everything one run of one request went through.
#[derive(Debug, Clone)]
pub struct Recording {
    /// The backend, or the file.
    pub name: String,
    /// In the order in which they were computed.
    pub trace: Vec<TraceTensor>,
    pub picture: RgbImage,
}

/// What the stages of a run cost.
#[derive(Debug, Clone, Serialize)]
pub struct Costs {
    /// Weights onto the device.
    pub load: Cost,
    /// Prompts, noise and schedule.
    pub start: Cost,
    /// Denoising; the first step may compile and tune kernels.
    pub steps: Vec<Cost>,
    /// The VAE, and rounding to 8 bits.
    pub finish: Cost,
}

impl Costs {
    /// Named parts of the run, in order. There are no later steps after a single one.
    pub(super) fn phases(&self) -> [(&'static str, &[Cost]); 5] {
        let (first, later) = self.steps.split_at(self.steps.len().min(1));
        [
            ("load", from_ref(&self.load)),
            ("prompts, noise, schedule", from_ref(&self.start)),
            ("first step", first),
            ("later steps", later),
            ("VAE and picture", from_ref(&self.finish)),
        ]
    }
}

impl Recording {
    pub(super) fn stage(&self, name: &str) -> Option<&TraceTensor> {
        self.trace.iter().find(|stage| stage.name == name)
    }
}

/// Runs a job of one image and records it; `on_step` hears how many steps are done.
///
/// Recording reads every stage back from the device, so each stage's time is its own.
pub fn record(
    name: String,
    pipeline: &mut dyn Pipeline,
    load: Cost,
    job: Job,
    mut on_step: impl FnMut(usize),
) -> Result<(Recording, Costs), JobError> {
    const ID: JobId = 0;
    let total = job.sampling.steps;
    let job = Job {
        record: true,
        ..job
    };
    let ((), start) = measured(pipeline, |pipeline| pipeline.start(ID, job))?;
    let mut steps = Vec::with_capacity(total);
    for done in 1..=total {
        let (_, cost) = measured(pipeline, |pipeline| pipeline.step(&[ID]))?;
        steps.push(cost);
        on_step(done);
    }
    let (mut output, finish) = measured(pipeline, |pipeline| pipeline.finish(ID))?;
    let recording = Recording {
        name,
        trace: output.trace,
        picture: output.images.swap_remove(0),
    };
    let costs = Costs {
        load,
        start,
        steps,
        finish,
    };
    Ok((recording, costs))
}

/// A call of a pipeline, and what it cost.
pub(crate) fn measured<T>(
    pipeline: &mut dyn Pipeline,
    stage: impl FnOnce(&mut dyn Pipeline) -> Result<T, PipelineError>,
) -> Result<(T, Cost), JobError> {
    let meter = CostMeter::start();
    let outcome = caught(|| stage(pipeline))?;
    Ok((outcome, meter.stop(pipeline.memory())))
}

#[cfg(test)]
mod tests {
    use kiln_models::pipeline::{MemoryUse, PipelineError};
    use kiln_models::testing::{Call, FakePipeline, job, model_info};

    use super::*;

    /// Three steps of a pipeline that panics in the step of this number; and the numbers of the
    /// steps that were reported.
    fn run(panic_at: Option<usize>) -> (Result<(Recording, Costs), JobError>, Vec<usize>) {
        let mut steps = 0;
        let on_call = move |call: Call<'_>| -> Result<(), PipelineError> {
            if let Call::Step(_) = call {
                steps += 1;
                assert_ne!(Some(steps), panic_at, "out of grey");
            }
            Ok(())
        };
        let mut pipeline = FakePipeline::new(model_info()).on_call(on_call);
        let load = CostMeter::start().stop(MemoryUse::default());
        let mut reported = Vec::new();
        let outcome = record("grey".to_owned(), &mut pipeline, load, job(16, 3), |done| {
            reported.push(done);
        });
        (outcome, reported)
    }

    #[test]
    fn every_stage_is_recorded_and_has_its_cost() {
        let (outcome, reported) = run(None);
        let (recording, costs) = outcome.unwrap();
        assert_eq!(reported, [1, 2, 3]);
        assert_eq!(recording.picture.pixels, [0; 16 * 16 * 3]);
        assert_eq!(recording.stage("image_float").unwrap().values, [0.5; 3]);
        assert!(recording.stage("initial_noise").is_none());
        let in_use: Vec<_> = costs.steps.iter().map(|cost| cost.memory_in_use).collect();
        assert_eq!(in_use, [Some(1), Some(1), Some(1)]);
        let lengths = costs.phases().map(|(_, costs)| costs.len());
        assert_eq!(lengths, [1, 1, 1, 2, 1]);
    }

    #[test]
    fn a_panic_of_the_backend_is_an_error() {
        let (outcome, reported) = run(Some(2));
        assert_eq!(reported, [1]);
        let error = outcome.unwrap_err().to_string();
        assert!(
            error.contains("panicked") && error.contains("out of grey"),
            "{error}"
        );
    }
}
