//! The thread's side: it does what the queue says, one call of the pipeline at a time.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use kiln_models::job::{Job, JobId};
use kiln_models::panic_message;
use kiln_models::pipeline::{Pipeline, PipelineError, StepOutcome};

use super::JobError;
use super::queue::{Next, Shared};

pub(super) struct Worker {
    pipeline: Box<dyn Pipeline>,
    shared: Arc<Shared>,
}

impl Worker {
    pub(super) fn new(pipeline: Box<dyn Pipeline>, shared: Arc<Shared>) -> Self {
        let worker = Self { pipeline, shared };
        worker.report_holdings();
        worker
    }

    /// Works until the engine is stopped.
    pub(super) fn run(mut self) {
        while self.turn(self.shared.next()) {}
    }

    /// Does one thing. False if it was the end.
    pub(super) fn turn(&mut self, next: Next) -> bool {
        match next {
            Next::Start(id, job) => self.start(id, job),
            Next::Step(id) => self.step(id),
            Next::Finish(id) => self.finish(id),
            Next::Discard(id) => self.discard(id),
            Next::Sleep => return true,
            Next::End => return false,
        }
        self.report_holdings();
        true
    }

    fn start(&mut self, id: JobId, job: Job) {
        match self.call(|pipeline| pipeline.start(id, job)) {
            (Ok(()), took) => self.shared.started(id, took),
            (Err(error), took) => self.fail(id, error, took),
        }
    }

    fn step(&mut self, id: JobId) {
        let steps_left = |outcomes: Vec<StepOutcome>| match outcomes.first() {
            Some(outcome) => Ok(outcome.steps_left),
            None => Err(PipelineError::UnknownJob(id)),
        };
        match self.call(|pipeline| pipeline.step(&[id]).and_then(steps_left)) {
            (Ok(steps_left), took) => {
                if self.shared.stepped(id, steps_left, took) {
                    self.preview(id);
                }
            }
            (Err(error), took) => self.fail(id, error, took),
        }
    }

    fn preview(&mut self, id: JobId) {
        let (preview, took) = self.call(|pipeline| pipeline.preview(id));
        if let Err(error) = &preview {
            tracing::warn!(job = id, %error, "a preview could not be made");
        }
        self.shared.previewed(id, preview.ok(), took);
    }

    fn finish(&mut self, id: JobId) {
        match self.call(|pipeline| pipeline.finish(id)) {
            (Ok(output), took) => self.shared.finished(id, output, took),
            (Err(error), took) => self.fail(id, error, took),
        }
    }

    fn fail(&mut self, id: JobId, error: JobError, took: Duration) {
        self.discard(id);
        let device_failed = matches!(&error, JobError::Panicked(_))
            || matches!(&error, JobError::Pipeline(error) if matches!(**error, PipelineError::Device(_)));
        if device_failed && let Err(error) = self.probe() {
            self.shared.lost(error);
        }
        self.shared.failed(id, error, took);
    }

    /// Whether the device still computes; it is asked twice.
    fn probe(&mut self) -> Result<(), JobError> {
        let (first, _) = self.call(|pipeline| pipeline.probe());
        first.or_else(|_| self.call(|pipeline| pipeline.probe()).0)
    }

    fn discard(&mut self, id: JobId) {
        let (discarded, _) = self.call(|pipeline| {
            pipeline.discard(id);
            Ok(())
        });
        if let Err(error) = discarded {
            tracing::error!(job = id, %error, "discarding a job failed");
        }
    }

    /// A call of the pipeline whose panic is an error, and how long it took.
    fn call<T>(
        &mut self,
        call: impl FnOnce(&mut dyn Pipeline) -> Result<T, PipelineError>,
    ) -> (Result<T, JobError>, Duration) {
        let started = self.shared.clock.now();
        let pipeline = self.pipeline.as_mut();
        let outcome = caught(|| call(pipeline));
        let took = self.shared.clock.now().saturating_duration_since(started);
        (outcome, took)
    }

    fn report_holdings(&self) {
        let (memory, caches) = (self.pipeline.memory(), self.pipeline.caches());
        self.shared.set_holdings(memory, caches);
    }
}

/// What a call of a pipeline gives; its panic is an error.
pub(crate) fn caught<T>(call: impl FnOnce() -> Result<T, PipelineError>) -> Result<T, JobError> {
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(outcome) => Ok(outcome?),
        Err(payload) => Err(JobError::Panicked(panic_message(payload.as_ref()))),
    }
}

/// However the thread ends, nobody waits for it for ever.
impl Drop for Worker {
    fn drop(&mut self) {
        self.shared.abandon();
    }
}
