use std::net::TcpListener;

use kiln_models::job::Job;
use kiln_models::noise::NoiseGenerator;
use kiln_models::pipeline::ImageSizes;
use tokio::runtime::Runtime;

use crate::backend;
use crate::engine::{DEFAULT_MAX_STARTED, Engine, EngineSettings, StartError, State};
use crate::request::{GenerationParams, GenerationRequest, Limits};
use crate::server::{self, App};
use crate::tokenizer::PromptTokenizer;

use super::args::ServeArgs;
use super::error::CliError;
use super::model::Model;

/// `kiln serve`.
pub(super) fn run(args: &ServeArgs) -> Result<(), CliError> {
    if args.cfg_parallel_size != 1 {
        return Err(CliError::CfgParallel {
            size: args.cfg_parallel_size,
        });
    }
    let loading = args.loading.settings(args.backend.choice()?)?;
    let mut settings = args.settings()?;
    // Before the model is loaded: a port that is taken should not cost minutes. Clients that
    // connect meanwhile wait.
    let listener = listen(args)?;
    backend::check(loading.backend)?;

    let model = Model::open(args.model(), args.loading.load_format)?;
    if let Some(prompt) = &args.default_negative_prompt {
        let tokens = model.tokenizer.encode_prompt(prompt);
        tokens.map_err(CliError::DefaultNegativePrompt)?;
    }
    settings.prompt_guide = model.prompt_guide();
    let pipeline = model.pipeline(&loading)?;
    let noise = args.noise.generator();
    let sizes = pipeline.info().sizes;
    let warm_up = if args.no_warm_up {
        None
    } else {
        Some(warm_up(&model.tokenizer, sizes, noise)?)
    };
    let engine_settings = EngineSettings {
        max_queue: args.limits.max_queue,
        max_started: DEFAULT_MAX_STARTED,
        warm_up,
    };
    let engine = Engine::start(pipeline, engine_settings);
    let limits = args.limits.limits(sizes);
    let app = App::new(engine.clone(), model.tokenizer, limits, noise, settings);
    let runtime = Runtime::new().map_err(CliError::Server)?;
    let outcome = runtime.block_on(async {
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

/// One step, with guidance, of a picture of the model's own size: as much as is compiled, tuned or
/// paged in at the first request.
fn warm_up(
    tokenizer: &PromptTokenizer,
    sizes: ImageSizes,
    noise: NoiseGenerator,
) -> Result<Job, CliError> {
    let params = GenerationParams {
        prompt: "warm-up".to_owned(),
        negative_prompt: Some(" ".to_owned()),
        num_inference_steps: Some(1),
        seed: Some(0),
        ..GenerationParams::default()
    };
    let request = GenerationRequest::new(params, &Limits::for_sizes(sizes), noise)?;
    let tokens = request.tokenize(tokenizer)?;
    Ok(request.into_job(tokens, false))
}

/// Ready if the warm-up fails, and only then.
async fn failed_start(engine: &Engine) -> StartError {
    match engine.ready().await {
        Err(error @ StartError::WarmUp(_)) => return error,
        // Told to stop before it was ready.
        Err(StartError::Stopped) => {}
        Ok(()) => tracing::info!("ready"),
    }
    engine.stopped().await;
    if let State::Failed(error) = engine.state() {
        // Those who watch the server's health hear of it too.
        tracing::error!(%error, "the device is lost: no more requests are taken; restart kiln");
    }
    std::future::pending().await
}

fn listen(args: &ServeArgs) -> Result<TcpListener, CliError> {
    let listener = TcpListener::bind((args.host.as_str(), args.port)).and_then(|listener| {
        // As tokio wants it.
        listener.set_nonblocking(true)?;
        Ok(listener)
    });
    let (host, port) = (args.host.clone(), args.port);
    listener.map_err(|source| CliError::Listen { host, port, source })
}
