//! kiln's pipeline on burn's wgpu backend.

use std::panic::catch_unwind;

use burn_wgpu::graphics::{AutoGraphicsApi, GraphicsApi};
use burn_wgpu::{Wgpu, WgpuDevice};
use kiln_models::families::CheckpointParts;
use kiln_models::loading::{self, DeviceInfo, LoadOptions, ModelDType, OpenError, Target};
use kiln_models::pipeline::Pipeline;
use wgpu::DeviceType;

const NAME: &str = "wgpu";

/// Lists the adapters of the graphics API that burn uses: Metal on Apple's machines, Vulkan
/// elsewhere. GPUs come before adapters that compute on the CPU.
///
/// # Errors
/// Returns [`OpenError::NoDevice`] if there is no adapter or the graphics driver does not start.
pub fn devices() -> Result<Vec<DeviceInfo>, OpenError> {
    let devices: Vec<DeviceInfo> = adapters()?.into_iter().map(|(_, info)| info).collect();
    if devices.is_empty() {
        return Err(no_device(&format!(
            "no {} adapter was found; install the driver of the GPU",
            AutoGraphicsApi::backend()
        )));
    }
    Ok(devices)
}

/// Loads a checkpoint onto devices that [`devices`] listed, at least one.
///
/// # Errors
/// Returns an error if the settings files or `KILN_KERNELS` are invalid, a device does not open,
/// or the checkpoint cannot be loaded onto it.
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
    let adapters = adapters()?;
    let opened = infos
        .iter()
        .map(|info| Ok((open_device(&adapters, info)?, info)));
    let target = Target {
        backend: NAME,
        devices: opened.collect::<Result<_, OpenError>>()?,
        activations: None,
    };
    loading::open::<Wgpu<f32, i32>>(target, parts, options)
}

fn open_device(
    adapters: &[(WgpuDevice, DeviceInfo)],
    info: &DeviceInfo,
) -> Result<WgpuDevice, OpenError> {
    let (device, _) = adapters
        .iter()
        .find(|(_, found)| found == info)
        .ok_or_else(|| no_device(&format!("{} is no longer available", info.name)))?;
    loading::try_device::<Wgpu<f32, i32>>(device)
        .map_err(|report| no_device(&format!("{} does not open: {report}", info.name)))?;
    Ok(device.clone())
}

fn no_device(reason: &str) -> OpenError {
    OpenError::NoDevice {
        backend: NAME,
        reason: reason.to_owned(),
    }
}

/// Lists every adapter that burn can open, with burn's identifier of it. burn numbers the adapters of
/// each type separately, and has no identifier for adapters of unknown type and for software adapters
/// after the first.
fn adapters() -> Result<Vec<(WgpuDevice, DeviceInfo)>, OpenError> {
    let list = || {
        let api = AutoGraphicsApi::backend();
        let instance = wgpu::Instance::new(wgpu::InstanceDescriptor {
            backends: api.into(),
            ..wgpu::InstanceDescriptor::new_without_display_handle()
        });
        cubecl_common::future::block_on(instance.enumerate_adapters(api.into()))
    };
    let adapters =
        catch_unwind(list).map_err(|_| no_device("the graphics driver does not start"))?;
    let of_type = |wanted| {
        adapters
            .iter()
            .filter(move |adapter| adapter.get_info().device_type == wanted)
            .enumerate()
    };
    let discrete = of_type(DeviceType::DiscreteGpu).map(|(i, it)| (WgpuDevice::DiscreteGpu(i), it));
    let integrated =
        of_type(DeviceType::IntegratedGpu).map(|(i, it)| (WgpuDevice::IntegratedGpu(i), it));
    let virtual_ = of_type(DeviceType::VirtualGpu).map(|(i, it)| (WgpuDevice::VirtualGpu(i), it));
    let software = of_type(DeviceType::Cpu)
        .take(1)
        .map(|(_, it)| (WgpuDevice::Cpu, it));
    Ok(discrete
        .chain(integrated)
        .chain(virtual_)
        .chain(software)
        .enumerate()
        .map(|(index, (device, adapter))| (device, describe(index, adapter)))
        .collect())
}

fn describe(index: usize, adapter: &wgpu::Adapter) -> DeviceInfo {
    let info = adapter.get_info();
    let mut dtypes = vec![ModelDType::F32];
    // WGSL has no bf16.
    if adapter.features().contains(wgpu::Features::SHADER_F16) {
        dtypes.push(ModelDType::F16);
    }
    let detail = format!("{} {} {}", info.backend, info.driver, info.driver_info);
    DeviceInfo {
        index,
        kernels: Some(format!("wgpu {} {detail}", info.name)),
        name: info.name,
        detail: Some(detail.trim_end().to_owned()),
        memory: memory(adapter),
        dtypes,
        software: info.device_type == DeviceType::Cpu,
    }
}

/// Size of the largest device-local heap in bytes, from Vulkan: wgpu has no query for it.
#[cfg(target_os = "linux")]
#[expect(unsafe_code, reason = "Vulkan is called directly")]
fn memory(adapter: &wgpu::Adapter) -> Option<u64> {
    // SAFETY: nothing is created or destroyed through the handles, which live as long as `adapter`.
    let properties = unsafe {
        let vulkan = adapter.as_hal::<wgpu::hal::api::Vulkan>()?;
        let instance = vulkan.shared_instance().raw_instance();
        instance.get_physical_device_memory_properties(vulkan.raw_physical_device())
    };
    let heaps = properties.memory_heaps_as_slice().iter();
    heaps
        .filter(|heap| heap.flags.contains(ash::vk::MemoryHeapFlags::DEVICE_LOCAL))
        .map(|heap| heap.size)
        .max()
}

#[cfg(not(target_os = "linux"))]
fn memory(_adapter: &wgpu::Adapter) -> Option<u64> {
    None
}
