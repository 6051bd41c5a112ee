//! A session: the jobs of one loaded model, from start to finish. Written once for every family.
//!
//! Holds the state of each job (latents, schedule, embeddings) and the caches that jobs share. The
//! family knows prompts, packing and pixels; the denoiser knows the transformer.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use burn::tensor::module::adaptive_avg_pool2d;
use burn::tensor::{DType, Tensor};
use kiln_ops::{FaultWatch, FusedOps};

use crate::adapter::AdapterUse;
use crate::cache::Cache;
use crate::denoiser::{Denoiser, Half, JobStep};
use crate::device::{DeviceMemory, caught, idle, reliably};
use crate::families::qwen_image::QwenImage;
use crate::finite::{Stage, check, read, traced};
use crate::flops::CostModel;
use crate::job::{Conditioning, Decoding, Job, JobId, Output, RgbImage};
use crate::memory::MemoryModel;
use crate::pipeline::{
    CacheUses, DeviceUse, MAX_PREVIEW_SIDE, MemoryRoom, MemoryUse, ModelDevice, ModelInfo,
    Pipeline, PipelineError, StepOutcome,
};
use crate::source::WeightFiles;
use crate::state::{Advance, JobState};
use crate::step_cache::{StepCache, StepCounts, first_gated_step};
use crate::vae::{Tiling, VaeSettings};
use crate::weights::Precision;

/// Bytes of embeddings that are kept for prompts that may come again. A prompt of 100 tokens takes
/// 1.4 MB for Qwen-Image in f32.
const KEPT_EMBEDDING_BYTES: usize = 256 << 20;

pub use crate::denoiser::BeforeForward;

/// What is chosen when a model is loaded.
#[derive(Debug, Clone)]
pub struct SessionSettings<B: FusedOps> {
    pub device: B::Device,
    /// Name of the backend.
    pub backend: &'static str,
    /// The devices of the transformer; the first is `device`.
    pub devices: Vec<SessionDevice<B>>,
    /// Whether the two halves of a guided job may run on two devices at the same time; `None` where
    /// that is faster.
    pub split_guidance: Option<bool>,
    /// Memory of `device` in bytes, if it is known.
    pub device_memory: Option<u64>,
    pub precision: Precision,
    pub vae: VaeSettings,
    /// Bound of the adapters on each device, in bytes.
    pub adapter_cache_bytes: usize,
    /// `None` but in tests.
    pub before_forward: Option<BeforeForward>,
}

/// A device of a [`SessionSettings`]. One that is in the list twice has one copy of the weights.
#[derive(Debug, Clone)]
pub struct SessionDevice<B: FusedOps> {
    pub device: B::Device,
    pub info: ModelDevice,
}

/// A pipeline: text encoder and VAE on the first device, the transformer on all.
#[derive(Debug)]
pub(crate) struct ImagePipeline<B: FusedOps> {
    family: QwenImage<B>,
    denoiser: Denoiser<B>,
    settings: SessionSettings<B>,
    info: ModelInfo,
    files: WeightFiles,
    jobs: HashMap<JobId, JobState<B>>,
    /// Embeddings by token ids.
    embeddings: Cache<Vec<u32>, Tensor<B, 2>>,
    /// Whether the device may have failed at what the caches hold.
    needs_reset: bool,
    /// Dropped last, as fields are dropped in their order.
    _memory: DeviceMemory<B>,
}

impl<B: FusedOps> ImagePipeline<B> {
    pub(crate) fn new(
        family: QwenImage<B>,
        denoiser: Denoiser<B>,
        settings: SessionSettings<B>,
        files: WeightFiles,
    ) -> Self {
        let info = ModelInfo {
            sizes: family.sizes,
            vocab_size: family.vocab_size,
            backend: settings.backend,
            devices: settings.devices.iter().map(|it| it.info.clone()).collect(),
            dtype: match settings.precision.model {
                DType::BF16 => "bf16",
                DType::F16 => "f16",
                _ => "f32",
            },
        };
        let memory = DeviceMemory::new(&settings.device);
        Self {
            family,
            denoiser,
            settings,
            info,
            files,
            jobs: HashMap::new(),
            embeddings: Cache::new(KEPT_EMBEDDING_BYTES),
            needs_reset: false,
            _memory: memory,
        }
    }

    /// Embeddings of each branch's prompt. A prompt that is not in the cache is encoded by itself, so
    /// that its embeddings do not depend on which of them are.
    fn encode(&mut self, job: &Job) -> Vec<Tensor<B, 2>> {
        let family = &self.family;
        let cache = &mut self.embeddings;
        let embeddings = job.branches().map(|prompt| {
            let make = || family.encode(&[prompt]).remove(0);
            cache.get_or_make(&prompt.tokens, make, |hidden| kept_bytes(prompt, hidden))
        });
        embeddings.collect()
    }

    /// Encodes prompts that are not in the cache in one forward pass.
    fn encode_together(&mut self, prompts: &[&Conditioning]) {
        let mut missing: Vec<&Conditioning> = Vec::new();
        for &prompt in prompts {
            let is_new = !self.embeddings.holds(&prompt.tokens) && !missing.contains(&prompt);
            if is_new && self.family.check_prompt(prompt).is_ok() {
                missing.push(prompt);
            }
        }
        // A single prompt is encoded when its job is started.
        if missing.len() > 1 {
            let encoded = self.family.encode(&missing);
            for (prompt, hidden) in missing.into_iter().zip(encoded) {
                let bytes = kept_bytes(prompt, &hidden);
                let cache = &mut self.embeddings;
                cache.get_or_make(&prompt.tokens, || hidden, |_| bytes);
            }
        }
    }

    /// Runs `work` and waits for the device: see [`reliably`]. If it fails, the caches may hold
    /// wrong values.
    fn reliably<T>(
        &mut self,
        mut work: impl FnMut(&mut Self, usize) -> Result<T, PipelineError>,
    ) -> Result<T, PipelineError> {
        let device = self.settings.device.clone();
        let done = reliably::<B, T>(&device, |run| work(self, run));
        done.map_err(|error| match error {
            PipelineError::Device(report) => {
                self.needs_reset = true;
                self.denoiser.drop_caches();
                PipelineError::Device(self.denoiser.labelled(report))
            }
            PipelineError::NotFinite(found) => {
                self.needs_reset = true;
                PipelineError::NotFinite(found)
            }
            other => other,
        })
    }

    /// As [`ImagePipeline::reliably`], for work that fills the caches: they are emptied first if they may
    /// hold wrong values, and later if the work fails.
    fn filling_caches<T>(
        &mut self,
        mut work: impl FnMut(&mut Self) -> Result<T, PipelineError>,
    ) -> Result<T, PipelineError> {
        // Set until the work is done, because it may end in a panic.
        let needed_reset = std::mem::replace(&mut self.needs_reset, true);
        let done = self.reliably(|pipeline, run| {
            if needed_reset || run > 0 {
                pipeline.drop_caches();
            }
            work(pipeline)
        })?;
        self.needs_reset = false;
        Ok(done)
    }

    /// Frees what can be computed again.
    fn drop_caches(&mut self) {
        self.embeddings.clear();
        self.denoiser.drop_caches();
        B::memory_cleanup(&self.settings.device);
    }

    /// Does everything that comes before the first step.
    fn prepare(&mut self, job: &Job) -> Result<JobState<B>, PipelineError> {
        let schedule = Arc::new(self.family.schedule(job));
        let lanes = self.denoiser.prepare(&schedule, &job.adapters)?;
        let embeddings = self.encode(job);
        let (latents, noise) = self.family.noise(job, &self.settings);

        let mut trace = Vec::new();
        let mut not_finite = None;
        let names = ["prompt_embeds", "negative_prompt_embeds"];
        for (name, embeds) in names.iter().zip(&embeddings) {
            let [tokens, dim] = embeds.dims();
            let values = read(embeds.clone())?;
            let found = check(&values, Stage::TextEncoding, self.info.dtype, job)?;
            not_finite = not_finite.or(found);
            if job.record {
                trace.push(traced(name, vec![1, tokens, dim], values));
            }
        }
        if job.record {
            trace.push(traced(
                "initial_noise",
                self.family.latent_shape(job),
                noise,
            ));
        }

        let half = |embeds: Tensor<B, 2>| {
            let segments = vec![self.family.segment(job, &embeds); job.num_images];
            Half::new(Tensor::cat(vec![embeds; job.num_images], 0), segments)
        };
        let steps = schedule.steps();
        Ok(JobState {
            job: job.clone(),
            schedule,
            lanes,
            steps_done: 0,
            counts: StepCounts::default(),
            latents,
            velocity: None,
            halves: embeddings.into_iter().map(half).collect(),
            cache: StepCache::new(&job.cache, steps),
            gate: first_gated_step(steps, job.cfg_gate_step),
            difference: None,
            trace,
            not_finite,
        })
    }

    /// Computes one step of those jobs that have steps left. Stores nothing.
    fn predict(&mut self, ids: &[JobId]) -> Result<Vec<Advance<B>>, PipelineError> {
        let mut jobs = Vec::with_capacity(ids.len());
        for &id in ids {
            let state = self.jobs.get(&id).ok_or(PipelineError::UnknownJob(id))?;
            if state.steps_left() > 0 {
                jobs.push((id, state));
            }
        }
        if jobs.is_empty() {
            return Ok(Vec::new());
        }
        let steps: Vec<JobStep<B>> = jobs.iter().map(|(_, state)| state.step()).collect();
        let predictions = self.denoiser.predict(&steps)?;
        jobs.iter()
            .zip(predictions)
            .map(|((id, state), prediction)| state.advance(*id, prediction, self.info.dtype))
            .collect()
    }

    fn decode_preview(&self, id: JobId) -> Result<RgbImage, PipelineError> {
        let state = self.state(id)?;
        let velocity = state.velocity.clone();
        let velocity = velocity.ok_or(PipelineError::NothingToShow(id))?;
        // The noise that is left, if every later step predicted the same velocity.
        let sigma = state.schedule.sigmas[state.steps_done];
        let first_image = |all: Tensor<B, 2>| {
            let tokens = all.dims()[0] / state.job.num_images;
            all.narrow(0, 0, tokens)
        };
        let clean = first_image(state.latents.clone()) - first_image(velocity) * sigma;
        let size = state.job.size;
        let reduced = preview_size(
            self.family.latent_size(size),
            MAX_PREVIEW_SIDE / self.family.scale_factor,
        );
        let latents = adaptive_avg_pool2d(self.family.unpack(size, clean), reduced);
        let pixels = self.family.decode(latents, VaeSettings::default());
        let [_, height, width, _] = pixels.dims();
        let values = read(pixels)?;
        check(&values, Stage::Decoding, self.info.dtype, &state.job)?;
        Ok(RgbImage::rounded(height, width, &values))
    }

    fn state(&self, id: JobId) -> Result<&JobState<B>, PipelineError> {
        self.jobs.get(&id).ok_or(PipelineError::UnknownJob(id))
    }
}

impl<B: FusedOps> Pipeline for ImagePipeline<B>
where
    B::Device: Send,
{
    fn info(&self) -> &ModelInfo {
        &self.info
    }

    fn cost_model(&self) -> CostModel {
        self.family.cost_model.clone()
    }

    fn memory_model(&self) -> Option<MemoryModel> {
        Some(self.family.memory_model.clone())
    }

    fn encode(&mut self, prompts: &[&Conditioning]) -> Result<(), PipelineError> {
        self.files.check()?;
        self.filling_caches(|pipeline| {
            pipeline.encode_together(prompts);
            Ok(pipeline.files.check()?)
        })
    }

    fn load_adapters(&mut self, adapters: &[AdapterUse]) -> Result<(), PipelineError> {
        self.family.check_adapters(adapters)?;
        self.filling_caches(|pipeline| pipeline.denoiser.load_adapters(adapters))
    }

    fn start(&mut self, id: JobId, job: Job) -> Result<(), PipelineError> {
        self.family.check(&job)?;
        self.files.check()?;
        let state = self.filling_caches(|pipeline| {
            let prepared = pipeline.prepare(&job);
            // A file that is cut short reads as zeros: that comes before what followed from it.
            pipeline.files.check()?;
            prepared
        })?;
        self.jobs.insert(id, state);
        Ok(())
    }

    fn step(&mut self, ids: &[JobId]) -> Result<Vec<StepOutcome>, PipelineError> {
        let started = Instant::now();
        let advances = self.reliably(|pipeline, _| pipeline.predict(ids));
        self.denoiser.count(started.elapsed());
        self.files.check_in_place()?;
        let mut works = HashMap::new();
        for advance in advances? {
            if let Some(state) = self.jobs.get_mut(&advance.id) {
                works.insert(advance.id, advance.work);
                state.commit(advance);
            }
        }
        ids.iter()
            .map(|&id| {
                self.state(id).map(|state| StepOutcome {
                    id,
                    steps_left: state.steps_left(),
                    counts: state.counts,
                    work: works.get(&id).copied().unwrap_or_default(),
                })
            })
            .collect()
    }

    fn preview(&mut self, id: JobId) -> Result<RgbImage, PipelineError> {
        let preview = self.reliably(|pipeline, _| pipeline.decode_preview(id));
        self.files.check_in_place()?;
        preview
    }

    fn finish(&mut self, id: JobId) -> Result<Output, PipelineError> {
        if self.state(id)?.steps_left() > 0 {
            return Err(PipelineError::Unfinished(id));
        }
        let state = self.jobs.remove(&id);
        let JobState {
            job,
            latents,
            counts,
            mut trace,
            not_finite,
            ..
        } = state.ok_or(PipelineError::UnknownJob(id))?;
        let vae = self.settings.vae.of(job.decoding);
        let latent_size = self.family.latent_size(job.size);
        let tiled = vae
            .tiling_of(latent_size, self.family.scale_factor)
            .map(Tiling::mode);
        let decoded = self.reliably(|pipeline, _| {
            let latents = pipeline.family.unpack(job.size, latents.clone());
            let pixels = pipeline.family.decode(latents, vae);
            Ok((pixels.dims(), read(pixels)?))
        });
        self.files.check_in_place()?;
        let (shape, mut values) = decoded?;
        let found = check(&values, Stage::Decoding, self.info.dtype, &job)?;
        // Infinity stays, so that a comparison of recorded values counts it.
        for value in values.iter_mut().filter(|value| value.is_finite()) {
            *value = value.clamp(0.0, 1.0);
        }
        let images = values
            .chunks_exact(job.size.pixels() * 3)
            .map(|image| RgbImage::rounded(job.size.height, job.size.width, image))
            .collect();
        if job.record {
            trace.push(traced("image_float", shape.to_vec(), values));
        }
        Ok(Output {
            images,
            tiled,
            steps: counts,
            trace,
            not_finite: not_finite.or(found),
        })
    }

    fn set_decoding(&mut self, id: JobId, decoding: Decoding) {
        if let Some(state) = self.jobs.get_mut(&id) {
            state.job.decoding = decoding;
        }
    }

    fn discard(&mut self, id: JobId) {
        if self.jobs.remove(&id).is_some() {
            // burn may panic when it drops tensors of a job that failed.
            idle::<B>(&self.settings.device).ok();
            self.denoiser.idle_others();
        }
    }

    fn probe(&mut self) -> Result<(), PipelineError> {
        self.reliably(|pipeline, _| pipeline.denoiser.probe_first())?;
        self.denoiser.probe_others()
    }

    fn memory(&self) -> MemoryUse {
        // A device that failed reports nothing here; the failure itself is reported elsewhere.
        let watch = FaultWatch::start();
        let memory = caught(&watch, || Ok(B::memory_use(&self.settings.device)));
        memory.unwrap_or_default()
    }

    fn device_use(&self) -> Vec<DeviceUse> {
        let watch = FaultWatch::start();
        let uses = caught(&watch, || Ok(self.denoiser.device_use()));
        let labels = self.info.devices.iter();
        let labels = labels.map(|device| format!("{}:{}", self.info.backend, device.index));
        let uses = labels.zip(uses.unwrap_or_default());
        uses.map(|(device, used)| DeviceUse { device, ..used })
            .collect()
    }

    fn memory_room(&self) -> Option<MemoryRoom> {
        let first = B::memory_room(&self.settings.device).or_else(|| {
            let total = self.settings.device_memory?;
            let free = total.saturating_sub(self.memory().in_use?);
            Some(MemoryRoom { free, total: free })
        });
        // Whichever device a job runs on, it finds what is planned for it.
        let rooms = [first].into_iter().chain(self.denoiser.rooms_of_others());
        let least = |a: MemoryRoom, b: MemoryRoom| MemoryRoom {
            free: a.free.min(b.free),
            total: a.total.min(b.total),
        };
        rooms.flatten().reduce(least)
    }

    fn drop_caches(&mut self) {
        Self::drop_caches(self);
    }

    fn caches(&self) -> CacheUses {
        let [modulation, positions, adapters] = self.denoiser.caches();
        CacheUses {
            embeddings: self.embeddings.counts(),
            modulation,
            positions,
            adapters,
        }
    }
}

/// Bytes that the cache keeps for a prompt's embeddings, which may be a view that keeps the template's
/// rows alive.
fn kept_bytes<B: FusedOps>(prompt: &Conditioning, hidden: &Tensor<B, 2>) -> usize {
    prompt.tokens.len() * hidden.dims()[1] * hidden.dtype().size()
}

/// Height and width of a preview in latents: the image's own, shrunk so that neither exceeds `max`.
fn preview_size(size: [usize; 2], max: usize) -> [usize; 2] {
    let longest = size[0].max(size[1]);
    if longest <= max {
        return size;
    }
    size.map(|side| (side * max / longest).max(1))
}
