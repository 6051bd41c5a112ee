//! `GET /health`, `/health/live` and `/health/ready`: liveness and readiness of the server.

use std::sync::Arc;

use axum::extract::State;
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use serde_json::json;

use crate::engine::State as EngineState;

use super::App;

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
    let is_dead = matches!(
        app.engine.state(),
        EngineState::Stopped | EngineState::Failed(_)
    );
    // The same body as vLLM-Omni's.
    status(!is_dead, ["healthy", "unhealthy"])
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

/// Reports whether the server accepts requests: the warm-up is over, and the server is not shutting
/// down.
#[utoipa::path(
    get,
    path = "/health/ready",
    tag = "health",
    responses(
        (status = 200, description = "The server accepts requests."),
        (status = 503, description = "The server is starting, shutting down, stopped or failed."),
    ),
)]
pub(super) async fn ready(State(app): State<Arc<App>>) -> Response {
    let state = app.engine.state();
    let name = state_name(&state);
    match &state {
        EngineState::Failed(error) => {
            let body = json!({ "status": name, "reason": error.to_string() });
            answer(StatusCode::SERVICE_UNAVAILABLE, body.to_string())
        }
        _ => status(matches!(state, EngineState::Ready), [name, name]),
    }
}

/// The state in responses.
pub(super) fn state_name(state: &EngineState) -> &'static str {
    match state {
        EngineState::Starting => "starting",
        EngineState::Ready => "ready",
        EngineState::Draining => "draining",
        EngineState::Stopped => "stopped",
        EngineState::Failed(_) => "failed",
    }
}

fn status(is_good: bool, [good, bad]: [&str; 2]) -> Response {
    let (status, name) = if is_good {
        (StatusCode::OK, good)
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, bad)
    };
    answer(status, format!("{{\"status\":\"{name}\"}}"))
}

fn answer(status: StatusCode, body: String) -> Response {
    (status, [(CONTENT_TYPE, "application/json")], body).into_response()
}
