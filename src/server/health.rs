//! Whether the process is alive, and whether requests should be sent to it.

use std::sync::Arc;

use axum::extract::State;
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use serde_json::json;

use crate::engine::State as EngineState;

use super::App;

/// Tells whether the server is alive: it starts, works or finishes what it has.
#[utoipa::path(
    get,
    path = "/health",
    responses((status = 200, description = "It is."), (status = 503, description = "It is not.")),
)]
pub(super) async fn health(State(app): State<Arc<App>>) -> Response {
    let is_dead = matches!(
        app.engine.state(),
        EngineState::Stopped | EngineState::Failed(_)
    );
    // The body is the reference's.
    status(!is_dead, ["healthy", "unhealthy"])
}

/// The same as `/health`.
#[utoipa::path(
    get,
    path = "/health/live",
    responses((status = 200, description = "It is."), (status = 503, description = "It is not.")),
)]
pub(super) async fn live(app: State<Arc<App>>) -> Response {
    health(app).await
}

/// Tells whether requests are taken and will be generated: the warm-up is over and nobody has asked
/// the server to end.
#[utoipa::path(
    get,
    path = "/health/ready",
    responses((status = 200, description = "They are."), (status = 503, description = "They are not.")),
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
