//! Shutdown on SIGINT, SIGTERM and SIGHUP.

use std::io;
use std::time::Duration;

use tokio::time::sleep;

use crate::engine::Engine;

use super::App;

/// How long the parts of a shutdown take at most.
#[derive(Debug, Clone, Copy)]
pub struct ShutdownTimes {
    /// How long requests are still taken after the signal, while the server is not ready any more, so
    /// that routers stop sending them before they are refused.
    pub delay: Duration,
    /// How long accepted requests have to finish after that.
    pub drain: Duration,
}

/// Ends the engine, if there is one, because of the signal `name`, and returns when it has stopped.
///
/// From the signal on, `/health/ready` reports the shutdown, and every answer closes its connection.
/// After the delay no more requests are taken, connections without a request are closed, and accepted
/// requests have time to finish; the server keeps responding meanwhile. A second signal stops the
/// engine: unfinished requests fail after their current step.
pub async fn drain(
    app: &App,
    engine: Option<&Engine>,
    times: ShutdownTimes,
    name: &str,
    signals: &mut Signals,
) {
    app.leave();
    let end = async {
        if !times.delay.is_zero() {
            tracing::info!(
                "{name}: the server is not ready any more and still takes requests for {} s; a second \
                 signal ends it",
                times.delay.as_secs_f64()
            );
            tokio::select! {
                () = sleep(times.delay) => {}
                () = stopped(engine) => {}
            }
        }
        let Some(engine) = engine else {
            tracing::info!("{name}: the server ends");
            app.connections.end_open();
            return;
        };
        tracing::info!(
            "{name}: no new requests are accepted, running requests have {} s to finish; \
             a second signal ends them",
            times.drain.as_secs_f64()
        );
        engine.drain(times.drain);
        app.connections.end_open();
        engine.stopped().await;
    };
    tokio::select! {
        () = end => {}
        name = signals.next() => {
            tracing::info!("{name}: unfinished requests end now");
            if let Some(engine) = engine {
                engine.stop();
                engine.stopped().await;
            }
        }
    }
}

/// Waits until the engine has stopped, for ever if there is none.
async fn stopped(engine: Option<&Engine>) {
    match engine {
        Some(engine) => engine.stopped().await,
        None => std::future::pending().await,
    }
}

/// The signals that end the server: SIGINT (ctrl-c), SIGTERM and SIGHUP. SIGHUP stays ignored if it is
/// ignored already, as after `nohup`.
#[cfg(unix)]
#[derive(Debug)]
pub struct Signals {
    interrupt: tokio::signal::unix::Signal,
    terminate: tokio::signal::unix::Signal,
    /// `None` if it is ignored.
    hang_up: Option<tokio::signal::unix::Signal>,
}

#[cfg(unix)]
impl Signals {
    /// Listens from now on.
    ///
    /// # Errors
    ///
    /// The operating system refuses.
    pub fn new() -> io::Result<Self> {
        use tokio::signal::unix::{SignalKind, signal};

        use crate::signals::is_ignored;

        // Before a handler is set, which replaces the disposition.
        let hang_up = if is_ignored(libc::SIGHUP) {
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

    /// Waits for the next signal. Returns its name.
    pub async fn next(&mut self) -> &'static str {
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

/// The signal that ends the server.
#[cfg(not(unix))]
#[derive(Debug)]
pub struct Signals;

#[cfg(not(unix))]
impl Signals {
    pub fn new() -> io::Result<Self> {
        Ok(Self)
    }

    pub async fn next(&mut self) -> &'static str {
        if tokio::signal::ctrl_c().await.is_err() {
            return std::future::pending().await;
        }
        "ctrl-c"
    }
}
