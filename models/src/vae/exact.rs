//! Exact tiles: which part of each resolution a tile's pixels depend on.
//!
//! After the middle block only 3×3 convolutions look beyond their own pixel, by one pixel each. A tile
//! is decoded with that many more pixels around it, less at each step towards the output, and zeros
//! pad it at the image's own edges only. So its pixels are those of the whole image.

use std::ops::Range;

use super::VaeConfig;

/// What the upper part of the decoder consists of.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Levels {
    /// Resolutions, each twice the one before.
    count: usize,
    /// Residual blocks at each resolution.
    residual_blocks: usize,
}

/// The pixels of one resolution that a tile needs, along one axis.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Span {
    /// What the residual blocks get. Starts at an even pixel, so that flex's convolutions, which
    /// compute two pixels at a time, add up as they do in the whole image.
    pub(crate) input: Range<usize>,
    /// What is kept of their output for the upsampler; at the highest resolution, the tile's pixels of
    /// the image.
    pub(crate) output: Range<usize>,
}

impl Levels {
    pub(crate) fn of(config: &VaeConfig) -> Self {
        Self {
            count: config.dim_mult.len(),
            residual_blocks: config.num_res_blocks + 1,
        }
    }

    /// The tiles of an axis of `side` latents: as few as are at most `size` latents long, of equal
    /// length up to one latent. Each has a span for every resolution, the lowest first.
    pub(crate) fn tiles(self, side: usize, size: usize) -> Vec<Vec<Span>> {
        let count = side.div_ceil(size.max(1)).max(1);
        let edge = |index: usize| index * side / count;
        (0..count)
            .map(|index| self.spans(edge(index)..edge(index + 1), side))
            .collect()
    }

    /// The spans of a tile of these latents, followed from the output back to the middle block.
    fn spans(self, latents: Range<usize>, side: usize) -> Vec<Span> {
        let mut spans = Vec::with_capacity(self.count);
        let last = self.count - 1;
        let mut output = latents.start << last..latents.end << last;
        for level in (0..self.count).rev() {
            let side = side << level;
            let convolutions = 2 * self.residual_blocks + usize::from(level == last);
            let needed = widened(&output, convolutions, side);
            let upsampled = widened(&needed, 1, side);
            spans.push(Span {
                input: needed.start / 2 * 2..needed.end,
                output,
            });
            output = upsampled.start / 2..upsampled.end.div_ceil(2);
        }
        spans.reverse();
        spans
    }
}

/// A range with `by` more pixels at both ends, within the image.
fn widened(range: &Range<usize>, by: usize, side: usize) -> Range<usize> {
    range.start.saturating_sub(by)..side.min(range.end + by)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The decoder of Qwen-Image. Counted by hand: 8 pixels for the last resolution and its upsampler,
    /// then 11, 13 and 13 at half of the resolution each.
    #[test]
    fn a_tile_of_qwen_image_needs_13_latents_on_each_side() {
        let levels = Levels {
            count: 4,
            residual_blocks: 3,
        };
        let tiles = levels.tiles(120, 40);
        assert_eq!(tiles.len(), 3);
        let span = |input, output| Span { input, output };
        assert_eq!(
            tiles[1],
            [
                span(26..93, 33..87),
                span(68..172, 74..166),
                span(150..330, 156..324),
                span(312..647, 320..640),
            ]
        );
        let first = &tiles[0][0];
        assert_eq!((first.input.clone(), first.output.clone()), (0..53, 0..47));
    }

    #[test]
    fn tiles_cover_an_axis_and_are_of_nearly_equal_length() {
        let levels = Levels {
            count: 3,
            residual_blocks: 2,
        };
        for (side, size, lengths) in [
            (7, 3, vec![2, 2, 3]),
            (7, 7, vec![7]),
            (7, usize::MAX, vec![7]),
            (5, 1, vec![1; 5]),
            (64, 33, vec![32, 32]),
        ] {
            let tiles = levels.tiles(side, size);
            let pixels = tiles.iter().map(|spans| spans[2].output.len());
            assert_eq!(
                pixels.collect::<Vec<_>>(),
                lengths.iter().map(|it| 4 * it).collect::<Vec<_>>()
            );
            let mut end = 0;
            for spans in tiles {
                assert_eq!(spans[2].output.start, end);
                end = spans[2].output.end;
            }
            assert_eq!(end, 4 * side);
        }
    }

    #[test]
    fn a_single_tile_is_the_whole_image() {
        let levels = Levels {
            count: 4,
            residual_blocks: 3,
        };
        for (level, span) in levels.tiles(9, 9)[0].iter().enumerate() {
            let all = 0..9 << level;
            assert_eq!(
                (span.input.clone(), span.output.clone()),
                (all.clone(), all)
            );
        }
    }
}
