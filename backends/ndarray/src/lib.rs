//! kiln's pipeline on burn's CPU backend ndarray: slow, and independent of flex, so that it serves as
//! a second reference.

use burn_ndarray::{NdArray, NdArrayDevice};
use kiln_models::families::CheckpointParts;
use kiln_models::loading::{self, DeviceInfo, LoadOptions, ModelDType, OpenError, Target};
use kiln_models::pipeline::Pipeline;

/// Lists the CPU, in f32 only: ndarray has no bf16 and f16.
pub fn devices() -> Result<Vec<DeviceInfo>, OpenError> {
    Ok(vec![DeviceInfo::cpu(&[ModelDType::F32])])
}

/// Loads a checkpoint onto the CPU. Several devices are the CPU several times: they share the weights,
/// and each computes with its part of the cores.
///
/// # Errors
/// Returns an error if the checkpoint is invalid or does not fit the memory.
pub fn open(
    infos: &[DeviceInfo],
    parts: &CheckpointParts,
    options: LoadOptions,
) -> Result<Box<dyn Pipeline>, OpenError> {
    let target = Target {
        backend: "ndarray",
        devices: infos
            .iter()
            .map(|info| (NdArrayDevice::Cpu, info))
            .collect(),
        activations: None,
    };
    loading::open::<NdArray>(target, parts, options)
}
