//! The output of `kiln generate --json`. Keys may be added; existing ones keep name and meaning.

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use kiln_models::job::{Output, RgbImage, Sampling};
use kiln_models::pipeline::ModelInfo;
use kiln_models::step_cache::StepCounts;
use serde::{Serialize, Serializer};
use serde_json::Value;

use crate::cli::output;
use crate::engine::Timings;
use crate::image::ImageFormat;
use crate::request::{ChosenAdapter, GenerationRequest, RequestSchedule};

/// The files, the parameters and the times of one run.
#[derive(Debug, Serialize)]
pub(super) struct Report<'a> {
    /// kiln's version.
    kiln: &'static str,
    /// [`ModelSettings::public_name`](crate::runtime::ModelSettings::public_name).
    model: &'a str,
    /// Name for `--backend`.
    backend: &'static str,
    /// The device in `kiln backends`: `flex:0 (AMD EPYC)`.
    device: String,
    dtype: &'static str,
    prompt: &'a str,
    negative_prompt: Option<&'a str>,
    true_cfg_scale: f64,
    /// Whether each step also ran the transformer on the negative prompt.
    guidance: bool,
    #[serde(flatten)]
    sampling: Sampling,
    schedule: &'a RequestSchedule,
    /// Values that do not fit each other.
    #[serde(skip_serializing_if = "<[String]>::is_empty")]
    warnings: &'a [String],
    #[serde(skip_serializing_if = "Vec::is_empty")]
    adapters: Vec<Adapter<'a>>,
    /// The adapter that was merged into the model.
    #[serde(skip_serializing_if = "Option::is_none")]
    merged_adapter: Option<Adapter<'a>>,
    /// The step cache, as in a request.
    cache: Value,
    /// Part of the steps after which guidance was gated, 1 for none.
    cfg_gate_step: f64,
    #[serde(flatten)]
    steps: StepCounts,
    rng: &'static str,
    /// Whether the images were decoded in tiles.
    vae_use_tiling: bool,
    images: Vec<Image>,
    dump: Option<String>,
    seconds: Seconds,
}

/// An adapter that the images were generated with.
#[derive(Debug, Serialize)]
struct Adapter<'a> {
    name: &'a str,
    scale: f64,
}

/// One image file.
#[derive(Debug, Serialize)]
pub(super) struct Image {
    #[serde(serialize_with = "as_text")]
    pub(super) path: PathBuf,
    format: &'static str,
    /// Size of the file.
    bytes: usize,
    /// Width of the image in pixels.
    width: usize,
    /// Height of the image in pixels.
    height: usize,
    seed: u64,
    /// Index among the images of the seed, from 0.
    pub(super) index: usize,
}

/// Wall-clock time of each stage.
#[derive(Debug, Clone, Copy, Serialize)]
pub(super) struct Seconds {
    /// Reading the weights.
    load: f64,
    /// Encoding the prompts, generating the noise, making the schedule.
    encode: f64,
    /// All denoising steps.
    denoise: f64,
    /// From latents to pixels.
    decode: f64,
    /// Writing the image files and the dump.
    write: f64,
    /// The whole command.
    total: f64,
}

impl<'a> Report<'a> {
    pub(super) fn new(
        model: &'a str,
        info: &ModelInfo,
        request: &'a GenerationRequest,
        (images, output): (Vec<Image>, &Output),
        dump: Option<&'a Path>,
        seconds: Seconds,
    ) -> Self {
        Self {
            kiln: crate::version::VERSION,
            model,
            backend: info.backend,
            device: info.device(),
            dtype: info.dtype,
            prompt: &request.prompt,
            negative_prompt: request.negative_prompt.as_deref(),
            true_cfg_scale: request.true_cfg_scale,
            guidance: request.guidance().is_some(),
            sampling: request.sampling.clone(),
            schedule: &request.schedule,
            warnings: &request.warnings,
            adapters: request.adapters.iter().map(Adapter::new).collect(),
            merged_adapter: request.merged.as_ref().map(Adapter::new),
            cache: request.cache.choice.to_json(),
            cfg_gate_step: request.cfg_gate_step.unwrap_or(1.0),
            steps: output.steps,
            rng: request.noise.generator.name(),
            vae_use_tiling: output.tiled.is_some(),
            images,
            dump: dump.map(|path| path.display().to_string()),
            seconds,
        }
    }
}

impl<'a> Adapter<'a> {
    fn new(chosen: &'a ChosenAdapter) -> Self {
        Self {
            name: &chosen.info.name,
            scale: chosen.scale,
        }
    }
}

impl Image {
    pub(super) fn new(
        path: &Path,
        format: ImageFormat,
        bytes: usize,
        image: &RgbImage,
        seed: u64,
        index: usize,
    ) -> Self {
        Self {
            path: path.to_owned(),
            format: format.name(),
            bytes,
            width: image.width,
            height: image.height,
            seed,
            index,
        }
    }
}

/// `out.png 128x128 seed 7`, or `128x128 seed 7` on stdout.
impl fmt::Display for Image {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !output::is_stdout(&self.path) {
            write!(formatter, "{} ", self.path.display())?;
        }
        write!(
            formatter,
            "{}x{} seed {}",
            self.width, self.height, self.seed
        )
    }
}

/// A path as text; bytes that are not UTF-8 are replaced.
fn as_text<S: Serializer>(path: &Path, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&path.display())
}

impl Seconds {
    pub(super) fn new(load: Duration, timings: &Timings, write: Duration, total: Duration) -> Self {
        Self {
            load: load.as_secs_f64(),
            encode: timings.encode.as_secs_f64(),
            denoise: timings.denoise.as_secs_f64(),
            decode: timings.decode.as_secs_f64(),
            write: write.as_secs_f64(),
            total: total.as_secs_f64(),
        }
    }
}
