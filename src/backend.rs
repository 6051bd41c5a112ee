//! The backends in this binary, their devices, and loading a checkpoint onto one of them.

use std::fmt;
use std::slice;
use std::str::FromStr;

use kiln_models::config::ConfigError;
use kiln_models::families::CheckpointParts;
use kiln_models::flops::FlopCount;
use kiln_models::job::Job;
use kiln_models::loading::{DeviceInfo, LoadOptions, ModelDType, OpenError};
use kiln_models::pipeline::{ImageSizes, Pipeline};
use kiln_models::vae::VaeSettings;

use crate::checkpoint::Checkpoint;
use crate::kernel_cache;

/// A backend of burn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BackendKind {
    Cuda,
    Wgpu,
    Flex,
    Ndarray,
    /// The first of the above, in that order, that was compiled in and has a device here.
    Auto,
}

/// A backend and one of its devices: `flex`, `cuda:1`, `auto`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BackendChoice {
    kind: BackendKind,
    device: Option<usize>,
}

/// The type of a model's weights and activations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DTypeChoice {
    /// The checkpoint's type where the backend computes in it.
    Auto,
    This(ModelDType),
}

/// The device and the types that a checkpoint is loaded with, and how its images are decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoadSettings {
    pub backend: BackendChoice,
    pub dtype: DTypeChoice,
    /// How images are decoded.
    pub vae: VaeSettings,
}

/// flex, the checkpoint's type, and whole images decoded together.
impl Default for LoadSettings {
    fn default() -> Self {
        Self {
            backend: BackendChoice {
                kind: BackendKind::Flex,
                device: None,
            },
            dtype: DTypeChoice::Auto,
            vae: VaeSettings::default(),
        }
    }
}

/// Why a backend cannot be used, or a checkpoint cannot be loaded onto it.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    #[error(
        "this kiln was built without the {kind} backend; it has {}. Build it with \
         `cargo build --release --features {kind}`",
        compiled_in()
    )]
    NotCompiledIn { kind: BackendKind },
    #[error(
        "the {kind} backend has no device {index}; it has {}",
        listed(*kind, devices)
    )]
    NoSuchDevice {
        kind: BackendKind,
        index: usize,
        devices: Vec<DeviceInfo>,
    },
    #[error("no backend of this kiln can be used here: {}", reasons.join("; "))]
    NoneAnswers { reasons: Vec<String> },
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Open(#[from] OpenError),
}

/// A word that is not one of the known names.
#[derive(Debug, thiserror::Error)]
#[error("{word:?} is not one of {known}")]
pub struct UnknownName {
    word: String,
    known: String,
}

impl UnknownName {
    pub(crate) fn new(word: &str, known: &[&str]) -> Self {
        Self {
            word: word.to_owned(),
            known: known.join(", "),
        }
    }
}

/// Why a text does not name a backend or a device as `cuda:1` does.
#[derive(Debug, thiserror::Error)]
pub enum InvalidChoice {
    #[error(transparent)]
    Backend(#[from] UnknownName),
    #[error("{index:?} is not the number of a device; `kiln backends` lists them")]
    Device { index: String },
    #[error("auto chooses the device itself: name the backend that device {index} is one of")]
    DeviceOfAuto { index: usize },
}

/// One backend's devices on this machine.
#[derive(Debug)]
pub struct BackendReport {
    pub kind: BackendKind,
    pub devices: Result<Vec<DeviceInfo>, BackendError>,
}

impl BackendReport {
    pub fn compiled_in(&self) -> bool {
        !matches!(self.devices, Err(BackendError::NotCompiledIn { .. }))
    }
}

/// The functions of a backend's crate.
#[derive(Clone, Copy)]
struct Entry {
    kind: BackendKind,
    /// Never empty.
    devices: fn() -> Result<Vec<DeviceInfo>, OpenError>,
    open: Opener,
}

type Opener =
    fn(&DeviceInfo, &CheckpointParts, LoadOptions) -> Result<Box<dyn Pipeline>, OpenError>;

impl BackendKind {
    /// Every backend, from the fastest to the slowest.
    pub const ALL: [Self; 4] = [Self::Cuda, Self::Wgpu, Self::Flex, Self::Ndarray];

    /// What [`FromStr`] accepts: the names of [`Self::ALL`], and `auto`.
    pub fn names() -> Vec<&'static str> {
        let kinds = Self::ALL.into_iter().chain([Self::Auto]);
        kinds.map(Self::name).collect()
    }

    fn name(self) -> &'static str {
        match self {
            Self::Cuda => "cuda",
            Self::Wgpu => "wgpu",
            Self::Flex => "flex",
            Self::Ndarray => "ndarray",
            Self::Auto => "auto",
        }
    }

    /// The backend's crate, if it was compiled in.
    fn entry(self) -> Option<Entry> {
        let (devices, open): (fn() -> _, Opener) = match self {
            #[cfg(feature = "cuda")]
            Self::Cuda => (kiln_cuda::devices, kiln_cuda::open),
            #[cfg(feature = "wgpu")]
            Self::Wgpu => (kiln_wgpu::devices, kiln_wgpu::open),
            #[cfg(feature = "flex")]
            Self::Flex => (kiln_flex::devices, kiln_flex::open),
            #[cfg(feature = "ndarray")]
            Self::Ndarray => (kiln_ndarray::devices, kiln_ndarray::open),
            _ => return None,
        };
        Some(Entry {
            kind: self,
            devices,
            open,
        })
    }

    fn compiled_in(self) -> Result<Entry, BackendError> {
        self.entry()
            .ok_or(BackendError::NotCompiledIn { kind: self })
    }
}

impl fmt::Display for BackendKind {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.name())
    }
}

impl FromStr for BackendKind {
    type Err = UnknownName;

    fn from_str(word: &str) -> Result<Self, UnknownName> {
        let mut kinds = Self::ALL.into_iter().chain([Self::Auto]);
        kinds
            .find(|kind| kind.name() == word)
            .ok_or_else(|| UnknownName::new(word, &Self::names()))
    }
}

impl BackendChoice {
    /// `device` is the device's number in `kiln backends`; `None` is the first one.
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
    /// What [`FromStr`] accepts besides [`ModelDType::aliases`]: `auto`, and the names of
    /// [`ModelDType::ALL`].
    pub fn names() -> Vec<&'static str> {
        let names = ModelDType::ALL.map(ModelDType::name);
        ["auto"].into_iter().chain(names).collect()
    }

    fn model_dtype(self) -> Option<ModelDType> {
        match self {
            Self::Auto => None,
            Self::This(dtype) => Some(dtype),
        }
    }
}

impl FromStr for DTypeChoice {
    type Err = UnknownName;

    fn from_str(word: &str) -> Result<Self, UnknownName> {
        let choice = match word {
            "auto" => Some(Self::Auto),
            _ => ModelDType::named(word).map(Self::This),
        };
        choice.ok_or_else(|| UnknownName::new(word, &Self::names()))
    }
}

/// The names of the backends in this binary.
fn compiled_in() -> String {
    let names: Vec<&str> = BackendKind::ALL
        .into_iter()
        .filter(|kind| kind.entry().is_some())
        .map(BackendKind::name)
        .collect();
    if names.is_empty() {
        "none".to_owned()
    } else {
        names.join(", ")
    }
}

/// `flex:0 (AMD EPYC)` and so on.
fn listed(kind: BackendKind, devices: &[DeviceInfo]) -> String {
    let devices = devices
        .iter()
        .map(|device| format!("{kind}:{} ({})", device.index, device.name));
    devices.collect::<Vec<_>>().join(", ")
}

/// Every backend, from the fastest to the slowest, and its devices on this machine.
pub fn survey() -> Vec<BackendReport> {
    let report = |kind: BackendKind| BackendReport {
        kind,
        devices: kind.compiled_in().and_then(|entry| Ok((entry.devices)()?)),
    };
    BackendKind::ALL.map(report).into()
}

/// Checks that the backend was compiled in and has the device. `auto` is checked by [`load`].
pub fn check(choice: BackendChoice) -> Result<(), BackendError> {
    if choice.kind != BackendKind::Auto {
        chosen(choice)?;
    }
    Ok(())
}

/// The device of a choice other than `auto`.
fn chosen(choice: BackendChoice) -> Result<(Entry, DeviceInfo), BackendError> {
    let entry = choice.kind.compiled_in()?;
    let mut devices = (entry.devices)()?;
    let index = choice.device.unwrap_or(0);
    match devices.iter().position(|device| device.index == index) {
        Some(position) => Ok((entry, devices.swap_remove(position))),
        None => Err(BackendError::NoSuchDevice {
            kind: choice.kind,
            index,
            devices,
        }),
    }
}

/// The first device that is not emulated in software; `auto` uses no other.
fn first_real(
    kind: BackendKind,
    devices: Result<Vec<DeviceInfo>, OpenError>,
) -> Result<DeviceInfo, OpenError> {
    let devices = devices?;
    let software = listed(kind, &devices);
    devices
        .into_iter()
        .find(|device| !device.software)
        .ok_or_else(|| OpenError::NoDevice {
            backend: kind.name(),
            reason: format!("{software} computes on the CPU; only --backend {kind} uses it"),
        })
}

/// The image sizes that a checkpoint generates, from its configurations.
pub fn image_sizes(checkpoint: &Checkpoint) -> Result<ImageSizes, BackendError> {
    Ok(checkpoint.parts().configs.image_sizes()?)
}

/// Floating-point operations of a job, by stage.
pub fn operations(
    checkpoint: &Checkpoint,
    job: &Job,
    settings: &LoadSettings,
) -> Result<FlopCount, BackendError> {
    let configs = &checkpoint.parts().configs;
    Ok(configs.cost_model(settings.vae)?.cost(job))
}

/// Loads a checkpoint's networks onto a device.
///
/// # Errors
///
/// There is no such device, a tensor is missing or has another shape, or memory runs out.
pub fn load(
    checkpoint: &Checkpoint,
    settings: &LoadSettings,
) -> Result<Box<dyn Pipeline>, BackendError> {
    let options = |device: &DeviceInfo| LoadOptions {
        dtype: settings.dtype.model_dtype(),
        vae: settings.vae,
        kernel_cache: device.kernels.as_deref().map(kernel_cache::folder_for),
    };
    let parts = checkpoint.parts();
    if settings.backend.kind != BackendKind::Auto {
        let (entry, device) = chosen(settings.backend)?;
        if device.software {
            tracing::warn!(
                "{} computes on the CPU",
                listed(entry.kind, slice::from_ref(&device))
            );
        }
        return Ok((entry.open)(&device, parts, options(&device))?);
    }
    let mut reasons = Vec::new();
    for entry in BackendKind::ALL.into_iter().filter_map(BackendKind::entry) {
        let opened = first_real(entry.kind, (entry.devices)())
            .and_then(|device| (entry.open)(&device, parts, options(&device)));
        match opened {
            Err(reason @ OpenError::NoDevice { .. }) => {
                tracing::info!("{reason}");
                reasons.push(reason.to_string());
            }
            outcome => return Ok(outcome?),
        }
    }
    Err(BackendError::NoneAnswers { reasons })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(index: usize, name: &str, software: bool) -> DeviceInfo {
        DeviceInfo {
            index,
            name: name.to_owned(),
            detail: None,
            memory: None,
            dtypes: vec![ModelDType::F32],
            software,
            kernels: None,
        }
    }

    #[test]
    fn auto_takes_no_software_adapter() {
        let [gpu, llvmpipe] = [device(1, "GPU", false), device(0, "llvmpipe", true)];
        let taken = first_real(BackendKind::Wgpu, Ok(vec![llvmpipe.clone(), gpu.clone()]));
        assert_eq!(taken.unwrap(), gpu);
        let refused = first_real(BackendKind::Wgpu, Ok(vec![llvmpipe])).unwrap_err();
        assert_eq!(
            refused.to_string(),
            "the wgpu backend has no device here: wgpu:0 (llvmpipe) computes on the CPU; only \
             --backend wgpu uses it"
        );
    }

    #[test]
    fn a_missing_device_is_reported_with_the_available_ones() {
        let error = BackendError::NoSuchDevice {
            kind: BackendKind::Cuda,
            index: 2,
            devices: vec![device(0, "A", false), device(1, "B", false)],
        };
        assert_eq!(
            error.to_string(),
            "the cuda backend has no device 2; it has cuda:0 (A), cuda:1 (B)"
        );
    }

    #[test]
    fn a_choice_parses_back_from_its_text() {
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
    fn an_invalid_choice_is_quoted() {
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
