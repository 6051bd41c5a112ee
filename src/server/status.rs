//! `GET /v1/status`: the model, the bounds and defaults of requests, and the load.

use std::sync::Arc;

use axum::Extension;
use axum::extract;
use axum::response::Response;
use kiln_models::pipeline::ModelInfo;
use serde::Serialize;
use serde_json::Value;
use utoipa::ToSchema;

use crate::checkpoint::PromptGuide;
use crate::engine::{Engine, State as EngineState};
use crate::request::{DEFAULT_NUM_INFERENCE_STEPS, DEFAULT_TRUE_CFG_SCALE};

use super::adapters::AdapterStatus;
use super::cache::CacheField;
use super::error::{ApiError, ErrorEnvelope};
use super::health;
use super::jobs::JobsStatus;
use super::json::json;
use super::schedule::ModelRecipe;
use super::{App, LoadedApp};

/// The model, the bounds and defaults of requests, and the load.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Status {
    /// `ready`, `draining`, `stopped` or `failed`.
    state: &'static str,
    /// The first name of the model.
    model: String,
    version: &'static str,
    /// Name of this server among others: the same as the header `x-kiln-instance`.
    instance: String,
    /// Backend and device; null for a server that generates no images itself.
    device: Option<String>,
    /// Data type of the weights; null for a server that generates no images itself.
    dtype: Option<&'static str>,
    requests: Requests,
    /// Image tokens up to which several requests share a denoising step; 0 if they never do.
    max_step_tokens: usize,
    limits: RequestLimits,
    defaults: Defaults,
    adapters: AdapterStatus,
    /// The durable jobs; null if the server was started without `--jobs`.
    jobs: Option<JobsStatus>,
    /// What a distilled model, or the adapter that is merged into it, was trained for; absent for others.
    #[serde(skip_serializing_if = "Option::is_none")]
    model_recipe: Option<ModelRecipe>,
    /// Hints for prompts, for a model that knows only some words; null for others.
    prompt_guide: Option<Guide>,
}

/// Numbers of unfinished requests.
#[derive(Debug, Serialize, ToSchema)]
struct Requests {
    /// Requests whose images are being generated.
    running: usize,
    /// Requests in the queue.
    waiting: usize,
}

/// Bounds of the parameters of a request.
#[derive(Debug, Serialize, ToSchema)]
struct RequestLimits {
    /// Heights and widths are rounded down to a multiple of this number, which is also their
    /// minimum.
    side_multiple: usize,
    /// Maximum of height and width.
    max_side: usize,
    /// Maximum number of pixels of all images of a request together.
    max_image_pixels: usize,
    max_steps: usize,
    max_num_images: usize,
}

/// Default values of the parameters of a request.
#[derive(Debug, Serialize, ToSchema)]
struct Defaults {
    width: usize,
    height: usize,
    num_inference_steps: usize,
    true_cfg_scale: f64,
    negative_prompt: Option<String>,
    /// The step cache of requests with at least 8 steps, as in a request.
    #[schema(value_type = CacheField)]
    cache: Value,
}

/// Hints for prompts.
#[derive(Debug, Serialize, ToSchema)]
struct Guide {
    /// One sentence about what the model can generate.
    about: &'static str,
    /// Example prompts.
    examples: &'static [&'static str],
    /// All words that the model knows, in groups.
    words: Vec<Words>,
}

/// A group of words.
#[derive(Debug, Serialize, ToSchema)]
struct Words {
    /// Name of the group.
    name: &'static str,
    words: &'static [&'static str],
}

impl Guide {
    fn new(guide: &PromptGuide) -> Self {
        let words = guide.words.iter();
        Self {
            about: guide.about,
            examples: guide.examples,
            words: words.map(|&(name, words)| Words { name, words }).collect(),
        }
    }
}

/// Returns the model, the bounds and defaults of requests, and the number of unfinished requests.
#[utoipa::path(
    get,
    path = "/status",
    tag = "status",
    responses((status = 200, body = Status), (status = "4XX", body = ErrorEnvelope)),
    security((), ("bearer" = [])),
)]
pub(super) async fn status(
    extract::State(server): extract::State<Arc<App>>,
    Extension(app): Extension<Arc<LoadedApp>>,
) -> Result<Response, ApiError> {
    let (engine, limits) = (app.engine.as_ref(), &app.limits);
    let (info, stats) = (
        engine.map(Engine::info),
        engine.map(Engine::stats).unwrap_or_default(),
    );
    let recipe = limits.recipe();
    json(&Status {
        state: health::state_name(&server.state().unwrap_or(EngineState::Ready)),
        model: app.model_name(None).to_owned(),
        version: crate::version::VERSION,
        instance: app.settings.instance.clone(),
        device: info.map(ModelInfo::device),
        dtype: info.map(|info| info.dtype),
        requests: Requests {
            running: stats.running,
            waiting: stats.waiting,
        },
        max_step_tokens: stats.max_step_tokens,
        limits: RequestLimits {
            side_multiple: limits.sizes.multiple,
            max_side: limits.sizes.max_side,
            max_image_pixels: limits.max_image_pixels,
            max_steps: limits.max_steps,
            max_num_images: limits.max_num_images,
        },
        defaults: Defaults {
            width: limits.sizes.default_side,
            height: limits.sizes.default_side,
            num_inference_steps: recipe
                .and_then(|recipe| recipe.steps)
                .unwrap_or(DEFAULT_NUM_INFERENCE_STEPS as usize),
            true_cfg_scale: recipe
                .and_then(|recipe| recipe.true_cfg_scale)
                .unwrap_or(DEFAULT_TRUE_CFG_SCALE),
            negative_prompt: app.settings.default_negative_prompt.clone(),
            cache: limits.caches.default.to_json(),
        },
        adapters: AdapterStatus::new(
            &app.adapters,
            stats.adapters.cache,
            app.settings.lora_updates,
            limits.merged.as_ref(),
        ),
        jobs: JobsStatus::of(&server).await,
        model_recipe: recipe.map(ModelRecipe::from),
        prompt_guide: app.prompt_guide.map(Guide::new),
    })
}
