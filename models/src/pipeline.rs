//! The one interface between the typed world of tensors and everything else.
//!
//! Only plain data crosses it: a [`Job`] in, progress and RGB bytes out, jobs by number. A server
//! change never recompiles a kernel, and an engine can be tested with any pipeline.

pub use kiln_ops::{MemoryRoom, MemoryUse};

use crate::adapter::AdapterUse;
use crate::finite::NotFinite;
use crate::flops::CostModel;
use crate::job::{Conditioning, Decoding, Job, JobId, Output, RgbImage, Size};
use crate::memory::MemoryModel;
use crate::source::FileFault;
use crate::step_cache::StepCounts;

/// Largest height or width of a preview, in pixels.
pub const MAX_PREVIEW_SIDE: usize = 256;

/// Heights and widths that a model generates, in pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ImageSizes {
    /// Heights and widths are multiples of this (16 for Qwen-Image).
    pub multiple: usize,
    /// Largest height or width that the position tables reach.
    pub max_side: usize,
    /// Height and width when a request names none.
    pub default_side: usize,
}

impl ImageSizes {
    /// Whether the model generates images of this size.
    pub fn contain(&self, size: Size) -> bool {
        let sides = self.multiple..=self.max_side;
        [size.height, size.width]
            .iter()
            .all(|side| side.is_multiple_of(self.multiple) && sides.contains(side))
    }
}

/// What callers must know of the loaded model to make jobs for it.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelInfo {
    pub sizes: ImageSizes,
    /// The text encoder knows the token ids below this.
    pub vocab_size: usize,
    /// Name of the backend: `cuda`, `wgpu`, `flex` or `ndarray`.
    pub backend: &'static str,
    /// The devices that the steps are spread over, at least one. The first also has the text encoder
    /// and the VAE. A device that computes two streams of work is in the list twice.
    pub devices: Vec<ModelDevice>,
    /// Type of the weights and of the timesteps' rounding: `f32`, `bf16` or `f16`.
    pub dtype: &'static str,
}

/// A device that a model is loaded onto.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelDevice {
    /// Number of the device among the backend's devices.
    pub index: usize,
    /// Name of the device as its driver or operating system gives it.
    pub name: String,
}

impl ModelDevice {
    /// The device as messages show it: `cuda:0 (NVIDIA H200)`.
    pub fn label(&self, backend: &str) -> String {
        format!("{backend}:{} ({})", self.index, self.name)
    }
}

impl ModelInfo {
    /// Backend, number and name of every device, as messages show them: `cuda:0 (NVIDIA H200)`, or
    /// `cuda:0 (NVIDIA H200), cuda:1 (NVIDIA H200)`.
    pub fn device(&self) -> String {
        let labels = self.devices.iter().map(|it| it.label(self.backend));
        labels.collect::<Vec<_>>().join(", ")
    }

    /// Number of devices that the steps are spread over, at least 1.
    pub fn device_count(&self) -> usize {
        self.devices.len().max(1)
    }

    /// Bytes of a weight in [`ModelInfo::dtype`].
    pub fn weight_size(&self) -> usize {
        match self.dtype {
            "bf16" | "f16" => 2,
            _ => 4,
        }
    }
}

/// Use of a device since the model was loaded.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct DeviceUse {
    /// Backend and number of the device: `cuda:0`. A device that is used twice may have two entries.
    pub device: String,
    pub memory: MemoryUse,
    /// Time in which the device computed steps, in seconds.
    pub busy_seconds: f64,
    /// Number of forward passes of the transformer.
    pub forwards: u64,
}

/// Use of a cache that is bounded by the bytes of its entries.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CacheUse {
    pub entries: usize,
    /// Bytes of all entries.
    pub bytes: usize,
    /// Upper bound of [`CacheUse::bytes`].
    pub max_bytes: usize,
    pub hits: u64,
    pub misses: u64,
    /// Entries that were dropped to make room for others.
    pub evictions: u64,
}

/// Use of a pipeline's caches. Images do not depend on what the caches hold.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CacheUses {
    /// Embeddings of prompts.
    pub embeddings: CacheUse,
    /// Modulation tables of schedules.
    pub modulation: CacheUse,
    /// Rotary position tables of the transformer's packed sequences.
    pub positions: CacheUse,
    /// Adapters on the device, of several devices on the one that holds the most bytes.
    pub adapters: CacheUse,
}

/// Why a job could not go on. The pipeline and its other jobs remain usable.
#[derive(Debug, thiserror::Error)]
pub enum PipelineError {
    #[error("there is no job {0}")]
    UnknownJob(JobId),
    #[error(
        "height and width must be multiples of {multiple} from {multiple} to {max}, \
         got {}x{} (height x width)", size.height, size.width
    )]
    Size {
        size: Size,
        multiple: usize,
        max: usize,
    },
    #[error("the prompt has no tokens left after the template's first {dropped}, it has {tokens}")]
    PromptTooShort { tokens: usize, dropped: usize },
    #[error("token id {id} is outside the text encoder's vocabulary of {vocab_size}")]
    TokenOutOfRange { id: u32, vocab_size: usize },
    #[error(
        "the adapter {adapter} does not fit the model: it changes {module} by a matrix of shape {shape:?} \
         (out, in), {}", layer_shape(.expected.as_ref())
    )]
    Adapter {
        adapter: String,
        module: String,
        shape: [usize; 2],
        /// `None` if the model has no such linear layer.
        expected: Option<[usize; 2]>,
    },
    #[error("num_inference_steps and num_images must be at least 1")]
    NothingToDo,
    #[error("job {0} has steps left")]
    Unfinished(JobId),
    #[error("job {0} has made no step that could be shown")]
    NothingToShow(JobId),
    /// A stage of the job gave NaN or infinity.
    #[error(transparent)]
    NotFinite(#[from] NotFinite),
    /// A file of weights changed or failed. No later job can be right.
    #[error(transparent)]
    File(#[from] FileFault),
    #[error("the device failed: {0}")]
    Device(String),
    /// Seen by callers only if the reason of the failure is lost.
    #[error("the half of the job on another device failed")]
    OtherHalf,
}

fn layer_shape(expected: Option<&[usize; 2]>) -> String {
    expected.map_or_else(
        || "and the model has no such linear layer".to_owned(),
        |shape| format!("and the model's has shape {shape:?}"),
    )
}

/// What one step did for one job.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepOutcome {
    pub id: JobId,
    pub steps_left: usize,
    /// All steps of the job so far.
    pub counts: StepCounts,
    /// The transformer's work in this step as a part of a full step's: 1 if all blocks ran on both
    /// halves, 0 if none ran.
    pub work: f64,
}

/// Generates images, job by job and step by step.
///
/// Every call returns when the device has finished its work, so a caller can time it. A job is
/// started, advanced until [`Pipeline::step`] reports no steps left, and finished; it can be
/// discarded at any point in between. Several jobs, of any sizes, may be advanced together.
/// A call that panics or fails loses at most the jobs that it was given.
pub trait Pipeline: Send {
    fn info(&self) -> &ModelInfo;

    /// Counts the work of jobs. It is a value of its own because the engine estimates jobs on
    /// threads that do not own the pipeline.
    fn cost_model(&self) -> CostModel;

    /// Plans the memory of jobs; `None` if nothing is known about it.
    fn memory_model(&self) -> Option<MemoryModel> {
        None
    }

    /// Encodes prompts in one forward pass of the text encoder and keeps the embeddings for jobs that
    /// are started later. Prompts whose embeddings are kept already, and prompts that are invalid, are
    /// left out. A prompt that is encoded with others gets the embeddings that it would get alone,
    /// within rounding.
    ///
    /// # Errors
    ///
    /// If the device or a file of weights fails. Jobs with these prompts can be started all the same.
    fn encode(&mut self, prompts: &[&Conditioning]) -> Result<(), PipelineError>;

    /// Uploads adapters for jobs that are started later, as far as they fit into the cache beside those
    /// that started jobs use. Adapters that are on the devices already are left out.
    ///
    /// # Errors
    ///
    /// If the device fails or has no memory left. Jobs with these adapters can be started all the same.
    fn load_adapters(&mut self, _adapters: &[AdapterUse]) -> Result<(), PipelineError> {
        Ok(())
    }

    /// Encodes the prompts, uploads the adapters that are not on the devices, generates the noise and makes
    /// the schedule.
    ///
    /// # Errors
    ///
    /// If the job is invalid, the device or a file of weights fails, or an embedding is not finite;
    /// the pipeline then has no such job.
    fn start(&mut self, id: JobId, job: Job) -> Result<(), PipelineError>;

    /// Advances every given job by one denoising step, in one forward pass of the transformer.
    /// Returns one outcome for each id, in the same order.
    ///
    /// # Errors
    ///
    /// If an id is unknown, the device or a file of weights fails, or a job's latents are not
    /// finite. No job has advanced then, so that the caller can step each job alone.
    fn step(&mut self, ids: &[JobId]) -> Result<Vec<StepOutcome>, PipelineError>;

    /// Predicts the first image of a job from its last step: an image of at most
    /// [`MAX_PREVIEW_SIDE`] pixels a side, much cheaper than the real one. The job does not change.
    ///
    /// # Errors
    ///
    /// If the id is unknown, the job has made no step, the device or a file of weights fails, or
    /// the pixels are not finite.
    fn preview(&mut self, id: JobId) -> Result<RgbImage, PipelineError>;

    /// Decodes the images of a job that has no steps left, and removes the job.
    ///
    /// # Errors
    ///
    /// If the id is unknown, the job has steps left, the device or a file of weights fails, or the
    /// pixels are not finite.
    fn finish(&mut self, id: JobId) -> Result<Output, PipelineError>;

    /// Changes how the images of a job will be decoded.
    fn set_decoding(&mut self, _id: JobId, _decoding: Decoding) {}

    /// Removes a job, whatever its state.
    fn discard(&mut self, id: JobId);

    /// Runs a small sum on the device, to find out after an error whether it still computes.
    ///
    /// # Errors
    ///
    /// If the device does not compute.
    fn probe(&mut self) -> Result<(), PipelineError> {
        Ok(())
    }

    /// Memory of the device that this program uses.
    fn memory(&self) -> MemoryUse;

    /// Use of each device, in the order of [`ModelInfo::devices`]; empty if it is not known.
    fn device_use(&self) -> Vec<DeviceUse> {
        Vec::new()
    }

    /// Memory that this program can still allocate; `None` if it is not known.
    fn memory_room(&self) -> Option<MemoryRoom> {
        None
    }

    /// Frees what the caches hold.
    fn drop_caches(&mut self) {}

    fn caches(&self) -> CacheUses;
}
