//! The text tower of Qwen2.5-VL: from token ids to prompt embeddings.
//!
//! Text-only positions make its multimodal rotary embedding the plain one, so none of that is here.

use std::sync::Arc;

use burn_tensor::{DType, Int, Tensor, TensorData};
use kiln_ops::{FusedOps, KernelShape};

use crate::config::{ConfigError, ConfigReader, ConfigText};
use crate::source::TensorSource;
use crate::weights::{Linear, LoadError, Precision, Scope, Weights};

/// config.json of `Qwen2_5_VLForConditionalGeneration`: the language model's part.
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
    /// Reads both forms the Hub has: the language model's values at the top level, or under
    /// `text_config`, with the rotary settings flat, in `rope_scaling` or in `rope_parameters`.
    pub fn from_json(config: &ConfigText) -> Result<Self, ConfigError> {
        let top = ConfigReader::parse(config)?;
        if let Some(value) = top.value("architectures") {
            let known = "Qwen2_5_VLForConditionalGeneration";
            if !value
                .as_array()
                .is_some_and(|list| list.iter().any(|name| name == known))
            {
                return Err(top.unsupported("architectures", known));
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
}

impl TextEncoderConfig {
    /// The sizes of the ops that the text encoder is made of.
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

/// The rotary base, from wherever this version of transformers wrote it; any scaling is refused.
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

/// Tensors of the checkpoint that text-to-image has no use for.
const UNUSED: [&str; 4] = [
    "visual.",
    "model.visual.",
    "lm_head.",
    ".rotary_emb.inv_freq",
];

/// The language model without its head.
#[derive(Debug)]
pub struct TextEncoder<B: FusedOps> {
    embed_tokens: Tensor<B, 2>,
    layers: Vec<Layer<B>>,
    norm: Tensor<B, 1>,
    config: TextEncoderConfig,
    precision: Precision,
    device: B::Device,
}

impl<B: FusedOps> TextEncoder<B> {
    pub fn load(
        config: &TextEncoderConfig,
        source: Arc<dyn TensorSource>,
        device: &B::Device,
        precision: Precision,
    ) -> Result<Self, LoadError> {
        let weights = Weights::new(source, device, precision);
        // transformers has named it both ways.
        let nested = weights.has("model.language_model.embed_tokens.weight");
        let model = weights.at(if nested {
            "model.language_model"
        } else {
            "model"
        });
        let layers = (0..config.num_hidden_layers)
            .map(|index| Layer::load(config, &model.at(format!("layers.{index}"))))
            .collect::<Result<_, _>>()?;
        let encoder = Self {
            embed_tokens: model.at("embed_tokens").matrix(
                "weight",
                config.vocab_size,
                config.hidden_size,
            )?,
            layers,
            norm: model.at("norm").norm("weight", config.hidden_size)?,
            config: config.clone(),
            precision,
            device: device.clone(),
        };
        weights.refuse_unknown(&UNUSED)?;
        Ok(encoder)
    }

    /// The last hidden state, after the final norm, of each sequence.
    ///
    /// # Shapes
    /// - sequences: token ids, each below the vocabulary's size
    /// - output: `[tokens, hidden]` per sequence, in the type of the activations
    pub fn forward(&self, sequences: &[&[u32]]) -> Vec<Tensor<B, 2>> {
        let lengths: Vec<usize> = sequences.iter().map(|ids| ids.len()).collect();
        let ids: Vec<i32> = sequences.concat().into_iter().map(|id| id as i32).collect();
        let count = ids.len();
        let ids = Tensor::<B, 1, Int>::from_data(TensorData::new(ids, [count]), &self.device);

        let rotation = Rotation::new(&self.config, &lengths, &self.device);
        let mut hidden_states = self
            .embed_tokens
            .clone()
            .select(0, ids)
            .cast(self.precision.activations);
        for layer in &self.layers {
            hidden_states = layer.forward(hidden_states, &rotation, &lengths);
        }
        let hidden_states = B::rms_norm(hidden_states, self.norm.clone(), self.config.rms_norm_eps);
        hidden_states.split_with_sizes(lengths, 0)
    }
}

#[derive(Debug)]
struct Layer<B: FusedOps> {
    input_layernorm: Tensor<B, 1>,
    self_attn: Attention<B>,
    post_attention_layernorm: Tensor<B, 1>,
    gate_proj: Linear<B>,
    up_proj: Linear<B>,
    down_proj: Linear<B>,
    eps: f64,
}

impl<B: FusedOps> Layer<B> {
    fn load(config: &TextEncoderConfig, at: &Scope<B>) -> Result<Self, LoadError> {
        let (hidden, intermediate) = (config.hidden_size, config.intermediate_size);
        let mlp = at.at("mlp");
        Ok(Self {
            input_layernorm: at.at("input_layernorm").norm("weight", hidden)?,
            self_attn: Attention::load(config, &at.at("self_attn"))?,
            post_attention_layernorm: at.at("post_attention_layernorm").norm("weight", hidden)?,
            gate_proj: mlp
                .at("gate_proj")
                .linear_without_bias(hidden, intermediate)?,
            up_proj: mlp
                .at("up_proj")
                .linear_without_bias(hidden, intermediate)?,
            down_proj: mlp
                .at("down_proj")
                .linear_without_bias(intermediate, hidden)?,
            eps: config.rms_norm_eps,
        })
    }

    fn forward(&self, x: Tensor<B, 2>, rotation: &Rotation<B>, lengths: &[usize]) -> Tensor<B, 2> {
        let normed = B::rms_norm(x.clone(), self.input_layernorm.clone(), self.eps);
        let x = x + self.self_attn.forward(normed, rotation, lengths);
        let normed = B::rms_norm(x.clone(), self.post_attention_layernorm.clone(), self.eps);
        let gated = B::silu_mul(
            self.gate_proj.forward(normed.clone()),
            self.up_proj.forward(normed),
        );
        x + self.down_proj.forward(gated)
    }
}

#[derive(Debug)]
struct Attention<B: FusedOps> {
    q_proj: Linear<B>,
    k_proj: Linear<B>,
    v_proj: Linear<B>,
    o_proj: Linear<B>,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
}

impl<B: FusedOps> Attention<B> {
    fn load(config: &TextEncoderConfig, at: &Scope<B>) -> Result<Self, LoadError> {
        let hidden = config.hidden_size;
        let kv = config.num_key_value_heads * config.head_dim;
        Ok(Self {
            q_proj: at.at("q_proj").linear(hidden, hidden)?,
            k_proj: at.at("k_proj").linear(hidden, kv)?,
            v_proj: at.at("v_proj").linear(hidden, kv)?,
            o_proj: at.at("o_proj").linear_without_bias(hidden, hidden)?,
            heads: config.num_attention_heads,
            kv_heads: config.num_key_value_heads,
            head_dim: config.head_dim,
        })
    }

    fn forward(&self, x: Tensor<B, 2>, rotation: &Rotation<B>, lengths: &[usize]) -> Tensor<B, 2> {
        let [tokens, _] = x.dims();
        let query = self
            .q_proj
            .forward(x.clone())
            .reshape([tokens, self.heads, self.head_dim]);
        let key = self
            .k_proj
            .forward(x.clone())
            .reshape([tokens, self.kv_heads, self.head_dim]);
        let value = self
            .v_proj
            .forward(x)
            .reshape([tokens, self.kv_heads, self.head_dim]);
        let (query, key) = (rotation.apply(query), rotation.apply(key));
        self.o_proj
            .forward(B::packed_attention(query, key, value, lengths, true))
    }
}

/// Rotary positions in the language model's convention: dimension `i` pairs with
/// `i + head_dim / 2`.
#[derive(Debug)]
struct Rotation<B: FusedOps> {
    /// `[tokens, 1, head_dim / 2]`, f32.
    cos: Tensor<B, 3>,
    sin: Tensor<B, 3>,
}

impl<B: FusedOps> Rotation<B> {
    /// Positions count from 0 in each sequence.
    fn new(config: &TextEncoderConfig, lengths: &[usize], device: &B::Device) -> Self {
        let half = config.head_dim / 2;
        let frequencies: Vec<f32> = (0..half)
            .map(|i| 1.0 / (config.rope_theta as f32).powf((2 * i) as f32 / config.head_dim as f32))
            .collect();
        let angles: Vec<f32> = lengths
            .iter()
            .flat_map(|&length| 0..length)
            .flat_map(|position| frequencies.iter().map(move |f| position as f32 * f))
            .collect();
        let tokens: usize = lengths.iter().sum();
        let table = |values: Vec<f32>| {
            let data = TensorData::new(values, [tokens, 1, half]);
            Tensor::from_data(data, (device, DType::F32))
        };
        Self {
            cos: table(angles.iter().map(|angle| angle.cos()).collect()),
            sin: table(angles.iter().map(|angle| angle.sin()).collect()),
        }
    }

    /// Rotates `[tokens, heads, head_dim]`.
    fn apply(&self, x: Tensor<B, 3>) -> Tensor<B, 3> {
        let dtype = x.dtype();
        let half = x.dims()[2] / 2;
        let x = x.cast(DType::F32);
        let (first, second) = (x.clone().narrow(2, 0, half), x.narrow(2, half, half));
        let (cos, sin) = (self.cos.clone(), self.sin.clone());
        let rotated = Tensor::cat(
            vec![
                first.clone() * cos.clone() - second.clone() * sin.clone(),
                second * cos + first * sin,
            ],
            2,
        );
        rotated.cast(dtype)
    }
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
