//! `POST /v1/images/generations`: the images API of `OpenAI`.

mod events;
mod request;
mod response;

use std::sync::Arc;

use axum::Extension;
use axum::response::Response;

use crate::request::random_u64;

use super::LoadedApp;
use super::body::JsonObject;
use super::error::{ApiError, ErrorEnvelope};
use super::json::json;
use super::stream;

use self::events::ImagesEvents;
use self::request::{Quality, ResponseFormat};
use self::response::ImagesResponse;

pub(super) use self::events::{CompletedEvent, PartialImageEvent};
pub(super) use self::request::{ImagesRequest, parse};
pub(super) use self::response::SEED_HEADER;

/// Generates images from a prompt.
#[utoipa::path(
    post,
    path = "/images/generations",
    tag = "images",
    request_body = ImagesRequest,
    responses(
        (status = 200, content(
            (ImagesResponse = "application/json"),
            (String = "text/event-stream"),
            (String = "image/png"),
            (String = "image/jpeg"),
            (String = "image/webp"),
            (String = "application/zip"),
        )),
        (status = "4XX", body = ErrorEnvelope),
        (status = "5XX", body = ErrorEnvelope),
    ),
    security((), ("bearer" = [])),
)]
pub(super) async fn generations(
    Extension(app): Extension<Arc<LoadedApp>>,
    JsonObject(object): JsonObject,
) -> Result<Response, ApiError> {
    let parsed = parse(object)?;
    let id = format!("img-{:016x}", random_u64());
    let model = parsed.fields.model.as_deref();
    let running = parsed
        .request
        .submit(&app, id, model, parsed.previews)
        .await?;
    if parsed.fields.stream == Some(true) {
        let quality = parsed.fields.quality.unwrap_or(Quality::Auto);
        return Ok(stream::respond(running, ImagesEvents { quality }));
    }
    running
        .finish(move |encoded| match parsed.fields.response_format {
            None | Some(ResponseFormat::B64Json) => json(&ImagesResponse::new(&encoded, false)),
            Some(ResponseFormat::Url) => json(&ImagesResponse::new(&encoded, true)),
            Some(ResponseFormat::File) => response::file(encoded),
        })
        .await
}
