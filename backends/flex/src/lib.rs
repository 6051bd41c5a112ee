//! kiln's pipeline on burn's CPU backend flex.

use burn_flex::{Flex, FlexDevice};
use burn_tensor::DType;
use kiln_models::families::CheckpointParts;
use kiln_models::loading::{self, DeviceInfo, LoadOptions, ModelDType, OpenError, Target};
use kiln_models::pipeline::Pipeline;

/// The CPU. Weights are kept in any of the types.
pub fn devices() -> Result<Vec<DeviceInfo>, OpenError> {
    Ok(vec![DeviceInfo::cpu(&ModelDType::ALL)])
}

/// Loads a checkpoint.
///
/// Weights stay in the model's type, without a copy if the checkpoint is in it. Activations are
/// f32 always, and linear layers round them to bf16 if their weights are in it: products are what
/// CPUs have faster arithmetic for.
pub fn open(
    info: &DeviceInfo,
    parts: &CheckpointParts,
    options: LoadOptions,
) -> Result<Box<dyn Pipeline>, OpenError> {
    let target = Target {
        backend: "flex",
        device: FlexDevice,
        info,
        activations: Some(DType::F32),
    };
    loading::open::<Flex>(target, parts, options)
}
