//! Invalid checkpoints: `kiln generate` prints one error line that names the problem and the file,
//! without panic or backtrace, and exits with 1.

use std::fs;
use std::path::Path;
use std::process::Command;

use safetensors::SafeTensors;
use safetensors::tensor::TensorView;
use serde_json::Value;

/// Copies a checkpoint of the fixtures, breaks it with `how`, runs `kiln generate` with it, and checks
/// that the error message contains every part of `expected`.
fn breaks(checkpoint: &str, how: impl Fn(&Path), expected: &[&str]) {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/checkpoints");
    copy(&source.join(checkpoint), &model);
    how(&model);
    let out = folder.path().join("out.png");
    let stderr = refused(
        1,
        Command::new(env!("CARGO_BIN_EXE_kiln"))
            .args(["generate", "a cat", "--height", "32", "--width", "32"])
            .args(["--num-inference-steps", "1", "--backend", "flex"])
            .arg("--model")
            .arg(&model)
            .arg("--output")
            .arg(&out),
    );
    let errors: Vec<&str> = stderr
        .lines()
        .filter(|line| line.starts_with("error: "))
        .collect();
    assert_eq!(errors.len(), 1, "{stderr}");
    for part in expected {
        assert!(
            errors[0].contains(part),
            "{part:?} is not in: {}",
            errors[0]
        );
    }
    assert!(!out.exists());
}

/// Runs a command, checks its exit code and that stderr has no panic, and returns stderr.
fn refused(code: i32, command: &mut Command) -> String {
    let output = command
        .env("RUST_BACKTRACE", "1")
        .env("HF_HUB_OFFLINE", "1")
        .output()
        .unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(code), "{stderr}");
    assert!(
        !stderr.contains("panic") && !stderr.contains("backtrace"),
        "{stderr}"
    );
    stderr
}

pub(crate) fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let (from, to) = (
            entry.as_ref().unwrap().path(),
            to.join(entry.unwrap().file_name()),
        );
        if from.is_dir() {
            copy(&from, &to);
        } else {
            fs::copy(from, to).unwrap();
        }
    }
}

fn edit_json(path: &Path, edit: impl Fn(&mut Value)) {
    let mut value: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    edit(&mut value);
    fs::write(path, value.to_string()).unwrap();
}

/// Rewrites a safetensors file with its list of tensors edited.
fn edit_tensors(path: &Path, edit: impl Fn(&mut Vec<(String, TensorView<'_>)>)) {
    let bytes = fs::read(path).unwrap();
    let mut tensors: Vec<_> = SafeTensors::deserialize(&bytes)
        .unwrap()
        .tensors()
        .into_iter()
        .map(|(name, view)| {
            let (start, len) = (
                view.data().as_ptr() as usize - bytes.as_ptr() as usize,
                view.data().len(),
            );
            let data = &bytes[start..start + len];
            (
                name,
                TensorView::new(view.dtype(), view.shape().to_vec(), data).unwrap(),
            )
        })
        .collect();
    edit(&mut tensors);
    fs::write(path, safetensors::serialize(tensors, None).unwrap()).unwrap();
}

/// Replaces the first value of an f32 tensor in a safetensors file.
pub(crate) fn set_first_value(path: &Path, tensor: &str, value: f32) {
    let mut bytes = fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let view = file.tensor(tensor).unwrap();
    assert_eq!(view.dtype(), safetensors::Dtype::F32);
    let at = view.data().as_ptr() as usize - bytes.as_ptr() as usize;
    bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
    fs::write(path, bytes).unwrap();
}

const TRANSFORMER: &str = "transformer/diffusion_pytorch_model.safetensors";

#[test]
fn missing_and_truncated_files_are_errors() {
    breaks(
        "base",
        |model| fs::remove_dir_all(model).unwrap(),
        &["no folder"],
    );
    breaks(
        "base",
        |model| fs::remove_file(model.join("model_index.json")).unwrap(),
        &["not a model folder", "model_index.json"],
    );
    breaks(
        "base",
        |model| fs::remove_file(model.join("vae/config.json")).unwrap(),
        &["vae/config.json is missing"],
    );
    breaks(
        "base",
        |model| fs::remove_file(model.join(TRANSFORMER)).unwrap(),
        &["no weights in", "diffusion_pytorch_model.safetensors"],
    );
    breaks(
        "base",
        |model| fs::remove_dir_all(model.join("tokenizer")).unwrap(),
        &["tokenizer"],
    );
    breaks(
        "base",
        |model| fs::remove_file(model.join("tokenizer/merges.txt")).unwrap(),
        &["merges.txt"],
    );
    breaks(
        "base",
        |model| {
            let path = model.join(TRANSFORMER);
            let bytes = fs::read(&path).unwrap();
            fs::write(&path, &bytes[..bytes.len() - 100]).unwrap();
        },
        &[TRANSFORMER, "bytes where its header needs"],
    );
    breaks(
        "base",
        |model| fs::write(model.join(TRANSFORMER), b"not weights").unwrap(),
        &[TRANSFORMER, "not a safetensors file"],
    );
    breaks(
        "odd",
        |model| {
            let shard = "transformer/diffusion_pytorch_model-00002-of-00006.safetensors";
            fs::remove_file(model.join(shard)).unwrap();
        },
        &["diffusion_pytorch_model-00002-of-00006.safetensors is missing"],
    );
}

#[test]
fn missing_misshapen_and_unknown_tensors_are_errors() {
    let first = "transformer_blocks.0.attn.to_q.weight";
    breaks(
        "base",
        |model| {
            edit_tensors(&model.join(TRANSFORMER), |all| {
                all.retain(|(name, _)| name != first);
            });
        },
        &["no tensor", first, "transformer"],
    );
    breaks(
        "base",
        |model| {
            edit_tensors(&model.join(TRANSFORMER), |all| {
                for (name, view) in all.iter_mut().filter(|(name, _)| name == first) {
                    let shape = vec![view.shape()[0] * view.shape()[1]];
                    assert_eq!(name, first);
                    *view = TensorView::new(view.dtype(), shape, view.data()).unwrap();
                }
            });
        },
        &[TRANSFORMER, first, "has shape [1024]", "asks for [32, 32]"],
    );
    breaks(
        "base",
        |model| {
            edit_tensors(&model.join(TRANSFORMER), |all| {
                let (_, view) = all[0].clone();
                all.push(("lora.up".to_owned(), view));
            });
        },
        &[
            "1 tensors that this model does not know",
            "lora.up",
            "transformer",
        ],
    );
    breaks(
        "base",
        |model| {
            edit_tensors(&model.join(TRANSFORMER), |all| {
                for (_, view) in all.iter_mut().filter(|(name, _)| name == first) {
                    let shape = view.shape().to_vec();
                    *view = TensorView::new(safetensors::Dtype::I32, shape, view.data()).unwrap();
                }
            });
        },
        &[TRANSFORMER, first, "I32", "BF16"],
    );
}

#[test]
fn values_that_are_not_numbers_are_errors_that_name_the_stage() {
    for value in [f32::NAN, f32::INFINITY] {
        for (file, tensor, stage) in [
            (TRANSFORMER, "proj_out.weight", "in denoising step 1 of 1:"),
            (
                "text_encoder/model.safetensors",
                "model.language_model.norm.weight",
                "in text encoding:",
            ),
            (
                "vae/diffusion_pytorch_model.safetensors",
                "decoder.conv_out.bias",
                "in VAE decoding:",
            ),
        ] {
            breaks(
                "base",
                |model| set_first_value(&model.join(file), tensor, value),
                &[
                    "values that are not numbers",
                    stage,
                    "weights may be damaged",
                ],
            );
        }
    }
}

#[test]
fn a_dump_has_the_values_that_are_not_numbers_and_there_is_no_image() {
    let folder = tempfile::tempdir().unwrap();
    let base = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/checkpoints/base");
    copy(&base, &folder.path().join("model"));
    let transformer = folder.path().join("model").join(TRANSFORMER);
    set_first_value(&transformer, "proj_out.weight", f32::NAN);
    let stderr = refused(
        1,
        Command::new(env!("CARGO_BIN_EXE_kiln"))
            .args(["generate", "a cat", "--size", "32x32", "--steps", "1"])
            .args([
                "--backend",
                "flex",
                "--model",
                "model",
                "--dump",
                "run.safetensors",
            ])
            .args(["--output", "out.png"])
            .current_dir(folder.path()),
    );
    assert!(stderr.contains("in denoising step 1 of 1"), "{stderr}");
    assert!(!folder.path().join("out.png").exists());
    let dump = fs::read(folder.path().join("run.safetensors")).unwrap();
    let dump = SafeTensors::deserialize(&dump).unwrap();
    let latents = dump.tensor("latents_step0").unwrap();
    let mut values = latents.data().as_chunks().0.iter();
    assert!(values.any(|value| f32::from_le_bytes(*value).is_nan()));
}

/// The text encoder as three classes of transformers name its tensors.
#[test]
fn every_naming_of_the_text_encoder_generates_the_same_image() {
    let base = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/checkpoints/base");
    let generate = |class: &str, renamed: &dyn Fn(&str) -> String| {
        let folder = tempfile::tempdir().unwrap();
        let model = folder.path().join("model");
        copy(&base, &model);
        let encoder = model.join("text_encoder");
        edit_tensors(&encoder.join("model.safetensors"), |all| {
            for (name, _) in all {
                *name = renamed(name);
            }
        });
        edit_json(&encoder.join("config.json"), |config| {
            config["architectures"] = serde_json::json!([class]);
        });
        let output = Command::new(env!("CARGO_BIN_EXE_kiln"))
            .args(["generate", "a cat", "--size", "32x32", "--steps", "1"])
            .args(["--seed", "1", "--no-metadata", "--output", "out.png"])
            .args(["--backend", "flex", "--model", "model"])
            .current_dir(folder.path())
            .output()
            .unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{class}: {stderr}");
        fs::read(folder.path().join("out.png")).unwrap()
    };
    let as_it_is = generate("Qwen2_5_VLForConditionalGeneration", &str::to_owned);
    for (class, prefix) in [
        ("Qwen2_5_VLForConditionalGeneration", "model."),
        ("Qwen2_5_VLModel", "language_model."),
        ("Qwen2_5_VLTextModel", ""),
    ] {
        let renamed = |name: &str| match name.strip_prefix("model.language_model.") {
            Some(rest) => format!("{prefix}{rest}"),
            None => name.replace("model.visual.", "visual."),
        };
        assert!(generate(class, &renamed) == as_it_is, "{class}");
    }
}

#[test]
fn unsupported_configurations_are_errors() {
    let set = |file: &'static str, key: &'static str, value: Value| {
        move |model: &Path| edit_json(&model.join(file), |config| config[key] = value.clone())
    };
    breaks(
        "base",
        set("model_index.json", "_class_name", "FluxPipeline".into()),
        &["model_index.json", "FluxPipeline", "QwenImagePipeline"],
    );
    for key in ["guidance_embeds", "zero_cond_t", "use_layer3d_rope"] {
        breaks(
            "base",
            set("transformer/config.json", key, true.into()),
            &["transformer/config.json", key],
        );
    }
    breaks(
        "base",
        set(
            "scheduler/scheduler_config.json",
            "_class_name",
            "DDIM".into(),
        ),
        &[
            "scheduler_config.json",
            "DDIM",
            "FlowMatchEulerDiscreteScheduler",
        ],
    );
    breaks(
        "base",
        set("transformer/config.json", "num_layers", 3.into()),
        &["no tensor", "transformer_blocks.2"],
    );
    breaks(
        "base",
        set("transformer/config.json", "joint_attention_dim", 48.into()),
        &[
            "transformer/config.json",
            "joint_attention_dim",
            "hidden_size",
        ],
    );
    breaks(
        "base",
        set("vae/config.json", "z_dim", 8.into()),
        &["vae/config.json", "z_dim"],
    );
    breaks(
        "base",
        set("vae/config.json", "base_dim", 0.into()),
        &["vae/config.json", "base_dim"],
    );
    for file in [
        "transformer/config.json",
        "vae/config.json",
        "scheduler/scheduler_config.json",
    ] {
        breaks(
            "base",
            set(file, "novel_key", 1.into()),
            &[file, "novel_key"],
        );
    }
    breaks(
        "base",
        |model| fs::write(model.join("transformer/config.json"), "{").unwrap(),
        &["transformer/config.json is not valid JSON"],
    );
}

/// A valid checkpoint with an invalid request.
#[test]
fn invalid_requests_are_usage_errors() {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/checkpoints/base");
    for (args, expected) in [
        (&["--height", "8"][..], "height"),
        (&["--width", "9999999"], "width"),
        (&["--num-inference-steps", "0"], "num_inference_steps"),
        (&["--true-cfg-scale", "-1"], "true_cfg_scale"),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let stderr = refused(
            2,
            Command::new(env!("CARGO_BIN_EXE_kiln"))
                .args(["generate", "a cat", "--model"])
                .arg(&model)
                .args(args)
                .current_dir(folder.path()),
        );
        assert!(stderr.contains(expected), "{stderr}");
    }
}

/// A dtype that the backend does not support.
#[cfg(feature = "ndarray")]
#[test]
fn an_unsupported_dtype_is_an_error() {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/checkpoints/bf16");
    let folder = tempfile::tempdir().unwrap();
    let stderr = refused(
        1,
        Command::new(env!("CARGO_BIN_EXE_kiln"))
            .args(["generate", "a cat", "--height", "32", "--width", "32"])
            .args(["--backend", "ndarray", "--dtype", "bf16", "--model"])
            .arg(&model)
            .current_dir(folder.path()),
    );
    let expected = "does not compute in bf16; choose --dtype f32";
    assert!(stderr.contains(expected), "{stderr}");
}
