//! Runs `kiln generate` with other noise levels and samplers than those of a checkpoint, and compares it
//! stage by stage with diffusers: `tests/fixtures/schedules`, made by
//! `tests/reference/make_schedule_fixtures.py`.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use safetensors::SafeTensors;
use serde_json::{Value, json};

use crate::parity::{compare_images, compare_stages, fixtures};

fn case(name: &str) -> Value {
    let cases = fs::read(fixtures().join("schedules/cases.json")).unwrap();
    let cases: Value = serde_json::from_slice(&cases).unwrap();
    let mut cases = cases.as_array().unwrap().iter();
    let found = cases.find(|it| it["case"]["name"] == name);
    found.unwrap_or_else(|| panic!("no case {name}")).clone()
}

/// A copy of a small checkpoint with these values in its `scheduler_config.json`.
fn with_scheduler(checkpoint: &str, scheduler: &Value, folder: &Path) {
    fn copy(from: &Path, to: &Path) {
        fs::create_dir_all(to).unwrap();
        for entry in fs::read_dir(from).unwrap() {
            let (path, name) = entry.map(|it| (it.path(), it.file_name())).unwrap();
            if path.is_dir() {
                copy(&path, &to.join(name));
            } else {
                fs::copy(&path, to.join(name)).unwrap();
            }
        }
    }
    copy(&fixtures().join("checkpoints").join(checkpoint), folder);
    let path = folder.join("scheduler/scheduler_config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let changed = scheduler.as_object().unwrap().clone();
    config.as_object_mut().unwrap().extend(changed);
    fs::write(path, config.to_string()).unwrap();
}

/// The arguments of a case, but those of its schedule and of its guidance scale.
fn generate(case: &Value, model: &Path, folder: &Path, more: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kiln"));
    command.args(["generate", "--json", "--backend", "flex", "--dtype", "f32"]);
    command.args(["--prompt", case["prompt"].as_str().unwrap()]);
    if let Some(negative) = case["negative_prompt"].as_str() {
        command.args(["--negative-prompt", negative]);
    }
    for (option, key) in [
        ("--height", "height"),
        ("--width", "width"),
        ("--num-images", "num_images"),
        ("--seed", "seed"),
    ] {
        command.arg(option).arg(case[key].to_string());
    }
    command.arg("--model").arg(model).args(more);
    command.arg("--output").arg(folder.join("out.png"));
    command.arg("--dump").arg(folder.join("dump.safetensors"));
    command.output().unwrap()
}

/// Runs a case with this model and these arguments, compares it, and returns the report.
fn compared(name: &str, model: &Path, more: &[&str]) -> Value {
    let case = case(name)["case"].clone();
    let folder = tempfile::tempdir().unwrap();
    let output = generate(&case, model, folder.path(), more);
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{name} {more:?}: {error}");
    let reference = fs::read(fixtures().join(format!("schedules/{name}.safetensors"))).unwrap();
    let dump = fs::read(folder.path().join("dump.safetensors")).unwrap();
    let reference = SafeTensors::deserialize(&reference).unwrap();
    let dump = SafeTensors::deserialize(&dump).unwrap();
    let what = format!("{name} {more:?}");
    compare_stages(&what, &reference, &dump);
    let images = case["num_images"].as_u64().unwrap();
    compare_images(&what, &reference, folder.path(), images);
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let sigmas = reference.tensor("sigmas").unwrap();
    let sigmas = sigmas.data().chunks_exact(4);
    let sigmas = sigmas.map(|it| f32::from_le_bytes(it.try_into().unwrap()));
    let reported = report["schedule"]["sigmas"].as_array().unwrap().iter();
    let reported: Vec<f32> = reported.map(|it| it.as_f64().unwrap() as f32).collect();
    assert_eq!(sigmas.clone().count(), reported.len() + 1, "{what}");
    for (sigma, reported) in sigmas.zip(reported) {
        assert!(
            (sigma - reported).abs() < 1e-6,
            "{what}: {reported} for {sigma}"
        );
    }
    report
}

fn base() -> std::path::PathBuf {
    fixtures().join("checkpoints/base")
}

/// A checkpoint that has Lightning fused in is known by its scheduler, and needs no arguments.
#[test]
fn a_fused_lightning_checkpoint_is_that_of_diffusers() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("Tiny-Lightning-4steps");
    with_scheduler("base", &case("lightning")["scheduler"], &model);
    let report = compared("lightning", &model, &[]);
    assert_eq!(report["num_inference_steps"], 4);
    assert_eq!(report["true_cfg_scale"], 1.0);
    assert_eq!(report["schedule"]["origin"], "model");
    assert_eq!(report["schedule"]["name"], "lightning");
    assert!(report["warnings"].is_null());

    let guided = ["--steps", "8", "--true-cfg-scale", "4"];
    let report = compared("lightning_guided", &model, &guided);
    assert_eq!(report["guidance"], true);
    let warnings = report["warnings"].as_array().unwrap();
    assert_eq!(warnings.len(), 2, "{warnings:?}");
}

/// The base model with the same levels, in each way to ask for them.
#[test]
fn requested_levels_are_those_of_diffusers() {
    let base = base();
    for (case, args, origin_name) in [
        ("lightning", &["--shift", "3", "--steps", "4"][..], None),
        ("lightning", &["--schedule", "lightning"], Some("lightning")),
        ("lightning", &["--sigmas", "1,0.9,0.75,0.5"], None),
        (
            "lightning",
            &["--sigmas", "1,0.9,0.75,0.5,0", "--steps", "4"],
            None,
        ),
        ("dmd2", &["--schedule", "dmd2-3step"], Some("dmd2-3step")),
        (
            "dmd2",
            &[
                "--schedule",
                r#"{"shift": 2.5, "terminal": 0.02}"#,
                "--steps",
                "3",
            ],
            None,
        ),
        ("sigmas", &["--sigmas", "0.97,0.6,0.33,0.1"], None),
        ("twinflow", &["--schedule", "twinflow"], Some("twinflow")),
    ] {
        let report = compared(case, &base, args);
        assert_eq!(report["schedule"]["origin"], "request", "{args:?}");
        assert_eq!(report["schedule"]["name"], json!(origin_name), "{args:?}");
        assert!(report["warnings"].is_null(), "{args:?}");
    }
}

/// A stochastic sampler, with guidance and several images, from the model's configuration and from the
/// request.
#[test]
fn stochastic_steps_are_those_of_diffusers() {
    let folder = tempfile::tempdir().unwrap();
    for (name, checkpoint, args) in [
        ("stochastic", "base", &["--true-cfg-scale", "3"][..]),
        ("stochastic_odd", "odd", &["--steps", "3"]),
    ] {
        let model = folder.path().join(name);
        with_scheduler(checkpoint, &case(name)["scheduler"], &model);
        let report = compared(name, &model, args);
        assert_eq!(report["schedule"]["stochastic"], true);
        assert_eq!(report["schedule"]["origin"], "model");
    }
    let schedule = r#"{"shift": 3, "stochastic": true}"#;
    let args = [
        "--schedule",
        schedule,
        "--steps",
        "4",
        "--true-cfg-scale",
        "3",
    ];
    let report = compared("stochastic", &base(), &args);
    assert_eq!(report["schedule"]["origin"], "request");
}

#[test]
fn conflicts_are_refused_before_a_model_is_opened() {
    let folder = tempfile::tempdir().unwrap();
    let case = case("lightning")["case"].clone();
    for (args, message) in [
        (
            &["--shift", "3", "--sigmas", "1,0.5"][..],
            "shift and sigmas both set the noise levels: give only one of them",
        ),
        (
            &["--sigmas", "1,0.5", "--steps", "4"],
            "num_inference_steps is 4, but sigmas has 2 noise levels",
        ),
        (
            &["--sigmas", "0.5,1"],
            "sigmas must fall from step to step, got 1 after 0.5",
        ),
        (
            &["--schedule", "lighting"],
            "must be one of model, lightning, ",
        ),
        (
            &["--schedule", "{\"shift\": 0}"],
            "shift must be from 0.001 to 100, got 0",
        ),
        (&["--schedule", "{"], "no valid JSON"),
        (&["--sigmas", "1,x"], "invalid value"),
    ] {
        let output = generate(&case, Path::new("./none"), folder.path(), args);
        let error = String::from_utf8_lossy(&output.stderr).replace('\n', " ");
        let error: String = error.split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(!output.status.success());
        assert!(error.contains(message), "{args:?}: {error}");
    }
}
