use std::sync::Arc;

use axum::extract::State;
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};

use crate::engine::State as EngineState;

use super::App;

/// Tells whether requests are taken.
#[utoipa::path(
    get,
    path = "/health",
    responses((status = 200, description = "They are."), (status = 503, description = "They are not.")),
)]
pub(super) async fn health(State(app): State<Arc<App>>) -> Response {
    // The body is the reference's.
    let (status, body) = if matches!(app.engine.state(), EngineState::Ready) {
        (StatusCode::OK, r#"{"status":"healthy"}"#)
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, r#"{"status":"unhealthy"}"#)
    };
    (status, [(CONTENT_TYPE, "application/json")], body).into_response()
}
