//! The HTTP server: routes, authentication, and the JSON of requests and responses. No other module
//! uses axum.

mod access;
mod adapters;
mod answers;
mod app;
mod body;
mod cache;
mod chat;
mod choice;
mod closing;
mod connections;
mod data_url;
mod error;
mod estimate;
mod facts;
mod fields;
mod generation;
mod health;
mod images;
mod instance;
mod invalid;
mod jobs;
mod json;
mod keys;
mod layers;
mod metrics;
mod models;
mod openapi;
mod orca;
mod page;
mod parsed;
mod previews;
mod request_id;
mod role;
mod routes;
mod schedule;
mod sdapi;
mod signals;
mod stage_metrics;
mod status;
mod stream;
mod traces;
mod web_pages;

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
use tower_http::normalize_path::NormalizePath;

pub use self::access::{ApiKeys, InvalidApiKey};
pub use self::app::{App, LoadedModel};
pub use self::connections::raise_open_file_limit;
pub(crate) use self::instance::host_name;
pub use self::instance::{InvalidInstance, check_instance};
pub use self::role::Role;
pub use self::signals::{ShutdownTimes, Signals, drain};
pub use self::web_pages::{AllowedHost, CorsOrigin, InvalidHost, InvalidOrigin};

use crate::jobs::webhook::WebhookSettings;

use self::app::LoadedApp;
use self::connections::Bounds;

/// Default limit of a request body in bytes. The longest prompt takes a few kilobytes.
pub const DEFAULT_MAX_BODY_BYTES: usize = 2 << 20;

/// How long a server that shuts down waits for clients to read their responses.
const LAST_ANSWERS: Duration = Duration::from_secs(10);

/// Settings of the server that do not depend on the model.
#[derive(Debug, Clone)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is an option of the command line"
)]
pub struct Settings {
    /// Names of the model. The first one is the default.
    pub served_model_names: Vec<String>,
    pub api_keys: ApiKeys,
    /// Origins whose web pages may use the API.
    pub cors_origins: Vec<CorsOrigin>,
    /// Names by which a server that listens on a loopback address and has no keys may be called,
    /// besides names and addresses of this machine.
    pub allowed_hosts: Vec<AllowedHost>,
    pub max_body_bytes: usize,
    /// Time limit of a request from its arrival; after it, the request fails with 408.
    pub request_timeout: Option<Duration>,
    /// Negative prompt of requests that have none.
    pub default_negative_prompt: Option<String>,
    /// Whether to log which steps the step cache of each request computed.
    pub cache_summary: bool,
    /// Whether PNG files contain the generation parameters.
    pub metadata: bool,
    /// Makes the noise of requests that do not select a generator.
    pub noise_generator: NoiseGenerator,
    /// Whether to serve the API of AUTOMATIC1111's web UI as well.
    pub sdapi: bool,
    /// Whether clients may change the list of adapters.
    pub lora_updates: bool,
    /// Name of this server among others: in answers, in its status and in the records of its jobs.
    pub instance: String,
    /// Where jobs may be posted when they have ended.
    pub webhooks: WebhookSettings,
    pub role: Role,
}

impl Settings {
    /// Default settings: no API keys, no other origins, and the default limits.
    pub fn new(served_model_name: &str) -> Self {
        Self {
            served_model_names: vec![served_model_name.to_owned()],
            api_keys: ApiKeys::default(),
            cors_origins: Vec::new(),
            allowed_hosts: Vec::new(),
            max_body_bytes: DEFAULT_MAX_BODY_BYTES,
            request_timeout: None,
            default_negative_prompt: None,
            cache_summary: false,
            metadata: true,
            noise_generator: NoiseGenerator::Cpu,
            sdapi: false,
            lora_updates: false,
            instance: host_name(),
            webhooks: WebhookSettings::default(),
            role: Role::All,
        }
    }
}

/// All routes, with their middleware. Every failure, of a route or of the routing, is answered
/// with the error body of `OpenAI`. The header `Host` is not checked; [`serve`] does that.
pub fn router(app: App) -> Router {
    router_for_hosts(app, None)
}

/// [`router`], which with `hosts` answers to these and to this machine's names only.
fn router_for_hosts(app: App, hosts: Option<&[AllowedHost]>) -> Router {
    let app = Arc::new(app);
    let router = match app.settings.role {
        Role::Worker => routes::of_worker(),
        Role::All | Role::Api => {
            let (router, document) = routes::routes(&app).split_for_parts();
            router
                .merge(openapi::routes(document))
                .merge(page::routes())
                .fallback(routes::unknown)
        }
    };
    let router = router
        .method_not_allowed_fallback(routes::wrong_method)
        .layer(DefaultBodyLimit::max(app.settings.max_body_bytes));
    let router = layers::add_to(router, &app, hosts).with_state(app);
    // A path with a slash at its end is the path without it. Layers of a router see a request after
    // its route is chosen, so this is a router of its own.
    Router::new().fallback_service(NormalizePath::trim_trailing_slash(router))
}

/// Serves requests until `shutdown` is ready, then finishes the requests that have been accepted.
/// Clients have ten more seconds to read their responses.
///
/// The number of connections stays below the limit of open files. Connections without a request, and
/// those whose client does not read, are closed after a time, or when others need their place.
///
/// On a loopback address and without API keys, only requests to this machine's names and addresses
/// and to [`Settings::allowed_hosts`] are answered: other names are those of web pages that have
/// given their host name this machine's address.
pub async fn serve(
    listener: TcpListener,
    app: App,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    let is_local = listener.local_addr()?.ip().to_canonical().is_loopback();
    let hosts = app.settings.allowed_hosts.clone();
    let hosts = (is_local && app.settings.api_keys.is_empty()).then_some(hosts.as_slice());
    let connections = Arc::clone(&app.connections);
    let watchers = app.closing.clone();
    let router = router_for_hosts(app, hosts);
    let (closing, closed) = oneshot::channel::<()>();
    let shutdown = async move {
        shutdown.await;
        watchers.close();
        drop(closing);
    };
    let server = connections::serve(listener, router, connections, Bounds::default(), shutdown);
    tokio::select! {
        () = server => {}
        () = async { drop(closed.await); sleep(LAST_ANSWERS).await } => {
            tracing::warn!("shutting down without waiting for clients that have not read their responses");
        }
    }
    Ok(())
}
