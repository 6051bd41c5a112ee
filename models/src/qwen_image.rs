//! Qwen-Image text-to-image: the pipeline that joins text encoder, transformer and VAE.

use std::collections::HashMap;
use std::sync::Arc;

use burn::tensor::module::adaptive_avg_pool2d;
use burn::tensor::{DType, Tensor, TensorData};
use cubecl_common::stream_id::StreamId;
use kiln_ops::{FaultWatch, FusedOps};

use crate::cache::Cache;
use crate::config::{ConfigError, ConfigReader, ConfigText};
use crate::device::{caught, idle, reliably, summary};
use crate::guidance::true_cfg;
use crate::noise::randn;
use crate::pipeline::{
    CacheUses, ImageSizes, Job, JobId, MAX_PREVIEW_SIDE, MemoryUse, ModelInfo, Output, Pipeline,
    PipelineError, RgbImage, TraceTensor,
};
use crate::sampling::{Schedule, SchedulerConfig, round_to};
use crate::source::TensorSource;
use crate::text_encoder::{TextEncoder, TextEncoderConfig};
use crate::transformer::{
    ModulationTable, Packing, Segment, StepModulation, Transformer, TransformerConfig,
};
use crate::vae::{VaeConfig, VaeDecoder, VaeSettings};
use crate::weights::{LoadError, Precision};

/// Ids that the reference drops from the front of every encoded prompt. It is the template's
/// length in Qwen's vocabulary, and it stays this number with any other.
pub const TEMPLATE_TOKENS_DROPPED: usize = 34;

/// The longest prompt, in tokens without the template's, and the embeddings kept of one: the
/// `tokenizer_max_length` of the reference, which cuts where kiln refuses.
pub const MAX_PROMPT_TOKENS: usize = 1024;

/// Latents per packed token, in height and in width.
pub(crate) const PATCH: usize = 2;

/// Entries of the reference's table of rotary positions, which bounds an image's sides.
const ROPE_POSITIONS: usize = 4096;

/// Bytes of modulation that are kept for schedules that may come again. One of 50 steps takes
/// 0.44 GB for Qwen-Image.
const KEPT_TABLE_BYTES: usize = 1 << 30;

/// Bytes of embeddings that are kept for prompts that may come again. One of 100 tokens takes
/// 1.4 MB for Qwen-Image in f32.
const KEPT_EMBEDDING_BYTES: usize = 256 << 20;

/// The five configuration files of a checkpoint.
#[derive(Debug, Clone)]
pub struct CheckpointConfigs {
    pub model_index: ConfigText,
    pub scheduler: ConfigText,
    pub text_encoder: ConfigText,
    pub transformer: ConfigText,
    pub vae: ConfigText,
}

impl CheckpointConfigs {
    /// The sizes this checkpoint draws, known before its weights are loaded.
    pub fn image_sizes(&self) -> Result<ImageSizes, ConfigError> {
        check_model_index(&self.model_index)?;
        let transformer = TransformerConfig::from_json(&self.transformer)?;
        Ok(image_sizes(&transformer, &VaeConfig::from_json(&self.vae)?))
    }
}

fn image_sizes(transformer: &TransformerConfig, vae: &VaeConfig) -> ImageSizes {
    let multiple = vae.scale_factor() * PATCH;
    ImageSizes {
        multiple,
        max_side: ROPE_POSITIONS * multiple,
        default_side: transformer.sample_size * vae.scale_factor(),
    }
}

/// A checkpoint, read but not loaded.
#[derive(Debug, Clone)]
pub struct CheckpointParts {
    pub configs: CheckpointConfigs,
    pub text_encoder: Arc<dyn TensorSource>,
    pub transformer: Arc<dyn TensorSource>,
    pub vae: Arc<dyn TensorSource>,
}

/// What a run may be set to, apart from the request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PipelineSettings {
    pub precision: Precision,
    pub vae: VaeSettings,
}

/// Qwen-Image on one device of one backend.
#[derive(Debug)]
pub struct QwenImage<B: FusedOps> {
    text_encoder: TextEncoder<B>,
    transformer: Transformer<B>,
    vae: VaeDecoder<B>,
    scheduler: SchedulerConfig,
    settings: PipelineSettings,
    info: ModelInfo,
    /// Pixels per latent.
    scale_factor: usize,
    latent_channels: usize,
    device: B::Device,
    jobs: HashMap<JobId, RunningJob<B>>,
    /// By token ids.
    embeddings: Cache<Vec<u32>, Tensor<B, 2>>,
    /// By the bits of a schedule's timesteps.
    tables: Cache<Vec<u32>, Arc<ModulationTable<B>>>,
    packing: Option<Packing<B>>,
    /// Whether the device may have failed at what is kept.
    needs_reset: bool,
    /// Dropped last, as fields are dropped in their order.
    _memory: DeviceMemory<B>,
}

/// GPU backends keep the memory of what is gone for tensors to come; another backend could not
/// have it.
#[derive(Debug)]
struct DeviceMemory<B: FusedOps> {
    device: B::Device,
    /// Memory is kept by queue.
    stream: StreamId,
}

impl<B: FusedOps> Drop for DeviceMemory<B> {
    fn drop(&mut self) {
        let watch = FaultWatch::start();
        let clean_up = || {
            // Until then the device may be at work with it.
            B::sync(&self.device).ok();
            B::memory_cleanup(&self.device);
            // The watch sees this done.
            B::sync(&self.device).ok();
            Ok(())
        };
        // burn panics where a device is lost, and nobody wants to know any more.
        self.stream.executes(|| caught(&watch, clean_up).ok());
    }
}

/// What a step gives to one job.
#[derive(Debug)]
struct Advance<B: FusedOps> {
    id: JobId,
    latents: Tensor<B, 2>,
    velocity: Tensor<B, 2>,
    trace: Option<TraceTensor>,
}

/// A job between start and finish.
#[derive(Debug)]
struct RunningJob<B: FusedOps> {
    job: Job,
    schedule: Schedule,
    modulation: Arc<ModulationTable<B>>,
    steps_done: usize,
    /// `[images · tokens, channels]`, f32.
    latents: Tensor<B, 2>,
    /// What the last step predicted, as `latents`; `None` before the first.
    velocity: Option<Tensor<B, 2>>,
    /// Embeddings of one forward's segments: positive for every image, then negative.
    text: Tensor<B, 2>,
    /// Of one forward, with row 0.
    segments: Vec<Segment>,
    trace: Vec<TraceTensor>,
}

impl<B: FusedOps> QwenImage<B> {
    /// Loads the three networks onto a device, which has a name for people.
    pub fn load(
        parts: &CheckpointParts,
        device: B::Device,
        device_name: String,
        settings: PipelineSettings,
    ) -> Result<Self, LoadError> {
        let configs = &parts.configs;
        check_model_index(&configs.model_index)?;
        let scheduler = SchedulerConfig::from_json(&configs.scheduler)?;
        let text_config = TextEncoderConfig::from_json(&configs.text_encoder)?;
        let transformer_config = TransformerConfig::from_json(&configs.transformer)?;
        let vae_config = VaeConfig::from_json(&configs.vae)?;
        check_widths(configs, &text_config, &transformer_config, &vae_config)?;
        let scale_factor = vae_config.scale_factor();
        if let Some(tiling) = settings.vae.tiling {
            tiling
                .check(scale_factor)
                .map_err(|problem| ConfigError::Inconsistent {
                    file: configs.vae.file.clone(),
                    problem: problem.to_string(),
                })?;
        }

        let precision = settings.precision;
        let shapes = [
            text_config.kernel_shapes(),
            transformer_config.kernel_shapes(),
            vae_config.kernel_shapes(),
        ];
        B::check_kernels(&device, precision.activations, &shapes.concat());

        let text_encoder = TextEncoder::load(
            &text_config,
            Arc::clone(&parts.text_encoder),
            &device,
            precision,
        )?;
        let transformer = Transformer::load(
            &transformer_config,
            Arc::clone(&parts.transformer),
            &device,
            precision,
        )?;
        let vae = VaeDecoder::load(&vae_config, Arc::clone(&parts.vae), &device, precision)?;
        let info = ModelInfo {
            sizes: image_sizes(&transformer_config, &vae_config),
            vocab_size: text_config.vocab_size,
            device: device_name,
            dtype: match precision.model {
                DType::BF16 => "bf16",
                DType::F16 => "f16",
                _ => "f32",
            },
        };
        let memory = DeviceMemory {
            device: device.clone(),
            stream: StreamId::current(),
        };
        Ok(Self {
            text_encoder,
            transformer,
            vae,
            scheduler,
            settings,
            info,
            scale_factor,
            latent_channels: vae_config.z_dim,
            device,
            jobs: HashMap::new(),
            embeddings: Cache::new(KEPT_EMBEDDING_BYTES),
            tables: Cache::new(KEPT_TABLE_BYTES),
            packing: None,
            needs_reset: false,
            _memory: memory,
        })
    }

    fn check(&self, job: &Job) -> Result<(), PipelineError> {
        let ImageSizes {
            multiple,
            max_side: max,
            ..
        } = self.info.sizes;
        let vocab_size = self.info.vocab_size;
        let (height, width) = (job.height, job.width);
        let fits = |side: usize| side.is_multiple_of(multiple) && (multiple..=max).contains(&side);
        if !fits(height) || !fits(width) {
            return Err(PipelineError::Size {
                height,
                width,
                multiple,
                max,
            });
        }
        if job.num_inference_steps == 0 || job.num_images == 0 {
            return Err(PipelineError::NothingToDo);
        }
        for prompt in [Some(&job.prompt), job.negative_prompt.as_ref()]
            .into_iter()
            .flatten()
        {
            if prompt.len() <= TEMPLATE_TOKENS_DROPPED {
                let (tokens, dropped) = (prompt.len(), TEMPLATE_TOKENS_DROPPED);
                return Err(PipelineError::PromptTooShort { tokens, dropped });
            }
            if let Some(&id) = prompt.iter().find(|&&id| id as usize >= vocab_size) {
                return Err(PipelineError::TokenOutOfRange { id, vocab_size });
            }
        }
        Ok(())
    }

    /// Embeddings of the prompt and, with guidance, of the negative prompt. Each is encoded by
    /// itself, so that they do not depend on which of them are kept.
    fn encode(&mut self, job: &Job) -> Vec<Tensor<B, 2>> {
        let negative = job.negative_prompt.as_ref().filter(|_| job.uses_cfg());
        let text_encoder = &self.text_encoder;
        std::iter::once(&job.prompt)
            .chain(negative)
            .map(|prompt| {
                let bytes = |hidden: &Tensor<B, 2>| {
                    // The template's rows may be kept alive too.
                    prompt.len() * hidden.dims()[1] * hidden.dtype().size()
                };
                let make = || {
                    let hidden = text_encoder.forward(&[prompt]).remove(0);
                    let kept = (prompt.len() - TEMPLATE_TOKENS_DROPPED).min(MAX_PROMPT_TOKENS);
                    hidden.narrow(0, TEMPLATE_TOKENS_DROPPED, kept)
                };
                self.embeddings.get_or_make(prompt, make, bytes)
            })
            .collect()
    }

    /// Packed noise `[images · tokens, channels]`, and the same values in the order they were
    /// drawn, `[images, 1, z, h, w]`.
    fn noise(&self, job: &Job) -> (Tensor<B, 2>, Vec<f32>) {
        let [height, width] = self.latent_size(job);
        let channels = self.latent_channels;
        let count = job.num_images * channels * height * width;
        let mut values = randn(job.noise_generator, job.seed, count);
        for value in &mut values {
            *value = round_to(*value, self.settings.precision.model);
        }
        let shape = [
            job.num_images,
            channels,
            height / PATCH,
            PATCH,
            width / PATCH,
            PATCH,
        ];
        let drawn = Tensor::<B, 6>::from_data(
            TensorData::new(values.clone(), shape),
            (&self.device, DType::F32),
        );
        let tokens = height * width / (PATCH * PATCH);
        let packed = drawn
            .permute([0, 2, 4, 1, 3, 5])
            .reshape([job.num_images * tokens, channels * PATCH * PATCH]);
        (packed, values)
    }

    /// Height and width in latents.
    fn latent_size(&self, job: &Job) -> [usize; 2] {
        [
            job.height / self.scale_factor,
            job.width / self.scale_factor,
        ]
    }

    /// From `[images · tokens, channels]` to `[images, z, h, w]`.
    fn unpack(&self, job: &Job, latents: Tensor<B, 2>) -> Tensor<B, 4> {
        let [height, width] = self.latent_size(job);
        let channels = self.latent_channels;
        let images = latents.dims()[0] * PATCH * PATCH / (height * width);
        latents
            .reshape([
                images,
                height / PATCH,
                width / PATCH,
                channels,
                PATCH,
                PATCH,
            ])
            .permute([0, 3, 1, 4, 2, 5])
            .reshape([images, channels, height, width])
    }

    /// The modulation of a schedule.
    fn modulation(&mut self, timesteps: &[f32]) -> Arc<ModulationTable<B>> {
        let key = timesteps.iter().map(|t| t.to_bits()).collect();
        let make = || Arc::new(self.transformer.modulation_table(timesteps));
        self.tables.get_or_make(&key, make, |table| table.bytes())
    }

    /// Latents `[images, z, h, w]` as the denoiser has them, to pictures.
    ///
    /// Returns f32 values from 0 to 1, `[images, h, w, 3]`.
    fn decode(&self, latents: Tensor<B, 4>, settings: VaeSettings) -> Tensor<B, 4> {
        let decoded = self.vae.decode(self.vae.denormalise(latents), settings);
        (decoded * 0.5 + 0.5).clamp(0.0, 1.0).permute([0, 2, 3, 1])
    }

    /// Does some work and waits for it: see [`reliably`]. What is kept is in doubt if it fails.
    fn reliably<T>(
        &mut self,
        mut work: impl FnMut(&mut Self, usize) -> Result<T, PipelineError>,
    ) -> Result<T, PipelineError> {
        let device = self.device.clone();
        let done = reliably::<B, T>(&device, |run| work(self, run));
        done.map_err(|error| match error {
            PipelineError::Device(report) => {
                self.needs_reset = true;
                PipelineError::Device(format!("{}: {report}", self.info.device))
            }
            other => other,
        })
    }

    /// Lets go of what can be made again; there is memory for other things then.
    fn drop_caches(&mut self) {
        self.embeddings.clear();
        self.tables.clear();
        self.packing = None;
        B::memory_cleanup(&self.device);
    }

    /// Everything before the first step.
    fn prepare(&mut self, job: &Job) -> Result<RunningJob<B>, PipelineError> {
        let [height, width] = self.latent_size(job).map(|side| side / PATCH);
        let schedule = self
            .scheduler
            .schedule(job.num_inference_steps, height * width);
        let modulation = self.modulation(&schedule.model_timesteps(self.settings.precision.model));
        let prompts = self.encode(job);
        let (latents, drawn) = self.noise(job);

        let mut trace = Vec::new();
        if job.record {
            for (name, embeds) in ["prompt_embeds", "negative_prompt_embeds"]
                .iter()
                .zip(&prompts)
            {
                let [tokens, dim] = embeds.dims();
                trace.push(record(name, vec![1, tokens, dim], embeds.clone())?);
            }
            let [h, w] = self.latent_size(job);
            trace.push(TraceTensor {
                name: "initial_noise".to_owned(),
                shape: vec![job.num_images, 1, self.latent_channels, h, w],
                values: drawn,
            });
        }

        let segment = |prompt: &Tensor<B, 2>| Segment {
            height,
            width,
            text_tokens: prompt.dims()[0],
            row: 0,
        };
        let each_image = |prompt| std::iter::repeat_n(prompt, job.num_images);
        let segments = prompts.iter().flat_map(each_image).map(segment).collect();
        let text = Tensor::cat(prompts.iter().flat_map(each_image).cloned().collect(), 0);
        Ok(RunningJob {
            job: job.clone(),
            schedule,
            modulation,
            steps_done: 0,
            latents,
            velocity: None,
            text,
            segments,
            trace,
        })
    }

    /// What one step gives to those of these jobs that have steps left; `None` if no job has.
    #[expect(clippy::type_complexity, reason = "of one caller")]
    fn predict(
        &self,
        ids: &[JobId],
    ) -> Result<Option<(Packing<B>, Vec<Advance<B>>)>, PipelineError> {
        let mut jobs = Vec::with_capacity(ids.len());
        for &id in ids {
            let running = self.running(id)?;
            if running.steps_done < running.schedule.steps() {
                jobs.push((id, running));
            }
        }
        if jobs.is_empty() {
            return Ok(None);
        }
        let segments: Vec<Segment> = jobs
            .iter()
            .enumerate()
            .flat_map(|(row, (_, running))| {
                running
                    .segments
                    .iter()
                    .map(move |segment| Segment { row, ..*segment })
            })
            .collect();
        let packing = match &self.packing {
            Some(packing) if packing.segments() == segments => packing.clone(),
            _ => self.transformer.pack(&segments),
        };
        let modulation = jobs
            .iter()
            .map(|(_, running)| running.modulation.step(running.steps_done));
        let modulation = StepModulation::cat(modulation.collect());
        let activations = self.settings.precision.activations;
        let image = jobs.iter().flat_map(|(_, running)| {
            let forwards = if running.job.uses_cfg() { 2 } else { 1 };
            std::iter::repeat_n(running.latents.clone().cast(activations), forwards)
        });
        let image = Tensor::cat(image.collect(), 0);
        let text = Tensor::cat(
            jobs.iter()
                .map(|(_, running)| running.text.clone())
                .collect(),
            0,
        );
        let predicted = self.transformer.forward(image, text, &modulation, &packing);
        let advances = advance(&jobs, predicted.cast(DType::F32))?;
        Ok(Some((packing, advances)))
    }

    fn draw_preview(&self, id: JobId) -> Result<RgbImage, PipelineError> {
        let running = self.running(id)?;
        let velocity = running.velocity.clone();
        let velocity = velocity.ok_or(PipelineError::NothingToShow(id))?;
        // The noise that is left, if every later step predicted the same.
        let sigma = running.schedule.sigmas[running.steps_done];
        let first_image = |all: Tensor<B, 2>| {
            let tokens = all.dims()[0] / running.job.num_images;
            all.narrow(0, 0, tokens)
        };
        let clean = first_image(running.latents.clone()) - first_image(velocity) * sigma;
        let clean = self.unpack(&running.job, clean);
        let size = preview_size(
            self.latent_size(&running.job),
            MAX_PREVIEW_SIDE / self.scale_factor,
        );
        let pixels = self.decode(adaptive_avg_pool2d(clean, size), VaeSettings::default());
        let [_, height, width, _] = pixels.dims();
        Ok(RgbImage::rounded(height, width, &read(pixels)?))
    }

    fn running(&self, id: JobId) -> Result<&RunningJob<B>, PipelineError> {
        self.jobs.get(&id).ok_or(PipelineError::UnknownJob(id))
    }
}

impl<B: FusedOps> Pipeline for QwenImage<B>
where
    B::Device: Send,
{
    fn info(&self) -> &ModelInfo {
        &self.info
    }

    fn start(&mut self, id: JobId, job: Job) -> Result<(), PipelineError> {
        self.check(&job)?;
        // True until it is done, as it may end in a panic.
        let needed_reset = std::mem::replace(&mut self.needs_reset, true);
        let running = self.reliably(|pipeline, run| {
            if needed_reset || run > 0 {
                pipeline.drop_caches();
            }
            pipeline.prepare(&job)
        })?;
        self.needs_reset = false;
        self.jobs.insert(id, running);
        Ok(())
    }

    fn step(&mut self, ids: &[JobId]) -> Result<Vec<usize>, PipelineError> {
        let predicted = self.reliably(|pipeline, _| pipeline.predict(ids))?;
        if let Some((packing, advances)) = predicted {
            self.packing = Some(packing);
            for advance in advances {
                let id = advance.id;
                let running = self
                    .jobs
                    .get_mut(&id)
                    .ok_or(PipelineError::UnknownJob(id))?;
                running.latents = advance.latents;
                running.velocity = Some(advance.velocity);
                running.steps_done += 1;
                running.trace.extend(advance.trace);
            }
        }
        ids.iter()
            .map(|&id| {
                self.running(id)
                    .map(|running| running.schedule.steps() - running.steps_done)
            })
            .collect()
    }

    fn preview(&mut self, id: JobId) -> Result<RgbImage, PipelineError> {
        self.reliably(|pipeline, _| pipeline.draw_preview(id))
    }

    fn finish(&mut self, id: JobId) -> Result<Output, PipelineError> {
        let running = self.running(id)?;
        if running.steps_done < running.schedule.steps() {
            return Err(PipelineError::Unfinished(id));
        }
        let RunningJob {
            job,
            latents,
            mut trace,
            ..
        } = self.jobs.remove(&id).ok_or(PipelineError::UnknownJob(id))?;
        let (shape, values) = self.reliably(|pipeline, _| {
            let latents = pipeline.unpack(&job, latents.clone());
            let pixels = pipeline.decode(latents, pipeline.settings.vae);
            Ok((pixels.dims(), read(pixels)?))
        })?;
        let images = values
            .chunks_exact(job.height * job.width * 3)
            .map(|image| RgbImage::rounded(job.height, job.width, image))
            .collect();
        if job.record {
            trace.push(TraceTensor {
                name: "image_float".to_owned(),
                shape: shape.to_vec(),
                values,
            });
        }
        Ok(Output { images, trace })
    }

    fn discard(&mut self, id: JobId) {
        if self.jobs.remove(&id).is_some() {
            // burn may panic at tensors of a job that failed.
            idle::<B>(&self.device).ok();
        }
    }

    fn probe(&mut self) -> Result<(), PipelineError> {
        self.reliably(|pipeline, _| {
            let ones = Tensor::<B, 1>::ones([2], (&pipeline.device, DType::F32));
            read(ones.clone() + ones).map(|_| ())
        })
    }

    fn memory(&self) -> MemoryUse {
        // A device that failed has nothing to tell; what failed says so by itself.
        let watch = FaultWatch::start();
        let memory = caught(&watch, || Ok(B::memory_use(&self.device)));
        memory.unwrap_or_default()
    }

    fn caches(&self) -> CacheUses {
        CacheUses {
            embeddings: self.embeddings.counts(),
            modulation: self.tables.counts(),
        }
    }
}

/// Guidance and the Euler step, for each job's share of a prediction.
fn advance<B: FusedOps>(
    jobs: &[(JobId, &RunningJob<B>)],
    predicted: Tensor<B, 2>,
) -> Result<Vec<Advance<B>>, PipelineError> {
    let mut first = 0;
    let mut advances = Vec::with_capacity(jobs.len());
    for &(id, running) in jobs {
        let step = running.steps_done;
        let tokens = running.latents.dims()[0];
        let positive = predicted.clone().narrow(0, first, tokens);
        first += tokens;
        let velocity = if running.job.uses_cfg() {
            let negative = predicted.clone().narrow(0, first, tokens);
            first += tokens;
            true_cfg(positive, negative, running.job.true_cfg_scale)
        } else {
            positive
        };
        let sigmas = &running.schedule.sigmas;
        let delta = sigmas[step + 1] - sigmas[step];
        let latents = running.latents.clone() + velocity.clone() * delta;
        let trace = if running.job.record {
            let [rows, channels] = latents.dims();
            let images = running.job.num_images;
            let shape = vec![images, rows / images, channels];
            let name = format!("latents_step{step}");
            Some(record(&name, shape, latents.clone())?)
        } else {
            None
        };
        advances.push(Advance {
            id,
            latents,
            velocity,
            trace,
        });
    }
    Ok(advances)
}

fn record<B: FusedOps, const D: usize>(
    name: &str,
    shape: Vec<usize>,
    tensor: Tensor<B, D>,
) -> Result<TraceTensor, PipelineError> {
    Ok(TraceTensor {
        name: name.to_owned(),
        shape,
        values: read(tensor.cast(DType::F32))?,
    })
}

/// Reads f32 values back from the device; memory that ran out shows here.
fn read<B: FusedOps, const D: usize>(tensor: Tensor<B, D>) -> Result<Vec<f32>, PipelineError> {
    let data = tensor
        .try_into_data()
        .map_err(|error| PipelineError::Device(summary(&error.to_string())))?;
    data.into_vec::<f32>()
        .map_err(|error| PipelineError::Device(summary(&format!("{error:?}"))))
}

/// Height and width of a preview in latents: those of the image, shrunk to `max` if they are larger.
fn preview_size(size: [usize; 2], max: usize) -> [usize; 2] {
    let longest = size[0].max(size[1]);
    if longest <= max {
        return size;
    }
    size.map(|side| (side * max / longest).max(1))
}

/// Refuses pipelines other than Qwen-Image's text-to-image.
fn check_model_index(config: &ConfigText) -> Result<(), ConfigError> {
    ConfigReader::parse(config)?.require_class("QwenImagePipeline")
}

/// The networks must fit each other.
fn check_widths(
    configs: &CheckpointConfigs,
    text: &TextEncoderConfig,
    transformer: &TransformerConfig,
    vae: &VaeConfig,
) -> Result<(), ConfigError> {
    let problem = if text.hidden_size != transformer.joint_attention_dim {
        format!(
            "`joint_attention_dim` is {}, the text encoder's `hidden_size` is {}",
            transformer.joint_attention_dim, text.hidden_size
        )
    } else if transformer.in_channels != vae.z_dim * PATCH * PATCH {
        format!(
            "`in_channels` is {}, the VAE's `z_dim` {} makes it {}",
            transformer.in_channels,
            vae.z_dim,
            vae.z_dim * PATCH * PATCH
        )
    } else {
        return Ok(());
    };
    Err(ConfigError::Inconsistent {
        file: configs.transformer.file.clone(),
        problem,
    })
}
