//! Draws standard normal values as torch does, so that a seed gives the same noise as in diffusers.
//!
//! [`randn`] computes what `torch.randn` does with a freshly seeded generator of either device. The
//! values are in the order of a contiguous tensor: one draw of `n * 16 * h * w` values is the latent
//! `[n, 1, 16, h, w]`.
//!
//! Agreement with torch 2.15.0, as measured:
//!
//! - CPU, f32: the same bits (83.5 million values compared) as torch on x86-64 with AVX2 or AVX-512.
//!   In draws of less than 16 values the platform's f64 functions could change a last bit. Where torch
//!   has no AVX2 kernel, 38 % of its values differ by up to 2.4e-6, which is any number of ulps near
//!   zero.
//! - CPU, bf16: torch's draw in bf16 equals the f32 draw, rounded, if `count` is below 16 or a multiple
//!   of 16 (as for every latent). For other counts torch takes the last 16 values from another part of
//!   the stream.
//! - CUDA: the same random integers, and the same four decimals as values printed from GPUs; see
//!   [`randn_cuda`]. By torch's source a bf16 draw is the f32 draw, rounded.

mod mt19937;
mod philox;

pub use philox::{CudaLaunch, randn_cuda};
use serde::{Deserialize, Serialize};

/// The torch generator that a seed is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum NoiseGenerator {
    /// `torch.Generator("cpu")`: MT19937, seeded with the low 32 bits.
    Cpu,
    /// `torch.Generator("cuda")`: Philox4x32-10, on the GPU of [`CudaLaunch::default`].
    Cuda,
}

impl NoiseGenerator {
    /// The generator's device in torch: `cpu` or `cuda`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Cuda => "cuda",
        }
    }
}

/// Draws `count` values: `torch.randn(count, generator=torch.Generator(device).manual_seed(seed))` in
/// f32.
pub fn randn(generator: NoiseGenerator, seed: u64, count: usize) -> Vec<f32> {
    randn_nth(generator, seed, 0, count)
}

/// Draws `count` values as the same generator does after it has made `draws` draws of `count` values.
/// The time grows slowly with `draws` for [`NoiseGenerator::Cpu`], which has to pass over their integers.
pub fn randn_nth(generator: NoiseGenerator, seed: u64, draws: usize, count: usize) -> Vec<f32> {
    match generator {
        NoiseGenerator::Cpu => mt19937::randn(seed, draws, count),
        NoiseGenerator::Cuda => philox::randn_nth(seed, draws, count, CudaLaunch::default()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use safetensors::SafeTensors;

    /// Made by `tests/reference/make_noise_fixtures.py`. A tensor's name gives the draw's arguments:
    /// `cpu/<seed>/<count>`, `cuda/<seed>/<count>/<multiprocessors>`; `cpu_nth/<seed>/<count>/<draws>` and
    /// `cuda_nth/<seed>/<count>/<multiprocessors>/<draws>` come after `draws` draws of `count` values.
    const FIXTURE: &str = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../tests/fixtures/noise/noise_torch_2_15_0.safetensors"
    );

    /// Calls `check(parts of the name after the kind, bytes)` for each tensor of a kind.
    fn for_each(kind: &str, mut check: impl FnMut(&[u64], &[u8])) {
        let file = std::fs::read(FIXTURE).unwrap();
        let mut found = 0;
        for (name, tensor) in SafeTensors::deserialize(&file).unwrap().tensors() {
            let mut parts = name.split('/');
            if parts.next() == Some(kind) {
                let draw: Vec<u64> = parts.map(|part| part.parse().unwrap()).collect();
                check(&draw, tensor.data());
                found += 1;
            }
        }
        assert!(found > 0, "no {kind} in {FIXTURE}");
    }

    fn floats(bytes: &[u8]) -> Vec<f32> {
        bytes
            .as_chunks()
            .0
            .iter()
            .copied()
            .map(f32::from_le_bytes)
            .collect()
    }

    /// Steps between two floats, counted over their bit patterns.
    fn ulps(a: f32, b: f32) -> u64 {
        let ordered = |value: f32| {
            let magnitude = i64::from(value.abs().to_bits());
            if value.is_sign_negative() {
                -magnitude
            } else {
                magnitude
            }
        };
        ordered(a).abs_diff(ordered(b))
    }

    #[test]
    fn cpu_draws_are_those_of_torch() {
        for_each("cpu", |draw, bytes| {
            let (seed, count) = (draw[0], draw[1] as usize);
            let (values, expected) = (randn(NoiseGenerator::Cpu, seed, count), floats(bytes));
            assert_eq!(values.len(), expected.len());
            // Short draws go through the platform's sine, cosine and logarithm.
            let allowed = u64::from(count < 16);
            for (value, expected) in values.iter().zip(expected) {
                assert!(
                    ulps(*value, expected) <= allowed,
                    "{draw:?}: {value} for {expected}"
                );
            }
        });
    }

    #[test]
    fn long_cpu_draws_have_the_checksum_of_torch() {
        for_each("cpu_checksum", |draw, bytes| {
            let checksum = randn(NoiseGenerator::Cpu, draw[0], draw[1] as usize)
                .iter()
                .zip(1_u64..)
                .fold(0_u64, |sum, (value, weight)| {
                    sum.wrapping_add(u64::from(value.to_bits()).wrapping_mul(weight))
                });
            assert_eq!(checksum.to_le_bytes(), bytes, "{draw:?}");
        });
    }

    #[test]
    fn cuda_draws_are_those_of_a_simulated_launch() {
        for_each("cuda", |draw, bytes| {
            let launch = CudaLaunch {
                multiprocessors: draw[2] as u32,
                threads_per_multiprocessor: 2048,
            };
            let (values, expected) = (randn_cuda(draw[0], draw[1] as usize, launch), floats(bytes));
            assert_eq!(values.len(), expected.len());
            for (value, expected) in values.iter().zip(expected) {
                assert!(
                    (value - expected).abs() < 1e-6,
                    "{draw:?}: {value} for {expected}"
                );
            }
        });
    }

    #[test]
    fn later_draws_continue_the_stream() {
        for_each("cpu_nth", |draw, bytes| {
            let (seed, count) = (draw[0], draw[1] as usize);
            let values = randn_nth(NoiseGenerator::Cpu, seed, draw[2] as usize, count);
            let allowed = u64::from(count < 16);
            assert_eq!(values.len(), count);
            for (value, expected) in values.iter().zip(floats(bytes)) {
                assert!(
                    ulps(*value, expected) <= allowed,
                    "{draw:?}: {value} for {expected}"
                );
            }
        });
        for_each("cuda_nth", |draw, bytes| {
            let launch = CudaLaunch {
                multiprocessors: draw[2] as u32,
                threads_per_multiprocessor: 2048,
            };
            let values = philox::randn_nth(draw[0], draw[3] as usize, draw[1] as usize, launch);
            assert_eq!(values.len(), draw[1] as usize);
            for (value, expected) in values.iter().zip(floats(bytes)) {
                assert!(
                    (value - expected).abs() < 1e-6,
                    "{draw:?}: {value} for {expected}"
                );
            }
        });
    }

    #[test]
    fn cuda_is_the_draw_on_the_default_gpu() {
        let count = 1000;
        let expected = randn_cuda(3, count, CudaLaunch::H100);
        assert_eq!(randn(NoiseGenerator::Cuda, 3, count), expected);
    }

    #[test]
    fn only_low_bits_of_a_cpu_seed_count() {
        let short = randn(NoiseGenerator::Cpu, 7, 100);
        assert_eq!(randn(NoiseGenerator::Cpu, (1 << 32) + 7, 100), short);
        assert_ne!(
            randn(NoiseGenerator::Cuda, (1 << 32) + 7, 4),
            randn(NoiseGenerator::Cuda, 7, 4)
        );
    }

    #[test]
    fn empty_draws_are_empty() {
        assert!(randn(NoiseGenerator::Cpu, 0, 0).is_empty());
        assert!(randn(NoiseGenerator::Cuda, 0, 0).is_empty());
    }
}
