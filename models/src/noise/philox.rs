//! The noise of a torch CUDA generator: Philox4x32-10 over the threads of a kernel launch.
//!
//! The counter-based generator is that of Salmon et al., "Parallel random numbers: as easy as
//! 1, 2, 3" (SC11); its use here follows `distribution_nullary_kernel` in
//! `ATen/native/cuda/DistributionTemplates.h`, which calls cuRAND's `curand_normal4`.

/// The two fields of `cudaDeviceProp` that determine how many threads torch starts.
///
/// They affect only draws of more than [`Self::wave`] values, in which a thread computes several: on an
/// H100 more than 270336 values. The 262144 values of a 1024x1024 image do not depend on them, the
/// 440896 of a 1328x1328 image do. A draw that fits in one wave of two GPUs is the same on both.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CudaLaunch {
    /// `multiProcessorCount`.
    pub multiprocessors: u32,
    /// `maxThreadsPerMultiProcessor`.
    pub threads_per_multiprocessor: u32,
}

impl CudaLaunch {
    /// H100 SXM and H200.
    pub const H100: Self = Self {
        multiprocessors: 132,
        threads_per_multiprocessor: 2048,
    };

    const BLOCK: u32 = 256;

    /// The number of threads that the GPU runs at once: the largest draw that is the same on every
    /// larger GPU.
    pub fn wave(self) -> u64 {
        let blocks = self.threads_per_multiprocessor / Self::BLOCK;
        u64::from(self.multiprocessors) * u64::from(blocks) * u64::from(Self::BLOCK)
    }

    /// The number of threads of a draw of `count` values: whole blocks, at most one wave.
    fn threads(self, count: u64) -> u64 {
        count
            .next_multiple_of(u64::from(Self::BLOCK))
            .min(self.wave())
    }
}

impl Default for CudaLaunch {
    fn default() -> Self {
        Self::H100
    }
}

/// Draws `count` standard normal values, as a fresh CUDA generator with this seed does in f32 on a GPU
/// of this size.
///
/// Each thread `t` of `T` takes four values at a time from its own stream and writes them at `t`,
/// `t + T`, `t + 2T` and `t + 3T`, then at positions `4T` higher, and so on.
///
/// The random integers are exact. The values can differ by about 1e-6: a GPU computes sine and cosine
/// with its fast `__sincosf` (absolute error about 2^-21 each), while this function rounds them from
/// f64. torch splits draws of more than 2^29 values into several launches; this function does not.
///
/// # Panics
/// If the GPU cannot run a block of 256 threads.
pub fn randn_cuda(seed: u64, count: usize, launch: CudaLaunch) -> Vec<f32> {
    randn_nth(seed, 0, count, launch)
}

/// As [`randn_cuda`], with a generator that has made `draws` draws of `count` values: each moves the
/// generator's offset by what its threads take.
pub(super) fn randn_nth(seed: u64, draws: usize, count: usize, launch: CudaLaunch) -> Vec<f32> {
    assert!(
        launch.wave() > 0,
        "{launch:?} cannot run a block of {} threads",
        CudaLaunch::BLOCK
    );
    let count = count as u64;
    let threads = launch.threads(count);
    let first = draws as u64 * count.div_ceil(4 * threads.max(1));
    (0..count)
        .map(|index| normal_at(seed, first, index, threads))
        .collect()
}

/// Computes the value at one index of a draw by `threads` threads, which begin at position `first` of
/// their streams.
fn normal_at(seed: u64, first: u64, index: u64, threads: u64) -> f32 {
    let (thread, turn) = (index % threads, index / threads);
    let words = philox4x32_10(seed, thread, first + turn / 4);
    match turn % 4 {
        0 => box_muller(words[0], words[1]).0,
        1 => box_muller(words[0], words[1]).1,
        2 => box_muller(words[2], words[3]).0,
        _ => box_muller(words[2], words[3]).1,
    }
}

/// cuRAND's `_curand_box_muller`: the sine first. The angle is rounded to f32, as there.
fn box_muller(radius_bits: u32, angle_bits: u32) -> (f32, f32) {
    const UNIT: f32 = 1.0 / 4_294_967_296.0;
    const TURN: f32 = UNIT * std::f32::consts::TAU;

    let uniform = (radius_bits as f32).mul_add(UNIT, UNIT / 2.0);
    let angle = f64::from((angle_bits as f32).mul_add(TURN, TURN / 2.0));
    let radius = (-2.0 * f64::from(uniform).ln() as f32).sqrt();
    // Adding zero, torch's mean, makes a negative zero positive.
    (
        radius * angle.sin() as f32 + 0.0,
        radius * angle.cos() as f32 + 0.0,
    )
}

/// Four random words: the seed is the key, and the 128-bit counter is `position` in its low half and
/// `stream` (cuRAND's subsequence, the thread) in its high half.
fn philox4x32_10(seed: u64, stream: u64, position: u64) -> [u32; 4] {
    let mut key = [seed as u32, (seed >> 32) as u32];
    let mut counter = [
        position as u32,
        (position >> 32) as u32,
        stream as u32,
        (stream >> 32) as u32,
    ];
    for _ in 0..10 {
        let first = u64::from(counter[0]) * 0xd251_1f53;
        let second = u64::from(counter[2]) * 0xcd9e_8d57;
        counter = [
            (second >> 32) as u32 ^ counter[1] ^ key[0],
            second as u32,
            (first >> 32) as u32 ^ counter[3] ^ key[1],
            first as u32,
        ];
        key = [
            key[0].wrapping_add(0x9e37_79b9),
            key[1].wrapping_add(0xbb67_ae85),
        ];
    }
    counter
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rounded to four decimals, as torch prints.
    fn assert_printed(values: &[f32], printed: &[f32]) {
        for (value, printed) in values.iter().zip(printed) {
            assert!(
                (value - printed).abs() < 6e-5,
                "{value} is printed as {printed}"
            );
        }
        assert_eq!(values.len(), printed.len());
    }

    #[test]
    fn words_are_the_known_answers() {
        // `kat_vectors` of Random123, philox4x32 with 10 rounds.
        let zeros = [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8];
        assert_eq!(philox4x32_10(0, 0, 0), zeros);
        let ones = [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd];
        assert_eq!(philox4x32_10(u64::MAX, u64::MAX, u64::MAX), ones);
        let pi = [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1];
        let (position, stream) = (0x85a3_08d3_243f_6a88, 0x0370_7344_1319_8a2e);
        assert_eq!(philox4x32_10(0x299f_31d0_a409_3822, stream, position), pi);
    }

    #[test]
    fn first_values_are_those_that_gpus_printed() {
        // Seed 0, as printed by the notebook of a CUDA MODE lecture on fused kernels.
        let seed_0 = [
            -0.9247, -0.4253, -2.6438, 0.1452, -0.1209, -0.5797, -0.6229, -0.3284,
        ];
        assert_printed(&randn_cuda(0, 8, CudaLaunch::H100), &seed_0);
        // https://github.com/pytorch/pytorch/issues/79496
        assert_printed(
            &randn_cuda(10, 3, CudaLaunch::H100),
            &[-0.1029, 1.6810, -0.2708],
        );
    }

    #[test]
    fn rows_are_those_that_a_gpu_printed() {
        // https://github.com/pytorch/pytorch/issues/158398: the ends of rows of `[1, 64, 2048]`
        // values with seed 42. Of all launches of up to 512 blocks only one of 168 gives them,
        // which is the size of an RTX 3060.
        let rows = [
            (0, [0.1940, 2.1614, -0.1721, 1.4540, -2.7733, -0.8932]),
            (1, [-0.4574, 0.8063, 0.1580, 0.1124, 0.2769, -1.2535]),
            (2, [1.1346, -0.6329, -0.9147, -1.0001, -1.1552, -0.6955]),
            (61, [-0.4861, 0.3358, 1.0578, -0.7282, 0.5087, 0.1318]),
            (62, [0.7881, 0.8339, -1.1424, -0.6297, -1.1112, -0.4091]),
            (63, [-1.2356, -0.4083, -0.4695, -0.4841, 1.2850, -0.0282]),
        ];
        let launch = CudaLaunch {
            multiprocessors: 28,
            threads_per_multiprocessor: 1536,
        };
        let values = randn_cuda(42, 64 * 2048, launch);
        for (row, printed) in rows {
            let row = &values[row * 2048..(row + 1) * 2048];
            assert_printed(&[&row[..3], &row[2045..]].concat(), &printed);
        }
    }

    #[test]
    fn large_draws_are_those_of_the_gpu_they_name() {
        // https://github.com/pytorch/pytorch/issues/143086: the last three of 49*12*112*144 values
        // with seed 1 on an H100 and on an A100.
        const COUNT: u64 = 49 * 12 * 112 * 144;
        let last = |launch: CudaLaunch| -> Vec<f32> {
            (COUNT - 3..COUNT)
                .map(|i| normal_at(1, 0, i, launch.threads(COUNT)))
                .collect()
        };
        let a100 = CudaLaunch {
            multiprocessors: 108,
            ..CudaLaunch::H100
        };
        assert_printed(&last(CudaLaunch::H100), &[-0.6970, -0.7780, 0.3267]);
        assert_printed(&last(a100), &[0.1549, -0.6797, -0.1656]);
    }

    #[test]
    fn launch_matters_only_above_one_wave() {
        let small = CudaLaunch {
            multiprocessors: 2,
            threads_per_multiprocessor: 1024,
        };
        let wave = 2048;
        assert_eq!(small.wave(), wave as u64);
        let large = CudaLaunch::H100;
        assert_eq!(randn_cuda(7, wave, small), randn_cuda(7, wave, large));
        assert_ne!(
            randn_cuda(7, wave + 256, small),
            randn_cuda(7, wave + 256, large)
        );
    }
}
