//! kiln's pipeline on burn's CPU backend flex.

use burn_flex::{Flex, FlexDevice};
use burn_tensor::DType;
use kiln_models::families::CheckpointParts;
use kiln_models::loading::{self, DeviceInfo, LoadOptions, ModelDType, OpenError, Target};
use kiln_models::pipeline::Pipeline;

/// Lists the CPU, with weights in any dtype.
pub fn devices() -> Result<Vec<DeviceInfo>, OpenError> {
    Ok(vec![DeviceInfo::cpu(&ModelDType::ALL)])
}

/// Loads a checkpoint onto the CPU. Several devices are the CPU several times: they share the weights,
/// and each computes with its part of the cores.
///
/// Weights have the model's dtype, without a copy if the checkpoint has the same. Activations are
/// always f32; linear layers with bf16 weights round their input to bf16, because matrix products are
/// what CPUs have bf16 instructions for.
///
/// # Errors
/// Returns an error if the checkpoint is invalid or does not fit the memory.
pub fn open(
    infos: &[DeviceInfo],
    parts: &CheckpointParts,
    options: LoadOptions,
) -> Result<Box<dyn Pipeline>, OpenError> {
    let target = Target {
        backend: "flex",
        devices: infos.iter().map(|info| (FlexDevice, info)).collect(),
        activations: Some(DType::F32),
    };
    loading::open::<Flex>(target, parts, options)
}
