//! Which files are recognised.

use super::*;

/// That of Qwen-Image-Lightning.
const LIGHTNING: Fingerprint = Fingerprint {
    modules: 720,
    blocks: 60,
    uniform: Some(LIGHTNING_RANK_AND_ALPHA),
    changes_modulation: false,
};

fn known(file: &str) -> Option<(String, Option<usize>)> {
    known_recipe(file, &LIGHTNING).map(|recipe| (recipe.name, recipe.steps))
}

#[test]
fn published_files_are_known_by_name() {
    for (file, steps) in [
        ("Qwen-Image-Lightning-8steps-V1.0.safetensors", 8),
        ("Qwen-Image-Lightning-8steps-V1.1-bf16.safetensors", 8),
        ("Qwen-Image-Lightning-4steps-V1.0.safetensors", 4),
        ("Qwen-Image-Lightning-4steps-V2.0", 4),
        ("Qwen-Image-Lightning-8steps-V2.0-bf16", 8),
        ("Qwen-Image-fp8-e4m3fn-Lightning-4steps-V1.0-fp32", 4),
        ("Qwen-Image-Edit-Lightning-8steps-V1.0-bf16", 8),
        (
            "Qwen-Image-Edit-2509/Qwen-Image-Edit-2509-Lightning-4steps-V1.0-fp32",
            4,
        ),
        ("Qwen-Image-Edit-2511-Lightning-4steps-V1.0-bf16", 4),
        ("Qwen-Image-2512-Lightning-4steps-V1.0-bf16.safetensors", 4),
        ("qwen_image_2512_lightning_8_steps", 8),
        ("LIGHTNING-4STEP", 4),
        ("Qwen-Image-Lightning/Qwen-Image-Lightning-4steps-V1.0", 4),
    ] {
        let expected = Some(("lightning".to_owned(), Some(steps)));
        assert_eq!(known(file), expected, "{file}");
    }
    for (file, name, steps) in [
        (
            "Wuli-Qwen-Image-2512-Turbo-LoRA-2steps-V1.0-bf16",
            "wuli-turbo",
            2,
        ),
        (
            "Wuli-Qwen-Image-2512-Turbo-LoRA-4steps-V3.0-bf16.safetensors",
            "wuli-turbo",
            4,
        ),
        ("qwen_image_distill_3step.safetensors", "dmd2-3step", 3),
        ("Qwen-Image-Distill-LoRA/model.safetensors", "distill", 15),
    ] {
        let expected = Some((name.to_owned(), Some(steps)));
        assert_eq!(known(file), expected, "{file}");
    }
}

#[test]
fn what_published_files_are_for() {
    let recipe = |file| known_recipe(file, &LIGHTNING).unwrap();
    let shift = |shift, terminal| Some(NoiseLevels::Shifted { shift, terminal });
    for (file, levels) in [
        ("Lightning-4steps", shift(3.0, None)),
        ("Turbo-LoRA-2steps", shift(3.0, None)),
        ("qwen_image_distill_3step", shift(2.5, Some(0.02))),
        ("qwen-image-distill-lora", None),
    ] {
        let recipe = recipe(file);
        assert_eq!(recipe.levels, levels, "{file}");
        assert_eq!(recipe.true_cfg_scale, Some(1.0), "{file}");
        assert!(!recipe.stochastic, "{file}");
    }
}

#[test]
fn a_name_that_only_looks_like_a_published_one_is_unknown() {
    for file in [
        "lightning-bolts",
        "lightning.safetensors",
        "lightning-2000steps",
        "lightning-0steps",
        "4steps-lightning",
        "turbo-4steps",
        "watercolor",
        "steps",
        "",
    ] {
        assert_eq!(known(file), None, "{file}");
    }
}

#[test]
fn a_name_is_not_enough_without_the_structure() {
    for fingerprint in [
        Fingerprint {
            modules: 719,
            ..LIGHTNING
        },
        Fingerprint {
            blocks: 59,
            ..LIGHTNING
        },
        Fingerprint {
            uniform: None,
            ..LIGHTNING
        },
        Fingerprint {
            changes_modulation: true,
            ..LIGHTNING
        },
    ] {
        assert_eq!(known_recipe("Lightning-4steps", &fingerprint), None);
    }
    let other_rank = Fingerprint {
        modules: 24,
        blocks: 2,
        uniform: Some((4, 4.0)),
        changes_modulation: false,
    };
    assert!(known_recipe("Lightning-4steps", &other_rank).is_some());
    // The structure of Lightning alone only logs a hint.
    assert_eq!(known_recipe("adapter", &LIGHTNING), None);
}

#[test]
fn the_levels_of_twinflow_are_evenly_spaced() {
    let levels = |name| match named_recipe(name).unwrap().levels {
        Some(NoiseLevels::Sigmas(sigmas)) => sigmas.to_vec(),
        other => panic!("{other:?}"),
    };
    let expected = [0.999, 0.999 - 0.499 / 3.0, 0.999 - 0.998 / 3.0, 0.5];
    let found = levels("twinflow");
    assert!(
        found
            .iter()
            .zip(expected)
            .all(|(a, b)| (a - b).abs() < 1e-12)
    );
    assert_eq!(
        (found.len(), levels("twinflow-2step")),
        (4, vec![0.999, 0.4])
    );
    for name in names() {
        assert!(named_recipe(name).is_some(), "{name}");
        let is_twinflow = name.starts_with("twinflow");
        assert_eq!(
            named_recipe(name).unwrap().stochastic,
            is_twinflow,
            "{name}"
        );
    }
    assert_eq!(named_recipe("lighting"), None);
}

#[test]
fn a_fused_model_has_the_steps_of_its_name() {
    for (folder, steps) in [
        ("Qwen-Image-Lightning-8steps", 8),
        ("qwen_image_2512_fp8_e4m3fn_scaled_4steps_v1.0", 4),
        ("lightx2v/Qwen-Image-Lightning-2-step", 2),
        ("my-model", 4),
        ("my-model-1000steps", 4),
    ] {
        let recipe = fused_lightning(folder);
        assert_eq!(recipe.steps, Some(steps), "{folder}");
        assert_eq!((recipe.name.as_str(), recipe.levels), ("lightning", None));
        assert_eq!(recipe.true_cfg_scale, Some(1.0));
    }
}
