//! Convolutions of any kernel size as a matrix product of the weight and the im2col matrix.
//!
//! In a zero-padded image, the input pixels at one kernel position are the output pixels shifted by a
//! constant, so a tile's rows of the im2col matrix are contiguous slices of the image.

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::grid::{Grid, Task};
use super::tile::{self, COLUMNS, Lane, ROWS, Tile};

/// Convolves `[images, channels_in, height, width]` with `weight`, `[out, in, kernel, kernel]`.
/// `shape` is that of the output.
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
    // The last kernel position reads this far for the last pixel of a tile.
    let plane = (height + 2 * padding) * row + 2 * padding + COLUMNS;
    let padded = pad(x, [width, height], padding, plane);
    let grid = Grid {
        shape,
        side: 1,
        row,
    };
    grid.fill(|im2col, task, write| {
        let planes = &padded[task.image * channels_in * plane..][..channels_in * plane];
        im2col.clear();
        for plane in planes.chunks_exact(plane) {
            for line in 0..kernel {
                let values = &plane[task.first + line * row..][..COLUMNS + kernel - 1];
                let lanes = values.windows(COLUMNS).filter_map(<[f32]>::first_chunk);
                im2col.extend(lanes.copied().map(Lane));
            }
        }
        Arch::new().dispatch(Pixels {
            weight,
            bias,
            im2col,
            task,
            write,
        });
    })
}

/// Pads every plane with zeros: `padding` on all sides, and up to `plane` values at its end.
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

/// Computes the output pixels of a task.
struct Pixels<'a> {
    weight: &'a [f32],
    bias: &'a [f32],
    /// `[in, kernel, kernel]`, each the input pixels of the tile's output pixels.
    im2col: &'a [Lane],
    task: Task,
    /// Receives an output channel and its pixels.
    write: &'a dyn Fn(usize, &[&[f32]]),
}

impl WithSimd for Pixels<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let depth = self.im2col.len();
        let end = self.task.channels.end;
        for top in self.task.channels.step_by(ROWS) {
            let channel = |i: usize| (top + i).min(end - 1);
            let mut tile: Tile = std::array::from_fn(|i| Lane([self.bias[channel(i)]; COLUMNS]));
            let left = tile::rows(top, end, |channel| &self.weight[channel * depth..][..depth]);
            tile::add(simd, &mut tile, left, self.im2col);
            for (channel, pixels) in (top..end).zip(&tile) {
                (self.write)(channel, &[&pixels[..]]);
            }
        }
    }
}
