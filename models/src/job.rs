//! What a pipeline is asked to generate, and what it returns: plain data, no tensors.
//!
//! A request, a job, a report and an image's metadata share the parts defined here ([`Size`],
//! [`Sampling`], [`Guidance`], [`Noise`]), so that a parameter has one type on its whole way.

use std::cmp::{Ordering, Reverse};
use std::fmt;
use std::sync::Arc;

use serde::de::Error as _;
use serde::ser::SerializeMap;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::adapter::AdapterUse;
use crate::finite::NotFinite;
use crate::noise::NoiseGenerator;
use crate::step_cache::{CachePolicy, StepCounts};
use crate::vae::TilingMode;

/// Identifies a job within one pipeline. The caller chooses it and does not reuse the id of a job
/// that has not ended.
pub type JobId = u64;

/// Height and width of an image in pixels. Its text form is `WIDTHxHEIGHT`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Size {
    pub width: usize,
    pub height: usize,
}

impl Size {
    /// A square of this side.
    pub const fn square(side: usize) -> Self {
        Self {
            width: side,
            height: side,
        }
    }

    /// `width * height`, or `usize::MAX` if that overflows.
    pub const fn pixels(self) -> usize {
        self.width.saturating_mul(self.height)
    }
}

impl fmt::Display for Size {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}x{}", self.width, self.height)
    }
}

/// How the latents are denoised. Reports serialise it under the names of the request's fields.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// Number of denoising steps, at least 1: diffusers' `num_inference_steps`.
    pub steps: usize,
    pub levels: NoiseLevels,
    /// Whether each step predicts the clean image and adds fresh noise of the next level to it:
    /// diffusers' `stochastic_sampling`. `None` does what the model's `scheduler_config.json` says.
    pub stochastic: Option<bool>,
}

/// The noise levels of the steps.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub enum NoiseLevels {
    /// Those of the model's `scheduler_config.json`.
    #[default]
    Model,
    /// A time shift that does not depend on the size. See
    /// [`SchedulerConfig::schedule`](crate::sampling::SchedulerConfig::schedule).
    Shifted {
        /// Above 0.
        shift: f64,
        /// The level that the last step is stretched to, from 0 to below 1. `None` and 0 stretch no
        /// step.
        terminal: Option<f64>,
    },
    /// The level of each step, falling, from above 0 to 1. After the last step it is 0.
    Sigmas(Arc<[f64]>),
}

impl Sampling {
    /// This many steps of the model's own schedule.
    pub const fn new(steps: usize) -> Self {
        Self {
            steps,
            levels: NoiseLevels::Model,
            stochastic: None,
        }
    }

    /// The fixed time shift, if there is one.
    pub fn shift(&self) -> Option<f64> {
        match self.levels {
            NoiseLevels::Shifted { shift, .. } => Some(shift),
            NoiseLevels::Model | NoiseLevels::Sigmas(_) => None,
        }
    }
}

impl Serialize for Sampling {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("num_inference_steps", &self.steps)?;
        match &self.levels {
            NoiseLevels::Model => {}
            NoiseLevels::Shifted { shift, terminal } => {
                map.serialize_entry("shift", shift)?;
                if let Some(terminal) = terminal {
                    map.serialize_entry("terminal", terminal)?;
                }
            }
            NoiseLevels::Sigmas(sigmas) => map.serialize_entry("sigmas", &sigmas[..])?,
        }
        if let Some(stochastic) = self.stochastic {
            map.serialize_entry("stochastic", &stochastic)?;
        }
        map.end()
    }
}

/// Reads what [`Sampling`] serialises to.
impl<'de> Deserialize<'de> for Sampling {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        struct Written {
            num_inference_steps: usize,
            shift: Option<f64>,
            terminal: Option<f64>,
            sigmas: Option<Arc<[f64]>>,
            stochastic: Option<bool>,
        }

        let written = Written::deserialize(deserializer)?;
        let terminal = written.terminal;
        let levels = match (written.shift, written.sigmas) {
            (None, None) => NoiseLevels::Model,
            (Some(shift), None) => NoiseLevels::Shifted { shift, terminal },
            (None, Some(sigmas)) => NoiseLevels::Sigmas(sigmas),
            (Some(_), Some(_)) => return Err(D::Error::custom("both shift and sigmas are given")),
        };
        Ok(Self {
            steps: written.num_inference_steps,
            levels,
            stochastic: written.stochastic,
        })
    }
}

/// Classifier-free guidance. It runs only with a negative prompt and a scale above 1, as in
/// diffusers; a value of this type exists only if it runs.
///
/// `P` is the form of the negative prompt: text in a request, a [`Conditioning`] in a job.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Guidance<P = Conditioning> {
    pub negative: P,
    /// diffusers' `true_cfg_scale`, above 1.
    pub scale: f64,
}

impl<P> Guidance<P> {
    /// `None` if these values mean that guidance does not run.
    pub fn new(negative: Option<P>, scale: f64) -> Option<Self> {
        let negative = negative.filter(|_| scale > 1.0)?;
        Some(Self { negative, scale })
    }
}

/// The starting noise.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Noise {
    pub seed: u64,
    pub generator: NoiseGenerator,
}

/// What an image is generated from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Conditioning {
    /// Token ids of a prompt inside the family's template.
    pub tokens: Vec<u32>,
}

impl From<Vec<u32>> for Conditioning {
    fn from(tokens: Vec<u32>) -> Self {
        Self { tokens }
    }
}

/// How the images of a job are decoded. A greater value takes less memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Decoding {
    /// As the model was loaded to decode: see [`VaeSettings`](crate::vae::VaeSettings).
    #[default]
    AsSet,
    /// One image at a time, which does not change the images.
    Sliced,
    /// One image at a time, in tiles if it is larger than one. Exact tiles, which do not change the
    /// images either, have at most this height and width in pixels.
    Tiled(usize),
}

impl Decoding {
    /// Every way, the one that takes the most memory first.
    pub const ALL: [Self; 12] = [
        Self::AsSet,
        Self::Sliced,
        Self::Tiled(2048),
        Self::Tiled(1536),
        Self::Tiled(1024),
        Self::Tiled(768),
        Self::Tiled(512),
        Self::Tiled(384),
        Self::Tiled(256),
        Self::Tiled(192),
        Self::Tiled(128),
        Self::Tiled(64),
    ];

    /// This way, and those of [`Decoding::ALL`] that take less memory.
    pub fn and_smaller(self) -> impl Iterator<Item = Self> {
        let smaller = move |other: &Self| *other > self;
        std::iter::once(self).chain(Self::ALL.into_iter().filter(smaller))
    }

    /// Rises as the memory that a way takes falls.
    fn rank(self) -> (u8, Reverse<usize>) {
        match self {
            Self::AsSet => (0, Reverse(0)),
            Self::Sliced => (1, Reverse(0)),
            Self::Tiled(size) => (2, Reverse(size)),
        }
    }
}

impl PartialOrd for Decoding {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Decoding {
    fn cmp(&self, other: &Self) -> Ordering {
        self.rank().cmp(&other.rank())
    }
}

/// One request, fully resolved: no value is a default any more.
#[derive(Debug, Clone, PartialEq)]
pub struct Job {
    pub conditioning: Conditioning,
    /// `None` runs the transformer on [`Job::conditioning`] alone.
    pub guidance: Option<Guidance>,
    /// Multiples of [`ImageSizes::multiple`](crate::pipeline::ImageSizes::multiple).
    pub size: Size,
    pub sampling: Sampling,
    pub noise: Noise,
    /// At least 1. The images of a job share one draw of noise, as in diffusers with one generator.
    pub num_images: usize,
    pub decoding: Decoding,
    /// Which steps run the transformer's blocks.
    pub cache: CachePolicy,
    /// Part of the steps, from 0 to 1, after which guidance reuses the difference of the two halves of
    /// the last step before: SGLang's `cfg_gate_step`. The first step is never gated. `None` and 1
    /// gate no step.
    pub cfg_gate_step: Option<f64>,
    /// Adapters of the transformer, in the order in which they are added. An adapter is in the list once.
    pub adapters: Vec<AdapterUse>,
    /// Keep every stage of the run in [`Output::trace`], for comparing runs.
    pub record: bool,
}

impl Job {
    /// The conditioning, and with guidance the negative one: one forward of the transformer each.
    pub fn branches(&self) -> impl Iterator<Item = &Conditioning> {
        let negative = self.guidance.as_ref().map(|guidance| &guidance.negative);
        std::iter::once(&self.conditioning).chain(negative)
    }
}

/// An image of 8-bit RGB values, row by row from the top.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RgbImage {
    pub height: usize,
    pub width: usize,
    /// `height * width * 3` values.
    pub pixels: Vec<u8>,
}

impl RgbImage {
    /// Converts values from 0 to 1; values outside are clamped. Halves are rounded to even, as numpy
    /// and so diffusers do.
    pub fn rounded(height: usize, width: usize, values: &[f32]) -> Self {
        let values = values.iter();
        Self {
            height,
            width,
            pixels: values
                .map(|value| (value * 255.0).round_ties_even() as u8)
                .collect(),
        }
    }

    /// Width and height.
    pub fn size(&self) -> Size {
        Size {
            width: self.width,
            height: self.height,
        }
    }
}

/// The result of a finished job.
#[derive(Debug, Clone, PartialEq)]
pub struct Output {
    pub images: Vec<RgbImage>,
    /// How the images were decoded in tiles, if they were.
    pub tiled: Option<TilingMode>,
    pub steps: StepCounts,
    /// Empty unless [`Job::record`] was set.
    pub trace: Vec<TraceTensor>,
    /// The first stage whose values were not finite: the images are not usable. Only a job with
    /// [`Job::record`] ends with an output then, others fail.
    pub not_finite: Option<NotFinite>,
}

/// One stage of a recorded run, in f32.
#[derive(Debug, Clone, PartialEq)]
pub struct TraceTensor {
    pub name: String,
    pub shape: Vec<usize>,
    pub values: Vec<f32>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guidance_needs_a_negative_prompt_and_a_scale_above_one() {
        assert_eq!(Guidance::new(None::<&str>, 4.0), None);
        assert_eq!(Guidance::new(Some("blurry"), 1.0), None);
        assert_eq!(Guidance::new(Some("blurry"), f64::NAN), None);
        let guidance = Guidance::new(Some(""), 1.5).unwrap();
        assert_eq!((guidance.negative, guidance.scale), ("", 1.5));
    }
}
