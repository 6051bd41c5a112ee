//! A session: the jobs of one loaded model, from start to finish. Written once for every family.
//!
//! Holds the state of each job (latents, schedule, embeddings) and the caches that jobs share. The
//! family knows prompts, packing and pixels; the denoiser knows the transformer.

use std::collections::HashMap;
use std::sync::Arc;

use burn::tensor::module::adaptive_avg_pool2d;
use burn::tensor::{DType, Tensor};
use kiln_ops::{FaultWatch, FusedOps};

use crate::cache::Cache;
use crate::denoiser::{Branch, Denoiser};
use crate::device::{DeviceMemory, caught, idle, reliably};
use crate::families::qwen_image::QwenImage;
use crate::finite::{Stage, check, read, traced};
use crate::flops::CostModel;
use crate::job::{Conditioning, Decoding, Job, JobId, Output, RgbImage};
use crate::memory::MemoryModel;
use crate::pipeline::{
    CacheUses, MAX_PREVIEW_SIDE, MemoryRoom, MemoryUse, ModelInfo, Pipeline, PipelineError,
    StepOutcome,
};
use crate::sampling::Schedule;
use crate::source::WeightFiles;
use crate::state::{Advance, Half, JobState};
use crate::step_cache::StepCounts;
use crate::transformer::{ModulationTable, Transformer};
use crate::vae::VaeSettings;
use crate::weights::Precision;

/// Bytes of modulation tables that are kept for schedules that may come again. The table of 50
/// steps takes 0.44 GB for Qwen-Image.
const KEPT_TABLE_BYTES: usize = 1 << 30;

/// Bytes of embeddings that are kept for prompts that may come again. A prompt of 100 tokens takes
/// 1.4 MB for Qwen-Image in f32.
const KEPT_EMBEDDING_BYTES: usize = 256 << 20;

/// What is chosen when a model is loaded.
#[derive(Debug, Clone)]
pub struct SessionSettings<B: FusedOps> {
    pub device: B::Device,
    /// Name of the backend.
    pub backend: &'static str,
    /// Number of the device among the backend's devices.
    pub device_index: usize,
    pub device_name: String,
    /// Memory of the device in bytes, if it is known.
    pub device_memory: Option<u64>,
    pub precision: Precision,
    pub vae: VaeSettings,
}

/// A pipeline on one device.
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
    /// Modulation tables by the bits of a schedule's timesteps.
    tables: Cache<Vec<u32>, Arc<ModulationTable<B>>>,
    /// Whether the device may have failed at what the caches hold.
    needs_reset: bool,
    /// Dropped last, as fields are dropped in their order.
    _memory: DeviceMemory<B>,
}

impl<B: FusedOps> ImagePipeline<B> {
    pub(crate) fn new(
        family: QwenImage<B>,
        transformer: Transformer<B>,
        settings: SessionSettings<B>,
        files: WeightFiles,
    ) -> Self {
        let info = ModelInfo {
            sizes: family.sizes,
            vocab_size: family.vocab_size,
            backend: settings.backend,
            device_index: settings.device_index,
            device_name: settings.device_name.clone(),
            dtype: match settings.precision.model {
                DType::BF16 => "bf16",
                DType::F16 => "f16",
                _ => "f32",
            },
        };
        let memory = DeviceMemory::new(&settings.device);
        Self {
            family,
            denoiser: Denoiser::new(transformer, settings.precision.activations),
            settings,
            info,
            files,
            jobs: HashMap::new(),
            embeddings: Cache::new(KEPT_EMBEDDING_BYTES),
            tables: Cache::new(KEPT_TABLE_BYTES),
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

    fn modulation(&mut self, schedule: &Schedule) -> Arc<ModulationTable<B>> {
        let model = self.settings.precision.model;
        let timesteps = schedule.model_timesteps(model);
        let key = timesteps.iter().map(|t| t.to_bits()).collect();
        let denoiser = &self.denoiser;
        let make = || Arc::new(denoiser.modulation(schedule, model));
        self.tables.get_or_make(&key, make, |table| table.bytes())
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
                PipelineError::Device(format!("{}: {report}", self.info.device()))
            }
            PipelineError::NotFinite(found) => {
                self.needs_reset = true;
                PipelineError::NotFinite(found)
            }
            other => other,
        })
    }

    /// Frees what can be computed again.
    fn drop_caches(&mut self) {
        self.embeddings.clear();
        self.tables.clear();
        self.denoiser.drop_caches();
        B::memory_cleanup(&self.settings.device);
    }

    /// Does everything that comes before the first step.
    fn prepare(&mut self, job: &Job) -> Result<JobState<B>, PipelineError> {
        let schedule = self.family.schedule(job);
        let modulation = self.modulation(&schedule);
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

        let half = |embeds: Tensor<B, 2>| Half {
            segments: vec![self.family.segment(job, &embeds); job.num_images],
            text: Tensor::cat(vec![embeds; job.num_images], 0),
        };
        Ok(JobState {
            job: job.clone(),
            schedule,
            modulation,
            steps_done: 0,
            counts: StepCounts::default(),
            latents,
            velocity: None,
            halves: embeddings.into_iter().map(half).collect(),
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
        let modulation = jobs
            .iter()
            .map(|(_, state)| state.modulation.step(state.steps_done));
        let branches: Vec<Branch<B>> = jobs
            .iter()
            .enumerate()
            .flat_map(|(row, (_, state))| {
                state.halves.iter().map(move |half| Branch {
                    latents: state.latents.clone(),
                    text: half.text.clone(),
                    segments: &half.segments,
                    row,
                })
            })
            .collect();
        let velocities = self.denoiser.predict(modulation.collect(), &branches);
        let mut velocities = velocities.into_iter();
        jobs.iter()
            .map(|(id, state)| {
                let halves = velocities.by_ref().take(state.halves.len());
                state.advance(*id, halves.collect(), self.info.dtype)
            })
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
        // Set until the prompts are encoded, because encoding may end in a panic.
        let needed_reset = std::mem::replace(&mut self.needs_reset, true);
        self.reliably(|pipeline, run| {
            if needed_reset || run > 0 {
                pipeline.drop_caches();
            }
            pipeline.encode_together(prompts);
            Ok(pipeline.files.check()?)
        })?;
        self.needs_reset = false;
        Ok(())
    }

    fn start(&mut self, id: JobId, job: Job) -> Result<(), PipelineError> {
        self.family.check(&job)?;
        self.files.check()?;
        // Set until the job is prepared, because preparing may end in a panic.
        let needed_reset = std::mem::replace(&mut self.needs_reset, true);
        let state = self.reliably(|pipeline, run| {
            if needed_reset || run > 0 {
                pipeline.drop_caches();
            }
            let prepared = pipeline.prepare(&job);
            // A file that is cut short reads as zeros: that comes before what followed from it.
            pipeline.files.check()?;
            prepared
        })?;
        self.needs_reset = false;
        self.jobs.insert(id, state);
        Ok(())
    }

    fn step(&mut self, ids: &[JobId]) -> Result<Vec<StepOutcome>, PipelineError> {
        let advances = self.reliably(|pipeline, _| pipeline.predict(ids));
        self.files.check_in_place()?;
        for advance in advances? {
            if let Some(state) = self.jobs.get_mut(&advance.id) {
                state.commit(advance);
            }
        }
        ids.iter()
            .map(|&id| {
                self.state(id).map(|state| StepOutcome {
                    id,
                    steps_left: state.steps_left(),
                    counts: state.counts,
                    work: 1.0,
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
            .is_some();
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
        }
    }

    fn probe(&mut self) -> Result<(), PipelineError> {
        self.reliably(|pipeline, _| {
            let ones = Tensor::<B, 1>::ones([2], (&pipeline.settings.device, DType::F32));
            read(ones.clone() + ones).map(|_| ())
        })
    }

    fn memory(&self) -> MemoryUse {
        // A device that failed reports nothing here; the failure itself is reported elsewhere.
        let watch = FaultWatch::start();
        let memory = caught(&watch, || Ok(B::memory_use(&self.settings.device)));
        memory.unwrap_or_default()
    }

    fn memory_room(&self) -> Option<MemoryRoom> {
        B::memory_room(&self.settings.device).or_else(|| {
            let total = self.settings.device_memory?;
            let free = total.saturating_sub(self.memory().in_use?);
            Some(MemoryRoom { free, total: free })
        })
    }

    fn drop_caches(&mut self) {
        Self::drop_caches(self);
    }

    fn caches(&self) -> CacheUses {
        CacheUses {
            embeddings: self.embeddings.counts(),
            modulation: self.tables.counts(),
            positions: self.denoiser.position_cache(),
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
