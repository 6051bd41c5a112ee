//! kiln's painter on burn's cuda backend.

use std::panic::{AssertUnwindSafe, catch_unwind};

use burn_cuda::{Cuda, CudaDevice};
use burn_tensor::backend::Backend;
use kiln_models::loading::{self, LoadOptions, OpenError};
use kiln_models::painter::Painter;
use kiln_models::qwen_image::CheckpointParts;

const NAME: &str = "cuda";

/// Loads a checkpoint onto the default device.
pub fn open(parts: &CheckpointParts, options: LoadOptions) -> Result<Box<dyn Painter>, OpenError> {
    loading::open::<Cuda<f32, i32>>(NAME, open_device()?, None, parts, options)
}

/// burn panics where there is no driver, so the driver's library is looked for first.
fn open_device() -> Result<CudaDevice, OpenError> {
    let no_device = |reason: &str| OpenError::NoDevice {
        backend: NAME,
        reason: reason.to_owned(),
    };
    #[expect(
        unsafe_code,
        reason = "the function only tries to open libcuda and says if it could"
    )]
    // SAFETY: opening NVIDIA's driver library runs its initialisers, which CUDA itself relies on.
    let driver = unsafe { cudarc::driver::sys::is_culib_present() };
    if !driver {
        return Err(no_device(
            "NVIDIA's driver library libcuda.so.1 was not found; install the driver",
        ));
    }
    let device = CudaDevice::default();
    catch_unwind(AssertUnwindSafe(|| Cuda::<f32, i32>::sync(&device)))
        .map_err(|_| no_device("the driver is there, but opening the first GPU failed"))?
        .map_err(|error| no_device(&format!("{error:?}")))?;
    Ok(device)
}
