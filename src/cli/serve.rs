use std::net::TcpListener;

use tokio::runtime::Runtime;

use crate::backend;
use crate::engine::{DEFAULT_MAX_STARTED, Engine, EngineSettings};
use crate::server::{self, App};

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
    let settings = args.settings()?;
    // Before the model is loaded: a port that is taken should not cost minutes. Clients that
    // connect meanwhile wait.
    let listener = listen(args)?;
    backend::check(loading.backend)?;

    let model = Model::open(args.model(), args.loading.load_format)?;
    if let Some(prompt) = &args.default_negative_prompt {
        let tokens = model.tokenizer.encode_prompt(prompt);
        tokens.map_err(CliError::DefaultNegativePrompt)?;
    }
    let painter = model.painter(&loading)?;
    let engine_settings = EngineSettings {
        max_queue: args.limits.max_queue,
        max_started: DEFAULT_MAX_STARTED,
        warm_up: None,
    };
    let engine = Engine::start(painter, engine_settings);
    let app = App::new(
        engine.clone(),
        model.tokenizer,
        args.limits.limits(engine.info().sizes),
        args.noise.generator(),
        settings,
    );
    let runtime = Runtime::new().map_err(CliError::Server)?;
    runtime
        .block_on(async {
            let listener = tokio::net::TcpListener::from_std(listener)?;
            tracing::info!("listening on http://{}", listener.local_addr()?);
            server::serve(listener, app, server::shutdown_signal(engine.clone())).await
        })
        .map_err(CliError::Server)?;
    engine.shutdown();
    Ok(())
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
