//! A request as its client wrote it.

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
