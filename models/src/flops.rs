//! Counts the multiply-adds of a job from the configurations.
//!
//! The counts cover matrix products, the two products of attention and convolutions, as kiln computes
//! them. They leave out norms, activations, rotations and softmax, which are below 1 %.

use std::fmt;
use std::sync::Arc;

use crate::adapter::{TokenWork, Totals};
use crate::families::qwen_image::{PATCH, TEMPLATE};
use crate::job::Job;
use crate::step_cache::{cheapest_steps, first_gated_step};
use crate::text_encoder::TextEncoderConfig;
use crate::transformer::{Segment, TIME_CHANNELS, TransformerConfig};
use crate::vae::{Levels, Span, Tiling, VaeConfig, VaeSettings};

/// Multiply-adds of a job's stages. One multiply-add is two floating-point operations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FlopCount {
    /// The text encoder on the job's prompts.
    pub encode: u64,
    /// The modulation table of all steps, which later jobs with the same schedule reuse.
    pub modulation: u64,
    /// One full step: the transformer on all images, once more with the negative prompt if guidance runs.
    pub step: u64,
    /// All steps together, without those parts that a guidance gate or a step cache leaves out. Of a
    /// cache that compares it is the least: as if every comparison allowed the reuse.
    pub denoise: u64,
    /// The VAE on all images.
    pub decode: u64,
}

/// Counts the work of a job. Clones are cheap.
#[derive(Clone)]
pub struct CostModel(Arc<dyn Fn(&Job) -> FlopCount + Send + Sync>);

impl CostModel {
    pub fn new(count: impl Fn(&Job) -> FlopCount + Send + Sync + 'static) -> Self {
        Self(Arc::new(count))
    }

    /// The cost model of three networks whose images are decoded with these settings.
    pub(crate) fn of_networks(
        text_encoder: TextEncoderConfig,
        transformer: TransformerConfig,
        vae: VaeConfig,
        settings: VaeSettings,
    ) -> Self {
        Self::new(move |job| count(&text_encoder, &transformer, &vae, settings, job))
    }

    pub fn cost(&self, job: &Job) -> FlopCount {
        (self.0)(job)
    }
}

impl fmt::Debug for CostModel {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("CostModel")
    }
}

fn count(
    text_encoder: &TextEncoderConfig,
    transformer: &TransformerConfig,
    vae: &VaeConfig,
    settings: VaeSettings,
    job: &Job,
) -> FlopCount {
    let prompts: Vec<usize> = job.branches().map(|branch| branch.tokens.len()).collect();
    let latents = [job.size.height, job.size.width].map(|side| side / vae.scale_factor());
    let segments: Vec<Segment> = prompts
        .iter()
        .map(|tokens| Segment {
            height: latents[0] / PATCH,
            width: latents[1] / PATCH,
            text_tokens: tokens
                .saturating_sub(TEMPLATE.dropped_tokens)
                .min(TEMPLATE.max_prompt_tokens),
            row: 0,
        })
        .collect();
    let images = job.num_images as u64;
    let adapters = Totals::of_job(&job.adapters);
    FlopCount {
        encode: encode(text_encoder, &prompts),
        modulation: job.sampling.steps as u64 * (modulation(transformer) + adapters.timestep),
        step: images * step(transformer, &segments, adapters.work),
        denoise: images * denoise(transformer, &segments, adapters.work, job),
        decode: images * decode_tiled(vae, latents, settings.of(job.decoding)),
    }
}

/// Multiply-adds of the text encoder. A token attends to itself and to those before it.
fn encode(config: &TextEncoderConfig, prompts: &[usize]) -> u64 {
    let hidden = config.hidden_size;
    let kv = config.num_key_value_heads * config.head_dim;
    let linear = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * config.intermediate_size;
    let tokens: usize = prompts.iter().sum();
    let pairs: usize = prompts.iter().map(|tokens| tokens * (tokens + 1) / 2).sum();
    let attention = 2 * hidden * pairs;
    (config.num_hidden_layers * (tokens * linear + attention)) as u64
}

/// Multiply-adds of the modulation of one timestep.
fn modulation(config: &TransformerConfig) -> u64 {
    let dim = config.dim();
    let embedding = TIME_CHANNELS * dim + dim * dim;
    let blocks = config.num_layers * 2 * (6 * dim * dim);
    (embedding + blocks + 2 * dim * dim) as u64
}

/// Multiply-adds of the transformer on these segments, with adapters that add this work.
pub(crate) fn step(config: &TransformerConfig, segments: &[Segment], adapters: TokenWork) -> u64 {
    let blocks = config.num_layers;
    let segments = segments.iter();
    segments
        .map(|it| forward(config, it, adapters, blocks))
        .sum()
}

/// Multiply-adds of the transformer on one segment with this many of its blocks. Without blocks the
/// text is not read.
fn forward(
    config: &TransformerConfig,
    segment: &Segment,
    adapters: TokenWork,
    blocks: usize,
) -> u64 {
    let dim = config.dim();
    let (image, text) = (segment.image_tokens(), segment.text_tokens);
    let ends = image * (config.in_channels * dim + dim * config.patch_channels());
    let of_adapters = image as u64 * adapters.image_ends;
    if blocks == 0 {
        return ends as u64 + of_adapters;
    }
    let joint = image + text;
    // Query, key, value, output, and an MLP four times as wide.
    let linear = joint * (4 + 2 * 4) * dim * dim;
    let attention = 2 * joint * joint * dim;
    let in_blocks = image as u64 * adapters.image + text as u64 * adapters.text;
    let of_adapters = of_adapters
        + text as u64 * adapters.text_ends
        + in_blocks * blocks as u64 / config.num_layers.max(1) as u64;
    let base = ends + text * config.joint_attention_dim * dim + blocks * (linear + attention);
    base as u64 + of_adapters
}

/// Multiply-adds of all steps of one image. The first segment is the conditional one.
fn denoise(
    config: &TransformerConfig,
    segments: &[Segment],
    adapters: TokenWork,
    job: &Job,
) -> u64 {
    let steps = job.sampling.steps;
    let gated = first_gated_step(steps, job.cfg_gate_step);
    let nexts = cheapest_steps(&job.cache, steps).enumerate();
    let of_step = nexts.map(|(index, next)| {
        let halves = if index < gated { segments.len() } else { 1 };
        let halves = segments.iter().take(halves);
        let blocks = next.blocks(config.num_layers);
        halves
            .map(|it| forward(config, it, adapters, blocks))
            .sum::<u64>()
    });
    of_step.sum()
}

/// Multiply-adds of decoding one image's latents, whole or in tiles.
fn decode_tiled(config: &VaeConfig, latents: [usize; 2], settings: VaeSettings) -> u64 {
    let scale = config.scale_factor();
    let tiles = match settings.tiling_of(latents, scale) {
        None => return decode(config, latents, usize::MAX),
        Some(Tiling::Exact { size }) => return decode(config, latents, size / scale),
        Some(Tiling::Blended(tiles)) => tiles,
    };
    let (size, stride) = (tiles.size / scale, tiles.stride / scale);
    let sides = latents.map(|side| {
        let starts = (0..side).step_by(stride);
        starts
            .map(move |start| size.min(side - start))
            .collect::<Vec<_>>()
    });
    let tiles = sides[0].iter().flat_map(|&height| {
        sides[1]
            .iter()
            .map(move |&width| decode(config, [height, width], usize::MAX))
    });
    tiles.sum()
}

/// Multiply-adds of the decoder network on latents of this height and width, in exact tiles of at most
/// `size` latents.
fn decode(config: &VaeConfig, latents: [usize; 2], size: usize) -> u64 {
    let conv =
        |pixels: usize, from: usize, to: usize, kernel: usize| pixels * from * to * kernel * kernel;
    let residual = |pixels, from, to| {
        let shortcut = if from == to {
            0
        } else {
            conv(pixels, from, to, 1)
        };
        conv(pixels, from, to, 3) + conv(pixels, to, to, 3) + shortcut
    };
    let mut widths = config.widths();
    widths.reverse();
    let (lowest, z) = (widths[0], config.z_dim);
    let pixels = latents[0] * latents[1];
    let mut sum = conv(pixels, z, z, 1) + conv(pixels, z, lowest, 3);
    // The middle: attention over all pixels, with a residual block before and after it.
    sum += 2 * residual(pixels, lowest, lowest);
    sum += conv(pixels, lowest, 4 * lowest, 1) + 2 * pixels * pixels * lowest;
    let levels = Levels::of(config);
    let [rows, columns] = latents.map(|side| levels.tiles(side, size));
    // Pixels of all tiles together.
    let area = |length: &dyn Fn(&[Span]) -> usize| {
        let along = |tiles: &[Vec<Span>]| tiles.iter().map(|it| length(it)).sum::<usize>();
        along(&rows) * along(&columns)
    };
    let mut channels = lowest;
    for (level, &width) in widths.iter().enumerate() {
        let pixels = area(&|tile| tile[level].input.len());
        sum += residual(pixels, channels, width);
        sum += config.num_res_blocks * residual(pixels, width, width);
        channels = width;
        if level + 1 < widths.len() {
            let upsampled = area(&|tile| 2 * tile[level].output.len());
            sum += conv(upsampled, width, width / 2, 3);
            channels = width / 2;
        } else {
            sum += conv(pixels, channels, 3, 3);
        }
    }
    sum as u64
}

#[cfg(test)]
mod tests;
