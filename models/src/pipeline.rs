//! The one interface between the typed world of tensors and everything else.
//!
//! Only plain data crosses it: token ids in, progress out, RGB bytes out, jobs by number. A server
//! change never recompiles a kernel, and an engine can be tested with any pipeline.

pub use kiln_ops::MemoryUse;

use crate::noise::NoiseGenerator;

/// The largest height or width of a preview, in pixels.
pub const MAX_PREVIEW_SIDE: usize = 256;

/// Names a job within one pipeline. The caller chooses it and does not reuse one that is alive.
pub type JobId = u64;

/// One request, fully resolved: nothing here is a default any more.
#[derive(Debug, Clone, PartialEq)]
pub struct Job {
    /// Token ids of the prompt inside the template.
    pub prompt: Vec<u32>,
    /// Token ids of the negative prompt inside the template. With one, and a
    /// [`Job::true_cfg_scale`] above 1, classifier-free guidance runs.
    pub negative_prompt: Option<Vec<u32>>,
    pub true_cfg_scale: f64,
    /// In pixels, a multiple of [`ImageSizes::multiple`].
    pub height: usize,
    /// In pixels, a multiple of [`ImageSizes::multiple`].
    pub width: usize,
    /// At least 1.
    pub num_inference_steps: usize,
    /// At least 1. All images of a job are one noise draw, as in diffusers with one generator.
    pub num_images: usize,
    pub seed: u64,
    pub noise_generator: NoiseGenerator,
    /// Keep what the run went through, for comparing runs: see [`Output::trace`].
    pub record: bool,
}

impl Job {
    /// Whether every step runs the transformer on the negative prompt too.
    pub fn uses_cfg(&self) -> bool {
        self.negative_prompt.is_some() && self.true_cfg_scale > 1.0
    }
}

/// An image of 8-bit RGB values, row by row from the top.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RgbImage {
    pub height: usize,
    pub width: usize,
    /// `height * width * 3` values.
    pub pixels: Vec<u8>,
}

impl RgbImage {
    /// From values of 0 to 1, as numpy and so diffusers round: halves to even.
    pub fn rounded(height: usize, width: usize, values: &[f32]) -> Self {
        let values = values.iter();
        Self {
            height,
            width,
            pixels: values
                .map(|value| (value * 255.0).round_ties_even() as u8)
                .collect(),
        }
    }
}

/// A finished job.
#[derive(Debug, Clone, PartialEq)]
pub struct Output {
    pub images: Vec<RgbImage>,
    /// Empty unless [`Job::record`] was set.
    pub trace: Vec<TraceTensor>,
}

/// One stage of a recorded run, in f32.
#[derive(Debug, Clone, PartialEq)]
pub struct TraceTensor {
    pub name: String,
    pub shape: Vec<usize>,
    pub values: Vec<f32>,
}

/// Heights and widths that a model draws, in pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ImageSizes {
    /// Heights and widths are multiples of this (16 for Qwen-Image).
    pub multiple: usize,
    /// Largest height or width that the position tables reach.
    pub max_side: usize,
    /// Height and width when a request names none.
    pub default_side: usize,
}

/// What callers must know of the loaded model to make jobs for it.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelInfo {
    pub sizes: ImageSizes,
    /// Ids below this are known to the text encoder.
    pub vocab_size: usize,
    /// The backend's name and device, for people.
    pub device: String,
    /// Type of the weights and of the timesteps' rounding: `f32`, `bf16` or `f16`.
    pub dtype: &'static str,
}

/// A cache that is bounded by the bytes of its entries.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CacheUse {
    pub entries: usize,
    /// Of all entries.
    pub bytes: usize,
    /// What [`CacheUse::bytes`] never exceeds.
    pub max_bytes: usize,
    pub hits: u64,
    pub misses: u64,
}

/// What a pipeline keeps because it may be asked for again. Pictures do not depend on it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CacheUses {
    /// Embeddings of prompts.
    pub embeddings: CacheUse,
    /// Modulation tables of schedules.
    pub modulation: CacheUse,
}

/// Why a job could not go on. The pipeline and its other jobs remain usable.
#[derive(Debug, thiserror::Error)]
pub enum PipelineError {
    #[error("there is no job {0}")]
    UnknownJob(JobId),
    #[error(
        "height and width must be multiples of {multiple} from {multiple} to {max}, \
         got {height}x{width} (height x width)"
    )]
    Size {
        height: usize,
        width: usize,
        multiple: usize,
        max: usize,
    },
    #[error("the prompt has no tokens left after the template's first {dropped}, it has {tokens}")]
    PromptTooShort { tokens: usize, dropped: usize },
    #[error("token id {id} is outside the text encoder's vocabulary of {vocab_size}")]
    TokenOutOfRange { id: u32, vocab_size: usize },
    #[error("num_inference_steps and num_images must be at least 1")]
    NothingToDo,
    #[error("job {0} has steps left")]
    Unfinished(JobId),
    #[error("job {0} has made no step that could be shown")]
    NothingToShow(JobId),
    #[error("the device failed: {0}")]
    Device(String),
}

/// Draws pictures, job by job and step by step, on one device.
///
/// Every call returns when the device is done with it, so what it takes can be timed.
/// A job is started, advanced until [`Pipeline::step`] reports no steps left, and finished; it can
/// be dropped at any point in between. Several jobs, of any sizes, may be advanced together.
/// A call that panics or fails loses at most the jobs it was given.
pub trait Pipeline: Send {
    fn info(&self) -> &ModelInfo;

    /// Encodes the prompts, draws the noise and makes the schedule.
    fn start(&mut self, id: JobId, job: Job) -> Result<(), PipelineError>;

    /// Advances every given job by one denoising step, in one forward pass of the transformer.
    /// Returns the steps left for each, in the same order.
    fn step(&mut self, ids: &[JobId]) -> Result<Vec<usize>, PipelineError>;

    /// What the first image of a job will probably look like, judged by its last step: a picture of
    /// at most [`MAX_PREVIEW_SIDE`] pixels a side, much cheaper than the real one. Changes nothing
    /// about the job.
    fn preview(&mut self, id: JobId) -> Result<RgbImage, PipelineError>;

    /// Decodes the images of a job that has no steps left, and forgets the job.
    fn finish(&mut self, id: JobId) -> Result<Output, PipelineError>;

    /// Forgets a job, whatever its state.
    fn discard(&mut self, id: JobId);

    /// Whether the device still computes, found out by a small sum: after an error it tells if
    /// another job is worth a try.
    fn probe(&mut self) -> Result<(), PipelineError> {
        Ok(())
    }

    /// What the device holds now, for this pipeline and all else that this program runs on it.
    fn memory(&self) -> MemoryUse;

    fn caches(&self) -> CacheUses;
}
