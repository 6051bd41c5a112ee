//! Scales: from alphas of every type, from PEFT's configuration and from the header.

use serde_json::{Value, json};

use super::*;

fn scale(file: &TestFile) -> f32 {
    only(&file.changes()).scale
}

fn with_alpha(alpha: Tensor) -> TestFile {
    one_layer().with(format!("{QUERY}.alpha"), alpha)
}

fn with_metadata(metadata: &Value) -> TestFile {
    one_layer().with_metadata("lora_adapter_metadata", metadata.to_string())
}

/// A folder as PEFT saves it.
fn peft(file: &TestFile, config: &Value) -> Result<Changes, LoraError> {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join(PEFT_WEIGHTS), file.bytes()).unwrap();
    std::fs::write(folder.path().join(PEFT_CONFIG), config.to_string()).unwrap();
    let path = folder.path();
    let file = LoraFile::open(path, &targets(), &LoraOptions::default())?;
    Ok(file.read("test")?.changes().clone())
}

fn peft_scale(config: &Value) -> f32 {
    only(&peft(&one_layer(), config).unwrap()).scale
}

/// The message, with the random name of the folder replaced.
fn peft_refusal(file: &TestFile, config: &Value) -> String {
    let error = peft(file, config).unwrap_err();
    error.to_string().replace(&error.file, "DIR")
}

#[test]
fn alpha_of_any_type_is_divided_by_the_rank() {
    assert_eq!(scale(&one_layer()), 1.0);
    for (alpha, expected) in [
        (1.0, 0.25),
        (8.0, 2.0),
        (0.5, 0.125),
        (4.5, 1.125),
        (0.0, 1.0),
        (-2.0, -0.5),
    ] {
        for dtype in [Dtype::F64, Dtype::F32, Dtype::F16, Dtype::BF16] {
            for shape in [&[][..], &[1], &[1, 1]] {
                let file = with_alpha(Tensor::new(shape, &[alpha], dtype));
                assert_eq!(scale(&file), expected, "{alpha} {dtype} {shape:?}");
            }
        }
    }
    for dtype in [Dtype::I64, Dtype::I32, Dtype::U8] {
        assert_eq!(scale(&with_alpha(Tensor::new(&[], &[8.0], dtype))), 2.0);
    }
    let third = with_alpha(Tensor::scalar(16.0));
    assert_eq!(third.open().unwrap().uniform(), Some((4, 16.0)));
}

#[test]
fn a_stored_scale_takes_the_place_of_alpha() {
    let file = with_alpha(Tensor::scalar(8.0)).with(format!("{QUERY}.scale"), Tensor::scalar(0.3));
    assert_eq!(scale(&file), 0.3);
}

#[test]
fn ranks_of_layers_may_differ() {
    let key = "transformer_blocks.1.attn.to_q";
    let file = one_layer()
        .with(format!("{key}.lora_A.weight"), f32s(&[3, 32], 3))
        .with(format!("{key}.lora_B.weight"), f32s(&[32, 3], 4))
        .with(format!("{key}.alpha"), Tensor::scalar(1.0));
    let changes = file.changes();
    assert_eq!((changes[QUERY].scale, changes[key].scale), (1.0, 1.0 / 3.0));
    let file = file.open().unwrap();
    assert_eq!((file.rank(), file.uniform()), (Some(4), None));
    assert_eq!(file.paths().collect::<Vec<_>>(), [QUERY, key]);
}

#[test]
fn a_summary_of_the_file_needs_no_factors() {
    let file = with_alpha(Tensor::scalar(8.0)).with_metadata("format", "pt");
    let open = file.open().unwrap();
    assert_eq!(open.modules(), 1);
    assert_eq!(open.rank(), Some(4));
    assert_eq!(open.uniform(), Some((4, 8.0)));
    assert_eq!(open.bytes(), 2 * 4 * 32 * 4);
    assert_eq!(open.bytes(), file.read().bytes() as u64);
    assert_eq!(open.metadata()["format"], "pt");
    assert_eq!(open.header_hash().len(), 64);
    let other = with_alpha(Tensor::scalar(7.0)).with_metadata("format", "pt");
    assert_eq!(open.header_hash(), other.open().unwrap().header_hash());
    let renamed = file.with_metadata("format", "np");
    assert_ne!(open.header_hash(), renamed.open().unwrap().header_hash());
}

#[test]
fn metadata_of_diffusers_gives_the_scale() {
    for (metadata, expected) in [
        (
            json!({"transformer.r": 4, "transformer.lora_alpha": 2}),
            0.5,
        ),
        (
            json!({"transformer.r": 4, "transformer.lora_alpha": 2.5}),
            0.625,
        ),
        (json!({"transformer.r": 4}), 2.0),
        (
            json!({"transformer.lora_alpha": 2, "transformer.use_rslora": true}),
            1.0,
        ),
        (
            json!({"transformer.r": 8, "transformer.lora_alpha": 2,
                "transformer.rank_pattern": {"to_q": 4}}),
            0.5,
        ),
        (
            json!({"transformer.lora_alpha": 2, "transformer.alpha_pattern": {"attn.to_q": 16}}),
            4.0,
        ),
        // Nothing about the transformer.
        (
            json!({"text_encoder.r": 8, "text_encoder.lora_alpha": 2}),
            1.0,
        ),
        (json!({}), 1.0),
    ] {
        assert_eq!(scale(&with_metadata(&metadata)), expected, "{metadata}");
    }
}

#[test]
fn the_configuration_of_peft_gives_the_scale() {
    for (config, expected) in [
        (json!({"peft_type": "LORA", "r": 4, "lora_alpha": 2}), 0.5),
        (json!({"r": 4, "lora_alpha": 2, "use_rslora": true}), 1.0),
        // PEFT's default of alpha is 8.
        (json!({"r": 4}), 2.0),
        (json!({"lora_alpha": 0}), 1.0),
        (
            json!({"lora_alpha": 1, "use_rslora": null, "alpha_pattern": null}),
            0.25,
        ),
        (
            json!({"lora_alpha": 1, "init_lora_weights": "gaussian"}),
            0.25,
        ),
    ] {
        assert_eq!(peft_scale(&config), expected, "{config}");
    }
}

/// As `re.match(rf"(.*\.)?({key})$", name)`: the first key that matches the end of the name.
#[test]
fn patterns_match_the_ends_of_names() {
    for (patterns, expected) in [
        (r#"{"to_q": 16}"#, 4.0),
        (r#"{"attn.to_q": 16}"#, 4.0),
        (r#"{"transformer_blocks.0.attn.to_q": 16}"#, 4.0),
        (r#"{"^transformer_blocks\\.0\\.attn\\.to_q": 16}"#, 4.0),
        (r#"{"transformer_blocks\\.\\d+\\.attn\\.to_[qk]": 16}"#, 4.0),
        (r#"{".*\\.0\\..*": 16}"#, 4.0),
        (r#"{"to_q|to_k": 16}"#, 4.0),
        (r#"{"to_k|to_q": 16}"#, 4.0),
        // The order of the file counts.
        (r#"{"to_q": 16, "attn.to_q": 32}"#, 4.0),
        (r#"{"attn.to_q": 32, "to_q": 16}"#, 8.0),
        (r#"{"z": 1, "to_q": 16, "a": 1}"#, 4.0),
        (r#"{"to_q": 16, "attn\\.to_q": 32}"#, 4.0),
        (r#"{"attn\\.to_q": 32, "to_q": 16}"#, 8.0),
        // A dot matches anything.
        (r#"{"attn.to.q": 16}"#, 4.0),
        // Not at a dot, not at the end, not from the start.
        (r#"{"o_q": 16}"#, 0.25),
        (r#"{"attn": 16}"#, 0.25),
        (r#"{"to_": 16}"#, 0.25),
        (r#"{"^attn.to_q": 16}"#, 0.25),
        (r#"{"transformer_blocks.1.attn.to_q": 16}"#, 0.25),
    ] {
        let config = format!(r#"{{"r": 4, "lora_alpha": 1, "alpha_pattern": {patterns}}}"#);
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(PEFT_WEIGHTS), one_layer().bytes()).unwrap();
        std::fs::write(folder.path().join(PEFT_CONFIG), config).unwrap();
        let path = folder.path();
        let file = LoraFile::open(path, &targets(), &LoraOptions::default()).unwrap();
        let adapter = file.read("test").unwrap();
        assert_eq!(only(adapter.changes()).scale, expected, "{patterns}");
    }
}

#[test]
fn kohyas_alpha_in_the_header_is_never_read() {
    let file = one_layer()
        .with_metadata("ss_network_alpha", "1")
        .with_metadata("ss_network_dim", "4")
        .with_metadata("network_alpha", "1")
        .with_metadata("alpha", "1");
    assert_eq!(scale(&file), 1.0);
    let file = one_layer().with_metadata("lora_alpha", "2");
    assert_eq!(scale(&file), 0.5);
}

#[test]
fn sources_of_the_scale_must_agree() {
    let agreed = with_alpha(Tensor::scalar(2.0))
        .with_metadata("lora_alpha", "2.0")
        .with_metadata(
            "lora_adapter_metadata",
            r#"{"transformer.r": 4, "transformer.lora_alpha": 2}"#,
        );
    assert_eq!(scale(&agreed), 0.5);
    // Rounding of a stored alpha is no contradiction.
    let rounded =
        with_alpha(Tensor::new(&[], &[4.3], Dtype::BF16)).with_metadata("lora_alpha", "4.3");
    assert_eq!(scale(&rounded), bf16::from_f32(4.3).to_f32() / 4.0);

    let differs = with_alpha(Tensor::scalar(2.0)).with_metadata("lora_alpha", "4");
    assert_eq!(
        differs.refusal(),
        "the adapter x.safetensors cannot be loaded: the scale of transformer_blocks.0.attn.to_q is \
         0.5 by a tensor of the layer and 1 by lora_alpha in the file's header: remove one of the two"
    );
    let differs = with_metadata(&json!({"transformer.lora_alpha": 8}));
    assert_eq!(
        peft_refusal(&differs, &json!({"r": 4, "lora_alpha": 2})),
        "the adapter DIR cannot be loaded: the scale of transformer_blocks.0.attn.to_q is 0.5 by \
         adapter_config.json and 2 by lora_adapter_metadata in the file's header: remove one of the \
         two"
    );
}

#[test]
fn ranks_must_agree_with_the_tensors() {
    assert_eq!(
        peft_refusal(&one_layer(), &json!({"r": 16, "lora_alpha": 2})),
        "the adapter DIR cannot be loaded: adapter_config.json declares rank 16 for \
         transformer_blocks.0.attn.to_q, and its tensors have rank 4: correct the \
         declaration"
    );
}

#[test]
fn configurations_that_factors_do_not_express_are_refused() {
    for (config, expected) in [
        (
            json!({"peft_type": "VERA"}),
            "it has peft_type \"VERA\" in adapter_config.json: this type",
        ),
        (
            json!({"use_dora": true}),
            "it has use_dora in adapter_config.json: DoRA cannot be loaded",
        ),
        (
            json!({"init_lora_weights": "pissa_niter_4"}),
            "it has init_lora_weights \"pissa_niter_4\" in adapter_config.json: this initialisation",
        ),
        (
            json!({"init_lora_weights": "olora"}),
            "this initialisation changes the weights",
        ),
        (
            json!({"alpha_pattern": {"(": 1}}),
            "adapter_config.json is not valid (a pattern",
        ),
        (
            json!({"alpha_pattern": {"a(?=b)": 1}}),
            "adapter_config.json is not valid (a pattern",
        ),
        (
            json!({"lora_alpha": "many"}),
            "adapter_config.json is not valid (invalid type: string",
        ),
        (
            json!({"lora_alpha": 1e300}),
            "adapter_config.json is not valid (the number 1e300 is too large)",
        ),
        (json!([1]), "adapter_config.json is not valid"),
    ] {
        let refusal = peft_refusal(&one_layer(), &config);
        assert!(refusal.contains(expected), "{refusal}");
    }
    let file = one_layer().with_metadata("lora_alpha", "large");
    assert!(file.refusal().ends_with(
        "lora_alpha in the file's header is not valid (\"large\" is not a number): correct it"
    ));
    let file = one_layer().with_metadata("lora_adapter_metadata", "{");
    assert!(
        file.refusal()
            .contains("lora_adapter_metadata in the file's header is not valid (EOF")
    );
    let file = with_metadata(&json!({"transformer.use_dora": true}));
    assert!(
        file.refusal()
            .contains("it has use_dora in lora_adapter_metadata")
    );
}
