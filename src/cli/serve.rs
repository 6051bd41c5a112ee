//! `kiln serve`.

mod args;

pub(super) use self::args::{LogFormat, ServeArgs};

use std::net::TcpListener;

use kiln_models::job::Job;
use kiln_models::noise::NoiseGenerator;

use crate::backend;
use crate::engine::{DEFAULT_MAX_STARTED, Engine, EngineSettings, StartError, State};
use crate::request::{GenerationParams, GenerationRequest};
use crate::runtime::{Model, Runtime};
use crate::server::{self, App};

use super::error::CliError;

/// `kiln serve`.
pub(super) fn run(args: &ServeArgs) -> Result<(), CliError> {
    if args.cfg_parallel_size != 1 {
        return Err(CliError::CfgParallel {
            size: args.cfg_parallel_size,
        });
    }
    let loading = args.loading.settings(args.backend.choice()?)?;
    let mut settings = args.settings()?;
    // Before the model is loaded, which takes minutes: the port may be in use. Clients that connect
    // meanwhile wait.
    let listener = listen(args)?;
    backend::check(loading.backend)?;

    let model = Model::find(&args.model_settings())?;
    if let Some(prompt) = &args.default_negative_prompt {
        let tokens = model.tokenizer().encode_prompt(prompt);
        tokens.map_err(CliError::DefaultNegativePrompt)?;
    }
    let runtime = model.load(&loading)?;
    settings.prompt_guide = runtime.prompt_guide;
    let noise = args.noise.generator();
    let warm_up = if args.no_warm_up {
        None
    } else {
        Some(warm_up(&runtime, noise)?)
    };
    let engine_settings = EngineSettings {
        max_queue: args.limits.max_queue,
        max_started: DEFAULT_MAX_STARTED,
        max_memory: args.limits.max_memory,
        warm_up,
    };
    let limits = args.limits.limits(runtime.limits.sizes);
    let engine = Engine::start(runtime.pipeline, engine_settings);
    let app = App::new(engine.clone(), runtime.tokenizer, limits, noise, settings);
    let threads = tokio::runtime::Runtime::new().map_err(CliError::Server)?;
    let outcome = threads.block_on(async {
        let listener = tokio::net::TcpListener::from_std(listener).map_err(CliError::Server)?;
        let address = listener.local_addr().map_err(CliError::Server)?;
        tracing::info!("listening on http://{address}");
        let shutdown = server::shutdown_signal(engine.clone(), args.drain_timeout());
        tokio::select! {
            outcome = server::serve(listener, app, shutdown) => outcome.map_err(CliError::Server),
            error = failed_start(&engine) => Err(CliError::Start(error)),
        }
    });
    engine.shutdown();
    outcome
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
    Ok(request.into_job(tokens, false))
}

/// Completes if the warm-up fails, and never otherwise.
async fn failed_start(engine: &Engine) -> StartError {
    match engine.ready().await {
        Err(error @ StartError::WarmUp(_)) => return error,
        // Stopped before it was ready.
        Err(StartError::Stopped) => {}
        Ok(()) => tracing::info!("ready"),
    }
    engine.stopped().await;
    if let State::Failed(error) = engine.state() {
        // The health routes report it too.
        tracing::error!(%error, "the device is lost: no more requests are taken; restart kiln");
    }
    std::future::pending().await
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
