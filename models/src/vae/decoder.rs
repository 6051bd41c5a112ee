//! The decoder network on images.

use burn_tensor::Tensor;
use kiln_ops::FusedOps;

use super::VaeConfig;
use crate::weights::{Conv2d, LoadError, Scope};

#[derive(Debug)]
pub(super) struct Decoder<B: FusedOps> {
    conv_in: Conv2d<B>,
    mid_block: MidBlock<B>,
    up_blocks: Vec<UpBlock<B>>,
    norm_out: Tensor<B, 1>,
    conv_out: Conv2d<B>,
}

impl<B: FusedOps> Decoder<B> {
    pub(super) fn load(config: &VaeConfig, at: &Scope<B>) -> Result<Self, LoadError> {
        let widths: Vec<usize> = config
            .dim_mult
            .iter()
            .rev()
            .map(|mult| config.base_dim * mult)
            .collect();
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
            conv_in: at.at("conv_in").causal_conv3d(config.z_dim, lowest, 3)?,
            mid_block: MidBlock::load(&at.at("mid_block"), lowest)?,
            up_blocks,
            norm_out: at.at("norm_out").channel_norm(widths[last], 3)?,
            conv_out: at.at("conv_out").causal_conv3d(widths[last], 3, 3)?,
        })
    }

    /// `[images, z, h, w]` to `[images, 3, h · scale, w · scale]`.
    pub(super) fn forward(&self, x: Tensor<B, 4>) -> Tensor<B, 4> {
        let mut x = self.mid_block.forward(self.conv_in.forward(x));
        for up_block in &self.up_blocks {
            x = up_block.forward(x);
        }
        self.conv_out
            .forward(B::channel_norm_silu(x, self.norm_out.clone()))
    }
}

#[derive(Debug)]
struct MidBlock<B: FusedOps> {
    resnets: [ResidualBlock<B>; 2],
    attention: AttentionBlock<B>,
}

impl<B: FusedOps> MidBlock<B> {
    fn load(at: &Scope<B>, channels: usize) -> Result<Self, LoadError> {
        let resnet = |index: usize| {
            ResidualBlock::load(&at.at(format!("resnets.{index}")), channels, channels)
        };
        Ok(Self {
            resnets: [resnet(0)?, resnet(1)?],
            attention: AttentionBlock::load(&at.at("attentions.0"), channels)?,
        })
    }

    fn forward(&self, x: Tensor<B, 4>) -> Tensor<B, 4> {
        let x = self.resnets[0].forward(x);
        let x = self.attention.forward(x);
        self.resnets[1].forward(x)
    }
}

/// Residual blocks at one resolution, then the way to the next one up.
#[derive(Debug)]
struct UpBlock<B: FusedOps> {
    resnets: Vec<ResidualBlock<B>>,
    /// Halves the channels after the pixels are doubled.
    upsampler: Option<Conv2d<B>>,
}

impl<B: FusedOps> UpBlock<B> {
    fn load(
        config: &VaeConfig,
        at: &Scope<B>,
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
                at.at("upsamplers.0.resample.1")
                    .conv2d(channels, channels / 2, 3)
            })
            .transpose()?;
        Ok(Self { resnets, upsampler })
    }

    fn forward(&self, mut x: Tensor<B, 4>) -> Tensor<B, 4> {
        for resnet in &self.resnets {
            x = resnet.forward(x);
        }
        match &self.upsampler {
            Some(conv) => conv.forward(B::upsample_nearest(x)),
            None => x,
        }
    }
}

#[derive(Debug)]
struct ResidualBlock<B: FusedOps> {
    norm1: Tensor<B, 1>,
    conv1: Conv2d<B>,
    norm2: Tensor<B, 1>,
    conv2: Conv2d<B>,
    conv_shortcut: Option<Conv2d<B>>,
}

impl<B: FusedOps> ResidualBlock<B> {
    fn load(at: &Scope<B>, channels_in: usize, channels: usize) -> Result<Self, LoadError> {
        let conv_shortcut = (channels_in != channels)
            .then(|| {
                at.at("conv_shortcut")
                    .causal_conv3d(channels_in, channels, 1)
            })
            .transpose()?;
        Ok(Self {
            norm1: at.at("norm1").channel_norm(channels_in, 3)?,
            conv1: at.at("conv1").causal_conv3d(channels_in, channels, 3)?,
            norm2: at.at("norm2").channel_norm(channels, 3)?,
            conv2: at.at("conv2").causal_conv3d(channels, channels, 3)?,
            conv_shortcut,
        })
    }

    fn forward(&self, x: Tensor<B, 4>) -> Tensor<B, 4> {
        let shortcut = match &self.conv_shortcut {
            Some(conv) => conv.forward(x.clone()),
            None => x.clone(),
        };
        let x = self
            .conv1
            .forward(B::channel_norm_silu(x, self.norm1.clone()));
        let x = self
            .conv2
            .forward(B::channel_norm_silu(x, self.norm2.clone()));
        x + shortcut
    }
}

/// Self-attention over the pixels, with one head as wide as the channels.
#[derive(Debug)]
struct AttentionBlock<B: FusedOps> {
    norm: Tensor<B, 1>,
    to_qkv: Conv2d<B>,
    proj: Conv2d<B>,
}

impl<B: FusedOps> AttentionBlock<B> {
    fn load(at: &Scope<B>, channels: usize) -> Result<Self, LoadError> {
        Ok(Self {
            norm: at.at("norm").channel_norm(channels, 2)?,
            to_qkv: at.at("to_qkv").conv2d(channels, 3 * channels, 1)?,
            proj: at.at("proj").conv2d(channels, channels, 1)?,
        })
    }

    fn forward(&self, x: Tensor<B, 4>) -> Tensor<B, 4> {
        let [images, channels, height, width] = x.dims();
        let pixels = height * width;
        let qkv = self
            .to_qkv
            .forward(B::channel_norm(x.clone(), self.norm.clone()));
        // [images, 3 · channels, h, w] -> [images · h · w, 1, channels] each
        let qkv = qkv.reshape([images, 3 * channels, pixels]).swap_dims(1, 2);
        let part = |index: usize| {
            qkv.clone().narrow(2, index * channels, channels).reshape([
                images * pixels,
                1,
                channels,
            ])
        };
        let attended = B::packed_attention(part(0), part(1), part(2), &vec![pixels; images], false);
        let attended = attended
            .reshape([images, pixels, channels])
            .swap_dims(1, 2)
            .reshape([images, channels, height, width]);
        self.proj.forward(attended) + x
    }
}
