//! The decoder of `AutoencoderKLQwenImage`, for single frames.
//!
//! On a single frame every causal 3-D convolution equals the 2-D one with the last temporal slice of
//! its kernel, and `time_conv` is not used. The result is exact and takes 2.5 times less work.

mod config;
mod decoder;
mod tiling;

use std::sync::Arc;

use burn::module::Module;
use burn::tensor::{DType, Tensor, TensorData};
use kiln_ops::FusedOps;

pub use config::VaeConfig;
pub use tiling::Tiling;

use crate::job::Decoding;
use crate::layers::Conv2d;
use crate::source::TensorSource;
use crate::weights::{LoadError, Precision, Weights};
use decoder::Decoder;

/// Stored tensors that decoding a single frame does not use.
const UNUSED: [&str; 3] = ["encoder.", "quant_conv.", ".time_conv."];

/// How a batch of latents is decoded: settings that trade speed for memory. Slicing does not change
/// the images; tiling changes them where tiles overlap.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct VaeSettings {
    /// Decodes one image at a time.
    pub use_slicing: bool,
    /// Decodes images that are larger than one tile in overlapping tiles.
    pub tiling: Option<Tiling>,
    /// The tiles of a job with [`Decoding::Tiled`] where [`VaeSettings::tiling`] names none.
    pub automatic_tiling: Tiling,
}

impl VaeSettings {
    /// The settings for the images of a job.
    #[must_use]
    pub fn of(self, decoding: Decoding) -> Self {
        let tiled = (decoding == Decoding::Tiled).then_some(self.automatic_tiling);
        Self {
            use_slicing: self.use_slicing || decoding != Decoding::AsSet,
            tiling: self.tiling.or(tiled),
            ..self
        }
    }

    /// The tiles of an image of this height and width in latents; `None` if it is decoded whole.
    pub(crate) fn tiling_of(&self, latents: [usize; 2], scale: usize) -> Option<Tiling> {
        let longest = latents[0].max(latents[1]);
        self.tiling.filter(|tiling| longest > tiling.size / scale)
    }
}

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
            Some(tiling) => {
                let tiles = tiling.in_latents(self.scale_factor);
                tiles.decode(latents, |tile| self.decode_whole(tile))
            }
            None => self.decode_whole(latents),
        }
    }

    fn decode_whole(&self, latents: Tensor<B, 4>) -> Tensor<B, 4> {
        let latents = latents.cast(self.precision.activations);
        self.decoder
            .forward(self.post_quant_conv.forward(latents))
            .cast(DType::F32)
    }
}
