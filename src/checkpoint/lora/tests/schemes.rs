//! The same tensors under every naming scheme give the same canonical form, to the bit.

use super::*;

/// Factors of every layer of the model, of rank 3 to 5.
fn factors(dtype: Dtype) -> Vec<(String, Tensor, Tensor)> {
    let factors = |(at, target): (usize, AdapterTarget)| {
        let rank = 3 + at % 3;
        let down = Tensor::random(&[rank, target.d_in], 2 * at, dtype);
        let up = Tensor::random(&[target.d_out, rank], 2 * at + 1, dtype);
        (target.path, down, up)
    };
    targets().into_iter().enumerate().map(factors).collect()
}

/// The canonical form. `alpha` is 0 for files that have none.
fn expected(factors: &[(String, Tensor, Tensor)], alpha: f32) -> Changes {
    let change = |(path, down, up): &(String, Tensor, Tensor)| {
        let rank = down.shape[0] as f32;
        let change = Change {
            factors: Factors::LowRank {
                down: down.host(),
                up: up.host(),
            },
            scale: if alpha == 0.0 { 1.0 } else { alpha / rank },
        };
        (path.clone(), change)
    };
    factors.iter().map(change).collect()
}

/// A file in one scheme: `key` gives the beginning of the keys of a layer.
fn file(
    factors: &[(String, Tensor, Tensor)],
    key: impl Fn(&str) -> String,
    [down, up]: [&str; 2],
    alpha: f32,
) -> TestFile {
    let mut file = TestFile::default();
    for (path, a, b) in factors {
        let key = key(path);
        file = file
            .with(format!("{key}{down}"), a.clone())
            .with(format!("{key}{up}"), b.clone());
        if alpha != 0.0 {
            let alpha_key = format!("{}.alpha", key.trim_end_matches("_lora"));
            file = file.with(alpha_key, Tensor::scalar(alpha));
        }
    }
    file
}

fn underscored(path: &str) -> String {
    path.replace('.', "_")
}

const PEFT: [&str; 2] = [".lora_A.weight", ".lora_B.weight"];
const SLOT: [&str; 2] = [".lora_A.default.weight", ".lora_B.default.weight"];
const KOHYA: [&str; 2] = [".lora_down.weight", ".lora_up.weight"];
const DIFFUSERS: [&str; 2] = [".lora.down.weight", ".lora.up.weight"];

/// Every pair of endings.
const ENDINGS: [[&str; 2]; 13] = [
    PEFT,
    SLOT,
    [".lora_A.my-slot_1.weight", ".lora_B.my-slot_1.weight"],
    [".lora_A", ".lora_B"],
    [".lora_A.default", ".lora_B.default"],
    KOHYA,
    [".lora_down", ".lora_up"],
    DIFFUSERS,
    [".lora.down", ".lora.up"],
    ["_lora.down.weight", "_lora.up.weight"],
    [
        ".lora_linear_layer.down.weight",
        ".lora_linear_layer.up.weight",
    ],
    [".lora_down.weight", ".lora_B.weight"],
    [".lora_A.weight", ".lora.up.weight"],
];

/// Every prefix of paths with dots.
const DOTTED: [&str; 14] = [
    "",
    "transformer.",
    "diffusion_model.",
    "model.diffusion_model.",
    "base_model.model.",
    "peft_model.base_model.model.",
    "transformer.base_model.model.",
    "base_model.model.transformer.",
    "base_model.model.diffusion_model.",
    "unet.",
    "pipe.dit.",
    "model.",
    "module.",
    "_orig_mod.",
];

#[test]
fn the_schemes_of_trainers_give_the_same_form() {
    for dtype in [Dtype::F32, Dtype::F16, Dtype::BF16] {
        let factors = factors(dtype);
        let plain = expected(&factors, 0.0);
        let scaled = expected(&factors, 8.0);
        assert_eq!(plain.len(), 34);
        let prefixed = |prefix: &'static str| move |path: &str| format!("{prefix}{path}");
        let flat =
            |prefix: &'static str| move |path: &str| format!("{prefix}{}", underscored(path));
        let schemes: Vec<(&str, TestFile, &Changes)> = vec![
            (
                "a",
                file(&factors, prefixed("transformer."), PEFT, 0.0),
                &plain,
            ),
            ("c", file(&factors, prefixed(""), SLOT, 0.0), &plain),
            (
                "c, prefixed",
                file(&factors, prefixed("transformer."), SLOT, 0.0),
                &plain,
            ),
            (
                "d",
                file(&factors, prefixed("diffusion_model."), PEFT, 0.0),
                &plain,
            ),
            (
                "d, alpha",
                file(&factors, prefixed("diffusion_model."), PEFT, 8.0),
                &scaled,
            ),
            ("e", file(&factors, prefixed(""), KOHYA, 8.0), &scaled),
            ("f", file(&factors, flat("lora_unet_"), KOHYA, 8.0), &scaled),
            (
                "f, no alpha",
                file(&factors, flat("lora_unet_"), KOHYA, 0.0),
                &plain,
            ),
            (
                "g",
                file(&factors, prefixed("transformer."), DIFFUSERS, 0.0),
                &plain,
            ),
            (
                "g, bare",
                file(&factors, prefixed(""), DIFFUSERS, 0.0),
                &plain,
            ),
            ("h", file(&factors, prefixed(""), PEFT, 0.0), &plain),
            ("h, kohya", file(&factors, prefixed(""), KOHYA, 0.0), &plain),
            (
                "i",
                file(&factors, prefixed("transformer."), PEFT, 8.0),
                &scaled,
            ),
            (
                "i, kohya",
                file(&factors, prefixed("transformer."), KOHYA, 8.0),
                &scaled,
            ),
            ("j", file(&factors, flat("lycoris_"), KOHYA, 8.0), &scaled),
            (
                "k",
                file(&factors, flat("lora_transformer_"), KOHYA, 8.0),
                &scaled,
            ),
            (
                "l",
                file(&factors, prefixed("base_model.model."), PEFT, 0.0),
                &plain,
            ),
            (
                "l, slot",
                file(&factors, prefixed("base_model.model."), SLOT, 0.0),
                &plain,
            ),
        ];
        for (scheme, file, expected) in schemes {
            assert!(file.changes() == *expected, "scheme {scheme}, {dtype}");
        }
    }
}

/// The header of scheme a and the configuration of scheme b give the same scale as alphas.
#[test]
fn metadata_and_configuration_give_the_same_form() {
    let factors = factors(Dtype::BF16);
    let scaled = expected(&factors, 8.0);
    let ranks: BTreeMap<&str, usize> = factors
        .iter()
        .map(|(path, down, _)| (path.as_str(), down.shape[0]))
        .collect();

    let metadata = serde_json::json!({
        "transformer.r": 4, "transformer.lora_alpha": 8, "transformer.rank_pattern": ranks,
        "transformer.alpha_pattern": {}, "transformer.use_rslora": false,
        "transformer.target_modules": ["to_q"], "transformer.bias": "none",
    });
    let diffusers = file(&factors, |path| format!("transformer.{path}"), PEFT, 0.0)
        .with_metadata("lora_adapter_metadata", metadata.to_string());
    assert!(diffusers.changes() == scaled);

    let config = serde_json::json!({
        "peft_type": "LORA", "r": 4, "lora_alpha": 8, "rank_pattern": ranks, "alpha_pattern": {},
        "use_rslora": false, "use_dora": false, "bias": "none", "lora_bias": false,
        "modules_to_save": null, "target_modules": ["to_q"], "init_lora_weights": true,
    });
    let peft = file(
        &factors,
        |path| format!("base_model.model.{path}"),
        PEFT,
        0.0,
    );
    let folder = tempfile::tempdir().unwrap();
    let weights = folder.path().join(PEFT_WEIGHTS);
    std::fs::write(&weights, peft.bytes()).unwrap();
    std::fs::write(folder.path().join(PEFT_CONFIG), config.to_string()).unwrap();
    // The folder, and the file in it.
    for path in [folder.path(), weights.as_path()] {
        let file = LoraFile::open(path, &targets(), &LoraOptions::default()).unwrap();
        assert!(*file.read("test").unwrap().changes() == scaled);
    }
}

#[test]
fn every_prefix_and_ending_gives_the_same_form() {
    let mut factors = factors(Dtype::F32);
    factors.retain(|(path, ..)| !path.contains("blocks.0"));
    for alpha in [0.0, 8.0] {
        let expected = expected(&factors, alpha);
        for endings in ENDINGS {
            for prefix in DOTTED {
                let file = file(&factors, |path| format!("{prefix}{path}"), endings, alpha);
                assert!(file.changes() == expected, "{prefix} {endings:?}");
            }
            for prefix in names::UNDERSCORED {
                let key = |path: &str| format!("{prefix}{}", underscored(path));
                let file = file(&factors, key, endings, alpha);
                assert!(file.changes() == expected, "{prefix} {endings:?}");
            }
        }
    }
}

/// Diffusers' old attention processors have the factors of the output under a shorter name.
#[test]
fn processors_are_left_out_of_paths() {
    let mut file = TestFile::default();
    let mut expected = Changes::new();
    for (at, name) in ["to_q", "to_k", "to_v", "to_out"].iter().enumerate() {
        let (down, up) = (f32s(&[2, 32], 2 * at), f32s(&[32, 2], 2 * at + 1));
        let path = format!("transformer_blocks.1.attn.{name}");
        let path = path.replace("to_out", "to_out.0");
        let change = Change {
            factors: Factors::LowRank {
                down: down.host(),
                up: up.host(),
            },
            scale: 1.0,
        };
        expected.insert(path, change);
        let key = format!("transformer.transformer_blocks.1.attn.processor.{name}_lora");
        file = file
            .with(format!("{key}.down.weight"), down)
            .with(format!("{key}.up.weight"), up);
    }
    assert!(file.changes() == expected);
}

/// Three layers stored as one: with a shared factor, and as a block-diagonal stack.
#[test]
fn fused_layers_are_split() {
    for (fused, thirds) in [
        ("attn.to_qkv", ["to_q", "to_k", "to_v"]),
        (
            "attn.to_added_qkv",
            ["add_q_proj", "add_k_proj", "add_v_proj"],
        ),
        (
            "attn.add_qkv_proj",
            ["add_q_proj", "add_k_proj", "add_v_proj"],
        ),
    ] {
        for dtype in [Dtype::F32, Dtype::BF16] {
            split_of(fused, thirds, dtype);
        }
    }
}

fn split_of(fused: &str, thirds: [&str; 3], dtype: Dtype) {
    let key = format!("transformer.transformer_blocks.1.{fused}");
    let change = |down: &Tensor, up: &Tensor, scale| Change {
        factors: Factors::LowRank {
            down: down.host(),
            up: up.host(),
        },
        scale,
    };
    let paths = thirds.map(|third| format!("transformer_blocks.1.attn.{third}"));
    let downs = [0, 1, 2].map(|at| Tensor::random(&[2, 32], at, dtype));
    let ups = [3, 4, 5].map(|at| Tensor::random(&[32, 2], at, dtype));

    // One factor [2, 32] for all, and [96, 2].
    let up = stack(&[&ups[0], &ups[1], &ups[2]]);
    let shared = TestFile::default()
        .with(format!("{key}.lora_A.weight"), downs[0].clone())
        .with(format!("{key}.lora_B.weight"), up)
        .with(format!("{key}.alpha"), Tensor::scalar(1.0));
    let expected: Changes = (paths.iter().cloned())
        .zip(ups.iter().map(|up| change(&downs[0], up, 0.5)))
        .collect();
    assert_eq!(shared.changes(), expected);
    assert_eq!(shared.open().unwrap().modules(), 3);

    // [6, 32], and [96, 6] with zeros outside of three blocks.
    let down = stack(&[&downs[0], &downs[1], &downs[2]]);
    let size = ups[0].bytes.len() / 64;
    let mut blocks = Vec::new();
    for (at, up) in ups.iter().enumerate() {
        for row in up.bytes.chunks(2 * size) {
            let mut wide = vec![0; 6 * size];
            wide[at * 2 * size..(at + 1) * 2 * size].copy_from_slice(row);
            blocks.extend(wide);
        }
    }
    let up = Tensor {
        dtype,
        shape: vec![96, 6],
        bytes: blocks,
    };
    let stacked = |up: &Tensor| {
        TestFile::default()
            .with(format!("{key}.lora_A.weight"), down.clone())
            .with(format!("{key}.lora_B.weight"), up.clone())
    };
    let expected: Changes = (paths.iter().cloned())
        .zip(
            downs
                .iter()
                .zip(&ups)
                .map(|(down, up)| change(down, up, 1.0)),
        )
        .collect();
    assert_eq!(stacked(&up).changes(), expected);

    // One value outside of the blocks: every third needs the whole first factor.
    let mut full = up.clone();
    let at = (31 * 6 + 5) * size;
    full.bytes[at..at + size].copy_from_slice(&up.bytes[..size]);
    let size = full.bytes.len() / 3;
    let third = |at: usize| Tensor {
        dtype,
        shape: vec![32, 6],
        bytes: full.bytes[at * size..(at + 1) * size].to_vec(),
    };
    let expected: Changes = (paths.into_iter())
        .zip([0, 1, 2].map(|at| change(&down, &third(at), 1.0)))
        .collect();
    assert_eq!(stacked(&full).changes(), expected);
}

fn stack(tensors: &[&Tensor]) -> Tensor {
    Tensor {
        dtype: tensors[0].dtype,
        shape: vec![
            tensors.iter().map(|it| it.shape[0]).sum(),
            tensors[0].shape[1],
        ],
        bytes: tensors.iter().flat_map(|it| it.bytes.clone()).collect(),
    }
}

#[test]
fn a_fused_layer_in_underscored_names_is_split() {
    let key = "lora_unet_transformer_blocks_0_attn_to_qkv";
    let file = TestFile::default()
        .with(format!("{key}.lora_down.weight"), f32s(&[4, 32], 1))
        .with(format!("{key}.lora_up.weight"), f32s(&[96, 4], 2))
        .with(format!("{key}.alpha"), Tensor::scalar(4.0));
    let paths: Vec<String> = file.changes().into_keys().collect();
    let expected = ["to_k", "to_q", "to_v"].map(|it| format!("transformer_blocks.0.attn.{it}"));
    assert_eq!(paths, expected);
}

#[test]
fn trailing_sizes_of_one_are_left_out_of_shapes() {
    let file = TestFile::default()
        .with(format!("{QUERY}.lora_A.weight"), f32s(&[4, 32, 1, 1], 1))
        .with(format!("{QUERY}.lora_B.weight"), f32s(&[32, 4, 1, 1], 2));
    assert_eq!(file.changes(), one_layer().changes());
}

#[test]
fn a_whole_change_is_dense() {
    let diff = Tensor::random(&[32, 32], 1, Dtype::F16);
    let file = TestFile::default()
        .with(format!("diffusion_model.{QUERY}.diff"), diff.clone())
        .with(
            format!("diffusion_model.{QUERY}.alpha"),
            Tensor::scalar(7.0),
        );
    let expected = Change {
        factors: Factors::Dense(diff.host()),
        scale: 1.0,
    };
    assert_eq!(*only(&file.changes()), expected);
}

#[test]
fn leftovers_of_training_are_ignored() {
    let file = one_layer().with("norm.num_batches_tracked", Tensor::scalar(1.0));
    assert_eq!(file.changes(), one_layer().changes());
}

#[test]
fn a_shape_of_the_layer_may_be_repeated() {
    let shape = Tensor::new(&[2], &[32.0, 32.0], Dtype::I64);
    let file = one_layer().with(format!("{QUERY}.reshape_weight"), shape);
    assert_eq!(file.changes(), one_layer().changes());
}
