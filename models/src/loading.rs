//! Opening a pipeline on a device: what the backend crates share.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;

use burn::tensor::DType;
use cubecl_common::stream_id::StreamId;
use kiln_ops::{FaultWatch, FusedOps, MemoryRoom, MemoryUse, host};

use crate::adapter::AdapterUse;
use crate::device::{caught, checkpoint, fault, panic_message};
use crate::families::{self, CheckpointParts};
use crate::flops::CostModel;
use crate::job::{Conditioning, Decoding, Job, JobId, Output, RgbImage};
use crate::memory::MemoryModel;
use crate::pipeline::{
    CacheUses, DeviceUse, ModelDevice, ModelInfo, Pipeline, PipelineError, StepOutcome,
};
use crate::session::{SessionDevice, SessionSettings};
use crate::source::StoredDType;
use crate::vae::VaeSettings;
use crate::weights::{LoadError, Precision};

/// A type that a model can be run in: diffusers' `torch_dtype`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ModelDType {
    F32,
    Bf16,
    F16,
}

impl ModelDType {
    pub const ALL: [Self; 3] = [Self::F32, Self::Bf16, Self::F16];

    /// Finds a type by its [`ModelDType::name`] or one of its [`ModelDType::aliases`].
    pub fn named(name: &str) -> Option<Self> {
        let is_named = |dtype: &Self| dtype.name() == name || dtype.aliases().contains(&name);
        Self::ALL.into_iter().find(is_named)
    }

    /// Its names in PyTorch and vLLM.
    pub fn aliases(self) -> &'static [&'static str] {
        match self {
            Self::F32 => &["float32", "float"],
            Self::Bf16 => &["bfloat16"],
            Self::F16 => &["float16", "half"],
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
        }
    }

    pub fn dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::Bf16 => DType::BF16,
            Self::F16 => DType::F16,
        }
    }

    /// The type that most of a checkpoint's transformer is stored in.
    pub fn of_checkpoint(parts: &CheckpointParts) -> Self {
        match parts.transformer.main_dtype() {
            Some(StoredDType::Bf16) => Self::Bf16,
            Some(StoredDType::F16) => Self::F16,
            _ => Self::F32,
        }
    }
}

/// Bytes of adapters that stay on each device unless another bound is chosen: two of rank 64 for
/// Qwen-Image in bf16.
pub const DEFAULT_ADAPTER_CACHE_BYTES: usize = 2 << 30;

/// Options that a user may set for loading.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoadOptions {
    /// `None` keeps the checkpoint's own type where the backend can.
    pub dtype: Option<ModelDType>,
    pub vae: VaeSettings,
    /// Whether the two halves of a guided job run on two devices; `None` as is faster.
    pub split_guidance: Option<bool>,
    /// Folder of compiled GPU kernels and of the choices among them. A path that is not a folder
    /// turns the cache off; `None` leaves the choice to the backend.
    pub kernel_cache: Option<PathBuf>,
    /// Bound of the adapters on each device, in bytes.
    pub adapter_cache_bytes: usize,
}

impl Default for LoadOptions {
    fn default() -> Self {
        Self {
            dtype: None,
            vae: VaeSettings::default(),
            split_guidance: None,
            kernel_cache: None,
            adapter_cache_bytes: DEFAULT_ADAPTER_CACHE_BYTES,
        }
    }
}

/// A device that a backend can open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Number of the device among the backend's devices.
    pub index: usize,
    /// Human-readable name.
    pub name: String,
    /// Human-readable driver and version.
    pub detail: Option<String>,
    /// Memory in bytes, if the device reports it.
    pub memory: Option<u64>,
    /// Types that a model can be run in.
    pub dtypes: Vec<ModelDType>,
    /// Whether the device is an adapter of a GPU API that computes on the CPU.
    pub software: bool,
    /// Driver, compiler and GPU, on which compiled kernels depend besides the program. `None` for a
    /// backend that compiles no kernels.
    pub kernels: Option<String>,
}

impl DeviceInfo {
    /// The one device of a CPU backend.
    pub fn cpu(dtypes: &[ModelDType]) -> Self {
        Self {
            index: 0,
            name: host::cpu(),
            detail: None,
            memory: host::memory(),
            dtypes: dtypes.to_vec(),
            software: false,
            kernels: None,
        }
    }
}

/// Why a backend could not open a pipeline.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error(
        "{device} does not compute in {dtype}; choose --dtype {}",
        supported.join(" or ")
    )]
    DType {
        device: String,
        dtype: &'static str,
        supported: Vec<&'static str>,
    },
    #[error("the {backend} backend has no device here: {reason}")]
    NoDevice {
        backend: &'static str,
        reason: String,
    },
    #[error("the {backend} backend was not started: {reason}")]
    Settings {
        backend: &'static str,
        reason: String,
    },
    #[error("{device} failed while the model was loaded: {reason}")]
    Device { device: String, reason: String },
    #[error(transparent)]
    Load(#[from] LoadError),
}

/// The devices to load a checkpoint onto.
#[derive(Debug, Clone)]
pub struct Target<'a, D> {
    pub backend: &'static str,
    /// At least one. The first gets all networks, the others the transformer. A device that is in the
    /// list twice computes two streams of work with one copy of the weights.
    pub devices: Vec<(D, &'a DeviceInfo)>,
    /// Type of the activations; `None` for the model's.
    pub activations: Option<DType>,
}

/// Opens a device, which burn otherwise does at its first use.
///
/// # Errors
///
/// The reason why the device does not open.
pub fn try_device<B: FusedOps>(device: &B::Device) -> Result<(), String> {
    kiln_ops::faults::watch_device_threads();
    let watch = FaultWatch::start();
    // burn panics if a device does not open.
    let opened = catch_unwind(AssertUnwindSafe(|| checkpoint::<B>(device)));
    match (fault(&watch), opened) {
        (Some(error), _) | (None, Ok(Err(error))) => Err(report(error)),
        (None, Err(payload)) => Err(panic_message(payload.as_ref())),
        (None, Ok(Ok(_))) => Ok(()),
    }
}

/// Loads a checkpoint onto one or several devices, one after the other.
///
/// Without [`LoadOptions::dtype`] the model keeps the checkpoint's type, or runs in f32 if a device
/// does not compute in that type.
///
/// # Errors
///
/// If there is no device, or if one does not compute in the chosen type or fails, or the checkpoint cannot be loaded.
pub fn open<B: FusedOps>(
    target: Target<'_, B::Device>,
    parts: &CheckpointParts,
    options: LoadOptions,
) -> Result<Box<dyn Pipeline>, OpenError> {
    let Some((device, first)) = target.devices.first().cloned() else {
        return Err(OpenError::NoDevice {
            backend: target.backend,
            reason: "none was chosen".to_owned(),
        });
    };
    let infos = target.devices.iter().map(|(_, info)| *info);
    let model = model_dtype(target.backend, infos, parts, options.dtype)?.dtype();
    let precision = Precision {
        model,
        activations: target.activations.unwrap_or(model),
    };
    let devices: Vec<SessionDevice<B>> = target
        .devices
        .into_iter()
        .map(|(device, info)| SessionDevice {
            device,
            info: ModelDevice {
                index: info.index,
                name: info.name.clone(),
            },
        })
        .collect();
    let labels = devices.iter().map(|it| it.info.label(target.backend));
    let mut labels: Vec<String> = labels.collect();
    labels.dedup();
    let settings = SessionSettings::<B> {
        device: device.clone(),
        backend: target.backend,
        devices,
        split_guidance: options.split_guidance,
        device_memory: first.memory,
        precision,
        vae: options.vae,
        adapter_cache_bytes: options.adapter_cache_bytes,
        before_forward: None,
    };
    let stream = StreamId::current();
    let watch = FaultWatch::start();
    let load = || {
        let pipeline = families::open::<B>(parts, settings);
        // Uploads are queued.
        checkpoint::<B>(&device)?;
        Ok(pipeline)
    };
    let loaded = caught(&watch, load).and_then(|pipeline| fault(&watch).map_or(Ok(pipeline), Err));
    let pipeline = match loaded {
        Err(error) => {
            return Err(OpenError::Device {
                device: labels.join(", "),
                reason: report(error),
            });
        }
        Ok(pipeline) => pipeline?,
    };
    Ok(Box::new(OneStream { pipeline, stream }))
}

/// The chosen type, or else the checkpoint's where every device computes in it.
fn model_dtype<'a>(
    backend: &str,
    devices: impl Iterator<Item = &'a DeviceInfo> + Clone,
    parts: &CheckpointParts,
    chosen: Option<ModelDType>,
) -> Result<ModelDType, OpenError> {
    let without = |dtype| devices.clone().find(|it| !it.dtypes.contains(&dtype));
    let Some(dtype) = chosen else {
        let stored = ModelDType::of_checkpoint(parts);
        let fallback = without(stored).map(|_| ModelDType::F32);
        return Ok(fallback.unwrap_or(stored));
    };
    match without(dtype) {
        None => Ok(dtype),
        Some(device) => Err(OpenError::DType {
            device: format!("{backend}:{} ({})", device.index, device.name),
            dtype: dtype.name(),
            supported: device.dtypes.iter().map(|dtype| dtype.name()).collect(),
        }),
    }
}

fn report(error: PipelineError) -> String {
    match error {
        PipelineError::Device(report) => report,
        other => other.to_string(),
    }
}

/// A pipeline that runs every call on the stream that its weights were loaded on, whichever thread
/// calls: GPU backends have a stream, and memory, for each thread.
struct OneStream {
    pipeline: Box<dyn Pipeline>,
    stream: StreamId,
}

impl Pipeline for OneStream {
    fn info(&self) -> &ModelInfo {
        self.pipeline.info()
    }

    fn cost_model(&self) -> CostModel {
        self.pipeline.cost_model()
    }

    fn memory_model(&self) -> Option<MemoryModel> {
        self.pipeline.memory_model()
    }

    fn encode(&mut self, prompts: &[&Conditioning]) -> Result<(), PipelineError> {
        self.stream.executes(|| self.pipeline.encode(prompts))
    }

    fn load_adapters(&mut self, adapters: &[AdapterUse]) -> Result<(), PipelineError> {
        self.stream
            .executes(|| self.pipeline.load_adapters(adapters))
    }

    fn start(&mut self, id: JobId, job: Job) -> Result<(), PipelineError> {
        self.stream.executes(|| self.pipeline.start(id, job))
    }

    fn step(&mut self, ids: &[JobId]) -> Result<Vec<StepOutcome>, PipelineError> {
        self.stream.executes(|| self.pipeline.step(ids))
    }

    fn preview(&mut self, id: JobId) -> Result<RgbImage, PipelineError> {
        self.stream.executes(|| self.pipeline.preview(id))
    }

    fn finish(&mut self, id: JobId) -> Result<Output, PipelineError> {
        self.stream.executes(|| self.pipeline.finish(id))
    }

    fn set_decoding(&mut self, id: JobId, decoding: Decoding) {
        self.pipeline.set_decoding(id, decoding);
    }

    fn discard(&mut self, id: JobId) {
        self.stream.executes(|| self.pipeline.discard(id));
    }

    fn probe(&mut self) -> Result<(), PipelineError> {
        self.stream.executes(|| self.pipeline.probe())
    }

    fn memory(&self) -> MemoryUse {
        self.stream.executes(|| self.pipeline.memory())
    }

    fn device_use(&self) -> Vec<DeviceUse> {
        self.stream.executes(|| self.pipeline.device_use())
    }

    fn memory_room(&self) -> Option<MemoryRoom> {
        self.stream.executes(|| self.pipeline.memory_room())
    }

    fn drop_caches(&mut self) {
        self.stream.executes(|| self.pipeline.drop_caches());
    }

    fn caches(&self) -> CacheUses {
        self.pipeline.caches()
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;
    use crate::testing::{Call, FakePipeline, job, model_info};

    #[test]
    fn another_thread_uses_the_stream_of_the_thread_that_loaded() {
        let stream = StreamId::current();
        let pipeline = FakePipeline::new(model_info()).on_call(|call| match call {
            Call::Step(_) => Err(PipelineError::Device(StreamId::current().to_string())),
            _ => Ok(()),
        });
        let mut pipeline = OneStream {
            pipeline: Box::new(pipeline),
            stream,
        };
        let (elsewhere, used) = thread::spawn(move || {
            pipeline.start(0, job(16, 1)).unwrap();
            let used = pipeline.step(&[0]).unwrap_err().to_string();
            (StreamId::current(), used)
        })
        .join()
        .unwrap();
        assert_ne!(elsewhere, stream);
        assert!(used.ends_with(&stream.to_string()), "{used}");
    }
}
