//! The one thread that owns the painter. Everyone else sends it jobs and listens.
//!
//! Jobs are advanced one denoising step at a time, so each can be reported on, cancelled and,
//! later, batched at every step. Waiting jobs stand in a bounded queue, first come first served.
//! A panic in the painter fails the jobs of that call and nothing else.

mod queue;
mod worker;

use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use kiln_models::painter::{Job, JobId, ModelInfo, PaintError, Painter, Painting};
use tokio::sync::mpsc::UnboundedReceiver;

use self::queue::Shared;
use self::worker::Worker;

pub(crate) use self::worker::caught;

/// Jobs that may wait, unless told otherwise.
pub const DEFAULT_MAX_QUEUE: usize = 32;

/// What a [`JobHandle`] hears, in this order; the last is `Finished` or `Failed`.
#[derive(Debug)]
pub enum Event {
    /// Jobs that come before this one, running ones included. Told again when it changes.
    Queued {
        position: usize,
    },
    /// The painter begins with this job.
    Started,
    /// `done` of `total` denoising steps are over.
    Step {
        done: usize,
        total: usize,
    },
    Finished(Finished),
    Failed(JobError),
}

/// A painting and how long it took.
#[derive(Debug)]
pub struct Finished {
    pub painting: Painting,
    pub timings: Timings,
}

/// Wall-clock time a job spent in each stage.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Timings {
    pub queue: Duration,
    /// Prompts, noise and schedule.
    pub encode: Duration,
    pub denoise: Duration,
    pub decode: Duration,
}

impl Timings {
    pub fn total(&self) -> Duration {
        self.queue + self.encode + self.denoise + self.decode
    }
}

/// Why an accepted job ended without a painting.
#[derive(Debug, Clone, thiserror::Error)]
pub enum JobError {
    #[error(transparent)]
    Paint(Arc<PaintError>),
    #[error("the painter panicked: {0}")]
    Panicked(String),
    #[error("the engine was stopped before the image was finished")]
    Stopped,
}

impl From<PaintError> for JobError {
    fn from(error: PaintError) -> Self {
        Self::Paint(Arc::new(error))
    }
}

/// Why a job was not accepted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    #[error("{waiting} requests are waiting already, no more are taken")]
    QueueFull {
        waiting: usize,
        /// About when a place will be free, judged by the last job.
        retry_after: Duration,
    },
    #[error("the engine has stopped")]
    Stopped,
}

/// A handle to the thread. Clones share it; the last one to be dropped stops and joins it.
#[derive(Debug, Clone)]
pub struct Engine {
    thread: Arc<Thread>,
}

impl Engine {
    /// Gives the painter a thread of its own. At most `max_queue` jobs wait for it.
    pub fn start(painter: Box<dyn Painter>, max_queue: usize) -> Self {
        let info = painter.info().clone();
        let shared = Arc::new(Shared::new(max_queue));
        let worker = Worker::new(painter, Arc::clone(&shared));
        let join = std::thread::Builder::new()
            .name("painter".into())
            .spawn(move || worker.run())
            .expect("the operating system starts a thread");
        Self {
            thread: Arc::new(Thread {
                shared,
                info,
                join: Mutex::new(Some(join)),
            }),
        }
    }

    /// The loaded model.
    pub fn info(&self) -> &ModelInfo {
        &self.thread.info
    }

    /// Puts a job at the end of the queue.
    pub fn submit(&self, job: Job) -> Result<JobHandle, SubmitError> {
        self.thread.shared.submit(job)
    }

    /// Whether jobs are still taken.
    pub fn is_running(&self) -> bool {
        self.thread.shared.is_running()
    }

    /// Ends all jobs with [`JobError::Stopped`], the running one after its current step. Does not
    /// wait for that.
    pub fn stop(&self) {
        self.thread.shared.stop();
    }

    /// As [`Engine::stop`], and waits until the painter has been dropped.
    pub fn shutdown(&self) {
        self.thread.shutdown();
    }
}

/// A submitted job. Dropping it cancels the job within one denoising step.
#[derive(Debug)]
pub struct JobHandle {
    id: JobId,
    events: UnboundedReceiver<Event>,
    shared: Arc<Shared>,
}

impl JobHandle {
    /// Waits for what happens next.
    pub async fn next_event(&mut self) -> Event {
        self.events
            .recv()
            .await
            .unwrap_or(Event::Failed(JobError::Stopped))
    }

    /// As [`JobHandle::next_event`], for callers that are not async.
    ///
    /// # Panics
    ///
    /// In an async context.
    pub fn blocking_next_event(&mut self) -> Event {
        self.events
            .blocking_recv()
            .unwrap_or(Event::Failed(JobError::Stopped))
    }

    /// Waits for the end.
    pub async fn finished(mut self) -> Result<Finished, JobError> {
        loop {
            match self.next_event().await {
                Event::Finished(finished) => return Ok(finished),
                Event::Failed(error) => return Err(error),
                Event::Queued { .. } | Event::Started | Event::Step { .. } => {}
            }
        }
    }
}

impl Drop for JobHandle {
    fn drop(&mut self) {
        // The thread drops a running job when it sees that nobody listens any more.
        self.shared.forget(self.id);
    }
}

#[derive(Debug)]
struct Thread {
    shared: Arc<Shared>,
    info: ModelInfo,
    join: Mutex<Option<JoinHandle<()>>>,
}

impl Thread {
    fn shutdown(&self) {
        self.shared.stop();
        let join = self
            .join
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if join.is_some_and(|join| join.join().is_err()) {
            tracing::error!("the painter's thread ended in a panic");
        }
    }
}

impl Drop for Thread {
    fn drop(&mut self) {
        self.shutdown();
    }
}

#[cfg(test)]
mod tests;
