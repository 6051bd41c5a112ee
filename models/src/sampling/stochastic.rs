//! The stochastic sampler: each step predicts the clean image and adds fresh noise to it. It is that of
//! consistency models, and of `FlowMatchEulerDiscreteScheduler` with `stochastic_sampling`.

use burn::tensor::backend::Backend;
use burn::tensor::{DType, Tensor, TensorData};

use super::Schedule;
use crate::job::Noise;
use crate::noise::randn_nth;

/// Moves latents from the noise level of step `step` to the next one: with
/// `clean = latents - sigma[step] · velocity`, the latents are
/// `(1 - sigma[step + 1]) · clean + sigma[step + 1] · noise`, and the velocity is `noise - clean`, from
/// the clean image to the new latents.
///
/// The noise continues the generator's stream after the starting noise, one draw in the shape of the
/// packed latents for each step, as torch's default generator does. It depends on seed and step alone, so
/// a step that is repeated has the same noise again. The last step needs none.
///
/// # Shapes
/// - latents, velocity and both outputs: `[images · tokens, channels]`, f32
pub(super) fn stochastic_step<B: Backend>(
    schedule: &Schedule,
    noise: Noise,
    step: usize,
    latents: Tensor<B, 2>,
    velocity: Tensor<B, 2>,
) -> (Tensor<B, 2>, Tensor<B, 2>) {
    let (sigma, next) = (schedule.sigmas[step], schedule.sigmas[step + 1]);
    let clean = latents - velocity.clone() * sigma;
    if next == 0.0 {
        return (clean, velocity);
    }
    let shape = clean.dims();
    let count = shape.iter().product();
    let values = randn_nth(noise.generator, noise.seed, step + 1, count);
    let fresh = Tensor::from_data(
        TensorData::new(values, shape),
        (&clean.device(), DType::F32),
    );
    let noisy = clean.clone() * (1.0 - next) + fresh.clone() * next;
    (noisy, fresh - clean)
}
