//! A checked request, with every value given and within its limits.

use kiln_models::job::{Guidance, Noise, Sampling, Size};
use kiln_models::noise::NoiseGenerator;

use super::limits::{
    DEFAULT_NUM_INFERENCE_STEPS, DEFAULT_TRUE_CFG_SCALE, Limits, MAX_PROMPT_BYTES, MAX_SHIFT,
    MAX_TRUE_CFG_SCALE, MIN_SHIFT,
};
use super::params::GenerationParams;

/// The seed that asks for any seed, as no seed does.
const ANY_SEED: i128 = -1;

/// A valid request with all defaults filled in.
#[derive(Debug, Clone, PartialEq)]
pub struct GenerationRequest {
    pub prompt: String,
    /// The negative prompt as given. [`Self::guidance`] is `None` if it is not used.
    pub negative_prompt: Option<String>,
    /// From 0 to [`MAX_TRUE_CFG_SCALE`].
    pub true_cfg_scale: f64,
    /// Size of the images: the given size, rounded down to a multiple that the model can generate.
    pub size: Size,
    pub sampling: Sampling,
    pub num_images: usize,
    /// The seed is the given one. Without one, or with -1, it is a random number from 0 to 2^31 - 1.
    pub noise: Noise,
}

/// Why a request is invalid. [`InvalidRequest::param`] names the parameter.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum InvalidRequest {
    #[error("{param} must be from {min} to {max} pixels, got {got}")]
    Side {
        param: &'static str,
        got: i128,
        min: usize,
        max: usize,
    },
    #[error(
        "height x width must be at most {max} pixels, \
         got {}x{}, which is {} pixels", size.height, size.width, size.pixels()
    )]
    TooManyPixels { size: Size, max: usize },
    #[error(
        "the images of a request may have {max} pixels together, \
         got {images} of {}x{}: ask for fewer, or for smaller ones", size.height, size.width
    )]
    TooManyPixelsTogether {
        images: usize,
        size: Size,
        max: usize,
    },
    #[error("num_inference_steps must be from 1 to {max}, got {got}")]
    Steps { got: i128, max: usize },
    #[error("shift must be from {MIN_SHIFT} to {MAX_SHIFT}, got {got}")]
    Shift { got: f64 },
    #[error("true_cfg_scale must be from 0 to {MAX_TRUE_CFG_SCALE}, got {got}")]
    TrueCfgScale { got: f64 },
    #[error("the number of images must be from 1 to {max}, got {got}")]
    NumImages { got: i128, max: usize },
    #[error(
        "seed must be from 0 to {}, got {got}; leave it out or give -1 to have one chosen",
        u64::MAX
    )]
    Seed { got: i128 },
    #[error("{param} may have {MAX_PROMPT_BYTES} bytes at most, got {got}: shorten it")]
    PromptTooLong { param: &'static str, got: usize },
}

impl InvalidRequest {
    /// Name of the invalid [`GenerationParams`] field.
    pub fn param(&self) -> &'static str {
        match self {
            Self::Side { param, .. } | Self::PromptTooLong { param, .. } => param,
            Self::TooManyPixels { .. } => "height",
            Self::Steps { .. } => "num_inference_steps",
            Self::Shift { .. } => "shift",
            Self::TrueCfgScale { .. } => "true_cfg_scale",
            Self::NumImages { .. } | Self::TooManyPixelsTogether { .. } => "num_images",
            Self::Seed { .. } => "seed",
        }
    }
}

impl GenerationRequest {
    /// Fills in the defaults, rounds the size down, chooses a random seed if none is given, and checks
    /// every value against the limits.
    ///
    /// ```
    /// use kiln::kiln_models::noise::NoiseGenerator;
    /// use kiln::request::{GenerationParams, GenerationRequest, Limits};
    ///
    /// let mut params = GenerationParams {
    ///     prompt: "a red fox in the snow".to_owned(),
    ///     ..GenerationParams::default()
    /// };
    /// let limits = Limits::for_any_model();
    /// let request = GenerationRequest::new(params.clone(), &limits, NoiseGenerator::Cpu)?;
    /// assert_eq!(request.sampling.steps, 50);
    ///
    /// params.num_inference_steps = Some(0);
    /// let error = GenerationRequest::new(params, &limits, NoiseGenerator::Cpu).unwrap_err();
    /// assert_eq!(error.param(), "num_inference_steps");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn new(
        params: GenerationParams,
        limits: &Limits,
        generator: NoiseGenerator,
    ) -> Result<Self, InvalidRequest> {
        check_length("prompt", &params.prompt)?;
        check_length(
            "negative_prompt",
            params.negative_prompt.as_deref().unwrap_or_default(),
        )?;
        let size = Size {
            height: side("height", params.height, limits)?,
            width: side("width", params.width, limits)?,
        };
        let max = limits.max_image_pixels;
        if size.pixels() > max {
            return Err(InvalidRequest::TooManyPixels { size, max });
        }

        let steps = params
            .num_inference_steps
            .unwrap_or(DEFAULT_NUM_INFERENCE_STEPS.into());
        let steps = within(steps, 1, limits.max_steps).ok_or(InvalidRequest::Steps {
            got: steps,
            max: limits.max_steps,
        })?;
        let shift = params.shift;
        if let Some(got) = shift.filter(|shift| !(MIN_SHIFT..=MAX_SHIFT).contains(shift)) {
            return Err(InvalidRequest::Shift { got });
        }
        let images = params.num_images.unwrap_or(1);
        let num_images =
            within(images, 1, limits.max_num_images).ok_or(InvalidRequest::NumImages {
                got: images,
                max: limits.max_num_images,
            })?;
        if size.pixels().saturating_mul(num_images) > max {
            return Err(InvalidRequest::TooManyPixelsTogether {
                images: num_images,
                size,
                max,
            });
        }

        let true_cfg_scale = params.true_cfg_scale.unwrap_or(DEFAULT_TRUE_CFG_SCALE);
        if !(0.0..=MAX_TRUE_CFG_SCALE).contains(&true_cfg_scale) {
            return Err(InvalidRequest::TrueCfgScale {
                got: true_cfg_scale,
            });
        }
        let seed = match params.seed {
            None | Some(ANY_SEED) => random_u64() >> 33,
            Some(got) => u64::try_from(got).map_err(|_| InvalidRequest::Seed { got })?,
        };

        Ok(Self {
            prompt: params.prompt,
            negative_prompt: params.negative_prompt,
            true_cfg_scale,
            size,
            sampling: Sampling { steps, shift },
            num_images,
            noise: Noise { seed, generator },
        })
    }

    /// Negative prompt and scale, if guidance is enabled.
    pub fn guidance(&self) -> Option<Guidance<&str>> {
        Guidance::new(self.negative_prompt.as_deref(), self.true_cfg_scale)
    }
}

fn check_length(param: &'static str, prompt: &str) -> Result<(), InvalidRequest> {
    let got = prompt.len();
    if got > MAX_PROMPT_BYTES {
        return Err(InvalidRequest::PromptTooLong { param, got });
    }
    Ok(())
}

/// The height or width of the image: the given value rounded down to a multiple, as in diffusers.
fn side(
    param: &'static str,
    given: Option<i128>,
    limits: &Limits,
) -> Result<usize, InvalidRequest> {
    let Some(got) = given else {
        return Ok(limits.sizes.default_side);
    };
    let multiple = limits.sizes.multiple;
    let refused = InvalidRequest::Side {
        param,
        got,
        min: multiple,
        max: limits.sizes.max_side,
    };
    let given = usize::try_from(got).map_err(|_| refused.clone())?;
    let floored = given / multiple * multiple;
    within(floored as i128, multiple, limits.sizes.max_side).ok_or(refused)
}

fn within(value: i128, min: usize, max: usize) -> Option<usize> {
    usize::try_from(value)
        .ok()
        .filter(|value| (min..=max).contains(value))
}

/// A random number of the operating system.
pub fn random_u64() -> u64 {
    getrandom::u64().expect("the operating system provides random numbers")
}

#[cfg(test)]
mod tests {
    use kiln_models::pipeline::ImageSizes;
    use kiln_models::vae::TilingMode;

    use super::super::PromptTokens;
    use super::super::limits::DEFAULT_MAX_IMAGE_PIXELS;
    use super::*;

    const LIMITS: Limits = Limits {
        sizes: ImageSizes {
            multiple: 16,
            max_side: 8192,
            default_side: 1024,
        },
        max_image_pixels: DEFAULT_MAX_IMAGE_PIXELS,
        max_steps: 1000,
        max_num_images: 10,
    };

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
            request.metadata_text("Qwen/Qwen-Image", 1, Some(TilingMode::Exact)),
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
        let text = plain.metadata_text("a, b", 0, Some(TilingMode::Blended));
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
            check(params).map(|request| request.sampling.shift)
        };
        for shift in [1e-3, 3.0, MAX_SHIFT] {
            assert_eq!(shifted(shift).unwrap(), Some(shift));
        }
        for got in [0.0, -1.0, 1e-4, 1e-50, 100.5, 1e39, f64::NAN, f64::INFINITY] {
            assert_eq!(shifted(got).unwrap_err().param(), "shift");
        }
    }
}
