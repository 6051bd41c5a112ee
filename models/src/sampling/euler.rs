//! The Euler sampler, which Qwen-Image's pipelines use.

use burn::tensor::Tensor;
use burn::tensor::backend::Backend;

use super::Schedule;

/// Moves latents from the noise level of step `step` to the next one:
/// `latents + (sigma[step + 1] - sigma[step]) · velocity`, as `FlowMatchEulerDiscreteScheduler` does.
///
/// # Shapes
/// - latents, velocity and output: `[tokens, channels]`, f32
pub(super) fn euler_step<B: Backend>(
    schedule: &Schedule,
    step: usize,
    latents: Tensor<B, 2>,
    velocity: Tensor<B, 2>,
) -> Tensor<B, 2> {
    let sigmas = &schedule.sigmas;
    latents + velocity * (sigmas[step + 1] - sigmas[step])
}
