//! The text encoder's config.json.

use kiln_ops::KernelShape;
use serde_json::Value;

use crate::config::{ConfigError, ConfigReader, ConfigText};

/// Classes of transformers that hold the language model.
const CLASSES: [&str; 3] = [
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen2_5_VLModel",
    "Qwen2_5_VLTextModel",
];

/// The values of config.json that the language model uses, of one of the classes that transformers saves it from.
#[derive(Debug, Clone, PartialEq)]
pub struct TextEncoderConfig {
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub num_key_value_heads: usize,
    pub head_dim: usize,
    pub rms_norm_eps: f64,
    pub rope_theta: f64,
}

impl TextEncoderConfig {
    /// Parses config.json, in any of the forms that checkpoints on the Hub have: with the language
    /// model's values at the top level or under `text_config`, and with the rotary settings at the
    /// same level, in `rope_scaling` or in `rope_parameters`.
    ///
    /// # Errors
    /// If it is no valid JSON, of another architecture, or has a value that kiln does not support.
    pub fn from_json(config: &ConfigText) -> Result<Self, ConfigError> {
        let top = ConfigReader::parse(config)?;
        if let Some(value) = top.value("architectures") {
            let is_known = |name: &Value| name.as_str().is_some_and(|name| CLASSES.contains(&name));
            if !value
                .as_array()
                .is_some_and(|list| list.iter().any(is_known))
            {
                return Err(top.unsupported("architectures", CLASSES.join(", ")));
            }
        }
        if top.value("quantization_config").is_some() {
            return Err(top.unsupported("quantization_config", "unquantised weights"));
        }
        let text = top
            .object("text_config")?
            .filter(|text| text.value("hidden_size").is_some());
        let reader = text.as_ref().unwrap_or(&top);

        if reader.text_or("hidden_act", "silu")? != "silu" {
            return Err(reader.unsupported("hidden_act", "silu"));
        }
        reader.require_off("use_sliding_window")?;
        if let Some(types) = reader.value("layer_types") {
            let full = |list: &Vec<_>| list.iter().all(|kind| kind == "full_attention");
            if !types.as_array().is_some_and(full) {
                return Err(reader.unsupported("layer_types", "full_attention in every layer"));
            }
        }

        let hidden_size = reader.size("hidden_size")?;
        let num_attention_heads = reader.size("num_attention_heads")?;
        let head_dim = match reader.optional_size("head_dim")? {
            Some(head_dim) => head_dim,
            None => hidden_size / num_attention_heads,
        };
        let config = Self {
            vocab_size: reader.size("vocab_size")?,
            hidden_size,
            intermediate_size: reader.size("intermediate_size")?,
            num_hidden_layers: reader.size("num_hidden_layers")?,
            num_attention_heads,
            num_key_value_heads: reader.size_or("num_key_value_heads", num_attention_heads)?,
            head_dim,
            rms_norm_eps: reader.number_or("rms_norm_eps", 1e-6)?,
            rope_theta: rope_theta(reader)?,
        };
        if !config
            .num_attention_heads
            .is_multiple_of(config.num_key_value_heads)
        {
            return Err(reader.inconsistent(format!(
                "`num_attention_heads` ({}) must be a multiple of `num_key_value_heads` ({})",
                config.num_attention_heads, config.num_key_value_heads
            )));
        }
        if config.num_attention_heads * config.head_dim != hidden_size
            || !config.head_dim.is_multiple_of(2)
        {
            return Err(reader.inconsistent(format!(
                "`hidden_size` ({hidden_size}) must be `num_attention_heads` ({num_attention_heads}) \
                 times an even head dimension"
            )));
        }
        Ok(config)
    }

    /// Op sizes that the text encoder uses.
    pub(crate) fn kernel_shapes(&self) -> Vec<KernelShape> {
        let (heads, kv_heads) = (self.num_attention_heads, self.num_key_value_heads);
        let linears = [
            (self.hidden_size, self.hidden_size),
            (self.hidden_size, kv_heads * self.head_dim),
            (self.hidden_size, self.intermediate_size),
            (self.intermediate_size, self.hidden_size),
        ];
        let mut shapes = linears
            .map(|(d_in, d_out)| KernelShape::Linear { d_in, d_out })
            .to_vec();
        shapes.extend([
            KernelShape::RmsNorm {
                dim: self.hidden_size,
            },
            KernelShape::Attention {
                heads,
                kv_heads,
                head_dim: self.head_dim,
                causal: true,
            },
        ]);
        shapes
    }
}

/// Reads the rotary base from whichever key has it. Refuses any scaling of positions.
fn rope_theta(reader: &ConfigReader) -> Result<f64, ConfigError> {
    let mut theta = reader.optional_number("rope_theta")?;
    for key in ["rope_scaling", "rope_parameters"] {
        let Some(rope) = reader.object(key)? else {
            continue;
        };
        for kind in ["type", "rope_type"] {
            let found = rope.text_or(kind, "default")?;
            if !["default", "mrope"].contains(&found.as_str()) {
                return Err(rope.unsupported(kind, "default and mrope"));
            }
        }
        if rope.number_or("partial_rotary_factor", 1.0)? < 1.0 {
            return Err(rope.unsupported("partial_rotary_factor", "1.0"));
        }
        theta = rope.optional_number("rope_theta")?.or(theta);
    }
    Ok(theta.unwrap_or(1_000_000.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<TextEncoderConfig, ConfigError> {
        let config = ConfigText {
            file: "config.json".to_owned(),
            text: text.to_owned(),
        };
        TextEncoderConfig::from_json(&config)
    }

    const SIZES: &str = r#""vocab_size": 100, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2"#;

    #[test]
    fn flat_and_nested_configurations_are_one() {
        let flat = parse(&format!(
            r#"{{{SIZES}, "rope_theta": 5000.0,
                 "rope_scaling": {{"type": "mrope", "mrope_section": [1, 1, 2]}}}}"#
        ));
        let nested = parse(&format!(
            r#"{{"text_config": {{{SIZES},
                 "rope_parameters": {{"rope_theta": 5000.0, "rope_type": "default"}}}}}}"#
        ));
        let flat = flat.unwrap();
        assert_eq!(flat, nested.unwrap());
        assert_eq!((flat.head_dim, flat.rope_theta), (8, 5000.0));
    }

    #[test]
    fn what_cannot_be_honoured_is_named() {
        for (extra, named) in [
            (r#""use_sliding_window": true"#, "use_sliding_window"),
            (r#""hidden_act": "gelu""#, "hidden_act"),
            (r#""rope_scaling": {"type": "yarn"}"#, "yarn"),
            (r#""layer_types": ["sliding_attention"]"#, "layer_types"),
            (
                r#""quantization_config": {"bits": 4}"#,
                "quantization_config",
            ),
            (r#""architectures": ["LlamaForCausalLM"]"#, "architectures"),
            (r#""head_dim": 7"#, "hidden_size"),
        ] {
            let error = parse(&format!("{{{SIZES}, {extra}}}"))
                .unwrap_err()
                .to_string();
            assert!(error.contains(named), "{error}");
        }
    }
}
