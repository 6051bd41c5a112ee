//! What handlers share: [`App`] from the first second, [`LoadedApp`] once there is a model.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::extract::{self, Request};
use axum::middleware::Next;
use axum::response::Response;
use kiln_models::job::Job;

use crate::adapters::AdapterStore;
use crate::checkpoint::PromptGuide;
use crate::engine::{Engine, State as EngineState, SubmitOptions};
use crate::jobs::{Housekeeping, JobRegistry, JobStore, Retention, Worker, WorkerSettings};
use crate::request::{GenerationParams, GenerationRequest, Limits};
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
    loaded: Arc<OnceLock<Arc<LoadedApp>>>,
    is_leaving: Arc<AtomicBool>,
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
    /// A request with nothing but a prompt, of which the load is told.
    default_job: Option<Job>,
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
            loaded: Arc::default(),
            is_leaving: Arc::default(),
        }
    }

    /// This server with durable jobs in `store`.
    #[must_use]
    pub fn with_jobs(self, store: Arc<dyn JobStore>) -> Self {
        let jobs = Some(store);
        Self { jobs, ..self }
    }

    /// Starts to work on the durable jobs; `None` without jobs, without an engine, or during the start.
    /// `stall_timeout` is that of [`WorkerSettings`]. Must be called in a tokio runtime.
    pub fn start_worker(&self, stall_timeout: Option<Duration>) -> Option<Worker> {
        let store = Arc::clone(self.jobs.as_ref()?);
        let app = Arc::clone(self.loaded()?);
        app.engine.as_ref()?;
        let settings = WorkerSettings::new(store.settings(), stall_timeout);
        Some(Worker::start(store, Arc::new(StoredRunner(app)), settings))
    }

    /// Starts to sweep and to count the durable jobs, and to send their webhooks; `None` without jobs.
    /// Must be called in a tokio runtime.
    pub fn keep_house(&self) -> Option<Housekeeping> {
        let store = Arc::clone(self.jobs.as_ref()?);
        let webhooks = self.settings.webhooks.clone();
        Some(Housekeeping::start(store, webhooks))
    }

    /// Ends the start: requests are accepted from now on. A second call changes nothing.
    pub fn set_model(&self, model: LoadedModel) {
        self.start.finish();
        self.loaded.get_or_init(|| {
            Arc::new(LoadedApp {
                default_job: default_job(&self.settings, &model),
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

    /// Tells clients to go elsewhere: the server is not ready any more, and every answer closes its
    /// connection. Requests are still taken.
    pub fn leave(&self) {
        self.is_leaving.store(true, Ordering::Relaxed);
    }

    /// Whether [`App::leave`] was called.
    pub(super) fn is_leaving(&self) -> bool {
        self.is_leaving.load(Ordering::Relaxed)
    }

    /// The state of the engine, `Draining` from [`App::leave`] on; `None` during the start. A server
    /// without an engine is ready.
    pub(super) fn state(&self) -> Option<EngineState> {
        let engine = self.loaded()?.engine.as_ref();
        match engine.map_or(EngineState::Ready, Engine::state) {
            EngineState::Starting | EngineState::Ready if self.is_leaving() => {
                Some(EngineState::Draining)
            }
            state => Some(state),
        }
    }

    /// The state with the model, or `None` during the start.
    pub(super) fn loaded(&self) -> Option<&Arc<LoadedApp>> {
        self.loaded.get()
    }
}

/// A request that names nothing but its prompt.
fn default_job(settings: &Settings, model: &LoadedModel) -> Option<Job> {
    let params = GenerationParams {
        negative_prompt: settings.default_negative_prompt.clone(),
        seed: Some(0),
        ..GenerationParams::default()
    };
    let request = GenerationRequest::new(params, &model.limits, settings.noise_generator).ok()?;
    let tokens = request.tokenize(&model.tokenizer).ok()?;
    Some(request.into_job(tokens, Vec::new(), false))
}

impl LoadedApp {
    /// The engine, if this server generates images.
    pub(super) fn engine(&self) -> Result<&Engine, ApiError> {
        self.engine.as_ref().ok_or(ApiError::NoEngine)
    }

    /// How long a request with the default parameters would wait if it arrived now. `None` if no
    /// request is taken, or if something that it would wait for has not been measured.
    pub(super) fn expected_wait(&self) -> Option<Duration> {
        let engine = self.engine.as_ref()?;
        let job = self.default_job.as_ref();
        let job = job.filter(|_| matches!(engine.state(), EngineState::Ready))?;
        let forecast = engine.forecast(job, &SubmitOptions::default());
        forecast.estimated_wait
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
