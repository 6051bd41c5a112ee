//! kiln's painter on burn's CPU backend ndarray: slow, and independent of flex.

use burn_ndarray::{NdArray, NdArrayDevice};
use kiln_models::loading::{self, LoadOptions, OpenError};
use kiln_models::painter::Painter;
use kiln_models::qwen_image::CheckpointParts;

/// Loads a checkpoint, in f32: ndarray has no narrower type.
pub fn open(parts: &CheckpointParts, options: LoadOptions) -> Result<Box<dyn Painter>, OpenError> {
    loading::open::<NdArray>("ndarray", NdArrayDevice::Cpu, None, parts, options)
}
