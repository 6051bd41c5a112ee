//! The VAE's config.json.

use kiln_ops::KernelShape;

use crate::config::{ConfigError, ConfigReader, ConfigText};

/// The values of config.json that the decoder uses, of class `AutoencoderKLQwenImage`.
#[derive(Debug, Clone, PartialEq)]
pub struct VaeConfig {
    pub base_dim: usize,
    /// Channels of the latents.
    pub z_dim: usize,
    /// Channels of the levels as multiples of `base_dim`, from full to lowest resolution.
    pub dim_mult: Vec<usize>,
    /// Residual blocks per level, without the one that changes the number of channels.
    pub num_res_blocks: usize,
    /// Mean of each latent channel.
    pub latents_mean: Vec<f64>,
    /// Standard deviation of each latent channel.
    pub latents_std: Vec<f64>,
}

impl VaeConfig {
    /// Op sizes that the decoder uses.
    pub(crate) fn kernel_shapes(&self) -> Vec<KernelShape> {
        let widths = self.widths();
        let (highest, lowest) = (widths[0], widths[widths.len() - 1]);
        let convolution = |channels_in, channels_out, kernel| KernelShape::Convolution {
            channels_in,
            channels_out,
            kernel,
        };
        let mut shapes = vec![
            convolution(self.z_dim, self.z_dim, 1),
            convolution(self.z_dim, lowest, 3),
            convolution(lowest, lowest, 1),
            convolution(highest, 3, 3),
            KernelShape::Attention {
                heads: 1,
                kv_heads: 1,
                head_dim: lowest,
                causal: false,
            },
        ];
        for width in widths {
            shapes.push(convolution(width, width, 3));
            shapes.push(KernelShape::ChannelNorm { channels: width });
        }
        shapes
    }

    /// Parses config.json.
    ///
    /// # Errors
    /// If it is no valid JSON, of another class, or has a value that kiln does not support.
    pub fn from_json(config: &ConfigText) -> Result<Self, ConfigError> {
        let reader = ConfigReader::parse(config)?;
        reader.require_class("AutoencoderKLQwenImage")?;
        reader.refuse_unknown(&[
            // Used by the encoder and in training only.
            "attn_scales",
            "dropout",
            "base_dim",
            "dim_mult",
            "input_channels",
            "latents_mean",
            "latents_std",
            "num_res_blocks",
            "temperal_downsample",
            "z_dim",
        ])?;
        if reader.size_or("input_channels", 3)? != 3 {
            return Err(reader.unsupported("input_channels", "3 (RGB)"));
        }
        let list = |key: &str, default: &[usize]| match reader.value(key) {
            Some(_) => reader.sizes(key),
            None => Ok(default.to_vec()),
        };
        let config = Self {
            base_dim: reader.size_or("base_dim", 96)?,
            z_dim: reader.size_or("z_dim", 16)?,
            dim_mult: list("dim_mult", &[1, 2, 4, 4])?,
            num_res_blocks: reader.size_or("num_res_blocks", 2)?,
            latents_mean: reader.numbers("latents_mean")?,
            latents_std: reader.numbers("latents_std")?,
        };
        let stages = match reader.value("temperal_downsample") {
            Some(value) => value.as_array().map(Vec::len),
            None => Some(3),
        };
        if config.dim_mult.len() < 2 || stages != Some(config.dim_mult.len() - 1) {
            return Err(reader.inconsistent(format!(
                "`temperal_downsample` must have one value fewer than `dim_mult` {:?}, and at \
                 least one",
                config.dim_mult
            )));
        }
        for (key, values) in [
            ("latents_mean", &config.latents_mean),
            ("latents_std", &config.latents_std),
        ] {
            if values.len() != config.z_dim {
                return Err(reader.inconsistent(format!(
                    "`{key}` has {} values, `z_dim` is {}",
                    values.len(),
                    config.z_dim
                )));
            }
        }
        if config.latents_std.contains(&0.0) {
            return Err(reader.unsupported("latents_std", "values other than 0"));
        }
        // Each upsampler halves the channels of its level.
        let last_level = config.dim_mult.len() - 1;
        if let Some(odd) = (1..=last_level)
            .find(|&level| !(config.base_dim * config.dim_mult[level]).is_multiple_of(2))
        {
            return Err(reader.inconsistent(format!(
                "`base_dim` ({}) times `dim_mult`[{odd}] ({}) must be even",
                config.base_dim, config.dim_mult[odd]
            )));
        }
        Ok(config)
    }

    /// Channels at each resolution, the highest resolution first.
    pub(crate) fn widths(&self) -> Vec<usize> {
        let multiples = self.dim_mult.iter();
        multiples.map(|mult| self.base_dim * mult).collect()
    }

    /// Pixels per latent, in height and in width.
    pub fn scale_factor(&self) -> usize {
        1 << (self.dim_mult.len() - 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(body: &str) -> Result<VaeConfig, ConfigError> {
        let text = format!(
            r#"{{"_class_name": "AutoencoderKLQwenImage", "z_dim": 2, "latents_mean": [0, 0],
                "latents_std": [1, 1]{body}}}"#
        );
        VaeConfig::from_json(&ConfigText {
            file: "config.json".to_owned(),
            text,
        })
    }

    #[test]
    fn scale_follows_the_levels() {
        assert_eq!(parse("").unwrap().scale_factor(), 8);
        let three = parse(r#", "dim_mult": [1, 2, 2], "temperal_downsample": [false, true]"#);
        assert_eq!(three.unwrap().scale_factor(), 4);
    }

    #[test]
    fn what_cannot_be_honoured_is_named() {
        for (body, named) in [
            (r#", "input_channels": 4"#, "input_channels"),
            (r#", "is_residual": true"#, "is_residual"),
            (r#", "temperal_downsample": [false]"#, "temperal_downsample"),
            (r#", "base_dim": 3, "dim_mult": [1, 1, 1, 1]"#, "base_dim"),
            (r#", "base_dim": 0"#, "base_dim"),
        ] {
            let error = parse(body).unwrap_err().to_string();
            assert!(error.contains(named), "{error}");
        }
    }
}
