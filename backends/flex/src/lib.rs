//! kiln's painter on burn's CPU backend flex.

use burn_flex::{Flex, FlexDevice};
use burn_tensor::DType;
use kiln_models::loading::{self, LoadOptions, OpenError};
use kiln_models::painter::Painter;
use kiln_models::qwen_image::CheckpointParts;

/// Loads a checkpoint.
///
/// Weights stay in the model's type, without a copy if the checkpoint is in it. Activations are
/// f32 always: CPUs have no faster arithmetic in narrower types, and the picture is closer to the
/// exact one.
pub fn open(parts: &CheckpointParts, options: LoadOptions) -> Result<Box<dyn Painter>, OpenError> {
    loading::open::<Flex>("flex", FlexDevice, Some(DType::F32), parts, options)
}
