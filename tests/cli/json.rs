//! The JSON on stdout.

use serde_json::{Value, json};

use super::{kiln, stderr};

/// All of stdout, which is one value.
fn stdout(output: &std::process::Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn every_format_and_several_images_are_reported() {
    for (name, format) in [("a.png", "png"), ("a.jpeg", "jpeg"), ("a.webp", "webp")] {
        for count in [1, 3] {
            let folder = tempfile::tempdir().unwrap();
            let count_text = count.to_string();
            let args = [
                "generate",
                "a cat",
                "--json",
                "--steps",
                "2",
                "--size",
                "50x32",
                "--seed",
                "7",
                "--negative-prompt",
                " ",
                "--num-images",
                &count_text,
                "--output",
                name,
            ];
            let output = kiln(folder.path(), &args);
            assert!(output.status.success(), "{}", stderr(&output));
            let report = stdout(&output);
            let images = report["images"].as_array().unwrap();
            assert_eq!(images.len(), count);
            for (index, image) in images.iter().enumerate() {
                let file = std::fs::read(folder.path().join(image["path"].as_str().unwrap()));
                assert_eq!(image["bytes"], file.unwrap().len());
                assert_eq!(image["format"], format);
                assert_eq!(
                    (&image["width"], &image["height"]),
                    (&json!(48), &json!(32))
                );
                assert_eq!(
                    (&image["seed"], &image["index"]),
                    (&json!(7), &json!(index))
                );
            }
        }
    }
}

#[test]
fn the_report_says_how_and_how_long() {
    let folder = tempfile::tempdir().unwrap();
    let args = [
        "generate",
        "a cat",
        "--json",
        "--steps",
        "2",
        "--dtype",
        "f32",
        "--dump",
        "run.safetensors",
    ];
    let output = kiln(folder.path(), &args);
    assert!(output.status.success(), "{}", stderr(&output));
    let mut report = stdout(&output);
    let seconds = report["seconds"].take();
    let stages = ["load", "encode", "denoise", "decode", "write"];
    let seconds_of = |stage: &str| seconds[stage].as_f64().unwrap();
    assert!(stages.iter().all(|stage| seconds_of(stage) > 0.0));
    let all: f64 = stages.into_iter().map(seconds_of).sum();
    assert!(seconds_of("total") >= all, "{seconds}");

    let device = report["device"].take();
    assert!(device.as_str().unwrap().starts_with("flex:0 ("), "{device}");
    report["images"].take();
    let sigmas = report["schedule"]["sigmas"].take();
    assert_eq!(sigmas.as_array().map(Vec::len), Some(2), "{sigmas}");
    assert_eq!(
        report,
        json!({
            "kiln": kiln::version::VERSION,
            "model": "demo",
            "backend": "flex",
            "device": null,
            "dtype": "f32",
            "prompt": "a cat",
            "negative_prompt": null,
            "true_cfg_scale": 4.0,
            "guidance": false,
            "num_inference_steps": 2,
            "schedule": {
                "origin": "model", "name": null, "shift": null, "terminal": null, "sigmas": null,
            },
            "cache": "off",
            "cfg_gate_step": 1.0,
            "computed_steps": 2,
            "skipped_steps": 0,
            "gated_steps": 0,
            "rng": "cpu",
            "vae_use_tiling": false,
            "images": null,
            "dump": "run.safetensors",
            "seconds": null,
        })
    );
}

#[test]
fn an_error_is_json_too() {
    for (args, exit_code, message, tip) in [
        (
            ["generate", "a cat", "--json", "--steps", "0"].as_slice(),
            2,
            "num_inference_steps must be from 1 to 1000, got 0",
            Value::Null,
        ),
        (
            &["generate", "a cat", "--json", "--output", "no/a.png"],
            1,
            "there is no folder no to write to",
            json!("make it first: mkdir -p no"),
        ),
        (
            &["generate", "--json"],
            2,
            "the following required arguments were not provided: <PROMPT|--prompt <PROMPT>>",
            Value::Null,
        ),
        (
            &["bench", "--json", "--steps", "0"],
            2,
            "num_inference_steps must be from 1 to 1000, got 0",
            Value::Null,
        ),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let output = kiln(folder.path(), args);
        assert_eq!(output.status.code(), Some(exit_code), "{args:?}");
        let error = json!({ "message": message, "tip": tip, "exit_code": exit_code });
        assert_eq!(stdout(&output), json!({ "error": error }), "{args:?}");
        let line = format!("error: {}", message.split(':').next().unwrap());
        assert!(stderr(&output).contains(&line), "{args:?}");
    }
}
