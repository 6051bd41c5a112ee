//! A fake pipeline and a simulated clock, and an engine whose thread is the test.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use kiln_models::flops::{CostModel, FlopCount};
use kiln_models::job::{Conditioning, Job, Noise, RgbImage};
use kiln_models::pipeline::{
    CacheUse, CacheUses, DeviceUse, ImageSizes, ModelDevice, ModelInfo, PipelineError,
};
use kiln_models::testing::{self, FakePipeline};

use crate::engine::cost::{Stage, Work, makespan};
use crate::engine::plan::{Booked, Plan};
use crate::engine::shared::{Clock, Shared, Task};
use crate::engine::worker::Worker;
use crate::engine::{
    EngineSettings, Event, Finished, JobError, JobHandle, SubmitError, SubmitOptions,
};

/// How the pipeline behaves for a job, by the first token of the job's prompt.
pub(super) const WELL: u32 = 0;
pub(super) const PANIC_IN_START: u32 = 1;
pub(super) const PANIC_IN_STEP: u32 = 2;
pub(super) const PANIC_IN_FINISH: u32 = 3;
pub(super) const FAIL_IN_STEP: u32 = 4;
pub(super) const PANIC_IN_PREVIEW: u32 = 5;
pub(super) const LOSE_DEVICE_IN_STEP: u32 = 6;
/// The device has no memory for a step of this job and others.
pub(super) const FAIL_IN_COMPANY: u32 = 7;
/// The job's prompt cannot be encoded together with others.
pub(super) const PANIC_IN_ENCODE: u32 = 8;

pub(super) const fn ms(milliseconds: u64) -> Duration {
    Duration::from_millis(milliseconds)
}

/// How long an adapter takes to be uploaded.
pub(super) const UPLOAD: Duration = ms(3);

/// The name of an adapter that the device has no memory for.
pub(super) const FAIL_IN_UPLOAD: &str = "13";

/// A call of the pipeline, with the seed of its job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Call {
    Start(u64),
    Step(u64),
    Preview(u64),
    Finish(u64),
    Discard(u64),
    /// Of the adapter with this number as its name.
    Upload(u64),
}

/// A call, with the times at which it began and ended.
#[derive(Debug, Clone, Copy)]
pub(super) struct Logged {
    pub(super) call: Call,
    pub(super) began: Duration,
    pub(super) ended: Duration,
}

type Happening = Box<dyn FnOnce() + Send>;

/// A clock that the pipeline moves, and what happens at which time.
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

    /// Lets time pass, and runs what is to happen in that time.
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

/// The cost model of the fake pipeline, in thousandths of the device's milliseconds. A pixel is a
/// token, and attention costs as much as all else at 18,432 tokens.
pub(super) fn flops(job: &Job) -> FlopCount {
    let tokens = job.size.pixels() as f64;
    let forward = |text: &Conditioning| {
        let tokens = tokens + text.tokens.len() as f64;
        tokens * (1.0 + tokens / 18_432.0)
    };
    let images = job.num_images as f64;
    let units = |value: f64| (value * 1000.0).round() as u64;
    let step = units(images * job.branches().map(forward).sum::<f64>());
    FlopCount {
        encode: units(job.branches().map(|text| text.tokens.len() as f64).sum()),
        modulation: 0,
        step,
        denoise: (step as f64 * testing::denoise_work(job)).round() as u64,
        decode: units(images * tokens * 0.085),
    }
}

pub(super) fn work(job: &Job) -> Work {
    Work::new(flops(job), job, 1)
}

/// Device time of one step of these jobs together on this many devices.
pub(super) fn step_cost(jobs: &[&Job], devices: usize) -> Duration {
    let units: Vec<f64> = jobs.iter().flat_map(|job| work(job).units()).collect();
    Duration::from_secs_f64(makespan(&units, devices) / 1e6)
}

/// Device time of a stage of a job.
pub(super) fn cost(job: &Job, stage: Stage) -> Duration {
    Duration::from_secs_f64(work(job).of_stage(stage) / 1e6)
}

/// Device time of all of a job.
pub(super) fn whole_cost(job: &Job) -> Duration {
    Duration::from_secs_f64(work(job).total() / 1e6)
}

/// The seeds of the jobs of each `step` call.
pub(super) type Packs = Arc<Mutex<Vec<Vec<u64>>>>;

/// As [`fake_on`], on one device.
pub(super) fn fake(clock: Arc<SimulatedClock>, log: Arc<Mutex<Vec<Logged>>>) -> FakePipeline {
    fake_on(1, clock, log, Packs::default())
}

/// A model on this many devices.
fn info(devices: usize) -> ModelInfo {
    ModelInfo {
        sizes: ImageSizes {
            multiple: 1,
            max_side: 1024,
            default_side: 8,
        },
        vocab_size: 8,
        devices: (0..devices)
            .map(|index| ModelDevice {
                index,
                name: "fake".to_owned(),
            })
            .collect(),
        ..testing::model_info()
    }
}

/// A pipeline that makes 1x1 images which show the seed. Its work takes simulated time: 1 ms for
/// each token of a forward, and 5 ms for a preview.
pub(super) fn fake_on(
    devices: usize,
    clock: Arc<SimulatedClock>,
    log: Arc<Mutex<Vec<Logged>>>,
    packs: Packs,
) -> FakePipeline {
    let caches = CacheUses {
        embeddings: CacheUse {
            max_bytes: 77,
            ..CacheUse::default()
        },
        ..CacheUses::default()
    };
    let mut is_lost = false;
    let mut steps_done: HashMap<u64, usize> = HashMap::new();
    // How long each job makes the step that comes longer, and prompts encoded before their start.
    let mut parts = VecDeque::new();
    let mut encoded = 0;
    let on_call = move |call: testing::Call<'_>| -> Result<(), PipelineError> {
        let (job, logged, takes) = match call {
            testing::Call::Encode(prompts) => {
                let tokens = prompts.iter().map(|prompt| prompt.tokens.len() as u64);
                clock.advance(ms(tokens.sum()));
                let fails = |prompt: &&Conditioning| prompt.tokens[0] == PANIC_IN_ENCODE;
                assert!(!prompts.iter().any(fails), "encoding went wrong");
                encoded += prompts.len();
                return Ok(());
            }
            testing::Call::Upload(adapter) => {
                let began = clock.elapsed();
                clock.advance(UPLOAD);
                let ended = clock.elapsed();
                let name = adapter.name();
                let call = Call::Upload(name.parse().unwrap());
                log.lock().unwrap().push(Logged { call, began, ended });
                if name == FAIL_IN_UPLOAD {
                    return Err(PipelineError::Device("no memory is left".into()));
                }
                return Ok(());
            }
            testing::Call::Steps(jobs) => {
                packs.lock().unwrap().push(seeds(jobs));
                parts = step_parts(jobs, devices);
                let behaves = |job: &&Job| job.conditioning.tokens[0] == FAIL_IN_COMPANY;
                if jobs.len() > 1 && jobs.iter().any(behaves) {
                    clock.advance(ms(7));
                    return Err(PipelineError::Device("no memory is left".into()));
                }
                return Ok(());
            }
            testing::Call::Start(job) => {
                let prompts = job.branches().count();
                let is_encoded = encoded >= prompts;
                encoded = encoded.saturating_sub(prompts);
                let takes = if is_encoded {
                    Duration::ZERO
                } else {
                    cost(job, Stage::Encode)
                };
                (job, Call::Start as fn(u64) -> Call, takes)
            }
            testing::Call::Step(job) => {
                let takes: Duration = parts.pop_front().unwrap();
                let done = steps_done.entry(job.noise.seed).or_default();
                *done += 1;
                let part = testing::step_work(job, *done - 1);
                (job, Call::Step as _, takes.mul_f64(part))
            }
            testing::Call::Preview(job) => (job, Call::Preview as _, ms(5)),
            testing::Call::Finish(job) => (job, Call::Finish as _, cost(job, Stage::Decode)),
            testing::Call::Discard(job) => (job, Call::Discard as _, Duration::ZERO),
            testing::Call::Probe if is_lost => {
                return Err(PipelineError::Device("gone".into()));
            }
            testing::Call::LoadAdapters(_) | testing::Call::Probe => return Ok(()),
        };
        let began = clock.elapsed();
        clock.advance(takes);
        let ended = clock.elapsed();
        let call_of_job = logged(job.noise.seed);
        log.lock().unwrap().push(Logged {
            call: call_of_job,
            began,
            ended,
        });
        behave(&call, job, &mut is_lost)
    };
    FakePipeline::new(info(devices))
        .with_cost_model(CostModel::new(flops))
        .with_caches(caches)
        .with_device_use(vec![DeviceUse {
            device: "test:0".to_owned(),
            forwards: 7,
            ..DeviceUse::default()
        }])
        .images(|job, steps_left| {
            image(
                job,
                if steps_left == 0 {
                    255
                } else {
                    steps_left as u8
                },
            )
        })
        .on_call(on_call)
}

/// By how much each job makes a step of these jobs longer.
fn step_parts(jobs: &[&Job], devices: usize) -> VecDeque<Duration> {
    let mut before = Duration::ZERO;
    let until = (1..=jobs.len()).map(|count| step_cost(&jobs[..count], devices));
    let part = |until: Duration| {
        let part = until.saturating_sub(before);
        before = until.max(before);
        part
    };
    until.map(part).collect()
}

/// Fails as the behaviour of a job says. `is_lost` says whether the device has been lost.
fn behave(call: &testing::Call<'_>, job: &Job, is_lost: &mut bool) -> Result<(), PipelineError> {
    let behaviour = job.conditioning.tokens[0];
    match call {
        testing::Call::Start(_) => assert!(behaviour != PANIC_IN_START, "start went wrong"),
        testing::Call::Preview(_) => {
            assert!(behaviour != PANIC_IN_PREVIEW, "preview went wrong");
        }
        testing::Call::Finish(_) => assert!(behaviour != PANIC_IN_FINISH, "finish went wrong"),
        testing::Call::Step(_) => {
            assert!(behaviour != PANIC_IN_STEP, "step went wrong");
            *is_lost |= behaviour == LOSE_DEVICE_IN_STEP;
            if behaviour == FAIL_IN_STEP || *is_lost {
                return Err(PipelineError::Device("out of memory".into()));
            }
        }
        _ => {}
    }
    Ok(())
}

fn seeds(jobs: &[&Job]) -> Vec<u64> {
    jobs.iter().map(|job| job.noise.seed).collect()
}

fn image(job: &Job, marked: u8) -> RgbImage {
    RgbImage {
        height: 1,
        width: 1,
        pixels: vec![job.noise.seed as u8, marked, marked],
    }
}

/// A square of `side` tokens. Its step takes `side²` ms and a bit.
pub(super) fn job(seed: u64, side: usize, steps: usize) -> Job {
    let plain = testing::job(side, steps);
    Job {
        conditioning: vec![WELL].into(),
        noise: Noise {
            seed,
            ..plain.noise
        },
        ..plain
    }
}

pub(super) fn behaving(behaviour: u32, job: Job) -> Job {
    Job {
        conditioning: vec![behaviour].into(),
        ..job
    }
}

/// As [`job`], with guidance: a step has two halves of the same work.
pub(super) fn guided(seed: u64, side: usize, steps: usize) -> Job {
    Job {
        guidance: testing::guidance(vec![WELL], 4.0),
        ..job(seed, side, steps)
    }
}

/// Every job has its steps for itself.
pub(super) fn settings(max_queue: usize, max_started: usize) -> EngineSettings {
    EngineSettings {
        max_queue,
        max_started,
        max_memory: None,
        adapter_cache_bytes: usize::MAX,
        max_step_tokens: Some(0),
        warm_up: None,
    }
}

/// As [`settings`], with steps of several jobs of up to this many tokens.
pub(super) fn packing(max_queue: usize, max_started: usize, tokens: usize) -> EngineSettings {
    EngineSettings {
        max_step_tokens: Some(tokens),
        ..settings(max_queue, max_started)
    }
}

/// Numbers of devices, and image tokens of a step: the ways in which steps are made, under all of
/// which the rules of the order hold.
pub(super) const WAYS: [(usize, usize); 6] =
    [(1, 0), (1, 150), (1, 2000), (2, 0), (2, 150), (2, 2000)];

/// An engine whose thread is the test.
pub(super) struct Bench {
    pub(super) shared: Arc<Shared>,
    pub(super) clock: Arc<SimulatedClock>,
    worker: Worker,
    log: Arc<Mutex<Vec<Logged>>>,
    packs: Packs,
}

impl Bench {
    pub(super) fn new(settings: EngineSettings) -> Self {
        Self::on(1, settings)
    }

    /// An engine whose steps are spread over this many devices.
    pub(super) fn on(devices: usize, settings: EngineSettings) -> Self {
        let clock = Arc::new(SimulatedClock::new());
        let log = Arc::new(Mutex::new(Vec::new()));
        let packs = Packs::default();
        let pipeline = fake_on(
            devices,
            Arc::clone(&clock),
            Arc::clone(&log),
            Arc::clone(&packs),
        );
        Self {
            packs,
            ..Self::with_pipeline(settings, pipeline, clock, log)
        }
    }

    /// An engine that has measured each stage twice.
    pub(super) fn measured() -> Self {
        let mut bench = Self::new(settings(1000, 8));
        for seed in [1000, 1001] {
            let handle = bench.submit(job(seed, 5, 3));
            bench.run();
            outcome(handle).unwrap();
        }
        bench
    }

    pub(super) fn with_pipeline(
        settings: EngineSettings,
        pipeline: FakePipeline,
        clock: Arc<SimulatedClock>,
        log: Arc<Mutex<Vec<Logged>>>,
    ) -> Self {
        let shared = Shared::new(settings, &pipeline, Arc::clone(&clock) as Arc<_>);
        let shared = Arc::new(shared);
        Self {
            worker: Worker::new(Box::new(pipeline), Arc::clone(&shared)),
            shared,
            clock,
            log,
            packs: Packs::default(),
        }
    }

    /// The seeds of the jobs of each `step` call so far.
    pub(super) fn packs(&self) -> Vec<Vec<u64>> {
        self.packs.lock().unwrap().clone()
    }

    pub(super) fn submit(&self, job: Job) -> JobHandle {
        self.try_submit(job).unwrap()
    }

    pub(super) fn try_submit(&self, job: Job) -> Result<JobHandle, SubmitError> {
        self.shared.submit(job, SubmitOptions::default())
    }

    /// Submits a job that is due at a time.
    pub(super) fn submit_due(&self, job: Job, due: Duration) -> Result<JobHandle, SubmitError> {
        self.shared.submit(job, self.due(due))
    }

    /// Options of a job that is due at a time.
    pub(super) fn due(&self, due: Duration) -> SubmitOptions {
        SubmitOptions {
            due: Some(self.clock.at(due)),
            ..SubmitOptions::default()
        }
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

    /// One cycle of the thread. False if there is nothing to do or the engine has ended.
    pub(super) fn turn(&mut self) -> bool {
        let booked = self.worker.execute(self.shared.poll());
        let is_turn = booked.is_some();
        if let Some(booked) = booked {
            self.shared.book(booked);
        }
        is_turn
    }

    /// Carries out a plan that no scheduler has made.
    pub(super) fn execute(&mut self, plan: Plan) -> Booked {
        let spans = HashMap::new();
        self.worker.execute(Task { plan, spans }).unwrap()
    }

    /// Turns until nothing is left to do.
    pub(super) fn run(&mut self) {
        while self.turn() {}
    }

    /// Turns until the last call of the pipeline is this one.
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

    /// The only call of this kind.
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

/// The events that a handle has received so far.
pub(super) fn received(handle: &mut JobHandle) -> Vec<Event> {
    std::iter::from_fn(|| handle.events.try_recv().ok()).collect()
}

/// How a job has ended.
pub(super) fn outcome(mut handle: JobHandle) -> Result<Finished, JobError> {
    match received(&mut handle).pop() {
        Some(Event::Finished(finished)) => Ok(finished),
        Some(Event::Failed(error)) => Err(error),
        other => panic!("the job has not ended: {other:?}"),
    }
}
