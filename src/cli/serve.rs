//! `kiln serve`.

mod args;
mod jobs;
mod jobs_args;
mod webhook_args;

pub(super) use self::args::{LogFormat, ServeArgs};

use std::future::pending;
use std::net::TcpListener;
use std::panic::resume_unwind;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use kiln_models::job::Job;
use kiln_models::noise::NoiseGenerator;
use kiln_models::step_cache::CacheError;
use tokio::runtime::Handle;
use tokio::sync::oneshot;
use tokio::task::spawn_blocking;
use tokio::time::{Instant, timeout};

use crate::adapters::AdapterStore;
use crate::backend::{self, LoadSettings};
use crate::engine::{DEFAULT_MAX_STARTED, Engine, EngineSettings, State};
use crate::request::{
    DEFAULT_NUM_INFERENCE_STEPS, GenerationParams, GenerationRequest, StepCaches,
};
use crate::runtime::{Model, ModelSettings, Runtime, Stage, Start};
use crate::server::{self, App, LoadedModel, Role, Signals};

use super::error::CliError;
use super::lora_args::merged;

/// How long clients have to read their responses if the server is stopped during its start.
const LAST_ANSWERS: Duration = Duration::from_secs(1);

/// `kiln serve`.
pub(super) fn run(args: ServeArgs) -> Result<(), CliError> {
    args.caches.caches()?;
    args.jobs.check()?;
    server::raise_open_file_limit();
    let loading = LoadSettings {
        adapter_cache_bytes: usize::try_from(args.lora.lora_cache).unwrap_or(usize::MAX),
        ..args.loading.settings(&args.backend)?
    };
    let model = args.model_settings();
    let app = App::new(args.settings(&model.public_name())?);
    // Before anything that takes time: the port may be in use.
    let listener = listen(&args)?;
    let threads = tokio::runtime::Runtime::new().map_err(CliError::Server)?;
    let outcome = threads.block_on(async {
        let app = jobs::open(&args.jobs, &model.public_name(), app).await?;
        serve(listener, app, args, model, loading).await
    });
    // Without waiting for the thread that finds and loads the model, which nothing can interrupt.
    threads.shutdown_background();
    outcome
}

/// Answers from the start on, while a thread finds, loads and warms up the model.
async fn serve(
    listener: TcpListener,
    app: App,
    args: ServeArgs,
    model: ModelSettings,
    loading: LoadSettings,
) -> Result<(), CliError> {
    let listener = tokio::net::TcpListener::from_std(listener).map_err(CliError::Server)?;
    let address = listener.local_addr().map_err(CliError::Server)?;
    let (stop, stopped) = oneshot::channel::<()>();
    let shutdown = async { drop(stopped.await) };
    let mut server = pin!(server::serve(listener, app.clone(), shutdown));
    let mut signals = Signals::new().map_err(CliError::Server)?;
    let _housekeeping = app.keep_house();
    tracing::info!("listening on http://{address}");

    let times = args.shutdown_times();
    let (start, role) = (app.start.clone(), args.jobs.role());
    let jobs = args.jobs.clone();
    let opening = spawn_blocking(move || match role {
        Role::Api => open_without_weights(&args, &model, &start),
        Role::All | Role::Worker => open(&args, &model, &loading, &start),
    });
    let model = tokio::select! {
        outcome = &mut server => return outcome.map_err(CliError::Server),
        model = opening => model.unwrap_or_else(|error| resume_unwind(error.into_panic()))?,
        name = signals.next() => {
            tracing::info!("{name}: the server is stopped before it is ready");
            drop(stop);
            let outcome = timeout(LAST_ANSWERS, server).await;
            return outcome.unwrap_or(Ok(())).map_err(CliError::Server);
        }
    };
    let engine = model.engine.clone();
    app.set_model(model);
    let mut worker = jobs::start_worker(&app, &jobs, engine.as_ref());
    tracing::info!("ready");
    let outcome = tokio::select! {
        outcome = &mut server => outcome.map_err(CliError::Server),
        outcome = async {
            let name = signals.next().await;
            let end = Instant::now() + times.delay + times.drain;
            if let Some(worker) = &worker {
                worker.drain();
            }
            server::drain(&app, engine.as_ref(), times, name, &mut signals).await;
            if let Some(worker) = &mut worker {
                jobs::finish(worker, end, &mut signals).await;
            }
            drop(stop);
            pending().await
        } => outcome,
        outcome = report_lost_device(engine.as_ref()) => outcome,
    };
    if let Some(engine) = engine {
        engine.shutdown();
    }
    outcome
}

/// Finds and loads the model, and generates the warm-up image.
fn open(
    args: &ServeArgs,
    model: &ModelSettings,
    loading: &LoadSettings,
    start: &Start,
) -> Result<LoadedModel, CliError> {
    backend::check(&loading.backend, loading.split_guidance)?;
    let (model, adapters) = check(args, Model::find_reporting(model, start)?)?;
    let caches = step_caches(args, &model.limits().caches)?;
    let runtime = model.load_reporting(loading, start)?;
    let warm_up = if args.no_warm_up {
        None
    } else {
        start.enter(Stage::WarmingUp);
        Some(warm_up(&runtime, args.noise.generator())?)
    };
    let engine_settings = EngineSettings {
        max_queue: args.limits.max_queue,
        max_started: DEFAULT_MAX_STARTED,
        max_memory: args.limits.max_memory,
        adapter_cache_bytes: loading.adapter_cache_bytes,
        max_step_tokens: args.limits.max_step_tokens,
        warm_up,
    };
    let engine = Engine::start(runtime.pipeline, engine_settings);
    let ready = Handle::current().block_on(engine.ready());
    ready.map_err(CliError::Start)?;
    Ok(LoadedModel {
        engine: Some(engine),
        tokenizer: Arc::clone(&runtime.tokenizer),
        limits: args.limits.limits(runtime.limits, caches),
        adapters,
        prompt_guide: runtime.prompt_guide,
    })
}

/// Finds the model, for a server that generates no images.
fn open_without_weights(
    args: &ServeArgs,
    model: &ModelSettings,
    start: &Start,
) -> Result<LoadedModel, CliError> {
    let (model, adapters) = check(args, Model::find_without_weights(model, start)?)?;
    let caches = step_caches(args, &model.limits().caches)?;
    Ok(LoadedModel {
        engine: None,
        tokenizer: model.shared_tokenizer(),
        limits: args.limits.limits(model.limits().clone(), caches),
        adapters,
        prompt_guide: model.prompt_guide(),
    })
}

/// Checks the arguments that depend on the model, and finds its adapters.
fn check(args: &ServeArgs, model: Model) -> Result<(Model, AdapterStore), CliError> {
    if let Some(prompt) = &args.default_negative_prompt {
        let tokens = model.tokenizer().encode_prompt(prompt);
        tokens.map_err(CliError::DefaultNegativePrompt)?;
    }
    let adapters = model.open_adapters(args.lora.settings())?;
    let model = merged(model, &adapters, args.lora.lora_merge.as_ref())?;
    Ok((model, adapters))
}

/// The default of the command line with what is known of the model.
fn step_caches(args: &ServeArgs, model: &StepCaches) -> Result<StepCaches, CliError> {
    let given = args.caches.caches()?;
    let caches = StepCaches {
        mag_ratios: given.mag_ratios.or_else(|| model.mag_ratios.clone()),
        blocks: model.blocks,
        ..given
    };
    let steps = DEFAULT_NUM_INFERENCE_STEPS as usize;
    match caches.policy(&caches.default, steps) {
        // Other errors concern this number of steps only.
        Err(error @ CacheError::TooManyBlocks { .. }) => Err(CliError::CacheBlocks(error)),
        _ => Ok(caches),
    }
}

/// A job that compiles, tunes and pages in what a first request would: one step with guidance, at
/// the model's default size.
fn warm_up(runtime: &Runtime, noise: NoiseGenerator) -> Result<Job, CliError> {
    let params = GenerationParams {
        prompt: "warm-up".to_owned(),
        negative_prompt: Some(" ".to_owned()),
        num_inference_steps: Some(1),
        seed: Some(0),
        ..GenerationParams::default()
    };
    let request = GenerationRequest::new(params, &runtime.limits, noise)?;
    let tokens = request.tokenize(&runtime.tokenizer)?;
    Ok(request.into_job(tokens, Vec::new(), false))
}

/// Logs it if the device is lost. Never completes.
async fn report_lost_device<T>(engine: Option<&Engine>) -> T {
    let Some(engine) = engine else {
        return pending().await;
    };
    engine.stopped().await;
    if let State::Failed(error) = engine.state() {
        // The health routes report it too.
        tracing::error!(%error, "no more requests are taken: restart kiln");
    }
    pending().await
}

fn listen(args: &ServeArgs) -> Result<TcpListener, CliError> {
    let listener = TcpListener::bind((args.host.as_str(), args.port)).and_then(|listener| {
        // tokio requires it.
        listener.set_nonblocking(true)?;
        Ok(listener)
    });
    let (host, port) = (args.host.clone(), args.port);
    listener.map_err(|source| CliError::Listen { host, port, source })
}
