//! Files that are refused, each with the message that says why.

use super::*;

/// The message without its beginning.
#[track_caller]
fn assert_refused(file: &TestFile, expected: &str) {
    let refusal = file.refusal();
    let beginning = "the adapter x.safetensors cannot be loaded: ";
    assert_eq!(refusal.strip_prefix(beginning), Some(expected), "{refusal}");
}

fn with(key: &str) -> TestFile {
    one_layer().with(key, f32s(&[2, 2], 9))
}

#[test]
fn unknown_keys() {
    for key in [
        "transformer_blocks.2.attn.to_q.lora_A.weight",
        "transformer_blocks.0.attn.to_x.lora_A.weight",
        "transformer_blocks_0_attn_to_q.lora_C.weight",
        "transformer_blocks.0.attn.to_q.lora_A.default.extra.weight",
        "transformer_blocks.0.attn.to_q",
        "text.transformer_blocks.0.attn.to_q.lora_A.weight",
        "lora_A.weight",
        "alpha",
        "zzz",
    ] {
        assert_refused(
            &with(key),
            &format!(
                "it has the key {key}, which names no linear layer of this model: use an adapter \
                 for Qwen-Image"
            ),
        );
    }
}

#[test]
fn keys_of_other_models_say_which() {
    let sd = "SDXL or Stable Diffusion 1.5";
    for (key, family) in [
        (
            "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight",
            "HunyuanVideo",
        ),
        (
            "lora_unet_double_blocks_0_img_attn_proj.lora_down.weight",
            "Flux",
        ),
        (
            "diffusion_model.single_blocks.0.linear1.lora_A.weight",
            "Flux",
        ),
        (
            "transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight",
            "Flux",
        ),
        ("lora_unet_input_blocks_4_1_proj_in.lora_down.weight", sd),
        ("unet.down_blocks.1.attentions.0.proj_in.lora_A.weight", sd),
        ("lora_unet_mid_block_attentions_0_proj_in.alpha", sd),
        (
            "unet.up_blocks.0.attentions.0.processor.to_q_lora.down.weight",
            sd,
        ),
        ("diffusion_model.blocks.0.self_attn.q.lora_A.weight", "Wan"),
        ("lora_unet_blocks_12_cross_attn_k.lora_down.weight", "Wan"),
        ("transformer.blocks.0.attn1.to_q.lora_A.weight", "Wan"),
        ("diffusion_model.blocks.0.ffn.0.diff_b", "Wan"),
        (
            "diffusion_model.layers.0.attention.to_q.lora_A.weight",
            "Z-Image or Lumina",
        ),
        (
            "joint_blocks.0.x_block.attn.qkv.lora_A.weight",
            "Stable Diffusion 3",
        ),
        (
            "transformer.transformer_blocks.0.ff_context.net.2.lora_A.weight",
            "Flux or Stable Diffusion 3",
        ),
        (
            "transformer.transformer_blocks.0.attn1.to_q.lora_A.weight",
            "LTX-Video or CogVideoX",
        ),
        (
            "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
            "a language model",
        ),
    ] {
        assert_refused(
            &with(key),
            &format!(
                "it has the key {key}, which names no linear layer of this model. It seems to be \
                 made for {family}: use an adapter for Qwen-Image"
            ),
        );
    }
}

/// The text encoder of SDXL does not hide whose adapter it is.
#[test]
fn another_model_is_named_before_other_faults() {
    let file = TestFile::default()
        .with(
            "lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha",
            Tensor::scalar(1.0),
        )
        .with(
            "lora_unet_input_blocks_4_1_proj_in.lora_mid.weight",
            f32s(&[2, 2], 1),
        );
    assert!(file.refusal().contains("SDXL"), "{}", file.refusal());
}

#[test]
fn text_encoders_unless_they_are_ignored() {
    for key in [
        "lora_te_model_layers_0_self_attn_q_proj.lora_down.weight",
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha",
        "text_encoder.model.layers.0.self_attn.q_proj.lora_A.weight",
        "base_model.model.text_encoder.model.layers.0.self_attn.q_proj.lora_A.weight",
    ] {
        let file = with(key);
        assert_refused(
            &file,
            &format!(
                "it has {key}: changes of the text encoder cannot be loaded. Set \
                 `ignore_text_encoder` to leave them out"
            ),
        );
        let options = LoraOptions {
            ignore_text_encoder: true,
        };
        let open = LoraFile::from_bytes("x", file.bytes(), &targets(), &options).unwrap();
        assert_eq!(*open.read("x").unwrap().changes(), one_layer().changes());
    }
}

#[test]
fn changes_that_have_no_canonical_form() {
    let dora = "DoRA cannot be loaded. Merge it into the model with PEFT, or use an adapter that was \
                trained as a plain LoRA";
    let bias = "changes of biases cannot be loaded. Use an adapter that was trained without biases";
    let norm = "changes of norms cannot be loaded. Use an adapter that changes linear layers only";
    let convolution = "factors of convolutions cannot be loaded. The transformer has no \
                       convolutions: use an adapter for Qwen-Image";
    let whole = "whole weights cannot be loaded as an adapter. Use an adapter that holds only \
                 changes of weights";
    let method = |name: &str| {
        format!("{name} cannot be loaded. Use an adapter of the type LoRA, LoKr or LoHa")
    };
    for (ending, expected) in [
        ("dora_scale", dora.to_owned()),
        ("lora_magnitude_vector", dora.to_owned()),
        ("lora_magnitude_vector.default.weight", dora.to_owned()),
        ("diff_b", bias.to_owned()),
        ("lora_B.bias", bias.to_owned()),
        ("lora_B.default.bias", bias.to_owned()),
        ("w_norm", norm.to_owned()),
        ("b_norm", norm.to_owned()),
        ("set_weight", whole.to_owned()),
        ("weight", whole.to_owned()),
        ("bias", whole.to_owned()),
        ("lora_mid.weight", convolution.to_owned()),
        ("lokr_t2", convolution.to_owned()),
        ("hada_t1", convolution.to_owned()),
        ("oft_blocks", method("OFT")),
        ("oft_R.default.weight", method("OFT")),
        ("boft_R", method("BOFT")),
        ("on_input", method("IA3")),
        ("ia3_l", method("IA3")),
        ("a1.weight", method("GLoRA")),
        ("vera_lambda_b", method("VeRA")),
    ] {
        let key = format!("{QUERY}.{ending}");
        assert_refused(&with(&key), &format!("it has {key}: {expected}"));
    }
    for key in [
        "transformer_blocks.0.attn.norm_q.diff",
        "lora_unet_transformer_blocks_0_attn_norm_added_k.diff",
        "diffusion_model.txt_norm.diff",
    ] {
        assert_refused(&with(key), &format!("it has {key}: {norm}"));
    }
    let key = format!("{QUERY}.reshape_weight");
    let file = one_layer().with(&key, Tensor::new(&[2], &[32.0, 64.0], Dtype::I64));
    assert_refused(
        &file,
        &format!(
            "it has {key}: changes of a layer's shape cannot be loaded. Use an adapter that keeps \
             the shapes of the model"
        ),
    );
}

#[test]
fn halves() {
    let key = "transformer_blocks.1.attn.to_q";
    let incomplete = |key: &str, missing: &str| {
        format!("it has the key {key} without {missing} for the same layer: the file is incomplete")
    };
    for (has, misses) in [
        ("lora_A.weight", "lora_B (lora_up)"),
        ("lora_B.weight", "lora_A (lora_down)"),
        ("lora_up.weight", "lora_A (lora_down)"),
        ("lokr_w1", "lokr_w2"),
        ("lokr_w2_b", "lokr_w1"),
        ("hada_w1_a", "hada_w1_b"),
        ("alpha", "factors"),
    ] {
        let key = format!("{key}.{has}");
        let tensor = if has == "alpha" {
            Tensor::scalar(1.0)
        } else {
            f32s(&[32, 32], 9)
        };
        let file = one_layer().with(&key, tensor);
        assert_refused(&file, &incomplete(&key, misses));
    }
}

#[test]
fn shapes_and_ranks() {
    let file = |down: &[usize], up: &[usize]| {
        TestFile::default()
            .with(format!("{QUERY}.lora_A.weight"), f32s(down, 1))
            .with(format!("{QUERY}.lora_B.weight"), f32s(up, 2))
    };
    for (down, up, expected) in [
        (
            &[4, 33][..],
            &[32, 4][..],
            "lora_A.weight of shape [4, 33] where [rank, 32] is needed",
        ),
        (
            &[32, 4],
            &[4, 32],
            "lora_A.weight of shape [32, 4] where [rank, 32] is needed",
        ),
        (
            &[4, 32],
            &[33, 4],
            "lora_B.weight of shape [33, 4] where [32, 4] is needed",
        ),
        (
            &[4, 32],
            &[32, 5],
            "lora_B.weight of shape [32, 5] where [32, 4] is needed",
        ),
        (
            &[4, 32],
            &[128],
            "lora_B.weight of shape [128] where a matrix is needed",
        ),
        (
            &[4, 32, 3],
            &[32, 4],
            "lora_A.weight of shape [4, 32, 3] where a matrix is needed",
        ),
    ] {
        let expected = format!("it has the key {QUERY}.{expected}: use an adapter for this model");
        assert_refused(&file(down, up), &expected);
    }
    for rank in [0, 513] {
        let expected = format!(
            "it has the key {QUERY}.lora_A.weight of rank {rank}: ranks from 1 to 512 can be loaded"
        );
        assert_refused(&file(&[rank, 32], &[32, rank]), &expected);
    }
    assert_eq!(
        file(&[512, 32], &[32, 512]).open().unwrap().rank(),
        Some(512)
    );

    let alpha = one_layer().with(format!("{QUERY}.alpha"), f32s(&[2], 3));
    assert_refused(
        &alpha,
        &format!(
            "it has the key {QUERY}.alpha of shape [2] where one number is needed: use an adapter \
             for this model"
        ),
    );
    let lokr = TestFile::default()
        .with(format!("{QUERY}.lokr_w1"), f32s(&[4, 4], 1))
        .with(format!("{QUERY}.lokr_w2"), f32s(&[8, 9], 2));
    assert_refused(
        &lokr,
        &format!(
            "it has the key {QUERY}.lokr_w2 of shape [8, 9] where a factor of [32, 32] beside \
             {QUERY}.lokr_w1 of shape [4, 4] is needed: use an adapter for this model"
        ),
    );
    let diff = TestFile::default().with(format!("{QUERY}.diff"), f32s(&[32, 31], 1));
    assert!(
        diff.refusal()
            .contains("of shape [32, 31] where a change of [32, 32] is needed")
    );
}

#[test]
fn types_and_values() {
    for dtype in [Dtype::F8_E4M3, Dtype::I32, Dtype::F64] {
        let file = TestFile::default()
            .with(
                format!("{QUERY}.lora_A.weight"),
                Tensor::random(&[4, 32], 1, dtype),
            )
            .with(format!("{QUERY}.lora_B.weight"), f32s(&[32, 4], 2));
        assert_refused(
            &file,
            &format!(
                "it has the key {QUERY}.lora_A.weight of type {dtype}, which cannot be loaded: use \
                 F32, F16 or BF16"
            ),
        );
    }
    for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for dtype in [Dtype::F32, Dtype::F16, Dtype::BF16] {
            let mut values = vec![0.5; 128];
            values[127] = value;
            let file = TestFile::default()
                .with(format!("{QUERY}.lora_A.weight"), f32s(&[4, 32], 1))
                .with(
                    format!("{QUERY}.lora_B.weight"),
                    Tensor::new(&[32, 4], &values, dtype),
                );
            // The header alone does not show it.
            assert!(file.open().is_ok());
            assert_refused(
                &file,
                &format!(
                    "it has the key {QUERY}.lora_B.weight, which has a value that is not a finite \
                     number"
                ),
            );
        }
    }
    let file = one_layer().with(format!("{QUERY}.alpha"), Tensor::scalar(f32::NAN));
    assert!(
        file.open()
            .unwrap_err()
            .to_string()
            .contains("alpha, which has a value that is not")
    );
    let largest = TestFile::default()
        .with(format!("{QUERY}.lora_A.weight"), f32s(&[1, 32], 1))
        .with(
            format!("{QUERY}.lora_B.weight"),
            Tensor::new(&[32, 1], &[65504.0; 32], Dtype::F16),
        );
    assert_eq!(largest.changes().len(), 1);
}

#[test]
fn layers_that_are_there_twice() {
    let twice = |first: &str, second: &str| {
        format!(
            "it has the keys {first} and {second}, which change the same layer: remove one of them"
        )
    };
    let first = format!("{QUERY}.lora_A.weight");
    // The same part under another spelling.
    for second in [
        "transformer.transformer_blocks.0.attn.to_q.lora_A.weight",
        "transformer_blocks.0.attn.to_q.lora_down.weight",
        "transformer_blocks_0_attn_to_q.lora_A.weight",
    ] {
        let file = one_layer().with(second, f32s(&[4, 32], 3));
        let mut keys = [first.as_str(), second];
        keys.sort_unstable();
        assert_refused(&file, &twice(keys[0], keys[1]));
    }
    // Two adapters in one file.
    let file = TestFile::default()
        .with(format!("{QUERY}.lora_A.one.weight"), f32s(&[4, 32], 1))
        .with(format!("{QUERY}.lora_A.two.weight"), f32s(&[4, 32], 1));
    let keys = ["one", "two"].map(|it| format!("{QUERY}.lora_A.{it}.weight"));
    assert_refused(&file, &twice(&keys[0], &keys[1]));
    // A layer, and the fused one that it is a third of.
    let fused = "transformer_blocks.0.attn.to_qkv";
    let file = one_layer()
        .with(format!("{fused}.lora_A.weight"), f32s(&[4, 32], 3))
        .with(format!("{fused}.lora_B.weight"), f32s(&[96, 4], 4));
    let refusal = file.refusal();
    assert!(refusal.contains("which change the same layer"), "{refusal}");
    assert!(
        refusal.contains(fused) && refusal.contains(&first),
        "{refusal}"
    );
    // Two kinds of change.
    let file = one_layer().with(format!("{QUERY}.diff"), f32s(&[32, 32], 3));
    assert_refused(&file, &twice(&first, &format!("{QUERY}.diff")));
    let file = TestFile::default()
        .with(format!("{QUERY}.lokr_w1"), f32s(&[4, 4], 1))
        .with(format!("{QUERY}.lokr_w1_a"), f32s(&[4, 2], 1));
    let keys = ["lokr_w1", "lokr_w1_a"].map(|it| format!("{QUERY}.{it}"));
    assert_refused(&file, &twice(&keys[0], &keys[1]));
}

#[test]
fn files_that_change_nothing() {
    assert_refused(
        &TestFile::default(),
        "it changes no layer of the model: use an adapter for Qwen-Image",
    );
    let leftover = TestFile::default().with("x.num_batches_tracked", Tensor::scalar(1.0));
    assert_refused(
        &leftover,
        "it changes no layer of the model: use an adapter for Qwen-Image",
    );
    let options = LoraOptions {
        ignore_text_encoder: true,
    };
    let text = TestFile::default().with("lora_te_x.lora_down.weight", f32s(&[2, 2], 1));
    let error = LoraFile::from_bytes("x", text.bytes(), &targets(), &options).unwrap_err();
    assert!(matches!(error.fault, LoraFault::NoModule));
}

/// A key cannot write control characters or without end into a message.
#[test]
fn keys_in_messages_are_escaped_and_cut() {
    let file = with("evil\n\u{1b}[31mkey.lora_A.weight");
    assert!(
        file.refusal()
            .contains("the key evil\\n\\u{1b}[31mkey.lora_A.weight,")
    );
    let file = with(&format!("{}.lora_A.weight", "x".repeat(100_000)));
    assert!(file.refusal().len() < 400);
}
