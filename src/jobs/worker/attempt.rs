//! One attempt at one job, from the lease to the recorded outcome.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinError};
use tokio::time::{sleep, timeout};
use tracing::{Instrument as _, Span, field};

use super::{Backoff, Held, JobFailure, JobFile, Phase, Progress, RunError, Runner, Shared};
use crate::jobs::{JobLease, Revoked, Settled, StoreError, StoredJob, TraceContext};
use crate::telemetry::{self, Kind};

/// How long a worker that stops waits for the store to take a job back.
const LAST_RELEASE: Duration = Duration::from_secs(3);

pub(super) struct Attempt<R: Runner> {
    worker: Arc<Shared<R>>,
    lease: Arc<dyn JobLease>,
    phase: watch::Receiver<Phase>,
    place: Place<R>,
}

/// How an attempt ended, before that is recorded.
enum End {
    Files(Vec<JobFile>),
    Failed(JobFailure),
    /// Available again after this time; the attempt does not count.
    Released(Duration),
    /// Nothing is recorded: the job is not this worker's any more, or the attempt counts.
    Dropped,
}

impl<R: Runner> Attempt<R> {
    pub(super) fn new(
        worker: Arc<Shared<R>>,
        lease: Box<dyn JobLease>,
        phase: watch::Receiver<Phase>,
    ) -> Self {
        let place = Place {
            worker: Arc::clone(&worker),
            stage: Stage::Waiting,
        };
        Self {
            worker,
            lease: lease.into(),
            phase,
            place,
        }
    }

    pub(super) async fn run(mut self) {
        let job = self.lease.job();
        let span = span_of(job);
        let keeper = tokio::spawn(
            keep(Arc::clone(&self.lease), self.worker.settings.lease).instrument(span.clone()),
        );
        let _keeper = Aborted(keeper.abort_handle());
        async {
            self.worker.stats.count_attempt();
            let end = self.generate().await;
            self.place.enter(Stage::Storing);
            self.settle(end).await;
        }
        .instrument(span)
        .await;
    }

    /// Runs the job until it ends, or must.
    async fn generate(&mut self) -> End {
        let (sender, mut progress) = watch::channel(None);
        let (runner, lease) = (Arc::clone(&self.worker.runner), Arc::clone(&self.lease));
        let report = move |progress: Progress| {
            sender.send_replace(Some(progress));
        };
        let run = async move { runner.run(lease.job(), &report).await };
        let mut run = tokio::spawn(run.in_current_span());
        // Dropping the future of a job cancels its work.
        let _run = Aborted(run.abort_handle());
        let mut stalled = self.worker.stalled.subscribe();
        let lease = Arc::clone(&self.lease);
        let mut revoked = lease.revoked();
        loop {
            let has_begun = self.place.stage == Stage::Running;
            tokio::select! {
                biased;
                outcome = &mut run => return self.end_of(outcome),
                revoked = &mut revoked => {
                    match revoked {
                        Revoked::Cancelled => tracing::info!("cancelled"),
                        Revoked::Lost => tracing::warn!("another worker may have the job: given up"),
                    }
                    return End::Dropped;
                }
                Ok(()) = progress.changed() => {
                    self.place.enter(Stage::Running);
                    if let Some(progress) = *progress.borrow_and_update() {
                        self.lease.report(progress);
                    }
                }
                () = reached(&mut self.phase, |phase| must_release(phase, has_begun)) => {
                    tracing::info!("released, as the server stops");
                    return End::Released(Duration::ZERO);
                }
                () = has_stalled(&mut stalled) => {
                    return if has_begun { End::Dropped } else { End::Released(Duration::ZERO) };
                }
            }
        }
    }

    fn end_of(&self, outcome: Result<Result<Vec<JobFile>, RunError>, JoinError>) -> End {
        let outcome = outcome.unwrap_or_else(|error| {
            Err(RunError::Broken(JobFailure {
                code: "internal_error".to_owned(),
                message: format!("the worker failed: {error}"),
            }))
        });
        if let Err(RunError::Failed(failure) | RunError::Broken(failure)) = &outcome {
            telemetry::fail(&Span::current(), &failure.code, &failure.message);
        }
        match outcome {
            Ok(files) => End::Files(files),
            Err(RunError::Failed(failure)) => End::Failed(failure),
            Err(RunError::Broken(failure)) => {
                let JobFailure { code, message } = &failure;
                tracing::warn!(code, "the attempt failed: {message}");
                if self.lease.job().attempt >= self.worker.settings.max_attempts {
                    End::Failed(failure)
                } else {
                    End::Dropped
                }
            }
            Err(RunError::NotNow(reason)) => {
                tracing::info!("released: {reason}");
                let is_stopping = *self.phase.borrow() != Phase::Taking;
                End::Released(if is_stopping {
                    Duration::ZERO
                } else {
                    self.worker.settings.not_now
                })
            }
        }
    }

    /// Records the end. While the store does not answer, files are kept and it is tried again, until
    /// another worker may have the job or the server is stopped.
    async fn settle(&mut self, end: End) {
        let lease = Arc::clone(&self.lease);
        let worker = Arc::clone(&self.worker);
        let recorded = match end {
            End::Dropped => return,
            End::Released(after) => {
                let release = timeout(LAST_RELEASE, lease.release(after));
                match release.await {
                    Ok(Ok(())) => return,
                    Ok(Err(error)) => tracing::warn!("not released: {error}"),
                    Err(_) => tracing::warn!("not released: the store does not answer"),
                }
                // The job is available again when the lease ends.
                return;
            }
            End::Failed(failure) => self.fail(&failure).await,
            End::Files(files) => {
                let complete = || lease.complete(files.clone());
                match self.repeat(complete).await {
                    Some(Ok(Settled::Recorded)) => {
                        worker.stats.count_completed();
                        tracing::info!("completed");
                        Some(Settled::Recorded)
                    }
                    Some(Ok(settled)) => Some(settled),
                    Some(Err(error)) => {
                        let code = "result_too_large".to_owned();
                        let message = format!("the images cannot be stored: {error}");
                        self.fail(&JobFailure { code, message }).await
                    }
                    None => None,
                }
            }
        };
        match recorded {
            Some(Settled::Recorded) => {}
            Some(Settled::Superseded) => {
                tracing::info!("the job had ended before, or another worker has it");
            }
            None => tracing::warn!("the outcome was not recorded"),
        }
    }

    async fn fail(&mut self, failure: &JobFailure) -> Option<Settled> {
        let lease = Arc::clone(&self.lease);
        let fail = || lease.fail(failure.clone());
        let settled = self.repeat(fail).await?.ok()?;
        if settled == Settled::Recorded {
            let JobFailure { code, message } = failure;
            self.worker.stats.count_failed(code);
            tracing::warn!(code, "failed: {message}");
        }
        Some(settled)
    }

    /// Repeats a call of the store until it works, or cannot. `None` if the lease is lost or the server
    /// stops before.
    async fn repeat<T, F>(&mut self, call: impl Fn() -> F) -> Option<Result<T, StoreError>>
    where
        F: Future<Output = Result<T, StoreError>>,
    {
        let lease = Arc::clone(&self.lease);
        let mut revoked = lease.revoked();
        let mut backoff = Backoff::new();
        loop {
            let error = tokio::select! {
                outcome = call() => match outcome {
                    Err(error @ (StoreError::Unavailable(_) | StoreError::Broken(_))) => error,
                    outcome => return Some(outcome),
                },
                () = reached(&mut self.phase, |phase| phase == Phase::Stopping) => return None,
            };
            let wait = backoff.next();
            let seconds = wait.as_secs_f64();
            tracing::warn!("the outcome is not recorded yet, next try in {seconds:.1} s: {error}");
            tokio::select! {
                () = sleep(wait) => {}
                // Whoever has the job now, or has cancelled it, records its end.
                _ = &mut revoked => return None,
                () = reached(&mut self.phase, |phase| phase == Phase::Stopping) => return None,
            }
        }
    }
}

/// The span of an attempt's log lines, which continues the trace of the job's submission.
fn span_of(job: &StoredJob) -> Span {
    let trace_id = field::Empty;
    let span = tracing::info_span!("job", id = %job.id, attempt = job.attempt, trace_id);
    let trace = job.trace.as_ref().map(TraceContext::headers);
    let attributes = [
        ("kiln.job.id", job.id.as_str().into()),
        ("kiln.job.attempt", job.attempt.into()),
    ];
    telemetry::attach(&span, trace, Kind::Consumer, "job run", &attributes);
    span
}

/// Waits for a phase. A worker that is gone counts as one that stops.
async fn reached(phase: &mut watch::Receiver<Phase>, is_it: impl Fn(Phase) -> bool) {
    drop(phase.wait_for(|phase| is_it(*phase)).await);
}

async fn has_stalled(stalled: &mut watch::Receiver<bool>) {
    drop(stalled.wait_for(|stalled| *stalled).await);
}

/// Whether a job must be released because the worker stops.
fn must_release(phase: Phase, has_begun: bool) -> bool {
    match phase {
        Phase::Taking => false,
        Phase::Draining => !has_begun,
        Phase::Stopping => true,
    }
}

/// Extends a lease again and again.
async fn keep(lease: Arc<dyn JobLease>, time: Duration) {
    loop {
        sleep(time / 3).await;
        let mut backoff = Backoff::new();
        while let Err(error) = lease.extend().await {
            tracing::warn!("the store was not told that the job goes on: {error}");
            sleep(backoff.next().min(time / 6)).await;
        }
    }
}

/// A task that is aborted when this is dropped.
struct Aborted(AbortHandle);

impl Drop for Aborted {
    fn drop(&mut self) {
        self.0.abort();
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Waiting,
    Running,
    Storing,
}

/// The place of a job among those that the worker holds, which was counted as waiting.
struct Place<R> {
    worker: Arc<Shared<R>>,
    stage: Stage,
}

impl<R> Place<R> {
    fn enter(&mut self, next: Stage) {
        if self.stage == next {
            return;
        }
        self.worker.held.send_modify(|held| {
            *count(held, self.stage) -= 1;
            *count(held, next) += 1;
        });
        self.stage = next;
    }
}

impl<R> Drop for Place<R> {
    fn drop(&mut self) {
        let count = |held: &mut Held| *count(held, self.stage) -= 1;
        self.worker.held.send_modify(count);
    }
}

fn count(held: &mut Held, stage: Stage) -> &mut usize {
    match stage {
        Stage::Waiting => &mut held.waiting,
        Stage::Running => &mut held.running,
        Stage::Storing => &mut held.storing,
    }
}
