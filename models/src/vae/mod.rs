//! The decoder of `AutoencoderKLQwenImage`, for single frames.
//!
//! On a single frame every causal 3-D convolution equals the 2-D one with the last temporal slice of
//! its kernel, and `time_conv` is not used. The result is exact and takes 2.5 times less work.

mod blended;
mod config;
mod decoder;
mod exact;
mod tiling;

use std::sync::Arc;

use burn::module::Module;
use burn::tensor::{DType, Tensor, TensorData};
use kiln_ops::FusedOps;

pub use config::VaeConfig;
pub(crate) use exact::{Levels, Span};
pub use tiling::{Blending, Tiling, TilingError, TilingMode, VaeSettings};

use crate::layers::Conv2d;
use crate::source::TensorSource;
use crate::weights::{LoadError, Precision, Weights};
use decoder::Decoder;

/// Stored tensors that decoding a single frame does not use.
const UNUSED: [&str; 3] = ["encoder.", "quant_conv.", ".time_conv."];

/// The VAE's decoder: turns latents into images.
#[derive(Module, Debug)]
pub struct VaeDecoder<B: FusedOps> {
    post_quant_conv: Conv2d<B>,
    decoder: Decoder<B>,
    /// `[1, z_dim, 1, 1]`, f32.
    latents_mean: Tensor<B, 4>,
    /// `1 / std`, `[1, z_dim, 1, 1]` f32. The reference divides by it too, so that rounding is the
    /// same.
    inverse_latents_std: Tensor<B, 4>,
    scale_factor: usize,
    #[module(skip)]
    levels: Levels,
    #[module(skip)]
    precision: Precision,
}

impl<B: FusedOps> VaeDecoder<B> {
    /// Loads the decoder onto a device.
    ///
    /// # Errors
    /// If a tensor is missing or has another shape, or if the component has tensors that this
    /// network does not know.
    pub fn load(
        config: &VaeConfig,
        source: Arc<dyn TensorSource>,
        device: &B::Device,
        precision: Precision,
    ) -> Result<Self, LoadError> {
        let weights = Weights::new(source, device, precision);
        let root = weights.at("");
        let z_dim = config.z_dim;
        let per_channel = |values: Vec<f32>| {
            let data = TensorData::new(values, [1, z_dim, 1, 1]);
            Tensor::from_data(data, (device, DType::F32))
        };
        let inverse_std = config
            .latents_std
            .iter()
            .map(|&std| 1.0 / std as f32)
            .collect();
        let vae = Self {
            post_quant_conv: Conv2d::load_causal_3d(
                &root.at("post_quant_conv"),
                [z_dim, z_dim],
                1,
            )?,
            decoder: Decoder::load(config, &root.at("decoder"))?,
            latents_mean: per_channel(config.latents_mean.iter().map(|&m| m as f32).collect()),
            inverse_latents_std: per_channel(inverse_std),
            scale_factor: config.scale_factor(),
            levels: Levels::of(config),
            precision,
        };
        weights.refuse_unknown(&UNUSED)?;
        Ok(vae)
    }

    /// Computes `latents · std + mean` per channel: the latents of the VAE from the normalised ones
    /// that the transformer works on.
    ///
    /// # Shapes
    /// - latents and output: `[images, z_dim, height, width]`, f32
    pub fn denormalise(&self, latents: Tensor<B, 4>) -> Tensor<B, 4> {
        latents / self.inverse_latents_std.clone() + self.latents_mean.clone()
    }

    /// Decodes latents to RGB images.
    ///
    /// # Shapes
    /// - latents: `[images, z_dim, height, width]` f32, from [`VaeDecoder::denormalise`]
    /// - output: `[images, 3, height · scale, width · scale]` f32, nominally from -1 to 1
    pub fn decode(&self, latents: Tensor<B, 4>, settings: VaeSettings) -> Tensor<B, 4> {
        let images = latents.dims()[0];
        if settings.use_slicing && images > 1 {
            let slices = latents.split(1, 0).into_iter();
            return Tensor::cat(
                slices
                    .map(|slice| self.decode_batch(slice, settings))
                    .collect(),
                0,
            );
        }
        self.decode_batch(latents, settings)
    }

    fn decode_batch(&self, latents: Tensor<B, 4>, settings: VaeSettings) -> Tensor<B, 4> {
        let [_, _, height, width] = latents.dims();
        match settings.tiling_of([height, width], self.scale_factor) {
            None => self.decode_exact(latents, usize::MAX),
            Some(Tiling::Exact { size }) => self.decode_exact(latents, size / self.scale_factor),
            Some(Tiling::Blended(blending)) => {
                let tiles = blending.in_latents(self.scale_factor);
                tiles.decode(latents, |tile| self.decode_exact(tile, usize::MAX))
            }
        }
    }

    /// Decodes in tiles of at most `size` latents, or whole if they are not larger.
    fn decode_exact(&self, latents: Tensor<B, 4>, size: usize) -> Tensor<B, 4> {
        let [_, _, height, width] = latents.dims();
        let latents = latents.cast(self.precision.activations);
        let middle = self.decoder.middle(self.post_quant_conv.forward(latents));
        let tile = |middle, rows: &[Span], columns: &[Span]| {
            self.decoder.upper(middle, rows, columns).cast(DType::F32)
        };
        let [rows, columns] = [height, width].map(|side| self.levels.tiles(side, size));
        if let ([rows], [columns]) = (&rows[..], &columns[..]) {
            // Hands over the middle block's output, which is freed while the image is decoded.
            return tile(middle, rows, columns);
        }
        let bands = rows.iter().map(|rows| {
            let columns = columns.iter();
            let tiles = columns.map(|columns| tile(middle.clone(), rows, columns));
            Tensor::cat(tiles.collect(), 3)
        });
        Tensor::cat(bands.collect(), 2)
    }
}
