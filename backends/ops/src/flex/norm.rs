//! Norms, fused with the modulation, rotary embedding or `silu` after them.

use burn_tensor::DType;
use rayon::prelude::*;

use super::shared::SharedMut;
use super::{Float, contiguous, from_flex, from_values, simd, token_rows};
use crate::{Rope, TokenRun};

/// Values per task.
const CHUNK: usize = 1 << 14;

/// Twice as fast as the default body.
pub(super) fn rms_norm(x: Float<2>, weight: Float<1>, eps: f64) -> Float<2> {
    let [tokens, dim] = x.dims();
    let (x, weight) = (contiguous(x), contiguous(weight.cast(DType::F32)));
    let weight = weight.storage::<f32>();
    let mut output = vec![0.0_f32; tokens * dim];
    let in_and_out = output
        .par_chunks_mut(dim)
        .zip(x.storage::<f32>().par_chunks(dim));
    in_and_out
        .with_min_len(CHUNK.div_ceil(dim))
        .for_each(|(output, x)| {
            simd::vectorised(|| {
                let mean_square = simd::sum(x, |x| x * x) / dim as f32;
                let inverse = 1.0 / (mean_square + eps as f32).sqrt();
                for ((output, x), weight) in output.iter_mut().zip(x).zip(weight) {
                    *output = x * inverse * weight;
                }
            });
        });
    from_values(output, [tokens, dim])
}

/// 2.7 times as fast as the default body.
pub(super) fn layer_norm_modulate(
    x: Float<2>,
    shift: Float<2>,
    scale: Float<2>,
    runs: &[TokenRun],
    eps: f64,
) -> Float<2> {
    let [tokens, dim] = x.dims();
    let (x, shift, scale) = (contiguous(x), contiguous(shift), contiguous(scale));
    let (shift, scale) = (shift.storage::<f32>(), scale.storage::<f32>());
    let rows = token_rows(runs);
    let mut output = vec![0.0_f32; tokens * dim];
    let in_and_out = output
        .par_chunks_mut(dim)
        .zip(x.storage::<f32>().par_chunks(dim));
    in_and_out
        .zip(&rows)
        .with_min_len(CHUNK.div_ceil(dim))
        .for_each(|((output, x), &row)| {
            let modulation = row * dim..(row + 1) * dim;
            let (shift, scale) = (&shift[modulation.clone()], &scale[modulation]);
            simd::vectorised(|| {
                let mean = simd::sum(x, |x| x) / dim as f32;
                let variance = simd::sum(x, |x| (x - mean) * (x - mean)) / dim as f32;
                let inverse = 1.0 / (variance + eps as f32).sqrt();
                for (((output, x), shift), scale) in output.iter_mut().zip(x).zip(shift).zip(scale)
                {
                    *output = (x - mean) * inverse * (1.0 + scale) + shift;
                }
            });
        });
    from_values(output, [tokens, dim])
}

/// 40 times as fast as the default body.
pub(super) fn qk_norm_rope(
    x: Float<3>,
    weight: Float<1>,
    rope: &Rope<burn_flex::Flex>,
    eps: f64,
) -> Float<3> {
    let [_, heads, head_dim] = x.dims();
    let half = head_dim / 2;
    let mut x = contiguous(x);
    let (weight, cos, sin) = (
        contiguous(weight),
        contiguous(rope.cos.clone()),
        contiguous(rope.sin.clone()),
    );
    let (weight, cos, sin) = (
        weight.storage::<f32>(),
        cos.storage::<f32>(),
        sin.storage::<f32>(),
    );
    let tokens = x.storage_mut::<f32>().par_chunks_mut(heads * head_dim);
    let tokens = tokens.zip(cos.par_chunks(half)).zip(sin.par_chunks(half));
    tokens
        .with_min_len(CHUNK.div_ceil(heads * head_dim))
        .for_each(|((token, cos), sin)| {
            simd::vectorised(|| {
                for head in token.chunks_exact_mut(head_dim) {
                    let mean_square = simd::sum(head, |x| x * x) / head_dim as f32;
                    let inverse = 1.0 / (mean_square + eps as f32).sqrt();
                    let pairs = head.chunks_exact_mut(2).zip(weight.chunks_exact(2));
                    for ((pair, weight), (cos, sin)) in pairs.zip(cos.iter().zip(sin)) {
                        let real = pair[0] * inverse * weight[0];
                        let imaginary = pair[1] * inverse * weight[1];
                        pair[0] = real * cos - imaginary * sin;
                        pair[1] = real * sin + imaginary * cos;
                    }
                }
            });
        });
    from_flex(x)
}

/// Pixels whose norms are computed together: consecutive values within one channel.
const PIXELS: usize = 512;

/// 18 times as fast as the default body.
pub(super) fn channel_norm(x: Float<4>, gamma: Float<1>, activate: bool) -> Float<4> {
    let [images, channels, height, width] = x.dims();
    let plane = height * width;
    let (x, gamma) = (contiguous(x), contiguous(gamma));
    let (x, gamma) = (x.storage::<f32>(), gamma.storage::<f32>());
    let mut output = vec![0.0_f32; x.len()];
    let shared = SharedMut::new(&mut output);
    let blocks = plane.div_ceil(PIXELS);
    (0..images * blocks).into_par_iter().for_each(|task| {
        let (image, block) = (task / blocks, task % blocks);
        let pixels = PIXELS.min(plane - block * PIXELS);
        let place = |channel: usize| (image * channels + channel) * plane + block * PIXELS;
        let (mut norms, mut row) = ([0.0_f32; PIXELS], [0.0_f32; PIXELS]);
        let (norms, row) = (&mut norms[..pixels], &mut row[..pixels]);
        simd::vectorised(|| {
            for channel in 0..channels {
                let values = &x[place(channel)..][..pixels];
                norms
                    .iter_mut()
                    .zip(values)
                    .for_each(|(norm, x)| *norm += x * x);
            }
            let root = (channels as f32).sqrt();
            for norm in norms.iter_mut() {
                let length = norm.sqrt();
                *norm = root / if length > 1e-12 { length } else { 1e-12 };
            }
        });
        for channel in 0..channels {
            let values = &x[place(channel)..][..pixels];
            let gamma = gamma[channel];
            simd::vectorised(|| {
                let scaled = row.iter_mut().zip(values).zip(norms.iter());
                if activate {
                    scaled.for_each(|((y, x), norm)| *y = simd::silu(x * norm * gamma));
                } else {
                    scaled.for_each(|((y, x), norm)| *y = x * norm * gamma);
                }
            });
            #[expect(unsafe_code, reason = "tasks write disjoint parts of the output")]
            // SAFETY: tasks have different images or blocks, so their ranges are disjoint.
            unsafe {
                shared.write(place(channel), row);
            }
        }
    });
    from_values(output, [images, channels, height, width])
}
