//! The durable jobs of a server: their store, and the worker until its end.

use std::time::Duration;

use tokio::time::{sleep, timeout};

use crate::engine::Engine;
use crate::jobs::{Worker, WorkerSettings};
use crate::server::{App, Signals};

use super::super::error::CliError;
use super::jobs_args::JobsArgs;

/// How long outcomes may take to be recorded after the last job has ended.
const LAST_OUTCOMES: Duration = Duration::from_secs(8);
/// How long jobs may take to be released after that.
const LAST_RELEASES: Duration = Duration::from_secs(6);

/// Opens the store of jobs, if the server is to have one.
pub(super) async fn open(args: &JobsArgs, model: &str, app: App) -> Result<App, CliError> {
    let Some(_location) = &args.jobs else {
        return Ok(app);
    };
    let _settings = args.store_settings(model, &app.settings.instance);
    Ok(app)
}

/// Starts to work on the jobs, if the server has jobs and an engine.
pub(super) fn start_worker(app: &App, args: &JobsArgs, engine: Option<&Engine>) -> Option<Worker> {
    let settings = args.store_settings("", "");
    let stall_timeout = args.stall_timeout(engine?.info().backend);
    app.start_worker(WorkerSettings::new(&settings, stall_timeout))
}

/// Waits until the outcomes of the jobs are recorded, after the engine has stopped. Jobs whose outcome
/// the store does not take in time become available to other workers when their leases end.
pub(super) async fn finish(worker: &mut Worker, signals: &mut Signals) {
    tokio::select! {
        () = worker.ended() => return,
        () = sleep(LAST_OUTCOMES) => {}
        name = signals.next() => tracing::info!("{name}: unrecorded outcomes are dropped"),
    }
    worker.stop();
    if timeout(LAST_RELEASES, worker.ended()).await.is_err() {
        tracing::warn!(
            "the store of jobs does not answer: jobs are released when their leases end"
        );
    }
}
