//! The parameters of a request as the client gave them.

use super::{GivenAdapter, GivenCache, GivenSchedule};

/// Unchecked parameters of a request; `None` for a parameter that was not given.
///
/// The integers are wide enough for any plausible number of JSON or a command line, so that all
/// bounds are checked in one place, with one error message each.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GenerationParams {
    /// The prompt; it may be empty.
    pub prompt: String,
    /// An empty negative prompt counts as given and enables guidance.
    pub negative_prompt: Option<String>,
    pub true_cfg_scale: Option<f64>,
    pub height: Option<i128>,
    pub width: Option<i128>,
    pub num_inference_steps: Option<i128>,
    /// Number of steps if neither the request nor a recipe has one; `None` for the default.
    pub fallback_steps: Option<i128>,
    pub shift: Option<f64>,
    /// The noise level of each step.
    pub sigmas: Option<Vec<f64>>,
    pub schedule: Option<GivenSchedule>,
    pub num_images: Option<i128>,
    pub seed: Option<i128>,
    pub cache: Option<GivenCache>,
    pub cfg_gate_step: Option<f64>,
    pub adapters: Vec<GivenAdapter>,
}
