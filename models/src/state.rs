//! The state of one job between start and finish, and what a step does to it.

use std::sync::Arc;

use burn::tensor::Tensor;
use kiln_ops::FusedOps;

use crate::finite::{NotFinite, Stage, check, read, traced};
use crate::guidance::true_cfg;
use crate::job::{Job, JobId, TraceTensor};
use crate::pipeline::PipelineError;
use crate::sampling::{Schedule, euler_step};
use crate::step_cache::StepCounts;
use crate::transformer::{ModulationTable, Segment};

/// A job between start and finish.
#[derive(Debug)]
pub(crate) struct JobState<B: FusedOps> {
    pub(crate) job: Job,
    pub(crate) schedule: Schedule,
    pub(crate) modulation: Arc<ModulationTable<B>>,
    pub(crate) steps_done: usize,
    pub(crate) counts: StepCounts,
    /// `[images · tokens, channels]`, f32.
    pub(crate) latents: Tensor<B, 2>,
    /// What the last step predicted, in the shape of `latents`; `None` before the first step.
    pub(crate) velocity: Option<Tensor<B, 2>>,
    /// The conditional half, and with guidance the unconditional one.
    pub(crate) halves: Vec<Half<B>>,
    pub(crate) trace: Vec<TraceTensor>,
    /// Set for recorded jobs only: others end at once.
    pub(crate) not_finite: Option<NotFinite>,
}

/// The text of one half, for every image of the job.
#[derive(Debug)]
pub(crate) struct Half<B: FusedOps> {
    /// `[images · text tokens, dim]`.
    pub(crate) text: Tensor<B, 2>,
    /// One sequence for each image, with row 0.
    pub(crate) segments: Vec<Segment>,
}

/// What a step computed for one job, not yet stored.
#[derive(Debug)]
pub(crate) struct Advance<B: FusedOps> {
    pub(crate) id: JobId,
    pub(crate) latents: Tensor<B, 2>,
    pub(crate) velocity: Tensor<B, 2>,
    pub(crate) trace: Option<TraceTensor>,
    pub(crate) not_finite: Option<NotFinite>,
}

impl<B: FusedOps> JobState<B> {
    pub(crate) fn steps_left(&self) -> usize {
        self.schedule.steps() - self.steps_done
    }

    /// Applies guidance and the Euler step to the velocities of the job's halves. `dtype` is the
    /// name of the model's type.
    pub(crate) fn advance(
        &self,
        id: JobId,
        halves: Vec<Tensor<B, 2>>,
        dtype: &'static str,
    ) -> Result<Advance<B>, PipelineError> {
        let mut halves = halves.into_iter();
        let positive = halves.next();
        let positive = positive.expect("every job has a conditional half");
        let velocity = match (&self.job.guidance, halves.next()) {
            (Some(guidance), Some(negative)) => true_cfg(positive, negative, guidance.scale),
            _ => positive,
        };
        let step = self.steps_done;
        let latents = euler_step(&self.schedule, step, self.latents.clone(), velocity.clone());
        let values = read(latents.clone())?;
        let stage = Stage::Step {
            step: step + 1,
            steps: self.schedule.steps(),
        };
        let not_finite = check(&values, stage, dtype, &self.job)?;
        let [rows, channels] = latents.dims();
        let images = self.job.num_images;
        let shape = vec![images, rows / images, channels];
        Ok(Advance {
            id,
            latents,
            velocity,
            trace: (self.job.record).then(|| traced(&format!("latents_step{step}"), shape, values)),
            not_finite,
        })
    }

    pub(crate) fn commit(&mut self, advance: Advance<B>) {
        self.latents = advance.latents;
        self.velocity = Some(advance.velocity);
        self.steps_done += 1;
        self.counts.computed += 1;
        self.trace.extend(advance.trace);
        self.not_finite = self.not_finite.or(advance.not_finite);
    }
}
