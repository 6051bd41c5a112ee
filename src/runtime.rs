//! From a model's name and settings to a pipeline that is ready for jobs.
//!
//! [`Runtime::open`] does all of it. Callers that check a request before they pay for the weights
//! do it in two stages: [`Model::find`] finds or downloads the files and reads the small ones,
//! [`Model::load`] reads the weights. [`Start`] says how far this is.

mod counted;
mod start;

#[cfg(test)]
mod tests;

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::path::{self, Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kiln_models::TensorSource;
use kiln_models::adapter::{Adapter, AdapterTarget, MergedSource};
use kiln_models::flops::FlopCount;
use kiln_models::job::Job;
use kiln_models::pipeline::{ModelInfo, Pipeline};

use crate::adapters::{AdapterError, AdapterSettings, AdapterStore};
use crate::backend::{self, BackendError, LoadSettings, UnknownName};
use crate::checkpoint::{
    Checkpoint, CheckpointError, DEMO, Place, PromptGuide, QWEN_IMAGE, Shape, WeightAccess,
};
use crate::hub::{self, HubError, HubSettings, Location};
use crate::request::{ChosenAdapter, Limits, fused_lightning};
use crate::tokenizer::{PromptTokenizer, TokenizerError};

use self::counted::Counted;

pub use self::start::{Progress, Stage, Start};

/// Where the weights come from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum LoadFormat {
    /// The model's files.
    #[default]
    Auto,
    /// Random weights in the model's shape. Only the model's configuration files are read.
    Dummy,
}

/// Which model to load.
#[derive(Debug, Clone)]
pub struct ModelSettings {
    /// A folder in diffusers layout, a Hugging Face id such as [`QWEN_IMAGE`], or [`DEMO`].
    /// Only a path may be something else than UTF-8.
    pub name: OsString,
    pub load_format: LoadFormat,
    pub weight_access: WeightAccess,
    /// How a Hugging Face id becomes a folder. Unused for folders, for [`DEMO`] and for
    /// [`LoadFormat::Dummy`].
    pub hub: HubSettings,
}

/// Which model to load, and onto which devices.
#[derive(Debug, Clone)]
pub struct RuntimeSettings {
    pub model: ModelSettings,
    pub load: LoadSettings,
}

/// Why a model cannot be found or loaded.
#[derive(Debug, thiserror::Error)]
pub enum RuntimeError {
    #[error(transparent)]
    Hub(#[from] HubError),
    #[error(
        "{name:?} has no shape for --load-format dummy: give a folder with a model's \
         configurations (model_index.json, transformer/config.json, ...), {QWEN_IMAGE} or {DEMO}"
    )]
    DummyShape { name: OsString },
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    #[error("the tokenizer cannot be loaded")]
    Tokenizer(#[source] TokenizerError),
    #[error(transparent)]
    Backend(#[from] BackendError),
    #[error(transparent)]
    Adapters(#[from] AdapterError),
}

/// A model whose files were found, without its weights.
#[derive(Debug, Clone)]
pub struct Model {
    /// [`ModelSettings::public_name`].
    name: String,
    checkpoint: Checkpoint,
    tokenizer: Arc<PromptTokenizer>,
    limits: Limits,
}

/// A loaded model. [`Engine::start`](crate::engine::Engine::start) takes the pipeline.
pub struct Runtime {
    pub pipeline: Box<dyn Pipeline>,
    pub info: ModelInfo,
    pub tokenizer: Arc<PromptTokenizer>,
    /// The model's sizes, and the default limits on cost.
    pub limits: Limits,
    /// How to word a prompt, for a model that does not know all words.
    pub prompt_guide: Option<&'static PromptGuide>,
    /// Time that reading the weights took.
    pub load_time: Duration,
}

impl LoadFormat {
    /// Every format.
    pub const ALL: [Self; 2] = [Self::Auto, Self::Dummy];

    /// The format's name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Dummy => "dummy",
        }
    }

    /// The model that is loaded where none is named: [`DEMO`], or for random weights
    /// [`QWEN_IMAGE`].
    pub fn default_model(self) -> &'static str {
        match self {
            Self::Auto => DEMO,
            Self::Dummy => QWEN_IMAGE,
        }
    }
}

impl fmt::Display for LoadFormat {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.name())
    }
}

impl FromStr for LoadFormat {
    type Err = UnknownName;

    fn from_str(word: &str) -> Result<Self, UnknownName> {
        let found = Self::ALL.into_iter().find(|format| format.name() == word);
        found.ok_or_else(|| UnknownName::new(word, &Self::ALL.map(Self::name)))
    }
}

impl ModelSettings {
    /// A model's own weights; the Hub's settings come from the environment.
    pub fn new(name: impl Into<OsString>) -> Self {
        Self {
            name: name.into(),
            load_format: LoadFormat::Auto,
            weight_access: WeightAccess::Mapped,
            hub: HubSettings::from_env(),
        }
    }

    /// The model's name in images, answers and reports, which does not say where its files are: of a
    /// path the last part, or the Hub id if the path is in the Hub's cache.
    pub fn public_name(&self) -> String {
        let location = self
            .name
            .to_str()
            .and_then(|name| hub::locate(name, &self.hub).ok());
        let path = match location {
            Some(Location::Id(id)) => return id,
            Some(Location::Path(path)) => path,
            // `demo`, or a name that no model has.
            None => PathBuf::from(&self.name),
        };
        // `.` and `..` have no last part.
        let whole = match path.file_name() {
            Some(_) => path::absolute(&path),
            None => path.canonicalize(),
        };
        let path = whole.unwrap_or(path);
        let name = path.file_name().unwrap_or(path.as_os_str());
        hub::id_in_cache(&path).unwrap_or_else(|| name.to_string_lossy().into_owned())
    }
}

impl RuntimeSettings {
    /// A model's own weights, loaded with the default [`LoadSettings`].
    pub fn new(model: impl Into<OsString>) -> Self {
        Self {
            model: ModelSettings::new(model),
            load: LoadSettings::default(),
        }
    }
}

impl Model {
    /// Finds the model, or downloads it, and reads all of it but the weights.
    ///
    /// # Errors
    ///
    /// The name stands for no model, the download fails, or a configuration, a weight file's header
    /// or the tokenizer cannot be read.
    pub fn find(settings: &ModelSettings) -> Result<Self, RuntimeError> {
        Self::find_reporting(settings, &Start::new())
    }

    /// As [`Model::find`], and reports the progress.
    ///
    /// # Errors
    ///
    /// As [`Model::find`].
    pub fn find_reporting(settings: &ModelSettings, start: &Start) -> Result<Self, RuntimeError> {
        let access = settings.weight_access;
        let open = |folder: &Path| Checkpoint::open_with(folder, access);
        Self::find_with(settings, start, &open)
    }

    /// As [`Model::find_reporting`], for a model that is not loaded: its weights are neither downloaded nor
    /// needed.
    ///
    /// # Errors
    ///
    /// As [`Model::find`].
    pub fn find_without_weights(
        settings: &ModelSettings,
        start: &Start,
    ) -> Result<Self, RuntimeError> {
        let mut settings = settings.clone();
        settings.hub.without_weights = true;
        Self::find_with(&settings, start, &Checkpoint::open_without_weights)
    }

    fn find_with(
        settings: &ModelSettings,
        start: &Start,
        open: &dyn Fn(&Path) -> Result<Checkpoint, CheckpointError>,
    ) -> Result<Self, RuntimeError> {
        let name = &settings.name;
        let checkpoint = match (settings.load_format, name.to_str()) {
            (LoadFormat::Dummy, _) => Checkpoint::dummy(dummy_shape(name)?)?,
            (LoadFormat::Auto, Some(DEMO)) => Checkpoint::demo()?,
            (LoadFormat::Auto, Some(name)) => {
                let report = |transfer| start.download(transfer);
                open(&hub::resolve(name, &settings.hub, &report)?)?
            }
            // Only a path may be something else than UTF-8.
            (LoadFormat::Auto, None) => open(Path::new(name))?,
        };
        let tokenizer = checkpoint.tokenizer().map_err(RuntimeError::Tokenizer)?;
        let configs = &checkpoint.parts().configs;
        let mut limits = Limits::for_sizes(backend::image_sizes(&checkpoint)?);
        limits.caches.blocks = Some(configs.blocks().map_err(BackendError::from)?);
        limits.caches.mag_ratios = configs.mag_ratios().map_err(BackendError::from)?;
        let scheduler = configs.noise_schedule().map_err(BackendError::from)?;
        let name = settings.public_name();
        limits.model_recipe = scheduler.is_lightning().then(|| fused_lightning(&name));
        limits.scheduler = Some(scheduler);
        Ok(Self {
            name,
            limits,
            tokenizer: Arc::new(tokenizer),
            checkpoint,
        })
    }

    /// [`ModelSettings::public_name`].
    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn tokenizer(&self) -> &PromptTokenizer {
        &self.tokenizer
    }

    /// As [`Model::tokenizer`], to be kept.
    pub fn shared_tokenizer(&self) -> Arc<PromptTokenizer> {
        Arc::clone(&self.tokenizer)
    }

    /// The model's sizes, and the default limits on cost.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// How to word a prompt, for a model that does not know all words.
    pub fn prompt_guide(&self) -> Option<&'static PromptGuide> {
        self.checkpoint.prompt_guide()
    }

    /// What reports call the model: [`ModelSettings::public_name`], or a description.
    pub fn description(&self) -> String {
        match self.checkpoint.place() {
            Place::Folder(_) => self.name.clone(),
            Place::Dummy(Shape::Folder(_)) => {
                format!("random weights in the shape of {}", self.name)
            }
            place => place.to_string(),
        }
    }

    /// Lists the adapters of a folder that fit the model, and those that come with the model.
    ///
    /// # Errors
    ///
    /// The folder cannot be read.
    pub fn open_adapters(&self, settings: AdapterSettings) -> Result<AdapterStore, RuntimeError> {
        let configs = &self.checkpoint.parts().configs;
        let targets = configs.adapter_targets().map_err(BackendError::from)?;
        let blocks = configs.blocks().map_err(BackendError::from)?;
        let embedded = self.checkpoint.embedded_adapters();
        Ok(AdapterStore::open(settings, targets, blocks, embedded)?)
    }

    /// The same model with an adapter merged into the transformer's weights: each is merged in f32 when it
    /// is read, before it is converted to the model's type. The adapter's recipe is that of the model.
    #[must_use]
    pub fn with_merged(mut self, adapter: Arc<Adapter>, chosen: ChosenAdapter) -> Self {
        let scale = chosen.scale as f32;
        let merge =
            |base| -> Arc<dyn TensorSource> { Arc::new(MergedSource::new(base, adapter, scale)) };
        self.checkpoint = self.checkpoint.map_transformer(merge);
        self.limits.merged = Some(chosen);
        self
    }

    /// Floating-point operations of a job, by stage.
    ///
    /// # Errors
    ///
    /// The model's configuration is not supported.
    pub fn operations(
        &self,
        job: &Job,
        settings: &LoadSettings,
    ) -> Result<FlopCount, RuntimeError> {
        Ok(backend::operations(&self.checkpoint, job, settings)?)
    }

    /// The linear layers of the transformer that an adapter can change.
    ///
    /// # Errors
    ///
    /// The model's configuration is not supported.
    pub fn adapter_targets(&self) -> Result<Vec<AdapterTarget>, RuntimeError> {
        let configs = &self.checkpoint.parts().configs;
        Ok(configs.adapter_targets().map_err(BackendError::from)?)
    }

    /// Time to decode a job's images as a number of its steps, estimated from the operations of
    /// both.
    ///
    /// # Errors
    ///
    /// As [`Model::operations`].
    pub fn decode_steps(&self, job: &Job, settings: &LoadSettings) -> Result<f64, RuntimeError> {
        let operations = self.operations(job, settings)?;
        Ok(operations.decode as f64 / operations.step as f64)
    }

    /// Loads the weights onto one or several devices. A model can be loaded several times, onto several devices.
    ///
    /// # Errors
    ///
    /// The backend or the device is not available, a tensor is missing or has the wrong shape, or
    /// memory runs out.
    pub fn load(&self, settings: &LoadSettings) -> Result<Runtime, RuntimeError> {
        self.load_reporting(settings, &Start::new())
    }

    /// As [`Model::load`], and reports the progress.
    ///
    /// # Errors
    ///
    /// As [`Model::load`].
    pub fn load_reporting(
        &self,
        settings: &LoadSettings,
        start: &Start,
    ) -> Result<Runtime, RuntimeError> {
        tracing::info!("loading {}", self.checkpoint.place());
        if let Some(merged) = &self.limits.merged {
            let (name, scale) = (&merged.info.name, merged.scale);
            tracing::info!("merging adapter {name} with scale {scale} into the transformer");
        }
        let started = Instant::now();
        let parts = self.checkpoint.parts();
        let sources = [&parts.text_encoder, &parts.transformer, &parts.vae];
        let sizes = sources.map(|source| counted::total_bytes(source.as_ref()));
        let [text_encoder, transformer, vae] = sizes;
        start.load(text_encoder + transformer * settings.copies() as u64 + vae);
        let counted = |source| -> Arc<dyn TensorSource> { Arc::new(Counted::new(source, start)) };
        let pipeline = backend::load(&self.checkpoint.map_sources(counted), settings)?;
        let load_time = started.elapsed();
        let info = pipeline.info().clone();
        tracing::info!(
            "loaded in {:.1} s: {} in {}",
            load_time.as_secs_f64(),
            info.device(),
            info.dtype
        );
        Ok(Runtime {
            pipeline,
            info,
            tokenizer: Arc::clone(&self.tokenizer),
            limits: self.limits.clone(),
            prompt_guide: self.prompt_guide(),
            load_time,
        })
    }
}

impl Runtime {
    /// Finds or downloads a model and loads it.
    ///
    /// ```
    /// use kiln::runtime::{Runtime, RuntimeSettings};
    ///
    /// let runtime = Runtime::open(&RuntimeSettings::new("demo"))?;
    /// assert_eq!(runtime.info.backend, "flex");
    /// assert_eq!(runtime.limits.sizes.multiple, 16);
    /// assert!(!runtime.tokenizer.encode_prompt("a red circle")?.is_empty());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// Those of [`backend::check`], [`Model::find`] and [`Model::load`], in this order.
    pub fn open(settings: &RuntimeSettings) -> Result<Self, RuntimeError> {
        backend::check(&settings.load.backend, settings.load.split_guidance)?;
        Model::find(&settings.model)?.load(&settings.load)
    }
}

impl fmt::Debug for Runtime {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Runtime")
            .field("info", &self.info)
            .field("limits", &self.limits)
            .field("load_time", &self.load_time)
            .finish_non_exhaustive()
    }
}

/// The configurations that random weights follow. Nothing is downloaded for them.
fn dummy_shape(name: &OsStr) -> Result<Shape, RuntimeError> {
    match name.to_str() {
        Some(DEMO) => Ok(Shape::Demo),
        Some(QWEN_IMAGE) => Ok(Shape::QwenImage),
        _ if Path::new(name).exists() => Ok(Shape::Folder(name.into())),
        _ => Err(RuntimeError::DummyShape {
            name: name.to_owned(),
        }),
    }
}
