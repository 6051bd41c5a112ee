//! A request as a client wrote it: the values, and the names under which they came.

use std::time::Duration;

use kiln_models::noise::NoiseGenerator;

use crate::image::Encoding;
use crate::request::GenerationParams;

use super::adapters::WrittenAdapter;

/// A request that has been read but not checked against the model and the server's limits.
#[derive(Debug)]
pub(super) struct ParsedRequest {
    pub(super) params: GenerationParams,
    /// Adapters besides those of `params`, which are looked up when the request is checked.
    pub(super) adapters: Vec<WrittenAdapter>,
    pub(super) names: WireNames,
    pub(super) encoding: Encoding,
    /// `None` selects the server's noise generator.
    pub(super) noise_generator: Option<NoiseGenerator>,
    /// Whether the response has `metrics`.
    pub(super) stage_metrics: bool,
    /// Time from the arrival until the images must be finished.
    pub(super) deadline: Option<Duration>,
}

/// The keys under which a client sent its values, for error messages.
#[derive(Debug, Clone, Copy)]
pub(super) struct WireNames {
    pub(super) prompt: &'static str,
    /// Whether height and width came as `size`.
    pub(super) size_given: bool,
    pub(super) steps: &'static str,
    pub(super) scale: &'static str,
    pub(super) images: &'static str,
    pub(super) adapters: &'static str,
}

impl WireNames {
    /// The keys of `/v1/images/generations`.
    pub(super) const OF_IMAGES: Self = Self {
        prompt: "prompt",
        size_given: true,
        steps: "num_inference_steps",
        scale: "true_cfg_scale",
        images: "n",
        adapters: "loras",
    };

    /// The client's name of a field of [`GenerationParams`].
    pub(super) fn of(&self, field: &'static str) -> &'static str {
        match field {
            "prompt" => self.prompt,
            "height" | "width" if self.size_given => "size",
            "num_inference_steps" => self.steps,
            "true_cfg_scale" => self.scale,
            "num_images" => self.images,
            "adapters" => self.adapters,
            name => name,
        }
    }
}
