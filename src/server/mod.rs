//! The HTTP server: routes, authentication, and the JSON of requests and responses. No other module
//! uses axum.

mod access;
mod app;
mod body;
mod chat;
mod choice;
mod data_url;
mod error;
mod estimate;
mod fields;
mod generation;
mod health;
mod images;
mod invalid;
mod json;
mod keys;
mod layers;
mod metrics;
mod models;
mod openapi;
mod page;
mod parsed;
mod routes;
mod sdapi;
mod signals;
mod status;
mod stream;

use std::future::Future;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::DefaultBodyLimit;
use kiln_models::noise::NoiseGenerator;
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::time::sleep;

pub use self::access::{ApiKeys, CorsOrigin, InvalidApiKey, InvalidOrigin};
pub use self::app::{App, LoadedModel};
pub use self::signals::{Signals, drain};

use self::app::LoadedApp;

/// Default limit of a request body in bytes. The longest prompt takes a few kilobytes.
pub const DEFAULT_MAX_BODY_BYTES: usize = 2 << 20;

/// How long a server that shuts down waits for clients to read their responses.
const LAST_ANSWERS: Duration = Duration::from_secs(10);

/// Settings of the server that do not depend on the model.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Names of the model. The first one is the default.
    pub served_model_names: Vec<String>,
    pub api_keys: ApiKeys,
    /// Origins whose web pages may use the API.
    pub cors_origins: Vec<CorsOrigin>,
    pub max_body_bytes: usize,
    /// Time limit of a request from its arrival; after it, the request fails with 408.
    pub request_timeout: Option<Duration>,
    /// Negative prompt of requests that have none.
    pub default_negative_prompt: Option<String>,
    /// Whether PNG files contain the generation parameters.
    pub metadata: bool,
    /// Makes the noise of requests that do not select a generator.
    pub noise_generator: NoiseGenerator,
    /// Whether to serve the API of AUTOMATIC1111's web UI as well.
    pub sdapi: bool,
}

impl Settings {
    /// Default settings: no API keys, no other origins, and the default limits.
    pub fn new(served_model_name: &str) -> Self {
        Self {
            served_model_names: vec![served_model_name.to_owned()],
            api_keys: ApiKeys::default(),
            cors_origins: Vec::new(),
            max_body_bytes: DEFAULT_MAX_BODY_BYTES,
            request_timeout: None,
            default_negative_prompt: None,
            metadata: true,
            noise_generator: NoiseGenerator::Cpu,
            sdapi: false,
        }
    }
}

/// All routes, with their middleware. Every failure, of a route or of the routing, is answered
/// with the error body of `OpenAI`.
pub fn router(app: App) -> Router {
    let app = Arc::new(app);
    let (router, document) = routes::routes(&app).split_for_parts();
    let router = router
        .merge(openapi::routes(document))
        .merge(page::routes())
        .fallback(routes::unknown)
        .method_not_allowed_fallback(routes::wrong_method)
        .layer(DefaultBodyLimit::max(app.settings.max_body_bytes));
    layers::add_to(router, &app.settings.cors_origins).with_state(app)
}

/// Serves requests until `shutdown` is ready, then finishes the requests that have been accepted.
/// Clients have ten more seconds to read their responses.
pub async fn serve(
    listener: TcpListener,
    app: App,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    let (closing, closed) = oneshot::channel::<()>();
    let server = axum::serve(listener, router(app)).with_graceful_shutdown(async move {
        shutdown.await;
        drop(closing);
    });
    tokio::select! {
        outcome = server => outcome,
        () = async { drop(closed.await); sleep(LAST_ANSWERS).await } => {
            tracing::warn!("shutting down without waiting for clients that have not read their responses");
            Ok(())
        }
    }
}
