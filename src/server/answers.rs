//! What every answer has: the name of the server, the id of its request in errors, the load if the
//! client asks for it, and the request to go elsewhere once the server is about to end.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::header::CONNECTION;
use axum::http::{HeaderName, HeaderValue};
use axum::middleware::Next;
use axum::response::Response;

use super::App;
use super::orca;
use super::request_id::{self, REQUEST_ID};

/// [`Settings::instance`](super::Settings::instance) of the server that answers.
pub(super) const INSTANCE: HeaderName = HeaderName::from_static("x-kiln-instance");

/// Middleware that adds the headers of every answer.
pub(super) async fn add_headers(
    State(app): State<Arc<App>>,
    request: Request,
    next: Next,
) -> Response {
    let id = request.headers().get(REQUEST_ID);
    let id = id.and_then(|id| Some(id.to_str().ok()?.to_owned()));
    let format = orca::Format::asked_for(request.headers());
    let response = request_id::scope(id.clone(), next.run(request)).await;
    let mut response = response.map(|body| request_id::body(id, body));
    let headers = response.headers_mut();
    if let Ok(instance) = HeaderValue::from_str(&app.settings.instance) {
        headers.insert(INSTANCE, instance);
    }
    if let Some(load) = format.and_then(|format| orca::header(format, app.loaded()?)) {
        headers.insert(orca::LOAD, load);
    }
    if app.is_leaving() {
        headers.insert(CONNECTION, HeaderValue::from_static("close"));
    }
    response
}
