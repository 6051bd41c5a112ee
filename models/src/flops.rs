//! Counts the multiply-adds of a job from the configurations.
//!
//! The counts cover matrix products, the two products of attention and convolutions, as kiln computes
//! them. They leave out norms, activations, rotations and softmax, which are below 1 %.

use std::fmt;
use std::sync::Arc;

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
    FlopCount {
        encode: encode(text_encoder, &prompts),
        modulation: job.sampling.steps as u64 * modulation(transformer),
        step: images * step(transformer, &segments),
        denoise: images * denoise(transformer, &segments, job),
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

/// Multiply-adds of the transformer on these segments.
pub(crate) fn step(config: &TransformerConfig, segments: &[Segment]) -> u64 {
    let blocks = config.num_layers;
    segments.iter().map(|it| forward(config, it, blocks)).sum()
}

/// Multiply-adds of the transformer on one segment with this many of its blocks. Without blocks the
/// text is not read.
fn forward(config: &TransformerConfig, segment: &Segment, blocks: usize) -> u64 {
    let dim = config.dim();
    let (image, text) = (segment.image_tokens(), segment.text_tokens);
    let ends = image * (config.in_channels * dim + dim * config.patch_channels());
    if blocks == 0 {
        return ends as u64;
    }
    let joint = image + text;
    // Query, key, value, output, and an MLP four times as wide.
    let linear = joint * (4 + 2 * 4) * dim * dim;
    let attention = 2 * joint * joint * dim;
    (ends + text * config.joint_attention_dim * dim + blocks * (linear + attention)) as u64
}

/// Multiply-adds of all steps of one image. The first segment is the conditional one.
fn denoise(config: &TransformerConfig, segments: &[Segment], job: &Job) -> u64 {
    let steps = job.sampling.steps;
    let gated = first_gated_step(steps, job.cfg_gate_step);
    let nexts = cheapest_steps(&job.cache, steps).enumerate();
    let of_step = nexts.map(|(index, next)| {
        let halves = if index < gated { segments.len() } else { 1 };
        let halves = segments.iter().take(halves);
        let blocks = next.blocks(config.num_layers);
        halves.map(|it| forward(config, it, blocks)).sum::<u64>()
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
mod tests {
    use super::*;
    use crate::job::Decoding;
    use crate::step_cache::{CachePolicy, DbCache, MagCache, QWEN_IMAGE_RATIOS};
    use crate::testing;
    use crate::vae::Blending;

    /// Qwen-Image's configuration.
    fn transformer() -> TransformerConfig {
        TransformerConfig {
            patch_size: 2,
            in_channels: 64,
            out_channels: 16,
            num_layers: 60,
            attention_head_dim: 128,
            num_attention_heads: 24,
            joint_attention_dim: 3584,
            axes_dims_rope: [16, 56, 56],
            sample_size: 128,
        }
    }

    fn vae() -> VaeConfig {
        VaeConfig {
            base_dim: 96,
            z_dim: 16,
            dim_mult: vec![1, 2, 4, 4],
            num_res_blocks: 2,
            latents_mean: vec![0.0; 16],
            latents_std: vec![1.0; 16],
        }
    }

    fn segment(height: usize, width: usize, text_tokens: usize) -> Segment {
        Segment {
            height,
            width,
            text_tokens,
            row: 0,
        }
    }

    /// `torch.utils.flop_counter.FlopCounterMode` (torch 2.15.0) around diffusers' (0.42.1)
    /// `QwenImageTransformer2DModel` on the meta device counts what the forward and its own
    /// modulation take.
    #[test]
    fn the_transformer_counts_as_torch_counts() {
        let config = transformer();
        for (segment, flops) in [
            (segment(64, 64, 64), 69_309_858_054_144),
            (segment(32, 32, 17), 14_960_520_019_968),
        ] {
            assert_eq!(2 * (step(&config, &[segment]) + modulation(&config)), flops);
        }
    }

    /// torch's counts for transformers' (5.23.0) Qwen2.5-VL, whose attention torch counts in full and
    /// kiln as causal.
    #[test]
    fn the_text_encoder_counts_as_torch_counts() {
        let config = TextEncoderConfig {
            vocab_size: 152_064,
            hidden_size: 3584,
            intermediate_size: 18_944,
            num_hidden_layers: 28,
            num_attention_heads: 28,
            num_key_value_heads: 4,
            head_dim: 128,
            rms_norm_eps: 1e-6,
            rope_theta: 1e6,
        };
        for (tokens, linear, attention) in [
            (98, 90_634_715_136 + 1_188_321_820_672, 3_855_122_432),
            (40, 36_993_761_280 + 485_029_314_560, 642_252_800),
        ] {
            let causal = attention * (tokens as u64 + 1) / (2 * tokens as u64);
            assert_eq!(2 * encode(&config, &[tokens]), linear + causal);
        }
    }

    /// torch's counts for diffusers' `AutoencoderKLQwenImage`, with a third of its count for each causal
    /// convolution over three frames.
    #[test]
    fn the_vae_counts_as_torch_counts() {
        let config = vae();
        let whole = |latents| decode(&config, latents, usize::MAX);
        assert_eq!(2 * whole([32, 32]), 270_231_142_400);
        assert_eq!(2 * whole([128, 128]), 4_710_245_335_040);

        // 40 latents in tiles of 32 every 24: 32 and 16 of them, both ways.
        let blended = VaeSettings {
            tiling: Some(Tiling::Blended(Blending::default())),
            ..VaeSettings::default()
        };
        let tiles = [[32, 32], [32, 16], [16, 32], [16, 16]].map(whole);
        let tiled = decode_tiled(&config, [40, 40], blended);
        assert_eq!(tiled, tiles.into_iter().sum::<u64>());
        assert_eq!(decode_tiled(&config, [32, 32], blended), whole([32, 32]));
    }

    /// The reference: halos that are as wide as each resolution needs cost 1.18 times the upper part,
    /// in an image without edges.
    #[test]
    fn exact_tiles_of_512_pixels_cost_at_most_1_18_times_the_whole_image() {
        let config = vae();
        let tiled = |side: usize, size| {
            let settings = VaeSettings::default().of(Decoding::Tiled(size));
            decode_tiled(&config, [side, side], settings) as f64
        };
        let whole = |side: usize| decode(&config, [side, side], usize::MAX) as f64;
        for (side, size, factor) in [
            (64, 512, 1.0..=1.0),
            (128, 512, 1.05..=1.12),
            (256, 512, 1.07..=1.18),
            (256, 1024, 1.02..=1.09),
            (256, 256, 1.2..=1.4),
        ] {
            let ratio = tiled(side, size) / whole(side);
            assert!(
                factor.contains(&ratio),
                "{side} latents in tiles of {size}: {ratio}"
            );
        }
    }

    /// Counted by hand: 2 layers of width 4 on 2·3 image tokens and 5 text tokens.
    #[test]
    fn a_small_transformer_counts_as_by_hand() {
        let config = TransformerConfig {
            in_channels: 8,
            out_channels: 2,
            num_layers: 2,
            attention_head_dim: 2,
            num_attention_heads: 2,
            joint_attention_dim: 3,
            ..transformer()
        };
        let ends = 6 * 8 * 4 + 5 * 3 * 4 + 6 * 4 * 8;
        let block = 11 * (16 + 16 + 16 + 16 + 64 + 64) + 11 * 11 * 4 + 11 * 11 * 4;
        let one = segment(2, 3, 5);
        assert_eq!(step(&config, &[one]), ends + 2 * block);
        assert_eq!(step(&config, &[one, one]), 2 * (ends + 2 * block));
        assert_eq!(
            modulation(&config),
            256 * 4 + 4 * 4 + 2 * (4 * 24 + 4 * 24) + 4 * 8
        );
    }

    /// Work of all steps as a part of that of all steps computed.
    fn part(job: &Job) -> f64 {
        let config = transformer();
        let halves = [segment(64, 64, 40), segment(64, 64, 6)];
        let halves = &halves[..job.branches().count()];
        let all = job.sampling.steps as u64 * step(&config, halves);
        denoise(&config, halves, job) as f64 / all as f64
    }

    fn guided(steps: usize) -> Job {
        Job {
            guidance: testing::guidance(vec![0; 40], 4.0),
            ..testing::job(1024, steps)
        }
    }

    #[track_caller]
    fn close(value: f64, expected: f64) {
        assert!((value - expected).abs() < 5e-3, "{value} is not {expected}");
    }

    #[test]
    fn a_mask_leaves_out_the_blocks_of_reused_steps() {
        let mask = MagCache::balanced(Some(QWEN_IMAGE_RATIOS.into())).mask(50);
        let cached = Job {
            cache: CachePolicy::Mask(mask),
            ..guided(50)
        };
        close(part(&cached), 30.0 / 50.0);
        // A reused step has its image tokens' way in and out.
        let config = transformer();
        let one = segment(64, 64, 40);
        let two = Job {
            cache: CachePolicy::Mask([true, false].into()),
            ..testing::job(1024, 2)
        };
        let ends = 4096 * (64 * 3072 + 3072 * 64);
        assert_eq!(denoise(&config, &[one], &two), step(&config, &[one]) + ends);
        let exact = Job {
            cache: CachePolicy::Mask([true; 50].into()),
            ..guided(50)
        };
        assert_eq!(part(&exact).to_bits(), 1.0_f64.to_bits());
    }

    #[test]
    fn a_gate_leaves_out_the_unconditional_half() {
        for (gate, expected) in [(0.5, 0.75), (0.7, 0.85), (0.0, 0.51), (1.0, 1.0)] {
            let gated = Job {
                cfg_gate_step: Some(gate),
                ..guided(50)
            };
            close(part(&gated), expected);
            let alone = Job {
                guidance: None,
                ..gated
            };
            assert_eq!(part(&alone).to_bits(), 1.0_f64.to_bits());
        }
    }

    /// 15 of 50 steps, and the first of 60 blocks in the others.
    #[test]
    fn dbcache_counts_its_first_and_last_blocks_and_the_steps_that_the_caps_allow() {
        let cached = |settings| Job {
            cache: CachePolicy::DbCache(settings),
            ..guided(50)
        };
        close(
            part(&cached(DbCache::default())),
            (15.0 + 35.0 / 60.0) / 50.0,
        );
        let more_blocks = DbCache {
            fn_compute_blocks: 8,
            bn_compute_blocks: 4,
            ..DbCache::default()
        };
        close(
            part(&cached(more_blocks.clone())),
            (15.0 + 35.0 * 12.0 / 60.0) / 50.0,
        );
        let gated = Job {
            cfg_gate_step: Some(0.5),
            ..cached(more_blocks)
        };
        assert!(part(&gated) < 0.4);
        let few = DbCache {
            max_cached_steps: Some(10),
            ..DbCache::default()
        };
        close(part(&cached(few)), (40.0 + 10.0 / 60.0) / 50.0);
    }
}
