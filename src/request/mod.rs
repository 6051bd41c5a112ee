//! A request, from the parameters of a client to the job of the engine.
//!
//! [`GenerationParams`] holds the parameters as given. [`GenerationRequest::new`] fills in the
//! defaults and checks every value against [`Limits`], so that a [`GenerationRequest`] is always
//! valid. [`GenerationRequest::tokenize`] and [`GenerationRequest::into_job`] convert it to a
//! [`Job`].
//!
//! [`Job`]: kiln_models::job::Job

mod adapters;
mod cache;
mod checked;
mod job;
mod levels;
mod limits;
mod metadata;
mod params;
mod recipe;
mod recipes;
mod schedule;
mod written;

pub use self::adapters::{
    AdapterInfo, Catalogue, ChosenAdapter, GivenAdapter, MAX_ADAPTER_RANKS, MAX_ADAPTER_SCALE,
    MAX_ADAPTERS,
};
pub use self::cache::{
    CacheChoice, DBCACHE_KEYS, DbCacheChoice, GivenCache, InvalidCache, MAGCACHE_KEYS,
    RequestCache, StepCaches, StepsMask, mag_ratios, only_mag_ratios,
};
pub use self::checked::{GenerationRequest, InvalidRequest, random_u64};
pub use self::job::{InvalidPrompt, PromptTokens};
pub use self::limits::{
    DEFAULT_MAX_IMAGE_PIXELS, DEFAULT_MAX_NUM_IMAGES, DEFAULT_MAX_STEPS,
    DEFAULT_NUM_INFERENCE_STEPS, DEFAULT_TRUE_CFG_SCALE, Limits, MAX_PROMPT_BYTES, MAX_SHIFT,
    MAX_TRUE_CFG_SCALE, MIN_SHIFT,
};
pub use self::params::GenerationParams;
pub use self::recipe::{Recipe, ScheduleOrigin, header_recipe, sidecar_recipe};
pub use self::recipes::{Fingerprint, fused_lightning, known_recipe};
pub use self::schedule::{GivenSchedule, InvalidSchedule, RequestSchedule};
pub use self::written::{Integer, NotASize, NotAnInteger, WrittenSize};
