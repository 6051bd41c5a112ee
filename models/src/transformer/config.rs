//! The transformer's config.json.

use kiln_ops::KernelShape;

use super::modulation::TIME_CHANNELS;
use crate::adapter::AdapterTarget;
use crate::config::{ConfigError, ConfigReader, ConfigText};

/// The largest allowed default size, in latents: 4,096 pixels a side, half of the pixels that a
/// request may ask for.
const MAX_SAMPLE_SIZE: usize = 512;

/// The values of config.json that kiln uses, of class `QwenImageTransformer2DModel`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TransformerConfig {
    /// Latents per packed token, in height and in width. Always 2.
    pub patch_size: usize,
    /// Channels of a packed latent token.
    pub in_channels: usize,
    /// Channels of a latent: `in_channels / patch_size²`.
    pub out_channels: usize,
    pub num_layers: usize,
    pub attention_head_dim: usize,
    pub num_attention_heads: usize,
    /// Width of the prompt embeddings.
    pub joint_attention_dim: usize,
    /// Dimensions of a head that are rotated by the frame, height and width positions.
    pub axes_dims_rope: [usize; 3],
    /// Default height and width of an image, in latents. Other transformers of diffusers have this
    /// key; Qwen-Image's has none, and its pipeline uses 128.
    pub sample_size: usize,
}

impl TransformerConfig {
    /// Parses config.json.
    ///
    /// # Errors
    /// If it is no valid JSON, of another class, or has a value that kiln does not support.
    pub fn from_json(config: &ConfigText) -> Result<Self, ConfigError> {
        let reader = ConfigReader::parse(config)?;
        reader.require_class("QwenImageTransformer2DModel")?;
        for switch in [
            "guidance_embeds",
            "use_additional_t_cond",
            "use_layer3d_rope",
            "zero_cond_t",
        ] {
            reader.require_off(switch)?;
        }
        reader.refuse_unknown(&[
            "attention_head_dim",
            "axes_dims_rope",
            "in_channels",
            "joint_attention_dim",
            "num_attention_heads",
            "num_layers",
            "out_channels",
            "patch_size",
            // Published with Qwen-Image; the class has no such parameter.
            "pooled_projection_dim",
            "sample_size",
        ])?;
        let axes = if reader.value("axes_dims_rope").is_some() {
            reader.sizes("axes_dims_rope")?
        } else {
            vec![16, 56, 56]
        };
        let attention_head_dim = reader.size_or("attention_head_dim", 128)?;
        let axes_dims_rope = <[usize; 3]>::try_from(axes.as_slice()).map_err(|_| {
            reader.inconsistent("`axes_dims_rope` must have three values (frame, height, width)")
        })?;
        if axes.iter().sum::<usize>() != attention_head_dim || axes.iter().any(|axis| axis % 2 != 0)
        {
            return Err(reader.inconsistent(format!(
                "`axes_dims_rope` {axes:?} must be even numbers that sum to `attention_head_dim` \
                 ({attention_head_dim})"
            )));
        }
        let in_channels = reader.size_or("in_channels", 64)?;
        let config = Self {
            patch_size: reader.size_or("patch_size", 2)?,
            in_channels,
            out_channels: match reader.value("out_channels") {
                Some(_) => reader.size("out_channels")?,
                None => in_channels,
            },
            num_layers: reader.size_or("num_layers", 60)?,
            attention_head_dim,
            num_attention_heads: reader.size_or("num_attention_heads", 24)?,
            joint_attention_dim: reader.size_or("joint_attention_dim", 3584)?,
            axes_dims_rope,
            sample_size: reader.size_or("sample_size", 128)?,
        };
        if config.patch_size != 2 {
            return Err(reader.unsupported("patch_size", "2, as the pipeline packs latents"));
        }
        let fits = config.sample_size.is_multiple_of(config.patch_size);
        if !fits || config.sample_size > MAX_SAMPLE_SIZE {
            return Err(reader.unsupported(
                "sample_size",
                format!("multiples of patch_size up to {MAX_SAMPLE_SIZE}"),
            ));
        }
        if config.patch_channels() != config.in_channels {
            return Err(reader.inconsistent(format!(
                "`in_channels` ({in_channels}) must be patch_size² · `out_channels` ({}), or the \
                 prediction cannot be subtracted from the latents",
                config.patch_channels()
            )));
        }
        Ok(config)
    }

    /// Width of both streams: heads times head dimension.
    pub fn dim(&self) -> usize {
        self.num_attention_heads * self.attention_head_dim
    }

    /// The linear layers that an adapter can change, block by block.
    pub fn adapter_targets(&self) -> Vec<AdapterTarget> {
        let dim = self.dim();
        let target = |path: String, d_in, d_out| AdapterTarget { path, d_in, d_out };
        let mut targets = vec![
            target("img_in".to_owned(), self.in_channels, dim),
            target("txt_in".to_owned(), self.joint_attention_dim, dim),
            target("proj_out".to_owned(), dim, self.patch_channels()),
            target("norm_out.linear".to_owned(), dim, 2 * dim),
        ];
        let embedder = "time_text_embed.timestep_embedder";
        targets.extend([
            target(format!("{embedder}.linear_1"), TIME_CHANNELS, dim),
            target(format!("{embedder}.linear_2"), dim, dim),
        ]);
        for block in 0..self.num_layers {
            let of_block = |name: &&str, d_in, d_out| {
                target(format!("transformer_blocks.{block}.{name}"), d_in, d_out)
            };
            let attention = [
                "attn.to_q",
                "attn.to_k",
                "attn.to_v",
                "attn.to_out.0",
                "attn.add_q_proj",
                "attn.add_k_proj",
                "attn.add_v_proj",
                "attn.to_add_out",
            ];
            targets.extend(attention.iter().map(|name| of_block(name, dim, dim)));
            for mlp in ["img_mlp", "txt_mlp"] {
                targets.push(of_block(&&*format!("{mlp}.net.0.proj"), dim, 4 * dim));
                targets.push(of_block(&&*format!("{mlp}.net.2"), 4 * dim, dim));
            }
            let modulation = ["img_mod.1", "txt_mod.1"];
            targets.extend(modulation.iter().map(|name| of_block(name, dim, 6 * dim)));
        }
        targets
    }

    /// Op sizes that the transformer uses.
    pub(crate) fn kernel_shapes(&self) -> Vec<KernelShape> {
        let (dim, heads, head_dim) = (
            self.dim(),
            self.num_attention_heads,
            self.attention_head_dim,
        );
        let linears = [
            (self.in_channels, dim),
            (self.joint_attention_dim, dim),
            (dim, dim),
            (dim, 4 * dim),
            (4 * dim, dim),
            (dim, self.patch_channels()),
        ];
        let mut shapes = linears
            .map(|(d_in, d_out)| KernelShape::Linear { d_in, d_out })
            .to_vec();
        shapes.extend([
            KernelShape::RmsNorm {
                dim: self.joint_attention_dim,
            },
            KernelShape::LayerNormModulate { dim },
            KernelShape::Elementwise { dim },
            KernelShape::QkNormRope { heads, head_dim },
            KernelShape::Attention {
                heads,
                kv_heads: heads,
                head_dim,
                causal: false,
            },
        ]);
        shapes
    }

    /// Channels of a predicted token.
    pub(crate) fn patch_channels(&self) -> usize {
        self.patch_size * self.patch_size * self.out_channels
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(body: &str) -> Result<TransformerConfig, ConfigError> {
        let text = format!(r#"{{"_class_name": "QwenImageTransformer2DModel"{body}}}"#);
        TransformerConfig::from_json(&ConfigText {
            file: "config.json".to_owned(),
            text,
        })
    }

    #[test]
    fn published_configuration() {
        let config = parse(
            r#", "_diffusers_version": "0.34.0.dev0", "attention_head_dim": 128,
            "axes_dims_rope": [16, 56, 56], "guidance_embeds": false, "in_channels": 64,
            "joint_attention_dim": 3584, "num_attention_heads": 24, "num_layers": 60,
            "out_channels": 16, "patch_size": 2, "pooled_projection_dim": 768"#,
        );
        let config = config.unwrap();
        assert_eq!((config.dim(), config.sample_size), (3072, 128));
    }

    #[test]
    fn a_model_may_have_its_own_size() {
        assert_eq!(
            parse(r#", "sample_size": 16, "out_channels": 16"#)
                .unwrap()
                .sample_size,
            16
        );
    }

    #[test]
    fn what_cannot_be_honoured_is_named() {
        for (body, named) in [
            (r#", "guidance_embeds": true"#, "guidance_embeds"),
            (r#", "zero_cond_t": true"#, "zero_cond_t"),
            (r#", "use_layer3d_rope": true"#, "use_layer3d_rope"),
            (
                r#", "use_additional_t_cond": true"#,
                "use_additional_t_cond",
            ),
            (
                r#", "quantization_config": {"bits": 4}"#,
                "quantization_config",
            ),
            (r#", "patch_size": 1"#, "patch_size"),
            (r#", "axes_dims_rope": [16, 56]"#, "axes_dims_rope"),
            (r#", "axes_dims_rope": [16, 56, 55]"#, "axes_dims_rope"),
            (r#", "num_layers": "sixty""#, "num_layers"),
            (r#", "in_channels": 60"#, "in_channels"),
            (r#", "sample_size": 15"#, "sample_size"),
            (r#", "sample_size": 514"#, "sample_size"),
        ] {
            let error = parse(body).unwrap_err().to_string();
            assert!(error.contains(named), "{error}");
        }
    }
}
