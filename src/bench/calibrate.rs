//! Measures the magnitude ratios that the masks of step caches are made from.

use std::sync::Arc;

use kiln_models::job::{Job, JobId, Output};
use kiln_models::pipeline::{Pipeline, PipelineError};
use kiln_models::step_cache::{CachePolicy, MagCache};
use serde::Serialize;

use crate::engine::{JobError, caught};

/// The prompts that are calibrated with if none are given.
pub const CALIBRATION_PROMPTS: [&str; 4] = [
    "a red fox in the snow, watercolor",
    "a photo of a busy street market at night, neon signs, rain on the pavement",
    "portrait of an old fisherman, studio light, sharp focus",
    "a poster with the words \"GRAND OPENING\" above a small bakery",
];

/// Magnitude ratios of a checkpoint, as `--cache-config` takes them.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct CacheRatios {
    /// For each step the mean of `‖R_i‖ / ‖R_{i-1}‖` over the image tokens, the halves and the prompts,
    /// rounded to 5 decimals; `R_i` is the change that the transformer's blocks made to a token. The
    /// first is 1.
    pub mag_ratios: Vec<f64>,
}

/// Why no ratios can be measured.
#[derive(Debug, thiserror::Error)]
pub enum CalibrationError {
    #[error(transparent)]
    Job(#[from] JobError),
    #[error("the pipeline measured no residual in step {step}, so there is no ratio of it")]
    NoRatio { step: usize },
    /// A step in which the blocks changed no token.
    #[error("the ratio of step {step} is {ratio}, which is no number above 0")]
    NoNumber { step: usize, ratio: f64 },
}

impl CacheRatios {
    /// Runs these jobs of the same number of steps one after the other, with all steps computed. Calls
    /// `on_step` with the number of the job and of its finished steps after each step.
    ///
    /// # Errors
    ///
    /// If a job fails, or the pipeline gives no ratio of a step.
    pub fn measure(
        pipeline: &mut dyn Pipeline,
        jobs: impl IntoIterator<Item = Job>,
        mut on_step: impl FnMut(usize, usize),
    ) -> Result<Self, CalibrationError> {
        let mut ratios: Vec<Vec<f64>> = Vec::new();
        for (number, job) in jobs.into_iter().enumerate() {
            let steps = job.sampling.steps;
            ratios.resize_with(steps, Vec::new);
            let output = run(pipeline, job, |step| on_step(number, step))?;
            for (step, ratios) in ratios.iter_mut().enumerate().skip(1) {
                let name = format!("residual_ratio_step{step}");
                let measured = output.trace.iter().find(|stage| stage.name == name);
                let measured = measured.ok_or(CalibrationError::NoRatio { step })?;
                ratios.extend(measured.values.iter().map(|&ratio| f64::from(ratio)));
            }
        }
        let mean = |(step, ratios): (usize, &Vec<f64>)| {
            if step == 0 {
                return Ok(1.0);
            }
            let ratio = ratios.iter().sum::<f64>() / ratios.len() as f64;
            if ratio.is_finite() && ratio > 0.0 {
                Ok((ratio * 1e5).round() / 1e5)
            } else {
                Err(CalibrationError::NoNumber { step, ratio })
            }
        };
        Ok(Self {
            mag_ratios: ratios
                .iter()
                .enumerate()
                .map(mean)
                .collect::<Result<_, _>>()?,
        })
    }

    /// The names of the caches that the ratios are for, and the steps that each computes.
    pub fn masks(&self) -> [(&'static str, Arc<[bool]>); 2] {
        let steps = self.mag_ratios.len();
        let ratios = || Some(self.mag_ratios[..].into());
        [
            ("balanced", MagCache::balanced(ratios()).mask(steps)),
            ("fast", MagCache::fast(ratios()).mask(steps)),
        ]
    }
}

/// Runs a job with its ratios measured.
fn run(
    pipeline: &mut dyn Pipeline,
    job: Job,
    mut on_step: impl FnMut(usize),
) -> Result<Output, JobError> {
    const ID: JobId = 0;
    let steps = job.sampling.steps;
    let job = Job {
        cache: CachePolicy::Calibrate,
        record: true,
        ..job
    };
    caught(|| pipeline.start(ID, job))?;
    for step in 1..=steps {
        caught(|| pipeline.step(&[ID]))?;
        on_step(step);
    }
    let output = caught(|| pipeline.finish(ID))?;
    match output.not_finite {
        Some(stage) => Err(JobError::Pipeline(Arc::new(PipelineError::NotFinite(
            stage,
        )))),
        None => Ok(output),
    }
}

#[cfg(test)]
mod tests {
    use kiln_models::job::TraceTensor;
    use kiln_models::step_cache::QWEN_IMAGE_RATIOS;
    use kiln_models::testing::{Call, FakePipeline, job, model_info};

    use super::*;

    /// A pipeline whose halves have these ratios of a step.
    fn pipeline(ratios: impl Fn(&Job, usize) -> Vec<f32> + Send + 'static) -> FakePipeline {
        let trace = move |job: &Job| {
            let stage = |step| TraceTensor {
                name: format!("residual_ratio_step{step}"),
                shape: vec![2],
                values: ratios(job, step),
            };
            (1..job.sampling.steps).map(stage).collect()
        };
        let all_measured = |call: Call<'_>| {
            if let Call::Start(job) = call {
                assert!(job.record);
                assert_eq!(job.cache, CachePolicy::Calibrate);
            }
            Ok(())
        };
        FakePipeline::new(model_info())
            .on_call(all_measured)
            .with_trace(trace)
    }

    fn seeds(count: u64, steps: usize) -> Vec<Job> {
        let jobs = (0..count).map(|seed| {
            let mut job = job(16, steps);
            job.noise.seed = seed;
            job
        });
        jobs.collect()
    }

    #[test]
    fn ratios_are_the_means_over_prompts_and_halves() {
        let mut fake = pipeline(|job, step| {
            let base = 1.0 + step as f32 / 8.0;
            let seed = job.noise.seed as f32;
            vec![base + seed / 4.0, base - seed / 8.0]
        });
        let mut steps = Vec::new();
        let on_step = |job, step| steps.push((job, step));
        let ratios = CacheRatios::measure(&mut fake, seeds(2, 4), on_step).unwrap();
        let moved = 1.0 / 32.0;
        let expected = [1.0, 1.125 + moved, 1.25 + moved, 1.375 + moved];
        let rounded = expected.map(|ratio: f64| (ratio * 1e5).round() / 1e5);
        assert_eq!(ratios.mag_ratios[1..], rounded[1..]);
        assert_eq!(ratios.mag_ratios[0].to_bits(), 1.0_f64.to_bits());
        assert_eq!(steps[..5], [(0, 1), (0, 2), (0, 3), (0, 4), (1, 1)]);
        assert_eq!(steps.len(), 8);
    }

    #[test]
    fn the_masks_are_those_of_the_measured_ratios() {
        let mut fake = pipeline(|_, step| vec![QWEN_IMAGE_RATIOS[step] as f32; 2]);
        let ratios = CacheRatios::measure(&mut fake, seeds(1, 50), |_, _| {}).unwrap();
        assert_eq!(ratios.mag_ratios, QWEN_IMAGE_RATIOS);
        let computed = ratios
            .masks()
            .map(|(name, mask)| (name, mask.iter().filter(|&&it| it).count()));
        assert_eq!(computed, [("balanced", 30), ("fast", 24)]);
        let json = serde_json::to_string(&ratios).unwrap();
        assert!(
            json.starts_with(r#"{"mag_ratios":[1.0,1.64062,1.45312,"#),
            "{json}"
        );
    }

    #[test]
    fn a_pipeline_without_ratios_is_an_error() {
        let mut without = FakePipeline::new(model_info());
        let error = CacheRatios::measure(&mut without, seeds(1, 8), |_, _| {}).unwrap_err();
        assert_eq!(
            error.to_string(),
            "the pipeline measured no residual in step 1, so there is no ratio of it"
        );
        let mut infinite = pipeline(|_, step| vec![if step == 3 { f32::NAN } else { 1.0 }]);
        let error = CacheRatios::measure(&mut infinite, seeds(1, 8), |_, _| {}).unwrap_err();
        assert_eq!(
            error.to_string(),
            "the ratio of step 3 is NaN, which is no number above 0"
        );
    }
}
