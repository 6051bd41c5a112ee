//! The HTTP server: the only place that knows axum and wire types.

mod access;
mod body;
mod chat;
mod error;
mod estimate;
mod fields;
mod generation;
mod health;
mod images;
mod invalid;
mod json;
mod messages;
mod metrics;
mod models;
mod openapi;
mod page;
mod sdapi;
mod signals;
mod status;
mod stream;

use std::future::Future;
use std::io;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::Router;
use axum::body::Bytes;
use axum::extract::DefaultBodyLimit;
use axum::http::header::{CONTENT_SECURITY_POLICY, CONTENT_TYPE};
use axum::http::{Method, Uri};
use axum::middleware::from_fn_with_state;
use axum::routing::{get, post};
use kiln_models::noise::NoiseGenerator;
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::time::sleep;

use crate::checkpoint::PromptGuide;
use crate::engine::Engine;
use crate::request::Limits;
use crate::tokenizer::PromptTokenizer;

use self::error::ApiError;

pub use self::access::{ApiKeys, CorsOrigin, InvalidApiKey, InvalidOrigin};
pub use self::signals::shutdown_signal;

/// Bytes of a request's body, unless told otherwise. The longest prompt takes a few kilobytes.
pub const DEFAULT_MAX_BODY_BYTES: usize = 2 << 20;

/// How long a server that ends waits for clients to read what has been generated for them.
const LAST_ANSWERS: Duration = Duration::from_secs(10);

/// What the handlers work with.
#[derive(Debug)]
pub struct App {
    pub engine: Engine,
    pub tokenizer: Arc<PromptTokenizer>,
    pub limits: Limits,
    /// Draws the noise of requests that do not choose.
    pub noise_generator: NoiseGenerator,
    pub settings: Settings,
    /// Unix time in seconds.
    started: u64,
    board: sdapi::JobRegistry,
}

/// How the server behaves, whatever it draws with.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The model's names; the first one is used where a request names none of them.
    pub served_model_names: Vec<String>,
    pub api_keys: ApiKeys,
    /// Whose web pages may use the API.
    pub cors_origins: Vec<CorsOrigin>,
    pub max_body_bytes: usize,
    /// How long a request may take from its arrival; it is refused with 408 then.
    pub request_timeout: Option<Duration>,
    /// For requests that have none.
    pub default_negative_prompt: Option<String>,
    /// Whether PNG files say how they were made.
    pub metadata: bool,
    /// Whether the API of AUTOMATIC1111's web UI is answered, too.
    pub sdapi: bool,
    /// How to word a prompt, for a model that does not understand all words.
    pub prompt_guide: Option<&'static PromptGuide>,
}

impl Settings {
    /// Open to all that reach it, with no limits but the default ones.
    pub fn new(served_model_name: &str) -> Self {
        Self {
            served_model_names: vec![served_model_name.to_owned()],
            api_keys: ApiKeys::default(),
            cors_origins: Vec::new(),
            max_body_bytes: DEFAULT_MAX_BODY_BYTES,
            request_timeout: None,
            default_negative_prompt: None,
            metadata: true,
            sdapi: false,
            prompt_guide: None,
        }
    }
}

impl App {
    pub fn new(
        engine: Engine,
        tokenizer: impl Into<Arc<PromptTokenizer>>,
        limits: Limits,
        noise_generator: NoiseGenerator,
        settings: Settings,
    ) -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        Self {
            engine,
            tokenizer: tokenizer.into(),
            limits,
            noise_generator,
            settings,
            started: now.unwrap_or_default().as_secs(),
            board: sdapi::JobRegistry::default(),
        }
    }

    /// The name to answer under where this one was asked for.
    fn model_name(&self, asked: Option<&str>) -> &str {
        let names = &self.settings.served_model_names;
        let served = names.iter().find(|name| Some(name.as_str()) == asked);
        served.or(names.first()).map_or("kiln", String::as_str)
    }
}

/// All routes. Every failure, of a route or of the routing, has the error body of `OpenAI`.
pub fn router(app: App) -> Router {
    let app = Arc::new(app);
    let document = Bytes::from(openapi::document(&app.limits, app.settings.sdapi));
    let document = async move || ([(CONTENT_TYPE, "application/json")], document);
    let docs = [
        (CONTENT_TYPE, "text/html; charset=utf-8"),
        (
            CONTENT_SECURITY_POLICY,
            "default-src 'self'; script-src 'unsafe-inline'; style-src 'unsafe-inline'",
        ),
    ];
    let sdapi = app.settings.sdapi;
    let mut router = Router::new()
        .route("/v1/chat/completions", post(chat::chat_completions))
        .route("/v1/images/generations", post(images::generations))
        .route("/v1/images/estimate", post(estimate::estimate))
        .route("/v1/status", get(status::status))
        .route("/v1/models", get(models::list))
        .route("/v1/models/{*name}", get(models::retrieve))
        .route("/version", get(models::version))
        .route("/health", get(health::health))
        .route("/health/live", get(health::live))
        .route("/health/ready", get(health::ready))
        .route("/metrics", get(metrics::metrics))
        .route("/openapi.json", get(document))
        .route("/docs", get(async move || (docs, openapi::DOCS_PAGE)))
        .merge(page::routes())
        .merge(if sdapi {
            sdapi::routes()
        } else {
            Router::new()
        })
        .fallback(async move |uri: Uri| {
            let path = uri.path().to_owned();
            if path.starts_with(sdapi::PREFIX) && !sdapi {
                ApiError::SdapiOff { path }
            } else {
                ApiError::UnknownRoute { path }
            }
        })
        .method_not_allowed_fallback(async |method: Method, uri: Uri| ApiError::Method {
            method,
            path: uri.path().to_owned(),
        })
        .layer(from_fn_with_state(Arc::clone(&app), access::require_key))
        .layer(DefaultBodyLimit::max(app.settings.max_body_bytes));
    if !app.settings.cors_origins.is_empty() {
        // Outside of the keys: a browser's preflight request has none.
        router = router.layer(access::cors(&app.settings.cors_origins));
    }
    router.with_state(app)
}

/// Answers requests until `shutdown` is ready, then those that have already been taken. Clients
/// that take their time to read the answers are not waited for long.
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
            tracing::warn!("clients that have not read their answers are left");
            Ok(())
        }
    }
}
