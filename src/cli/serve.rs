use std::net::TcpListener;

use tokio::runtime::Runtime;

use crate::backend;
use crate::engine::Engine;
use crate::request::Limits;
use crate::server::{self, App};

use super::args::ServeArgs;
use super::error::CliError;
use super::model::Model;

/// `kiln serve`.
pub(super) fn run(args: &ServeArgs) -> Result<(), CliError> {
    let name = args.model();
    let settings = args.loading.settings(args.backend.choice()?)?;
    // Before the model is loaded: a port that is taken should not cost minutes. Clients that
    // connect meanwhile wait.
    let listener = listen(args)?;
    backend::check(settings.backend)?;

    let model = Model::open(name, args.loading.load_format)?;
    let painter = model.painter(&settings)?;
    let engine = Engine::start(painter, args.max_queue);
    let app = App {
        limits: Limits::for_sizes(engine.info().sizes),
        engine: engine.clone(),
        tokenizer: model.tokenizer,
        noise_generator: args.noise.generator(),
        served_model_name: args.served_model_name.as_deref().unwrap_or(name).to_owned(),
    };
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
