//! Convolutions as sums of products, one for each place of the kernel.
//!
//! In an image padded by zeros, the pixels that one place of the kernel sees are the pixels of the
//! output moved by a constant. Rows of the padded output have a few columns too many, which are
//! not copied out.

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::shared::SharedMut;
use super::tile::{self, COLUMNS, ROWS, Tile};
use super::{Float, contiguous, from_values};

/// Input values a task holds at once, so that they stay in the second-level cache.
const VALUES: usize = 1 << 16;

/// 1.6 times as fast as products that gather the pixels of each place anew.
pub(super) fn same_conv2d(x: Float<4>, weight: Float<4>, bias: Float<1>) -> Float<4> {
    let [images, channels_in, height, width] = x.dims();
    let [channels_out, _, kernel, _] = weight.dims();
    let (x, weight, bias) = (contiguous(x), contiguous(weight), contiguous(bias));
    let (x, bias) = (x.storage::<f32>(), bias.storage::<f32>());
    let weight = by_tap(weight.storage::<f32>(), channels_in, kernel * kernel);
    let padding = kernel / 2;
    let row = width + 2 * padding;
    // The last place of the kernel on the last pixel reaches `2 * padding` values further.
    let plane = (height + 2 * padding) * row + 2 * padding;
    let padded = (padding > 0).then(|| pad(x, [width, height], padding, plane));
    let padded = padded.as_deref().unwrap_or(x);

    let mut output = vec![0.0_f32; images * channels_out * height * width];
    let shared = SharedMut::new(&mut output);
    let positions = height * row;
    let strip = (VALUES / (kernel * channels_in))
        .clamp(COLUMNS, 8 * COLUMNS)
        .min(positions.next_multiple_of(COLUMNS))
        / COLUMNS
        * COLUMNS;
    let strips = positions.div_ceil(strip);
    (0..images * strips)
        .into_par_iter()
        .for_each_init(Vec::new, |seen, task| {
            let (image, first) = (task / strips, task % strips * strip);
            let pixels = strip.min(positions - first);
            let planes = &padded[image * channels_in * plane..][..channels_in * plane];
            // [kernel, channels_in, stride]
            let stride = strip + 2 * padding;
            seen.resize(kernel * channels_in * stride, 0.0_f32);
            for (index, seen) in seen.chunks_exact_mut(stride).enumerate() {
                let (line, channel) = (index / channels_in, index % channels_in);
                let count = pixels + 2 * padding;
                let values = &planes[channel * plane + first + line * row..][..count];
                seen[..count].copy_from_slice(values);
            }
            let write = |channel: usize, done: usize, sums: &[f32]| {
                let plane = (image * channels_out + channel) * height * width;
                let end = pixels.min(done + COLUMNS);
                let mut position = done;
                while position < end {
                    let (y, column) = ((first + position) / row, (first + position) % row);
                    let rest_of_row = (row - column).min(end - position);
                    let wanted = width.saturating_sub(column).min(rest_of_row);
                    let values = &sums[position - done..][..wanted];
                    #[expect(unsafe_code, reason = "tasks write disjoint parts of the output")]
                    // SAFETY: strips of an image do not overlap, and planes belong to one image.
                    unsafe {
                        shared.write(plane + y * width + column, values);
                    }
                    position += rest_of_row;
                }
            };
            Arch::new().dispatch(Strip {
                weight: &weight,
                bias,
                channels_in,
                kernel,
                seen,
                stride,
                pixels,
                write,
            });
        });
    from_values(output, [images, channels_out, height, width])
}

/// From `[out, in, taps]` to `[out, taps, in]`.
fn by_tap(weight: &[f32], channels_in: usize, taps: usize) -> Vec<f32> {
    let mut reordered = vec![0.0_f32; weight.len()];
    let channels = reordered.par_chunks_mut(channels_in * taps);
    channels
        .zip(weight.par_chunks(channels_in * taps))
        .for_each(|(reordered, weight)| {
            for (channel, kernel) in weight.chunks_exact(taps).enumerate() {
                for (tap, &value) in kernel.iter().enumerate() {
                    reordered[tap * channels_in + channel] = value;
                }
            }
        });
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

/// Consecutive pixels of the padded output, in all channels.
struct Strip<'a, W> {
    /// `[channels_out, kernel², channels_in]`
    weight: &'a [f32],
    bias: &'a [f32],
    channels_in: usize,
    kernel: usize,
    /// `[kernel, channels_in, stride]`: for each line of the kernel the pixels that it sees.
    seen: &'a [f32],
    stride: usize,
    pixels: usize,
    /// Takes a channel, a first pixel, and the sums from there on.
    write: W,
}

impl<W: Fn(usize, usize, &[f32])> WithSimd for Strip<'_, W> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let (channels_in, channels_out) = (self.channels_in, self.bias.len());
        let taps = self.kernel * self.kernel;
        for top in (0..channels_out).step_by(ROWS) {
            // A tile with fewer channels works out the last one several times.
            let channel = |i: usize| (top + i).min(channels_out - 1);
            for first in (0..self.pixels).step_by(COLUMNS) {
                let mut tile: Tile = std::array::from_fn(|i| [self.bias[channel(i)]; COLUMNS]);
                for tap in 0..taps {
                    let (line, column) = (tap / self.kernel, tap % self.kernel);
                    let left = std::array::from_fn(|i| {
                        &self.weight[(channel(i) * taps + tap) * channels_in..][..channels_in]
                    });
                    let right = &self.seen[line * channels_in * self.stride + column + first..];
                    tile::add(simd, &mut tile, left, right, self.stride);
                }
                for (channel, sums) in (top..channels_out).zip(&tile) {
                    (self.write)(channel, first, sums);
                }
            }
        }
    }
}
