//! The tiles of patches into which convolutions divide their output.

use std::ops::Range;

use rayon::prelude::*;

use super::shared::SharedMut;
use super::tile::{COLUMNS, Lane, ROWS};

/// The output of a convolution, cut into patches of `side` × `side` pixels.
///
/// Patches are numbered row by row. Each row is padded by a few patches whose output is not written,
/// so that the inputs of consecutive patches are contiguous in a zero-padded image.
#[derive(Clone, Copy)]
pub(super) struct Grid {
    /// `[images, channels, height, width]`
    pub(super) shape: [usize; 4],
    /// Height and width of a patch, in pixels.
    pub(super) side: usize,
    /// Patches per row, with padding.
    pub(super) row: usize,
}

/// A tile of up to [`COLUMNS`] consecutive patches of an image, in a range of output channels.
pub(super) struct Task {
    pub(super) image: usize,
    /// First patch.
    pub(super) first: usize,
    pub(super) channels: Range<usize>,
}

impl Grid {
    /// Patches of an image, with padding.
    fn patches(&self) -> usize {
        self.shape[2].div_ceil(self.side) * self.row
    }

    /// Computes the output, with one call of `work` per task.
    ///
    /// The arguments of `work` are the thread's scratch, the task, and a function that writes the
    /// pixels of the task's patches in one channel, given as `side` lines.
    pub(super) fn fill(
        &self,
        work: impl Fn(&mut Vec<Lane>, Task, &dyn Fn(usize, &[&[f32]])) + Sync,
    ) -> Vec<f32> {
        let [images, channels, height, width] = self.shape;
        let mut output = vec![0.0_f32; images * channels * height * width];
        let shared = SharedMut::new(&mut output);
        let tiles = self.patches().div_ceil(COLUMNS);
        // A few tasks per thread: the channels of a tile are divided among several tasks.
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
                            // SAFETY: tasks have disjoint patches or channels.
                            unsafe {
                                shared.write(plane + y * width + x, &line[pixels.clone()]);
                            }
                        }
                    });
                });
            });
        output
    }

    /// Splits the tile from patch `first` on into runs within one row of the image. Calls `run` with
    /// each run's `y` and `x` in the image, and its range of pixels in the tile's lines.
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
