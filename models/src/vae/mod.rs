//! The decoder of `AutoencoderKLQwenImage`, for one frame.
//!
//! On a single frame every causal 3-D convolution is the 2-D one with the last temporal slice of
//! its kernel, and `time_conv` is not used: exact, and 2.5 times less work.

mod config;
mod decoder;
mod tiling;

use std::sync::Arc;

use burn_tensor::{DType, Tensor, TensorData};
use kiln_ops::FusedOps;

pub use config::VaeConfig;
pub use tiling::Tiling;

use crate::source::TensorSource;
use crate::weights::{Conv2d, LoadError, Precision, Weights};
use decoder::Decoder;

/// Tensors that a single frame's decoding has no use for.
const UNUSED: [&str; 3] = ["encoder.", "quant_conv.", ".time_conv."];

/// How a batch of latents is decoded. All settings give the same picture but for the seams of
/// tiles, and trade speed for memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct VaeSettings {
    /// One image at a time.
    pub use_slicing: bool,
    /// In overlapping tiles, if the image is larger than one.
    pub tiling: Option<Tiling>,
}

/// From latents to pictures.
#[derive(Debug)]
pub struct VaeDecoder<B: FusedOps> {
    post_quant_conv: Conv2d<B>,
    decoder: Decoder<B>,
    /// `[1, z, 1, 1]`, f32.
    latents_mean: Tensor<B, 4>,
    /// One over the deviation: the reference divides by its inverse, and so do we.
    inverse_latents_std: Tensor<B, 4>,
    scale_factor: usize,
    precision: Precision,
}

impl<B: FusedOps> VaeDecoder<B> {
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
            post_quant_conv: root.at("post_quant_conv").causal_conv3d(z_dim, z_dim, 1)?,
            decoder: Decoder::load(config, &root.at("decoder"))?,
            latents_mean: per_channel(config.latents_mean.iter().map(|&m| m as f32).collect()),
            inverse_latents_std: per_channel(inverse_std),
            scale_factor: config.scale_factor(),
            precision,
        };
        weights.refuse_unknown(&UNUSED)?;
        Ok(vae)
    }

    /// From the denoiser's normalised latents to the VAE's own, `[images, z, h, w]` f32.
    pub fn denormalise(&self, latents: Tensor<B, 4>) -> Tensor<B, 4> {
        latents / self.inverse_latents_std.clone() + self.latents_mean.clone()
    }

    /// # Shapes
    /// - latents: `[images, z, h, w]` f32, from [`VaeDecoder::denormalise`]
    /// - output: `[images, 3, h · scale, w · scale]` f32, nominally from -1 to 1
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
        match settings.tiling {
            Some(tiling) if height.max(width) > tiling.size / self.scale_factor => {
                let tiles = tiling.in_latents(self.scale_factor);
                tiles.decode(latents, |tile| self.decode_whole(tile))
            }
            _ => self.decode_whole(latents),
        }
    }

    fn decode_whole(&self, latents: Tensor<B, 4>) -> Tensor<B, 4> {
        let latents = latents.cast(self.precision.activations);
        self.decoder
            .forward(self.post_quant_conv.forward(latents))
            .cast(DType::F32)
    }
}
