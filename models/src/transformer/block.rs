//! One double-stream block, `QwenImageTransformerBlock` of diffusers: joint attention over the image
//! and text streams, then an MLP for each stream.

use burn::module::Module;
use burn::tensor::Tensor;
use kiln_ops::{FusedOps, Rope, TokenRun};

use super::adapter::{AdapterRuns, AdapterSource, LayerChange, LoadedAdapter, StreamKind};
use super::modulation::{BlockModulation, Modulation};
use super::{EPS, Packing, TransformerConfig};
use crate::layers::{DeferredLinear, Linear, RmsNorm};
use crate::weights::{LoadError, Scope};

/// A block. Its modulation layers `img_mod` and `txt_mod` are not on the device.
#[derive(Module, Debug)]
pub(super) struct TransformerBlock<B: FusedOps> {
    #[module(skip)]
    img_mod: DeferredLinear<B::Device>,
    #[module(skip)]
    txt_mod: DeferredLinear<B::Device>,
    image: Stream<B>,
    text: Stream<B>,
}

impl<B: FusedOps> TransformerBlock<B> {
    /// # Errors
    /// If a tensor is missing or has another shape.
    pub(super) fn load(
        config: &TransformerConfig,
        at: &Scope<B::Device>,
    ) -> Result<Self, LoadError> {
        let dim = config.dim();
        Ok(Self {
            img_mod: DeferredLinear::load(&at.at("img_mod.1"), dim, 6 * dim)?,
            txt_mod: DeferredLinear::load(&at.at("txt_mod.1"), dim, 6 * dim)?,
            image: Stream::load(config, at, StreamKind::Image)?,
            text: Stream::load(config, at, StreamKind::Text)?,
        })
    }

    /// Reads the modulation layers and computes the modulation of the image and of the text stream.
    ///
    /// # Shapes
    /// - temb: `[steps, dim]`, `silu` of the time embedding
    /// - outputs: `[steps, 6 · dim]`
    pub(super) fn modulation(&self, temb: Tensor<B, 2>) -> (Tensor<B, 2>, Tensor<B, 2>) {
        (
            self.img_mod.forward(temb.clone()),
            self.txt_mod.forward(temb),
        )
    }

    /// # Shapes
    /// - image and text, in and out: `[tokens of all segments, dim]`
    pub(super) fn forward(
        &self,
        image: Tensor<B, 2>,
        text: Tensor<B, 2>,
        modulation: &BlockModulation<B>,
        packing: &Packing<B>,
        adapters: &BlockAdapters<'_, B>,
    ) -> (Tensor<B, 2>, Tensor<B, 2>) {
        let [image_attention, image_mlp] = Modulation::halves(&modulation.image);
        let [text_attention, text_mlp] = Modulation::halves(&modulation.text);
        let (image_runs, text_runs) = (&packing.image_runs, &packing.text_runs);

        let image_qkv = self.image.qkv(
            image.clone(),
            &image_attention,
            image_runs,
            &packing.image_rope,
            adapters,
        );
        let text_qkv = self.text.qkv(
            text.clone(),
            &text_attention,
            text_runs,
            &packing.text_rope,
            adapters,
        );
        let (image_attended, text_attended) = joint_attention(image_qkv, text_qkv, packing);

        let image = B::gated_residual(
            image,
            image_attention.gate,
            self.image.project(image_attended, adapters),
            image_runs,
        );
        let text = B::gated_residual(
            text,
            text_attention.gate,
            self.text.project(text_attended, adapters),
            text_runs,
        );
        (
            self.image.mlp(image, image_mlp, image_runs, adapters),
            self.text.mlp(text, text_mlp, text_runs, adapters),
        )
    }
}

/// The checkpoint's names for the two layers of an MLP.
const MLP_IN: &str = "net.0.proj";
const MLP_OUT: &str = "net.2";

/// The checkpoint's names for the parts of one stream.
struct StreamNames {
    to_q: &'static str,
    to_k: &'static str,
    to_v: &'static str,
    norm_q: &'static str,
    norm_k: &'static str,
    to_out: &'static str,
    mlp: &'static str,
}

const IMAGE_NAMES: StreamNames = StreamNames {
    to_q: "attn.to_q",
    to_k: "attn.to_k",
    to_v: "attn.to_v",
    norm_q: "attn.norm_q",
    norm_k: "attn.norm_k",
    to_out: "attn.to_out.0",
    mlp: "img_mlp",
};

const TEXT_NAMES: StreamNames = StreamNames {
    to_q: "attn.add_q_proj",
    to_k: "attn.add_k_proj",
    to_v: "attn.add_v_proj",
    norm_q: "attn.norm_added_q",
    norm_k: "attn.norm_added_k",
    to_out: "attn.to_add_out",
    mlp: "txt_mlp",
};

impl StreamKind {
    fn names(self) -> &'static StreamNames {
        match self {
            Self::Image => &IMAGE_NAMES,
            Self::Text => &TEXT_NAMES,
        }
    }
}

/// What an adapter changes in a block.
#[derive(Debug)]
pub(super) struct BlockChange<B: FusedOps> {
    pub(super) img_mod: Option<LayerChange<B>>,
    pub(super) txt_mod: Option<LayerChange<B>>,
    image: StreamChange<B>,
    text: StreamChange<B>,
}

/// What an adapter changes in the layers of one stream.
#[derive(Debug)]
struct StreamChange<B: FusedOps> {
    qkv: Option<LayerChange<B>>,
    to_out: Option<LayerChange<B>>,
    mlp_in: Option<LayerChange<B>>,
    mlp_out: Option<LayerChange<B>>,
}

impl<B: FusedOps> BlockChange<B> {
    /// `at` is the path of the block.
    pub(super) fn load(from: &AdapterSource<'_, B>, at: &str) -> Self {
        Self {
            img_mod: from.layers(&[&format!("{at}.img_mod.1")]),
            txt_mod: from.layers(&[&format!("{at}.txt_mod.1")]),
            image: StreamChange::load(from, at, StreamKind::Image.names()),
            text: StreamChange::load(from, at, StreamKind::Text.names()),
        }
    }

    fn stream(&self, kind: StreamKind) -> &StreamChange<B> {
        match kind {
            StreamKind::Image => &self.image,
            StreamKind::Text => &self.text,
        }
    }
}

impl<B: FusedOps> StreamChange<B> {
    fn load(from: &AdapterSource<'_, B>, at: &str, names: &StreamNames) -> Self {
        let path = |name: &str| format!("{at}.{name}");
        let [q, k, v] = [names.to_q, names.to_k, names.to_v].map(path);
        Self {
            qkv: from.layers(&[&q, &k, &v]),
            to_out: from.layers(&[&path(names.to_out)]),
            mlp_in: from.layers(&[&path(&format!("{}.{MLP_IN}", names.mlp))]),
            mlp_out: from.layers(&[&path(&format!("{}.{MLP_OUT}", names.mlp))]),
        }
    }
}

/// The adapters of a packed forward, for one block.
pub(super) struct BlockAdapters<'a, B: FusedOps> {
    pub(super) runs: &'a AdapterRuns<B>,
    /// Index of the block.
    pub(super) block: usize,
}

impl<'a, B: FusedOps> BlockAdapters<'a, B> {
    /// The changes of one stream of the block in an adapter.
    fn of(&self, adapter: &'a LoadedAdapter<B>, kind: StreamKind) -> &'a StreamChange<B> {
        adapter.blocks[self.block].stream(kind)
    }
}

/// The layers of a block that process one stream.
#[derive(Module, Debug)]
pub(super) struct Stream<B: FusedOps> {
    #[module(skip)]
    kind: StreamKind,
    to_q: Linear<B>,
    to_k: Linear<B>,
    to_v: Linear<B>,
    norm_q: RmsNorm<B>,
    norm_k: RmsNorm<B>,
    to_out: Linear<B>,
    mlp_in: Linear<B>,
    mlp_out: Linear<B>,
    heads: usize,
    head_dim: usize,
}

impl<B: FusedOps> Stream<B> {
    /// # Errors
    /// If a tensor is missing or has another shape.
    fn load(
        config: &TransformerConfig,
        at: &Scope<B::Device>,
        kind: StreamKind,
    ) -> Result<Self, LoadError> {
        let names = kind.names();
        let (dim, head_dim) = (config.dim(), config.attention_head_dim);
        let mlp = at.at(names.mlp);
        Ok(Self {
            kind,
            to_q: Linear::load(&at.at(names.to_q), dim, dim)?,
            to_k: Linear::load(&at.at(names.to_k), dim, dim)?,
            to_v: Linear::load(&at.at(names.to_v), dim, dim)?,
            norm_q: RmsNorm::load(&at.at(names.norm_q), head_dim, EPS)?,
            norm_k: RmsNorm::load(&at.at(names.norm_k), head_dim, EPS)?,
            to_out: Linear::load(&at.at(names.to_out), dim, dim)?,
            mlp_in: Linear::load(&mlp.at(MLP_IN), dim, 4 * dim)?,
            mlp_out: Linear::load(&mlp.at(MLP_OUT), 4 * dim, dim)?,
            heads: config.num_attention_heads,
            head_dim,
        })
    }

    /// Norms and modulates the tokens, and projects them to rotated queries and keys, and values.
    ///
    /// # Shapes
    /// - x: `[tokens, dim]`
    fn qkv(
        &self,
        x: Tensor<B, 2>,
        modulation: &Modulation<B>,
        runs: &[TokenRun],
        rope: &Rope<B>,
        adapters: &BlockAdapters<'_, B>,
    ) -> Qkv<B> {
        let tokens = x.dims()[0];
        let heads = |x: Tensor<B, 2>| x.reshape([tokens, self.heads, self.head_dim]);
        let (shift, scale) = (modulation.shift.clone(), modulation.scale.clone());
        let x = B::layer_norm_modulate(x, shift, scale, runs, EPS);
        let layers = [&self.to_q, &self.to_k, &self.to_v];
        let change = |adapter| adapters.of(adapter, self.kind).qkv.as_ref();
        let outputs = adapters.runs.forward(&layers, x, self.kind, change);
        let mut outputs = outputs.into_iter();
        let mut next = || heads(outputs.next().expect("three layers have three outputs"));
        Qkv {
            query: self.norm_q.forward_rope(next(), rope),
            key: self.norm_k.forward_rope(next(), rope),
            value: next(),
        }
    }

    /// Projects what the tokens attended to.
    ///
    /// # Shapes
    /// - x and output: `[tokens, dim]`
    fn project(&self, x: Tensor<B, 2>, adapters: &BlockAdapters<'_, B>) -> Tensor<B, 2> {
        let change = |adapter| adapters.of(adapter, self.kind).to_out.as_ref();
        adapters
            .runs
            .forward_one(&self.to_out, x, self.kind, change)
    }

    /// # Shapes
    /// - x and output: `[tokens, dim]`
    fn mlp(
        &self,
        x: Tensor<B, 2>,
        modulation: Modulation<B>,
        runs: &[TokenRun],
        adapters: &BlockAdapters<'_, B>,
    ) -> Tensor<B, 2> {
        let normed =
            B::layer_norm_modulate(x.clone(), modulation.shift, modulation.scale, runs, EPS);
        let change = |adapter| adapters.of(adapter, self.kind).mlp_in.as_ref();
        let wide = adapters
            .runs
            .forward_one(&self.mlp_in, normed, self.kind, change);
        let change = |adapter| adapters.of(adapter, self.kind).mlp_out.as_ref();
        let output =
            adapters
                .runs
                .forward_one(&self.mlp_out, B::gelu_tanh(wide), self.kind, change);
        B::gated_residual(x, modulation.gate, output, runs)
    }
}

/// Queries, keys and values of one stream, `[tokens, heads, head_dim]` each.
#[derive(Debug)]
struct Qkv<B: FusedOps> {
    query: Tensor<B, 3>,
    key: Tensor<B, 3>,
    value: Tensor<B, 3>,
}

/// Attention of each segment over its text and image tokens together, text first.
///
/// # Shapes
/// - outputs: `[tokens of all segments, dim]` of the image stream, then of the text stream
fn joint_attention<B: FusedOps>(
    image: Qkv<B>,
    text: Qkv<B>,
    packing: &Packing<B>,
) -> (Tensor<B, 2>, Tensor<B, 2>) {
    let segments = &packing.segments;
    let image_sizes: Vec<usize> = segments.iter().map(super::Segment::image_tokens).collect();
    let text_sizes: Vec<usize> = segments.iter().map(|segment| segment.text_tokens).collect();

    let joint = |image: Tensor<B, 3>, text: Tensor<B, 3>| {
        let images = image.split_with_sizes(image_sizes.clone(), 0);
        let texts = text.split_with_sizes(text_sizes.clone(), 0);
        Tensor::cat(
            texts
                .into_iter()
                .zip(images)
                .flat_map(|(t, i)| [t, i])
                .collect(),
            0,
        )
    };
    let query = joint(image.query, text.query);
    let key = joint(image.key, text.key);
    let value = joint(image.value, text.value);
    let attended = B::packed_attention(query, key, value, &packing.joint_lengths(), false);

    let parts = segments
        .iter()
        .flat_map(|s| [s.text_tokens, s.image_tokens()])
        .collect();
    let (mut texts, mut images) = (Vec::new(), Vec::new());
    for (index, part) in attended.split_with_sizes(parts, 0).into_iter().enumerate() {
        if index % 2 == 0 {
            texts.push(part);
        } else {
            images.push(part);
        }
    }
    let join = |mut parts: Vec<_>| {
        if parts.len() == 1 {
            parts.remove(0)
        } else {
            Tensor::cat(parts, 0)
        }
    };
    (join(images), join(texts))
}
