//! What callers give to the engine and hear from it.

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kiln_models::job::{Output, RgbImage};
use kiln_models::pipeline::PipelineError;

/// What a caller wants of a job besides the picture.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SubmitOptions {
    /// When the picture is of no use any more. The job then ends with
    /// [`JobError::DeadlinePassed`], at the end of the step that the device is at.
    pub deadline: Option<Instant>,
    /// Make an [`Event::Preview`] after every so many steps, but not after the last one. Previews
    /// take device time, and change nothing about the picture.
    pub preview_every: Option<NonZeroUsize>,
}

/// What a [`JobHandle`](super::JobHandle) hears, in this order; the last is `Finished` or `Failed`.
#[derive(Debug)]
pub enum Event {
    /// Told when the job is accepted, and again whenever the position changes. The position can
    /// grow: smaller jobs overtake (see [`Engine`](super::Engine)).
    Queued {
        /// Jobs that will probably be finished before this one is begun.
        position: usize,
        /// How long that will probably take, from the measured speed; `None` before a job has been
        /// generated from its beginning to its end.
        estimated_wait: Option<Duration>,
    },
    /// The pipeline begins with this job.
    Started,
    /// `done` of `total` denoising steps are over.
    Step {
        done: usize,
        total: usize,
    },
    /// What the first of the job's images looks like after `step` steps: a small picture of it, if
    /// [`SubmitOptions::preview_every`] asked for it. Comes after the [`Event::Step`] of that step.
    /// A preview that cannot be made is left out.
    Preview {
        step: usize,
        image: RgbImage,
    },
    Finished(Finished),
    Failed(JobError),
}

/// A output and how long it took.
#[derive(Debug)]
pub struct Finished {
    pub output: Output,
    pub timings: Timings,
}

/// Wall-clock time a job spent in each stage.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Timings {
    /// Until it was started.
    pub queue: Duration,
    /// Prompts, noise and schedule.
    pub encode: Duration,
    /// All steps.
    pub denoise: Duration,
    /// All previews.
    pub previews: Duration,
    pub decode: Duration,
    /// While other jobs had their turns, after it was started.
    pub paused: Duration,
}

impl Timings {
    /// From the submission to the output.
    pub fn total(&self) -> Duration {
        self.queue + self.encode + self.denoise + self.previews + self.decode + self.paused
    }
}

/// Why an accepted job ended without a output.
#[derive(Debug, Clone, thiserror::Error)]
pub enum JobError {
    /// The pipeline and its other jobs go on.
    #[error(transparent)]
    Pipeline(Arc<PipelineError>),
    /// The pipeline and its other jobs go on.
    #[error("the pipeline panicked: {0}")]
    Panicked(String),
    #[error("the deadline passed before the image was finished")]
    DeadlinePassed,
    #[error("the engine was stopped before the image was finished")]
    Stopped,
}

impl From<PipelineError> for JobError {
    fn from(error: PipelineError) -> Self {
        Self::Pipeline(Arc::new(error))
    }
}

/// Why a job was not accepted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    #[error("{waiting} requests are waiting already, no more are taken")]
    QueueFull {
        /// Unfinished jobs, without the one that the device works on.
        waiting: usize,
        /// When the next job will probably be finished, from the measured speed; ten seconds
        /// before anything has been measured.
        retry_after: Duration,
    },
    #[error("no new requests are taken, the engine finishes those it has and stops")]
    Draining,
    #[error("the engine has stopped")]
    Stopped,
}

/// What would become of a job that came now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Forecast {
    /// Whether it would be taken: there is room, and the engine is not about to stop.
    pub is_accepted: bool,
    /// As in [`Event::Queued`].
    pub position: usize,
    /// As in [`Event::Queued`].
    pub estimated_wait: Option<Duration>,
    /// How long the device will probably work on it, without previews; `None` before a job has
    /// been generated from its beginning to its end.
    pub estimated_work: Option<Duration>,
}

/// Whether the engine does what it is for.
#[derive(Debug, Clone)]
pub enum State {
    /// The warm-up is being generated. Jobs are accepted and wait for it.
    Starting,
    /// Jobs are accepted and generated.
    Ready,
    /// No new jobs are accepted; those there are, are generated.
    Draining,
    /// All jobs have ended, or end after the step they are at. Nothing is accepted.
    Stopped,
    /// The warm-up failed, or the device was lost later on, so the engine stopped.
    Failed(JobError),
}

/// Why an engine did not become ready.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StartError {
    #[error("the warm-up image could not be generated")]
    WarmUp(#[source] JobError),
    #[error("the engine was stopped before it was ready")]
    Stopped,
}
