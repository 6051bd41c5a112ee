//! Runs the requests of durable jobs on the engine.
//!
//! A job goes the way of a request to `/v1/images/generations`, so that its files are the same to the byte.
//! It differs in two things. It takes no place of the engine's queue, as the worker takes jobs from the
//! store only when they can begin. And the engine never makes it cheaper because of the load, so that every
//! attempt makes the same files.

use std::sync::Arc;
use std::time::Instant;

use async_trait::async_trait;
use kiln_models::pipeline::PipelineError;
use tracing::Span;

use crate::adapters::AdapterError;
use crate::engine::{DEFAULT_MAX_STARTED, Event, JobError, State, SubmitError, SubmitOptions};
use crate::jobs::{Held, JobFailure, JobFile, Progress, RunError, Runner, StoredJob};
use crate::request::{ChosenAdapter, GenerationRequest};

use super::super::LoadedApp;
use super::super::error::ApiError;
use super::CheckedRequest;

/// Runs durable jobs on the engine of a server.
#[derive(Debug)]
pub(in super::super) struct StoredRunner(pub(in super::super) Arc<LoadedApp>);

#[async_trait]
impl Runner for StoredRunner {
    async fn run(
        &self,
        job: &StoredJob,
        report: &(dyn Fn(Progress) + Send + Sync),
    ) -> Result<Vec<JobFile>, RunError> {
        let Self(app) = self;
        app.check_stored(&job.request.request)?;
        let received = Instant::now();
        let checked = CheckedRequest::from(job.request.clone());
        let options = SubmitOptions {
            outside_queue: true,
            span: Span::current(),
            ..SubmitOptions::default()
        };
        let submitted = checked.submit(app, job.id.to_string(), options, received);
        let mut running = submitted.await.map_err(run_error)?;
        // The list of adapters may have changed while their weights were read.
        app.check_stored(&job.request.request)?;
        let total = job.request.request.sampling.steps;
        let mut has_begun = false;
        loop {
            // A job that never began is not to blame for the failure of the device.
            let event = running.next_event().await.map_err(|error| {
                if has_begun {
                    run_error(error)
                } else {
                    RunError::NotNow(error.to_string())
                }
            })?;
            match event {
                Event::Started => {
                    has_begun = true;
                    report(Progress { done: 0, total });
                }
                Event::Step {
                    done,
                    total,
                    counts,
                    ..
                } => {
                    running.computed.add(counts);
                    report(Progress { done, total });
                }
                Event::Finished(finished) => {
                    let encoded = running.respond(finished, Ok).await.map_err(run_error)?;
                    let format = encoded.info.encoding.format;
                    let file = |content: Vec<u8>| JobFile {
                        media_type: format.media_type(),
                        extension: format.name(),
                        content: content.into(),
                    };
                    return Ok(encoded.files.into_iter().map(file).collect());
                }
                Event::Queued { .. } | Event::Preview { .. } | Event::Failed(_) => {}
            }
        }
    }

    /// A job is taken while all jobs of the worker have begun: one more is ahead, so that the device does
    /// not wait for the store, and the others stay where every worker can take them. The engine finishes
    /// jobs and requests of one size in the order in which they came, so a request waits for one job that
    /// has not begun at most, and a job for the requests that came before it.
    fn has_room(&self, held: Held) -> bool {
        let engine = self.0.engine().ok();
        let is_ready = engine.is_some_and(|engine| matches!(engine.state(), State::Ready));
        is_ready && held.waiting == 0 && held.total() <= DEFAULT_MAX_STARTED
    }

    fn work_done(&self) -> u64 {
        let stats = self.0.engine().map(crate::engine::Engine::stats);
        stats.map_or(0, |stats| {
            stats.steps + stats.images + stats.encode_time.count() + stats.decode_time.count()
        })
    }
}

impl LoadedApp {
    /// Checks that the adapters here are those that the request was stored with.
    fn check_stored(&self, request: &GenerationRequest) -> Result<(), RunError> {
        let failed = |code: &str, message: String| {
            let code = code.to_owned();
            RunError::Failed(JobFailure { code, message })
        };
        let catalogue = self.adapters.catalogue();
        for ChosenAdapter { info, .. } in &request.adapters {
            let name = &info.name;
            match catalogue.get(name) {
                None => {
                    let reason = self.adapters.why_unusable(name);
                    let reason = reason.unwrap_or_else(|| "it is not in its folder".to_owned());
                    return Err(failed(
                        "adapter_unavailable",
                        format!(
                            "the worker cannot use the adapter {name:?}: {reason}. Give every worker the \
                             same --lora-dir, and send the request again"
                        ),
                    ));
                }
                Some(here) if here.hash != info.hash => {
                    return Err(failed(
                        "adapter_changed",
                        format!(
                            "the adapter {name:?} is another file now: its hash was {} when the job was \
                             sent, and is {} here. Give every server the same --lora-dir, and send the \
                             request again",
                            info.hash, here.hash
                        ),
                    ));
                }
                Some(_) => {}
            }
        }
        let merged = |chosen: &Option<ChosenAdapter>| {
            let chosen = chosen.as_ref();
            chosen.map(|it| (it.info.name.clone(), it.info.hash.clone(), it.scale))
        };
        if merged(&request.merged) != merged(&self.limits.merged) {
            return Err(failed(
                "adapter_changed",
                "the worker has another adapter merged into the model than the server that took the job: \
                 start all servers with the same --lora-merge, and send the request again"
                    .to_owned(),
            ));
        }
        Ok(())
    }
}

/// What an error means for a job.
fn run_error(error: ApiError) -> RunError {
    let (code, is_final) = match &error {
        ApiError::Submit(
            SubmitError::QueueFull { .. }
            | SubmitError::Draining
            | SubmitError::Stopped
            | SubmitError::Failed { .. },
        )
        | ApiError::Job(JobError::Stopped | JobError::NoMemory { .. })
        | ApiError::NoEngine
        | ApiError::Starting(_) => return RunError::NotNow(error.to_string()),
        ApiError::TooLarge { .. } | ApiError::Submit(SubmitError::TooLarge(_)) => {
            ("too_large", true)
        }
        ApiError::Submit(SubmitError::Adapters(_)) => ("adapters_too_large", true),
        ApiError::Adapter { error, .. } => match error {
            AdapterError::Io { .. } => ("adapter_unavailable", false),
            _ => ("adapter_unavailable", true),
        },
        ApiError::Job(JobError::Pipeline(error)) => match **error {
            PipelineError::NotFinite(_) => ("not_finite", true),
            PipelineError::Size { .. }
            | PipelineError::PromptTooShort { .. }
            | PipelineError::TokenOutOfRange { .. }
            | PipelineError::Adapter { .. }
            | PipelineError::NothingToDo => ("invalid_request", true),
            // The engine stops, and so takes no more jobs.
            PipelineError::File(_) => return RunError::NotNow(error.to_string()),
            _ => ("generation_failed", false),
        },
        ApiError::Job(JobError::Panicked(_)) | ApiError::Worker(_) => ("generation_failed", false),
        ApiError::Encode(_) => ("encoding_failed", true),
        _ => ("invalid_request", true),
    };
    let code = code.to_owned();
    let message = error.envelope().message().to_owned();
    let failure = JobFailure { code, message };
    if is_final {
        RunError::Failed(failure)
    } else {
        RunError::Broken(failure)
    }
}
