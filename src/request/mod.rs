//! A request, from what a client wrote to what the engine runs.
//!
//! [`GenerationParams`] holds what was written. [`GenerationRequest::new`] fills in the defaults and
//! checks every value against [`Limits`], so that a bad size, step count or scale cannot exist after
//! it. [`GenerationRequest::tokenize`] and [`GenerationRequest::into_job`] make the [`Job`] of it.
//!
//! [`Job`]: kiln_models::job::Job

mod checked;
mod job;
mod limits;
mod metadata;
mod params;

pub use self::checked::{GenerationRequest, InvalidRequest, random_u64};
pub use self::job::{InvalidPrompt, PromptTokens};
pub use self::limits::{
    DEFAULT_MAX_IMAGE_PIXELS, DEFAULT_MAX_NUM_IMAGES, DEFAULT_MAX_STEPS,
    DEFAULT_NUM_INFERENCE_STEPS, DEFAULT_TRUE_CFG_SCALE, Limits, MAX_PROMPT_BYTES,
};
pub use self::params::GenerationParams;
