//! The part of the API of AUTOMATIC1111's web UI that clients such as Open WebUI and `SillyTavern`
//! use to generate images.
//!
//! Every field that these clients always send is accepted. A field that asks for something that
//! kiln cannot do is refused.

mod absent;
mod answer;
mod loras;
mod options;
mod progress;
mod tags;
mod txt2img;

use std::num::NonZeroUsize;
use std::sync::Arc;

use axum::extract::{FromRequest, Request};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde_json::{Map, Value};
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::App;
use super::body::read_object;
use super::error::{ApiError, ErrorEnvelope};

/// Qwen-Image's only sampler and schedule, under the web UI's names.
const SAMPLER: &str = "Euler";
const SCHEDULER: &str = "Automatic";

/// Steps from one preview to the next.
const PREVIEW_STEPS: NonZeroUsize = NonZeroUsize::new(5).expect("5 is not 0");

/// The routes below `/sdapi`.
pub(super) fn routes() -> OpenApiRouter<Arc<App>> {
    OpenApiRouter::new()
        .routes(routes!(txt2img::txt2img))
        .routes(routes!(progress::progress))
        .routes(routes!(progress::interrupt))
        .routes(routes!(options::options, options::set_options))
        .routes(routes!(options::sd_models))
        .routes(routes!(options::samplers))
        .routes(routes!(options::schedulers))
        .routes(routes!(options::upscalers))
        .routes(routes!(options::latent_upscale_modes))
        .routes(routes!(options::sd_vae))
        .routes(routes!(absent::cmd_flags))
        .routes(routes!(absent::embeddings))
        .routes(routes!(absent::face_restorers))
        .routes(routes!(absent::hypernetworks))
        .routes(routes!(loras::loras))
        .routes(routes!(absent::memory))
        .routes(routes!(absent::prompt_styles))
        .routes(routes!(absent::realesrgan_models))
        .routes(routes!(absent::script_info))
        .routes(routes!(absent::scripts))
        .routes(routes!(absent::refresh_checkpoints))
        .routes(routes!(absent::refresh_embeddings))
        .routes(routes!(loras::refresh_loras))
        .routes(routes!(absent::refresh_vae))
        .routes(routes!(absent::reload_checkpoint))
        .routes(routes!(absent::unload_checkpoint))
}

/// Extracts the JSON object in the body of a request. As in the web UI, a body without a content type
/// is JSON.
struct SdapiObject(Map<String, Value>);

impl FromRequest<Arc<App>> for SdapiObject {
    type Rejection = SdapiError;

    async fn from_request(request: Request, app: &Arc<App>) -> Result<Self, SdapiError> {
        Ok(Self(read_object(request, app).await?))
    }
}

/// The response to a request without a key.
pub(super) fn unauthorized() -> Response {
    error(ApiError::UnauthorizedBasic)
}

/// The response to a request that fails before it reaches its route.
pub(super) fn error(error: ApiError) -> Response {
    SdapiError(error).into_response()
}

/// An error in the form that clients of this API show.
#[derive(Debug)]
struct SdapiError(ApiError);

/// The body of an error response: as for the other routes, plus the message in the web UI's place.
#[derive(Serialize, ToSchema)]
struct SdapiErrorBody {
    #[serde(flatten)]
    envelope: ErrorEnvelope,
    /// The same text as `error.message`.
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

/// A response with status 200 and this body.
fn json(body: &impl Serialize) -> Result<Response, SdapiError> {
    Ok(super::json::json(body)?)
}
