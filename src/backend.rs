//! Which backends this binary has, and loading a checkpoint onto one of them.

use std::fmt;
use std::str::FromStr;

use kiln_models::config::ConfigError;
use kiln_models::loading::{LoadOptions, ModelDType, OpenError};
use kiln_models::painter::{ImageSizes, Painter};
use kiln_models::qwen_image::CheckpointParts;
use kiln_models::vae::{Tiling, VaeSettings};

use crate::checkpoint::Checkpoint;

/// What computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BackendKind {
    Cuda,
    Wgpu,
    Flex,
    Ndarray,
    /// The first of the above, in that order, that this binary has and that answers.
    Auto,
}

/// A backend, and which of its devices: `flex`, `cuda:1`, `auto`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BackendChoice {
    kind: BackendKind,
    device: Option<usize>,
}

/// The type a model is run in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DTypeChoice {
    /// The checkpoint's own, where the backend can.
    Auto,
    F32,
    Bf16,
    F16,
}

/// How a checkpoint is loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoadSettings {
    pub backend: BackendChoice,
    pub dtype: DTypeChoice,
    pub vae_use_slicing: bool,
    pub vae_use_tiling: bool,
    /// In pixels.
    pub vae_tile_size: usize,
    /// In pixels, from one tile to the next.
    pub vae_tile_stride: usize,
}

/// Why no painter could be had.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    #[error(
        "this kiln was built without the {kind} backend; it has {}. Build it with \
         `cargo build --release --features {kind}`",
        compiled_in()
    )]
    NotCompiledIn { kind: BackendKind },
    #[error("this kiln was built without any backend; build it with `--features flex`")]
    NoBackend,
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Open(#[from] OpenError),
}

/// A word that names no backend, or no type.
#[derive(Debug, thiserror::Error)]
#[error("{word:?} is not one of {known}")]
pub struct UnknownName {
    word: String,
    known: String,
}

/// Why a text such as `cuda:1` chooses no backend.
#[derive(Debug, thiserror::Error)]
pub enum InvalidChoice {
    #[error(transparent)]
    Backend(#[from] UnknownName),
    #[error("{index:?} is not the number of a device; `kiln backends` lists them")]
    Device { index: String },
    #[error("auto chooses the device itself: name the backend that device {index} is one of")]
    DeviceOfAuto { index: usize },
}

/// From the best to the slowest.
const KINDS: [BackendKind; 4] = [
    BackendKind::Cuda,
    BackendKind::Wgpu,
    BackendKind::Flex,
    BackendKind::Ndarray,
];

impl BackendKind {
    fn name(self) -> &'static str {
        match self {
            Self::Cuda => "cuda",
            Self::Wgpu => "wgpu",
            Self::Flex => "flex",
            Self::Ndarray => "ndarray",
            Self::Auto => "auto",
        }
    }

    /// The function that opens this backend, if the binary has it.
    fn opener(self) -> Option<Opener> {
        match self {
            #[cfg(feature = "cuda")]
            Self::Cuda => Some(kiln_cuda::open),
            #[cfg(feature = "wgpu")]
            Self::Wgpu => Some(kiln_wgpu::open),
            #[cfg(feature = "flex")]
            Self::Flex => Some(kiln_flex::open),
            #[cfg(feature = "ndarray")]
            Self::Ndarray => Some(kiln_ndarray::open),
            _ => None,
        }
    }
}

type Opener = fn(&CheckpointParts, LoadOptions) -> Result<Box<dyn Painter>, OpenError>;

impl fmt::Display for BackendKind {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.name())
    }
}

impl FromStr for BackendKind {
    type Err = UnknownName;

    fn from_str(word: &str) -> Result<Self, UnknownName> {
        let mut kinds = KINDS.into_iter().chain([Self::Auto]);
        kinds
            .find(|kind| kind.name() == word)
            .ok_or_else(|| UnknownName {
                word: word.to_owned(),
                known: format!("{}, auto", KINDS.map(Self::name).join(", ")),
            })
    }
}

impl BackendChoice {
    /// `device` is its number in `kiln backends`, the first one if `None`.
    pub fn new(kind: BackendKind, device: Option<usize>) -> Result<Self, InvalidChoice> {
        match (kind, device) {
            (BackendKind::Auto, Some(index)) => Err(InvalidChoice::DeviceOfAuto { index }),
            _ => Ok(Self { kind, device }),
        }
    }

    pub fn kind(self) -> BackendKind {
        self.kind
    }

    pub fn device(self) -> Option<usize> {
        self.device
    }
}

impl fmt::Display for BackendChoice {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.device {
            None => self.kind.fmt(formatter),
            Some(index) => write!(formatter, "{}:{index}", self.kind),
        }
    }
}

impl FromStr for BackendChoice {
    type Err = InvalidChoice;

    fn from_str(text: &str) -> Result<Self, InvalidChoice> {
        let (kind, device) = match text.split_once(':') {
            None => (text, None),
            Some((kind, index)) => {
                let device = index.parse().map_err(|_| InvalidChoice::Device {
                    index: index.to_owned(),
                })?;
                (kind, Some(device))
            }
        };
        Self::new(kind.parse()?, device)
    }
}

impl DTypeChoice {
    fn model_dtype(self) -> Option<ModelDType> {
        match self {
            Self::Auto => None,
            Self::F32 => Some(ModelDType::F32),
            Self::Bf16 => Some(ModelDType::Bf16),
            Self::F16 => Some(ModelDType::F16),
        }
    }
}

impl FromStr for DTypeChoice {
    type Err = UnknownName;

    fn from_str(word: &str) -> Result<Self, UnknownName> {
        match word {
            "auto" => Ok(Self::Auto),
            "f32" => Ok(Self::F32),
            "bf16" => Ok(Self::Bf16),
            "f16" => Ok(Self::F16),
            _ => Err(UnknownName {
                word: word.to_owned(),
                known: "auto, f32, bf16, f16".to_owned(),
            }),
        }
    }
}

/// The names of the backends in this binary.
fn compiled_in() -> String {
    let names: Vec<&str> = KINDS
        .into_iter()
        .filter(|kind| kind.opener().is_some())
        .map(BackendKind::name)
        .collect();
    if names.is_empty() {
        "none".to_owned()
    } else {
        names.join(", ")
    }
}

/// The sizes a checkpoint draws, known before its weights are loaded.
pub fn image_sizes(checkpoint: &Checkpoint) -> Result<ImageSizes, BackendError> {
    Ok(checkpoint.parts().configs.image_sizes()?)
}

/// Loads a checkpoint's networks onto a device.
pub fn load(
    checkpoint: &Checkpoint,
    settings: &LoadSettings,
) -> Result<Box<dyn Painter>, BackendError> {
    let tiling = settings.vae_use_tiling.then_some(Tiling {
        size: settings.vae_tile_size,
        stride: settings.vae_tile_stride,
    });
    let options = LoadOptions {
        dtype: settings.dtype.model_dtype(),
        vae: VaeSettings {
            use_slicing: settings.vae_use_slicing,
            tiling,
        },
    };
    let parts = checkpoint.parts();
    let kind = settings.backend.kind;
    if kind != BackendKind::Auto {
        let open = kind.opener().ok_or(BackendError::NotCompiledIn { kind })?;
        return Ok(open(parts, options)?);
    }
    let mut unavailable = None;
    for open in KINDS.into_iter().filter_map(BackendKind::opener) {
        match open(parts, options) {
            Err(error @ OpenError::NoDevice { .. }) => {
                tracing::info!("{error}");
                unavailable = Some(error);
            }
            outcome => return Ok(outcome?),
        }
    }
    Err(unavailable.map_or(BackendError::NoBackend, BackendError::Open))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_choice_reads_as_it_is_written() {
        for text in ["flex", "cuda:1", "wgpu:0", "auto"] {
            assert_eq!(text.parse::<BackendChoice>().unwrap().to_string(), text);
        }
        let choice: BackendChoice = "cuda:12".parse().unwrap();
        assert_eq!(
            (choice.kind(), choice.device()),
            (BackendKind::Cuda, Some(12))
        );
    }

    #[test]
    fn what_chooses_no_backend_is_named() {
        for (text, expected) in [
            (
                "tpu",
                "\"tpu\" is not one of cuda, wgpu, flex, ndarray, auto",
            ),
            ("tpu:0", "\"tpu\" is not one of"),
            ("", "\"\" is not one of"),
            ("cuda:", "\"\" is not the number of a device"),
            ("cuda:-1", "\"-1\" is not the number of a device"),
            ("cuda:0:1", "\"0:1\" is not the number of a device"),
            ("auto:2", "name the backend that device 2 is one of"),
        ] {
            let error = text.parse::<BackendChoice>().unwrap_err().to_string();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }
}
