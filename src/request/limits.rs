//! Defaults of a request, and the bounds that it is checked against.

use kiln_models::pipeline::ImageSizes;

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
