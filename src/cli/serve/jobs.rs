//! The durable jobs of a server: their store, and the worker until its end.

use std::time::Duration;

use tokio::time::{Instant, sleep_until, timeout};

use crate::engine::Engine;
use crate::jobs::{self, Worker};
use crate::server::{App, Signals};

use super::super::error::CliError;
use super::jobs_args::JobsArgs;

/// How long outcomes may take to be recorded after the last job has ended, if no time to drain is left.
const LAST_OUTCOMES: Duration = Duration::from_secs(5);
/// How long jobs may take to be released after that.
const LAST_RELEASES: Duration = Duration::from_secs(4);

/// Opens the store of jobs, if the server is to have one.
pub(super) async fn open(args: &JobsArgs, model: &str, app: App) -> Result<App, CliError> {
    let Some(location) = args.location()? else {
        return Ok(app);
    };
    let settings = args.store_settings(model, &app.settings.instance);
    let store = jobs::open(&location, args.results.as_ref(), settings).await;
    let store = store.map_err(|error| {
        let location = location.clone();
        CliError::Jobs { location, error }
    })?;
    tracing::info!("jobs are stored in {location}");
    Ok(app.with_jobs(store))
}

/// Starts to work on the jobs, if the server has jobs and an engine.
pub(super) fn start_worker(app: &App, args: &JobsArgs, engine: Option<&Engine>) -> Option<Worker> {
    app.start_worker(args.stall_timeout(engine?.info().backend))
}

/// Waits until the outcomes of the jobs are recorded, after the engine has stopped; until `end` if the
/// store does not answer. Jobs whose outcome it does not take in time become available to other workers
/// when their leases end.
pub(super) async fn finish(worker: &mut Worker, end: Instant, signals: &mut Signals) {
    tokio::select! {
        () = worker.ended() => return,
        () = sleep_until(end.max(Instant::now() + LAST_OUTCOMES)) => {}
        name = signals.next() => tracing::info!("{name}: unrecorded outcomes are dropped"),
    }
    worker.stop();
    if timeout(LAST_RELEASES, worker.ended()).await.is_err() {
        tracing::warn!(
            "the store of jobs does not answer: jobs are released when their leases end"
        );
    }
}
