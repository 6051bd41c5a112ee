//! Sampling: the noise levels that the denoising loop passes through, and the step between two of
//! them. Schedules are host arithmetic.

mod euler;
mod schedule;
mod stochastic;

use burn::tensor::Tensor;
use burn::tensor::backend::Backend;

use crate::job::Noise;

pub(crate) use schedule::round_to;
pub use schedule::{Schedule, SchedulerConfig, TimeShift};

/// Moves latents from the noise level of step `step` to the next one, and returns them with the velocity
/// from the clean image to them: `latents - sigma[step + 1] · velocity` is the clean image that the step
/// predicted.
///
/// # Shapes
/// - latents, velocity and both outputs: `[images · tokens, channels]`, f32
pub(crate) fn sampler_step<B: Backend>(
    schedule: &Schedule,
    noise: Noise,
    step: usize,
    latents: Tensor<B, 2>,
    velocity: Tensor<B, 2>,
) -> (Tensor<B, 2>, Tensor<B, 2>) {
    if schedule.stochastic {
        return stochastic::stochastic_step(schedule, noise, step, latents, velocity);
    }
    let latents = euler::euler_step(schedule, step, latents, velocity.clone());
    (latents, velocity)
}
