//! The decoder network on single frames: `QwenImageDecoder3d` of diffusers.

use std::ops::Range;

use burn::module::Module;
use burn::tensor::Tensor;
use kiln_ops::FusedOps;

use super::{Span, VaeConfig};
use crate::layers::{ChannelNorm, Conv2d};
use crate::weights::{LoadError, Scope};

/// The decoder: a middle block at the lowest resolution, then blocks of rising resolution.
#[derive(Module, Debug)]
pub(super) struct Decoder<B: FusedOps> {
    conv_in: Conv2d<B>,
    mid_block: MidBlock<B>,
    up_blocks: Vec<UpBlock<B>>,
    norm_out: ChannelNorm<B>,
    conv_out: Conv2d<B>,
}

impl<B: FusedOps> Decoder<B> {
    /// # Errors
    /// If a tensor is missing or has another shape.
    pub(super) fn load(config: &VaeConfig, at: &Scope<B::Device>) -> Result<Self, LoadError> {
        let mut widths = config.widths();
        widths.reverse();
        let lowest = widths[0];
        let last = widths.len() - 1;
        let mut channels = lowest;
        let mut up_blocks = Vec::with_capacity(widths.len());
        for (index, &width) in widths.iter().enumerate() {
            let at = at.at(format!("up_blocks.{index}"));
            up_blocks.push(UpBlock::load(config, &at, [channels, width], index < last)?);
            channels = width / 2;
        }
        Ok(Self {
            conv_in: Conv2d::load_causal_3d(&at.at("conv_in"), [config.z_dim, lowest], 3)?,
            mid_block: MidBlock::load(&at.at("mid_block"), lowest)?,
            up_blocks,
            norm_out: ChannelNorm::load(&at.at("norm_out"), widths[last], 3)?,
            conv_out: Conv2d::load_causal_3d(&at.at("conv_out"), [widths[last], 3], 3)?,
        })
    }

    /// The part up to and with the middle block, in which every pixel depends on every other.
    ///
    /// # Shapes
    /// - x: `[images, z_dim, height, width]`
    /// - output: `[images, channels, height, width]`
    pub(super) fn middle(&self, x: Tensor<B, 4>) -> Tensor<B, 4> {
        self.mid_block.forward(self.conv_in.forward(x))
    }

    /// The rest, for one tile of the image, whose rows and columns have a span for each of the blocks.
    ///
    /// # Shapes
    /// - x: `[images, channels, height, width]`, the whole output of [`Decoder::middle`]
    /// - output: `[images, 3, rows, columns]`
    pub(super) fn upper(
        &self,
        mut x: Tensor<B, 4>,
        rows: &[Span],
        columns: &[Span],
    ) -> Tensor<B, 4> {
        // The row and column of the image, at the resolution of `x`, where `x` starts.
        let mut origin = [0, 0];
        for (up_block, (rows, columns)) in self.up_blocks.iter().zip(rows.iter().zip(columns)) {
            x = crop(x, origin, [&rows.input, &columns.input]);
            x = up_block.forward_resnets(x);
            origin = [rows.input.start, columns.input.start];
            if let Some(upsampler) = &up_block.upsampler {
                x = crop(x, origin, [&rows.output, &columns.output]);
                x = upsampler.forward(B::upsample_nearest(x));
                origin = [2 * rows.output.start, 2 * columns.output.start];
            }
        }
        x = self.conv_out.forward(self.norm_out.forward_silu(x));
        match (rows.last(), columns.last()) {
            (Some(rows), Some(columns)) => crop(x, origin, [&rows.output, &columns.output]),
            _ => x,
        }
    }
}

/// Attention between two residual blocks; channels and resolution stay.
#[derive(Module, Debug)]
pub(super) struct MidBlock<B: FusedOps> {
    resnets: [ResidualBlock<B>; 2],
    attention: AttentionBlock<B>,
}

impl<B: FusedOps> MidBlock<B> {
    /// # Errors
    /// If a tensor is missing or has another shape.
    fn load(at: &Scope<B::Device>, channels: usize) -> Result<Self, LoadError> {
        let resnet = |index: usize| {
            ResidualBlock::load(&at.at(format!("resnets.{index}")), channels, channels)
        };
        Ok(Self {
            resnets: [resnet(0)?, resnet(1)?],
            attention: AttentionBlock::load(&at.at("attentions.0"), channels)?,
        })
    }

    /// # Shapes
    /// - x and output: `[images, channels, height, width]`
    fn forward(&self, x: Tensor<B, 4>) -> Tensor<B, 4> {
        let x = self.resnets[0].forward(x);
        let x = self.attention.forward(x);
        self.resnets[1].forward(x)
    }
}

/// Residual blocks at one resolution, then an optional 2x upsampler.
#[derive(Module, Debug)]
pub(super) struct UpBlock<B: FusedOps> {
    resnets: Vec<ResidualBlock<B>>,
    /// The convolution after upsampling, which halves the channels.
    upsampler: Option<Conv2d<B>>,
}

impl<B: FusedOps> UpBlock<B> {
    /// # Errors
    /// If a tensor is missing or has another shape.
    fn load(
        config: &VaeConfig,
        at: &Scope<B::Device>,
        [channels_in, channels]: [usize; 2],
        upsample: bool,
    ) -> Result<Self, LoadError> {
        let resnets = (0..=config.num_res_blocks)
            .map(|index| {
                let channels_in = if index == 0 { channels_in } else { channels };
                ResidualBlock::load(&at.at(format!("resnets.{index}")), channels_in, channels)
            })
            .collect::<Result<_, _>>()?;
        let upsampler = upsample
            .then(|| {
                let at = at.at("upsamplers.0.resample.1");
                Conv2d::load(&at, [channels, channels / 2], 3)
            })
            .transpose()?;
        Ok(Self { resnets, upsampler })
    }

    /// # Shapes
    /// - x: `[images, channels_in, height, width]`
    /// - output: `[images, channels, height, width]`
    fn forward_resnets(&self, mut x: Tensor<B, 4>) -> Tensor<B, 4> {
        for resnet in &self.resnets {
            x = resnet.forward(x);
        }
        x
    }
}

/// Cuts these rows and columns of the image out of `x`, which starts at `origin`.
fn crop<B: FusedOps>(
    x: Tensor<B, 4>,
    origin: [usize; 2],
    [rows, columns]: [&Range<usize>; 2],
) -> Tensor<B, 4> {
    let within = |range: &Range<usize>, origin: usize| range.start - origin..range.end - origin;
    let (rows, columns) = (within(rows, origin[0]), within(columns, origin[1]));
    let [_, _, height, width] = x.dims();
    if (&rows, &columns) == (&(0..height), &(0..width)) {
        return x;
    }
    B::crop(x, rows, columns)
}

/// Two convolutions, each after a norm and `silu`, added to the block's input. The input goes through
/// `conv_shortcut` where the number of channels changes.
#[derive(Module, Debug)]
pub(super) struct ResidualBlock<B: FusedOps> {
    norm1: ChannelNorm<B>,
    conv1: Conv2d<B>,
    norm2: ChannelNorm<B>,
    conv2: Conv2d<B>,
    conv_shortcut: Option<Conv2d<B>>,
}

impl<B: FusedOps> ResidualBlock<B> {
    /// # Errors
    /// If a tensor is missing or has another shape.
    fn load(at: &Scope<B::Device>, channels_in: usize, channels: usize) -> Result<Self, LoadError> {
        let conv_shortcut = (channels_in != channels)
            .then(|| Conv2d::load_causal_3d(&at.at("conv_shortcut"), [channels_in, channels], 1))
            .transpose()?;
        Ok(Self {
            norm1: ChannelNorm::load(&at.at("norm1"), channels_in, 3)?,
            conv1: Conv2d::load_causal_3d(&at.at("conv1"), [channels_in, channels], 3)?,
            norm2: ChannelNorm::load(&at.at("norm2"), channels, 3)?,
            conv2: Conv2d::load_causal_3d(&at.at("conv2"), [channels, channels], 3)?,
            conv_shortcut,
        })
    }

    /// # Shapes
    /// - x: `[images, channels_in, height, width]`
    /// - output: `[images, channels, height, width]`
    fn forward(&self, x: Tensor<B, 4>) -> Tensor<B, 4> {
        let shortcut = match &self.conv_shortcut {
            Some(conv) => conv.forward(x.clone()),
            None => x.clone(),
        };
        let x = self.conv1.forward(self.norm1.forward_silu(x));
        let x = self.conv2.forward(self.norm2.forward_silu(x));
        x + shortcut
    }
}

/// Self-attention over the pixels, with one head as wide as the channels.
#[derive(Module, Debug)]
pub(super) struct AttentionBlock<B: FusedOps> {
    norm: ChannelNorm<B>,
    to_qkv: Conv2d<B>,
    proj: Conv2d<B>,
}

impl<B: FusedOps> AttentionBlock<B> {
    /// # Errors
    /// If a tensor is missing or has another shape.
    fn load(at: &Scope<B::Device>, channels: usize) -> Result<Self, LoadError> {
        Ok(Self {
            norm: ChannelNorm::load(&at.at("norm"), channels, 2)?,
            to_qkv: Conv2d::load(&at.at("to_qkv"), [channels, 3 * channels], 1)?,
            proj: Conv2d::load(&at.at("proj"), [channels, channels], 1)?,
        })
    }

    /// # Shapes
    /// - x and output: `[images, channels, height, width]`
    fn forward(&self, x: Tensor<B, 4>) -> Tensor<B, 4> {
        let [images, channels, height, width] = x.dims();
        let pixels = height * width;
        let normed = self.norm.forward(x.clone());
        // One after the other, because a view of all three would keep all three alive.
        // [images, channels, h, w] -> [images · h · w, 1, channels]
        let [query, key, value] = [0, 1, 2].map(|index| {
            let x = normed.clone();
            let part = self.to_qkv.forward_channels(x, index * channels, channels);
            let part = part.reshape([images, channels, pixels]).swap_dims(1, 2);
            part.reshape([images * pixels, 1, channels])
        });
        drop(normed);
        let attended = B::packed_attention(query, key, value, &vec![pixels; images], false);
        let attended = attended
            .reshape([images, pixels, channels])
            .swap_dims(1, 2)
            .reshape([images, channels, height, width]);
        self.proj.forward(attended) + x
    }
}
