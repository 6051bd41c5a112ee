//! Counts of small networks, and of Qwen-Image's.

use super::*;
use crate::job::Decoding;
use crate::step_cache::{CachePolicy, DbCache, MagCache, QWEN_IMAGE_RATIOS};
use crate::testing;
use crate::vae::Blending;

/// No adapters.
const NONE: TokenWork = TokenWork {
    image: 0,
    image_ends: 0,
    text: 0,
    text_ends: 0,
};

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
        assert_eq!(
            2 * (step(&config, &[segment], NONE) + modulation(&config)),
            flops
        );
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
    assert_eq!(step(&config, &[one], NONE), ends + 2 * block);
    assert_eq!(step(&config, &[one, one], NONE), 2 * (ends + 2 * block));
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
    let all = job.sampling.steps as u64 * step(&config, halves, NONE);
    denoise(&config, halves, NONE, job) as f64 / all as f64
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
    assert_eq!(
        denoise(&config, &[one], NONE, &two),
        step(&config, &[one], NONE) + ends
    );
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

/// Qwen-Image's rank of 64 on the twelve linear layers of every block adds 3.1 % to what these
/// layers take.
#[test]
fn adapters_add_their_share_of_the_linear_layers() {
    let config = transformer();
    let dim = config.dim() as u64;
    let pair = 8 * dim + 10 * dim;
    let adapters = TokenWork {
        image: 60 * 64 * pair,
        text: 60 * 64 * pair,
        ..NONE
    };
    let one = segment(64, 64, 64);
    let tokens = 4096 + 64;
    let added = step(&config, &[one], adapters) - step(&config, &[one], NONE);
    assert_eq!(added, tokens * 60 * 64 * pair);
    let linear = tokens * 60 * 12 * dim * dim;
    close(added as f64 / linear as f64, 0.0312);

    // Blocks that are left out leave their changes out.
    let ends = TokenWork {
        image_ends: 7,
        text_ends: 11,
        ..adapters
    };
    let with = |blocks| forward(&config, &one, ends, blocks) - forward(&config, &one, NONE, blocks);
    assert_eq!(with(0), 4096 * 7);
    assert_eq!(with(15), added / 4 + 4096 * 7 + 64 * 11);
}
