//! The thread's side: a loop that advances every active job by one step.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Instant;

use kiln_models::painter::{JobId, PaintError, Painter};
use tokio::sync::mpsc::UnboundedSender;

use super::queue::{Next, Shared, Waiting, tell};
use super::{Event, Finished, JobError, Timings};

pub(super) struct Worker {
    painter: Box<dyn Painter>,
    shared: Arc<Shared>,
    active: Vec<Active>,
}

struct Active {
    id: JobId,
    events: UnboundedSender<Event>,
    total_steps: usize,
    steps_left: usize,
    timings: Timings,
}

impl Worker {
    pub(super) fn new(painter: Box<dyn Painter>, shared: Arc<Shared>) -> Self {
        Self {
            painter,
            shared,
            active: Vec::new(),
        }
    }

    /// Works until the engine is stopped.
    pub(super) fn run(mut self) {
        loop {
            match self.shared.next(self.active.len()) {
                Next::Start(waiting) => self.start(waiting),
                Next::Advance => self.advance(),
                Next::Stop => break,
            }
        }
        for job in std::mem::take(&mut self.active) {
            self.fail(&job, JobError::Stopped);
        }
    }

    fn start(&mut self, waiting: Waiting) {
        if waiting.events.is_closed() {
            return;
        }
        tell(&waiting.events, Event::Started);
        let total_steps = waiting.job.num_inference_steps;
        let mut job = Active {
            id: waiting.id,
            events: waiting.events,
            total_steps,
            steps_left: total_steps,
            timings: Timings {
                queue: waiting.submitted.elapsed(),
                ..Timings::default()
            },
        };
        let started = Instant::now();
        let outcome = self.paint(|painter| painter.start(job.id, waiting.job));
        job.timings.encode = started.elapsed();
        match outcome {
            Ok(()) => self.active.push(job),
            Err(error) => self.fail(&job, error),
        }
    }

    /// One step for every active job, and the decoding of those that are through.
    fn advance(&mut self) {
        self.drop_abandoned();
        self.step();
        self.drop_abandoned();
        for job in self
            .active
            .extract_if(.., |job| job.steps_left == 0)
            .collect::<Vec<_>>()
        {
            self.finish(job);
        }
    }

    fn step(&mut self) {
        let ids: Vec<JobId> = self.active.iter().map(|job| job.id).collect();
        if ids.is_empty() {
            return;
        }
        let started = Instant::now();
        let steps_left = match self.paint(|painter| painter.step(&ids)) {
            Ok(steps_left) => steps_left,
            Err(error) => {
                for job in std::mem::take(&mut self.active) {
                    self.fail(&job, error.clone());
                }
                return;
            }
        };
        let took = started.elapsed();
        for (job, steps_left) in self.active.iter_mut().zip(steps_left) {
            job.timings.denoise += took;
            job.steps_left = steps_left;
            let (done, total) = (job.total_steps.saturating_sub(steps_left), job.total_steps);
            tell(&job.events, Event::Step { done, total });
        }
    }

    fn finish(&mut self, mut job: Active) {
        let started = Instant::now();
        let outcome = self.paint(|painter| painter.finish(job.id));
        job.timings.decode = started.elapsed();
        match outcome {
            Ok(painting) => {
                let timings = job.timings;
                let run = timings.encode + timings.denoise + timings.decode;
                self.shared.ended(self.active.len(), Some(run));
                tell(&job.events, Event::Finished(Finished { painting, timings }));
            }
            Err(error) => self.fail(&job, error),
        }
    }

    fn drop_abandoned(&mut self) {
        for job in self
            .active
            .extract_if(.., |job| job.events.is_closed())
            .collect::<Vec<_>>()
        {
            tracing::info!(job = job.id, steps_left = job.steps_left, "cancelled");
            self.discard(job.id);
        }
    }

    fn fail(&mut self, job: &Active, error: JobError) {
        self.discard(job.id);
        self.shared.ended(self.active.len(), None);
        tell(&job.events, Event::Failed(error));
    }

    fn discard(&mut self, id: JobId) {
        let discarded = self.paint(|painter| {
            painter.discard(id);
            Ok(())
        });
        if let Err(error) = discarded {
            tracing::error!(job = id, %error, "discarding a job failed");
        }
    }

    /// A call of the painter whose panic is an error.
    fn paint<T>(
        &mut self,
        call: impl FnOnce(&mut dyn Painter) -> Result<T, PaintError>,
    ) -> Result<T, JobError> {
        let painter = self.painter.as_mut();
        caught(|| call(painter))
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
        self.shared.stop();
    }
}

fn panic_message(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<&str>().copied();
    let text = text.or_else(|| payload.downcast_ref::<String>().map(String::as_str));
    text.unwrap_or("no message").to_owned()
}
