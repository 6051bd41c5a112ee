//! A checked request, with every value given and within its limits.

use kiln_models::job::{Guidance, Noise, Sampling, Size};
use kiln_models::noise::NoiseGenerator;
use kiln_models::step_cache::{CacheError, MIN_CACHED_STEPS};
use serde::{Deserialize, Serialize};

use super::adapters::{MAX_ADAPTER_RANKS, MAX_ADAPTER_SCALE, MAX_ADAPTERS};
use super::cache::cfg_gate_step;
use super::limits::{Limits, MAX_PROMPT_BYTES, MAX_TRUE_CFG_SCALE};
use super::params::GenerationParams;
use super::schedule::{Resolved, resolve};
use super::{ChosenAdapter, RequestCache, RequestSchedule};

/// The seed that asks for any seed, as no seed does.
const ANY_SEED: i128 = -1;

/// A valid request with all defaults filled in.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
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
    pub cache: RequestCache,
    /// Part of the steps after which guidance reuses the difference of its two halves, from 0 to below
    /// 1; `None` if no step is gated.
    pub cfg_gate_step: Option<f64>,
    /// Without those of scale 0.
    pub adapters: Vec<ChosenAdapter>,
    /// The adapter that is merged into the model.
    pub merged: Option<ChosenAdapter>,
    /// The noise levels, and where they come from.
    pub schedule: RequestSchedule,
    /// What the client should know about values that do not fit each other, one sentence each.
    pub warnings: Vec<String>,
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
    /// `shift`, `sigmas` or `schedule`.
    #[error("{param} {message}")]
    Levels {
        param: &'static str,
        message: String,
    },
    #[error("{other} and {param} both set the noise levels: give only one of them")]
    TwoSchedules {
        param: &'static str,
        other: &'static str,
    },
    #[error(
        "num_inference_steps is {steps}, but {of} has {levels} noise levels, one for each step: leave \
         num_inference_steps out, or give other noise levels"
    )]
    StepsOfLevels {
        steps: usize,
        levels: usize,
        of: String,
    },
    #[error(
        "adapters {:?} and {:?} have different recipes, {} and {}: use one of them, or give the noise \
         levels with shift, sigmas or schedule", adapters[0], adapters[1], recipes[0], recipes[1]
    )]
    TwoRecipes {
        adapters: Box<[String; 2]>,
        recipes: Box<[String; 2]>,
    },
    #[error("there is no adapter {name:?}: {known}")]
    UnknownAdapter { name: String, known: String },
    #[error(
        "adapter {name:?} is merged into the model by --lora-merge, so it is in every image and cannot be \
         added or scaled: leave it out"
    )]
    MergedAdapter { name: String },
    #[error("adapter {name:?} is in the request twice: give it once")]
    AdapterTwice { name: String },
    #[error(
        "the scale of adapter {name:?} must be from -{MAX_ADAPTER_SCALE} to {MAX_ADAPTER_SCALE}, got {got}"
    )]
    AdapterScale { name: String, got: f64 },
    #[error("a request may have {MAX_ADAPTERS} adapters at most, got {got}")]
    TooManyAdapters { got: usize },
    #[error(
        "the ranks of a request's adapters may be {MAX_ADAPTER_RANKS} together at most, got {got}: use \
         fewer adapters, or smaller ones"
    )]
    AdapterRanks { got: usize },
    #[error("true_cfg_scale must be from 0 to {MAX_TRUE_CFG_SCALE}, got {got}")]
    TrueCfgScale { got: f64 },
    #[error("the number of images must be from 1 to {max}, got {got}")]
    NumImages { got: i128, max: usize },
    #[error(
        "seed must be from 0 to {}, got {got}; leave it out or give -1 to have one chosen",
        u64::MAX
    )]
    Seed { got: i128 },
    #[error(
        "{param} needs at least {MIN_CACHED_STEPS} steps, got {steps}: ask for more steps, or leave \
         {param} out"
    )]
    TooFewSteps { param: &'static str, steps: usize },
    /// A setting of a step cache does not fit the request or the model.
    #[error("{param}: {error}")]
    Cache {
        param: &'static str,
        error: CacheError,
    },
    #[error("cfg_gate_step must be from 0 to 1, got {got}")]
    CfgGateStep { got: f64 },
    #[error("{param} may have {MAX_PROMPT_BYTES} bytes at most, got {got}: shorten it")]
    PromptTooLong { param: &'static str, got: usize },
}

impl InvalidRequest {
    /// Name of the invalid [`GenerationParams`] field.
    pub fn param(&self) -> &'static str {
        match self {
            Self::Side { param, .. }
            | Self::PromptTooLong { param, .. }
            | Self::TooFewSteps { param, .. }
            | Self::Levels { param, .. }
            | Self::TwoSchedules { param, .. }
            | Self::Cache { param, .. } => param,
            Self::CfgGateStep { .. } => "cfg_gate_step",
            Self::TooManyPixels { .. } => "height",
            Self::Steps { .. } | Self::StepsOfLevels { .. } => "num_inference_steps",
            Self::TwoRecipes { .. }
            | Self::UnknownAdapter { .. }
            | Self::MergedAdapter { .. }
            | Self::AdapterTwice { .. }
            | Self::AdapterScale { .. }
            | Self::TooManyAdapters { .. }
            | Self::AdapterRanks { .. } => "adapters",
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

        let merged = limits.merged.clone();
        if let Some(merged) = &merged {
            let name = &merged.info.name;
            if params.adapters.iter().any(|given| given.name == *name) {
                return Err(InvalidRequest::MergedAdapter { name: name.clone() });
            }
        }
        let adapters = limits.adapters.choose(&params)?;
        let in_use: Vec<ChosenAdapter> = adapters.iter().chain(&merged).cloned().collect();
        let Resolved {
            sampling,
            true_cfg_scale,
            schedule,
            warnings,
        } = resolve(&params, &in_use, size, limits)?;
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

        let seed = match params.seed {
            None | Some(ANY_SEED) => random_u64() >> 33,
            Some(got) => u64::try_from(got).map_err(|_| InvalidRequest::Seed { got })?,
        };

        Ok(Self {
            prompt: params.prompt,
            negative_prompt: params.negative_prompt,
            true_cfg_scale,
            size,
            cache: limits.caches.resolve(params.cache, sampling.steps)?,
            cfg_gate_step: cfg_gate_step(params.cfg_gate_step, sampling.steps)?,
            sampling,
            num_images,
            noise: Noise { seed, generator },
            adapters,
            merged,
            schedule,
            warnings,
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
mod tests;
