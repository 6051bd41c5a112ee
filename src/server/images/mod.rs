//! `POST /v1/images/generations`: the images API of `OpenAI`.

mod events;
mod request;
mod response;

use std::sync::Arc;

use axum::Extension;
use axum::http::HeaderMap;
use axum::response::Response;

use crate::jobs::JobObject;
use crate::request::random_u64;

use super::LoadedApp;
use super::body::JsonObject;
use super::error::{ApiError, ErrorEnvelope};
use super::jobs::{self, Jobs};
use super::json::json;
use super::stream;

use self::events::ImagesEvents;
use self::request::{Quality, ResponseFormat};
use self::response::ImagesResponse;

pub(super) use self::events::{CompletedEvent, PartialImageEvent};
pub(super) use self::request::{ImagesRequest, JobBody, JobBodySchema, parse};
pub(super) use self::response::SEED_HEADER;

/// Generates images from a prompt. With the header `Prefer: respond-async` and `--jobs`, the request is
/// stored as a job instead, as by `/v1/images/jobs`.
#[utoipa::path(
    post,
    path = "/images/generations",
    tag = "images",
    request_body = ImagesRequest,
    params(("Prefer" = Option<String>, Header, description = "`respond-async` stores the request as a job.")),
    responses(
        (status = 200, content(
            (ImagesResponse = "application/json"),
            (String = "text/event-stream"),
            (String = "image/png"),
            (String = "image/jpeg"),
            (String = "image/webp"),
            (String = "application/zip"),
        )),
        (status = 202, body = JobObject, description = "With `Prefer: respond-async`: the job."),
        (status = "4XX", body = ErrorEnvelope),
        (status = "5XX", body = ErrorEnvelope),
    ),
    security((), ("bearer" = [])),
)]
pub(super) async fn generations(
    Extension(app): Extension<Arc<LoadedApp>>,
    jobs: Result<Jobs, ApiError>,
    headers: HeaderMap,
    JsonObject(object): JsonObject,
) -> Result<Response, ApiError> {
    // A server may leave a preference out: one without jobs answers with the images.
    if let Ok(jobs) = jobs
        && jobs::prefers_async(&headers)
    {
        return jobs.submit(&headers, object).await;
    }
    let parsed = parse(object)?.without_webhook()?;
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
