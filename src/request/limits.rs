//! Defaults and limits of a request.

use kiln_models::pipeline::ImageSizes;
use kiln_models::sampling::SchedulerConfig;

use super::{Catalogue, Recipe, StepCaches};

/// Number of denoising steps if a request gives none, as in diffusers.
pub const DEFAULT_NUM_INFERENCE_STEPS: u32 = 50;
/// Guidance scale if a request gives none, as in diffusers.
pub const DEFAULT_TRUE_CFG_SCALE: f64 = 4.0;
/// Largest guidance scale, as in the images API of vLLM-Omni. The smallest is 0.
pub const MAX_TRUE_CFG_SCALE: f64 = 20.0;
/// Smallest time shift. Far below it, f32 has no noise level between the first and the last.
pub const MIN_SHIFT: f64 = 0.001;
/// Largest time shift. At this value 99 % of the steps are above a noise level of 0.5.
pub const MAX_SHIFT: f64 = 100.0;
/// Largest number of pixels of all images of a request: 7680x4320, the limit of vLLM-Omni.
pub const DEFAULT_MAX_IMAGE_PIXELS: usize = 33_177_600;
/// Largest number of steps: the model was trained with 1,000 timesteps, more steps add nothing.
pub const DEFAULT_MAX_STEPS: usize = 1000;
/// Largest number of images of a request, as in the API of `OpenAI`.
pub const DEFAULT_MAX_NUM_IMAGES: usize = 10;
/// Largest size of a prompt in bytes. Longer prompts have more tokens than the models accept, and are
/// refused before they are tokenized.
pub const MAX_PROMPT_BYTES: usize = 64 << 10;

/// Limits of a request.
#[derive(Debug, Clone, PartialEq)]
pub struct Limits {
    /// The sizes that the model can generate. Heights and widths are rounded down to its multiple.
    pub sizes: ImageSizes,
    /// Largest number of pixels of all images of a request together.
    pub max_image_pixels: usize,
    /// Largest number of denoising steps.
    pub max_steps: usize,
    /// Largest number of images of one request.
    pub max_num_images: usize,
    /// The step caches that fit the model, and the default.
    pub caches: StepCaches,
    /// The adapters that a request may name.
    pub adapters: Catalogue,
    /// The model's own schedule; `None` if the model is not known.
    pub scheduler: Option<SchedulerConfig>,
    /// What a distilled model was trained for.
    pub model_recipe: Option<Recipe>,
}

impl Limits {
    /// The default limits, with the image sizes of a model.
    pub fn for_sizes(sizes: ImageSizes) -> Self {
        Self {
            sizes,
            ..Self::for_any_model()
        }
    }

    /// Limits that hold for every model, for refusing a request before a model is opened. The image
    /// sizes depend on the model, so only the number of pixels limits the sides.
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
            caches: StepCaches::default(),
            adapters: Catalogue::default(),
            scheduler: None,
            model_recipe: None,
        }
    }
}
