//! `POST /v1/images/estimate`: how long a request would take, without drawing it.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::response::Response;
use serde::Serialize;
use utoipa::ToSchema;

use super::App;
use super::body::JsonObject;
use super::error::{ApiError, ErrorEnvelope};
use super::images::{self, ImagesRequest};
use super::json::json;

/// What would become of a request that came now.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Estimate {
    /// Whether it would be taken; if not, the queue is full or the server is about to end.
    accepted: bool,
    /// Requests that would come before it.
    position: usize,
    /// Seconds until it is begun, from the measured speed; null before anything has been encoded.
    estimated_wait: Option<f64>,
    /// Seconds from then until it is encoded.
    estimated_time: Option<f64>,
    /// `WIDTHxHEIGHT` in pixels, as the images would have it.
    size: String,
    num_inference_steps: usize,
}

/// Tells how long a request would wait and how long it would take. It is checked as
/// `/v1/images/generations` checks it, and nothing is encoded.
#[utoipa::path(
    post,
    path = "/v1/images/estimate",
    request_body = ImagesRequest,
    responses(
        (status = 200, body = Estimate),
        (status = "4XX", body = ErrorEnvelope),
        (status = "5XX", body = ErrorEnvelope),
    ),
    security((), ("bearer" = [])),
)]
pub(super) async fn estimate(
    State(app): State<Arc<App>>,
    JsonObject(object): JsonObject,
) -> Result<Response, ApiError> {
    let parsed = images::parse(object)?.parsed;
    let (info, job) = parsed.prepare(&app, String::new(), None).await?;
    let forecast = app.engine.forecast(&job);
    let seconds = |time: Option<Duration>| time.as_ref().map(Duration::as_secs_f64);
    json(&Estimate {
        accepted: forecast.is_accepted,
        position: forecast.position,
        estimated_wait: seconds(forecast.estimated_wait),
        estimated_time: seconds(forecast.estimated_work),
        size: info.size(),
        num_inference_steps: job.sampling.steps,
    })
}
