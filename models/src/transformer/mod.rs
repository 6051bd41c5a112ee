//! The MMDiT `QwenImageTransformer2DModel` on packed sequences.
//!
//! Tokens of all sequences of a step lie in one `[tokens, dim]` tensor per stream (image and
//! text). Linear layers, norms and MLPs run once over all of them; attention runs per segment.
//! There is no padding and there are no masks.

mod block;
mod config;
mod modulation;
mod rope;

use std::sync::Arc;

use burn_tensor::Tensor;
use kiln_ops::{FusedOps, Rope, TokenRun};

pub use config::TransformerConfig;
pub use modulation::{BlockModulation, ModulationTable, StepModulation};
pub use rope::{image_rope, text_rope};

use crate::source::TensorSource;
use crate::weights::{Linear, LoadError, Precision, Weights};
use block::TransformerBlock;
use modulation::ModulationLayers;
pub(crate) use modulation::TIME_CHANNELS;

/// Epsilon of every norm; the reference fixes it.
const EPS: f64 = 1e-6;

/// One sequence of a packed forward: an image, its text, and the timestep it is at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Segment {
    /// Rows of packed latent tokens.
    pub height: usize,
    /// Columns of packed latent tokens.
    pub width: usize,
    pub text_tokens: usize,
    /// Which row of the step's modulation it uses.
    pub row: usize,
}

impl Segment {
    pub fn image_tokens(&self) -> usize {
        self.height * self.width
    }
}

/// What a forward needs to know of its segments; depends on nothing else, so it serves all steps.
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

    /// Tokens of each segment's joint sequence: its text, then its image.
    fn joint_lengths(&self) -> Vec<usize> {
        self.segments
            .iter()
            .map(|s| s.text_tokens + s.image_tokens())
            .collect()
    }
}

/// The transformer. Its modulation layers are not on the device: see [`ModulationTable`].
#[derive(Debug)]
pub struct Transformer<B: FusedOps> {
    img_in: Linear<B>,
    txt_norm: Tensor<B, 1>,
    txt_in: Linear<B>,
    blocks: Vec<TransformerBlock<B>>,
    proj_out: Linear<B>,
    modulation_layers: ModulationLayers<B>,
    config: TransformerConfig,
    device: B::Device,
}

impl<B: FusedOps> Transformer<B> {
    pub fn load(
        config: &TransformerConfig,
        source: Arc<dyn TensorSource>,
        device: &B::Device,
        precision: Precision,
    ) -> Result<Self, LoadError> {
        let weights = Weights::new(source, device, precision);
        let root = weights.at("");
        let dim = config.dim();
        let transformer = Self {
            img_in: root.at("img_in").linear(config.in_channels, dim)?,
            txt_norm: root
                .at("txt_norm")
                .norm("weight", config.joint_attention_dim)?,
            txt_in: root.at("txt_in").linear(config.joint_attention_dim, dim)?,
            blocks: (0..config.num_layers)
                .map(|index| {
                    TransformerBlock::load(config, &root.at(format!("transformer_blocks.{index}")))
                })
                .collect::<Result<_, _>>()?,
            proj_out: root.at("proj_out").linear(dim, config.patch_channels())?,
            modulation_layers: ModulationLayers::load(config, &root)?,
            config: config.clone(),
            device: weights.device().clone(),
        };
        weights.refuse_unknown(&[])?;
        Ok(transformer)
    }

    /// Everything that depends on the timesteps alone, for every block and step of a schedule.
    ///
    /// `timesteps` are [`crate::scheduler::Schedule::model_timesteps`].
    pub fn modulation_table(&self, timesteps: &[f32]) -> ModulationTable<B> {
        self.modulation_layers.table(timesteps, &self.device)
    }

    /// Prepares the positions of a list of segments.
    pub fn pack(&self, segments: &[Segment]) -> Packing<B> {
        let run = |tokens, segment: &Segment| TokenRun {
            tokens,
            row: segment.row,
        };
        Packing {
            image_runs: segments.iter().map(|s| run(s.image_tokens(), s)).collect(),
            text_runs: segments.iter().map(|s| run(s.text_tokens, s)).collect(),
            image_rope: image_rope(&self.config, segments, &self.device),
            text_rope: text_rope(&self.config, segments, &self.device),
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
    ) -> Tensor<B, 2> {
        let mut image = self.img_in.forward(image);
        let mut text = self
            .txt_in
            .forward(B::rms_norm(text, self.txt_norm.clone(), EPS));
        for (block, modulation) in self.blocks.iter().zip(&modulation.blocks) {
            (image, text) = block.forward(image, text, modulation, packing);
        }
        let (scale, shift) = modulation.norm_out();
        let image = B::layer_norm_modulate(image, shift, scale, &packing.image_runs, EPS);
        self.proj_out.forward(image)
    }

    /// The first block alone, for comparing it with the reference.
    ///
    /// # Shapes
    /// - image and text: `[tokens, dim]`, as [`Transformer::forward`] makes them of its inputs
    pub fn first_block(
        &self,
        image: Tensor<B, 2>,
        text: Tensor<B, 2>,
        modulation: &StepModulation<B>,
        packing: &Packing<B>,
    ) -> (Tensor<B, 2>, Tensor<B, 2>) {
        self.blocks[0].forward(image, text, &modulation.blocks[0], packing)
    }
}
