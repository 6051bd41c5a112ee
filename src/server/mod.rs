//! The HTTP server: the only place that knows axum and wire types.

mod chat;
mod error;
mod health;
mod invalid;
mod messages;
mod params;
mod signals;

use std::future::Future;
use std::io;
use std::sync::Arc;

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::http::{Method, Uri};
use axum::routing::{get, post};
use kiln_models::noise::NoiseGenerator;
use tokio::net::TcpListener;

use crate::engine::Engine;
use crate::request::Limits;
use crate::tokenizer::PromptTokenizer;

use self::error::ApiError;

pub use self::signals::shutdown_signal;

/// Bytes of a request's body. The longest prompt takes a few kilobytes.
pub const MAX_BODY_BYTES: usize = 2 << 20;

/// What the handlers work with.
#[derive(Debug)]
pub struct App {
    pub engine: Engine,
    pub tokenizer: PromptTokenizer,
    pub limits: Limits,
    /// Draws the noise of every request.
    pub noise_generator: NoiseGenerator,
    /// The model's name in responses.
    pub served_model_name: String,
}

/// All routes. Every failure, of a route or of the routing, has the error body of `OpenAI`.
pub fn router(app: App) -> Router {
    Router::new()
        .route("/health", get(health::health))
        .route("/v1/chat/completions", post(chat::chat_completions))
        .fallback(async |uri: Uri| ApiError::UnknownRoute {
            path: uri.path().to_owned(),
        })
        .method_not_allowed_fallback(async |method: Method, uri: Uri| ApiError::Method {
            method,
            path: uri.path().to_owned(),
        })
        .layer(DefaultBodyLimit::max(MAX_BODY_BYTES))
        .with_state(Arc::new(app))
}

/// Answers requests until `shutdown` is ready, then those that have already been taken.
pub async fn serve(
    listener: TcpListener,
    app: App,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    axum::serve(listener, router(app))
        .with_graceful_shutdown(shutdown)
        .await
}
