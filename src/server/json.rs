//! JSON responses.

use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use serde::Serialize;

use super::error::ApiError;

/// A response with status 200 and this body.
pub(super) fn json(body: &impl Serialize) -> Result<Response, ApiError> {
    let body = serde_json::to_vec(body).map_err(ApiError::Response)?;
    Ok(([(CONTENT_TYPE, "application/json")], body).into_response())
}
