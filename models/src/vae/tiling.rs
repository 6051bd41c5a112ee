//! Decoding in overlapping tiles, blended as the reference blends them.

use burn_tensor::{DType, Tensor, TensorData};
use kiln_ops::FusedOps;

/// Tile geometry in pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tiling {
    /// Height and width of a tile.
    pub size: usize,
    /// From one tile's edge to the next one's; the rest of a tile overlaps its neighbour.
    pub stride: usize,
}

/// Why a tile geometry cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "the VAE tile size ({size}) and stride ({stride}) must be at least {scale} pixels, \
     and the stride at most the size"
)]
pub struct TilingError {
    size: usize,
    stride: usize,
    scale: usize,
}

impl Tiling {
    /// Checks the geometry against the VAE's scale factor: a tile and a stride are at least one
    /// latent.
    pub fn check(self, scale: usize) -> Result<Self, TilingError> {
        let Self { size, stride } = self;
        if stride < scale || size < stride {
            return Err(TilingError {
                size,
                stride,
                scale,
            });
        }
        Ok(self)
    }

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

/// The geometry with its latent sizes worked out.
#[derive(Debug, Clone, Copy)]
pub(super) struct LatentTiles {
    size: usize,
    stride: usize,
    pixel_stride: usize,
    /// Pixels over which neighbours are blended.
    overlap: usize,
    scale: usize,
}

impl LatentTiles {
    /// Decodes `[images, z, h, w]` tile by tile to `[images, 3, h · scale, w · scale]`.
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
                // Neighbours are taken as they are after their own blending.
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

/// Fades the end of `before` into the start of `tile` along a dimension, linearly.
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
