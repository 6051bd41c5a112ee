//! Convolutions of any size as one product: of the kernels with what they see.
//!
//! In an image padded by zeros, the pixels that one place of the kernel sees are the pixels of the
//! output moved by a constant.

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::conv::{Grid, Task};
use super::tile::{self, COLUMNS, Lane, ROWS, Tile};

/// Convolution of `[images, channels_in, height, width]` with `weight`, `[out, in, kernel, kernel]`.
pub(super) fn convolve(
    x: &[f32],
    (channels_in, kernel): (usize, usize),
    weight: &[f32],
    bias: &[f32],
    shape: [usize; 4],
) -> Vec<f32> {
    let [_, _, height, width] = shape;
    let padding = kernel / 2;
    let row = width + 2 * padding;
    // The last place of the kernel on a tile's last pixel reaches this far.
    let plane = (height + 2 * padding) * row + 2 * padding + COLUMNS;
    let padded = pad(x, [width, height], padding, plane);
    let grid = Grid {
        shape,
        side: 1,
        row,
    };
    grid.fill(|seen, task, write| {
        let planes = &padded[task.image * channels_in * plane..][..channels_in * plane];
        seen.clear();
        for plane in planes.chunks_exact(plane) {
            for line in 0..kernel {
                let values = &plane[task.first + line * row..][..COLUMNS + kernel - 1];
                let lanes = values.windows(COLUMNS).filter_map(<[f32]>::first_chunk);
                seen.extend(lanes.copied().map(Lane));
            }
        }
        Arch::new().dispatch(Pixels {
            weight,
            bias,
            seen,
            task,
            write,
        });
    })
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

struct Pixels<'a> {
    weight: &'a [f32],
    bias: &'a [f32],
    /// `[in, kernel, kernel]`
    seen: &'a [Lane],
    task: Task,
    /// Takes a channel and its pixels.
    write: &'a dyn Fn(usize, &[&[f32]]),
}

impl WithSimd for Pixels<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let depth = self.seen.len();
        let end = self.task.channels.end;
        for top in self.task.channels.step_by(ROWS) {
            let channel = |i: usize| (top + i).min(end - 1);
            let mut tile: Tile = std::array::from_fn(|i| Lane([self.bias[channel(i)]; COLUMNS]));
            let left = tile::rows(top, end, |channel| &self.weight[channel * depth..][..depth]);
            tile::add(simd, &mut tile, left, self.seen);
            for (channel, pixels) in (top..end).zip(&tile) {
                (self.write)(channel, &[&pixels[..]]);
            }
        }
    }
}
