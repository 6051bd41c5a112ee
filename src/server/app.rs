//! What handlers share: [`App`] from the first second, [`LoadedApp`] once there is a model.

use std::sync::{Arc, OnceLock};
use std::time::{SystemTime, UNIX_EPOCH};

use axum::extract::{self, Request};
use axum::middleware::Next;
use axum::response::Response;

use crate::adapters::AdapterStore;
use crate::checkpoint::PromptGuide;
use crate::engine::{Engine, State};
use crate::jobs::{
    Housekeeping, JobRegistry, JobStats, JobStore, Retention, Worker, WorkerSettings,
};
use crate::request::Limits;
use crate::runtime::Start;
use crate::tokenizer::PromptTokenizer;

use super::Settings;
use super::closing::Closing;
use super::connections::Connections;
use super::error::ApiError;
use super::generation::StoredRunner;

/// The state of a server. Clones share it.
///
/// It serves health, metrics and the page at once, and refuses requests for images with status 503
/// until [`App::set_model`] is called.
#[derive(Debug, Clone)]
pub struct App {
    pub settings: Arc<Settings>,
    /// The progress of the start, for whoever finds and loads the model.
    pub start: Start,
    /// Unix time of the start, in seconds.
    pub(super) started: u64,
    pub(super) connections: Arc<Connections>,
    /// The durable jobs; `None` for a server without them.
    pub(super) jobs: Option<Arc<dyn JobStore>>,
    /// Ends responses that wait for jobs.
    pub(super) closing: Closing,
    /// What this process does with durable jobs.
    pub job_stats: Arc<JobStats>,
    loaded: Arc<OnceLock<Arc<LoadedApp>>>,
}

/// A model that is ready for requests.
#[derive(Debug)]
pub struct LoadedModel {
    /// Generates the images; `None` for a server that only stores jobs for others.
    pub engine: Option<Engine>,
    pub tokenizer: Arc<PromptTokenizer>,
    /// Limits of requests. Their adapters are those of `adapters`.
    pub limits: Limits,
    /// The adapters that requests may name.
    pub adapters: AdapterStore,
    /// Hints for prompts, for a model that knows only some words.
    pub prompt_guide: Option<&'static PromptGuide>,
}

/// The state of a server whose model is ready: what requests for images, or for jobs, need.
#[derive(Debug)]
pub(super) struct LoadedApp {
    /// `None` for a server that only stores jobs for others.
    pub(super) engine: Option<Engine>,
    pub(super) tokenizer: Arc<PromptTokenizer>,
    pub(super) limits: Limits,
    pub(super) adapters: AdapterStore,
    /// Held by the request whose adapters are read next.
    pub(super) adapter_turn: tokio::sync::Mutex<()>,
    pub(super) prompt_guide: Option<&'static PromptGuide>,
    pub(super) settings: Arc<Settings>,
    /// Unix time of the start, in seconds.
    pub(super) started: u64,
    /// Requests to `/sdapi/v1/txt2img`.
    pub(super) sdapi_jobs: Arc<JobRegistry<()>>,
}

impl App {
    /// A server without a model, whose start begins now.
    pub fn new(settings: Settings) -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        Self {
            settings: Arc::new(settings),
            start: Start::new(),
            started: now.unwrap_or_default().as_secs(),
            connections: Arc::default(),
            jobs: None,
            closing: Closing::default(),
            job_stats: Arc::default(),
            loaded: Arc::default(),
        }
    }

    /// This server with durable jobs in `store`.
    #[must_use]
    pub fn with_jobs(self, store: Arc<dyn JobStore>) -> Self {
        let jobs = Some(store);
        Self { jobs, ..self }
    }

    /// Starts to work on the durable jobs; `None` without jobs, without an engine, or during the start.
    /// Must be called in a tokio runtime.
    pub fn start_worker(&self, settings: WorkerSettings) -> Option<Worker> {
        let store = Arc::clone(self.jobs.as_ref()?);
        let app = Arc::clone(self.loaded()?);
        app.engine.as_ref()?;
        let stats = Arc::clone(&self.job_stats);
        let runner = Arc::new(StoredRunner(app));
        Some(Worker::start(store, runner, settings, stats))
    }

    /// Starts to sweep and to count the durable jobs; `None` without jobs. Must be called in a tokio
    /// runtime.
    pub fn keep_house(&self) -> Option<Housekeeping> {
        let store = Arc::clone(self.jobs.as_ref()?);
        Some(Housekeeping::start(store, Arc::clone(&self.job_stats)))
    }

    /// Ends the start: requests are accepted from now on. A second call changes nothing.
    pub fn set_model(&self, model: LoadedModel) {
        self.start.finish();
        self.loaded.get_or_init(|| {
            Arc::new(LoadedApp {
                engine: model.engine,
                tokenizer: model.tokenizer,
                limits: model.limits,
                adapters: model.adapters,
                adapter_turn: tokio::sync::Mutex::default(),
                prompt_guide: model.prompt_guide,
                settings: Arc::clone(&self.settings),
                started: self.started,
                sdapi_jobs: Arc::new(JobRegistry::new(Retention::NONE)),
            })
        });
    }

    /// Whether requests are accepted; `None` during the start.
    pub(super) fn state(&self) -> Option<State> {
        let engine = self.loaded()?.engine.as_ref();
        Some(engine.map_or(State::Ready, Engine::state))
    }

    /// The state with the model, or `None` during the start.
    pub(super) fn loaded(&self) -> Option<&Arc<LoadedApp>> {
        self.loaded.get()
    }
}

impl LoadedApp {
    /// The engine, if this server generates images.
    pub(super) fn engine(&self) -> Result<&Engine, ApiError> {
        self.engine.as_ref().ok_or(ApiError::NoEngine)
    }

    /// The name of the model in a response: the requested one if the model has it, else the first.
    pub(super) fn model_name(&self, requested: Option<&str>) -> &str {
        let names = &self.settings.served_model_names;
        let served = names.iter().find(|name| Some(name.as_str()) == requested);
        served.or(names.first()).map_or("kiln", String::as_str)
    }

    /// The name of the model or of the adapter in a response, as [`LoadedApp::model_name`].
    pub(super) fn answered_name(&self, requested: Option<&str>) -> String {
        let adapter = requested.filter(|name| self.is_adapter(name));
        adapter
            .unwrap_or_else(|| self.model_name(requested))
            .to_owned()
    }
}

/// The state of [`require_model`].
#[derive(Clone)]
pub(super) struct RequireModel {
    pub(super) app: Arc<App>,
    /// Makes the response to a request that is refused.
    pub(super) refuse: fn(ApiError) -> Response,
}

/// Middleware of routes that need the model: adds the [`LoadedApp`] to the extensions of a request,
/// and refuses the request during the start.
pub(super) async fn require_model(
    extract::State(RequireModel { app, refuse }): extract::State<RequireModel>,
    mut request: Request,
    next: Next,
) -> Response {
    let Some(loaded) = app.loaded() else {
        return refuse(ApiError::Starting(app.start.progress()));
    };
    request.extensions_mut().insert(Arc::clone(loaded));
    next.run(request).await
}
