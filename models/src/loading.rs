//! Opening a painter: what every backend crate offers the rest of the program.

use burn_tensor::DType;
use kiln_ops::FusedOps;

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

/// Why a backend could not open a painter.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error(
        "the {backend} backend cannot run a model in {dtype} on this device; choose --dtype {}",
        supported.join(" or ")
    )]
    DType {
        backend: &'static str,
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

/// Loads a checkpoint onto a device.
///
/// Without a choice of type the checkpoint's own is kept, or f32 where the device has no such
/// arithmetic. `activations` is their type, `None` for the model's.
pub fn open<B: FusedOps>(
    backend: &'static str,
    device: B::Device,
    activations: Option<DType>,
    parts: &CheckpointParts,
    options: LoadOptions,
) -> Result<Box<dyn Painter>, OpenError> {
    let supports = |dtype: ModelDType| B::supports_dtype(&device, dtype.dtype());
    let model = match options.dtype {
        Some(dtype) if !supports(dtype) => {
            let all = [ModelDType::F32, ModelDType::Bf16, ModelDType::F16].into_iter();
            let supported = all
                .filter(|dtype| supports(*dtype))
                .map(ModelDType::name)
                .collect();
            return Err(OpenError::DType {
                backend,
                dtype: dtype.name(),
                supported,
            });
        }
        Some(dtype) => dtype,
        None => {
            let stored = ModelDType::of_checkpoint(parts);
            if supports(stored) {
                stored
            } else {
                ModelDType::F32
            }
        }
    };
    let model = model.dtype();
    let precision = Precision {
        model,
        activations: activations.unwrap_or(model),
    };
    let settings = PainterSettings {
        precision,
        vae: options.vae,
    };
    Ok(Box::new(QwenImage::<B>::load(parts, device, settings)?))
}
