//! 3×3 convolutions by Winograd's F(2×2, 3×3), which needs 16 multiplications for four output pixels
//! instead of 36.
//!
//! A 4×4 patch `d` of padded input pixels and a kernel `g` give the 2×2 output pixels
//! `Aᵀ [(G g Gᵀ) ⊙ (Bᵀ d B)] A` (Lavin and Gray, arXiv 1509.09308), so the sums over the channels
//! are 16 matrix products.
//!
//! Patches are two pixels apart. The input is split into four planes by the parity of rows and
//! columns; within a plane, the pixels at one position of consecutive patches are contiguous. As in
//! [`super::grid`], each row of patches is padded, here by one patch, whose output is not written.

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::grid::{Grid, Task};
use super::simd;
use super::tile::{self, COLUMNS, Lane, ROWS, Tile};

/// Values of a patch, and of a transformed kernel.
const PLACES: usize = 16;

/// Convolves `[images, channels_in, height, width]` with `weight`, `[out, in, 3, 3]`. `shape` is that
/// of the output.
pub(super) fn convolve(
    x: &[f32],
    channels_in: usize,
    weight: &[f32],
    bias: &[f32],
    shape: [usize; 4],
) -> Vec<f32> {
    let [_, _, height, width] = shape;
    let weight = transform_weight(weight, channels_in);
    // Patches per row, with one of padding.
    let row = width.div_ceil(2) + 1;
    // The last patch of the last tile reads this far.
    let plane = (height.div_ceil(2) + 1) * row + COLUMNS;
    let split = split_by_parity(x, [height, width], row, plane);
    let grid = Grid {
        shape,
        side: 2,
        row,
    };
    grid.fill(|transformed, task, write| {
        transformed.resize(PLACES * channels_in, Lane::default());
        Arch::new().dispatch(Patches {
            split: &split[task.image * channels_in * 4 * plane..][..channels_in * 4 * plane],
            plane,
            row,
            weight: &weight,
            bias,
            transformed,
            task,
            write,
        });
    })
}

/// Computes `G g Gᵀ` of every kernel, as `[out, PLACES, in]`.
fn transform_weight(weight: &[f32], channels_in: usize) -> Vec<f32> {
    let mut output = vec![0.0_f32; weight.len() / 9 * PLACES];
    let channels = output.par_chunks_mut(PLACES * channels_in);
    channels
        .zip(weight.par_chunks(9 * channels_in))
        .for_each(|(output, weight)| {
            let kernels = weight.as_chunks::<9>().0;
            for (block, kernels) in kernels.chunks(COLUMNS).enumerate() {
                let transformed = simd::vectorised(|| transform_kernels(kernels));
                let places = output.chunks_exact_mut(channels_in);
                for (place, lane) in places.zip(&transformed) {
                    place[block * COLUMNS..][..kernels.len()]
                        .copy_from_slice(&lane[..kernels.len()]);
                }
            }
        });
    output
}

/// Computes `G g Gᵀ` of up to [`COLUMNS`] kernels.
#[inline(always)]
fn transform_kernels(kernels: &[[f32; 9]]) -> [Lane; PLACES] {
    let mut g = [Lane::default(); 9];
    tile::interleave(&mut g, kernels.iter().map(<[f32; 9]>::as_slice));
    let (mut columns, mut places) = ([Lane::default(); 12], [Lane::default(); PLACES]);
    for x in 0..3 {
        for i in 0..COLUMNS {
            let (a, b, c) = (g[x][i], g[3 + x][i], g[6 + x][i]);
            columns[x][i] = a;
            columns[3 + x][i] = (a + b + c) * 0.5;
            columns[6 + x][i] = (a - b + c) * 0.5;
            columns[9 + x][i] = c;
        }
    }
    for y in 0..4 {
        for i in 0..COLUMNS {
            let (a, b, c) = (
                columns[3 * y][i],
                columns[3 * y + 1][i],
                columns[3 * y + 2][i],
            );
            places[4 * y][i] = a;
            places[4 * y + 1][i] = (a + b + c) * 0.5;
            places[4 * y + 2][i] = (a - b + c) * 0.5;
            places[4 * y + 3][i] = c;
        }
    }
    places
}

/// Pads every plane by zeros and splits it by the parity of rows and columns, as
/// `[planes, row parity, column parity, plane]`.
fn split_by_parity(x: &[f32], [height, width]: [usize; 2], row: usize, plane: usize) -> Vec<f32> {
    let mut split = vec![0.0_f32; x.len() / (height * width) * 4 * plane];
    let planes = split
        .par_chunks_mut(4 * plane)
        .zip(x.par_chunks(height * width));
    planes.for_each(|(split, values)| {
        for (y, values) in values.chunks_exact(width).enumerate() {
            let y = y + 1;
            let lines = &mut split[y % 2 * 2 * plane..][..2 * plane];
            let (even, odd) = lines.split_at_mut(plane);
            let (even, odd) = (
                &mut even[y / 2 * row..][..row],
                &mut odd[y / 2 * row..][..row],
            );
            let (pairs, last) = values.as_chunks::<2>();
            for ((pair, odd), even) in pairs.iter().zip(odd.iter_mut()).zip(&mut even[1..]) {
                (*odd, *even) = (pair[0], pair[1]);
            }
            if let [last] = last {
                odd[width / 2] = *last;
            }
        }
    });
    split
}

/// Computes the output pixels of a task.
struct Patches<'a> {
    /// The image's planes by [`split_by_parity`].
    split: &'a [f32],
    /// Values of a plane.
    plane: usize,
    /// Patches per row, with padding.
    row: usize,
    /// `[out, PLACES, in]`
    weight: &'a [f32],
    bias: &'a [f32],
    /// Scratch for the transformed patches, `[PLACES, in]`.
    transformed: &'a mut [Lane],
    task: Task,
    /// Receives an output channel, and the upper and lower pixels of its patches.
    write: &'a dyn Fn(usize, &[&[f32]]),
}

impl WithSimd for Patches<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let channels_in = self.transformed.len() / PLACES;
        let Task {
            first, channels, ..
        } = self.task;
        for channel in 0..channels_in {
            let pixels = &self.split[channel * 4 * self.plane..][..4 * self.plane];
            let lanes = transform_patches(|y, x| {
                let place = first + y / 2 * self.row + x / 2;
                &pixels[(y % 2 * 2 + x % 2) * self.plane + place..]
            });
            let places = self.transformed.chunks_exact_mut(channels_in);
            for (transformed, lane) in places.zip(&lanes) {
                transformed[channel] = *lane;
            }
        }
        for top in channels.clone().step_by(ROWS) {
            let mut tiles = [Tile::default(); PLACES];
            let places = self.transformed.chunks_exact(channels_in);
            for (place, (tile, right)) in tiles.iter_mut().zip(places).enumerate() {
                let left = tile::rows(top, channels.end, |channel| {
                    &self.weight[(channel * PLACES + place) * channels_in..][..channels_in]
                });
                tile::add(simd, tile, left, right);
            }
            for (i, channel) in (top..channels.end).take(ROWS).enumerate() {
                let [upper, lower] = output_pixels(|place| &tiles[place][i], self.bias[channel]);
                (self.write)(channel, &[&upper, &lower]);
            }
        }
    }
}

/// Computes `Bᵀ d B` of all patches of a tile; `pixel(y, x)` is that pixel of every patch.
#[expect(
    clippy::needless_range_loop,
    reason = "constant bounds keep the lanes in registers"
)]
#[inline(always)]
fn transform_patches<'a>(pixel: impl Fn(usize, usize) -> &'a [f32]) -> [Lane; PLACES] {
    let mut d: [Lane; PLACES] = std::array::from_fn(|i| {
        let mut lane = Lane::default();
        lane.copy_from_slice(&pixel(i / 4, i % 4)[..COLUMNS]);
        lane
    });
    let steps = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]
        .into_iter()
        .chain([[0, 4, 8, 12], [1, 5, 9, 13], [2, 6, 10, 14], [3, 7, 11, 15]]);
    for [a, b, c, e] in steps {
        for i in 0..COLUMNS {
            let (va, vb, vc, ve) = (d[a][i], d[b][i], d[c][i], d[e][i]);
            d[a][i] = va - vc;
            d[b][i] = vb + vc;
            d[c][i] = vc - vb;
            d[e][i] = vb - ve;
        }
    }
    d
}

/// Computes `Aᵀ m A` of all patches of a tile, plus a bias: the upper and lower pixels of each.
#[inline(always)]
fn output_pixels<'a>(product: impl Fn(usize) -> &'a Lane, bias: f32) -> [[f32; 2 * COLUMNS]; 2] {
    let mut lines = [[0.0; 2 * COLUMNS]; 2];
    let m: [&Lane; PLACES] = std::array::from_fn(product);
    let (mut upper, mut lower) = ([Lane::default(); 4], [Lane::default(); 4]);
    for x in 0..4 {
        for i in 0..COLUMNS {
            let (a, b, c, d) = (m[x][i], m[4 + x][i], m[8 + x][i], m[12 + x][i]);
            upper[x][i] = a + b + c;
            lower[x][i] = b - c - d;
        }
    }
    for (line, [a, b, c, d]) in lines.iter_mut().zip([upper, lower]) {
        for i in 0..COLUMNS {
            line[2 * i] = a[i] + b[i] + c[i] + bias;
            line[2 * i + 1] = b[i] - c[i] - d[i] + bias;
        }
    }
    lines
}
