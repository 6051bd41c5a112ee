//! `CubeCL` kernels of the norms and the rotary embedding, for all GPU backends.
//!
//! They compute in f32 for every dtype of the activations. Tensors are contiguous, and accessed in
//! vectors of `N` values, where `N` divides the number of consecutive values.

#![expect(
    clippy::trivially_copy_pass_by_ref,
    clippy::used_underscore_binding,
    reason = "the `cube` macro requires these forms of arguments"
)]

use burn_cubecl::cubecl::{self, prelude::*};

/// Sums `value` over the `width` units of a cube with the same `UNIT_POS_Y`, of which there are
/// `groups`. `width` is a power of two. All units of the cube have to call it.
#[cube]
fn sum_of_units(value: f32, #[comptime] width: u32, #[comptime] groups: u32) -> f32 {
    let mut sums = SharedMemory::<f32>::new(comptime!((width * groups) as usize));
    let place = UNIT_POS as usize;
    sums[place] = value;
    sync_cube();
    #[unroll]
    for step in 0..comptime!(width.ilog2()) {
        let half = comptime!(width >> (step + 1));
        if UNIT_POS_X < half {
            sums[place] += sums[place + half as usize];
        }
        sync_cube();
    }
    let sum = sums[(UNIT_POS_Y * width) as usize];
    // All units have read their sum before the next call overwrites it.
    sync_cube();
    sum
}

#[cube]
fn sum_of_lanes<N: Size>(vector: Vector<f32, N>) -> f32 {
    let mut sum = 0.0f32;
    #[unroll]
    for lane in 0..N::value() {
        sum += vector[lane];
    }
    sum
}

/// Layer norm and modulation of a run of tokens that share `row` of the tables. One cube per token.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(super) fn layer_norm_modulate<F: Float, N: Size>(
    x: &Tensor<Vector<F, N>>,
    shift: &Tensor<Vector<f32, N>>,
    scale: &Tensor<Vector<f32, N>>,
    output: &mut Tensor<Vector<F, N>>,
    first: usize,
    tokens: usize,
    row: usize,
    eps: f32,
    #[comptime] units: u32,
    #[define(F)] _dtype: StorageType,
) {
    if CUBE_POS >= tokens {
        terminate!();
    }
    let dim = x.shape(1);
    let vectors = dim / N::value();
    let start = (first + CUBE_POS) * vectors;
    let modulation = row * vectors;

    let mut sum = Vector::<f32, N>::new(0.0);
    let mut place = UNIT_POS as usize;
    while place < vectors {
        sum += Vector::cast_from(x[start + place]);
        place += units as usize;
    }
    let mean = sum_of_units(sum_of_lanes(sum), units, 1u32) / dim as f32;

    let mut sum = Vector::<f32, N>::new(0.0);
    let mut place = UNIT_POS as usize;
    while place < vectors {
        let centred = Vector::<f32, N>::cast_from(x[start + place]) - Vector::new(mean);
        sum += centred * centred;
        place += units as usize;
    }
    let variance = sum_of_units(sum_of_lanes(sum), units, 1u32) / dim as f32;

    let inverse = 1.0f32 / (variance + eps).sqrt();
    let mut place = UNIT_POS as usize;
    while place < vectors {
        let centred = Vector::<f32, N>::cast_from(x[start + place]) - Vector::new(mean);
        let scale = scale[modulation + place] + Vector::new(1.0f32);
        let value = centred * Vector::new(inverse) * scale + shift[modulation + place];
        output[start + place] = Vector::cast_from(value);
        place += units as usize;
    }
}

/// RMS norm over the last dimension. One cube per token.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(super) fn rms_norm<F: Float, W: Float, N: Size>(
    x: &Tensor<Vector<F, N>>,
    weight: &Tensor<Vector<W, N>>,
    output: &mut Tensor<Vector<F, N>>,
    eps: f32,
    #[comptime] units: u32,
    #[define(F, W)] _dtypes: [StorageType; 2],
) {
    if CUBE_POS >= x.shape(0) {
        terminate!();
    }
    let dim = x.shape(1);
    let vectors = dim / N::value();
    let start = CUBE_POS * vectors;

    let mut sum = Vector::<f32, N>::new(0.0);
    let mut place = UNIT_POS as usize;
    while place < vectors {
        let value = Vector::<f32, N>::cast_from(x[start + place]);
        sum += value * value;
        place += units as usize;
    }
    let mean_square = sum_of_units(sum_of_lanes(sum), units, 1u32) / dim as f32;

    let inverse = 1.0f32 / (mean_square + eps).sqrt();
    let mut place = UNIT_POS as usize;
    while place < vectors {
        let value = Vector::<f32, N>::cast_from(x[start + place]) * Vector::new(inverse);
        let weight = Vector::<f32, N>::cast_from(weight[place]);
        output[start + place] = Vector::cast_from(value * weight);
        place += units as usize;
    }
}

/// RMS norm over the head dimension and rotary embedding. One cube per token, of `groups` groups of
/// `units` units; each group computes one head at a time. `N` is even, so that a pair is in one
/// vector.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(super) fn qk_norm_rope<F: Float, W: Float, N: Size>(
    x: &Tensor<Vector<F, N>>,
    weight: &Tensor<Vector<W, N>>,
    cos: &Tensor<f32>,
    sin: &Tensor<f32>,
    output: &mut Tensor<Vector<F, N>>,
    eps: f32,
    #[comptime] units: u32,
    #[comptime] groups: u32,
    #[define(F, W)] _dtypes: [StorageType; 2],
) {
    if CUBE_POS >= x.shape(0) {
        terminate!();
    }
    let (heads, head_dim) = (x.shape(1), x.shape(2));
    let vectors = head_dim / N::value();
    let size = N::value().comptime();
    let pairs = comptime!(size / 2);
    let angles = CUBE_POS * head_dim / 2;

    // All groups take the same number of turns, because `sum_of_units` synchronises the cube.
    let turns = heads.div_ceil(groups as usize);
    for turn in 0..turns {
        let head = turn * groups as usize + UNIT_POS_Y as usize;
        let start = (CUBE_POS * heads + head) * vectors;
        let end = select(head < heads, vectors, 0);

        let mut sum = Vector::<f32, N>::new(0.0);
        let mut place = UNIT_POS_X as usize;
        while place < end {
            let value = Vector::<f32, N>::cast_from(x[start + place]);
            sum += value * value;
            place += units as usize;
        }
        let mean_square = sum_of_units(sum_of_lanes(sum), units, groups) / head_dim as f32;

        let inverse = 1.0f32 / (mean_square + eps).sqrt();
        let mut place = UNIT_POS_X as usize;
        while place < end {
            let weight = Vector::<f32, N>::cast_from(weight[place]);
            let value =
                Vector::<f32, N>::cast_from(x[start + place]) * Vector::new(inverse) * weight;
            let mut rotated = Vector::<f32, N>::new(0.0);
            #[unroll]
            for pair in 0..pairs {
                let angle = angles + place * pairs + pair;
                let (cos, sin) = (cos[angle], sin[angle]);
                let (real, imaginary) = (value[2 * pair], value[2 * pair + 1]);
                rotated[2 * pair] = real * cos - imaginary * sin;
                rotated[2 * pair + 1] = real * sin + imaginary * cos;
            }
            output[start + place] = Vector::cast_from(rotated);
            place += units as usize;
        }
    }
}

/// RMS norm over the channels, with `silu` if `activate`. One unit per vector of `N` pixels.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(super) fn channel_norm<F: Float, W: Float, N: Size>(
    x: &Tensor<Vector<F, N>>,
    gamma: &Tensor<W>,
    output: &mut Tensor<Vector<F, N>>,
    #[comptime] activate: bool,
    #[define(F, W)] _dtypes: [StorageType; 2],
) {
    let (images, channels) = (x.shape(0), x.shape(1));
    let plane = x.shape(2) * x.shape(3) / N::value();
    if ABSOLUTE_POS >= images * plane {
        terminate!();
    }
    let (image, pixel) = (ABSOLUTE_POS / plane, ABSOLUTE_POS % plane);
    let start = image * channels * plane + pixel;

    let mut sum = Vector::<f32, N>::new(0.0);
    for channel in 0..channels {
        let value = Vector::<f32, N>::cast_from(x[start + channel * plane]);
        sum += value * value;
    }
    let root = Vector::<f32, N>::new((channels as f32).sqrt());
    let factor = root / max(sum.sqrt(), Vector::new(1e-12f32));
    for channel in 0..channels {
        let place = start + channel * plane;
        let gamma = Vector::<f32, N>::new(f32::cast_from(gamma[channel]));
        let mut value = Vector::<f32, N>::cast_from(x[place]) * factor * gamma;
        if comptime!(activate) {
            let one = Vector::<f32, N>::new(1.0);
            // CUDA C++ has no unary minus for vectors.
            let negated = Vector::<f32, N>::new(0.0) - value;
            value /= one + negated.exp();
        }
        output[place] = Vector::cast_from(value);
    }
}
