//! What a job's step gives to the denoiser, and what the denoiser predicts.

use std::sync::{Arc, OnceLock};

use burn::tensor::{Tensor, TensorData};
use kiln_ops::FusedOps;

use super::kept::Kept;
use crate::adapter::{AdapterUse, TokenWork};
use crate::finite::read_data;
use crate::pipeline::PipelineError;
use crate::sampling::Schedule;
use crate::step_cache::Next;
use crate::transformer::{AppliedAdapter, ModulationTable, Segment};

/// One half of a job: the conditional or the unconditional one, for every image of the job.
#[derive(Debug)]
pub(crate) struct Half<B: FusedOps> {
    /// `[images · text tokens, dim]`, on the first device.
    pub(super) text: Tensor<B, 2>,
    /// The values of `text`, once another device needs them.
    text_values: OnceLock<TensorData>,
    /// One sequence for each image, with row 0.
    pub(super) segments: Vec<Segment>,
    /// What the last computed step left.
    pub(crate) kept: Option<Placed<B>>,
}

/// What a half has kept on a lane.
#[derive(Debug)]
pub(crate) struct Placed<B: FusedOps> {
    pub(super) lane: usize,
    pub(super) kept: Kept<Tensor<B, 2>>,
}

impl<B: FusedOps> Half<B> {
    pub(crate) fn new(text: Tensor<B, 2>, segments: Vec<Segment>) -> Self {
        Self {
            text,
            text_values: OnceLock::new(),
            segments,
            kept: None,
        }
    }

    /// The values of the text, for another device.
    ///
    /// # Errors
    /// If the first device fails.
    pub(super) fn text_values(&self) -> Result<TensorData, PipelineError> {
        if let Some(values) = self.text_values.get() {
            return Ok(values.clone());
        }
        let values = read_data(self.text.clone())?;
        Ok(self.text_values.get_or_init(|| values).clone())
    }
}

/// What a lane has for a job from its start to its end.
#[derive(Debug, Clone)]
pub(crate) struct Prepared<B: FusedOps> {
    /// The modulation of the job's schedule and adapters.
    pub(super) table: Arc<ModulationTable<B>>,
    pub(super) adapters: Vec<AppliedAdapter<B>>,
}

/// What each lane has for one job; `None` for a lane that failed to prepare it.
pub(crate) type Lanes<B> = Vec<Option<Prepared<B>>>;

/// One step of one job.
#[derive(Debug)]
pub(crate) struct JobStep<'a, B: FusedOps> {
    pub(crate) schedule: &'a Arc<Schedule>,
    /// Index of the step in the schedule.
    pub(crate) step: usize,
    pub(crate) adapters: &'a [AdapterUse],
    pub(crate) lanes: &'a Lanes<B>,
    /// `[images · tokens, channels]`, f32, on the first device.
    pub(crate) latents: &'a Tensor<B, 2>,
    /// What the job's adapters add to the work of each token.
    pub(crate) adapter_work: TokenWork,
    /// The halves that run. The first one decides for both.
    pub(crate) halves: &'a [Half<B>],
    pub(crate) next: Next,
    /// Order of the Taylor series that residuals are continued by, 0 or 1.
    pub(crate) order: usize,
    /// Whether the change of the residuals since the last step is measured.
    pub(crate) measure: bool,
}

/// What a step predicts for one job.
#[derive(Debug)]
pub(crate) struct Prediction<B: FusedOps> {
    /// What the lanes that the step ran on have for the job.
    pub(crate) lanes: Vec<(usize, Prepared<B>)>,
    /// In the order of the job's halves.
    pub(crate) halves: Vec<HalfPrediction<B>>,
}

#[derive(Debug)]
pub(crate) struct HalfPrediction<B: FusedOps> {
    /// `[images · tokens, channels]`, f32, on the first device.
    pub(crate) velocity: Tensor<B, 2>,
    /// What the half has to reuse now.
    pub(crate) kept: Option<Placed<B>>,
    pub(crate) reused: bool,
    /// The blocks that ran, as a part of all.
    pub(crate) work: f64,
    /// The ratio of the residual's length to that in the step before, if it was to be measured.
    pub(crate) ratio: Option<f32>,
}
