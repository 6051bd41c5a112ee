//! The backends in this binary, their devices, and loading a checkpoint onto one of them.

mod choice;

use std::path::PathBuf;
use std::str::FromStr;

use kiln_models::config::ConfigError;
use kiln_models::families::CheckpointParts;
use kiln_models::flops::FlopCount;
use kiln_models::job::Job;
use kiln_models::loading::{
    DEFAULT_ADAPTER_CACHE_BYTES, DeviceInfo, LoadOptions, ModelDType, OpenError,
};
use kiln_models::pipeline::{ImageSizes, Pipeline};
use kiln_models::vae::VaeSettings;

use crate::checkpoint::Checkpoint;
use crate::kernel_cache;

pub use self::choice::{BackendChoice, BackendKind, DeviceNumbers, InvalidChoice, UnknownName};

/// The type of a model's weights and activations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DTypeChoice {
    /// The checkpoint's type where the backend computes in it.
    Auto,
    This(ModelDType),
}

/// The devices and the types that a checkpoint is loaded with, and how its images are decoded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoadSettings {
    pub backend: BackendChoice,
    /// Whether the two halves of a guided job run on two devices, which are the backend's first two
    /// unless `backend` names some; `None` lets the devices' work decide.
    pub split_guidance: Option<bool>,
    pub dtype: DTypeChoice,
    /// How images are decoded.
    pub vae: VaeSettings,
    /// Bound of the adapters that are kept on each device, in bytes. Those of jobs in progress may take
    /// more.
    pub adapter_cache_bytes: usize,
}

/// flex, the checkpoint's type, and whole images decoded together.
impl Default for LoadSettings {
    fn default() -> Self {
        Self {
            backend: BackendChoice {
                kind: BackendKind::Flex,
                devices: Vec::new(),
            },
            split_guidance: None,
            dtype: DTypeChoice::Auto,
            vae: VaeSettings::default(),
            adapter_cache_bytes: DEFAULT_ADAPTER_CACHE_BYTES,
        }
    }
}

impl LoadSettings {
    /// How often the transformer is loaded: once for each device.
    pub(crate) fn copies(&self) -> usize {
        let mut numbers = self.backend.devices.clone();
        numbers.sort_unstable();
        numbers.dedup();
        match numbers.len() {
            0 if self.split_guidance == Some(true) => 2,
            count => count.max(1),
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
    #[error(
        "--cfg-parallel-size 2 needs two devices; the {kind} backend has {}: give --device {}",
        listed(*kind, devices),
        match devices.as_slice() {
            [first, second, ..] => format!("{},{}", first.index, second.index),
            [one] => format!("{0},{0} to use one twice", one.index),
            [] => "two of them".to_owned(),
        }
    )]
    TooFewDevices {
        kind: BackendKind,
        /// The backend's devices.
        devices: Vec<DeviceInfo>,
    },
    #[error("no backend of this kiln can be used here: {}", reasons.join("; "))]
    NoneAnswers { reasons: Vec<String> },
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Open(#[from] OpenError),
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
    fn(&[DeviceInfo], &CheckpointParts, LoadOptions) -> Result<Box<dyn Pipeline>, OpenError>;

impl BackendKind {
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

/// Checks that the backend was compiled in and has the devices. `auto` is checked by [`load`].
///
/// # Errors
///
/// [`BackendError::NotCompiledIn`], [`BackendError::NoSuchDevice`], [`BackendError::TooFewDevices`], or
/// the backend has no device here.
pub fn check(choice: &BackendChoice, split_guidance: Option<bool>) -> Result<(), BackendError> {
    if choice.kind != BackendKind::Auto {
        chosen(choice, split_guidance)?;
    }
    Ok(())
}

/// The devices of a choice other than `auto`.
fn chosen(
    choice: &BackendChoice,
    split_guidance: Option<bool>,
) -> Result<(Entry, Vec<DeviceInfo>), BackendError> {
    let entry = choice.kind.compiled_in()?;
    let devices = select(choice, (entry.devices)()?, split_guidance)?;
    Ok((entry, devices))
}

/// The chosen ones of a backend's devices, or else the first, or the first two if guidance is split.
/// Only devices that are named mix GPUs with adapters that compute on the CPU.
fn select(
    choice: &BackendChoice,
    devices: Vec<DeviceInfo>,
    split_guidance: Option<bool>,
) -> Result<Vec<DeviceInfo>, BackendError> {
    let (kind, numbers) = (choice.kind, &choice.devices);
    let is_split = split_guidance == Some(true);
    let find = |index: usize| devices.iter().find(|device| device.index == index);
    let selected: Vec<DeviceInfo> = match numbers.iter().find(|index| find(**index).is_none()) {
        Some(&index) => {
            return Err(BackendError::NoSuchDevice {
                kind,
                index,
                devices,
            });
        }
        None if numbers.is_empty() => {
            let alike = devices
                .iter()
                .filter(|it| it.software == devices[0].software);
            alike.take(1 + usize::from(is_split)).cloned().collect()
        }
        None => numbers
            .iter()
            .filter_map(|&index| find(index))
            .cloned()
            .collect(),
    };
    if is_split && selected.len() < 2 {
        return Err(BackendError::TooFewDevices { kind, devices });
    }
    Ok(selected)
}

/// The devices that are not emulated in software; `auto` uses no others.
fn real(
    kind: BackendKind,
    devices: Result<Vec<DeviceInfo>, OpenError>,
) -> Result<Vec<DeviceInfo>, OpenError> {
    let (software, real): (Vec<_>, Vec<_>) = devices?.into_iter().partition(|it| it.software);
    if real.is_empty() {
        let software = listed(kind, &software);
        return Err(OpenError::NoDevice {
            backend: kind.name(),
            reason: format!("{software} computes on the CPU; only --backend {kind} uses it"),
        });
    }
    Ok(real)
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

/// Loads a checkpoint's networks onto one or several devices.
///
/// # Errors
///
/// There is no such device, a tensor is missing or has another shape, or memory runs out.
pub fn load(
    checkpoint: &Checkpoint,
    settings: &LoadSettings,
) -> Result<Box<dyn Pipeline>, BackendError> {
    let LoadSettings {
        backend,
        split_guidance,
        ..
    } = settings;
    let options = |devices: &[DeviceInfo]| LoadOptions {
        dtype: settings.dtype.model_dtype(),
        vae: settings.vae,
        split_guidance: *split_guidance,
        kernel_cache: kernel_folder(devices),
        adapter_cache_bytes: settings.adapter_cache_bytes,
    };
    let parts = checkpoint.parts();
    if backend.kind != BackendKind::Auto {
        let (entry, devices) = chosen(backend, *split_guidance)?;
        for device in devices.iter().filter(|device| device.software) {
            let device = listed(entry.kind, std::slice::from_ref(device));
            tracing::warn!("{device} computes on the CPU");
        }
        return Ok((entry.open)(&devices, parts, options(&devices))?);
    }
    let mut reasons = Vec::new();
    for entry in BackendKind::ALL.into_iter().filter_map(BackendKind::entry) {
        let opened = match real(entry.kind, (entry.devices)()) {
            Ok(devices) => {
                let choice = BackendChoice {
                    kind: entry.kind,
                    devices: Vec::new(),
                };
                let devices = select(&choice, devices, *split_guidance)?;
                (entry.open)(&devices, parts, options(&devices))
            }
            Err(error) => Err(error),
        };
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

/// The cache folder of the devices' compiled kernels. Devices that differ share none, as kernels are
/// found there by name.
fn kernel_folder(devices: &[DeviceInfo]) -> Option<PathBuf> {
    let kernels = |device: &DeviceInfo| device.kernels.clone();
    let first = kernels(devices.first()?)?;
    if devices
        .iter()
        .all(|it| kernels(it).as_ref() == Some(&first))
    {
        return Some(kernel_cache::folder_for(&first));
    }
    tracing::warn!("kernels are not cached, so each start takes longer: the devices differ");
    Some(kernel_cache::impossible_path())
}

#[cfg(test)]
mod tests;
