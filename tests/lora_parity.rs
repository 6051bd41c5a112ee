//! Adapter files of `tests/fixtures/lora`, as their trainers write them, read and run: compared with what
//! diffusers and peft generate with the same files (`tests/reference/make_lora_fixtures.py`), on every CPU
//! backend that this test was built with.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;

use kiln::backend::LoadSettings;
use kiln::checkpoint::Checkpoint;
use kiln::checkpoint::lora::{LoraFile, LoraOptions};
use kiln::image::{Encoding, ImageFormat, encode};
use kiln::runtime::{Runtime, RuntimeSettings};
use kiln_models::adapter::{Adapter, AdapterUse};
use kiln_models::job::{Job, Noise, NoiseLevels, Output, Sampling, Size};
use kiln_models::noise::NoiseGenerator;
use kiln_models::pipeline::Pipeline;
use kiln_models::testing;
use safetensors::SafeTensors;
use serde_json::Value;

use crate::parity::{TOLERANCE, fixtures, floats, relative_difference};

/// Largest difference in models of 16-bit weights, where the reference rounds every activation.
const BF16_TOLERANCE: f32 = 3e-2;
const F16_TOLERANCE: f32 = 1e-2;

#[cfg(feature = "flex")]
#[test]
fn flex_generates_from_adapter_files_what_diffusers_generates() {
    every_case("flex", &["f32", "bf16", "f16"]);
}

#[cfg(feature = "ndarray")]
#[test]
fn ndarray_generates_from_adapter_files_what_diffusers_generates() {
    every_case("ndarray", &["f32"]);
}

fn folder() -> PathBuf {
    fixtures().join("lora")
}

fn list(file: &str) -> Vec<Value> {
    serde_json::from_slice(&fs::read(folder().join(file)).unwrap()).unwrap()
}

/// Reads the file of an adapter.
fn adapter(name: &str) -> Arc<Adapter> {
    let entries = list("adapters.json");
    let entry = entries.iter().find(|entry| entry["name"] == name).unwrap();
    let checkpoint = fixtures()
        .join("checkpoints")
        .join(entry["checkpoint"].as_str().unwrap());
    let checkpoint = Checkpoint::open(&checkpoint).unwrap();
    let targets = checkpoint.parts().configs.adapter_targets().unwrap();
    let path = folder()
        .join("adapters")
        .join(entry["file"].as_str().unwrap());
    let file = LoraFile::open(&path, &targets, &LoraOptions::default()).unwrap();
    Arc::new(file.read(name).unwrap())
}

fn pipeline(backend: &str, checkpoint: &str, dtype: &str) -> Box<dyn Pipeline> {
    let path = fixtures().join("checkpoints").join(checkpoint);
    let settings = RuntimeSettings {
        load: LoadSettings {
            backend: backend.parse().unwrap(),
            dtype: dtype.parse().unwrap(),
            ..LoadSettings::default()
        },
        ..RuntimeSettings::new(path)
    };
    Runtime::open(&settings).unwrap().pipeline
}

fn generate(pipeline: &mut dyn Pipeline, job: Job) -> Output {
    pipeline.start(0, job).unwrap();
    while pipeline.step(&[0]).unwrap()[0].steps_left > 0 {}
    pipeline.finish(0).unwrap()
}

/// The job of a case.
fn job(case: &Value, reference: &SafeTensors<'_>, adapters: Vec<AdapterUse>) -> Job {
    let number = |name: &str| case[name].as_u64().unwrap();
    let ids = |name: &str| -> Option<Vec<u32>> {
        let ids = reference.tensor(name).ok()?.data().chunks_exact(8);
        let ids = ids.map(|id| i64::from_le_bytes(id.try_into().unwrap()));
        Some(ids.map(|id| id as u32).collect())
    };
    let scale = case["true_cfg_scale"].as_f64().unwrap();
    let levels = case["shift"]
        .as_f64()
        .map_or(NoiseLevels::Model, |shift| NoiseLevels::Shifted {
            shift,
            terminal: None,
        });
    Job {
        conditioning: ids("token_ids").unwrap().into(),
        guidance: ids("negative_token_ids").and_then(|negative| testing::guidance(negative, scale)),
        size: Size {
            height: number("height") as usize,
            width: number("width") as usize,
        },
        sampling: Sampling {
            levels,
            ..Sampling::new(number("num_inference_steps") as usize)
        },
        noise: Noise {
            seed: number("seed"),
            generator: NoiseGenerator::Cpu,
        },
        adapters,
        record: true,
        ..testing::job(16, 1)
    }
}

fn every_case(backend: &str, dtypes: &[&str]) {
    let cases = list("cases.json");
    assert!(cases.len() >= 34, "{} cases", cases.len());
    let mut pipelines = BTreeMap::new();
    let mut adapters = BTreeMap::new();
    for case in &cases {
        let text = |name: &str| case[name].as_str().unwrap();
        let (name, dtype) = (text("name"), text("dtype"));
        if !dtypes.contains(&dtype) {
            continue;
        }
        let uses = case["adapters"].as_array().unwrap().iter().map(|it| {
            let name = it["name"].as_str().unwrap().to_owned();
            let adapter = adapters
                .entry(name)
                .or_insert_with_key(|name| adapter(name));
            AdapterUse {
                adapter: Arc::clone(adapter),
                scale: it["scale"].as_f64().unwrap() as f32,
            }
        });
        let uses = uses.collect();
        let model = (text("checkpoint"), dtype);
        let pipeline = pipelines
            .entry(model)
            .or_insert_with(|| pipeline(backend, model.0, model.1));
        let file = folder().join("cases").join(format!("{name}.safetensors"));
        let file = fs::read(file).unwrap();
        let reference = SafeTensors::deserialize(&file).unwrap();
        let output = generate(&mut **pipeline, job(case, &reference, uses));
        compare(&format!("{backend} {name}"), dtype, &reference, &output);
    }
}

fn compare(case: &str, dtype: &str, reference: &SafeTensors<'_>, output: &Output) {
    let allowed = match dtype {
        "f32" => TOLERANCE,
        "bf16" => BF16_TOLERANCE,
        _ => F16_TOLERANCE,
    };
    let names = reference.names().into_iter();
    let names: Vec<&str> = names.filter(|it| it.starts_with("latents_step")).collect();
    assert!(!names.is_empty(), "{case} has no latents");
    for name in names {
        let ours = output.trace.iter().find(|it| it.name == name).unwrap();
        let theirs = reference.tensor(name).unwrap();
        assert_eq!(ours.shape, theirs.shape(), "{case} {name}");
        let off = relative_difference(&ours.values, &floats(theirs.data()));
        assert!(off <= allowed, "{case} {name} is off by {off:.2e}");
    }
    if dtype == "f32" {
        let image = reference.tensor("image_u8").unwrap();
        let pixels = output.images[0].pixels.iter().zip(image.data());
        let differences: Vec<u8> = pixels.map(|(a, b)| a.abs_diff(*b)).collect();
        assert_eq!(differences.len(), image.data().len(), "{case}");
        let unequal = differences.iter().filter(|it| **it > 0).count();
        assert!(differences.iter().all(|it| *it <= 1), "{case}");
        let share = unequal as f64 / differences.len() as f64;
        assert!(share <= 0.001, "{case}: {share} of the values differ");
    }
}

/// `kiln generate` takes the schedule, the steps and the guidance scale of Lightning from the name of the
/// file, and several adapters in their order.
#[cfg(feature = "flex")]
#[test]
fn the_command_line_generates_with_adapter_files_what_diffusers_generates() {
    let guided = ["--num-inference-steps", "2", "--true-cfg-scale", "4"];
    for (name, options) in [
        ("lightning", &[][..]),
        ("two", &guided),
        ("two_swapped", &guided),
    ] {
        let cases = list("cases.json");
        let case = cases.iter().find(|case| case["name"] == name).unwrap();
        let text = |name: &str| case[name].as_str().unwrap();
        let adapters = list("adapters.json");
        let folder_of_run = tempfile::tempdir().unwrap();
        let dump = folder_of_run.path().join("dump.safetensors");
        let mut command = Command::new(env!("CARGO_BIN_EXE_kiln"));
        command.args(["generate", "--backend", "flex", "--dtype", "f32", "--model"]);
        command.arg(fixtures().join("checkpoints").join(text("checkpoint")));
        command.args(["--prompt", text("prompt")]);
        command.args(["--negative-prompt", text("negative_prompt")]);
        for number in ["height", "width", "seed"] {
            command.args([format!("--{number}"), case[number].to_string()]);
        }
        for used in case["adapters"].as_array().unwrap() {
            let entry = adapters.iter().find(|it| it["name"] == used["name"]);
            let file = entry.unwrap()["file"].as_str().unwrap();
            let file = folder().join("adapters").join(file);
            let scale = &used["scale"];
            command
                .arg("--lora")
                .arg(format!("{}:{scale}", file.display()));
        }
        command.args(options).arg("--dump").arg(&dump);
        command
            .arg("--output")
            .arg(folder_of_run.path().join("out.png"));
        let output = command.output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{name}: {stderr}");
        let reference = fs::read(folder().join("cases").join(format!("{name}.safetensors")));
        let (reference, dump) = (reference.unwrap(), fs::read(&dump).unwrap());
        let reference = SafeTensors::deserialize(&reference).unwrap();
        let dump = SafeTensors::deserialize(&dump).unwrap();
        let of_steps = |file: &SafeTensors<'_>| {
            let names = file.names().into_iter();
            names.filter(|it| it.starts_with("latents_step")).count()
        };
        assert_eq!(of_steps(&dump), of_steps(&reference), "{name}");
        for step in 0..of_steps(&reference) {
            let latents = |file: &SafeTensors<'_>| {
                floats(file.tensor(&format!("latents_step{step}")).unwrap().data())
            };
            let off = relative_difference(&latents(&dump), &latents(&reference));
            assert!(
                off <= TOLERANCE,
                "{name} is off by {off:.2e} after step {step}"
            );
        }
    }
}

/// The PNG files of the base, of one adapter and of another, 100 times in turn.
#[cfg(feature = "flex")]
#[test]
fn png_files_are_the_same_after_100_switches_of_adapters() {
    let mut pipeline = pipeline("flex", "base", "f32");
    let mut png = |adapter: Option<&Arc<Adapter>>| {
        let adapters = adapter.map(|adapter| AdapterUse {
            adapter: Arc::clone(adapter),
            scale: 1.0,
        });
        let job = Job {
            conditioning: (0..40).collect::<Vec<u32>>().into(),
            guidance: testing::guidance((5..45).collect(), 4.0),
            adapters: adapters.into_iter().collect(),
            ..testing::job(32, 2)
        };
        let image = generate(&mut *pipeline, job).images.remove(0);
        encode(&image, Encoding::new(ImageFormat::Png), None).unwrap()
    };
    let files = ["twelve", "lokr_whole"].map(adapter);
    let base = png(None);
    let expected = files.each_ref().map(|file| png(Some(file)));
    assert!(expected[0] != expected[1] && expected.iter().all(|it| *it != base));
    assert!(png(None) == base);
    for switch in 0..100 {
        let which = switch % 2;
        assert!(
            png(Some(&files[which])) == expected[which],
            "switch {switch}"
        );
    }
    assert!(png(None) == base);
}
