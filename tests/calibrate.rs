//! `kiln bench --calibrate-cache` with the demo model.

use std::fs;
use std::process::{Command, Output, Stdio};

use serde_json::Value;

fn calibrate(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_kiln"))
        .args(["bench", "--size", "32x32"])
        .args(args)
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

fn ratios(json: &[u8]) -> Vec<f64> {
    let json: Value = serde_json::from_slice(json).unwrap();
    assert_eq!(json.as_object().unwrap().len(), 1, "{json}");
    let ratios = json["mag_ratios"].as_array().unwrap();
    ratios.iter().map(|it| it.as_f64().unwrap()).collect()
}

#[test]
fn the_ratios_go_to_a_file_and_the_masks_to_the_log() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("ratios.json");
    let output = calibrate(&[
        "--calibrate-cache",
        file.to_str().unwrap(),
        "--steps",
        "10",
        "--calibration-prompt",
        "a large red circle on a blue background",
        "--calibration-prompt",
        "a small green square on a white background",
    ]);
    let log = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{log}");
    assert!(output.stdout.is_empty());
    let ratios = ratios(&fs::read(file).unwrap());
    assert_eq!(ratios.len(), 10);
    assert_eq!(ratios[0].to_bits(), 1.0_f64.to_bits());
    assert!(ratios.iter().all(|&ratio| ratio > 0.0), "{ratios:?}");
    assert!(ratios[1..].iter().any(|&ratio| ratio != 1.0), "{ratios:?}");
    for line in [
        "prompt 2 of 2: 10 steps",
        "balanced computes ",
        "fast computes ",
    ] {
        assert!(log.contains(line), "{log}");
    }
    assert!(log.contains(" of 10 steps: 11"), "{log}");
}

#[test]
fn without_a_file_the_ratios_of_fifty_steps_go_to_stdout() {
    let args = ["--calibrate-cache", "--calibration-prompt", "a red circle"];
    let output = calibrate(&args);
    let log = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{log}");
    assert_eq!(ratios(&output.stdout).len(), 50, "{log}");
    assert!(log.contains(" of 50 steps: "), "{log}");
}

#[test]
fn arguments_are_checked_before_the_model_is_loaded() {
    for (args, code, message) in [
        (
            &["--calibrate-cache", "--steps", "7"][..],
            2,
            "a step cache needs num_inference_steps of at least 8, got 7",
        ),
        (
            &["--calibrate-cache", "no/such/folder/ratios.json"],
            1,
            "there is no folder no/such/folder to write to",
        ),
        (&["--calibration-prompt", "a cat"], 2, "--calibrate-cache"),
        (&["--calibrate-cache", "--json"], 2, "--json"),
        (&["--calibrate-cache", "x.json", "--runs", "2"], 2, "--runs"),
    ] {
        let output = calibrate(args);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{stderr}");
        assert!(stderr.contains(message), "{stderr}");
    }
}
