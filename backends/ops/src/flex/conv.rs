//! Convolutions as sums of matrix products, one for each place of the kernel.
//!
//! In an image padded by zeros, the pixels that one place of the kernel sees are the pixels of the
//! output moved by a constant: no patches are gathered. Rows of the padded output have a few
//! columns too many, which are not copied out.

use gemm::Parallelism;
use rayon::prelude::*;

use super::matrix::{Matrix, Output, product};
use super::shared::SharedMut;
use super::{Float, contiguous, from_values};

/// Output values a task holds, so that they stay in the second-level cache.
const OUTPUTS: usize = 1 << 17;

/// 1.6 times as fast as the default body with 96 channels at 256², 1.1 times with 384 at 64².
pub(super) fn same_conv2d(x: Float<4>, weight: Float<4>, bias: Float<1>) -> Float<4> {
    let [images, channels_in, height, width] = x.dims();
    let [channels_out, _, kernel, _] = weight.dims();
    let (x, weight, bias) = (contiguous(x), contiguous(weight), contiguous(bias));
    let (x, bias) = (x.storage::<f32>(), bias.storage::<f32>());
    let taps = by_tap(
        weight.storage::<f32>(),
        channels_out * channels_in,
        kernel * kernel,
    );
    let padding = kernel / 2;
    let row = width + 2 * padding;
    // The last tap of the last pixel reaches `2 * padding` values past the last row.
    let plane = (height + 2 * padding) * row + 2 * padding;
    let padded = if padding == 0 {
        None
    } else {
        Some(pad(x, [width, height], padding, plane))
    };
    let padded = padded.as_deref().unwrap_or(x);

    let mut output = vec![0.0_f32; images * channels_out * height * width];
    let shared = SharedMut::new(&mut output);
    let strip = (OUTPUTS / channels_out).clamp(64, 4096).min(height * row);
    let strips = (height * row).div_ceil(strip);
    (0..images * strips)
        .into_par_iter()
        .for_each_init(Vec::new, |sums, task| {
            let (image, first) = (task / strips, task % strips * strip);
            let pixels = strip.min(height * row - first);
            sums.resize(channels_out * pixels, 0.0_f32);
            for (sums, &bias) in sums.chunks_exact_mut(pixels).zip(bias) {
                sums.fill(bias);
            }
            for (tap, weights) in taps.chunks_exact(channels_out * channels_in).enumerate() {
                let moved = first + tap / kernel * row + tap % kernel;
                let seen = &padded[image * channels_in * plane + moved..];
                product(
                    sums,
                    Matrix::rows(weights, channels_out, channels_in, channels_in),
                    Matrix::rows(seen, channels_in, pixels, plane),
                    Output::Add,
                    Parallelism::None,
                );
            }
            for (channel, sums) in sums.chunks_exact(pixels).enumerate() {
                let plane = (image * channels_out + channel) * height * width;
                let mut done = 0;
                while done < pixels {
                    let (y, column) = ((first + done) / row, (first + done) % row);
                    let rest_of_row = (row - column).min(pixels - done);
                    let wanted = width.saturating_sub(column).min(rest_of_row);
                    #[expect(unsafe_code, reason = "tasks write disjoint parts of the output")]
                    // SAFETY: strips of an image do not overlap, and planes belong to one image.
                    unsafe {
                        shared.write(plane + y * width + column, &sums[done..done + wanted]);
                    }
                    done += rest_of_row;
                }
            }
        });
    from_values(output, [images, channels_out, height, width])
}

/// From `[out · in, taps]` to `[taps, out · in]`.
fn by_tap(weight: &[f32], pairs: usize, taps: usize) -> Vec<f32> {
    let mut reordered = vec![0.0_f32; weight.len()];
    for (pair, kernel) in weight.chunks_exact(taps).enumerate() {
        for (tap, &value) in kernel.iter().enumerate() {
            reordered[tap * pairs + pair] = value;
        }
    }
    reordered
}

/// Zeros round every plane, and enough of them after it.
fn pad(x: &[f32], [width, height]: [usize; 2], padding: usize, plane: usize) -> Vec<f32> {
    let row = width + 2 * padding;
    let mut padded = vec![0.0_f32; x.len() / (width * height) * plane];
    let planes = padded
        .par_chunks_mut(plane)
        .zip(x.par_chunks(width * height));
    planes.for_each(|(padded, plane)| {
        let rows = padded[padding * row..].chunks_exact_mut(row);
        for (padded, values) in rows.zip(plane.chunks_exact(width)) {
            padded[padding..padding + width].copy_from_slice(values);
        }
    });
    padded
}
