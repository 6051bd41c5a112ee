//! What a response says about its images beyond `OpenAI`'s API.

use serde::Serialize;
use utoipa::ToSchema;

use crate::request::RequestSchedule;

use super::cache::StepFacts;
use super::generation::EncodedImages;
use super::schedule::{ScheduleFacts, UsedAdapter};
use super::stage_metrics::{Measured, Metrics, StageSeconds};

/// Fields of a response beyond `OpenAI`'s API: what is needed to reproduce the images, and how long
/// they took.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct ImageFacts {
    /// The seed that was used, whether the client gave it or the server chose it.
    seed: u64,
    /// Size of the images, `WIDTHxHEIGHT` in pixels.
    size: String,
    num_inference_steps: usize,
    /// The time shift, if there was a fixed one; absent if the model's own schedule was used.
    #[serde(skip_serializing_if = "Option::is_none")]
    shift: Option<f64>,
    #[schema(value_type = ScheduleFacts)]
    schedule: RequestSchedule,
    /// The adapters; absent if there were none.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    adapters: Vec<UsedAdapter>,
    /// Values of the request that do not fit each other, one sentence each; absent if there are none.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    warnings: Vec<String>,
    /// The step cache, if there was one: `balanced`, `fast`, `dbcache` or `magcache`. The answer to
    /// `auto` has the one that was chosen because of the load, if any.
    #[serde(skip_serializing_if = "Option::is_none")]
    cache: Option<&'static str>,
    /// The `cfg_gate_step` of the request, or the one that was chosen for `auto`, if it was below 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    cfg_gate_step: Option<f64>,
    #[serde(flatten)]
    steps: StepFacts,
    /// True if the images were decoded in tiles: by `--vae-use-tiling`, or because the memory is too
    /// small for whole images. Absent otherwise. Only `--vae-tiling blended` changes the images.
    #[serde(skip_serializing_if = "Option::is_none")]
    vae_use_tiling: Option<bool>,
    timings: StageSeconds,
    #[serde(flatten)]
    measured: Measured,
    /// Only with `return_stage_metrics`.
    #[serde(skip_serializing_if = "Option::is_none")]
    metrics: Option<Metrics>,
}

impl ImageFacts {
    pub(super) fn new(encoded: &EncodedImages) -> Self {
        let EncodedImages {
            info,
            tiled,
            steps,
            timings,
            measured,
            ..
        } = encoded;
        Self {
            seed: info.request.noise.seed,
            size: info.size(),
            num_inference_steps: info.request.sampling.steps,
            shift: info.request.sampling.shift(),
            schedule: info.request.schedule.clone(),
            adapters: UsedAdapter::all(&info.request.adapters),
            warnings: info.request.warnings.clone(),
            cache: info.request.cache.name(),
            cfg_gate_step: info.request.cfg_gate_step,
            steps: StepFacts::from(*steps),
            vae_use_tiling: tiled.map(|_| true),
            timings: (*timings).into(),
            measured: *measured,
            metrics: info
                .stage_metrics
                .then(|| Metrics::new(info, *timings, *measured)),
        }
    }
}
