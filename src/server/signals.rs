//! Shutdown on SIGINT and SIGTERM.

use std::io;
use std::time::Duration;

use crate::engine::Engine;

/// Waits for SIGINT (ctrl-c) or SIGTERM, and returns its name.
pub async fn shutdown_signal() -> &'static str {
    match next_signal().await {
        Ok(name) => name,
        Err(error) => {
            tracing::error!(%error, "cannot listen for signals");
            std::future::pending().await
        }
    }
}

/// Drains the engine because of this signal, and returns when it has stopped.
///
/// Accepted requests have `drain_timeout` to finish. Meanwhile the server keeps responding, so that
/// `/health/ready` reports the shutdown. A second signal stops the engine: unfinished requests fail
/// after their current step.
pub async fn drain(engine: &Engine, drain_timeout: Duration, signal: &str) {
    tracing::info!(
        "{signal}: no new requests are accepted, running requests have {} s to finish; \
         a second signal ends them",
        drain_timeout.as_secs_f64()
    );
    engine.drain(drain_timeout);
    tokio::select! {
        () = engine.stopped() => {}
        signal = next_signal() => {
            if let Ok(name) = signal {
                tracing::info!("{name}: unfinished requests end now");
            }
            engine.stop();
            engine.stopped().await;
        }
    }
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
