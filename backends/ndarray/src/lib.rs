//! kiln's pipeline on burn's CPU backend ndarray: slow, and independent of flex.

use burn_ndarray::{NdArray, NdArrayDevice};
use kiln_models::families::CheckpointParts;
use kiln_models::loading::{self, DeviceInfo, LoadOptions, ModelDType, OpenError, Target};
use kiln_models::pipeline::Pipeline;

/// The CPU, in f32: ndarray has no narrower type.
pub fn devices() -> Result<Vec<DeviceInfo>, OpenError> {
    Ok(vec![DeviceInfo::cpu(&[ModelDType::F32])])
}

/// Loads a checkpoint.
pub fn open(
    info: &DeviceInfo,
    parts: &CheckpointParts,
    options: LoadOptions,
) -> Result<Box<dyn Pipeline>, OpenError> {
    let target = Target {
        backend: "ndarray",
        device: NdArrayDevice::Cpu,
        info,
        activations: None,
    };
    loading::open::<NdArray>(target, parts, options)
}
