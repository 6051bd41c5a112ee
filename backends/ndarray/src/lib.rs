//! kiln's painter on burn's CPU backend ndarray: slow, and independent of flex.

use burn_ndarray::{NdArray, NdArrayDevice};
use kiln_models::Precision;
use kiln_models::loading::{LoadOptions, ModelDType, OpenError};
use kiln_models::painter::Painter;
use kiln_models::qwen_image::{CheckpointParts, PainterSettings, QwenImage};

/// Loads a checkpoint in f32, the only type ndarray has.
pub fn open(parts: &CheckpointParts, options: LoadOptions) -> Result<Box<dyn Painter>, OpenError> {
    let model = match options.dtype.unwrap_or(ModelDType::F32) {
        ModelDType::F32 => ModelDType::F32.dtype(),
        other => {
            let (backend, supported) = ("ndarray", "f32");
            return Err(OpenError::DType {
                backend,
                dtype: other.name(),
                supported,
            });
        }
    };
    let precision = Precision {
        model,
        activations: model,
    };
    let settings = PainterSettings {
        precision,
        vae: options.vae,
    };
    Ok(Box::new(QwenImage::<NdArray>::load(
        parts,
        NdArrayDevice::Cpu,
        settings,
    )?))
}
