//! The API of AUTOMATIC1111's web UI, as far as its clients need it to draw: Open WebUI and
//! SillyTavern among others.
//!
//! What these clients send, whatever their users set, is taken; what asks for a thing that cannot
//! be done here is refused.

mod answer;
mod board;
mod options;
mod txt2img;

use std::num::NonZeroUsize;
use std::sync::Arc;

use axum::Router;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use serde::Serialize;
use utoipa::{OpenApi, ToSchema};

use super::App;
use super::error::{ApiError, ErrorEnvelope};

pub(super) use self::board::JobRegistry;

/// Of the paths of all routes.
pub(super) const PREFIX: &str = "/sdapi/";

/// The one way of Qwen-Image from noise to image, in the web UI's terms.
const SAMPLER: &str = "Euler";
const SCHEDULER: &str = "Automatic";

/// Steps from one preview to the next.
const PREVIEW_STEPS: NonZeroUsize = NonZeroUsize::new(5).expect("5 is not 0");

pub(super) fn routes() -> Router<Arc<App>> {
    Router::new()
        .route("/sdapi/v1/txt2img", post(txt2img::txt2img))
        .route("/sdapi/v1/progress", get(board::progress))
        .route("/sdapi/v1/interrupt", post(board::interrupt))
        .route(
            "/sdapi/v1/options",
            get(options::options).post(options::set_options),
        )
        .route("/sdapi/v1/sd-models", get(options::sd_models))
        .route("/sdapi/v1/samplers", get(options::samplers))
        .route("/sdapi/v1/schedulers", get(options::schedulers))
        .route("/sdapi/v1/upscalers", get(options::upscalers))
        .route(
            "/sdapi/v1/latent-upscale-modes",
            get(options::latent_upscale_modes),
        )
        .route("/sdapi/v1/sd-vae", get(options::sd_vae))
}

/// What is added to the description of the API.
#[derive(OpenApi)]
#[openapi(paths(
    txt2img::txt2img,
    board::progress,
    board::interrupt,
    options::options,
    options::set_options,
    options::sd_models,
    options::samplers,
    options::schedulers,
    options::upscalers,
    options::latent_upscale_modes,
    options::sd_vae,
))]
pub(super) struct Document;

/// A failure, in a form that the clients of this API show.
#[derive(Debug)]
pub(super) struct SdapiError(ApiError);

/// The body of every error: that of the other routes, and the message where the web UI has it.
#[derive(Serialize, ToSchema)]
struct SdapiErrorBody {
    #[serde(flatten)]
    envelope: ErrorEnvelope,
    /// `error.message` once more.
    detail: String,
}

impl<E: Into<ApiError>> From<E> for SdapiError {
    fn from(error: E) -> Self {
        Self(error.into())
    }
}

impl IntoResponse for SdapiError {
    fn into_response(self) -> Response {
        let envelope = self.0.envelope();
        let detail = envelope.message().to_owned();
        self.0.respond(&SdapiErrorBody { envelope, detail })
    }
}

fn json(body: &impl Serialize) -> Result<Response, SdapiError> {
    Ok(super::json::json(body)?)
}
