//! The values that callers give to the engine and the values that they get back.

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kiln_models::job::{Output, RgbImage, Size};
use kiln_models::pipeline::PipelineError;
use kiln_models::step_cache::{CachePolicy, StepCounts};
use tracing::Span;

use super::AdaptersTooLarge;

/// Settings of one submission; they do not change the image.
#[derive(Debug, Clone)]
pub struct SubmitOptions {
    /// Ends the job with [`JobError::DeadlinePassed`] at this time, or at the end of the pipeline
    /// call that runs then.
    pub deadline: Option<Instant>,
    /// Nobody wants the images after this time: the job is refused if it cannot be finished by then,
    /// goes before others if it would be late otherwise, and ends with [`JobError::TooLate`] once it
    /// cannot be in time any more.
    pub due: Option<Instant>,
    /// What the engine may change of the job when it is started: nothing, or one of these ways, the
    /// dearest first. It takes the first that is enough: see [`Engine`](super::Engine).
    pub cheaper: Vec<Cheaper>,
    /// Makes an [`Event::Preview`] after every this many steps, but not after the last step.
    pub preview_every: Option<NonZeroUsize>,
    /// The job neither takes a place of [`EngineSettings::max_queue`](super::EngineSettings::max_queue)
    /// nor needs one: whoever submits such jobs bounds their number.
    pub outside_queue: bool,
    /// Entered during every pipeline call for the job, so that the log lines of the call carry the
    /// fields of the request. Disabled by default.
    pub span: Span,
}

impl Default for SubmitOptions {
    fn default() -> Self {
        Self {
            deadline: None,
            due: None,
            cheaper: Vec::new(),
            preview_every: None,
            outside_queue: false,
            span: Span::none(),
        }
    }
}

/// A way to make a job cheaper.
#[derive(Debug, Clone, PartialEq)]
pub struct Cheaper {
    /// What answers call it.
    pub name: &'static str,
    /// Replaces [`Job::cache`](kiln_models::job::Job::cache).
    pub cache: CachePolicy,
    /// Replaces [`Job::cfg_gate_step`](kiln_models::job::Job::cfg_gate_step), if it is not `None`.
    pub cfg_gate_step: Option<f64>,
}

/// What happened to a job, in this order. The last event is `Finished` or `Failed`.
#[derive(Debug)]
pub enum Event {
    /// The job waits. Sent when the job is accepted and whenever its position changes. The position
    /// can grow, because smaller jobs overtake (see [`Engine`](super::Engine)).
    Queued {
        /// Number of jobs that will probably be finished before this one is started.
        position: usize,
        /// How long those jobs will probably take, from the measured speed. `None` before a first
        /// job has been generated completely.
        estimated_wait: Option<Duration>,
    },
    /// The pipeline starts the job: it encodes the prompts.
    Started,
    /// `done` of `total` denoising steps are over.
    Step {
        done: usize,
        total: usize,
        /// What the steps so far have run.
        counts: StepCounts,
        /// Device time that the rest of the job will probably take: its steps and its decoding,
        /// without previews and without the turns of other jobs. Until a decoding has been
        /// measured, decoding is assumed to run at the speed of the steps. `None` before a step
        /// has been measured.
        estimated_rest: Option<Duration>,
    },
    /// A small version of the job's first image as it would be after `step` steps. Follows the
    /// [`Event::Step`] of that step. A preview that fails is left out.
    Preview {
        step: usize,
        image: RgbImage,
    },
    Finished(Finished),
    Failed(JobError),
}

impl Event {
    /// Whether no event of the job follows.
    pub(super) fn is_last(&self) -> bool {
        matches!(self, Self::Finished(_) | Self::Failed(_))
    }
}

/// The output of a job and the time that it took.
#[derive(Debug)]
pub struct Finished {
    pub output: Output,
    pub timings: Timings,
    /// Which of [`SubmitOptions::cheaper`] the engine took; `None` if it changed nothing.
    pub made: Option<Box<Cheaper>>,
}

/// Wall-clock time that a job spent in each stage. A step that several jobs shared counts for each
/// job by its part of the work.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Timings {
    /// From the submission to the start.
    pub queue: Duration,
    /// Encoding the prompts, generating the noise and making the schedule.
    pub encode: Duration,
    /// All steps.
    pub denoise: Duration,
    /// All previews.
    pub previews: Duration,
    pub decode: Duration,
    /// After the start, while the device worked on other jobs.
    pub paused: Duration,
}

impl Timings {
    /// From the submission to the output.
    pub fn total(&self) -> Duration {
        self.queue + self.encode + self.denoise + self.previews + self.decode + self.paused
    }
}

/// Why an accepted job ended without an output.
#[derive(Debug, Clone, thiserror::Error)]
pub enum JobError {
    /// A pipeline call for the job returned an error. The pipeline and its other jobs go on.
    #[error(transparent)]
    Pipeline(Arc<PipelineError>),
    /// A pipeline call for the job panicked. The pipeline and its other jobs go on.
    #[error("the pipeline panicked: {0}")]
    Panicked(String),
    #[error("the deadline passed before the image was finished")]
    DeadlinePassed,
    /// The job could not be finished any more before it was [due](SubmitOptions::due).
    #[error(
        "the image would have been finished {} ms too late for its deadline_ms, or later, so it was \
         given up", milliseconds(*late)
    )]
    TooLate {
        /// By how much the job would have been too late at least.
        late: Duration,
    },
    #[error("the engine was stopped before the image was finished")]
    Stopped,
    /// The engine [failed](State::Failed) because of its device, a file of the model or another job.
    #[error("the image was not finished: {reason}")]
    Lost { reason: String },
    /// Other programs hold the memory that the job needs.
    #[error(
        "the image needs {} of memory, and {} are free: other programs hold the rest",
        mebibytes(*needed), mebibytes(*free)
    )]
    NoMemory {
        /// Bytes that the job needs when it takes the least.
        needed: u64,
        /// Bytes that jobs can take now.
        free: u64,
    },
}

impl JobError {
    /// Whether the device itself may have failed.
    pub(super) fn may_be_of_device(&self) -> bool {
        match self {
            Self::Pipeline(error) => matches!(**error, PipelineError::Device(_)),
            Self::Panicked(_) => true,
            Self::DeadlinePassed
            | Self::TooLate { .. }
            | Self::Stopped
            | Self::Lost { .. }
            | Self::NoMemory { .. } => false,
        }
    }

    /// The end of the jobs that were not part of the call that failed with this error, of an engine
    /// that cannot go on.
    pub(super) fn of_others(&self) -> Self {
        Self::Lost {
            reason: self.to_string(),
        }
    }

    /// Whether a file of the model changed or failed, so that no later job can be right.
    pub(super) fn is_of_model_file(&self) -> bool {
        matches!(self, Self::Pipeline(error) if matches!(**error, PipelineError::File(_)))
    }
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
        /// Number of unfinished jobs, without the one that the device works on.
        waiting: usize,
        /// When the next job will probably be finished, from the measured speed. Ten seconds
        /// before a first job has been generated completely.
        retry_after: Duration,
    },
    #[error(transparent)]
    TooLarge(#[from] TooLarge),
    #[error(transparent)]
    Adapters(#[from] AdaptersTooLarge),
    /// The job could not be finished before it is [due](SubmitOptions::due) even without other jobs.
    #[error(
        "deadline_ms is too short: the image takes about {} ms without any wait; allow more time, or \
         ask for a smaller size or fewer steps", milliseconds(*work)
    )]
    DeadlineTooShort {
        /// Device time of the job, at the best speed that was measured.
        work: Duration,
    },
    /// Because of the jobs before it, the job could not be finished before it is
    /// [due](SubmitOptions::due), or a job that was accepted before could not.
    #[error(
        "deadline_ms cannot be kept now: the image takes about {} ms after a wait of about {} ms",
        milliseconds(*work), milliseconds(*wait)
    )]
    TooLate {
        /// How long the device will work on other jobs before this one is finished.
        wait: Duration,
        /// Device time of the job, at the best speed that was measured.
        work: Duration,
        /// After which time the job would probably be accepted.
        retry_after: Duration,
    },
    #[error("no new requests are taken, the engine finishes those it has and stops")]
    Draining,
    #[error("the engine has stopped")]
    Stopped,
    /// The engine is [`State::Failed`].
    #[error("no requests are taken: {reason}")]
    Failed { reason: String },
}

/// A job takes more memory than there is, however its images are decoded.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{size} needs {} of memory, and there are {}: {}",
    mebibytes(*needed), mebibytes(*most), remedy(*largest)
)]
pub struct TooLarge {
    pub size: Size,
    /// Bytes that the job takes at least.
    pub needed: u64,
    /// Bytes that jobs can take at most.
    pub most: u64,
    /// The largest size of the same shape that fits; `None` if none does.
    pub largest: Option<Size>,
}

fn remedy(largest: Option<Size>) -> String {
    largest.map_or_else(
        || "no size of this shape fits".to_owned(),
        |size| format!("the largest size of this shape that fits is {size}"),
    )
}

/// A duration as messages show it, rounded up.
fn milliseconds(duration: Duration) -> u128 {
    duration.as_micros().div_ceil(1000)
}

/// Bytes as messages show them.
fn mebibytes(bytes: u64) -> String {
    format!("{} MiB", bytes.div_ceil(1 << 20))
}

/// What would happen to a job if it were submitted now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Forecast {
    /// Whether the job would be accepted: the queue has room, the job can be finished before it is
    /// due, and the engine is not about to stop.
    pub is_accepted: bool,
    /// As in [`Event::Queued`].
    pub position: usize,
    /// As in [`Event::Queued`].
    pub estimated_wait: Option<Duration>,
    /// Device time that the job will probably take, without previews. `None` before a first job
    /// has been generated completely.
    pub estimated_work: Option<Duration>,
}

/// Whether the engine accepts and generates jobs.
#[derive(Debug, Clone)]
pub enum State {
    /// The warm-up is being generated. Jobs are accepted and wait until it has ended.
    Starting,
    /// Jobs are accepted and generated.
    Ready,
    /// No new jobs are accepted. The jobs that were accepted are generated.
    Draining,
    /// No jobs are accepted. All jobs have ended, or end after the pipeline call that runs now.
    Stopped,
    /// The engine stopped because the warm-up failed, the device was lost, or a file of the model
    /// changed or failed.
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
