//! Plans of small networks, and of Qwen-Image's.

use burn::tensor::DType;

use super::*;
use crate::adapter::{Adapter, AdapterUse, Change, Factors, HostMatrix};
use crate::job::{Decoding, Size};
use crate::step_cache::{CachePolicy, DbCache};
use crate::testing;

/// Small networks whose decoder has two levels.
fn networks() -> Networks {
    Networks {
        text_encoder: TextEncoderConfig {
            vocab_size: 10,
            hidden_size: 8,
            intermediate_size: 16,
            num_hidden_layers: 1,
            num_attention_heads: 2,
            num_key_value_heads: 1,
            head_dim: 4,
            rms_norm_eps: 1e-6,
            rope_theta: 1e6,
        },
        transformer: TransformerConfig {
            patch_size: 2,
            in_channels: 8,
            out_channels: 2,
            num_layers: 2,
            attention_head_dim: 4,
            num_attention_heads: 2,
            joint_attention_dim: 8,
            axes_dims_rope: [2, 1, 1],
            sample_size: 8,
        },
        vae: VaeConfig {
            base_dim: 4,
            z_dim: 2,
            dim_mult: vec![1, 2],
            num_res_blocks: 1,
            latents_mean: vec![0.0; 2],
            latents_std: vec![1.0; 2],
        },
        settings: VaeSettings::default(),
        element: DType::F32.size() as u64,
        weight: DType::F32.size() as u64,
    }
}

/// Counted by hand: the convolution after upsampling, of 8 channels to 4, has the most values.
#[test]
fn the_widest_layer_of_the_decoder_is_its_peak() {
    let (height, width) = (32, 48);
    let copy = 8 * 4 * ((height / 2 + 1) * (width / 2 + 1) + 32);
    let values = (8 + 4) * height * width + copy;
    let weights = 16 * 8 * 8;
    let decode = |images| networks().decode([16, 24], usize::MAX, images);
    assert_eq!(decode(1), 4 * (values + weights));
    assert_eq!(decode(3), 4 * (3 * values + weights));
}

/// Counted by hand: of 40 latents in tiles of at most 20, a tile needs 6 pixels of the image around
/// it, so 3 latents of the upsampler's input, whose convolution has the most values.
#[test]
fn a_tile_takes_its_own_pixels_and_those_around_it() {
    let (height, width) = (32, 2 * (20 + 3));
    let copy = 8 * 4 * ((height / 2 + 1) * (width / 2 + 1) + 32);
    let values = (8 + 4) * height * width + copy;
    let middle = 8 * 16 * 40;
    let image = 3 * 32 * 80;
    let weights = 16 * 8 * 8;
    let decode = networks().decode([16, 40], 20, 1);
    assert_eq!(decode, 4 * (values + middle + image + weights));
}

#[test]
fn slices_take_less_than_a_batch_and_tiles_less_than_slices() {
    let plan = |decoding| {
        networks().plan(&Job {
            conditioning: vec![0; 40].into(),
            num_images: 4,
            decoding,
            ..testing::job(256, 2)
        })
    };
    let sliced_and_tiled = [Decoding::AsSet, Decoding::Sliced, Decoding::Tiled(128)];
    let plans = sliced_and_tiled.map(plan);
    let falls = plans.is_sorted_by(|more, less| more.decode > less.decode);
    assert!(falls, "{plans:?}");
    assert!(plans.iter().all(|plan| plan.step == plans[0].step));
}

#[test]
fn a_job_holds_the_table_of_its_steps_and_what_it_records() {
    let plan = |steps, record| {
        networks().plan(&Job {
            conditioning: vec![0; 40].into(),
            record,
            ..testing::job(64, steps)
        })
    };
    // 12 rows for each layer, 2 for the output norm, the time embedding.
    let row = F32 * 8 * (12 * 2 + 3);
    assert_eq!(plan(9, false).held - plan(8, false).held, row);
    let latents = F32 * 2 * 32 * 32;
    assert_eq!(plan(9, true).held - plan(8, true).held, row + latents);
}

#[test]
fn guidance_images_and_pixels_make_a_step_larger() {
    let step = |images, guidance, width| {
        let job = Job {
            conditioning: vec![0; 40].into(),
            guidance,
            num_images: images,
            size: Size { width, height: 64 },
            ..testing::job(64, 1)
        };
        networks().plan(&job).step as f64
    };
    let one = step(1, None, 64);
    let guided = step(1, testing::guidance(vec![0; 40], 2.0), 64);
    for (larger, times) in [
        (guided, 2.0),
        (step(3, None, 64), 3.0),
        (step(1, None, 128), 2.0),
    ] {
        assert!((larger / one - times).abs() < 0.2, "{larger} {one} {times}");
    }
}

#[test]
fn a_job_holds_the_residuals_of_its_step_cache() {
    let held = |cache: &CachePolicy, guided: bool, gate| {
        let guidance = testing::guidance(vec![0; 40], 2.0).filter(|_| guided);
        let job = Job {
            conditioning: vec![0; 40].into(),
            guidance,
            cache: cache.clone(),
            cfg_gate_step: gate,
            ..testing::job(64, 8)
        };
        networks().plan(&job).held
    };
    let exact = held(&CachePolicy::Off, true, None);
    let more = |cache: &CachePolicy| held(cache, true, None) - exact;
    // Both halves have 16 x 16 image tokens of width 8, and 6 text tokens.
    let residual = 2 * F32 * 16 * 16 * 8;
    let text = 2 * F32 * 6 * 8;
    let mut reused = [true; 8];
    assert_eq!(more(&CachePolicy::Mask(reused.into())), 0);
    reused[5] = false;
    let mask = CachePolicy::Mask(reused.into());
    assert_eq!(more(&mask), residual);
    let one = held(&mask, false, None) - held(&CachePolicy::Off, false, None);
    assert_eq!(one, residual / 2);
    let mut settings = DbCache::default();
    assert_eq!(more(&CachePolicy::DbCache(settings.clone())), 2 * residual);
    settings.bn_compute_blocks = 1;
    settings.taylorseer_order = 1;
    let all = 3 * residual + 2 * text;
    assert_eq!(more(&CachePolicy::DbCache(settings)), all);
    let latents = F32 * 16 * 16 * 8;
    assert_eq!(held(&CachePolicy::Off, true, Some(0.5)) - exact, latents);
}

/// A LoRA of this rank on these layers.
fn adapted(rank: usize, layers: &[(&str, [usize; 2])], job: Job) -> Job {
    let matrix = |rows: usize, columns: usize| {
        HostMatrix::from_f32([rows, columns], &vec![0.0; rows * columns])
    };
    let change = |&(path, [d_out, d_in]): &(&str, [usize; 2])| {
        let factors = Factors::LowRank {
            down: matrix(rank, d_in),
            up: matrix(d_out, rank),
        };
        (
            path.to_owned(),
            Change {
                factors,
                scale: 1.0,
            },
        )
    };
    let adapter = Adapter::new("test", layers.iter().map(change).collect());
    Job {
        adapters: vec![AdapterUse {
            adapter: Arc::new(adapter),
            scale: 1.0,
        }],
        ..job
    }
}

/// Counted by hand: 5 steps of 2 changed layers of 48 values and one of 16; the whole table has
/// 8 · (12 · 2 + 3) values a step.
#[test]
fn adapters_of_the_modulation_hold_their_part_of_the_table() {
    let plan = |job: &Job| networks().plan(job);
    let without = testing::job(32, 5);
    let held = |layers: &[(&str, [usize; 2])]| {
        let plan = plan(&adapted(2, layers, without.clone()));
        plan.held - networks().plan(&without).held
    };
    let modulation = [
        ("transformer_blocks.0.img_mod.1", [48, 8]),
        ("transformer_blocks.1.txt_mod.1", [48, 8]),
        ("norm_out.linear", [16, 8]),
    ];
    assert_eq!(held(&modulation), 4 * 5 * (2 * 48 + 16));
    assert_eq!(held(&[("transformer_blocks.0.attn.to_q", [8, 8])]), 0);
    let embedder = ("time_text_embed.timestep_embedder.linear_2", [8, 8]);
    assert_eq!(held(&[embedder]), 4 * 5 * 8 * (12 * 2 + 3));
    assert_eq!(held(&[modulation[0], embedder]), 4 * 5 * 8 * (12 * 2 + 3));
}

#[test]
fn a_step_has_what_an_adapter_adds_beside_the_layers() {
    let without = testing::job(64, 5);
    let step = |job: &Job| networks().step(16 * 16, 0).max(networks().plan(job).step);
    let with = |layers: &[(&str, [usize; 2])]| step(&adapted(4, layers, without.clone()));
    let narrow = with(&[("transformer_blocks.0.attn.to_q", [8, 8])]);
    let wide = with(&[("transformer_blocks.0.img_mlp.net.0.proj", [32, 8])]);
    assert!(step(&without) < narrow, "{narrow}");
    assert!(narrow < wide, "{wide}");
}
