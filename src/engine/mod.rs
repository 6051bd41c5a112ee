//! The thread that owns the pipeline, and the handle through which jobs are given to it.
//!
//! The thread repeats one cycle: the scheduler plans a call, the worker executes the call, and the
//! scheduler books the outcome. No call makes more than one denoising step, so each job can be
//! reported on, overtaken and ended at every step. The queue is bounded and reports how long a job
//! will wait; small jobs do not wait for large ones, and large ones do not starve: see [`Engine`].
//! A panic or an error of the pipeline ends the job that the call was for and nothing else.

mod adapters;
mod auto;
mod calibration;
mod cost;
mod deadline;
mod entry;
mod events;
mod forecast;
mod memory;
mod plan;
mod policy;
mod riders;
mod scheduler;
mod shared;
mod stats;
mod worker;

use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use kiln_models::job::{Job, JobId};
use kiln_models::pipeline::{ModelInfo, Pipeline};
use tokio::sync::mpsc::UnboundedReceiver;

pub use self::adapters::AdaptersTooLarge;
pub use self::events::{
    Cheaper, Event, Finished, Forecast, JobError, StartError, State, SubmitError, SubmitOptions,
    Timings, TooLarge,
};
pub use self::stats::{AdapterStats, BUCKET_BOUNDS, EngineStats, Histogram, Outcomes};

use self::shared::{Shared, SystemClock};
use self::worker::Worker;

pub(crate) use self::worker::caught;

/// Default of [`EngineSettings::max_queue`].
pub const DEFAULT_MAX_QUEUE: usize = 32;
/// Default of [`EngineSettings::max_started`].
pub const DEFAULT_MAX_STARTED: usize = 16;

/// Limits of an engine, and its warm-up.
#[derive(Debug, Clone)]
pub struct EngineSettings {
    /// Largest number of unfinished jobs besides the one that the device works on. With 0, a job
    /// is accepted only by an idle engine.
    pub max_queue: usize,
    /// Largest number of jobs that are started and not finished, and so in the device's memory, at
    /// a time; at least 1. Each holds its latents, embeddings and modulation table; the scratch
    /// memory of a step is needed once, because steps are made one after the other. At most half of
    /// them are started before their turn, to share the steps of others. With 1, no job overtakes
    /// another or shares its steps.
    pub max_started: usize,
    /// Largest number of bytes that all started jobs take together, the model not counted; `None`
    /// for what the device has.
    pub max_memory: Option<u64>,
    /// Largest number of bytes that the adapters of all started jobs take on a device together, as the
    /// pipeline was loaded with; `usize::MAX` for no bound.
    pub adapter_cache_bytes: usize,
    /// Image tokens (of both halves and all images) up to which several jobs share one step. 0 makes
    /// every step of one job only, whose images are then the same to the bit alone and in company.
    /// `None` measures it after the warm-up, and takes 4,096 without a warm-up.
    pub max_step_tokens: Option<usize>,
    /// A job that is generated before all others, in a smaller size if there is no memory for its own;
    /// the engine is [`State::Starting`] until it has ended. Its output is dropped.
    pub warm_up: Option<Job>,
}

/// A handle to the thread. Clones share the thread; dropping the last one stops and joins it.
///
/// ```
/// use kiln::engine::{Engine, EngineSettings, Event, SubmitOptions};
/// use kiln::kiln_models::noise::NoiseGenerator;
/// use kiln::request::{GenerationParams, GenerationRequest};
/// use kiln::runtime::{Runtime, RuntimeSettings};
///
/// let runtime = Runtime::open(&RuntimeSettings::new("demo"))?;
/// let params = GenerationParams {
///     prompt: "a red circle".to_owned(),
///     num_inference_steps: Some(1),
///     ..GenerationParams::default()
/// };
/// let request = GenerationRequest::new(params, &runtime.limits, NoiseGenerator::Cpu)?;
/// let tokens = request.tokenize(&runtime.tokenizer)?;
///
/// let settings = EngineSettings {
///     max_queue: 4,
///     max_started: 2,
///     max_memory: None,
///     adapter_cache_bytes: usize::MAX,
///     max_step_tokens: None,
///     warm_up: None,
/// };
/// let engine = Engine::start(runtime.pipeline, settings);
/// let mut handle = engine.submit(request.into_job(tokens, Vec::new(), false), SubmitOptions::default())?;
/// let output = loop {
///     match handle.blocking_next_event() {
///         Event::Finished(finished) => break finished.output,
///         Event::Failed(error) => return Err(error.into()),
///         _ => {}
///     }
/// };
/// assert_eq!(output.images[0].width, 128);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Order
///
/// Before every step the engine chooses the job that is advanced. A waiting job that is at most
/// half as large as the smallest started one overtakes it, so that a small job waits for one step
/// of a large one and not for the whole of it; otherwise jobs are finished in the order of their
/// submission. The oldest job has at least a quarter of the device's time, whatever overtakes it. A
/// job's size is its number of multiply-adds.
///
/// Other jobs share the step, the oldest first, as long as it has no more image tokens than
/// [`EngineSettings::max_step_tokens`] and takes at most twice as long as without them. A step of
/// several jobs that fails is made again job by job, so that only the jobs fail that fail alone.
///
/// # Deadlines
///
/// A job may be [due](SubmitOptions::due). By the measured speed, a job that cannot be finished by then
/// is refused, and so is one that would make a job late that was accepted before. An accepted job that
/// would be late because of others goes before them, the one with the least time to spare first; the
/// oldest job keeps its quarter. A job that can no longer be in time ends with [`JobError::TooLate`].
/// Nothing is refused before the speed has been measured.
///
/// A job with [`SubmitOptions::cheaper`] is made cheaper when it is started, if it, or another job,
/// would be late otherwise; or, if it is not due, if its wait and the work of the jobs in the queue are
/// together more than twice its own work.
///
/// # Memory
///
/// A job takes its memory from what the device has free, the model not counted. A job that fits only
/// if its images are decoded one at a time or in tiles is decoded so; one that does not fit even so
/// is not accepted. A job that does not fit beside the started ones waits until they have ended. If
/// other programs hold the memory, the job ends with [`JobError::NoMemory`].
///
/// # Adapters
///
/// The adapters of started jobs take at most [`EngineSettings::adapter_cache_bytes`] of each device; one
/// that several jobs use counts once. A job whose adapters do not fit beside those waits until started
/// jobs with adapters have ended, as one that lacks memory does; a job whose adapters do not fit at all is
/// not accepted. Adapters of waiting jobs are uploaded before their turn, as far as they fit.
///
/// # Ends
///
/// A job ends early when its [`JobHandle`] is dropped, when its deadline passes, and when the
/// engine is stopped or the time to drain is over. The device is free for other jobs after the step
/// (or the encoding of prompts, or the decoding of images) that runs then.
#[derive(Debug, Clone)]
pub struct Engine {
    thread: Arc<Thread>,
}

impl Engine {
    /// Starts the pipeline's thread. Returns at once; [`Engine::ready`] waits for the warm-up.
    pub fn start(pipeline: Box<dyn Pipeline>, settings: EngineSettings) -> Self {
        let info = pipeline.info().clone();
        let shared = Shared::new(settings, pipeline.as_ref(), Arc::new(SystemClock));
        let shared = Arc::new(shared);
        let worker = Worker::new(pipeline, Arc::clone(&shared));
        let join = std::thread::Builder::new()
            .name("pipeline".into())
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

    /// Accepts a job or refuses it, at once. The handle's first event is [`Event::Queued`].
    ///
    /// # Errors
    ///
    /// If the queue is full, the job or its adapters take more memory than there is, or it cannot be
    /// finished before it is due, or the engine is draining or has stopped.
    pub fn submit(&self, job: Job, options: SubmitOptions) -> Result<JobHandle, SubmitError> {
        self.thread.shared.submit(job, options)
    }

    /// Chooses how the job's images are decoded: as the model was loaded to do it, one at a time, or
    /// in tiles, the first for which there is enough memory. [`Engine::submit`] does it as well.
    ///
    /// # Errors
    ///
    /// If the job takes more memory than there is.
    pub fn fit(&self, job: Job) -> Result<Job, TooLarge> {
        self.thread.shared.fit(job)
    }

    /// What would happen to a job if it were submitted now with these options.
    pub fn forecast(&self, job: &Job, options: &SubmitOptions) -> Forecast {
        self.thread.shared.forecast(job, options)
    }

    /// What the engine has done so far, and what the device and the caches hold now.
    pub fn stats(&self) -> EngineStats {
        self.thread.shared.stats()
    }

    /// Whether jobs are accepted and generated.
    pub fn state(&self) -> State {
        self.thread.shared.state().borrow().clone()
    }

    /// Waits until the warm-up has been generated, if there is one.
    ///
    /// # Errors
    ///
    /// If the warm-up failed, or the engine was drained or stopped before it ended.
    pub async fn ready(&self) -> Result<(), StartError> {
        let mut state = self.thread.shared.state();
        let state = state.wait_for(|state| !matches!(state, State::Starting));
        match state.await.as_deref() {
            Ok(State::Failed(error)) => Err(StartError::WarmUp(error.clone())),
            Ok(State::Stopped | State::Draining) | Err(_) => Err(StartError::Stopped),
            Ok(State::Starting | State::Ready) => Ok(()),
        }
    }

    /// Accepts no more jobs. The accepted ones are generated for at most `timeout`; then the
    /// remaining ones end with [`JobError::Stopped`] and the engine is [`State::Stopped`]. Returns
    /// at once, [`Engine::stopped`] waits for the end. A second call can shorten the time, not
    /// prolong it.
    pub fn drain(&self, timeout: Duration) {
        self.thread.shared.drain(timeout);
    }

    /// Waits until the engine is [`State::Stopped`] or [`State::Failed`].
    pub async fn stopped(&self) {
        let mut state = self.thread.shared.state();
        let is_over = |state: &State| matches!(state, State::Stopped | State::Failed(_));
        // An error means that the engine is gone altogether.
        drop(state.wait_for(is_over).await);
    }

    /// Ends all jobs with [`JobError::Stopped`], the running ones after the current step. Returns
    /// at once.
    pub fn stop(&self) {
        self.thread.shared.stop();
    }

    /// Stops the engine as [`Engine::stop`] does, and waits until the pipeline has been dropped.
    pub fn shutdown(&self) {
        self.thread.shutdown();
    }
}

/// An accepted job. Dropping it cancels the job: the device is free after its current step.
#[derive(Debug)]
pub struct JobHandle {
    id: JobId,
    events: UnboundedReceiver<Event>,
    shared: Arc<Shared>,
}

impl JobHandle {
    /// Waits for the next event.
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

    /// Waits for the end of the job.
    ///
    /// # Errors
    ///
    /// If the job ended without an output.
    pub async fn finished(mut self) -> Result<Finished, JobError> {
        loop {
            match self.next_event().await {
                Event::Finished(finished) => return Ok(finished),
                Event::Failed(error) => return Err(error),
                Event::Queued { .. }
                | Event::Started
                | Event::Step { .. }
                | Event::Preview { .. } => {}
            }
        }
    }
}

impl Drop for JobHandle {
    fn drop(&mut self) {
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
            tracing::error!("the pipeline's thread ended in a panic");
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
