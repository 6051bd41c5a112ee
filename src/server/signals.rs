use std::io;

use crate::engine::Engine;

/// Ready at the first ctrl-c or SIGTERM; images that have been asked for are still finished. The
/// second one stops the engine, so that what is unfinished fails after its current step.
pub async fn shutdown_signal(engine: Engine) {
    match next_signal().await {
        Ok(name) => tracing::info!(
            "{name}: no new requests are taken, those under way are finished; \
             a second signal ends them"
        ),
        Err(error) => {
            tracing::error!(%error, "cannot listen for signals");
            return std::future::pending().await;
        }
    }
    tokio::spawn(async move {
        if let Ok(name) = next_signal().await {
            tracing::info!("{name}: unfinished requests end now");
            engine.stop();
        }
    });
}

#[cfg(unix)]
async fn next_signal() -> io::Result<&'static str> {
    use tokio::signal::unix::{SignalKind, signal};

    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    tokio::select! {
        _ = interrupt.recv() => Ok("SIGINT"),
        _ = terminate.recv() => Ok("SIGTERM"),
    }
}

#[cfg(not(unix))]
async fn next_signal() -> io::Result<&'static str> {
    tokio::signal::ctrl_c().await.map(|()| "ctrl-c")
}
