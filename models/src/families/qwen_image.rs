//! Qwen-Image text-to-image: its template, its networks around the transformer, and its packing of
//! latents. The formulas are those of diffusers' `pipeline_qwenimage.py`.

use std::collections::HashMap;
use std::sync::Arc;

use burn::tensor::{DType, Tensor, TensorData};
use kiln_ops::FusedOps;

use crate::adapter::{AdapterTarget, AdapterUse};
use crate::config::ConfigError;
use crate::flops::CostModel;
use crate::job::{Conditioning, Job, Size};
use crate::memory::MemoryModel;
use crate::noise::randn;
use crate::pipeline::{ImageSizes, PipelineError};
use crate::sampling::{Schedule, SchedulerConfig, round_to};
use crate::session::SessionSettings;
use crate::step_cache::QWEN_IMAGE_RATIOS;
use crate::text_encoder::{TextEncoder, TextEncoderConfig};
use crate::transformer::{Segment, Transformer, TransformerConfig};
use crate::vae::{VaeConfig, VaeDecoder, VaeSettings};
use crate::weights::LoadError;

use super::{CheckpointConfigs, CheckpointParts, PromptTemplate};

/// `prompt_template_encode` of the reference, which drops as many embeddings as the prefix has
/// tokens in Qwen's vocabulary; the number stays the same with any other vocabulary. The longest
/// prompt is the reference's `tokenizer_max_length`, where the reference cuts and kiln refuses.
pub const TEMPLATE: PromptTemplate = PromptTemplate {
    prefix: "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, \
             quantity, text, spatial relationships of the objects and background:<|im_end|>\n\
             <|im_start|>user\n",
    suffix: "<|im_end|>\n<|im_start|>assistant\n",
    special_tokens: &["<|im_start|>", "<|im_end|>"],
    dropped_tokens: 34,
    max_prompt_tokens: 1024,
};

/// Latents per packed token, in height and in width.
pub(crate) const PATCH: usize = 2;

/// Entries of the reference's table of rotary positions, which bounds an image's sides.
const ROPE_POSITIONS: usize = 4096;

/// The sizes that a checkpoint with these configurations generates.
pub(super) fn image_sizes(configs: &CheckpointConfigs) -> Result<ImageSizes, ConfigError> {
    let transformer = TransformerConfig::from_json(&configs.transformer)?;
    Ok(sizes(&transformer, &VaeConfig::from_json(&configs.vae)?))
}

fn sizes(transformer: &TransformerConfig, vae: &VaeConfig) -> ImageSizes {
    let multiple = vae.scale_factor() * PATCH;
    ImageSizes {
        multiple,
        max_side: ROPE_POSITIONS * multiple,
        default_side: transformer.sample_size * vae.scale_factor(),
    }
}

/// Number of the transformer's blocks.
pub(super) fn blocks(configs: &CheckpointConfigs) -> Result<usize, ConfigError> {
    Ok(TransformerConfig::from_json(&configs.transformer)?.num_layers)
}

/// The linear layers of the transformer that an adapter can change.
pub(super) fn adapter_targets(
    configs: &CheckpointConfigs,
) -> Result<Vec<AdapterTarget>, ConfigError> {
    Ok(TransformerConfig::from_json(&configs.transformer)?.adapter_targets())
}

/// The published ratios of Qwen-Image, for a transformer of its shape: 60 blocks of 24 heads of 128.
pub(super) fn mag_ratios(configs: &CheckpointConfigs) -> Result<Option<Arc<[f64]>>, ConfigError> {
    let transformer = TransformerConfig::from_json(&configs.transformer)?;
    let shape = (
        transformer.num_layers,
        transformer.num_attention_heads,
        transformer.attention_head_dim,
    );
    Ok((shape == (60, 24, 128)).then(|| QWEN_IMAGE_RATIOS.into()))
}

/// Counts the work of jobs for a checkpoint with these configurations.
pub(super) fn cost_model(
    configs: &CheckpointConfigs,
    settings: VaeSettings,
) -> Result<CostModel, ConfigError> {
    Ok(CostModel::of_networks(
        TextEncoderConfig::from_json(&configs.text_encoder)?,
        TransformerConfig::from_json(&configs.transformer)?,
        VaeConfig::from_json(&configs.vae)?,
        settings,
    ))
}

/// Qwen-Image without its transformer, which the denoiser holds.
#[derive(Debug)]
pub struct QwenImage<B: FusedOps> {
    text_encoder: TextEncoder<B>,
    vae: VaeDecoder<B>,
    scheduler: SchedulerConfig,
    pub(crate) sizes: ImageSizes,
    pub(crate) vocab_size: usize,
    pub(crate) cost_model: CostModel,
    pub(crate) memory_model: MemoryModel,
    /// Pixels per latent, in height and in width.
    pub(crate) scale_factor: usize,
    latent_channels: usize,
    /// `[out, in]` of the linear layers that adapters can change, by path.
    targets: HashMap<String, [usize; 2]>,
}

impl<B: FusedOps> QwenImage<B> {
    /// Loads the three networks.
    ///
    /// # Errors
    ///
    /// If a configuration is not supported, or a tensor is missing or has another shape.
    pub(crate) fn load(
        parts: &CheckpointParts,
        settings: &SessionSettings<B>,
    ) -> Result<(Self, Transformer<B>), LoadError> {
        let configs = &parts.configs;
        let scheduler = SchedulerConfig::from_json(&configs.scheduler)?;
        let text_config = TextEncoderConfig::from_json(&configs.text_encoder)?;
        let transformer_config = TransformerConfig::from_json(&configs.transformer)?;
        let vae_config = VaeConfig::from_json(&configs.vae)?;
        check_widths(configs, &text_config, &transformer_config, &vae_config)?;
        let scale_factor = vae_config.scale_factor();
        let tiling = settings.vae.tiling;
        let tiling = tiling.unwrap_or(settings.vae.automatic_tiling);
        tiling
            .check(scale_factor)
            .map_err(|problem| ConfigError::Inconsistent {
                file: configs.vae.file.clone(),
                problem: problem.to_string(),
            })?;

        let (device, precision) = (&settings.device, settings.precision);
        let shapes = [
            text_config.kernel_shapes(),
            transformer_config.kernel_shapes(),
            vae_config.kernel_shapes(),
        ];
        B::check_kernels(device, precision.activations, &shapes.concat());

        let text_encoder = TextEncoder::load(
            &text_config,
            Arc::clone(&parts.text_encoder),
            device,
            precision,
        )?;
        let transformer = Transformer::load(
            &transformer_config,
            Arc::clone(&parts.transformer),
            device,
            precision,
        )?;
        let vae = VaeDecoder::load(&vae_config, Arc::clone(&parts.vae), device, precision)?;
        let family = Self {
            text_encoder,
            vae,
            scheduler,
            sizes: sizes(&transformer_config, &vae_config),
            vocab_size: text_config.vocab_size,
            scale_factor,
            latent_channels: vae_config.z_dim,
            targets: transformer_config
                .adapter_targets()
                .into_iter()
                .map(|target| (target.path, [target.d_out, target.d_in]))
                .collect(),
            memory_model: MemoryModel::of_networks(
                text_config.clone(),
                transformer_config.clone(),
                vae_config.clone(),
                settings.vae,
                precision,
            ),
            cost_model: CostModel::of_networks(
                text_config,
                transformer_config,
                vae_config,
                settings.vae,
            ),
        };
        Ok((family, transformer))
    }

    /// Refuses a job that this model cannot run.
    pub(crate) fn check(&self, job: &Job) -> Result<(), PipelineError> {
        if !self.sizes.contain(job.size) {
            return Err(PipelineError::Size {
                size: job.size,
                multiple: self.sizes.multiple,
                max: self.sizes.max_side,
            });
        }
        if job.sampling.steps == 0 || job.num_images == 0 {
            return Err(PipelineError::NothingToDo);
        }
        job.branches()
            .try_for_each(|branch| self.check_prompt(branch))?;
        self.check_adapters(&job.adapters)
    }

    /// Refuses adapters that change layers which the transformer does not have, or of another shape.
    pub(crate) fn check_adapters(&self, adapters: &[AdapterUse]) -> Result<(), PipelineError> {
        for AdapterUse { adapter, .. } in adapters {
            for (path, change) in adapter.changes() {
                let shape = change.factors.shape();
                let expected = self.targets.get(path).copied();
                if expected != Some(shape) {
                    return Err(PipelineError::Adapter {
                        adapter: adapter.name().to_owned(),
                        module: path.clone(),
                        shape,
                        expected,
                    });
                }
            }
        }
        Ok(())
    }

    pub(crate) fn check_prompt(&self, prompt: &Conditioning) -> Result<(), PipelineError> {
        let tokens = &prompt.tokens;
        if tokens.len() <= TEMPLATE.dropped_tokens {
            return Err(PipelineError::PromptTooShort {
                tokens: tokens.len(),
                dropped: TEMPLATE.dropped_tokens,
            });
        }
        let vocab_size = self.vocab_size;
        match tokens.iter().find(|&&id| id as usize >= vocab_size) {
            Some(&id) => Err(PipelineError::TokenOutOfRange { id, vocab_size }),
            None => Ok(()),
        }
    }

    /// Embeddings of prompts, without the template's prefix: `[tokens, dim]` each. The prompts share
    /// one forward pass.
    pub(crate) fn encode(&self, prompts: &[&Conditioning]) -> Vec<Tensor<B, 2>> {
        let tokens: Vec<&[u32]> = prompts.iter().map(|it| it.tokens.as_slice()).collect();
        let hidden = self.text_encoder.forward(&tokens).into_iter();
        let kept = |(hidden, tokens): (Tensor<B, 2>, &[u32])| {
            let kept = (tokens.len() - TEMPLATE.dropped_tokens).min(TEMPLATE.max_prompt_tokens);
            hidden.narrow(0, TEMPLATE.dropped_tokens, kept)
        };
        hidden.zip(tokens).map(kept).collect()
    }

    /// The noise levels of a job's steps.
    pub(crate) fn schedule(&self, job: &Job) -> Schedule {
        let [height, width] = self.grid(job.size);
        self.scheduler.schedule(&job.sampling, height * width)
    }

    /// One image of a job and one prompt's embeddings as a sequence of the transformer.
    pub(crate) fn segment(&self, job: &Job, embeddings: &Tensor<B, 2>) -> Segment {
        let [height, width] = self.grid(job.size);
        Segment {
            height,
            width,
            text_tokens: embeddings.dims()[0],
            row: 0,
        }
    }

    /// Starting noise of a job, rounded to the model's type.
    ///
    /// # Shapes
    /// - tensor: packed latents `[images · tokens, channels]`, f32
    /// - values: the same in the order they were generated, `[images, 1, z, h, w]`
    pub(crate) fn noise(
        &self,
        job: &Job,
        settings: &SessionSettings<B>,
    ) -> (Tensor<B, 2>, Vec<f32>) {
        let [height, width] = self.latent_size(job.size);
        let channels = self.latent_channels;
        let count = job.num_images * channels * height * width;
        let mut values = randn(job.noise.generator, job.noise.seed, count);
        for value in &mut values {
            *value = round_to(*value, settings.precision.model);
        }
        let shape = [
            job.num_images,
            channels,
            height / PATCH,
            PATCH,
            width / PATCH,
            PATCH,
        ];
        let unpacked = Tensor::<B, 6>::from_data(
            TensorData::new(values.clone(), shape),
            (&settings.device, DType::F32),
        );
        let tokens = height * width / (PATCH * PATCH);
        let packed = unpacked
            .permute([0, 2, 4, 1, 3, 5])
            .reshape([job.num_images * tokens, channels * PATCH * PATCH]);
        (packed, values)
    }

    /// Height and width in latents.
    pub(crate) fn latent_size(&self, size: Size) -> [usize; 2] {
        [
            size.height / self.scale_factor,
            size.width / self.scale_factor,
        ]
    }

    /// Shape of a job's latents before they are packed: `[images, 1, z, h, w]`.
    pub(crate) fn latent_shape(&self, job: &Job) -> Vec<usize> {
        let [height, width] = self.latent_size(job.size);
        vec![job.num_images, 1, self.latent_channels, height, width]
    }

    /// Rows and columns of packed tokens.
    fn grid(&self, size: Size) -> [usize; 2] {
        self.latent_size(size).map(|side| side / PATCH)
    }

    /// Unpacks latents.
    ///
    /// # Shapes
    /// - latents: `[images · tokens, channels]`
    /// - output: `[images, z, h, w]`
    pub(crate) fn unpack(&self, size: Size, latents: Tensor<B, 2>) -> Tensor<B, 4> {
        let [height, width] = self.latent_size(size);
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

    /// Decodes latents to pixels.
    ///
    /// # Shapes
    /// - latents: `[images, z, h, w]`, normalised as the transformer has them
    /// - output: `[images, h, w, 3]`, f32 nominally from 0 to 1, not clamped
    pub(crate) fn decode(&self, latents: Tensor<B, 4>, settings: VaeSettings) -> Tensor<B, 4> {
        let decoded = self.vae.decode(self.vae.denormalise(latents), settings);
        (decoded * 0.5 + 0.5).permute([0, 2, 3, 1])
    }
}

/// Checks that the three networks fit each other.
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
