//! kiln's pipeline on burn's cuda backend.

use std::env;
use std::ffi::c_int;
use std::panic::catch_unwind;
use std::path::{Path, PathBuf};

use burn_cuda::{Cuda, CudaDevice};
use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys::CUdevice_attribute as Attribute;
use cudarc::driver::sys::CUresult;
use kiln_models::families::CheckpointParts;
use kiln_models::loading::{self, DeviceInfo, LoadOptions, ModelDType, OpenError, Target};
use kiln_models::pipeline::Pipeline;

const NAME: &str = "cuda";

/// Lists the driver's GPUs, with the dtypes that kernels can be compiled for.
///
/// # Errors
/// Returns [`OpenError::NoDevice`], with what to install, if the driver, NVRTC or CUDA's headers are
/// missing, or there is no GPU.
pub fn devices() -> Result<Vec<DeviceInfo>, OpenError> {
    let missing = missing_software().map(no_device);
    missing.map_or(Ok(()), Err)?;
    // cudarc loads functions of the driver on first use, and panics if the driver lacks one.
    let devices = catch_unwind(list)
        .map_err(|_| no_device("NVIDIA's driver is too old; install a newer one"))?
        .map_err(|error| no_device(&driver_message(error)))?;
    if devices.is_empty() {
        return Err(no_device(
            "NVIDIA's driver is there, but it lists no GPU; is CUDA_VISIBLE_DEVICES set?",
        ));
    }
    Ok(devices)
}

/// Loads a checkpoint onto devices that [`devices`] listed, at least one.
///
/// # Errors
/// Returns an error if the settings files or `KILN_KERNELS` are invalid, a GPU is too old or does
/// not open, or the checkpoint cannot be loaded onto it.
pub fn open(
    infos: &[DeviceInfo],
    parts: &CheckpointParts,
    options: LoadOptions,
) -> Result<Box<dyn Pipeline>, OpenError> {
    kiln_ops::read_settings(options.kernel_cache.as_deref()).map_err(|reason| {
        OpenError::Settings {
            backend: NAME,
            reason,
        }
    })?;
    let opened = infos.iter().map(|info| Ok((open_device(info)?, info)));
    let target = Target {
        backend: NAME,
        devices: opened.collect::<Result<_, OpenError>>()?,
        activations: None,
    };
    loading::open::<Cuda<f32, i32>>(target, parts, options)
}

fn open_device(info: &DeviceInfo) -> Result<CudaDevice, OpenError> {
    if info.dtypes.is_empty() {
        return Err(no_device(&format!(
            "{} is too old: kiln's kernels need compute capability 7.0 or above",
            info.name
        )));
    }
    let device = CudaDevice::new(info.index);
    loading::try_device::<Cuda<f32, i32>>(&device)
        .map_err(|report| no_device(&format!("{} does not open: {report}", info.name)))?;
    Ok(device)
}

fn no_device(reason: &str) -> OpenError {
    OpenError::NoDevice {
        backend: NAME,
        reason: reason.to_owned(),
    }
}

/// Message about the first missing part of CUDA's software, if any.
#[expect(
    unsafe_code,
    reason = "the functions only try to open a library and return whether that worked"
)]
fn missing_software() -> Option<&'static str> {
    // SAFETY: opening these libraries runs their initialisers, which CUDA itself relies on.
    let (driver, compiler) = unsafe {
        (
            cudarc::driver::sys::is_culib_present(),
            cudarc::nvrtc::sys::is_culib_present(),
        )
    };
    if !driver {
        Some("NVIDIA's driver library libcuda.so.1 was not found; install the driver")
    } else if !compiler {
        Some("CUDA's compiler library libnvrtc.so was not found; install CUDA's NVRTC")
    } else if !cuda_folder().is_some_and(|folder| has_headers(&folder)) {
        Some(
            "CUDA's headers (include/cuda_fp16.h, include/crt/mma.h) were not found; install \
             them, or set CUDA_PATH to the folder of CUDA",
        )
    } else {
        None
    }
}

/// Whether the folder has the headers of all kernels: burn's tensor core kernels include `crt/mma.h`,
/// which NVIDIA ships in a package of its own.
fn has_headers(cuda: &Path) -> bool {
    let headers = ["cuda_fp16.h", "crt/mma.h"];
    headers
        .iter()
        .all(|header| cuda.join("include").join(header).exists())
}

/// The folder in which burn's cuda backend looks for CUDA's headers.
fn cuda_folder() -> Option<PathBuf> {
    if let Some(folder) = env::var_os("CUDA_PATH") {
        return Some(folder.into());
    }
    if cfg!(windows) {
        return Some("C:/Program Files/NVIDIA GPU Computing Toolkit/CUDA/".into());
    }
    let installed = ["/usr/local/cuda", "/opt/cuda"].map(Path::new);
    let system = Path::new("/usr/bin/nvcc")
        .exists()
        .then_some("/usr".as_ref());
    let found = installed.into_iter().find(|folder| folder.exists());
    found.or(system).map(Path::to_owned)
}

fn driver_message(error: DriverError) -> String {
    let DriverError(code) = error;
    match code {
        CUresult::CUDA_ERROR_NO_DEVICE => "NVIDIA's driver finds no GPU".to_owned(),
        CUresult::CUDA_ERROR_SYSTEM_DRIVER_MISMATCH => {
            "the libraries of NVIDIA's driver and its kernel module differ in version; reboot, or \
             install the same version of both"
                .to_owned()
        }
        _ => format!("NVIDIA's driver returned {code:?}"),
    }
}

/// Version of NVRTC, such as `12.8`.
#[expect(unsafe_code, reason = "the compiler is called directly")]
fn compiler_version() -> String {
    let (mut major, mut minor): (c_int, c_int) = (0, 0);
    // SAFETY: the pointers are valid for the call.
    let answer = unsafe { cudarc::nvrtc::sys::nvrtcVersion(&raw mut major, &raw mut minor) };
    match answer.result() {
        Ok(()) => format!("{major}.{minor}"),
        Err(_) => "unknown".to_owned(),
    }
}

#[expect(unsafe_code, reason = "the driver is called directly")]
fn list() -> Result<Vec<DeviceInfo>, DriverError> {
    result::init()?;
    let mut version: c_int = 0;
    // SAFETY: the pointer is valid for the call.
    unsafe { cudarc::driver::sys::cuDriverGetVersion(&raw mut version).result()? };
    let nvrtc = compiler_version();
    let count = result::device::get_count()?;
    (0..count)
        .map(|ordinal| {
            let device = result::device::get(ordinal)?;
            // SAFETY: `get` returned the device.
            let (memory, major, minor) = unsafe {
                (
                    result::device::total_mem(device)?,
                    result::device::get_attribute(
                        device,
                        Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                    )?,
                    result::device::get_attribute(
                        device,
                        Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
                    )?,
                )
            };
            let name = result::device::get_name(device)?;
            Ok(DeviceInfo {
                index: ordinal as usize,
                kernels: Some(format!(
                    "cuda {version} nvrtc {nvrtc} sm_{major}{minor} {name}"
                )),
                name,
                detail: Some(format!(
                    "compute capability {major}.{minor}, driver for CUDA {}.{}",
                    version / 1000,
                    version % 1000 / 10
                )),
                memory: Some(memory as u64),
                dtypes: dtypes(major, minor),
                software: false,
            })
        })
        .collect()
}

/// The dtypes that a GPU of this compute capability has instructions for; CUDA's headers would emulate
/// the others in f32. None below 7.0, where kernels cannot take `__grid_constant__` arguments.
fn dtypes(major: i32, minor: i32) -> Vec<ModelDType> {
    let since = |dtype| match dtype {
        ModelDType::F32 | ModelDType::F16 => (7, 0),
        ModelDType::Bf16 => (8, 0),
    };
    ModelDType::ALL
        .into_iter()
        .filter(|dtype| (major, minor) >= since(*dtype))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dtypes_depend_on_the_compute_capability() {
        use ModelDType::{Bf16, F16, F32};
        assert_eq!(dtypes(9, 0), [F32, Bf16, F16]);
        assert_eq!(dtypes(8, 0), [F32, Bf16, F16]);
        assert_eq!(dtypes(7, 5), [F32, F16]);
        assert_eq!(dtypes(6, 1), []);
    }
}
