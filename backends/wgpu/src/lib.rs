//! kiln's painter on burn's wgpu backend.

use std::panic::{AssertUnwindSafe, catch_unwind};

use burn_tensor::backend::Backend;
use burn_wgpu::{Wgpu, WgpuDevice};
use kiln_models::loading::{self, LoadOptions, OpenError};
use kiln_models::painter::Painter;
use kiln_models::qwen_image::CheckpointParts;

const NAME: &str = "wgpu";

/// Loads a checkpoint onto the default device.
pub fn open(parts: &CheckpointParts, options: LoadOptions) -> Result<Box<dyn Painter>, OpenError> {
    loading::open::<Wgpu<f32, i32>>(NAME, open_device()?, None, parts, options)
}

/// wgpu panics where no adapter answers.
fn open_device() -> Result<WgpuDevice, OpenError> {
    let no_device = |reason: &str| OpenError::NoDevice {
        backend: NAME,
        reason: reason.to_owned(),
    };
    let device = WgpuDevice::default();
    catch_unwind(AssertUnwindSafe(|| Wgpu::<f32, i32>::sync(&device)))
        .map_err(|_| no_device("no Vulkan, Metal, DirectX 12 or OpenGL adapter answers"))?
        .map_err(|error| no_device(&format!("{error:?}")))?;
    Ok(device)
}
