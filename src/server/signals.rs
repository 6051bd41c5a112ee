//! Shutdown on SIGINT, SIGTERM and SIGHUP.

use std::io;
use std::time::Duration;

use crate::engine::Engine;

/// Waits for SIGINT (ctrl-c), SIGTERM or SIGHUP, drains the engine and returns when it has stopped.
/// SIGHUP stays ignored if it is ignored already, as after `nohup`.
///
/// Accepted requests have `drain_timeout` to finish. Meanwhile the server keeps responding, so that
/// `/health/ready` reports the shutdown. A second signal stops the engine: unfinished requests fail
/// after their current step.
pub async fn shutdown_signal(engine: Engine, drain_timeout: Duration) {
    let mut signals = match Signals::new() {
        Ok(signals) => signals,
        Err(error) => {
            tracing::error!(%error, "cannot listen for signals");
            return std::future::pending().await;
        }
    };
    let name = signals.next().await;
    tracing::info!(
        "{name}: no new requests are accepted, running requests have {} s to finish; \
         a second signal ends them",
        drain_timeout.as_secs_f64()
    );
    engine.drain(drain_timeout);
    tokio::select! {
        () = engine.stopped() => {}
        name = signals.next() => {
            tracing::info!("{name}: unfinished requests end now");
            engine.stop();
            engine.stopped().await;
        }
    }
}

/// The signals that end the server.
#[cfg(unix)]
struct Signals {
    interrupt: tokio::signal::unix::Signal,
    terminate: tokio::signal::unix::Signal,
    /// `None` if it is ignored.
    hang_up: Option<tokio::signal::unix::Signal>,
}

#[cfg(unix)]
impl Signals {
    fn new() -> io::Result<Self> {
        use tokio::signal::unix::{SignalKind, signal};

        // Before a handler is set, which replaces the disposition.
        let hang_up = if hang_up_is_ignored() {
            None
        } else {
            Some(signal(SignalKind::hangup())?)
        };
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
            hang_up,
        })
    }

    /// The name of the next signal.
    async fn next(&mut self) -> &'static str {
        let hang_up = async {
            match &mut self.hang_up {
                Some(signal) => signal.recv().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            _ = self.interrupt.recv() => "SIGINT",
            _ = self.terminate.recv() => "SIGTERM",
            _ = hang_up => "SIGHUP",
        }
    }
}

/// Whether this process was started with SIGHUP ignored. Only Linux tells.
#[cfg(unix)]
fn hang_up_is_ignored() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status
        .lines()
        .find_map(|line| line.strip_prefix("SigIgn:"))
        .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    // SIGHUP is signal 1, and has the lowest bit.
    mask.is_some_and(|mask| mask & 1 != 0)
}

/// The signal that ends the server.
#[cfg(not(unix))]
struct Signals;

#[cfg(not(unix))]
impl Signals {
    fn new() -> io::Result<Self> {
        Ok(Self)
    }

    async fn next(&mut self) -> &'static str {
        if tokio::signal::ctrl_c().await.is_err() {
            return std::future::pending().await;
        }
        "ctrl-c"
    }
}
