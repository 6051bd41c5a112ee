//! Decoding in overlapping tiles, blended as `AutoencoderKLQwenImage.tiled_decode` of diffusers
//! blends them.

use burn::tensor::{DType, Tensor, TensorData};
use kiln_ops::FusedOps;

use super::Blending;

impl Blending {
    pub(super) fn in_latents(self, scale: usize) -> LatentTiles {
        LatentTiles {
            size: self.size / scale,
            stride: self.stride / scale,
            pixel_stride: self.stride,
            overlap: self.size - self.stride,
            scale,
        }
    }
}

/// The geometry of [`Blending`] in latents.
#[derive(Debug, Clone, Copy)]
pub(super) struct LatentTiles {
    size: usize,
    stride: usize,
    pixel_stride: usize,
    /// Width of the blended band between neighbours, in pixels.
    overlap: usize,
    scale: usize,
}

impl LatentTiles {
    /// Decodes latents tile by tile and joins the tiles.
    ///
    /// # Shapes
    /// - latents: `[images, z_dim, height, width]`
    /// - output: `[images, 3, height · scale, width · scale]`
    pub(super) fn decode<B: FusedOps>(
        &self,
        latents: Tensor<B, 4>,
        decode_tile: impl Fn(Tensor<B, 4>) -> Tensor<B, 4>,
    ) -> Tensor<B, 4> {
        let [_, _, height, width] = latents.dims();
        let mut above: Vec<Tensor<B, 4>> = Vec::new();
        let mut rows = Vec::new();
        for top in (0..height).step_by(self.stride) {
            let band = latents.clone().narrow(2, top, self.size.min(height - top));
            let mut row: Vec<Tensor<B, 4>> = Vec::new();
            for (column, left) in (0..width).step_by(self.stride).enumerate() {
                let tile = band.clone().narrow(3, left, self.size.min(width - left));
                let mut tile = decode_tile(tile);
                // The reference blends with neighbours that are blended themselves.
                if let Some(above) = above.get(column) {
                    tile = blend(above, tile, 2, self.overlap);
                }
                if let Some(left) = row.last() {
                    tile = blend(left, tile, 3, self.overlap);
                }
                row.push(tile);
            }
            let kept = row.iter().map(|tile| {
                let [_, _, tile_height, tile_width] = tile.dims();
                tile.clone()
                    .narrow(2, 0, self.pixel_stride.min(tile_height))
                    .narrow(3, 0, self.pixel_stride.min(tile_width))
            });
            rows.push(Tensor::cat(kept.collect(), 3));
            above = row;
        }
        Tensor::cat(rows, 2)
            .narrow(2, 0, height * self.scale)
            .narrow(3, 0, width * self.scale)
    }
}

/// Blends the last `overlap` pixels of `before` into the first ones of `tile` along a dimension, with
/// weights that rise linearly from 0.
fn blend<B: FusedOps>(
    before: &Tensor<B, 4>,
    tile: Tensor<B, 4>,
    dim: usize,
    overlap: usize,
) -> Tensor<B, 4> {
    let (before_len, len) = (before.dims()[dim], tile.dims()[dim]);
    let extent = overlap.min(before_len).min(len);
    if extent == 0 {
        return tile;
    }
    let mut shape = [1; 4];
    shape[dim] = extent;
    let ramp = |weight: &dyn Fn(f64) -> f64| {
        let values: Vec<f32> = (0..extent)
            .map(|i| weight(i as f64 / extent as f64) as f32)
            .collect();
        Tensor::<B, 4>::from_data(TensorData::new(values, shape), (&tile.device(), DType::F32))
    };
    let fading = before.clone().narrow(dim, before_len - extent, extent) * ramp(&|x| 1.0 - x);
    let blended = fading + tile.clone().narrow(dim, 0, extent) * ramp(&|x| x);
    if extent == len {
        return blended;
    }
    Tensor::cat(vec![blended, tile.narrow(dim, extent, len - extent)], dim)
}
