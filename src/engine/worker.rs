//! The thread's side: it does what the queue says, one call of the painter at a time.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use kiln_models::painter::{Job, JobId, PaintError, Painter};
use kiln_models::panic_message;

use super::JobError;
use super::queue::{Next, Shared};

pub(super) struct Worker {
    painter: Box<dyn Painter>,
    shared: Arc<Shared>,
}

impl Worker {
    pub(super) fn new(painter: Box<dyn Painter>, shared: Arc<Shared>) -> Self {
        let worker = Self { painter, shared };
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
        match self.paint(|painter| painter.start(id, job)) {
            (Ok(()), took) => self.shared.started(id, took),
            (Err(error), took) => self.fail(id, error, took),
        }
    }

    fn step(&mut self, id: JobId) {
        let steps_left = |left: Vec<usize>| left.first().copied().ok_or(PaintError::UnknownJob(id));
        match self.paint(|painter| painter.step(&[id]).and_then(steps_left)) {
            (Ok(steps_left), took) => {
                if self.shared.stepped(id, steps_left, took) {
                    self.preview(id);
                }
            }
            (Err(error), took) => self.fail(id, error, took),
        }
    }

    fn preview(&mut self, id: JobId) {
        let (preview, took) = self.paint(|painter| painter.preview(id));
        if let Err(error) = &preview {
            tracing::warn!(job = id, %error, "a preview could not be made");
        }
        self.shared.previewed(id, preview.ok(), took);
    }

    fn finish(&mut self, id: JobId) {
        match self.paint(|painter| painter.finish(id)) {
            (Ok(painting), took) => self.shared.finished(id, painting, took),
            (Err(error), took) => self.fail(id, error, took),
        }
    }

    fn fail(&mut self, id: JobId, error: JobError, took: Duration) {
        self.discard(id);
        let device_failed = matches!(&error, JobError::Panicked(_))
            || matches!(&error, JobError::Paint(error) if matches!(**error, PaintError::Device(_)));
        if device_failed && let Err(error) = self.probe() {
            self.shared.lost(error);
        }
        self.shared.failed(id, error, took);
    }

    /// Whether the device still computes; it is asked twice.
    fn probe(&mut self) -> Result<(), JobError> {
        let (first, _) = self.paint(|painter| painter.probe());
        first.or_else(|_| self.paint(|painter| painter.probe()).0)
    }

    fn discard(&mut self, id: JobId) {
        let (discarded, _) = self.paint(|painter| {
            painter.discard(id);
            Ok(())
        });
        if let Err(error) = discarded {
            tracing::error!(job = id, %error, "discarding a job failed");
        }
    }

    /// A call of the painter whose panic is an error, and how long it took.
    fn paint<T>(
        &mut self,
        call: impl FnOnce(&mut dyn Painter) -> Result<T, PaintError>,
    ) -> (Result<T, JobError>, Duration) {
        let started = self.shared.clock.now();
        let painter = self.painter.as_mut();
        let outcome = caught(|| call(painter));
        let took = self.shared.clock.now().saturating_duration_since(started);
        (outcome, took)
    }

    fn report_holdings(&self) {
        let (memory, caches) = (self.painter.memory(), self.painter.caches());
        self.shared.painter_holds(memory, caches);
    }
}

/// What a call of a painter gives; its panic is an error.
pub(crate) fn caught<T>(call: impl FnOnce() -> Result<T, PaintError>) -> Result<T, JobError> {
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
