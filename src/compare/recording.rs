use std::slice::from_ref;

use kiln_models::pipeline::{Job, JobId, Pipeline, PipelineError, RgbImage, TraceTensor};
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
    let total = job.num_inference_steps;
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
    use kiln_models::noise::NoiseGenerator;
    use kiln_models::pipeline::{CacheUses, ImageSizes, MemoryUse, ModelInfo, Output};

    use super::*;

    /// Draws one grey pixel, and panics at a step if told to.
    struct Grey {
        info: ModelInfo,
        job: Option<Job>,
        steps_done: usize,
        panic_at: Option<usize>,
    }

    impl Pipeline for Grey {
        fn info(&self) -> &ModelInfo {
            &self.info
        }

        fn start(&mut self, _id: JobId, job: Job) -> Result<(), PipelineError> {
            self.job = Some(job);
            Ok(())
        }

        fn step(&mut self, _ids: &[JobId]) -> Result<Vec<usize>, PipelineError> {
            self.steps_done += 1;
            assert_ne!(Some(self.steps_done), self.panic_at, "out of grey");
            Ok(vec![0])
        }

        fn preview(&mut self, id: JobId) -> Result<RgbImage, PipelineError> {
            Err(PipelineError::NothingToShow(id))
        }

        fn finish(&mut self, _id: JobId) -> Result<Output, PipelineError> {
            let values = vec![0.5; 3];
            let picture = RgbImage::rounded(1, 1, &values);
            let stage = TraceTensor {
                name: "image_float".to_owned(),
                shape: vec![1, 1, 1, 3],
                values,
            };
            Ok(Output {
                images: vec![picture],
                trace: vec![stage],
            })
        }

        fn discard(&mut self, _id: JobId) {}

        fn memory(&self) -> MemoryUse {
            MemoryUse {
                in_use: Some(self.steps_done as u64),
                ..MemoryUse::default()
            }
        }

        fn caches(&self) -> CacheUses {
            CacheUses::default()
        }
    }

    fn grey(panic_at: Option<usize>) -> Grey {
        Grey {
            info: ModelInfo {
                sizes: ImageSizes {
                    multiple: 1,
                    max_side: 1,
                    default_side: 1,
                },
                vocab_size: 1,
                device: String::new(),
                dtype: "f32",
            },
            job: None,
            steps_done: 0,
            panic_at,
        }
    }

    /// Three steps, and how many of them were told of.
    fn run(pipeline: &mut Grey) -> (Result<(Recording, Costs), JobError>, Vec<usize>) {
        let job = Job {
            prompt: vec![0],
            negative_prompt: None,
            true_cfg_scale: 1.0,
            height: 1,
            width: 1,
            num_inference_steps: 3,
            num_images: 1,
            seed: 0,
            noise_generator: NoiseGenerator::Cpu,
            record: false,
        };
        let load = CostMeter::start().stop(MemoryUse::default());
        let mut told = Vec::new();
        let outcome = record("grey".to_owned(), pipeline, load, job, |done| {
            told.push(done);
        });
        (outcome, told)
    }

    #[test]
    fn every_stage_is_recorded_and_has_its_cost() {
        let mut pipeline = grey(None);
        let (outcome, told) = run(&mut pipeline);
        let (recording, costs) = outcome.unwrap();
        assert_eq!(told, [1, 2, 3]);
        assert!(pipeline.job.unwrap().record);
        assert_eq!(recording.picture.pixels, [128; 3]);
        assert_eq!(recording.stage("image_float").unwrap().values, [0.5; 3]);
        assert!(recording.stage("initial_noise").is_none());
        let in_use: Vec<_> = costs.steps.iter().map(|cost| cost.memory_in_use).collect();
        assert_eq!(in_use, [Some(1), Some(2), Some(3)]);
        let lengths = costs.phases().map(|(_, costs)| costs.len());
        assert_eq!(lengths, [1, 1, 1, 2, 1]);
    }

    #[test]
    fn a_panic_of_the_backend_is_an_error() {
        let (outcome, told) = run(&mut grey(Some(2)));
        assert_eq!(told, [1]);
        let error = outcome.unwrap_err().to_string();
        assert!(
            error.contains("panicked") && error.contains("out of grey"),
            "{error}"
        );
    }
}
