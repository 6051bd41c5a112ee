//! Defaults and bounds of the parameters.

use std::sync::LazyLock;

use kiln_models::pipeline::ImageSizes;
use kiln_models::step_cache::StepCounts;
use kiln_models::vae::TilingMode;

use super::super::limits::{DEFAULT_MAX_IMAGE_PIXELS, MAX_SHIFT};
use super::super::{CacheChoice, Catalogue, PromptTokens, StepCaches};
use super::*;

static LIMITS: LazyLock<Limits> = LazyLock::new(|| Limits {
    caches: StepCaches {
        default: CacheChoice::Off,
        mag_ratios: None,
        blocks: None,
    },
    sizes: ImageSizes {
        multiple: 16,
        max_side: 8192,
        default_side: 1024,
    },
    max_image_pixels: DEFAULT_MAX_IMAGE_PIXELS,
    max_steps: 1000,
    max_num_images: 10,
    adapters: Catalogue::default(),
    scheduler: None,
    model_recipe: None,
});

fn check(params: GenerationParams) -> Result<GenerationRequest, InvalidRequest> {
    GenerationRequest::new(params, &LIMITS, NoiseGenerator::Cpu)
}

fn sized(height: i128, width: i128) -> Result<(usize, usize), InvalidRequest> {
    let params = GenerationParams {
        height: Some(height),
        width: Some(width),
        ..GenerationParams::default()
    };
    check(params).map(|request| (request.size.height, request.size.width))
}

#[test]
fn an_empty_request_gets_the_defaults_of_diffusers() {
    let request = check(GenerationParams::default()).unwrap();
    assert_eq!((request.size.height, request.size.width), (1024, 1024));
    assert_eq!((request.sampling.steps, request.num_images), (50, 1));
    assert!((request.true_cfg_scale - 4.0).abs() < f64::EPSILON);
    assert_eq!(request.negative_prompt, None);
    assert!(request.noise.seed < 1 << 31);
}

#[test]
fn random_seeds_differ() {
    let seed = || check(GenerationParams::default()).unwrap().noise.seed;
    let first = seed();
    assert!((0..8).any(|_| seed() != first));
}

#[test]
fn sizes_are_rounded_down_to_the_multiple() {
    assert_eq!(sized(1023, 1040).unwrap(), (1008, 1040));
    assert_eq!(sized(16, 31).unwrap(), (16, 16));
    assert_eq!(sized(16, 8192 + 15).unwrap(), (16, 8192));
}

#[test]
fn errors_of_sizes_name_the_bounds() {
    for got in [-16, 0, 15, 8192 + 16, i128::MAX, i128::MIN] {
        let error = sized(got, 64).unwrap_err();
        assert_eq!(error.param(), "height");
        let expected = format!("height must be from 16 to 8192 pixels, got {got}");
        assert_eq!(error.to_string(), expected);
    }
    assert_eq!(sized(64, 1).unwrap_err().param(), "width");
}

#[test]
fn the_pixel_limit_is_inclusive() {
    assert!(sized(4320, 7680).is_ok());
    let error = sized(4320, 7696).unwrap_err();
    assert_eq!(
        error.to_string(),
        "height x width must be at most 33177600 pixels, got 4320x7696, \
         which is 33246720 pixels"
    );
}

#[test]
fn the_images_of_a_request_share_the_pixel_limit() {
    let asked = |num_images, side| {
        check(GenerationParams {
            num_images: Some(num_images),
            height: Some(side),
            width: Some(side),
            ..GenerationParams::default()
        })
    };
    assert!(asked(10, 1808).is_ok());
    let error = asked(10, 1824).unwrap_err();
    assert_eq!(error.param(), "num_images");
    assert!(error.to_string().contains("10 of 1824x1824"), "{error}");
}

#[test]
fn long_prompts_are_refused() {
    let long = "x".repeat(MAX_PROMPT_BYTES + 1);
    let params = GenerationParams {
        prompt: long.clone(),
        ..GenerationParams::default()
    };
    assert_eq!(check(params).unwrap_err().param(), "prompt");
    let params = GenerationParams {
        negative_prompt: Some(long),
        ..GenerationParams::default()
    };
    assert_eq!(check(params).unwrap_err().param(), "negative_prompt");
}

#[test]
fn metadata_has_the_format_of_the_web_ui() {
    let request = check(GenerationParams {
        prompt: "a fox, 雪".to_owned(),
        negative_prompt: Some("blurry".to_owned()),
        seed: Some(7),
        height: Some(64),
        width: Some(128),
        num_images: Some(2),
        ..GenerationParams::default()
    })
    .unwrap();
    assert_eq!(
        request.metadata_text(
            "Qwen/Qwen-Image",
            1,
            Some(TilingMode::Exact),
            StepCounts::default()
        ),
        concat!(
            "a fox, 雪\nNegative prompt: blurry\nSteps: 50, Sampler: Euler, CFG scale: 4, ",
            "Seed: 7, Size: 128x64, Model: Qwen/Qwen-Image, RNG: CPU, Batch size: 2, ",
            "Batch pos: 1, Version: kiln ",
        )
        .to_owned()
            + crate::version::TAG
    );
    let plain = GenerationRequest {
        negative_prompt: None,
        num_images: 1,
        ..request
    };
    let text = plain.metadata_text("a, b", 0, Some(TilingMode::Blended), StepCounts::default());
    assert!(
        text.starts_with("a fox, 雪\nSteps: 50, Sampler: Euler, CFG scale: 1, "),
        "{text}"
    );
    assert!(text.contains("Model: \"a, b\", RNG"), "{text}");
    assert!(text.contains(", VAE tiling: True, Version"), "{text}");
}

#[test]
fn numbers_of_steps_and_images_are_limited() {
    for got in [-1, 0, 1001, i128::MAX] {
        let params = GenerationParams {
            num_inference_steps: Some(got),
            ..GenerationParams::default()
        };
        assert_eq!(check(params).unwrap_err().param(), "num_inference_steps");
    }
    for got in [-1, 0, 11] {
        let params = GenerationParams {
            num_images: Some(got),
            ..GenerationParams::default()
        };
        assert_eq!(check(params).unwrap_err().param(), "num_images");
    }
}

#[test]
fn scales_outside_the_bounds_are_refused() {
    for got in [
        -0.1,
        20.1,
        1e39,
        1e308,
        f64::NAN,
        f64::INFINITY,
        f64::NEG_INFINITY,
    ] {
        let params = GenerationParams {
            true_cfg_scale: Some(got),
            ..GenerationParams::default()
        };
        let error = check(params).unwrap_err();
        assert_eq!(error.param(), "true_cfg_scale");
        let expected = format!("true_cfg_scale must be from 0 to 20, got {got}");
        assert_eq!(error.to_string(), expected);
    }
    for scale in [0.0, 1.0, MAX_TRUE_CFG_SCALE] {
        let params = GenerationParams {
            true_cfg_scale: Some(scale),
            ..GenerationParams::default()
        };
        assert!(check(params).is_ok());
    }
}

#[test]
fn seeds_are_64_bit_unsigned_integers() {
    let seeded = |seed| {
        check(GenerationParams {
            seed: Some(seed),
            ..GenerationParams::default()
        })
        .map(|request| request.noise.seed)
    };
    assert_eq!(seeded(0).unwrap(), 0);
    assert_eq!(seeded(u64::MAX.into()).unwrap(), u64::MAX);
    assert_eq!(seeded(-2).unwrap_err().param(), "seed");
    assert_eq!(seeded(i128::MIN).unwrap_err().param(), "seed");
    assert_eq!(
        seeded(i128::from(u64::MAX) + 1).unwrap_err().param(),
        "seed"
    );
}

#[test]
fn the_seed_minus_one_is_chosen_as_an_absent_seed_is() {
    let seed = || {
        let params = GenerationParams {
            seed: Some(-1),
            ..GenerationParams::default()
        };
        check(params).unwrap().noise.seed
    };
    let first = seed();
    assert!(first < 1 << 31);
    assert!((0..8).any(|_| seed() != first));
}

#[test]
fn guidance_needs_a_negative_prompt_and_a_scale_above_one() {
    let guided = |negative_prompt: Option<&str>, scale| {
        let params = GenerationParams {
            negative_prompt: negative_prompt.map(String::from),
            true_cfg_scale: Some(scale),
            ..GenerationParams::default()
        };
        let request = check(params).unwrap();
        let negative_prompt = request.negative_prompt.is_some().then(|| vec![1]);
        request
            .into_job(
                PromptTokens {
                    prompt: vec![1],
                    negative_prompt,
                },
                Vec::new(),
                false,
            )
            .guidance
            .is_some()
    };
    assert!(guided(Some(""), 4.0));
    assert!(!guided(Some(""), 1.0));
    assert!(!guided(None, 4.0));
}

#[test]
fn a_shift_is_bounded_on_both_sides() {
    let shifted = |shift| {
        let params = GenerationParams {
            shift: Some(shift),
            ..GenerationParams::default()
        };
        check(params).map(|request| request.sampling.shift())
    };
    for shift in [1e-3, 3.0, MAX_SHIFT] {
        assert_eq!(shifted(shift).unwrap(), Some(shift));
    }
    for got in [0.0, -1.0, 1e-4, 1e-50, 100.5, 1e39, f64::NAN, f64::INFINITY] {
        assert_eq!(shifted(got).unwrap_err().param(), "shift");
    }
}
