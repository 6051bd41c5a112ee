//! The text encoder: the language model of Qwen2.5-VL, from token ids to prompt embeddings.
//!
//! With text alone, its multimodal rotary embedding equals the plain one, which is implemented here.

mod config;

use std::sync::Arc;

use burn::module::Module;
use burn::tensor::{DType, Int, Tensor, TensorData};
use kiln_ops::FusedOps;

pub use config::TextEncoderConfig;

use crate::layers::{Embedding, Linear, RmsNorm};
use crate::source::TensorSource;
use crate::weights::{LoadError, Precision, Scope, Weights};

/// Stored tensors that text-to-image does not use.
const UNUSED: [&str; 4] = [
    "visual.",
    "model.visual.",
    "lm_head.",
    ".rotary_emb.inv_freq",
];

/// What the language model's names begin with. It depends on the class and on the version of
/// transformers that saved the checkpoint: `Qwen2_5_VLForConditionalGeneration` (new and old),
/// `Qwen2_5_VLModel` and `Qwen2_5_VLTextModel`.
const PREFIXES: [&str; 4] = ["model.language_model", "model", "language_model", ""];

/// The language model without its output head.
#[derive(Module, Debug)]
pub struct TextEncoder<B: FusedOps> {
    embed_tokens: Embedding<B>,
    layers: Vec<DecoderLayer<B>>,
    norm: RmsNorm<B>,
    #[module(skip)]
    config: TextEncoderConfig,
    #[module(skip)]
    precision: Precision,
}

impl<B: FusedOps> TextEncoder<B> {
    /// Loads the network onto a device.
    ///
    /// # Errors
    /// If a tensor is missing or has another shape, or if the component has tensors that this
    /// network does not know.
    pub fn load(
        config: &TextEncoderConfig,
        source: Arc<dyn TensorSource>,
        device: &B::Device,
        precision: Precision,
    ) -> Result<Self, LoadError> {
        let weights = Weights::new(source, device, precision);
        let has_embeddings = |prefix: &&&str| {
            let dot = if prefix.is_empty() { "" } else { "." };
            weights.has(&format!("{prefix}{dot}embed_tokens.weight"))
        };
        let prefix = PREFIXES.iter().find(has_embeddings).unwrap_or(&"model");
        let model = weights.at(prefix);
        let hidden = config.hidden_size;
        let layers = (0..config.num_hidden_layers)
            .map(|index| DecoderLayer::load(config, &model.at(format!("layers.{index}"))))
            .collect::<Result<_, _>>()?;
        let encoder = Self {
            embed_tokens: Embedding::load(&model.at("embed_tokens"), config.vocab_size, hidden)?,
            layers,
            norm: RmsNorm::load(&model.at("norm"), hidden, config.rms_norm_eps)?,
            config: config.clone(),
            precision,
        };
        weights.refuse_unknown(&UNUSED)?;
        Ok(encoder)
    }

    /// Computes the last hidden state, after the final norm, of each sequence.
    ///
    /// # Shapes
    /// - sequences: token ids, each below `vocab_size`
    /// - output: `[tokens, hidden_size]` per sequence, in the dtype of the activations
    pub fn forward(&self, sequences: &[&[u32]]) -> Vec<Tensor<B, 2>> {
        let lengths: Vec<usize> = sequences.iter().map(|ids| ids.len()).collect();
        let ids: Vec<i32> = sequences.concat().into_iter().map(|id| id as i32).collect();
        let count = ids.len();
        let device = self.embed_tokens.device();
        let ids = Tensor::<B, 1, Int>::from_data(TensorData::new(ids, [count]), &device);

        let rotation = Rotation::new(&self.config, &lengths, &device);
        let mut hidden_states = self
            .embed_tokens
            .forward(ids)
            .cast(self.precision.activations);
        for layer in &self.layers {
            hidden_states = layer.forward(hidden_states, &rotation, &lengths);
        }
        self.norm
            .forward(hidden_states)
            .split_with_sizes(lengths, 0)
    }
}

/// One decoder layer: causal self-attention, then the MLP `down(silu(gate(x)) · up(x))`, each after a
/// norm and added to its input.
#[derive(Module, Debug)]
pub(crate) struct DecoderLayer<B: FusedOps> {
    input_layernorm: RmsNorm<B>,
    self_attn: Attention<B>,
    post_attention_layernorm: RmsNorm<B>,
    gate_proj: Linear<B>,
    up_proj: Linear<B>,
    down_proj: Linear<B>,
}

impl<B: FusedOps> DecoderLayer<B> {
    /// # Errors
    /// If a tensor is missing or has another shape.
    fn load(config: &TextEncoderConfig, at: &Scope<B::Device>) -> Result<Self, LoadError> {
        let (hidden, intermediate) = (config.hidden_size, config.intermediate_size);
        let norm = |name| RmsNorm::load(&at.at(name), hidden, config.rms_norm_eps);
        let linear =
            |name, d_in, d_out| Linear::load_without_bias(&at.at("mlp").at(name), d_in, d_out);
        Ok(Self {
            input_layernorm: norm("input_layernorm")?,
            self_attn: Attention::load(config, &at.at("self_attn"))?,
            post_attention_layernorm: norm("post_attention_layernorm")?,
            gate_proj: linear("gate_proj", hidden, intermediate)?,
            up_proj: linear("up_proj", hidden, intermediate)?,
            down_proj: linear("down_proj", intermediate, hidden)?,
        })
    }

    /// # Shapes
    /// - x and output: `[tokens, hidden_size]`
    /// - lengths: tokens of each sequence
    fn forward(&self, x: Tensor<B, 2>, rotation: &Rotation<B>, lengths: &[usize]) -> Tensor<B, 2> {
        let normed = self.input_layernorm.forward(x.clone());
        let x = x + self.self_attn.forward(normed, rotation, lengths);
        let normed = self.post_attention_layernorm.forward(x.clone());
        let gated = B::silu_mul(
            self.gate_proj.forward(normed.clone()),
            self.up_proj.forward(normed),
        );
        x + self.down_proj.forward(gated)
    }
}

/// Causal self-attention with grouped key and value heads.
#[derive(Module, Debug)]
pub(crate) struct Attention<B: FusedOps> {
    q_proj: Linear<B>,
    k_proj: Linear<B>,
    v_proj: Linear<B>,
    o_proj: Linear<B>,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
}

impl<B: FusedOps> Attention<B> {
    /// # Errors
    /// If a tensor is missing or has another shape.
    fn load(config: &TextEncoderConfig, at: &Scope<B::Device>) -> Result<Self, LoadError> {
        let hidden = config.hidden_size;
        let kv = config.num_key_value_heads * config.head_dim;
        Ok(Self {
            q_proj: Linear::load(&at.at("q_proj"), hidden, hidden)?,
            k_proj: Linear::load(&at.at("k_proj"), hidden, kv)?,
            v_proj: Linear::load(&at.at("v_proj"), hidden, kv)?,
            o_proj: Linear::load_without_bias(&at.at("o_proj"), hidden, hidden)?,
            heads: config.num_attention_heads,
            kv_heads: config.num_key_value_heads,
            head_dim: config.head_dim,
        })
    }

    /// # Shapes
    /// - x and output: `[tokens, hidden_size]`
    /// - lengths: tokens of each sequence
    fn forward(&self, x: Tensor<B, 2>, rotation: &Rotation<B>, lengths: &[usize]) -> Tensor<B, 2> {
        let [tokens, _] = x.dims();
        let heads = |x: Tensor<B, 2>, count: usize| x.reshape([tokens, count, self.head_dim]);
        let query = heads(self.q_proj.forward(x.clone()), self.heads);
        let key = heads(self.k_proj.forward(x.clone()), self.kv_heads);
        let value = heads(self.v_proj.forward(x), self.kv_heads);
        let (query, key) = (rotation.apply(query), rotation.apply(key));
        self.o_proj
            .forward(B::packed_attention(query, key, value, lengths, true))
    }
}

/// Rotary position tables in the convention of `apply_rotary_pos_emb` of transformers: dimension `i`
/// of a head is rotated together with dimension `i + head_dim / 2`.
#[derive(Debug)]
struct Rotation<B: FusedOps> {
    /// `[tokens, 1, head_dim / 2]`, f32, as `sin`.
    cos: Tensor<B, 3>,
    sin: Tensor<B, 3>,
}

impl<B: FusedOps> Rotation<B> {
    /// Computes the tables of sequences of these lengths. Positions count from 0 in each sequence.
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

    /// Rotates every head, computing in f32.
    ///
    /// # Shapes
    /// - x and output: `[tokens, heads, head_dim]`
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
