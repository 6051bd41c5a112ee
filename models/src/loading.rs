//! Opening a painter: what every backend crate offers the rest of the program.

use burn_tensor::DType;
use kiln_ops::{FusedOps, host};

use crate::painter::Painter;
use crate::qwen_image::{CheckpointParts, PainterSettings, QwenImage};
use crate::source::{StoredDType, TensorSource};
use crate::vae::VaeSettings;
use crate::weights::{LoadError, Precision};

/// A type a model can be run in, as diffusers' `torch_dtype`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ModelDType {
    F32,
    Bf16,
    F16,
}

impl ModelDType {
    pub const ALL: [Self; 3] = [Self::F32, Self::Bf16, Self::F16];

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
        let bytes_in = |wanted: &StoredDType| -> usize {
            let source: &dyn TensorSource = &*parts.transformer;
            let infos = source
                .names()
                .into_iter()
                .filter_map(|name| source.info(&name));
            infos
                .filter(|info| info.dtype == *wanted)
                .map(|info| info.shape.iter().product::<usize>() * wanted.size().unwrap_or(0))
                .sum()
        };
        [
            (Self::F32, StoredDType::F32),
            (Self::Bf16, StoredDType::Bf16),
            (Self::F16, StoredDType::F16),
        ]
        .into_iter()
        .max_by_key(|(_, stored)| bytes_in(stored))
        .map_or(Self::F32, |(dtype, _)| dtype)
    }
}

/// What a user may choose about loading.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LoadOptions {
    /// `None` keeps the checkpoint's own type where the backend can.
    pub dtype: Option<ModelDType>,
    pub vae: VaeSettings,
}

/// A device that a backend can open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Names it among the backend's devices.
    pub index: usize,
    /// For people.
    pub name: String,
    /// Driver, or what else tells it from others; for people.
    pub detail: Option<String>,
    /// In bytes, where it tells.
    pub memory: Option<u64>,
    /// What a model can be run in.
    pub dtypes: Vec<ModelDType>,
    /// Computes on the CPU, although it answers as a GPU.
    pub software: bool,
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
        }
    }
}

/// Why a backend could not open a painter.
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
    #[error(transparent)]
    Load(#[from] LoadError),
}

/// Where to load a checkpoint.
#[derive(Debug, Clone)]
pub struct Target<'a, D> {
    pub backend: &'static str,
    pub device: D,
    pub info: &'a DeviceInfo,
    /// Type of the activations; `None` for the model's.
    pub activations: Option<DType>,
}

/// Loads a checkpoint onto a device.
///
/// Without a choice of type the checkpoint's own is kept, or f32 where the device has no such
/// arithmetic.
pub fn open<B: FusedOps>(
    target: Target<'_, B::Device>,
    parts: &CheckpointParts,
    options: LoadOptions,
) -> Result<Box<dyn Painter>, OpenError> {
    let DeviceInfo {
        index,
        name,
        dtypes,
        ..
    } = target.info;
    let device_name = format!("{}:{index} ({name})", target.backend);
    let model = match options.dtype {
        Some(dtype) if !dtypes.contains(&dtype) => {
            return Err(OpenError::DType {
                device: device_name,
                dtype: dtype.name(),
                supported: dtypes.iter().map(|dtype| dtype.name()).collect(),
            });
        }
        Some(dtype) => dtype,
        None => {
            let stored = ModelDType::of_checkpoint(parts);
            if dtypes.contains(&stored) {
                stored
            } else {
                ModelDType::F32
            }
        }
    };
    let model = model.dtype();
    let precision = Precision {
        model,
        activations: target.activations.unwrap_or(model),
    };
    let settings = PainterSettings {
        precision,
        vae: options.vae,
    };
    let painter = QwenImage::<B>::load(parts, target.device, device_name, settings)?;
    Ok(Box::new(painter))
}
