//! Records the stages of a run, and measures what they cost.

use std::slice::from_ref;

use kiln_models::job::{Job, JobId, RgbImage, TraceTensor};
use kiln_models::pipeline::Pipeline;
use serde::Serialize;

use crate::engine::JobError;
use crate::measure::{Cost, measure_call};

/// The values of every stage of one run.
#[derive(Debug, Clone)]
pub struct Recording {
    /// Name of the backend or of the dump file.
    pub name: String,
    /// The stages before the 8-bit image, in the order of computation.
    pub trace: Vec<TraceTensor>,
    pub image: RgbImage,
}

/// Time and memory of each stage of a run.
#[derive(Debug, Clone, Serialize)]
pub struct StageCosts {
    /// Loading the weights onto the device.
    pub load: Cost,
    /// Text encoder, noise and schedule.
    pub start: Cost,
    /// Denoising steps. The first may compile and tune kernels.
    pub steps: Vec<Cost>,
    /// VAE decoding and rounding to 8 bits.
    pub finish: Cost,
}

impl StageCosts {
    /// The phases of the run in order, each with its name and costs. "later steps" is empty if the
    /// run has one step.
    pub(super) fn phases(&self) -> [(&'static str, &[Cost]); 5] {
        let (first, later) = self.steps.split_at(self.steps.len().min(1));
        [
            ("load", from_ref(&self.load)),
            ("prompts, noise, schedule", from_ref(&self.start)),
            ("first step", first),
            ("later steps", later),
            ("VAE and image", from_ref(&self.finish)),
        ]
    }
}

impl Recording {
    pub(super) fn stage(&self, name: &str) -> Option<&TraceTensor> {
        self.trace.iter().find(|stage| stage.name == name)
    }
}

/// Runs a job of one image and records its stages. Calls `on_step` with the number of finished
/// steps after each step.
///
/// Recording reads every stage back from the device, so queued work of one stage does not count
/// towards the next.
pub fn record(
    name: String,
    pipeline: &mut dyn Pipeline,
    load: Cost,
    job: Job,
    mut on_step: impl FnMut(usize),
) -> Result<(Recording, StageCosts), JobError> {
    const ID: JobId = 0;
    let total = job.sampling.steps;
    let job = Job {
        record: true,
        ..job
    };
    let ((), start) = measure_call(pipeline, |pipeline| pipeline.start(ID, job))?;
    let mut steps = Vec::with_capacity(total);
    for done in 1..=total {
        let (_, cost) = measure_call(pipeline, |pipeline| pipeline.step(&[ID]))?;
        steps.push(cost);
        on_step(done);
    }
    let (mut output, finish) = measure_call(pipeline, |pipeline| pipeline.finish(ID))?;
    let recording = Recording {
        name,
        trace: output.trace,
        image: output.images.swap_remove(0),
    };
    let costs = StageCosts {
        load,
        start,
        steps,
        finish,
    };
    Ok((recording, costs))
}

#[cfg(test)]
mod tests {
    use kiln_models::pipeline::{MemoryUse, PipelineError};
    use kiln_models::testing::{Call, FakePipeline, job, model_info};

    use crate::measure::CostMeter;

    use super::*;

    /// Records three steps of a pipeline that panics in step `panic_at`. Returns the outcome and
    /// the values that `on_step` was called with.
    fn run(panic_at: Option<usize>) -> (Result<(Recording, StageCosts), JobError>, Vec<usize>) {
        let mut steps = 0;
        let on_call = move |call: Call<'_>| -> Result<(), PipelineError> {
            if let Call::Step(_) = call {
                steps += 1;
                assert_ne!(Some(steps), panic_at, "planted panic");
            }
            Ok(())
        };
        let mut pipeline = FakePipeline::new(model_info()).on_call(on_call);
        let load = CostMeter::start().stop(MemoryUse::default());
        let mut reported = Vec::new();
        let outcome = record("fake".to_owned(), &mut pipeline, load, job(16, 3), |done| {
            reported.push(done);
        });
        (outcome, reported)
    }

    #[test]
    fn recording_holds_every_stage_and_its_cost() {
        let (outcome, reported) = run(None);
        let (recording, costs) = outcome.unwrap();
        assert_eq!(reported, [1, 2, 3]);
        assert_eq!(recording.image.pixels, [0; 16 * 16 * 3]);
        assert_eq!(recording.stage("image_float").unwrap().values, [0.5; 3]);
        assert!(recording.stage("initial_noise").is_none());
        let in_use: Vec<_> = costs.steps.iter().map(|cost| cost.memory_in_use).collect();
        assert_eq!(in_use, [Some(1), Some(1), Some(1)]);
        let lengths = costs.phases().map(|(_, costs)| costs.len());
        assert_eq!(lengths, [1, 1, 1, 2, 1]);
    }

    #[test]
    fn a_panic_of_the_pipeline_is_an_error() {
        let (outcome, reported) = run(Some(2));
        assert_eq!(reported, [1]);
        let error = outcome.unwrap_err().to_string();
        assert!(
            error.contains("panicked") && error.contains("planted panic"),
            "{error}"
        );
    }
}
