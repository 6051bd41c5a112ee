//! Adapters of `kiln generate`, `kiln compare` and `kiln serve`.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tempfile::TempDir;

use super::{kiln, stderr};

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

/// A folder with adapter files.
fn folder() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (name, file) in [
        ("ink.safetensors", "twelve.safetensors"),
        ("a:b.safetensors", "second.safetensors"),
    ] {
        let from = fixtures().join("lora/adapters").join(file);
        fs::copy(from, folder.path().join(name)).unwrap();
    }
    let recipe = r#"{"name": "quick", "steps": 3, "shift": 3, "true_cfg_scale": 1}"#;
    fs::write(folder.path().join("ink.json"), recipe).unwrap();
    folder
}

/// `kiln generate --json` with the small model.
fn generate(folder: &Path, args: &[&str]) -> (i32, Value) {
    let model = fixtures().join("checkpoints/base");
    let command = [
        "generate",
        "a red fox",
        "--json",
        "--size",
        "32x32",
        "--seed",
        "7",
        "--model",
        model.to_str().unwrap(),
    ];
    let output = kiln(folder, &[&command, args].concat());
    let report = serde_json::from_slice(&output.stdout);
    (
        output.status.code().unwrap(),
        report.unwrap_or_else(|_| panic!("{}", stderr(&output))),
    )
}

fn pixels(folder: &Path) -> Vec<u8> {
    let file = fs::read(folder.join("out.png")).unwrap();
    crate::http::decode_png(&file).2
}

#[test]
fn adapters_are_files_with_scales_and_recipes() {
    let folder = folder();
    let folder = folder.path();
    let (code, report) = generate(folder, &["--steps", "3", "--shift", "3"]);
    assert_eq!((code, report.get("adapters")), (0, None), "{report}");
    let base = pixels(folder);

    let (code, report) = generate(folder, &["--lora", "ink.safetensors:0.7"]);
    assert_eq!(code, 0, "{report}");
    assert_eq!(report["adapters"], json!([{"name": "ink", "scale": 0.7}]));
    assert_eq!(report.get("merged_adapter"), None);
    assert_eq!(report["num_inference_steps"], 3);
    assert_eq!(report["schedule"]["origin"], "sidecar");
    assert_eq!(report["schedule"]["name"], "quick");
    let ink = pixels(folder);
    assert!(ink != base);

    let merged = ["--lora-merge", "./ink.safetensors:0.7"];
    let (code, report) = generate(folder, &merged);
    assert_eq!(code, 0, "{report}");
    assert_eq!(report.get("adapters"), None);
    assert_eq!(
        report["merged_adapter"],
        json!({"name": "ink", "scale": 0.7})
    );
    assert_eq!(report["schedule"]["origin"], "sidecar");
    let largest = ink.iter().zip(pixels(folder)).map(|(a, b)| a.abs_diff(b));
    assert!(largest.max() <= Some(1));

    // A colon in the name, an absolute path, and a folder as PEFT saves it.
    let absolute = folder.join("ink.safetensors");
    let peft = fixtures().join("lora/adapters/peft_rslora");
    let args = [
        "--lora",
        "a:b.safetensors",
        "--lora",
        absolute.to_str().unwrap(),
        "--lora",
    ];
    let (code, report) = generate(folder, &[&args[..], &[peft.to_str().unwrap()]].concat());
    assert_eq!(code, 0, "{report}");
    let names = json!([
        {"name": "a:b", "scale": 1.0}, {"name": "ink", "scale": 1.0},
        {"name": "peft_rslora", "scale": 1.0},
    ]);
    assert_eq!(report["adapters"], names);
    let text = fs::read(folder.join("out.png")).unwrap();
    let text = crate::http::metadata(&text).unwrap();
    assert!(
        text.contains("Lora: \"a:b:1, ink:1, peft_rslora:1\""),
        "{text}"
    );
    assert!(!text.contains(folder.to_str().unwrap()), "{text}");
}

#[test]
fn two_files_of_one_name_are_two_adapters() {
    let folder = folder();
    let folder = folder.path();
    fs::create_dir(folder.join("other")).unwrap();
    let other = "other/ink.safetensors";
    fs::copy(
        fixtures().join("lora/adapters/second.safetensors"),
        folder.join(other),
    )
    .unwrap();
    let args = [
        "--steps",
        "1",
        "--lora",
        "ink.safetensors",
        "--lora",
        "other/ink.safetensors:2",
    ];
    let (code, report) = generate(folder, &args);
    assert_eq!(code, 0, "{report}");
    let names = json!([{"name": "ink", "scale": 1.0}, {"name": "ink-2", "scale": 2.0}]);
    assert_eq!(report["adapters"], names);
    let args = [
        "--steps",
        "1",
        "--lora",
        "ink.safetensors",
        "--lora",
        "./ink.safetensors:2",
    ];
    let (code, report) = generate(folder, &args);
    let message = report["error"]["message"].as_str().unwrap();
    assert_eq!(
        (code, message),
        (2, "adapter \"ink\" is in the request twice: give it once")
    );
}

#[test]
fn the_demo_has_adapters_of_its_own() {
    let folder = tempfile::tempdir().unwrap();
    let args = [
        "generate",
        "a cat",
        "--json",
        "--steps",
        "1",
        "--lora",
        "stripes:0.5",
    ];
    let output = kiln(folder.path(), &args);
    assert!(output.status.success(), "{}", stderr(&output));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(
        report["adapters"],
        json!([{"name": "stripes", "scale": 0.5}])
    );
    let args = ["generate", "a cat", "--steps", "1", "--lora", "dots"];
    let output = kiln(folder.path(), &args);
    assert_eq!(output.status.code(), Some(2));
    assert!(
        stderr(&output).contains("there is no adapter dots: there "),
        "{}",
        stderr(&output)
    );
}

#[test]
fn adapters_that_cannot_be_used_are_refused() {
    let folder = folder();
    let folder = folder.path();
    let whole = fs::read(folder.join("ink.safetensors")).unwrap();
    fs::write(folder.join("empty.safetensors"), b"").unwrap();
    fs::write(folder.join("torn.safetensors"), &whole[..whole.len() / 2]).unwrap();
    fs::write(folder.join("ink.pt"), b"PK").unwrap();
    let bad_recipe = folder.join("bad.safetensors");
    fs::write(&bad_recipe, &whole).unwrap();
    fs::write(folder.join("bad.json"), r#"{"step": 4}"#).unwrap();
    let nine = ["--lora", "ink.safetensors"].repeat(9);
    for (args, expected) in [
        (
            &["--lora", "none.safetensors"][..],
            "there is no adapter none.safetensors",
        ),
        (&["--lora-merge", "none:0.5"], "there is no adapter none"),
        (
            &["--lora", "empty.safetensors"],
            "the adapter empty.safetensors cannot be used: the file is empty",
        ),
        (
            &["--lora", "torn.safetensors:1"],
            "the adapter torn.safetensors cannot be used: the file has ",
        ),
        (
            &["--lora-merge", "ink.pt"],
            "the adapter ink.pt cannot be used: the file is a pickle",
        ),
        (
            &["--lora", "bad.safetensors"],
            "the adapter bad.safetensors cannot be used: bad.json: unknown field",
        ),
        (
            &["--lora", "."],
            "the adapter . cannot be used: the folder has no adapter_config.json",
        ),
        (
            &["--lora", "ink.safetensors:nan"],
            "the scale of adapter \"ink\" must be from -8 to 8, got NaN",
        ),
        (
            &["--lora", "ink.safetensors:9"],
            "the scale of adapter \"ink\" must be from -8 to 8, got 9",
        ),
        (&nine, "a request may have 8 adapters at most, got 9"),
        (
            &[
                "--lora",
                "ink.safetensors",
                "--lora-merge",
                "ink.safetensors",
            ],
            "adapter \"ink\" is merged into the model by --lora-merge",
        ),
    ] {
        let (code, report) = generate(folder, args);
        let message = report["error"]["message"].as_str().unwrap();
        assert_eq!(code, 2, "{args:?}: {message}");
        assert!(message.starts_with(expected), "{args:?}: {message}");
    }
    for scale in ["0", "nan", "9"] {
        let merge = format!("ink.safetensors:{scale}");
        let output = kiln(folder, &["generate", "a", "--lora-merge", &merge]);
        assert_eq!(output.status.code(), Some(2));
        assert!(
            stderr(&output).contains("from -8 to 8 and not 0"),
            "{}",
            stderr(&output)
        );
    }
}

#[test]
fn a_server_does_not_start_without_the_adapter_to_merge() {
    let folder = folder();
    let model = fixtures().join("checkpoints/base");
    let dir = folder.path().to_str().unwrap();
    fs::write(folder.path().join("torn.safetensors"), b"torn").unwrap();
    for (name, expected) in [
        ("none", "there is no adapter none: there is ink"),
        ("../ink", "there is no adapter ../ink: there is ink"),
        ("torn", "the adapter \"torn\" cannot be used: "),
    ] {
        let args = [
            "serve",
            model.to_str().unwrap(),
            "--port",
            "0",
            "--lora-dir",
            dir,
            "--lora-merge",
            name,
        ];
        let output = kiln(folder.path(), &args);
        let stderr = stderr(&output);
        assert_eq!(output.status.code(), Some(2), "{stderr}");
        assert!(stderr.contains(&format!("error: {expected}")), "{stderr}");
    }
}

#[test]
fn backends_are_compared_with_an_adapter() {
    if !cfg!(feature = "ndarray") {
        return;
    }
    let folder = folder();
    let model = fixtures().join("checkpoints/base");
    let args = [
        "compare",
        "--backends",
        "ndarray",
        "--model",
        model.to_str().unwrap(),
        "--size",
        "32x32",
        "--lora",
        "ink.safetensors",
    ];
    let output = kiln(folder.path(), &args);
    assert!(output.status.success(), "{}", stderr(&output));
}
