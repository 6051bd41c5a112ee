//! Timestep modulation as a table.
//!
//! The shifts, scales and gates of every block depend on the timestep alone, and the layers that
//! compute them hold a third of the transformer's weights. kiln computes them once per schedule, for
//! all blocks and steps, and keeps those layers off the device: they are read for the computation
//! and dropped afterwards.

use burn::module::Module;
use burn::tensor::{DType, Tensor, TensorData, activation};
use kiln_ops::FusedOps;

use super::adapter::{AdapterRuns, StreamKind};
use crate::layers::Linear;
use crate::weights::{LoadError, Scope};

/// Width of the sinusoidal timestep embedding; the reference fixes it.
pub(crate) const TIME_CHANNELS: usize = 256;

/// Path of the timestep embedder in the checkpoint.
pub(super) const TIME_EMBEDDER: &str = "time_text_embed.timestep_embedder";

/// The MLP that makes the time embedding of timesteps: `TimestepEmbedding` of diffusers.
#[derive(Module, Debug)]
pub(super) struct TimestepEmbedding<B: FusedOps> {
    linear_1: Linear<B>,
    linear_2: Linear<B>,
}

impl<B: FusedOps> TimestepEmbedding<B> {
    /// # Errors
    /// If a tensor is missing or has another shape.
    pub(super) fn load(at: &Scope<B::Device>, dim: usize) -> Result<Self, LoadError> {
        Ok(Self {
            linear_1: Linear::load(&at.at("linear_1"), TIME_CHANNELS, dim)?,
            linear_2: Linear::load(&at.at("linear_2"), dim, dim)?,
        })
    }

    /// `adapters` are for all steps.
    ///
    /// # Shapes
    /// - timesteps: one per step, from 0 to 1
    /// - output: `[steps, dim]`, f32
    pub(super) fn forward(&self, timesteps: &[f32], adapters: &AdapterRuns<B>) -> Tensor<B, 2> {
        let sinusoids = sinusoidal_embedding(timesteps);
        let data = TensorData::new(sinusoids, [timesteps.len(), TIME_CHANNELS]);
        let sinusoids = Tensor::<B, 2>::from_data(data, (&self.linear_1.device(), DType::F32));
        let forward = |index: usize, layer, x| {
            adapters.forward_one(layer, x, StreamKind::Image, |adapter| {
                adapter.time[index].as_ref()
            })
        };
        let hidden = activation::silu(forward(0, &self.linear_1, sinusoids));
        forward(1, &self.linear_2, hidden)
    }
}

/// Computes the cosines, then the sines, of `1000 · timestep · 10000^(-i / 128)` for `i` from 0 to
/// 127, in f32 as the reference does (`Timesteps` of diffusers with `flip_sin_to_cos`).
/// `[steps, TIME_CHANNELS]`, row-major.
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

/// The modulation of every block and step of a schedule, f32.
#[derive(Debug, Clone)]
pub struct ModulationTable<B: FusedOps> {
    /// Modulation of the image and of the text stream, per block: `[steps, 6 · dim]` each.
    pub blocks: Vec<(Tensor<B, 2>, Tensor<B, 2>)>,
    /// Modulation of the output norm, `[steps, 2 · dim]`: scale, then shift.
    pub norm_out: Tensor<B, 2>,
    /// The time embedding, `[steps, dim]`.
    pub temb: Tensor<B, 2>,
}

impl<B: FusedOps> ModulationTable<B> {
    /// The table's size on the device, in bytes.
    pub fn bytes(&self) -> usize {
        let tensors = self.blocks.iter().flat_map(|(image, text)| [image, text]);
        let elements: usize = tensors
            .chain([&self.norm_out, &self.temb])
            .map(|t| t.shape().num_elements())
            .sum();
        elements * size_of::<f32>()
    }

    /// The modulation of one step: one row of each tensor.
    ///
    /// # Panics
    /// If the schedule has no such step.
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

/// The modulation of one packed forward: one row for each timestep in it.
#[derive(Debug, Clone)]
pub struct StepModulation<B: FusedOps> {
    pub(super) blocks: Vec<BlockModulation<B>>,
    /// `[rows, 2 · dim]`: scale, then shift.
    norm_out: Tensor<B, 2>,
}

impl<B: FusedOps> StepModulation<B> {
    /// Concatenates the rows of several jobs, each at a step of its own, in this order.
    ///
    /// # Panics
    /// If `jobs` is empty.
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

    /// Scale and shift of the output norm, `[rows, dim]` each.
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

/// Shift, scale and gate of one half of a block, `[rows, dim]` each. Shift and scale apply to the
/// norm before the half, the gate to its output.
#[derive(Debug, Clone)]
pub(super) struct Modulation<B: FusedOps> {
    pub(super) shift: Tensor<B, 2>,
    pub(super) scale: Tensor<B, 2>,
    pub(super) gate: Tensor<B, 2>,
}

impl<B: FusedOps> Modulation<B> {
    /// Splits `[rows, 6 · dim]` into the modulation of the attention half and of the MLP half.
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
