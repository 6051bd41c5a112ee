//! `GET /v1/status`: what a form for requests must know, and what the server is at.

use std::sync::Arc;

use axum::extract::State;
use axum::response::Response;
use serde::Serialize;
use utoipa::ToSchema;

use crate::checkpoint::PromptGuide;
use crate::request::{DEFAULT_NUM_INFERENCE_STEPS, DEFAULT_TRUE_CFG_SCALE};

use super::App;
use super::error::{ApiError, ErrorEnvelope};
use super::health;
use super::json::json;

/// The model, what may be asked of it, and what the server does now.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Status {
    /// `starting`, `ready`, `draining`, `stopped` or `failed`.
    state: &'static str,
    /// The first of the model's names.
    model: String,
    version: &'static str,
    /// The backend's name and device.
    device: String,
    /// Type of the weights.
    dtype: &'static str,
    requests: Requests,
    limits: RequestLimits,
    defaults: Defaults,
    /// Of a model that does not understand all words.
    prompt_guide: Option<Guide>,
}

#[derive(Debug, Serialize, ToSchema)]
struct Requests {
    /// That are encoded.
    running: usize,
    /// That wait for the device.
    waiting: usize,
}

/// Bounds of a request's fields.
#[derive(Debug, Serialize, ToSchema)]
struct RequestLimits {
    /// Heights and widths are rounded down to a multiple of this, which is also the smallest.
    side_multiple: usize,
    max_side: usize,
    /// Of all images of a request together.
    max_image_pixels: usize,
    max_steps: usize,
    max_num_images: usize,
}

/// What a request has that says nothing else.
#[derive(Debug, Serialize, ToSchema)]
struct Defaults {
    width: usize,
    height: usize,
    num_inference_steps: u32,
    true_cfg_scale: f64,
    negative_prompt: Option<String>,
}

/// How to word a prompt.
#[derive(Debug, Serialize, ToSchema)]
struct Guide {
    /// What the model draws, in a sentence.
    about: &'static str,
    examples: &'static [&'static str],
    /// All the words that it knows.
    words: Vec<Words>,
}

#[derive(Debug, Serialize, ToSchema)]
struct Words {
    /// What they have in common.
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

/// Tells which model is served, what may be asked of it, and how many requests there are.
#[utoipa::path(
    get,
    path = "/v1/status",
    responses((status = 200, body = Status), (status = "4XX", body = ErrorEnvelope)),
    security((), ("bearer" = [])),
)]
pub(super) async fn status(State(app): State<Arc<App>>) -> Result<Response, ApiError> {
    let (info, stats, limits) = (app.engine.info(), app.engine.stats(), &app.limits);
    json(&Status {
        state: health::state_name(&app.engine.state()),
        model: app.model_name(None).to_owned(),
        version: crate::version::VERSION,
        device: info.device(),
        dtype: info.dtype,
        requests: Requests {
            running: stats.running,
            waiting: stats.waiting,
        },
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
            num_inference_steps: DEFAULT_NUM_INFERENCE_STEPS,
            true_cfg_scale: DEFAULT_TRUE_CFG_SCALE,
            negative_prompt: app.settings.default_negative_prompt.clone(),
        },
        prompt_guide: app.settings.prompt_guide.map(Guide::new),
    })
}
