//! kiln's painter on burn's wgpu backend.

use std::panic::{AssertUnwindSafe, catch_unwind};

use burn_tensor::backend::Backend;
use burn_wgpu::{Wgpu, WgpuDevice};
use kiln_models::Precision;
use kiln_models::loading::{LoadOptions, ModelDType, OpenError};
use kiln_models::painter::Painter;
use kiln_models::qwen_image::{CheckpointParts, PainterSettings, QwenImage};

const NAME: &str = "wgpu";

/// Loads a checkpoint onto the default device, in the checkpoint's own type unless another is
/// asked for.
pub fn open(parts: &CheckpointParts, options: LoadOptions) -> Result<Box<dyn Painter>, OpenError> {
    let device = open_device()?;
    let wanted = options
        .dtype
        .unwrap_or_else(|| ModelDType::of_checkpoint(parts));
    let model = wanted.dtype();
    if !Wgpu::<f32, i32>::supports_dtype(&device, model) {
        let (backend, supported) = (NAME, "f32 always works");
        return Err(OpenError::DType {
            backend,
            dtype: wanted.name(),
            supported,
        });
    }
    let precision = Precision {
        model,
        activations: model,
    };
    let settings = PainterSettings {
        precision,
        vae: options.vae,
    };
    Ok(Box::new(QwenImage::<Wgpu<f32, i32>>::load(
        parts, device, settings,
    )?))
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
