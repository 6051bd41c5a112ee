//! Convolutions, in tiles of patches whose output pixels are worked out together.

use std::ops::Range;

use rayon::prelude::*;

use super::shared::SharedMut;
use super::tile::{COLUMNS, Lane, ROWS};
use super::{Float, contiguous, direct, from_values, winograd};

/// 2.3 to 2.7 times as fast as the default body.
pub(super) fn conv2d_same(x: Float<4>, weight: Float<4>, bias: Float<1>) -> Float<4> {
    let [images, channels_in, height, width] = x.dims();
    let [channels, _, kernel, _] = weight.dims();
    let (x, weight, bias) = (contiguous(x), contiguous(weight), contiguous(bias));
    let (x, weight, bias) = (
        x.storage::<f32>(),
        weight.storage::<f32>(),
        bias.storage::<f32>(),
    );
    let shape = [images, channels, height, width];
    let values = if kernel == 3 {
        winograd::convolve(x, channels_in, weight, bias, shape)
    } else {
        direct::convolve(x, (channels_in, kernel), weight, bias, shape)
    };
    from_values(values, shape)
}

/// The output of a convolution, cut into patches of `side`² pixels.
///
/// Patches are counted row by row. A row has a few too many, which are not copied out: so that what
/// all patches of a tile see is consecutive in an input with zeros around it.
#[derive(Clone, Copy)]
pub(super) struct Grid {
    /// Images, channels, height, width.
    pub(super) shape: [usize; 4],
    pub(super) side: usize,
    /// Patches of a row, with those too many.
    pub(super) row: usize,
}

/// Consecutive patches of an image, in some channels.
pub(super) struct Task {
    pub(super) image: usize,
    pub(super) first: usize,
    pub(super) channels: Range<usize>,
}

impl Grid {
    /// Patches of an image.
    fn patches(&self) -> usize {
        self.shape[2].div_ceil(self.side) * self.row
    }

    /// Fills the output, one call of `work` for each task.
    ///
    /// `work` gets scratch of its thread, the task, and what takes a channel and the lines of pixels
    /// that it has in the task's patches.
    pub(super) fn fill(
        &self,
        work: impl Fn(&mut Vec<Lane>, Task, &dyn Fn(usize, &[&[f32]])) + Sync,
    ) -> Vec<f32> {
        let [images, channels, height, width] = self.shape;
        let mut output = vec![0.0_f32; images * channels * height * width];
        let shared = SharedMut::new(&mut output);
        let tiles = self.patches().div_ceil(COLUMNS);
        // A few tasks for each thread: those of one tile share its channels.
        let groups = channels.div_ceil(ROWS);
        let shares = (4 * rayon::current_num_threads())
            .div_ceil(images * tiles)
            .min(groups);
        let share = groups.div_ceil(shares) * ROWS;
        let task = |index: usize| {
            let (tile, first) = (index / shares, index % shares * share);
            Task {
                image: tile / tiles,
                first: tile % tiles * COLUMNS,
                channels: first.min(channels)..channels.min(first + share),
            }
        };
        (0..images * tiles * shares)
            .into_par_iter()
            .for_each_init(Vec::new, |scratch, index| {
                let task = task(index);
                let (image, first) = (task.image, task.first);
                work(scratch, task, &|channel, lines| {
                    let plane = (image * channels + channel) * height * width;
                    self.each_run(first, |y, x, pixels| {
                        for (y, line) in (y..height).zip(lines) {
                            #[expect(
                                unsafe_code,
                                reason = "tasks write disjoint parts of the output"
                            )]
                            // SAFETY: no other task has these patches and this channel.
                            unsafe {
                                shared.write(plane + y * width + x, &line[pixels.clone()]);
                            }
                        }
                    });
                });
            });
        output
    }

    /// Calls `run` with the place of each run of patches in the picture, and which pixels of the
    /// tile's lines they are.
    #[inline(always)]
    fn each_run(&self, first: usize, mut run: impl FnMut(usize, usize, Range<usize>)) {
        let (width, end) = (self.shape[3], self.patches().min(first + COLUMNS));
        let mut patch = first;
        while patch < end {
            let (row, column) = (patch / self.row, patch % self.row);
            let patches = (self.row - column).min(end - patch);
            let (y, x) = (row * self.side, column * self.side);
            if x < width {
                let start = (patch - first) * self.side;
                let pixels = (patches * self.side).min(width - x);
                run(y, x, start..start + pixels);
            }
            patch += patches;
        }
    }
}
