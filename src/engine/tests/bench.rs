use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use kiln_models::noise::NoiseGenerator;
use kiln_models::pipeline::{
    CacheUse, CacheUses, ImageSizes, Job, JobId, MemoryUse, ModelInfo, Output, Pipeline,
    PipelineError, RgbImage,
};

use crate::engine::queue::{Clock, Next, Shared};
use crate::engine::work::{Stage, Work};
use crate::engine::worker::Worker;
use crate::engine::{
    EngineSettings, Event, Finished, JobError, JobHandle, SubmitError, SubmitOptions,
};

/// What a job does, in the first token of its prompt.
pub(super) const WELL: u32 = 0;
pub(super) const PANIC_IN_START: u32 = 1;
pub(super) const PANIC_IN_STEP: u32 = 2;
pub(super) const PANIC_IN_FINISH: u32 = 3;
pub(super) const FAIL_IN_STEP: u32 = 4;
pub(super) const PANIC_IN_PREVIEW: u32 = 5;
pub(super) const LOSE_DEVICE_IN_STEP: u32 = 6;

pub(super) fn ms(milliseconds: u64) -> Duration {
    Duration::from_millis(milliseconds)
}

/// What the pipeline was asked to do, for the job of which seed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Call {
    Start(u64),
    Step(u64),
    Preview(u64),
    Finish(u64),
    Discard(u64),
}

/// A call, when it began and when it ended.
#[derive(Debug, Clone, Copy)]
pub(super) struct Logged {
    pub(super) call: Call,
    pub(super) began: Duration,
    pub(super) ended: Duration,
}

type Happening = Box<dyn FnOnce() + Send>;

/// A clock, and what happens when.
pub(super) struct SimulatedClock {
    start: Instant,
    elapsed: Mutex<Duration>,
    happenings: Mutex<VecDeque<(Duration, Happening)>>,
}

impl std::fmt::Debug for SimulatedClock {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "{:?}", self.elapsed())
    }
}

impl SimulatedClock {
    pub(super) fn new() -> Self {
        Self {
            start: Instant::now(),
            elapsed: Mutex::new(Duration::ZERO),
            happenings: Mutex::new(VecDeque::new()),
        }
    }

    pub(super) fn elapsed(&self) -> Duration {
        *self.elapsed.lock().unwrap()
    }

    pub(super) fn at(&self, time: Duration) -> Instant {
        self.start + time
    }

    /// Lets time pass, and what is to happen until then.
    pub(super) fn advance(&self, by: Duration) {
        let end = self.elapsed() + by;
        loop {
            let mut happenings = self.happenings.lock().unwrap();
            let is_due = |(time, _): &(Duration, Happening)| *time <= end;
            let Some(index) = happenings.iter().position(is_due) else {
                break;
            };
            let (time, happening) = happenings.remove(index).unwrap();
            drop(happenings);
            let mut elapsed = self.elapsed.lock().unwrap();
            *elapsed = time.max(*elapsed);
            drop(elapsed);
            happening();
        }
        let mut elapsed = self.elapsed.lock().unwrap();
        *elapsed = end.max(*elapsed);
    }
}

impl Clock for SimulatedClock {
    fn now(&self) -> Instant {
        self.at(self.elapsed())
    }
}

/// Generates 1x1 images that show the seed. Takes 1 ms for each unit of work, and 5 ms a preview.
pub(super) struct Fake {
    info: ModelInfo,
    jobs: HashMap<JobId, (Job, usize)>,
    clock: Arc<SimulatedClock>,
    log: Arc<Mutex<Vec<Logged>>>,
    is_lost: bool,
}

/// A pixel is a token.
const PIXELS_PER_TOKEN: usize = 1;

/// Device time of a stage of a job.
pub(super) fn cost(job: &Job, stage: Stage) -> Duration {
    Duration::from_secs_f64(Work::of(job, PIXELS_PER_TOKEN).of_stage(stage) / 1000.0)
}

/// Device time of all of a job.
pub(super) fn whole_cost(job: &Job) -> Duration {
    Duration::from_secs_f64(Work::of(job, PIXELS_PER_TOKEN).total() / 1000.0)
}

impl Fake {
    pub(super) fn new(clock: Arc<SimulatedClock>, log: Arc<Mutex<Vec<Logged>>>) -> Self {
        let info = ModelInfo {
            sizes: ImageSizes {
                multiple: PIXELS_PER_TOKEN,
                max_side: 1024,
                default_side: 8,
            },
            vocab_size: 8,
            device: "fake".into(),
            dtype: "f32",
        };
        Self {
            info,
            jobs: HashMap::new(),
            clock,
            log,
            is_lost: false,
        }
    }

    fn work(&self, call: Call, takes: Duration) {
        let began = self.clock.elapsed();
        self.clock.advance(takes);
        let ended = self.clock.elapsed();
        self.log.lock().unwrap().push(Logged { call, began, ended });
    }
}

fn image(job: &Job, marked: u8) -> RgbImage {
    RgbImage {
        height: 1,
        width: 1,
        pixels: vec![job.seed as u8, marked, marked],
    }
}

impl Pipeline for Fake {
    fn info(&self) -> &ModelInfo {
        &self.info
    }

    fn start(&mut self, id: JobId, job: Job) -> Result<(), PipelineError> {
        self.work(Call::Start(job.seed), cost(&job, Stage::Encode));
        assert!(job.prompt[0] != PANIC_IN_START, "start went wrong");
        let steps = job.num_inference_steps;
        self.jobs.insert(id, (job, steps));
        Ok(())
    }

    fn step(&mut self, ids: &[JobId]) -> Result<Vec<usize>, PipelineError> {
        let mut steps_left = Vec::new();
        for id in ids {
            let (job, left) = self.jobs.get(id).ok_or(PipelineError::UnknownJob(*id))?;
            self.work(Call::Step(job.seed), cost(job, Stage::Step));
            assert!(job.prompt[0] != PANIC_IN_STEP, "step {left} went wrong");
            self.is_lost |= job.prompt[0] == LOSE_DEVICE_IN_STEP;
            if job.prompt[0] == FAIL_IN_STEP || self.is_lost {
                return Err(PipelineError::Device("out of memory".into()));
            }
            let left = left - 1;
            steps_left.push(left);
            self.jobs.get_mut(id).unwrap().1 = left;
        }
        Ok(steps_left)
    }

    fn preview(&mut self, id: JobId) -> Result<RgbImage, PipelineError> {
        let (job, steps_left) = self.jobs.get(&id).ok_or(PipelineError::UnknownJob(id))?;
        self.work(Call::Preview(job.seed), ms(5));
        assert!(job.prompt[0] != PANIC_IN_PREVIEW, "preview went wrong");
        Ok(image(job, *steps_left as u8))
    }

    fn finish(&mut self, id: JobId) -> Result<Output, PipelineError> {
        let (job, steps_left) = self.jobs.remove(&id).ok_or(PipelineError::UnknownJob(id))?;
        assert_eq!(steps_left, 0, "decoded too early");
        self.work(Call::Finish(job.seed), cost(&job, Stage::Decode));
        assert!(job.prompt[0] != PANIC_IN_FINISH, "finish went wrong");
        Ok(Output {
            images: vec![image(&job, 255); job.num_images],
            trace: Vec::new(),
        })
    }

    fn discard(&mut self, id: JobId) {
        if let Some((job, _)) = self.jobs.remove(&id) {
            self.work(Call::Discard(job.seed), Duration::ZERO);
        }
    }

    fn probe(&mut self) -> Result<(), PipelineError> {
        if self.is_lost {
            return Err(PipelineError::Device("gone".into()));
        }
        Ok(())
    }

    /// As many bytes as jobs.
    fn memory(&self) -> MemoryUse {
        MemoryUse {
            in_use: Some(self.jobs.len() as u64),
            ..MemoryUse::default()
        }
    }

    fn caches(&self) -> CacheUses {
        CacheUses {
            embeddings: CacheUse {
                max_bytes: 77,
                ..CacheUse::default()
            },
            modulation: CacheUse::default(),
        }
    }
}

/// A square of `side` tokens. Its step takes `side²` ms and a bit.
pub(super) fn job(seed: u64, side: usize, steps: usize) -> Job {
    Job {
        prompt: vec![WELL],
        negative_prompt: None,
        true_cfg_scale: 1.0,
        height: side,
        width: side,
        num_inference_steps: steps,
        num_images: 1,
        seed,
        noise_generator: NoiseGenerator::Cpu,
        record: false,
    }
}

pub(super) fn behaving(behaviour: u32, job: Job) -> Job {
    Job {
        prompt: vec![behaviour],
        ..job
    }
}

pub(super) fn settings(max_queue: usize, max_started: usize) -> EngineSettings {
    EngineSettings {
        max_queue,
        max_started,
        warm_up: None,
    }
}

/// An engine whose thread is the test.
pub(super) struct Bench {
    pub(super) shared: Arc<Shared>,
    pub(super) clock: Arc<SimulatedClock>,
    worker: Worker,
    log: Arc<Mutex<Vec<Logged>>>,
}

impl Bench {
    pub(super) fn new(settings: EngineSettings) -> Self {
        let clock = Arc::new(SimulatedClock::new());
        let log = Arc::new(Mutex::new(Vec::new()));
        let shared = Shared::new(settings, PIXELS_PER_TOKEN, Arc::clone(&clock) as Arc<_>);
        let shared = Arc::new(shared);
        let pipeline = Fake::new(Arc::clone(&clock), Arc::clone(&log));
        Self {
            worker: Worker::new(Box::new(pipeline), Arc::clone(&shared)),
            shared,
            clock,
            log,
        }
    }

    pub(super) fn submit(&self, job: Job) -> JobHandle {
        self.try_submit(job).unwrap()
    }

    pub(super) fn try_submit(&self, job: Job) -> Result<JobHandle, SubmitError> {
        self.shared.submit(job, SubmitOptions::default())
    }

    pub(super) fn submit_with_deadline(&self, job: Job, deadline: Duration) -> JobHandle {
        let options = SubmitOptions {
            deadline: Some(self.clock.at(deadline)),
            ..SubmitOptions::default()
        };
        self.shared.submit(job, options).unwrap()
    }

    /// Submits a job at a later time, in the middle of whatever the device does then.
    pub(super) fn submit_at(&self, time: Duration, job: Job) -> Later {
        let later = Later(Arc::new(Mutex::new(None)));
        let (shared, handle) = (Arc::clone(&self.shared), Arc::clone(&later.0));
        self.at(time, move || {
            let submitted = shared.submit(job, SubmitOptions::default()).unwrap();
            *handle.lock().unwrap() = Some(submitted);
        });
        later
    }

    /// Lets something happen in the middle of whatever the device does then.
    pub(super) fn at(&self, time: Duration, happening: impl FnOnce() + Send + 'static) {
        let mut happenings = self.clock.happenings.lock().unwrap();
        let index = happenings.partition_point(|(earlier, _)| *earlier <= time);
        happenings.insert(index, (time, Box::new(happening)));
    }

    /// One turn of the thread. False if it has nothing to do or has ended.
    pub(super) fn turn(&mut self) -> bool {
        match self.shared.poll() {
            Next::Sleep | Next::End => false,
            next => self.worker.turn(next),
        }
    }

    /// Turns until nothing is left to do.
    pub(super) fn run(&mut self) {
        while self.turn() {}
    }

    /// Turns until the pipeline has been called so.
    pub(super) fn turn_until(&mut self, call: Call) {
        while self
            .log
            .lock()
            .unwrap()
            .last()
            .is_none_or(|logged| logged.call != call)
        {
            assert!(self.turn(), "{call:?} was not made");
        }
    }

    pub(super) fn log(&self) -> Vec<Logged> {
        self.log.lock().unwrap().clone()
    }

    pub(super) fn calls(&self) -> Vec<Call> {
        self.log().into_iter().map(|logged| logged.call).collect()
    }

    /// The one time that a call was made.
    pub(super) fn find(&self, call: Call) -> Logged {
        let mut found = self.log().into_iter().filter(|logged| logged.call == call);
        let first = found.next();
        assert!(found.next().is_none(), "{call:?} was made twice");
        first.unwrap_or_else(|| panic!("{call:?} was not made"))
    }

    /// The seeds of the finished jobs.
    pub(super) fn finished(&self) -> Vec<u64> {
        let seed = |call: Call| match call {
            Call::Finish(seed) => Some(seed),
            _ => None,
        };
        self.calls().into_iter().filter_map(seed).collect()
    }
}

/// The handle of a job that is submitted later.
pub(super) struct Later(Arc<Mutex<Option<JobHandle>>>);

impl Later {
    pub(super) fn handle(&self) -> JobHandle {
        let handle = self.0.lock().unwrap().take();
        handle.expect("the job has been submitted")
    }
}

/// What a handle has heard so far.
pub(super) fn heard(handle: &mut JobHandle) -> Vec<Event> {
    std::iter::from_fn(|| handle.events.try_recv().ok()).collect()
}

/// How a job has ended.
pub(super) fn outcome(mut handle: JobHandle) -> Result<Finished, JobError> {
    match heard(&mut handle).pop() {
        Some(Event::Finished(finished)) => Ok(finished),
        Some(Event::Failed(error)) => Err(error),
        other => panic!("the job has not ended: {other:?}"),
    }
}
