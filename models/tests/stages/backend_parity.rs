//! Compares a backend's whole pipeline with what diffusers computes, in f32. The tests of the GPU
//! backends include this file and `fixtures.rs`.

use std::fs;

use kiln_models::families::CheckpointParts;
use kiln_models::job::{Decoding, Guidance, Job, Noise, Sampling, Size};
use kiln_models::loading::{LoadOptions, ModelDType};
use kiln_models::noise::NoiseGenerator;
use kiln_models::pipeline::Pipeline;
use kiln_models::step_cache::CachePolicy;
use kiln_models::vae::{Blending, Tiling, VaeSettings};
use serde_json::Value;

use crate::fixtures::{Stages, assert_close, folder, parts};

/// Largest allowed difference, relative to a stage's largest magnitude. The CPU backends have the same
/// bound; they too add up in another order than torch.
const TOLERANCE: f32 = 2e-5;
/// Share of the 8-bit values that must be equal; the others may differ by 1.
const EQUAL_PIXELS: f64 = 0.999;

/// Generates the images of the case of this name with a pipeline that `open` makes, and compares
/// every recorded stage.
pub(crate) fn generates_what_diffusers_generates(
    name: &str,
    open: impl FnOnce(&CheckpointParts, LoadOptions) -> Box<dyn Pipeline>,
) {
    let cases = fs::read(folder().join("cases.json")).unwrap();
    let cases: Vec<Value> = serde_json::from_slice(&cases).unwrap();
    let case = cases.iter().find(|case| case["name"] == name).unwrap();
    let reference = Stages::open(name);

    let tiling = case["vae_tile"].as_array().map(|tile| Blending {
        size: tile[0].as_u64().unwrap() as usize,
        stride: tile[1].as_u64().unwrap() as usize,
    });
    let options = LoadOptions {
        dtype: Some(ModelDType::F32),
        vae: VaeSettings {
            tiling: tiling.map(Tiling::Blended),
            ..VaeSettings::default()
        },
        ..LoadOptions::default()
    };
    let parts = parts(case["checkpoint"].as_str().unwrap());
    let mut pipeline = open(&parts, options);
    pipeline.start(0, job(case, &reference)).unwrap();
    while pipeline.step(&[0]).unwrap()[0].steps_left > 0 {}
    let output = pipeline.finish(0).unwrap();

    let mut compared = 0;
    for stage in &output.trace {
        if !reference.0.contains_key(&stage.name) {
            continue;
        }
        assert_eq!(stage.shape, reference.shape(&stage.name), "{}", stage.name);
        let expected = reference.values(&stage.name);
        if stage.name == "initial_noise" {
            assert_eq!(stage.values, expected);
        } else {
            assert_close(&stage.name, &stage.values, &expected, TOLERANCE);
        }
        compared += 1;
    }
    assert!(compared >= 4, "only {compared} stages were compared");

    let actual = output.images.iter().flat_map(|image| &image.pixels);
    let expected = &reference.0["image_u8"].1;
    assert_eq!(actual.clone().count(), expected.len());
    assert!(
        actual
            .clone()
            .zip(expected)
            .all(|(a, b)| a.abs_diff(*b) <= 1)
    );
    let equal = actual.zip(expected).filter(|(a, b)| a == b).count();
    let share = equal as f64 / expected.len() as f64;
    println!("8-bit values equal: {share:.5}");
    assert!(share >= EQUAL_PIXELS, "{share}");
}

fn job(case: &Value, reference: &Stages) -> Job {
    let size = reference.shape("image_u8");
    Job {
        conditioning: reference.ids("token_ids").into(),
        guidance: Guidance::new(
            (!case["negative_prompt"].is_null())
                .then(|| reference.ids("negative_token_ids").into()),
            case["true_cfg_scale"].as_f64().unwrap(),
        ),
        size: Size {
            height: size[1],
            width: size[2],
        },
        sampling: Sampling::new(case["num_inference_steps"].as_u64().unwrap() as usize),
        noise: Noise {
            seed: case["seed"].as_u64().unwrap(),
            generator: NoiseGenerator::Cpu,
        },
        num_images: size[0],
        decoding: Decoding::default(),
        cache: CachePolicy::Off,
        cfg_gate_step: None,
        adapters: Vec::new(),
        record: true,
    }
}
