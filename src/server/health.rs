//! `GET /health`, `/health/live` and `/health/ready`: liveness and readiness of the server.

use std::sync::Arc;

use axum::extract::State;
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use utoipa::ToSchema;

use crate::engine::State as EngineState;
use crate::runtime::Progress;

use super::App;
use super::error::ApiError;

/// Whether the server accepts requests, and how far its start is. The fields after `reason` are
/// there while the model is found, downloaded, loaded and warmed up.
#[derive(Debug, Default, Serialize, ToSchema)]
pub(super) struct Readiness {
    /// `loading`, `ready`, `draining`, `stopped` or `failed`.
    status: &'static str,
    /// Why the server has failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
    /// `finding`, `downloading`, `loading` or `warming_up`.
    #[serde(skip_serializing_if = "Option::is_none")]
    stage: Option<&'static str>,
    /// Seconds in this stage.
    #[serde(skip_serializing_if = "Option::is_none")]
    elapsed: Option<f64>,
    /// The part of this stage that is done, from 0 to 1; absent if it is not known.
    #[serde(skip_serializing_if = "Option::is_none")]
    progress: Option<f64>,
    /// Bytes that are downloaded or loaded.
    #[serde(skip_serializing_if = "Option::is_none")]
    bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    total_bytes: Option<u64>,
    /// Files that are downloaded.
    #[serde(skip_serializing_if = "Option::is_none")]
    files: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    total_files: Option<usize>,
    /// Estimated seconds until the end of this stage; absent if they are not known.
    #[serde(skip_serializing_if = "Option::is_none")]
    estimated_rest: Option<f64>,
}

impl Readiness {
    fn loading(progress: &Progress) -> Self {
        let amount = &progress.amount;
        let has_bytes = amount.total_bytes > 0;
        let has_files = amount.total_files > 0;
        Self {
            status: "loading",
            stage: Some(progress.stage.name()),
            elapsed: Some(progress.elapsed.as_secs_f64()),
            progress: progress.share(),
            bytes: has_bytes.then_some(amount.bytes),
            total_bytes: has_bytes.then_some(amount.total_bytes),
            files: has_files.then_some(amount.files),
            total_files: has_files.then_some(amount.total_files),
            estimated_rest: progress.estimated_rest.map(|rest| rest.as_secs_f64()),
            ..Self::default()
        }
    }

    fn of_engine(state: &EngineState) -> Self {
        let reason = match state {
            EngineState::Failed(error) => Some(error.to_string()),
            _ => None,
        };
        Self {
            status: state_name(state),
            reason,
            ..Self::default()
        }
    }
}

const HEALTHY: &str = r#"{"status":"healthy"}"#;
const UNHEALTHY: &str = r#"{"status":"unhealthy"}"#;

/// Reports whether the server is alive: starting, ready, or finishing its last requests.
#[utoipa::path(
    get,
    path = "/health",
    tag = "health",
    responses(
        (status = 200, description = "The server is alive."),
        (status = 503, description = "The engine has stopped or failed; the server must be restarted."),
    ),
)]
pub(super) async fn health(State(app): State<Arc<App>>) -> Response {
    let state = app.state();
    let is_dead = matches!(state, Some(EngineState::Stopped | EngineState::Failed(_)));
    // The same body as vLLM-Omni's.
    if is_dead {
        answer(StatusCode::SERVICE_UNAVAILABLE, UNHEALTHY)
    } else {
        answer(StatusCode::OK, HEALTHY)
    }
}

/// The same as `/health`.
#[utoipa::path(
    get,
    path = "/health/live",
    tag = "health",
    responses(
        (status = 200, description = "The server is alive."),
        (status = 503, description = "The engine has stopped or failed; the server must be restarted."),
    ),
)]
pub(super) async fn live(app: State<Arc<App>>) -> Response {
    health(app).await
}

/// Reports whether the server accepts requests: the model is loaded and warmed up, and the server is
/// not shutting down. During the start the response says how far it is.
#[utoipa::path(
    get,
    path = "/health/ready",
    tag = "health",
    responses(
        (status = 200, description = "The server accepts requests.", body = Readiness),
        (
            status = 503,
            description = "The server is starting, shutting down, stopped or failed.",
            body = Readiness,
        ),
    ),
)]
pub(super) async fn ready(State(app): State<Arc<App>>) -> Result<Response, ApiError> {
    let state = app.state();
    let readiness = match &state {
        Some(state) => Readiness::of_engine(state),
        None => Readiness::loading(&app.start.progress()),
    };
    let status = match state {
        Some(EngineState::Ready) => StatusCode::OK,
        _ => StatusCode::SERVICE_UNAVAILABLE,
    };
    let body = serde_json::to_vec(&readiness).map_err(ApiError::Response)?;
    Ok(answer(status, body))
}

/// The state in responses.
pub(super) fn state_name(state: &EngineState) -> &'static str {
    match state {
        EngineState::Starting => "loading",
        EngineState::Ready => "ready",
        EngineState::Draining => "draining",
        EngineState::Stopped => "stopped",
        EngineState::Failed(_) => "failed",
    }
}

fn answer(status: StatusCode, body: impl IntoResponse) -> Response {
    (status, [(CONTENT_TYPE, "application/json")], body).into_response()
}
