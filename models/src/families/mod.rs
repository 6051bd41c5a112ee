//! Model families. A family is what the pipelines of diffusers differ in: configurations, prompt
//! template, packing of latents. [`open`] chooses it by the class that `model_index.json` names;
//! [`Family::named`] is the only list of classes.

pub mod qwen_image;

use std::sync::Arc;

use kiln_ops::FusedOps;

use crate::adapter::AdapterTarget;
use crate::config::{ConfigError, ConfigReader, ConfigText};
use crate::denoiser::{Denoiser, Lane, LaneSettings};
use crate::device::summary;
use crate::flops::CostModel;
use crate::pipeline::{ImageSizes, Pipeline};
use crate::sampling::SchedulerConfig;
use crate::session::{ImagePipeline, SessionSettings};
use crate::source::{TensorSource, WeightFiles};
use crate::transformer::{Transformer, TransformerConfig};
use crate::vae::VaeSettings;
use crate::weights::{LoadError, Precision};

use self::qwen_image::QwenImage;

/// The configuration files of a checkpoint in diffusers' layout.
#[derive(Debug, Clone)]
pub struct CheckpointConfigs {
    pub model_index: ConfigText,
    pub scheduler: ConfigText,
    pub text_encoder: ConfigText,
    pub transformer: ConfigText,
    pub vae: ConfigText,
}

/// A checkpoint whose configurations are read and whose weights are not loaded.
#[derive(Debug, Clone)]
pub struct CheckpointParts {
    pub configs: CheckpointConfigs,
    pub text_encoder: Arc<dyn TensorSource>,
    pub transformer: Arc<dyn TensorSource>,
    pub vae: Arc<dyn TensorSource>,
}

/// The text around a prompt, and what the text encoder's output keeps of it.
#[derive(Debug, PartialEq, Eq)]
pub struct PromptTemplate {
    /// Text before the prompt.
    pub prefix: &'static str,
    /// Text after the prompt.
    pub suffix: &'static str,
    /// Special tokens in the two texts. A tokenizer without one of them belongs to another model.
    pub special_tokens: &'static [&'static str],
    /// Number of embeddings that are dropped from the front of every encoded prompt.
    pub dropped_tokens: usize,
    /// Largest number of tokens of a prompt, the template's not counted.
    pub max_prompt_tokens: usize,
}

/// A family of models, named by the class of its pipeline in diffusers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// `QwenImagePipeline`: text-to-image. The pipelines for image-to-image and inpainting have the
    /// same components and weights.
    QwenImage,
}

impl Family {
    const CLASSES: [(&'static str, Self); 3] = [
        ("QwenImagePipeline", Self::QwenImage),
        ("QwenImageImg2ImgPipeline", Self::QwenImage),
        ("QwenImageInpaintPipeline", Self::QwenImage),
    ];

    /// Finds the family of a `model_index.json`.
    ///
    /// # Errors
    ///
    /// If the file is not a JSON object or names a class that kiln does not implement.
    pub fn named(model_index: &ConfigText) -> Result<Self, ConfigError> {
        let reader = ConfigReader::parse(model_index)?;
        let class = reader.require_class_of(&Self::CLASSES.map(|(class, _)| class))?;
        Ok(Self::CLASSES[class].1)
    }

    pub fn template(self) -> &'static PromptTemplate {
        match self {
            Self::QwenImage => &qwen_image::TEMPLATE,
        }
    }
}

impl CheckpointConfigs {
    /// # Errors
    ///
    /// See [`Family::named`].
    pub fn family(&self) -> Result<Family, ConfigError> {
        Family::named(&self.model_index)
    }

    /// The sizes that the checkpoint generates, known before its weights are loaded.
    ///
    /// # Errors
    ///
    /// If a configuration cannot be read.
    pub fn image_sizes(&self) -> Result<ImageSizes, ConfigError> {
        match self.family()? {
            Family::QwenImage => qwen_image::image_sizes(self),
        }
    }

    /// Number of the transformer's blocks.
    ///
    /// # Errors
    ///
    /// If a configuration cannot be read.
    pub fn blocks(&self) -> Result<usize, ConfigError> {
        match self.family()? {
            Family::QwenImage => qwen_image::blocks(self),
        }
    }

    /// The linear layers of the transformer that an adapter can change.
    ///
    /// # Errors
    ///
    /// If a configuration cannot be read.
    pub fn adapter_targets(&self) -> Result<Vec<AdapterTarget>, ConfigError> {
        match self.family()? {
            Family::QwenImage => qwen_image::adapter_targets(self),
        }
    }

    /// The noise levels of the model's own schedule.
    ///
    /// # Errors
    ///
    /// If the configuration cannot be read.
    pub fn noise_schedule(&self) -> Result<SchedulerConfig, ConfigError> {
        SchedulerConfig::from_json(&self.scheduler)
    }

    /// MagCache's ratios of a transformer of this shape; `None` if they have not been measured.
    ///
    /// # Errors
    ///
    /// If a configuration cannot be read.
    pub fn mag_ratios(&self) -> Result<Option<Arc<[f64]>>, ConfigError> {
        match self.family()? {
            Family::QwenImage => qwen_image::mag_ratios(self),
        }
    }

    /// Counts the work of jobs whose images are decoded with these settings.
    ///
    /// # Errors
    ///
    /// If a configuration cannot be read.
    pub fn cost_model(&self, settings: VaeSettings) -> Result<CostModel, ConfigError> {
        match self.family()? {
            Family::QwenImage => qwen_image::cost_model(self, settings),
        }
    }
}

/// Loads the networks of a checkpoint onto a device.
///
/// # Errors
///
/// If the family is unknown, a configuration is not supported, or a tensor is missing or has
/// another shape.
pub fn open<B: FusedOps>(
    parts: &CheckpointParts,
    settings: SessionSettings<B>,
) -> Result<Box<dyn Pipeline>, LoadError>
where
    B::Device: Send,
{
    match parts.configs.family()? {
        Family::QwenImage => {
            let (family, transformer) = QwenImage::<B>::load(parts, &settings)?;
            let CheckpointParts {
                text_encoder,
                transformer: deferred,
                vae,
                ..
            } = parts;
            let sources = [text_encoder, deferred, vae];
            sources.iter().try_for_each(|source| source.check_files())?;
            let in_place = if B::IS_IN_PLACE { &sources[..] } else { &[] };
            let files = WeightFiles::new(deferred, in_place);
            let denoiser = denoiser(transformer, parts, &settings)?;
            Ok(Box::new(ImagePipeline::new(
                family, denoiser, settings, files,
            )))
        }
    }
}

/// A denoiser on all devices of a session. A device that appears twice shares one set of weights.
fn denoiser<B: FusedOps>(
    transformer: Transformer<B>,
    parts: &CheckpointParts,
    settings: &SessionSettings<B>,
) -> Result<Denoiser<B>, LoadError> {
    let lane_settings = LaneSettings {
        precision: settings.precision,
        adapter_cache_bytes: settings.adapter_cache_bytes,
        before_forward: settings.before_forward.clone(),
    };
    let mut labels = settings
        .devices
        .iter()
        .map(|it| it.info.label(settings.backend));
    let first = Lane::new(
        (0, settings.devices.len()),
        transformer,
        settings.device.clone(),
        labels.next().unwrap_or_default(),
        lane_settings.clone(),
    );
    let mut denoiser = Denoiser::new(first);
    denoiser.set_split_guidance(settings.split_guidance != Some(false));
    let place = |index| (index, settings.devices.len());
    for (index, (other, label)) in settings.devices.iter().skip(1).zip(labels).enumerate() {
        let (device, place) = (other.device.clone(), place(index + 1));
        let shared = denoiser.transformer_on(&device);
        let config = TransformerConfig::from_json(&parts.configs.transformer)?;
        let source = Arc::clone(&parts.transformer);
        let settings = lane_settings.clone();
        denoiser.add(label.clone(), move || {
            let transformer = match shared {
                Some(transformer) => transformer,
                None => load_transformer(&config, source, &device, settings.precision, &label)?,
            };
            let lane = Lane::new(place, transformer, device, label, settings);
            Ok::<_, LoadError>(lane)
        })?;
    }
    Ok(denoiser)
}

/// Loads a transformer onto a device besides the first, and waits until the device has it.
fn load_transformer<B: FusedOps>(
    config: &TransformerConfig,
    source: Arc<dyn TensorSource>,
    device: &B::Device,
    precision: Precision,
    label: &str,
) -> Result<Transformer<B>, LoadError> {
    B::check_kernels(device, precision.activations, &config.kernel_shapes());
    let transformer = Transformer::load(config, source, device, precision)?;
    // Uploads are queued.
    match B::checkpoint(device) {
        Ok(_) => Ok(transformer),
        Err(report) => Err(LoadError::Device {
            device: label.to_owned(),
            report: summary(&report),
        }),
    }
}
