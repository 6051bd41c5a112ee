//! Compares `kiln generate` with diffusers stage by stage, for every case of
//! `tests/fixtures/cases.json` (made by `tests/reference/make_fixtures.py`, which names the versions),
//! on every CPU backend that this test was built with.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

/// Largest accepted difference relative to the largest magnitude of a stage. All runs are in f32.
/// Rounding errors grow over encoder, steps and decoder, and torch's own results vary by 1e-6 with the
/// alignment of its weights in memory.
pub(crate) const TOLERANCE: f32 = 2e-5;
/// Smallest share of equal 8-bit values; the others may differ by 1.
const EQUAL_PIXELS: f64 = 0.999;

#[cfg(feature = "flex")]
#[test]
fn flex_matches_diffusers() {
    every_case("flex");
}

#[cfg(feature = "ndarray")]
#[test]
fn ndarray_matches_diffusers() {
    every_case("ndarray");
}

/// In bf16 the weights are used as stored, the noise is f32 noise rounded to bf16, and linear layers
/// round their inputs.
#[cfg(feature = "flex")]
#[test]
fn bf16_rounds_only_what_the_reference_rounds() {
    let case = cases()
        .into_iter()
        .find(|case| case["name"] == "bf16")
        .unwrap();
    let folder = tempfile::tempdir().unwrap();
    let (dump, reference) = (
        fs::read(run("flex", "auto", &case, folder.path())).unwrap(),
        fs::read(fixtures().join("cases/bf16.safetensors")).unwrap(),
    );
    let dump = SafeTensors::deserialize(&dump).unwrap();
    let reference = SafeTensors::deserialize(&reference).unwrap();
    let stage = |file: &SafeTensors<'_>, name: &str| floats(file.tensor(name).unwrap().data());
    let embeds = "prompt_embeds";
    let off = relative_difference(&stage(&dump, embeds), &stage(&reference, embeds));
    println!("{embeds}: {off:.2e}");
    assert!((1e-4..2e-2).contains(&off), "{off:e}");
    let noise = stage(&reference, "initial_noise").into_iter();
    // Rounds to nearest, ties to even, as torch does.
    let rounded: Vec<f32> = noise
        .map(|x| f32::from_bits((x.to_bits() + 0x7fff + (x.to_bits() >> 16 & 1)) & 0xffff_0000))
        .collect();
    assert_eq!(stage(&dump, "initial_noise"), rounded);
    // The rounded timesteps change the image; how much depends on the model.
    let image = "image_float";
    let off = relative_difference(&stage(&dump, image), &stage(&reference, image));
    assert!(off > 1e-4, "{off:e}");
}

fn cases() -> Vec<Value> {
    serde_json::from_slice(&fs::read(fixtures().join("cases.json")).unwrap()).unwrap()
}

pub(crate) fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

fn every_case(backend: &str) {
    let cases = cases();
    assert!(cases.len() >= 21, "{} cases, expected 21", cases.len());
    for case in &cases {
        let name = case["name"].as_str().unwrap();
        let folder = tempfile::tempdir().unwrap();
        let reference = fixtures().join("cases").join(format!("{name}.safetensors"));
        let dump = run(backend, "f32", case, folder.path());
        let (reference, dump) = (fs::read(reference).unwrap(), fs::read(dump).unwrap());
        let reference = SafeTensors::deserialize(&reference).unwrap();
        let dump = SafeTensors::deserialize(&dump).unwrap();
        compare_stages(&format!("{backend} {name}"), &reference, &dump);
        let images = case["num_images"].as_u64().unwrap();
        compare_images(
            &format!("{backend} {name}"),
            &reference,
            folder.path(),
            images,
        );
    }
}

/// Runs `kiln generate` for a case, and returns the path of its dump.
fn run(backend: &str, dtype: &str, case: &Value, folder: &Path) -> PathBuf {
    let dump = folder.join("dump.safetensors");
    let mut command = Command::new(env!("CARGO_BIN_EXE_kiln"));
    command
        .arg("generate")
        .arg("--prompt")
        .arg(case["prompt"].as_str().unwrap());
    if let Some(negative) = case["negative_prompt"].as_str() {
        command.arg("--negative-prompt").arg(negative);
    }
    for (option, key) in [
        ("--true-cfg-scale", "true_cfg_scale"),
        ("--height", "height"),
        ("--width", "width"),
        ("--num-inference-steps", "num_inference_steps"),
        ("--num-images", "num_images"),
        ("--seed", "seed"),
    ] {
        command.arg(option).arg(case[key].to_string());
    }
    if let Some(tile) = case["vae_tile"].as_array() {
        command.args(["--vae-use-tiling", "--vae-tiling", "blended"]);
        command.arg("--vae-tile-size").arg(tile[0].to_string());
        command.arg("--vae-tile-stride").arg(tile[1].to_string());
    }
    command.arg("--model");
    match case["checkpoint"].as_str().unwrap() {
        "demo" => command.arg("demo"),
        checkpoint => command.arg(fixtures().join("checkpoints").join(checkpoint)),
    };
    command.args(["--backend", backend, "--dtype", dtype]);
    command
        .arg("--output")
        .arg(folder.join("out.png"))
        .arg("--dump")
        .arg(&dump);
    let output = command.output().unwrap();
    assert!(
        output.status.success(),
        "{case}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    dump
}

pub(crate) fn compare_stages(case: &str, reference: &SafeTensors<'_>, dump: &SafeTensors<'_>) {
    let ids = |file: &SafeTensors<'_>, name: &str| -> Vec<i64> {
        let tensor = file.tensor(name).unwrap();
        assert_eq!(tensor.dtype(), Dtype::I64, "{case} {name}");
        tensor
            .data()
            .chunks_exact(8)
            .map(|id| i64::from_le_bytes(id.try_into().unwrap()))
            .collect()
    };
    assert_eq!(
        ids(dump, "token_ids"),
        ids(reference, "token_ids"),
        "{case}"
    );

    let stage = |name: &str| {
        [
            "prompt_embeds",
            "negative_prompt_embeds",
            "initial_noise",
            "image_float",
        ]
        .contains(&name)
            || name.starts_with("latents_step")
    };
    let stages: Vec<&str> = reference
        .names()
        .into_iter()
        .filter(|name| stage(name))
        .collect();
    assert!(stages.len() >= 4, "{case} has too few stages");
    for name in stages {
        let (ours, theirs) = (dump.tensor(name).unwrap(), reference.tensor(name).unwrap());
        assert_eq!(ours.shape(), theirs.shape(), "{case} {name}");
        assert_eq!(ours.dtype(), Dtype::F32, "{case} {name}");
        let off = relative_difference(&floats(ours.data()), &floats(theirs.data()));
        // The noise is equal to PyTorch's bit for bit, whatever the number of values.
        let allowed = if name == "initial_noise" {
            0.0
        } else {
            TOLERANCE
        };
        assert!(off <= allowed, "{case} {name} is off by {off:.2e}");
    }
}

pub(crate) fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes
        .chunks_exact(4)
        .map(|x| f32::from_le_bytes(x.try_into().unwrap()))
        .collect()
}

pub(crate) fn relative_difference(ours: &[f32], theirs: &[f32]) -> f32 {
    let magnitude = theirs
        .iter()
        .fold(0.0_f32, |largest, x| largest.max(x.abs()));
    assert!(magnitude > 0.0 && ours.iter().all(|x| x.is_finite()));
    let difference = ours
        .iter()
        .zip(theirs)
        .fold(0.0_f32, |largest, (a, b)| largest.max((a - b).abs()));
    difference / magnitude
}

pub(crate) fn compare_images(case: &str, reference: &SafeTensors<'_>, folder: &Path, images: u64) {
    let expected = reference.tensor("image_u8").unwrap();
    let (height, width) = (expected.shape()[1], expected.shape()[2]);
    let mut equal = 0;
    for (index, expected) in expected.data().chunks_exact(height * width * 3).enumerate() {
        let file = if images == 1 {
            "out.png".to_owned()
        } else {
            format!("out-{index}.png")
        };
        let (size, pixels) = read_png(&folder.join(file));
        assert_eq!(size, (width, height), "{case}");
        for (ours, theirs) in pixels.iter().zip(expected) {
            assert!(ours.abs_diff(*theirs) <= 1, "{case}: {ours} for {theirs}");
            equal += usize::from(ours == theirs);
        }
    }
    let share = equal as f64 / expected.data().len() as f64;
    assert!(
        share >= EQUAL_PIXELS,
        "{case}: only {share:.5} of the values are equal"
    );
}

fn read_png(path: &Path) -> ((usize, usize), Vec<u8>) {
    let file = std::io::BufReader::new(fs::File::open(path).unwrap());
    let mut reader = png::Decoder::new(file).read_info().unwrap();
    let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
    let info = reader.next_frame(&mut pixels).unwrap();
    assert_eq!(info.color_type, png::ColorType::Rgb);
    ((info.width as usize, info.height as usize), pixels)
}
