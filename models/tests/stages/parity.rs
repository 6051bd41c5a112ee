//! Compares each stage with diffusers, in f32, on every CPU backend.

use burn::tensor::Tensor;
use burn_flex::{Flex, FlexDevice};
use burn_ndarray::{NdArray, NdArrayDevice};
use kiln_models::families::qwen_image::TEMPLATE;
use kiln_models::guidance::true_cfg;
use kiln_models::text_encoder::{TextEncoder, TextEncoderConfig};
use kiln_models::transformer::{AdapterRuns, Segment, Transformer, TransformerConfig};
use kiln_models::vae::{Blending, Tiling, VaeConfig, VaeDecoder, VaeSettings};
use kiln_ops::FusedOps;

use crate::fixtures::{Component, F32, Stages, config};

/// Largest allowed difference of one op or table, relative to its largest magnitude: the rounding of
/// single f32 operations.
const OP: f32 = 2e-6;
/// The bound of sines of arguments up to 1000, where f32 resolves 6e-5 and an ulp of a frequency
/// matters.
const TIME: f32 = 1e-5;
/// The bound of a whole network of a few layers: rounding accumulates, and torch's own results change
/// by 1e-6 with the memory alignment of its weights.
const NETWORK: f32 = 2e-5;

macro_rules! on_every_cpu_backend {
    ($($test:ident($checkpoint:expr, $case:expr);)*) => {
        mod flex {
            use super::*;
            $(#[test] fn $test() { super::$test::<Flex>($checkpoint, $case, &FlexDevice); })*
        }
        mod ndarray {
            use super::*;
            $(#[test] fn $test() {
                super::$test::<NdArray>($checkpoint, $case, &NdArrayDevice::Cpu);
            })*
        }
    };
}

on_every_cpu_backend! {
    prompt_embeddings(&["base", "odd", "bf16"], &["base", "odd", "bf16"]);
    modulation(&["base", "odd"], &["base", "odd"]);
    rope_tables(&["base", "odd"], &["base", "odd"]);
    first_block(&["base", "odd"], &["base", "odd"]);
    whole_transformer(&["base", "odd"], &["base", "odd"]);
    vae_decode(&["base", "odd"], &["base", "odd"]);
    tiled_decode(&["base", "odd", "base"], &["tiled", "tiled_odd", "tiled_uneven"]);
    sliced_decode(&["base"], &["tiled_uneven"]);
}

/// Runs a check for every pair of checkpoint and case.
fn each(checkpoints: &[&str], cases: &[&str], check: impl Fn(&str, &Stages)) {
    for (checkpoint, case) in checkpoints.iter().zip(cases) {
        println!("-- {case}");
        check(checkpoint, &Stages::open(case));
    }
}

fn transformer<B: FusedOps>(checkpoint: &str, device: &B::Device) -> Transformer<B> {
    let config = TransformerConfig::from_json(&config(checkpoint, "transformer")).unwrap();
    Transformer::load(
        &config,
        Component::open(checkpoint, "transformer"),
        device,
        F32,
    )
    .unwrap()
}

fn vae<B: FusedOps>(checkpoint: &str, device: &B::Device) -> VaeDecoder<B> {
    let config = VaeConfig::from_json(&config(checkpoint, "vae")).unwrap();
    VaeDecoder::load(&config, Component::open(checkpoint, "vae"), device, F32).unwrap()
}

/// The segment of a case's forward on the positive prompt.
pub(crate) fn segment(stages: &Stages, text_tokens: usize) -> Segment {
    let noise = stages.shape("initial_noise");
    Segment {
        height: noise[3] / 2,
        width: noise[4] / 2,
        text_tokens,
        row: 0,
    }
}

pub(crate) fn model_timesteps(stages: &Stages) -> Vec<f32> {
    stages
        .values("timesteps")
        .iter()
        .map(|t| t / 1000.0)
        .collect()
}

fn prompt_embeddings<B: FusedOps>(checkpoints: &[&str], cases: &[&str], device: &B::Device) {
    each(checkpoints, cases, |checkpoint, stages| {
        let config = TextEncoderConfig::from_json(&config(checkpoint, "text_encoder")).unwrap();
        let source = Component::open(checkpoint, "text_encoder");
        let encoder = TextEncoder::<B>::load(&config, source, device, F32).unwrap();
        let (positive, negative) = (stages.ids("token_ids"), stages.ids("negative_token_ids"));
        let embeds = encoder.forward(&[&positive, &negative]);
        for (name, embeds) in ["prompt_embeds", "negative_prompt_embeds"]
            .iter()
            .zip(embeds)
        {
            let kept = embeds.dims()[0] - TEMPLATE.dropped_tokens;
            let embeds = embeds.narrow(0, TEMPLATE.dropped_tokens, kept);
            stages.assert_close(name, embeds, NETWORK);
        }
    });
}

fn modulation<B: FusedOps>(checkpoints: &[&str], cases: &[&str], device: &B::Device) {
    each(checkpoints, cases, |checkpoint, stages| {
        let table = transformer::<B>(checkpoint, device).modulation_table(&model_timesteps(stages));
        stages.assert_close("temb", table.temb, TIME);
        for (index, (image, text)) in table.blocks.into_iter().enumerate() {
            stages.assert_close(&format!("img_mod.{index}"), image, TIME);
            stages.assert_close(&format!("txt_mod.{index}"), text, TIME);
        }
        stages.assert_close("norm_out", table.norm_out, TIME);
    });
}

fn rope_tables<B: FusedOps>(checkpoints: &[&str], cases: &[&str], device: &B::Device) {
    each(checkpoints, cases, |checkpoint, stages| {
        let config = TransformerConfig::from_json(&config(checkpoint, "transformer")).unwrap();
        let segments = [segment(stages, stages.shape("rope.txt_cos")[0])];
        let image = kiln_models::transformer::image_rope::<B>(&config, &segments, device);
        let text = kiln_models::transformer::text_rope::<B>(&config, &segments, device);
        stages.assert_close("rope.img_cos", image.cos, OP);
        stages.assert_close("rope.img_sin", image.sin, OP);
        stages.assert_close("rope.txt_cos", text.cos, OP);
        stages.assert_close("rope.txt_sin", text.sin, OP);
    });
}

fn first_block<B: FusedOps>(checkpoints: &[&str], cases: &[&str], device: &B::Device) {
    each(checkpoints, cases, |checkpoint, stages| {
        let transformer = transformer::<B>(checkpoint, device);
        let text = stages.tensor::<B, 2>("block0.in_text", device);
        let packing = transformer.pack(&[segment(stages, text.dims()[0])]);
        let modulation = transformer
            .modulation_table(&model_timesteps(stages))
            .step(0);
        let image = stages.tensor("block0.in_hidden", device);
        let (image, text) =
            transformer.first_block(image, text, &modulation, &packing, &AdapterRuns::none());
        stages.assert_close("block0.out_hidden", image, NETWORK);
        stages.assert_close("block0.out_text", text, NETWORK);
    });
}

fn whole_transformer<B: FusedOps>(checkpoints: &[&str], cases: &[&str], device: &B::Device) {
    each(checkpoints, cases, |checkpoint, stages| {
        let transformer = transformer::<B>(checkpoint, device);
        let modulation = transformer
            .modulation_table(&model_timesteps(stages))
            .step(0);
        let latents = pack(stages.tensor::<B, 3>("initial_noise", device));
        let forward = |name: &str| {
            let text = stages.tensor::<B, 2>(name, device);
            let packing = transformer.pack(&[segment(stages, text.dims()[0])]);
            transformer.forward(
                latents.clone(),
                text,
                &modulation,
                &packing,
                &AdapterRuns::none(),
            )
        };
        let (positive, negative) = (forward("prompt_embeds"), forward("negative_prompt_embeds"));
        stages.assert_close("transformer.out", positive.clone(), NETWORK);
        stages.assert_close("transformer.out_negative", negative.clone(), NETWORK);
        let scale = if checkpoint == "odd" { 3.0 } else { 4.0 };
        stages.assert_close(
            "noise_pred_step0",
            true_cfg(positive, negative, scale),
            NETWORK,
        );
    });
}

/// Packs latents as the pipeline does: `[z, h, w]` to `[tokens, 4 · z]`.
pub(crate) fn pack<B: FusedOps>(latents: Tensor<B, 3>) -> Tensor<B, 2> {
    let [channels, height, width] = latents.dims();
    latents
        .reshape([channels, height / 2, 2, width / 2, 2])
        .permute([1, 3, 0, 2, 4])
        .reshape([height * width / 4, channels * 4])
}

fn vae_decode<B: FusedOps>(checkpoints: &[&str], cases: &[&str], device: &B::Device) {
    each(checkpoints, cases, |checkpoint, stages| {
        let latents = stages.tensor::<B, 4>("vae_in", device);
        let decoded = vae::<B>(checkpoint, device).decode(latents, VaeSettings::default());
        stages.assert_close("vae_out", decoded.clamp(-1.0, 1.0), NETWORK);
    });
}

/// The tile geometries are those of the cases of the same names in cases.json.
fn tiled_decode<B: FusedOps>(checkpoints: &[&str], cases: &[&str], device: &B::Device) {
    let tilings = [(32, 24), (24, 16), (40, 24)];
    for (index, (size, stride)) in tilings.into_iter().enumerate() {
        let range = index..=index;
        each(
            &checkpoints[range.clone()],
            &cases[range],
            |checkpoint, stages| {
                let latents = stages.tensor::<B, 4>("vae_in", device);
                let settings = VaeSettings {
                    tiling: Some(Tiling::Blended(Blending { size, stride })),
                    ..VaeSettings::default()
                };
                let decoded = vae::<B>(checkpoint, device).decode(latents, settings);
                let image = (decoded * 0.5 + 0.5).clamp(0.0, 1.0).permute([0, 2, 3, 1]);
                stages.assert_close("image_float", image, NETWORK);
            },
        );
    }
}

fn sliced_decode<B: FusedOps>(checkpoints: &[&str], cases: &[&str], device: &B::Device) {
    each(checkpoints, cases, |checkpoint, stages| {
        let latents = stages.tensor::<B, 4>("vae_in", device);
        assert_eq!(latents.dims()[0], 2, "slicing needs several images");
        let vae = vae::<B>(checkpoint, device);
        let decode = |use_slicing| {
            let settings = VaeSettings {
                use_slicing,
                ..VaeSettings::default()
            };
            vae.decode(latents.clone(), settings).into_data()
        };
        assert_eq!(decode(true), decode(false));
    });
}
