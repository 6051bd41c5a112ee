//! What a client asks for, checked once: past this file a bad size, step count or scale cannot
//! exist, and nothing is a default any more.

use kiln_models::noise::NoiseGenerator;
use kiln_models::pipeline::{ImageSizes, Job};

use crate::tokenizer::{PromptTokenizer, TokenizerError};

/// Steps when a request names none, as in diffusers.
pub const DEFAULT_NUM_INFERENCE_STEPS: u32 = 50;
/// Guidance scale when a request names none, as in diffusers.
pub const DEFAULT_TRUE_CFG_SCALE: f64 = 4.0;
/// Pixels of all images of a request: one of 7680x4320, the limit of vLLM-Omni.
pub const DEFAULT_MAX_IMAGE_PIXELS: usize = 33_177_600;
/// The scheduler was trained with 1,000 timesteps: more steps than that add nothing.
pub const DEFAULT_MAX_STEPS: usize = 1000;
/// Images of one request, as in the API of `OpenAI`.
pub const DEFAULT_MAX_NUM_IMAGES: usize = 10;
/// Bytes of a prompt. A longer one has more tokens than the model takes, and is not worth
/// splitting into them.
pub const MAX_PROMPT_BYTES: usize = 64 << 10;

/// Bounds of what may be asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Heights and widths are floored to a multiple.
    pub sizes: ImageSizes,
    /// Largest `height * width`, of all images of a request together.
    pub max_image_pixels: usize,
    /// Largest number of denoising steps.
    pub max_steps: usize,
    /// Largest number of images of one request.
    pub max_num_images: usize,
}

impl Limits {
    /// The sizes of a loaded model, and the default limits on cost.
    pub fn for_sizes(sizes: ImageSizes) -> Self {
        Self {
            sizes,
            ..Self::for_any_model()
        }
    }

    /// What can be refused before a model is loaded. The models differ in the sizes they take, so
    /// here only the pixels of an image bound its sides.
    pub fn for_any_model() -> Self {
        Self {
            sizes: ImageSizes {
                multiple: 1,
                max_side: DEFAULT_MAX_IMAGE_PIXELS,
                default_side: 1024,
            },
            max_image_pixels: DEFAULT_MAX_IMAGE_PIXELS,
            max_steps: DEFAULT_MAX_STEPS,
            max_num_images: DEFAULT_MAX_NUM_IMAGES,
        }
    }
}

/// What a client wrote, `None` where it wrote nothing.
///
/// The integers hold any number that JSON or a command line can carry, so that all bounds are
/// checked, and explained, in one place.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GenerationParams {
    /// May be empty.
    pub prompt: String,
    /// An empty one counts as given.
    pub negative_prompt: Option<String>,
    pub true_cfg_scale: Option<f64>,
    pub height: Option<i128>,
    pub width: Option<i128>,
    pub num_inference_steps: Option<i128>,
    pub num_images: Option<i128>,
    pub seed: Option<i128>,
}

/// A request that can be generated.
#[derive(Debug, Clone, PartialEq)]
pub struct GenerationRequest {
    pub prompt: String,
    /// With one, and a [`Self::true_cfg_scale`] above 1, classifier-free guidance runs.
    pub negative_prompt: Option<String>,
    /// Finite, at least 0.
    pub true_cfg_scale: f64,
    /// In pixels, already floored: the height the image will have.
    pub height: usize,
    /// In pixels, already floored: the width the image will have.
    pub width: usize,
    pub num_inference_steps: usize,
    pub num_images: usize,
    /// The given one, or one that was chosen from 0 to 2^31 - 1.
    pub seed: u64,
    pub noise_generator: NoiseGenerator,
}

/// Token ids of a request's prompts, each inside the template.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PromptTokens {
    pub prompt: Vec<u32>,
    pub negative_prompt: Option<Vec<u32>>,
}

/// Why a request cannot be generated. [`InvalidRequest::param`] names the culprit.
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
         got {height}x{width}, which is {} pixels", height * width
    )]
    TooManyPixels {
        height: usize,
        width: usize,
        max: usize,
    },
    #[error(
        "the images of a request may have {max} pixels together, \
         got {images} of {height}x{width}: ask for fewer, or for smaller ones"
    )]
    TooManyPixelsTogether {
        images: usize,
        height: usize,
        width: usize,
        max: usize,
    },
    #[error("num_inference_steps must be from 1 to {max}, got {got}")]
    Steps { got: i128, max: usize },
    #[error("true_cfg_scale must be a finite number of at least 0, got {got}")]
    TrueCfgScale { got: f64 },
    #[error("the number of images must be from 1 to {max}, got {got}")]
    NumImages { got: i128, max: usize },
    #[error(
        "seed must be from 0 to {}, got {got}; leave it out to have one chosen",
        u64::MAX
    )]
    Seed { got: i128 },
    #[error("{param} may have {MAX_PROMPT_BYTES} bytes at most, got {got}: shorten it")]
    PromptTooLong { param: &'static str, got: usize },
}

/// The tokenizer takes the prompt, or the negative prompt, for no prompt.
#[derive(Debug, thiserror::Error)]
#[error("{param} cannot be used")]
pub struct InvalidPrompt {
    /// Name of the [`GenerationParams`] field.
    pub param: &'static str,
    pub source: TokenizerError,
}

impl InvalidRequest {
    /// Name of the [`GenerationParams`] field that is to blame.
    pub fn param(&self) -> &'static str {
        match self {
            Self::Side { param, .. } | Self::PromptTooLong { param, .. } => param,
            Self::TooManyPixels { .. } => "height",
            Self::Steps { .. } => "num_inference_steps",
            Self::TrueCfgScale { .. } => "true_cfg_scale",
            Self::NumImages { .. } | Self::TooManyPixelsTogether { .. } => "num_images",
            Self::Seed { .. } => "seed",
        }
    }
}

impl GenerationRequest {
    /// Fills in the defaults, floors the size, chooses a seed if there is none, and checks the
    /// rest against the limits.
    pub fn new(
        params: GenerationParams,
        limits: &Limits,
        noise_generator: NoiseGenerator,
    ) -> Result<Self, InvalidRequest> {
        check_length("prompt", &params.prompt)?;
        check_length(
            "negative_prompt",
            params.negative_prompt.as_deref().unwrap_or_default(),
        )?;
        let height = side("height", params.height, limits)?;
        let width = side("width", params.width, limits)?;
        let max = limits.max_image_pixels;
        if height.saturating_mul(width) > max {
            return Err(InvalidRequest::TooManyPixels { height, width, max });
        }

        let steps = params
            .num_inference_steps
            .unwrap_or(DEFAULT_NUM_INFERENCE_STEPS.into());
        let num_inference_steps =
            within(steps, 1, limits.max_steps).ok_or(InvalidRequest::Steps {
                got: steps,
                max: limits.max_steps,
            })?;
        let images = params.num_images.unwrap_or(1);
        let num_images =
            within(images, 1, limits.max_num_images).ok_or(InvalidRequest::NumImages {
                got: images,
                max: limits.max_num_images,
            })?;
        if (height * width).saturating_mul(num_images) > max {
            return Err(InvalidRequest::TooManyPixelsTogether {
                images: num_images,
                height,
                width,
                max,
            });
        }

        let true_cfg_scale = params.true_cfg_scale.unwrap_or(DEFAULT_TRUE_CFG_SCALE);
        if !true_cfg_scale.is_finite() || true_cfg_scale < 0.0 {
            return Err(InvalidRequest::TrueCfgScale {
                got: true_cfg_scale,
            });
        }
        let seed = match params.seed {
            Some(got) => u64::try_from(got).map_err(|_| InvalidRequest::Seed { got })?,
            None => random_u64() >> 33,
        };

        Ok(Self {
            prompt: params.prompt,
            negative_prompt: params.negative_prompt,
            true_cfg_scale,
            height,
            width,
            num_inference_steps,
            num_images,
            seed,
            noise_generator,
        })
    }

    /// Whether every step runs the transformer on the negative prompt too.
    pub fn uses_cfg(&self) -> bool {
        self.negative_prompt.is_some() && self.true_cfg_scale > 1.0
    }

    /// What it takes to draw the image `index` again, in the form that the web UI of AUTOMATIC1111
    /// writes and image tools read.
    ///
    /// `model` is the name to put down for the model.
    pub fn metadata_text(&self, model: &str, index: usize) -> String {
        let negative = self.negative_prompt.as_ref().filter(|_| self.uses_cfg());
        let scale = negative.map_or(1.0, |_| self.true_cfg_scale);
        let negative = negative.map(|text| format!("Negative prompt: {text}\n"));
        let rng = match self.noise_generator {
            NoiseGenerator::Cpu => "CPU",
            NoiseGenerator::Cuda => "NV",
        };
        let batch = (self.num_images > 1)
            .then(|| format!("Batch size: {}, Batch pos: {index}, ", self.num_images));
        format!(
            "{}\n{}Steps: {}, Sampler: Euler, CFG scale: {scale}, Seed: {}, Size: {}x{}, \
             Model: {}, RNG: {rng}, {}Version: kiln {}",
            self.prompt,
            negative.unwrap_or_default(),
            self.num_inference_steps,
            self.seed,
            self.width,
            self.height,
            quoted(model),
            batch.unwrap_or_default(),
            env!("CARGO_PKG_VERSION"),
        )
    }

    /// Both prompts as token ids.
    pub fn tokenize(&self, tokenizer: &PromptTokenizer) -> Result<PromptTokens, InvalidPrompt> {
        let encode = |text: &str, param| {
            tokenizer
                .encode_prompt(text)
                .map_err(|source| InvalidPrompt { param, source })
        };
        let negative_prompt = self.negative_prompt.as_deref();
        Ok(PromptTokens {
            prompt: encode(&self.prompt, "prompt")?,
            negative_prompt: negative_prompt
                .map(|text| encode(text, "negative_prompt"))
                .transpose()?,
        })
    }

    /// The pipeline's form of this request. With `record` the output carries its trace.
    pub fn into_job(self, tokens: PromptTokens, record: bool) -> Job {
        Job {
            prompt: tokens.prompt,
            negative_prompt: tokens.negative_prompt,
            true_cfg_scale: self.true_cfg_scale,
            height: self.height,
            width: self.width,
            num_inference_steps: self.num_inference_steps,
            num_images: self.num_images,
            seed: self.seed,
            noise_generator: self.noise_generator,
            record,
        }
    }
}

fn check_length(param: &'static str, prompt: &str) -> Result<(), InvalidRequest> {
    let got = prompt.len();
    if got > MAX_PROMPT_BYTES {
        return Err(InvalidRequest::PromptTooLong { param, got });
    }
    Ok(())
}

/// A height or width as the image will have it: floored as the reference does.
fn side(
    param: &'static str,
    asked: Option<i128>,
    limits: &Limits,
) -> Result<usize, InvalidRequest> {
    let Some(got) = asked else {
        return Ok(limits.sizes.default_side);
    };
    let multiple = limits.sizes.multiple;
    let refused = InvalidRequest::Side {
        param,
        got,
        min: multiple,
        max: limits.sizes.max_side,
    };
    let asked = usize::try_from(got).map_err(|_| refused.clone())?;
    let floored = asked / multiple * multiple;
    within(floored as i128, multiple, limits.sizes.max_side).ok_or(refused)
}

fn within(value: i128, min: usize, max: usize) -> Option<usize> {
    usize::try_from(value)
        .ok()
        .filter(|value| (min..=max).contains(value))
}

/// A value that holds what separates values is written as a JSON string.
fn quoted(value: &str) -> String {
    if value.contains([',', ':', '\n', '"']) {
        serde_json::Value::from(value).to_string()
    } else {
        value.to_owned()
    }
}

/// A number from the operating system's randomness.
pub fn random_u64() -> u64 {
    getrandom::u64().expect("the operating system gives out random numbers")
}

#[cfg(test)]
mod tests {
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
        check(params).map(|request| (request.height, request.width))
    }

    #[test]
    fn an_empty_request_gets_the_references_defaults() {
        let request = check(GenerationParams::default()).unwrap();
        assert_eq!((request.height, request.width), (1024, 1024));
        assert_eq!((request.num_inference_steps, request.num_images), (50, 1));
        assert!((request.true_cfg_scale - 4.0).abs() < f64::EPSILON);
        assert_eq!(request.negative_prompt, None);
        assert!(request.seed < 1 << 31);
    }

    #[test]
    fn chosen_seeds_differ() {
        let seed = || check(GenerationParams::default()).unwrap().seed;
        let first = seed();
        assert!((0..8).any(|_| seed() != first));
    }

    #[test]
    fn sizes_are_floored_to_the_multiple() {
        assert_eq!(sized(1023, 1040).unwrap(), (1008, 1040));
        assert_eq!(sized(16, 31).unwrap(), (16, 16));
        assert_eq!(sized(16, 8192 + 15).unwrap(), (16, 8192));
    }

    #[test]
    fn sizes_out_of_bounds_are_refused_with_the_bounds() {
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
    fn prompts_have_a_length() {
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
    fn the_metadata_is_what_image_tools_read() {
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
            request.metadata_text("Qwen/Qwen-Image", 1),
            concat!(
                "a fox, 雪\nNegative prompt: blurry\nSteps: 50, Sampler: Euler, CFG scale: 4, ",
                "Seed: 7, Size: 128x64, Model: Qwen/Qwen-Image, RNG: CPU, Batch size: 2, ",
                "Batch pos: 1, Version: kiln ",
                env!("CARGO_PKG_VERSION")
            )
        );
        let plain = GenerationRequest {
            negative_prompt: None,
            num_images: 1,
            ..request
        };
        let text = plain.metadata_text("a, b", 0);
        assert!(
            text.starts_with("a fox, 雪\nSteps: 50, Sampler: Euler, CFG scale: 1, "),
            "{text}"
        );
        assert!(text.contains("Model: \"a, b\", RNG"), "{text}");
    }

    #[test]
    fn steps_and_images_have_bounds() {
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
    fn the_scale_is_finite_and_not_negative() {
        for got in [-0.1, f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            let params = GenerationParams {
                true_cfg_scale: Some(got),
                ..GenerationParams::default()
            };
            assert_eq!(check(params).unwrap_err().param(), "true_cfg_scale");
        }
        let params = GenerationParams {
            true_cfg_scale: Some(0.0),
            ..GenerationParams::default()
        };
        assert!(check(params).is_ok());
    }

    #[test]
    fn any_u64_is_a_seed_and_nothing_else_is() {
        let seeded = |seed| {
            check(GenerationParams {
                seed: Some(seed),
                ..GenerationParams::default()
            })
            .map(|request| request.seed)
        };
        assert_eq!(seeded(0).unwrap(), 0);
        assert_eq!(seeded(u64::MAX.into()).unwrap(), u64::MAX);
        assert_eq!(seeded(-1).unwrap_err().param(), "seed");
        assert_eq!(
            seeded(i128::from(u64::MAX) + 1).unwrap_err().param(),
            "seed"
        );
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
                .uses_cfg()
        };
        assert!(guided(Some(""), 4.0));
        assert!(!guided(Some(""), 1.0));
        assert!(!guided(None, 4.0));
    }
}
