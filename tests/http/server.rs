//! A server in this process.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kiln::engine::{DEFAULT_MAX_STARTED, Engine, EngineSettings};
use kiln::jobs::JobStore;
use kiln::request::{Limits, StepCaches};
use kiln::runtime::Start;
use kiln::server::{App, LoadedModel, Settings};
use kiln::tokenizer::PromptTokenizer;
use kiln_models::families::Family;
use kiln_models::job::Job;
use tokio::sync::oneshot;

use super::pipeline::{Pace, Record, fake};

/// A server with a fake pipeline on a free port.
pub(super) struct TestServer {
    pub(super) address: SocketAddr,
    app: App,
    pub(super) engine: Engine,
    record: Arc<Record>,
    shutdown: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl TestServer {
    pub(super) fn start(pace: Pace, max_queue: usize) -> Self {
        Self::with_settings(pace, max_queue, Settings::new("test/model"))
    }

    pub(super) fn with_settings(pace: Pace, max_queue: usize, settings: Settings) -> Self {
        let server = Self::with_queue(pace, max_queue, settings);
        server.set_model();
        server
    }

    /// A server that is not ready until [`TestServer::set_model`] is called.
    pub(super) fn without_model(settings: Settings) -> Self {
        Self::with_queue(Pace::Fast, 4, settings)
    }

    fn with_queue(pace: Pace, max_queue: usize, settings: Settings) -> Self {
        Self::of_app(pace, max_queue, App::new(settings))
    }

    /// A server with durable jobs, which is not ready until [`TestServer::set_model`] is called.
    pub(super) fn with_jobs(settings: Settings, store: Arc<dyn JobStore>) -> Self {
        Self::of_app(Pace::Fast, 4, App::new(settings).with_jobs(store))
    }

    fn of_app(pace: Pace, max_queue: usize, app: App) -> Self {
        let record = Arc::new(Record::default());
        let pipeline = fake(pace, Arc::clone(&record));
        let engine_settings = EngineSettings {
            max_queue,
            max_started: DEFAULT_MAX_STARTED,
            max_memory: None,
            adapter_cache_bytes: usize::MAX,
            max_step_tokens: Some(0),
            warm_up: None,
        };
        let engine = Engine::start(Box::new(pipeline), engine_settings);
        let served = app.clone();

        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap();
        let (shutdown, stopped) = oneshot::channel::<()>();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_multi_thread()
                .worker_threads(1)
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(async {
                let listener = tokio::net::TcpListener::from_std(listener).unwrap();
                let shutdown = async { drop(stopped.await) };
                kiln::server::serve(listener, served, shutdown)
                    .await
                    .unwrap();
            });
        });
        Self {
            address,
            app,
            engine,
            record,
            shutdown: Some(shutdown),
            thread: Some(thread),
        }
    }

    /// The progress of the start.
    pub(super) fn progress(&self) -> &Start {
        &self.app.start
    }

    /// A server with this default of step caches, and a model with these ratios.
    pub(super) fn with_caches(settings: Settings, caches: StepCaches) -> Self {
        let server = Self::without_model(settings);
        server.set_model_with(caches);
        server
    }

    /// A server whose model has other limits than the default.
    pub(super) fn with_limits(settings: Settings, change: impl FnOnce(&mut Limits)) -> Self {
        let server = Self::without_model(settings);
        let mut limits = Limits::for_sizes(server.engine.info().sizes);
        change(&mut limits);
        server.set_model_of(limits);
        server
    }

    pub(super) fn set_model(&self) {
        self.set_model_with(StepCaches::default());
    }

    /// A server that generates no images.
    pub(super) fn without_engine(settings: Settings) -> Self {
        let server = Self::without_model(settings);
        server.app.set_model(LoadedModel {
            engine: None,
            tokenizer: load_tokenizer().into(),
            limits: Limits::for_sizes(server.engine.info().sizes),
            adapters: kiln::adapters::AdapterStore::default(),
            prompt_guide: None,
        });
        server
    }

    fn set_model_with(&self, caches: StepCaches) {
        self.set_model_of(Limits {
            caches,
            ..Limits::for_sizes(self.engine.info().sizes)
        });
    }

    fn set_model_of(&self, limits: Limits) {
        self.app.set_model(LoadedModel {
            engine: Some(self.engine.clone()),
            tokenizer: load_tokenizer().into(),
            limits,
            adapters: kiln::adapters::AdapterStore::default(),
            prompt_guide: None,
        });
    }

    /// The last job that the pipeline has started.
    pub(super) fn last_job(&self) -> Job {
        self.record.last_job.lock().unwrap().clone().unwrap()
    }

    pub(super) fn steps(&self) -> usize {
        self.record.steps.load(Ordering::SeqCst)
    }

    pub(super) fn discards(&self) -> usize {
        self.record.discards.load(Ordering::SeqCst)
    }

    pub(super) fn wait_for_steps(&self, steps: usize) {
        wait_until("the pipeline makes no steps", || self.steps() >= steps);
    }

    /// Waits until this number of requests is in the queue.
    pub(super) fn wait_for_waiting(&self, requests: usize) {
        let message = "the queue has another length";
        wait_until(message, || self.engine.stats().waiting == requests);
    }

    /// What happens at the first signal.
    pub(super) fn leave(&self) {
        self.app.leave();
    }

    pub(super) fn begin_shutdown(&mut self) {
        self.shutdown = None;
    }

    pub(super) fn join(&mut self) {
        self.thread.take().unwrap().join().unwrap();
    }
}

fn wait_until(message: &str, is_so: impl Fn() -> bool) {
    let started = Instant::now();
    while !is_so() {
        assert!(started.elapsed() < Duration::from_mins(1), "{message}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

impl Drop for TestServer {
    fn drop(&mut self) {
        self.begin_shutdown();
        self.engine.stop();
    }
}

/// The tokenizer of the servers.
pub(super) fn load_tokenizer() -> PromptTokenizer {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folder = root.join("tests/fixtures/checkpoints/base/tokenizer");
    PromptTokenizer::load(&folder, Family::QwenImage.template()).unwrap()
}
