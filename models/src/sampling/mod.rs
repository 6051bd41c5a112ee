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

#[cfg(test)]
mod tests {
    use burn_flex::{Flex, FlexDevice};

    use super::*;
    use crate::noise::{NoiseGenerator, randn_nth};

    const NOISE: Noise = Noise {
        seed: 9,
        generator: NoiseGenerator::Cpu,
    };

    fn schedule(stochastic: bool) -> Schedule {
        Schedule {
            sigmas: vec![0.9, 0.4, 0.0],
            timesteps: vec![900.0, 400.0],
            stochastic,
        }
    }

    fn values(tensor: Tensor<Flex, 2>) -> Vec<f32> {
        tensor.into_data().to_vec().unwrap()
    }

    fn step(stochastic: bool, step: usize) -> [Vec<f32>; 2] {
        let device = FlexDevice;
        let latents = Tensor::<Flex, 2>::from_data([[1.0, -2.0], [0.5, 3.0]], &device);
        let velocity = Tensor::<Flex, 2>::from_data([[0.5, 1.0], [-1.0, 2.0]], &device);
        let (latents, velocity) =
            sampler_step(&schedule(stochastic), NOISE, step, latents, velocity);
        [values(latents), values(velocity)]
    }

    #[test]
    fn the_velocity_leads_back_to_the_predicted_image() {
        // latents - sigma · velocity
        let clean = [[0.55, -2.9, 1.4, 1.2], [0.8, -2.4, 0.9, 2.2]];
        let next = [0.4, 0.0];
        for stochastic in [false, true] {
            for index in [0, 1] {
                let [latents, velocity] = step(stochastic, index);
                for ((latent, velocity), clean) in latents.iter().zip(&velocity).zip(clean[index]) {
                    let back = latent - next[index] * velocity;
                    assert!(
                        (back - clean).abs() < 1e-6,
                        "{stochastic} {index}: {back} {clean}"
                    );
                }
            }
        }
    }

    #[test]
    fn the_noise_of_a_step_depends_on_the_seed_and_the_step_alone() {
        let clean = [0.55, -2.9, 1.4, 1.2];
        let noise = randn_nth(NoiseGenerator::Cpu, 9, 1, 4);
        let [latents, _] = step(true, 0);
        for ((latent, noise), clean) in latents.iter().zip(noise).zip(clean) {
            assert!((latent - (0.6 * clean + 0.4 * noise)).abs() < 1e-6);
        }
        assert_eq!(step(true, 0), step(true, 0));
        // The last step adds none.
        assert_eq!(step(true, 1)[0], [0.8, -2.4, 0.9, 2.2]);
    }
}
