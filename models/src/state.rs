//! The state of one job between start and finish, and what a step does to it.

use std::sync::Arc;

use burn::tensor::Tensor;
use kiln_ops::FusedOps;

use crate::adapter::Totals;
use crate::denoiser::{Half, JobStep, Lanes, Placed, Prediction, Prepared};
use crate::finite::{NotFinite, Stage, check, read, traced};
use crate::guidance::true_cfg;
use crate::job::{Job, JobId, TraceTensor};
use crate::pipeline::PipelineError;
use crate::sampling::{Schedule, sampler_step};
use crate::step_cache::{StepCache, StepCounts};

/// A job between start and finish.
#[derive(Debug)]
pub(crate) struct JobState<B: FusedOps> {
    pub(crate) job: Job,
    pub(crate) schedule: Arc<Schedule>,
    pub(crate) lanes: Lanes<B>,
    pub(crate) steps_done: usize,
    pub(crate) counts: StepCounts,
    /// `[images · tokens, channels]`, f32.
    pub(crate) latents: Tensor<B, 2>,
    /// The velocity from the clean image that the last step predicted to `latents`, in their shape; `None`
    /// before the first step.
    pub(crate) velocity: Option<Tensor<B, 2>>,
    /// The conditional half, and with guidance the unconditional one.
    pub(crate) halves: Vec<Half<B>>,
    /// Which of the steps run the transformer's blocks.
    pub(crate) cache: StepCache,
    /// Index of the first step that guidance does not run the unconditional half for.
    pub(crate) gate: usize,
    /// The conditional velocity less the unconditional one, in the last step that ran both; kept for
    /// gated steps only.
    pub(crate) difference: Option<Tensor<B, 2>>,
    pub(crate) trace: Vec<TraceTensor>,
    /// Set for recorded jobs only: others end at once.
    pub(crate) not_finite: Option<NotFinite>,
}

/// What a step computed for one job, not yet stored.
#[derive(Debug)]
pub(crate) struct Advance<B: FusedOps> {
    pub(crate) id: JobId,
    latents: Tensor<B, 2>,
    velocity: Tensor<B, 2>,
    difference: Option<Tensor<B, 2>>,
    /// What the halves that ran have to reuse now.
    kept: Vec<Option<Placed<B>>>,
    lanes: Vec<(usize, Prepared<B>)>,
    reused: bool,
    is_gated: bool,
    /// The transformer's work as a part of a full step's.
    pub(crate) work: f64,
    trace: Vec<TraceTensor>,
    not_finite: Option<NotFinite>,
}

impl<B: FusedOps> JobState<B> {
    pub(crate) fn steps_left(&self) -> usize {
        self.schedule.steps() - self.steps_done
    }

    /// Whether the next step leaves out the unconditional half.
    fn is_gated(&self) -> bool {
        self.difference.is_some() && self.steps_done >= self.gate
    }

    /// The next step.
    pub(crate) fn step(&self) -> JobStep<'_, B> {
        let running = if self.is_gated() {
            &self.halves[..1]
        } else {
            &self.halves[..]
        };
        JobStep {
            schedule: &self.schedule,
            step: self.steps_done,
            adapters: &self.job.adapters,
            lanes: &self.lanes,
            latents: &self.latents,
            adapter_work: Totals::of_job(&self.job.adapters).work,
            halves: running,
            next: self.cache.next(),
            order: self.cache.order(),
            measure: self.cache.measures(),
        }
    }

    /// Applies guidance and the sampler's step to what was predicted for the job's halves. `dtype` is the
    /// name of the model's type.
    pub(crate) fn advance(
        &self,
        id: JobId,
        prediction: Prediction<B>,
        dtype: &'static str,
    ) -> Result<Advance<B>, PipelineError> {
        let Prediction { lanes, halves } = prediction;
        let work = halves.iter().map(|half| half.work).sum::<f64>();
        let reused = halves.first().is_some_and(|half| half.reused);
        let step = self.steps_done;
        let steps = self.schedule.steps();
        let ratios: Vec<f32> = halves.iter().filter_map(|half| half.ratio).collect();
        let (velocities, kept): (Vec<_>, Vec<_>) = halves
            .into_iter()
            .map(|half| (half.velocity, half.kept))
            .unzip();
        let mut velocities = velocities.into_iter();
        let positive = velocities.next();
        let positive = positive.expect("every job has a conditional half");
        let negative = velocities.next().or_else(|| {
            let difference = self.difference.clone().filter(|_| self.is_gated())?;
            Some(positive.clone() - difference)
        });
        let difference = negative
            .as_ref()
            .filter(|_| !self.is_gated() && self.gate < steps)
            .map(|negative| positive.clone() - negative.clone());
        let velocity = match (&self.job.guidance, negative) {
            (Some(guidance), Some(negative)) => true_cfg(positive, negative, guidance.scale),
            _ => positive,
        };
        let latents = self.latents.clone();
        let (latents, velocity) =
            sampler_step(&self.schedule, self.job.noise, step, latents, velocity);
        let values = read(latents.clone())?;
        let stage = Stage::Step {
            step: step + 1,
            steps,
        };
        let not_finite = check(&values, stage, dtype, &self.job)?;
        let mut trace = Vec::new();
        if self.job.record {
            let [rows, channels] = latents.dims();
            let images = self.job.num_images;
            let shape = vec![images, rows / images, channels];
            trace.push(traced(&format!("latents_step{step}"), shape, values));
            if !ratios.is_empty() {
                let shape = vec![ratios.len()];
                trace.push(traced(&format!("residual_ratio_step{step}"), shape, ratios));
            }
        }
        Ok(Advance {
            id,
            latents,
            velocity,
            difference,
            kept,
            lanes,
            reused,
            is_gated: self.is_gated(),
            work: work / self.halves.len() as f64,
            trace,
            not_finite,
        })
    }

    pub(crate) fn commit(&mut self, advance: Advance<B>) {
        self.latents = advance.latents;
        self.velocity = Some(advance.velocity);
        self.steps_done += 1;
        self.cache.book(advance.reused);
        if advance.reused {
            self.counts.skipped += 1;
        } else {
            self.counts.computed += 1;
        }
        self.counts.gated += usize::from(advance.is_gated);
        if advance.difference.is_some() {
            self.difference = advance.difference;
        }
        let mut kept = advance.kept.into_iter();
        for half in &mut self.halves {
            // A gated half does not run again.
            half.kept = kept.next().flatten();
        }
        for (lane, prepared) in advance.lanes {
            if let Some(kept) = self.lanes.get_mut(lane) {
                *kept = Some(prepared);
            }
        }
        self.trace.extend(advance.trace);
        self.not_finite = self.not_finite.or(advance.not_finite);
    }
}
