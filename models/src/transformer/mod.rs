//! The MMDiT `QwenImageTransformer2DModel` on packed sequences.
//!
//! The tokens of all sequences of a step lie in one `[tokens, dim]` tensor per stream (image and
//! text). Linear layers, norms and MLPs run once over all tokens; attention runs per segment. There
//! is no padding and there are no masks.

mod adapter;
mod block;
mod config;
mod modulation;
mod rope;

use std::ops::Range;
use std::sync::Arc;

use burn::module::Module;
use burn::tensor::{DType, Tensor, activation};
use kiln_ops::{FusedOps, Rope, TokenRun};

pub use config::TransformerConfig;
pub use modulation::{BlockModulation, ModulationTable, StepModulation};
pub use rope::{image_rope, text_rope};

pub use adapter::{AdapterRuns, AppliedAdapter};

pub(crate) use adapter::LoadedAdapter;

use crate::adapter::AdapterUse;
use crate::layers::{DeferredLinear, Linear, RmsNorm};
use crate::source::TensorSource;
use crate::weights::{LoadError, Precision, Weights};
use adapter::StreamKind;
use block::{BlockAdapters, TransformerBlock};
pub(crate) use modulation::TIME_CHANNELS;
use modulation::{TIME_EMBEDDER, TimestepEmbedding};

/// Epsilon of every norm; the reference fixes it.
const EPS: f64 = 1e-6;

/// One sequence of a packed forward: an image, its text, and the row of its timestep.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Segment {
    /// Rows of packed latent tokens.
    pub height: usize,
    /// Columns of packed latent tokens.
    pub width: usize,
    pub text_tokens: usize,
    /// Index of the segment's row in the forward's [`StepModulation`].
    pub row: usize,
}

impl Segment {
    /// `height · width`.
    pub fn image_tokens(&self) -> usize {
        self.height * self.width
    }
}

/// Positions and lengths of a list of segments, precomputed. All steps over the same segments can
/// use the same packing.
#[derive(Debug, Clone)]
pub struct Packing<B: FusedOps> {
    segments: Vec<Segment>,
    image_runs: Vec<TokenRun>,
    text_runs: Vec<TokenRun>,
    image_rope: Rope<B>,
    text_rope: Rope<B>,
}

impl<B: FusedOps> Packing<B> {
    /// Bytes of the position tables on the device.
    pub fn bytes(&self) -> usize {
        let tables = [&self.image_rope, &self.text_rope].map(|rope| [&rope.cos, &rope.sin]);
        let elements = tables
            .iter()
            .flatten()
            .map(|table| table.shape().num_elements());
        elements.sum::<usize>() * size_of::<f32>()
    }

    /// The number of text and image tokens together, per segment.
    fn joint_lengths(&self) -> Vec<usize> {
        self.segments
            .iter()
            .map(|s| s.text_tokens + s.image_tokens())
            .collect()
    }
}

/// The transformer network. Its modulation layers are no parameters of the module and not on the
/// device: see [`ModulationTable`].
#[derive(Module, Debug)]
pub struct Transformer<B: FusedOps> {
    img_in: Linear<B>,
    txt_norm: RmsNorm<B>,
    txt_in: Linear<B>,
    timestep_embedder: TimestepEmbedding<B>,
    blocks: Vec<TransformerBlock<B>>,
    #[module(skip)]
    norm_out: DeferredLinear<B::Device>,
    proj_out: Linear<B>,
    #[module(skip)]
    config: TransformerConfig,
}

impl<B: FusedOps> Transformer<B> {
    /// Loads the network onto a device.
    ///
    /// # Errors
    /// If a tensor is missing or has another shape, or if the component has tensors that this
    /// network does not know.
    pub fn load(
        config: &TransformerConfig,
        source: Arc<dyn TensorSource>,
        device: &B::Device,
        precision: Precision,
    ) -> Result<Self, LoadError> {
        let weights = Weights::new(source, device, precision);
        let root = weights.at("");
        let dim = config.dim();
        let text_dim = config.joint_attention_dim;
        let embedder = root.at(TIME_EMBEDDER);
        let transformer = Self {
            img_in: Linear::load(&root.at("img_in"), config.in_channels, dim)?,
            txt_norm: RmsNorm::load(&root.at("txt_norm"), text_dim, EPS)?,
            txt_in: Linear::load(&root.at("txt_in"), text_dim, dim)?,
            timestep_embedder: TimestepEmbedding::load(&embedder, dim)?,
            blocks: (0..config.num_layers)
                .map(|index| {
                    TransformerBlock::load(config, &root.at(format!("transformer_blocks.{index}")))
                })
                .collect::<Result<_, _>>()?,
            norm_out: DeferredLinear::load(&root.at("norm_out.linear"), dim, 2 * dim)?,
            proj_out: Linear::load(&root.at("proj_out"), dim, config.patch_channels())?,
            config: config.clone(),
        };
        weights.refuse_unknown(&[])?;
        Ok(transformer)
    }

    /// Computes the modulation of every block for each of `timesteps`, which are
    /// [`crate::sampling::Schedule::model_timesteps`]. Reads the modulation layers' weights.
    pub fn modulation_table(&self, timesteps: &[f32]) -> ModulationTable<B> {
        self.table_of(
            self.timestep_embedder
                .forward(timesteps, &AdapterRuns::none()),
        )
    }

    fn table_of(&self, temb: Tensor<B, 2>) -> ModulationTable<B> {
        let activated = activation::silu(temb.clone());
        let blocks = self
            .blocks
            .iter()
            .map(|block| block.modulation(activated.clone()))
            .collect();
        ModulationTable {
            blocks,
            norm_out: self.norm_out.forward(activated),
            temb,
        }
    }

    /// Puts adapters onto the network's device, their matrices in `dtype`. Their changes must fit the
    /// network.
    pub fn load_adapters(&self, adapters: &[AdapterUse], dtype: DType) -> Vec<AppliedAdapter<B>> {
        let device = self.img_in.device();
        let load = |it: &AdapterUse| AppliedAdapter {
            adapter: Arc::new(LoadedAdapter::load(
                &it.adapter,
                &self.config,
                &device,
                dtype,
            )),
            scale: it.scale,
        };
        adapters.iter().map(load).collect()
    }

    /// The table of a schedule with adapters. Shares what they do not change with `base`, the table
    /// without. Reads the modulation layers' weights only if the time embedding changes.
    pub fn adapted_table(
        &self,
        base: &ModulationTable<B>,
        timesteps: &[f32],
        adapters: &[AppliedAdapter<B>],
    ) -> ModulationTable<B> {
        let runs = AdapterRuns::of_rows(adapters, timesteps.len());
        let mut table = if adapters.iter().any(|it| it.adapter.changes_time()) {
            self.table_of(self.timestep_embedder.forward(timesteps, &runs))
        } else {
            base.clone()
        };
        let activated = activation::silu(table.temb.clone());
        for (index, (image, text)) in table.blocks.iter_mut().enumerate() {
            let add = |output: &Tensor<B, 2>, stream| {
                runs.add_one(output.clone(), activated.clone(), stream, |adapter| {
                    let block = &adapter.blocks[index];
                    match stream {
                        StreamKind::Image => block.img_mod.as_ref(),
                        StreamKind::Text => block.txt_mod.as_ref(),
                    }
                })
            };
            *image = add(image, StreamKind::Image);
            *text = add(text, StreamKind::Text);
        }
        let norm_out = table.norm_out;
        table.norm_out = runs.add_one(norm_out, activated, StreamKind::Image, |adapter| {
            adapter.norm_out.as_ref()
        });
        table
    }

    /// Computes the rotary positions of a list of segments.
    pub fn pack(&self, segments: &[Segment]) -> Packing<B> {
        let device = self.img_in.device();
        let run = |tokens, segment: &Segment| TokenRun {
            tokens,
            row: segment.row,
        };
        Packing {
            image_runs: segments.iter().map(|s| run(s.image_tokens(), s)).collect(),
            text_runs: segments.iter().map(|s| run(s.text_tokens, s)).collect(),
            image_rope: image_rope(&self.config, segments, &device),
            text_rope: text_rope(&self.config, segments, &device),
            segments: segments.to_vec(),
        }
    }

    /// Predicts the velocity of every image token.
    ///
    /// # Shapes
    /// - image: `[image tokens of all segments, in_channels]`
    /// - text: `[text tokens of all segments, joint_attention_dim]`
    /// - output: `[image tokens of all segments, patch_size² · out_channels]`
    pub fn forward(
        &self,
        image: Tensor<B, 2>,
        text: Tensor<B, 2>,
        modulation: &StepModulation<B>,
        packing: &Packing<B>,
        adapters: &AdapterRuns<B>,
    ) -> Tensor<B, 2> {
        let image = self.embed_image(image, adapters);
        let text = self.embed_text(text, adapters);
        let blocks = 0..self.num_blocks();
        let (image, _) = self.run_blocks(blocks, (image, text), modulation, packing, adapters);
        self.project(image, modulation, packing, adapters)
    }

    pub(crate) fn num_blocks(&self) -> usize {
        self.blocks.len()
    }

    pub(crate) fn config(&self) -> &TransformerConfig {
        &self.config
    }

    /// Embeds image tokens, before the first block.
    ///
    /// # Shapes
    /// - image: `[image tokens, in_channels]`
    /// - output: `[image tokens, dim]`
    pub(crate) fn embed_image(
        &self,
        image: Tensor<B, 2>,
        adapters: &AdapterRuns<B>,
    ) -> Tensor<B, 2> {
        adapters.forward_one(&self.img_in, image, StreamKind::Image, |adapter| {
            adapter.img_in.as_ref()
        })
    }

    /// Embeds text tokens, before the first block.
    ///
    /// # Shapes
    /// - text: `[text tokens, joint_attention_dim]`
    /// - output: `[text tokens, dim]`
    pub(crate) fn embed_text(&self, text: Tensor<B, 2>, adapters: &AdapterRuns<B>) -> Tensor<B, 2> {
        let text = self.txt_norm.forward(text);
        adapters.forward_one(&self.txt_in, text, StreamKind::Text, |adapter| {
            adapter.txt_in.as_ref()
        })
    }

    /// Runs some of the blocks on the image and the text tokens.
    ///
    /// # Shapes
    /// - image and text, in and out: `[tokens of all segments, dim]`
    pub(crate) fn run_blocks(
        &self,
        blocks: Range<usize>,
        (mut image, mut text): (Tensor<B, 2>, Tensor<B, 2>),
        modulation: &StepModulation<B>,
        packing: &Packing<B>,
        adapters: &AdapterRuns<B>,
    ) -> (Tensor<B, 2>, Tensor<B, 2>) {
        for index in blocks {
            let adapters = BlockAdapters {
                runs: adapters,
                block: index,
            };
            let modulation = &modulation.blocks[index];
            (image, text) = self.blocks[index].forward(image, text, modulation, packing, &adapters);
        }
        (image, text)
    }

    /// Predicts the velocity from the image tokens after the last block.
    ///
    /// # Shapes
    /// - image: `[image tokens of all segments, dim]`
    /// - output: `[image tokens of all segments, patch_size² · out_channels]`
    pub(crate) fn project(
        &self,
        image: Tensor<B, 2>,
        modulation: &StepModulation<B>,
        packing: &Packing<B>,
        adapters: &AdapterRuns<B>,
    ) -> Tensor<B, 2> {
        let (scale, shift) = modulation.norm_out();
        let image = B::layer_norm_modulate(image, shift, scale, &packing.image_runs, EPS);
        adapters.forward_one(&self.proj_out, image, StreamKind::Image, |adapter| {
            adapter.proj_out.as_ref()
        })
    }

    /// Runs the first block alone, for comparing it with the reference.
    ///
    /// # Shapes
    /// - image and text, in and out: `[tokens, dim]`, embedded by `img_in` and `txt_in`
    pub fn first_block(
        &self,
        image: Tensor<B, 2>,
        text: Tensor<B, 2>,
        modulation: &StepModulation<B>,
        packing: &Packing<B>,
        runs: &AdapterRuns<B>,
    ) -> (Tensor<B, 2>, Tensor<B, 2>) {
        let adapters = BlockAdapters { runs, block: 0 };
        self.blocks[0].forward(image, text, &modulation.blocks[0], packing, &adapters)
    }
}
