//! `POST /v1/chat/completions`: images as the answer to the last user message.

mod events;
mod ignored;
mod messages;
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

use self::request::ChatRequest;
use self::response::{ChatCompletion, ImagePart};

pub(super) use self::events::ChatCompletionChunk;

/// Generates images from the text of the last user message.
#[utoipa::path(
    post,
    path = "/chat/completions",
    tag = "chat",
    request_body = ChatRequest,
    responses(
        (status = 200, content(
            (ChatCompletion = "application/json"),
            (String = "text/event-stream"),
        )),
        (status = "4XX", body = ErrorEnvelope),
        (status = "5XX", body = ErrorEnvelope),
    ),
    security((), ("bearer" = [])),
)]
pub(super) async fn chat_completions(
    Extension(app): Extension<Arc<LoadedApp>>,
    JsonObject(object): JsonObject,
) -> Result<Response, ApiError> {
    let parsed = request::parse(object)?;
    let id = format!("chatcmpl-{:016x}", random_u64());
    let model = parsed.model.as_deref();
    let wants_text = parsed.wants_text;
    let running = parsed
        .request
        .submit(&app, id, model, parsed.previews)
        .await?;
    if let Some(format) = parsed.stream {
        return Ok(stream::respond(running, format));
    }
    running
        .finish(move |encoded| {
            let parts = ImagePart::all(&encoded);
            json(&ChatCompletion::new(&encoded, &parts, wants_text))
        })
        .await
}
