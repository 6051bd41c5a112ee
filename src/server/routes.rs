//! All routes that the `OpenAPI` document describes. A route is registered once, with its
//! description, and belongs to one API, whose router checks its key.

use std::sync::Arc;

use axum::Router;
use axum::extract::OriginalUri;
use axum::http::Method;
use axum::middleware::from_fn_with_state;
use axum::response::{IntoResponse, Response};
use utoipa::openapi::security::HttpAuthScheme;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::access::{Scheme, require_key};
use super::app::{RequireModel, require_model};
use super::error::ApiError;
use super::openapi;
use super::{App, adapters, chat, estimate, health, images, jobs, metrics, models, sdapi, status};

/// Routes of a server and their `OpenAPI` document.
pub(super) fn routes(app: &Arc<App>) -> OpenApiRouter<Arc<App>> {
    let router = open().nest("/v1", v1(app));
    if app.settings.sdapi {
        router.nest("/sdapi", with_sdapi(app))
    } else {
        router.nest("/sdapi", Router::new().fallback(sdapi_off).into())
    }
}

/// The routes of a server that only works on jobs.
pub(super) fn of_worker() -> Router<Arc<App>> {
    let (router, _) = open().split_for_parts();
    router.fallback(async |OriginalUri(uri): OriginalUri| {
        let path = uri.path().to_owned();
        ApiError::WorkerOnly { path }.into_response()
    })
}

/// Routes that need no key and no model.
fn open() -> OpenApiRouter<Arc<App>> {
    OpenApiRouter::with_openapi(openapi::without_routes())
        .routes(routes!(models::version))
        .routes(routes!(health::health))
        .routes(routes!(health::live))
        .routes(routes!(health::ready))
        .routes(routes!(metrics::metrics))
}

/// The API of `OpenAI`, with kiln's additions.
fn v1(app: &Arc<App>) -> OpenApiRouter<Arc<App>> {
    let mut router = OpenApiRouter::new()
        .routes(routes!(chat::chat_completions))
        .routes(routes!(images::generations))
        .routes(routes!(estimate::estimate))
        .routes(routes!(status::status))
        .routes(routes!(models::list))
        .routes(routes!(models::retrieve))
        .routes(routes!(adapters::load))
        .routes(routes!(adapters::unload))
        .routes(routes!(adapters::refresh));
    let document = router.get_openapi_mut();
    openapi::add_security_scheme(document, "bearer", HttpAuthScheme::Bearer);
    let refuse = || ApiError::Unauthorized.into_response();
    // Jobs can be followed before there is a model.
    let router = with_model(router, app, ApiError::into_response).merge(jobs::routes());
    with_fallbacks(router).layer(require_key(&app.settings.api_keys, Scheme::Bearer, refuse))
}

/// The API of AUTOMATIC1111's web UI.
fn with_sdapi(app: &Arc<App>) -> OpenApiRouter<Arc<App>> {
    let mut router = sdapi::routes();
    let document = router.get_openapi_mut();
    openapi::add_security_scheme(document, "basic", HttpAuthScheme::Basic);
    with_fallbacks(with_model(router, app, sdapi::error)).layer(require_key(
        &app.settings.api_keys,
        Scheme::BasicOrBearer,
        sdapi::unauthorized,
    ))
}

/// Makes routes answer with an error until there is a model.
fn with_model(
    router: OpenApiRouter<Arc<App>>,
    app: &Arc<App>,
    refuse: fn(ApiError) -> Response,
) -> OpenApiRouter<Arc<App>> {
    let app = Arc::clone(app);
    let state = RequireModel { app, refuse };
    router.route_layer(from_fn_with_state(state, require_model))
}

/// Adds the responses to unknown paths and methods below a router's prefix, so that a layer of the
/// router, such as the check of the key, applies to them too.
fn with_fallbacks(router: OpenApiRouter<Arc<App>>) -> OpenApiRouter<Arc<App>> {
    let (router, document) = router.split_for_parts();
    let router = router
        .fallback(unknown)
        .method_not_allowed_fallback(wrong_method);
    let mut router = OpenApiRouter::from(router);
    *router.get_openapi_mut() = document;
    router
}

/// The response to a path without a route.
pub(super) async fn unknown(OriginalUri(uri): OriginalUri) -> ApiError {
    ApiError::UnknownRoute {
        path: uri.path().to_owned(),
    }
}

/// The response to a method that the route does not have.
pub(super) async fn wrong_method(method: Method, OriginalUri(uri): OriginalUri) -> ApiError {
    ApiError::Method {
        method,
        path: uri.path().to_owned(),
    }
}

async fn sdapi_off(OriginalUri(uri): OriginalUri) -> ApiError {
    ApiError::SdapiOff {
        path: uri.path().to_owned(),
    }
}
