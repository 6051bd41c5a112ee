//! `POST /v1/images/estimate`: how long an images request would take, without generating it.

use std::sync::Arc;
use std::time::Duration;

use axum::Extension;
use axum::response::Response;
use serde::Serialize;
use utoipa::ToSchema;

use super::LoadedApp;
use super::body::JsonObject;
use super::error::{ApiError, ErrorEnvelope};
use super::images::{self, ImagesRequest};
use super::json::json;

/// The estimated course of a request that arrives now.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Estimate {
    /// Whether the request would be accepted. If not, the queue is full, the request could not keep
    /// its `deadline_ms`, or the server is shutting down.
    accepted: bool,
    /// Number of requests that would come before it.
    position: usize,
    /// Seconds until it would start, from the measured speed; null if the server has not generated
    /// an image yet.
    estimated_wait: Option<f64>,
    /// Seconds from its start to its end; null if the server has not generated an image yet.
    estimated_time: Option<f64>,
    /// Size of the images, `WIDTHxHEIGHT` in pixels.
    size: String,
    num_inference_steps: usize,
}

/// Estimates how long an images request would wait and how long it would take. The request is
/// checked as by `/v1/images/generations`, and nothing is generated.
#[utoipa::path(
    post,
    path = "/images/estimate",
    tag = "estimate",
    request_body = ImagesRequest,
    responses(
        (status = 200, body = Estimate),
        (status = "4XX", body = ErrorEnvelope),
        (status = "5XX", body = ErrorEnvelope),
    ),
    security((), ("bearer" = [])),
)]
pub(super) async fn estimate(
    Extension(app): Extension<Arc<LoadedApp>>,
    JsonObject(object): JsonObject,
) -> Result<Response, ApiError> {
    let parsed = images::parse(object)?;
    let model = parsed.model().map(str::to_owned);
    let prepared = parsed.request.prepare(&app, model.as_deref());
    let (info, job, options) = prepared.await?;
    let forecast = app.engine()?.forecast(&job, &options);
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
