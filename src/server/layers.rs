//! Middleware around all routes: request ids, the span of a request, headers of every answer, panics,
//! CORS, and requests from web pages.

use std::any::Any;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::Request;
use axum::http::header::{AUTHORIZATION, LOCATION, RETRY_AFTER};
use axum::http::{HeaderValue, Method};
use axum::middleware::from_fn_with_state;
use axum::response::{IntoResponse, Response};
use tower::util::MapRequestLayer;
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::cors::{AllowHeaders, AllowOrigin, CorsLayer};
use tower_http::request_id::{MakeRequestUuid, PropagateRequestIdLayer, SetRequestIdLayer};
use tower_http::sensitive_headers::SetSensitiveRequestHeadersLayer;
use tower_http::trace::TraceLayer;
use tower_http::validate_request::ValidateRequestHeaderLayer;
use tracing::{Level, Span};

use super::App;
use super::answers::{INSTANCE, add_headers};
use super::error::ApiError;
use super::images::SEED_HEADER;
use super::jobs::PREFERENCE_APPLIED;
use super::request_id::REQUEST_ID;
use super::traces;
use super::web_pages::{AllowedHost, CorsOrigin, RefuseOtherPages, is_allowed_origin};

/// Routes that monitoring calls again and again. Their spans and log lines have the level debug.
const PROBES: [&str; 4] = ["/health", "/health/live", "/health/ready", "/metrics"];

/// Longest path in a log line, in bytes.
const MAX_LOGGED_BYTES: usize = 200;

/// Longest id of a request, in bytes.
const MAX_ID_BYTES: usize = 128;

/// Adds the middleware to a router. The last layer is the outermost one.
pub(super) fn add_to<S: Clone + Send + Sync + 'static>(
    router: Router<S>,
    app: &Arc<App>,
    allowed_hosts: Option<&[AllowedHost]>,
) -> Router<S> {
    let cors_origins = &app.settings.cors_origins;
    let refuse_other_pages = RefuseOtherPages::new(cors_origins, allowed_hosts);
    let mut router = router
        .layer(CatchPanicLayer::custom(respond_to_panic))
        .layer(ValidateRequestHeaderLayer::custom(refuse_other_pages));
    if !cors_origins.is_empty() {
        router = router.layer(cors(cors_origins));
    }
    let trace = TraceLayer::new_for_http()
        .make_span_with(make_span)
        .on_request(())
        .on_response(log_response)
        .on_eos(())
        .on_failure(());
    router
        .layer(from_fn_with_state(Arc::clone(app), add_headers))
        .layer(PropagateRequestIdLayer::new(REQUEST_ID))
        .layer(trace)
        .layer(SetSensitiveRequestHeadersLayer::new([AUTHORIZATION]))
        .layer(SetRequestIdLayer::new(REQUEST_ID, MakeRequestUuid))
        .layer(MapRequestLayer::new(without_unusable_id))
}

/// Removes ids that cannot be logged and repeated as they are.
fn without_unusable_id(mut request: Request) -> Request {
    let headers = request.headers_mut();
    let mut ids = headers
        .get_all(REQUEST_ID)
        .iter()
        .map(HeaderValue::as_bytes);
    let is_usable = |id: &[u8]| {
        let is_printable = |byte: &u8| byte.is_ascii_graphic() || *byte == b' ';
        (1..=MAX_ID_BYTES).contains(&id.len()) && id.iter().all(is_printable)
    };
    let usable = ids.next().is_none_or(is_usable) && ids.next().is_none();
    if !usable {
        headers.remove(REQUEST_ID);
    }
    request
}

/// A layer that lets web pages of these origins use the API.
fn cors(origins: &[CorsOrigin]) -> CorsLayer {
    let allowed = if origins.iter().any(CorsOrigin::is_any) {
        AllowOrigin::any()
    } else {
        let origins = origins.to_vec();
        AllowOrigin::predicate(move |origin, _| is_allowed_origin(&origins, origin))
    };
    CorsLayer::new()
        .allow_origin(allowed)
        .allow_methods([Method::GET, Method::POST, Method::DELETE])
        // Clients send many headers: Idempotency-Key, Prefer, OpenAI's x-stainless-os.
        .allow_headers(AllowHeaders::mirror_request())
        .expose_headers([
            RETRY_AFTER,
            SEED_HEADER,
            REQUEST_ID,
            INSTANCE,
            LOCATION,
            PREFERENCE_APPLIED,
        ])
}

fn make_span(request: &Request) -> Span {
    let method = request.method();
    let path = shortened(request.uri().path());
    let request_id = request.headers().get(REQUEST_ID);
    let request_id = request_id.and_then(|id| id.to_str().ok());
    let request_id = request_id.unwrap_or_default();
    if PROBES.contains(&path) {
        tracing::debug_span!("request", %method, path, request_id)
    } else {
        // The trace has an id if tracing is on.
        let trace_id = tracing::field::Empty;
        let span = tracing::info_span!("request", %method, path, request_id, trace_id);
        traces::begin(request, &span);
        span
    }
}

fn shortened(text: &str) -> &str {
    &text[..text.floor_char_boundary(MAX_LOGGED_BYTES)]
}

/// Logs a response with an error status. Successful generations log their own line, and other
/// successful requests are of no interest.
fn log_response(response: &Response, latency: Duration, span: &Span) {
    let status = response.status();
    traces::responded(span, status);
    let seconds = latency.as_secs_f64();
    let is_probe = span
        .metadata()
        .is_none_or(|span| *span.level() == Level::DEBUG);
    if is_probe || status.is_success() || status.is_redirection() {
        tracing::debug!(parent: span, status = status.as_u16(), "responded in {seconds:.3} s");
    } else {
        tracing::info!(parent: span, status = status.as_u16(), "failed after {seconds:.3} s");
    }
}

/// The response to a request whose handler panicked.
fn respond_to_panic(payload: Box<dyn Any + Send>) -> Response {
    let message = kiln_models::panic_message(payload.as_ref());
    ApiError::HandlerPanicked(message).into_response()
}

#[cfg(test)]
mod tests {
    use axum::body::{Body, to_bytes};
    use axum::http::{HeaderName, StatusCode};
    use axum::routing::get;
    use serde_json::Value;
    use tower::ServiceExt;

    use super::super::Settings;
    use super::*;

    async fn panics() -> &'static str {
        panic!("secret detail")
    }

    async fn sees_a_sensitive_key(request: Request) -> String {
        request.headers()[AUTHORIZATION].is_sensitive().to_string()
    }

    /// Response of a router with the middleware to a request with this header.
    async fn respond(path: &str, (name, value): (HeaderName, &'static str)) -> Response {
        let router = Router::new()
            .route("/panic", get(panics))
            .route("/key", get(sees_a_sensitive_key));
        let mut request = Request::new(Body::empty());
        *request.uri_mut() = path.parse().unwrap();
        let value = HeaderValue::from_static(value);
        request.headers_mut().insert(name, value);
        let settings = Settings {
            cors_origins: vec!["*".parse().unwrap()],
            ..Settings::new("m")
        };
        let router = add_to(router, &Arc::new(App::new(settings)), None);
        router.oneshot(request).await.unwrap()
    }

    async fn body(response: Response) -> Vec<u8> {
        to_bytes(response.into_body(), 1000).await.unwrap().to_vec()
    }

    #[tokio::test]
    async fn a_panic_is_500_with_the_error_body_and_the_request_id() {
        let response = respond("/panic", (REQUEST_ID, "my-id")).await;
        assert_eq!(response.status(), StatusCode::INTERNAL_SERVER_ERROR);
        assert_eq!(response.headers()[REQUEST_ID], "my-id");
        assert_eq!(response.headers()["access-control-allow-origin"], "*");
        let body: Value = serde_json::from_slice(&body(response).await).unwrap();
        assert_eq!(body["error"]["code"], 500);
        assert_eq!(body["error"]["type"], "server_error");
        assert!(!body.to_string().contains("secret"), "{body}");
    }

    #[tokio::test]
    async fn the_key_is_marked_as_sensitive() {
        let response = respond("/key", (AUTHORIZATION, "Bearer key")).await;
        assert_eq!(body(response).await, b"true");
    }

    #[tokio::test]
    async fn an_id_that_is_long_or_not_printable_is_replaced() {
        let id = async |id: &'static str| {
            let response = respond("/key", (REQUEST_ID, id)).await;
            response.headers()[REQUEST_ID].to_str().unwrap().to_owned()
        };
        let longest = "x".repeat(MAX_ID_BYTES).leak();
        for own in ["1", "my-id/2 (x)", longest] {
            assert_eq!(id(own).await, own);
        }
        for unusable in ["", "x\ty", "x".repeat(MAX_ID_BYTES + 1).leak()] {
            assert_eq!(id(unusable).await.len(), 36, "{unusable:?}");
        }
        let request = |ids: &[&[u8]]| {
            let mut request = Request::new(Body::empty());
            for id in ids {
                let id = HeaderValue::from_bytes(id).unwrap();
                request.headers_mut().append(REQUEST_ID, id);
            }
            without_unusable_id(request)
                .headers()
                .contains_key(REQUEST_ID)
        };
        assert!(request(&[b"a"]));
        assert!(!request(&["é".as_bytes()]));
        assert!(!request(&[b"a", b"b"]), "which of the two is not known");
    }

    #[test]
    fn long_texts_are_shortened_in_the_log() {
        assert_eq!(shortened("/v1/models"), "/v1/models");
        assert_eq!(shortened(&"é".repeat(300)), "é".repeat(100));
    }
}
