//! Timestep modulation as a table.
//!
//! The shifts, scales and gates of every block depend on the timestep alone, and the layers that
//! make them are a third of the transformer's weights. They are computed once per schedule, for
//! all blocks and steps; those layers are read for that and let go of again.

use burn_tensor::{DType, Tensor, TensorData, activation};
use kiln_ops::FusedOps;

use super::TransformerConfig;
use crate::weights::{DeferredLinear, Linear, LoadError, Scope};

/// Width of the sinusoidal timestep embedding; the reference fixes it.
pub(crate) const TIME_CHANNELS: usize = 256;

/// The layers that turn timesteps into modulation.
#[derive(Debug)]
pub(super) struct ModulationLayers<B: FusedOps> {
    linear_1: Linear<B>,
    linear_2: Linear<B>,
    /// `img_mod` and `txt_mod` of each block.
    blocks: Vec<(DeferredLinear<B>, DeferredLinear<B>)>,
    norm_out: DeferredLinear<B>,
}

impl<B: FusedOps> ModulationLayers<B> {
    pub(super) fn load(config: &TransformerConfig, root: &Scope<B>) -> Result<Self, LoadError> {
        let dim = config.dim();
        let embedder = root.at("time_text_embed.timestep_embedder");
        let blocks = (0..config.num_layers)
            .map(|index| {
                let block = root.at(format!("transformer_blocks.{index}"));
                Ok((
                    block.at("img_mod.1").deferred_linear(dim, 6 * dim)?,
                    block.at("txt_mod.1").deferred_linear(dim, 6 * dim)?,
                ))
            })
            .collect::<Result<_, LoadError>>()?;
        Ok(Self {
            linear_1: embedder.at("linear_1").linear(TIME_CHANNELS, dim)?,
            linear_2: embedder.at("linear_2").linear(dim, dim)?,
            blocks,
            norm_out: root.at("norm_out.linear").deferred_linear(dim, 2 * dim)?,
        })
    }

    pub(super) fn table(&self, timesteps: &[f32], device: &B::Device) -> ModulationTable<B> {
        let sinusoids = sinusoidal_embedding(timesteps);
        let data = TensorData::new(sinusoids, [timesteps.len(), TIME_CHANNELS]);
        let sinusoids = Tensor::<B, 2>::from_data(data, (device, DType::F32));
        let temb = self
            .linear_2
            .forward(activation::silu(self.linear_1.forward(sinusoids)));
        let activated = activation::silu(temb.clone());
        let blocks = self
            .blocks
            .iter()
            .map(|(img_mod, txt_mod)| {
                (
                    img_mod.forward(activated.clone()),
                    txt_mod.forward(activated.clone()),
                )
            })
            .collect();
        ModulationTable {
            blocks,
            norm_out: self.norm_out.forward(activated),
            temb,
        }
    }
}

/// Cosines, then sines, of `1000 · timestep · 10000^(-i / 128)`, in f32 as the reference does it.
fn sinusoidal_embedding(timesteps: &[f32]) -> Vec<f32> {
    let half = TIME_CHANNELS / 2;
    let frequencies: Vec<f32> = (0..half)
        .map(|i| (-(10_000.0_f64.ln()) as f32 * i as f32 / half as f32).exp())
        .collect();
    timesteps
        .iter()
        .flat_map(|timestep| {
            let angle = move |frequency: &f32| 1000.0 * (timestep * frequency);
            let cosines = frequencies.iter().map(move |f| angle(f).cos());
            cosines.chain(frequencies.iter().map(move |f| angle(f).sin()))
        })
        .collect()
}

/// The modulation of a whole schedule, f32.
#[derive(Debug, Clone)]
pub struct ModulationTable<B: FusedOps> {
    /// Of each block, image and text stream: `[steps, 6 · dim]`.
    pub blocks: Vec<(Tensor<B, 2>, Tensor<B, 2>)>,
    /// `[steps, 2 · dim]`: scale, then shift.
    pub norm_out: Tensor<B, 2>,
    /// The time embedding, `[steps, dim]`.
    pub temb: Tensor<B, 2>,
}

impl<B: FusedOps> ModulationTable<B> {
    /// Bytes the table holds on the device.
    pub fn bytes(&self) -> usize {
        let tensors = self.blocks.iter().flat_map(|(image, text)| [image, text]);
        let elements: usize = tensors
            .chain([&self.norm_out, &self.temb])
            .map(|t| t.shape().num_elements())
            .sum();
        elements * size_of::<f32>()
    }

    /// The modulation of one step: one row.
    pub fn step(&self, step: usize) -> StepModulation<B> {
        let row = |table: &Tensor<B, 2>| table.clone().narrow(0, step, 1);
        StepModulation {
            blocks: self
                .blocks
                .iter()
                .map(|(image, text)| BlockModulation {
                    image: row(image),
                    text: row(text),
                })
                .collect(),
            norm_out: row(&self.norm_out),
        }
    }
}

/// The modulation of one packed forward, a row for each timestep in it.
#[derive(Debug, Clone)]
pub struct StepModulation<B: FusedOps> {
    pub(super) blocks: Vec<BlockModulation<B>>,
    /// `[rows, 2 · dim]`: scale, then shift.
    norm_out: Tensor<B, 2>,
}

impl<B: FusedOps> StepModulation<B> {
    /// The rows of several jobs, each at a step of its own, in this order.
    pub fn cat(mut jobs: Vec<Self>) -> Self {
        if jobs.len() == 1 {
            return jobs.remove(0);
        }
        let rows =
            |of: &dyn Fn(&Self) -> Tensor<B, 2>| Tensor::cat(jobs.iter().map(of).collect(), 0);
        let count = jobs.first().map_or(0, |job| job.blocks.len());
        let blocks = (0..count)
            .map(|block| BlockModulation {
                image: rows(&|job| job.blocks[block].image.clone()),
                text: rows(&|job| job.blocks[block].text.clone()),
            })
            .collect();
        let norm_out = rows(&|job| job.norm_out.clone());
        Self { blocks, norm_out }
    }

    /// Scale and shift, `[rows, dim]` each.
    pub(super) fn norm_out(&self) -> (Tensor<B, 2>, Tensor<B, 2>) {
        let dim = self.norm_out.dims()[1] / 2;
        let part = |index| self.norm_out.clone().narrow(1, index * dim, dim);
        (part(0), part(1))
    }
}

/// The modulation of one block: `[rows, 6 · dim]` for each stream.
#[derive(Debug, Clone)]
pub struct BlockModulation<B: FusedOps> {
    pub(super) image: Tensor<B, 2>,
    pub(super) text: Tensor<B, 2>,
}

/// Shift, scale and gate round one half of a block, `[rows, dim]` each.
#[derive(Debug, Clone)]
pub(super) struct Modulation<B: FusedOps> {
    pub(super) shift: Tensor<B, 2>,
    pub(super) scale: Tensor<B, 2>,
    pub(super) gate: Tensor<B, 2>,
}

impl<B: FusedOps> Modulation<B> {
    /// Of the attention half, then of the MLP half.
    pub(super) fn halves(stream: &Tensor<B, 2>) -> [Self; 2] {
        let dim = stream.dims()[1] / 6;
        let part = |index| stream.clone().narrow(1, index * dim, dim);
        [0, 3].map(|first| Self {
            shift: part(first),
            scale: part(first + 1),
            gate: part(first + 2),
        })
    }
}
