//! Tests of models' names and of the start.

use std::error::Error;
use std::fs;

use super::*;

#[test]
fn a_format_reads_as_it_is_written() {
    for format in LoadFormat::ALL {
        assert_eq!(format.to_string().parse::<LoadFormat>().unwrap(), format);
    }
    let error = "gguf".parse::<LoadFormat>().unwrap_err();
    assert_eq!(error.to_string(), "\"gguf\" is not one of auto, dummy");
}

#[test]
fn a_model_is_known_before_its_weights_are_loaded() {
    let model = Model::find(&ModelSettings::new(DEMO)).unwrap();
    assert_eq!(model.description(), "the built-in demo model");
    assert_eq!(model.limits().sizes.default_side, 128);
    assert!(model.prompt_guide().is_some());
    assert!(!model.tokenizer().encode_prompt("a cat").unwrap().is_empty());
}

#[cfg(feature = "flex")]
#[test]
fn the_bytes_of_the_tensors_that_a_model_has_taken_are_counted() {
    let start = Start::new();
    let model = Model::find_reporting(&ModelSettings::new(DEMO), &start).unwrap();
    assert_eq!(start.progress().stage, Stage::Finding);
    let runtime = model.load_reporting(&LoadSettings::default(), &start);
    let progress = start.progress();
    assert_eq!(progress.stage, Stage::Loading);
    // 5.9 million parameters, most of them in bf16.
    assert!(progress.amount.total_bytes > 11_000_000, "{progress:?}");
    // Nothing reads the VAE's encoder.
    assert!(progress.share() > Some(0.8), "{progress:?}");
    assert!(progress.share() < Some(1.0), "{progress:?}");
    assert!(runtime.is_ok());
}

#[test]
fn a_model_that_is_not_loaded_needs_no_weights() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/checkpoints/base");
    let folder = tempfile::tempdir().unwrap();
    for file in [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "tokenizer/merges.txt",
        "tokenizer/tokenizer_config.json",
        "tokenizer/vocab.json",
        "transformer/config.json",
        "vae/config.json",
    ] {
        let target = folder.path().join(file);
        fs::create_dir_all(target.parent().unwrap()).unwrap();
        fs::copy(root.join(file), target).unwrap();
    }
    let settings = ModelSettings::new(folder.path());
    assert!(Model::find(&settings).is_err());
    let small = Model::find_without_weights(&settings, &Start::new()).unwrap();
    let whole = Model::find(&ModelSettings::new(&root)).unwrap();
    assert_eq!(small.limits().sizes, whole.limits().sizes);
    let tokens = |model: &Model| model.tokenizer().encode_prompt("a red fox").unwrap();
    assert_eq!(tokens(&small), tokens(&whole));
    // The tokenizer of another model would count other tokens.
    fs::remove_dir_all(folder.path().join("tokenizer")).unwrap();
    assert!(Model::find_without_weights(&settings, &Start::new()).is_err());
}

#[test]
fn the_name_of_a_model_does_not_say_where_it_is() {
    let name = |model: &Path| ModelSettings::new(model).public_name();
    for id in [DEMO, QWEN_IMAGE, "owner/name@revision"] {
        assert_eq!(name(id.as_ref()), id);
    }
    for address in ["https://huggingface.co/owner/name", "hf://owner/name"] {
        assert_eq!(name(address.as_ref()), "owner/name");
    }
    assert_eq!(name("models--owner--name".as_ref()), "owner/name");
    assert_eq!(name("~/models/fox".as_ref()), "fox");
    assert_eq!(name("file:///home/user/fox".as_ref()), "fox");
    let folder = tempfile::tempdir().unwrap();
    let fox = folder.path().join("home/user/fox");
    let cached = folder.path().join("hub/models--Qwen--Qwen-Image");
    let snapshot = cached.join("snapshots/75e0b4be");
    fs::create_dir_all(&fox).unwrap();
    fs::create_dir_all(snapshot.join("vae")).unwrap();
    for (path, expected) in [
        (fox.clone(), "fox"),
        (fox.join(""), "fox"),
        (fox.join("."), "fox"),
        (fox.join("../fox"), "fox"),
        (fox.join(".."), "user"),
        (snapshot.clone(), "Qwen/Qwen-Image"),
        (snapshot.join(""), "Qwen/Qwen-Image"),
        (snapshot.join("vae/.."), "Qwen/Qwen-Image"),
        (snapshot.join("vae"), "vae"),
        (cached, "Qwen/Qwen-Image"),
        ("src".into(), "src"),
        ("./src/".into(), "src"),
    ] {
        assert_eq!(name(&path), expected, "{}", path.display());
    }
}

#[test]
fn random_weights_need_a_shape() {
    let settings = ModelSettings {
        load_format: LoadFormat::Dummy,
        ..ModelSettings::new("some/model")
    };
    let error = Model::find(&settings).unwrap_err();
    assert!(error.to_string().starts_with("\"some/model\" has no shape"));
    assert!(error.source().is_none());
}

#[cfg(feature = "flex")]
#[test]
fn a_backend_is_checked_before_the_model_is_looked_for() {
    let settings = RuntimeSettings {
        load: LoadSettings {
            backend: "flex:99".parse().unwrap(),
            ..LoadSettings::default()
        },
        ..RuntimeSettings::new("./none")
    };
    let error = Runtime::open(&settings).unwrap_err().to_string();
    assert!(
        error.starts_with("the flex backend has no device 99"),
        "{error}"
    );
}
