//! A fake pipeline and a job builder, for tests and benches of this crate and of its callers.

mod adapters;

use std::collections::HashMap;
use std::fmt;

use crate::adapter::{Adapter, AdapterId, AdapterUse};
use crate::flops::{CostModel, FlopCount};
use crate::job::{
    Conditioning, Decoding, Guidance, Job, JobId, Noise, Output, RgbImage, Sampling, Size,
    TraceTensor,
};
use crate::memory::MemoryModel;
use crate::noise::NoiseGenerator;
use crate::pipeline::{
    CacheUses, DeviceUse, ImageSizes, MemoryRoom, MemoryUse, ModelDevice, ModelInfo, Pipeline,
    PipelineError, StepOutcome,
};
use crate::step_cache::{CachePolicy, StepCounts};
use crate::vae::TilingMode;

use self::adapters::FakeAdapters;

pub use self::adapters::{adapter, uses};

/// A job of one square image without guidance: one prompt token, seed 0, torch's CPU noise.
pub fn job(side: usize, steps: usize) -> Job {
    Job {
        conditioning: Conditioning { tokens: vec![0] },
        guidance: None,
        size: Size::square(side),
        sampling: Sampling::new(steps),
        noise: Noise {
            seed: 0,
            generator: NoiseGenerator::Cpu,
        },
        num_images: 1,
        decoding: Decoding::default(),
        cache: CachePolicy::Off,
        cfg_gate_step: None,
        adapters: Vec::new(),
        record: false,
    }
}

/// The work of a step of a [`FakePipeline`], from 0, as a part of a full step's: that of a mask and of
/// a guidance gate.
pub fn step_work(job: &Job, step: usize) -> f64 {
    let is_skipped = match &job.cache {
        CachePolicy::Mask(mask) => mask.get(step) == Some(&false),
        _ => false,
    };
    if is_skipped {
        0.0
    } else if is_gated(job, step) {
        0.5
    } else {
        1.0
    }
}

/// What the first steps have run.
fn counts(job: &Job, done: usize) -> StepCounts {
    if job.cache == CachePolicy::Off && job.cfg_gate_step.is_none() {
        return StepCounts {
            computed: done,
            ..StepCounts::default()
        };
    }
    let of = |is_counted: &dyn Fn(usize) -> bool| (0..done).filter(|&it| is_counted(it)).count();
    let skipped = of(&|step| step_work(job, step) <= 0.0);
    StepCounts {
        computed: done - skipped,
        skipped,
        gated: of(&|step| is_gated(job, step)),
    }
}

fn is_gated(job: &Job, step: usize) -> bool {
    let first = job.cfg_gate_step.map_or(f64::INFINITY, |part| {
        (part * job.sampling.steps as f64).floor()
    });
    job.guidance.is_some() && step as f64 >= first.max(1.0)
}

/// The work of all steps, in full steps.
pub fn denoise_work(job: &Job) -> f64 {
    if job.cache == CachePolicy::Off && job.cfg_gate_step.is_none() {
        return job.sampling.steps as f64;
    }
    (0..job.sampling.steps)
        .map(|step| step_work(job, step))
        .sum()
}

/// Guidance of a job, from the tokens of a negative prompt.
pub fn guidance(negative: Vec<u32>, scale: f64) -> Option<Guidance> {
    Guidance::new(Some(negative.into()), scale)
}

/// Facts of a model on a backend called `test`: sides are multiples of 16 up to 4096.
pub fn model_info() -> ModelInfo {
    ModelInfo {
        sizes: ImageSizes {
            multiple: 16,
            max_side: 4096,
            default_side: 64,
        },
        vocab_size: 200_000,
        backend: "test",
        devices: vec![ModelDevice {
            index: 0,
            name: "fake".to_owned(),
        }],
        dtype: "f32",
    }
}

/// A call of a [`FakePipeline`], with the job that it is for.
#[derive(Debug, Clone, Copy)]
pub enum Call<'a> {
    Start(&'a Job),
    /// Prompts that are encoded together.
    Encode(&'a [&'a Conditioning]),
    /// Adapters that are uploaded ahead, as far as they are not on the device.
    LoadAdapters(&'a [AdapterUse]),
    /// One adapter that is not on the device, while a job is started or adapters are loaded ahead.
    Upload(&'a Adapter),
    /// Comes before the steps of the jobs of one `step` call.
    Steps(&'a [&'a Job]),
    /// The step of one job; `step` calls with several ids make several of these.
    Step(&'a Job),
    Preview(&'a Job),
    Finish(&'a Job),
    Discard(&'a Job),
    Probe,
}

type OnCall = Box<dyn FnMut(Call<'_>) -> Result<(), PipelineError> + Send>;
/// Memory that can be allocated.
type Room = Box<dyn Fn() -> MemoryRoom + Send>;
/// Makes the image of a job; the number is that of the steps that are left.
type MakeImage = Box<dyn Fn(&Job, usize) -> RgbImage + Send>;
type MakeTrace = Box<dyn Fn(&Job) -> Vec<TraceTensor> + Send>;

/// A pipeline that computes nothing. By default every value of its images is the lowest byte of the
/// seed, and previews have 16x16 pixels. Recorded jobs get a trace that ends with `image_float`, and
/// has no other stage by default.
pub struct FakePipeline {
    info: ModelInfo,
    cost_model: CostModel,
    caches: CacheUses,
    adapters: FakeAdapters,
    devices: Vec<DeviceUse>,
    memory: Option<(MemoryModel, Room)>,
    jobs: HashMap<JobId, (Job, usize)>,
    on_call: OnCall,
    image: MakeImage,
    trace: MakeTrace,
}

impl FakePipeline {
    pub fn new(info: ModelInfo) -> Self {
        let work = |job: &Job| FlopCount {
            encode: 1000,
            modulation: 0,
            step: 1000,
            denoise: (1000.0 * denoise_work(job)).round() as u64,
            decode: 1000,
        };
        Self {
            adapters: FakeAdapters::new(usize::MAX, info.weight_size()),
            info,
            cost_model: CostModel::new(work),
            caches: CacheUses::default(),
            devices: Vec::new(),
            memory: None,
            jobs: HashMap::new(),
            on_call: Box::new(|_| Ok(())),
            image: Box::new(|job, steps_left| {
                let size = if steps_left == 0 {
                    job.size
                } else {
                    Size::square(16)
                };
                RgbImage {
                    height: size.height,
                    width: size.width,
                    pixels: vec![job.noise.seed as u8; size.pixels() * 3],
                }
            }),
            trace: Box::new(|_| Vec::new()),
        }
    }

    /// Runs this function before every call; its error is the call's error, and it may panic.
    #[must_use]
    pub fn on_call(
        mut self,
        on_call: impl FnMut(Call<'_>) -> Result<(), PipelineError> + Send + 'static,
    ) -> Self {
        self.on_call = Box::new(on_call);
        self
    }

    /// Makes the stages of recorded jobs before the image with this function.
    #[must_use]
    pub fn with_trace(mut self, trace: impl Fn(&Job) -> Vec<TraceTensor> + Send + 'static) -> Self {
        self.trace = Box::new(trace);
        self
    }

    /// Makes previews and images with this function of the job and its remaining steps.
    #[must_use]
    pub fn images(mut self, image: impl Fn(&Job, usize) -> RgbImage + Send + 'static) -> Self {
        self.image = Box::new(image);
        self
    }

    #[must_use]
    pub fn with_cost_model(mut self, cost_model: CostModel) -> Self {
        self.cost_model = cost_model;
        self
    }

    #[must_use]
    pub fn with_caches(mut self, caches: CacheUses) -> Self {
        self.caches = caches;
        self
    }

    /// Keeps at most this many bytes of adapters on the device.
    #[must_use]
    pub fn with_adapter_cache(mut self, max_bytes: usize) -> Self {
        self.adapters = FakeAdapters::new(max_bytes, self.info.weight_size());
        self
    }

    #[must_use]
    pub fn with_device_use(mut self, devices: Vec<DeviceUse>) -> Self {
        self.devices = devices;
        self
    }
}

impl FakePipeline {
    /// The adapters of the jobs that have been started.
    fn adapters_in_use(&self) -> Vec<AdapterId> {
        let jobs = self.jobs.values();
        jobs.flat_map(|(job, _)| job.adapters.iter().map(|it| it.adapter.id()))
            .collect()
    }

    /// Uploads adapters. False if they do not fit beside those in use.
    fn load(&mut self, adapters: &[AdapterUse]) -> Result<bool, PipelineError> {
        let in_use = self.adapters_in_use();
        let on_call = &mut self.on_call;
        self.adapters
            .load(adapters, &in_use, |adapter| on_call(Call::Upload(adapter)))
    }

    /// Plans jobs with this model, on a device with this memory.
    #[must_use]
    pub fn with_memory(
        mut self,
        model: MemoryModel,
        room: impl Fn() -> MemoryRoom + Send + 'static,
    ) -> Self {
        self.memory = Some((model, Box::new(room)));
        self
    }
}

impl Pipeline for FakePipeline {
    fn info(&self) -> &ModelInfo {
        &self.info
    }

    fn cost_model(&self) -> CostModel {
        self.cost_model.clone()
    }

    fn memory_model(&self) -> Option<MemoryModel> {
        self.memory.as_ref().map(|(model, _)| model.clone())
    }

    fn memory_room(&self) -> Option<MemoryRoom> {
        self.memory.as_ref().map(|(_, room)| room())
    }

    fn set_decoding(&mut self, id: JobId, decoding: Decoding) {
        if let Some((job, _)) = self.jobs.get_mut(&id) {
            job.decoding = decoding;
        }
    }

    fn encode(&mut self, prompts: &[&Conditioning]) -> Result<(), PipelineError> {
        (self.on_call)(Call::Encode(prompts))
    }

    fn load_adapters(&mut self, adapters: &[AdapterUse]) -> Result<(), PipelineError> {
        (self.on_call)(Call::LoadAdapters(adapters))?;
        self.load(adapters).map(drop)
    }

    /// # Panics
    ///
    /// If the job's adapters do not fit beside those of other jobs.
    fn start(&mut self, id: JobId, job: Job) -> Result<(), PipelineError> {
        (self.on_call)(Call::Start(&job))?;
        assert!(
            self.load(&job.adapters)?,
            "no room for the adapters of job {id}"
        );
        let steps = job.sampling.steps;
        self.jobs.insert(id, (job, steps));
        Ok(())
    }

    fn step(&mut self, ids: &[JobId]) -> Result<Vec<StepOutcome>, PipelineError> {
        let jobs = ids.iter().map(|&id| {
            let (job, _) = self.jobs.get(&id).ok_or(PipelineError::UnknownJob(id))?;
            Ok(job)
        });
        let jobs: Vec<&Job> = jobs.collect::<Result<_, PipelineError>>()?;
        (self.on_call)(Call::Steps(&jobs))?;
        for job in jobs {
            (self.on_call)(Call::Step(job))?;
        }
        let mut outcomes = Vec::with_capacity(ids.len());
        for &id in ids {
            let (job, left) = self
                .jobs
                .get_mut(&id)
                .ok_or(PipelineError::UnknownJob(id))?;
            let step = job.sampling.steps - *left;
            *left = left.saturating_sub(1);
            outcomes.push(StepOutcome {
                id,
                steps_left: *left,
                counts: counts(job, job.sampling.steps - *left),
                work: step_work(job, step),
            });
        }
        Ok(outcomes)
    }

    fn preview(&mut self, id: JobId) -> Result<RgbImage, PipelineError> {
        let (job, left) = self.jobs.get(&id).ok_or(PipelineError::UnknownJob(id))?;
        (self.on_call)(Call::Preview(job))?;
        Ok((self.image)(job, *left))
    }

    fn finish(&mut self, id: JobId) -> Result<Output, PipelineError> {
        let (job, left) = self.jobs.get(&id).ok_or(PipelineError::UnknownJob(id))?;
        if *left > 0 {
            return Err(PipelineError::Unfinished(id));
        }
        let job = job.clone();
        self.jobs.remove(&id);
        (self.on_call)(Call::Finish(&job))?;
        let mut trace = (self.trace)(&job);
        trace.push(TraceTensor {
            name: "image_float".to_owned(),
            shape: vec![1, 1, 1, 3],
            values: vec![0.5; 3],
        });
        Ok(Output {
            images: vec![(self.image)(&job, 0); job.num_images],
            tiled: matches!(job.decoding, Decoding::Tiled(_)).then_some(TilingMode::Exact),
            steps: counts(&job, job.sampling.steps),
            trace: if job.record { trace } else { Vec::new() },
            not_finite: None,
        })
    }

    fn discard(&mut self, id: JobId) {
        if let Some((job, _)) = self.jobs.remove(&id) {
            (self.on_call)(Call::Discard(&job)).ok();
        }
    }

    fn probe(&mut self) -> Result<(), PipelineError> {
        (self.on_call)(Call::Probe)
    }

    /// As many bytes as there are jobs.
    fn memory(&self) -> MemoryUse {
        MemoryUse {
            in_use: Some(self.jobs.len() as u64),
            ..MemoryUse::default()
        }
    }

    fn device_use(&self) -> Vec<DeviceUse> {
        self.devices.clone()
    }

    fn drop_caches(&mut self) {
        let in_use = self.adapters_in_use();
        self.adapters.drop_unused(&in_use);
    }

    fn caches(&self) -> CacheUses {
        CacheUses {
            adapters: self.adapters.counts(),
            ..self.caches
        }
    }
}

impl fmt::Debug for FakePipeline {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("FakePipeline")
            .finish_non_exhaustive()
    }
}
