//! Classifier-free guidance with Qwen-Image's norm rescale, as `QwenImagePipeline` of diffusers
//! computes it.

use burn::tensor::Tensor;
use burn::tensor::backend::Backend;

/// Computes `c = negative + scale · (positive - negative)`, then rescales each token to the norm of
/// the positive prediction: `c · ‖positive‖₂ / ‖c‖₂`.
///
/// # Shapes
/// - positive, negative and output: `[tokens, channels]`, f32
pub fn true_cfg<B: Backend>(
    positive: Tensor<B, 2>,
    negative: Tensor<B, 2>,
    scale: f64,
) -> Tensor<B, 2> {
    let combined = negative.clone() + (positive.clone() - negative) * scale;
    let norm = |x: &Tensor<B, 2>| x.clone().square().sum_dim(1).sqrt();
    let rescale = norm(&positive) / norm(&combined);
    combined * rescale
}
