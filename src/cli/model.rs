use std::path::Path;
use std::time::Instant;

use kiln_models::flops::FlopCount;
use kiln_models::job::Job;
use kiln_models::pipeline::{ImageSizes, Pipeline};

use crate::backend::{self, LoadSettings};
use crate::checkpoint::{Checkpoint, DEMO, PromptGuide, QWEN_IMAGE, Shape};
use crate::hub::{self, HubSettings};
use crate::tokenizer::PromptTokenizer;

use super::args::LoadFormat;
use super::error::CliError;

/// What random weights are given the shape of: nothing is downloaded for them.
fn dummy_shape(name: &str) -> Result<Shape, CliError> {
    match name {
        DEMO => Ok(Shape::Demo),
        QWEN_IMAGE => Ok(Shape::QwenImage),
        _ if Path::new(name).exists() => Ok(Shape::Folder(name.into())),
        _ => Err(CliError::DummyShape {
            name: name.to_owned(),
        }),
    }
}

/// A model's files, before its weights are read.
pub(super) struct Model {
    checkpoint: Checkpoint,
    pub(super) tokenizer: PromptTokenizer,
}

impl Model {
    /// Finds, or downloads, the model, and opens what is small in it.
    pub(super) fn open(name: &str, format: LoadFormat) -> Result<Self, CliError> {
        let checkpoint = match format {
            LoadFormat::Dummy => Checkpoint::dummy(dummy_shape(name)?)?,
            LoadFormat::Auto if name == DEMO => Checkpoint::demo()?,
            LoadFormat::Auto => Checkpoint::open(&hub::resolve(name, &HubSettings::from_env())?)?,
        };
        let tokenizer = checkpoint.tokenizer().map_err(CliError::Tokenizer)?;
        Ok(Self {
            checkpoint,
            tokenizer,
        })
    }

    /// The sizes it draws.
    pub(super) fn image_sizes(&self) -> Result<ImageSizes, CliError> {
        Ok(backend::image_sizes(&self.checkpoint)?)
    }

    /// How to word a prompt for it.
    pub(super) fn prompt_guide(&self) -> Option<&'static PromptGuide> {
        self.checkpoint.prompt_guide()
    }

    /// How messages name it.
    pub(super) fn description(&self) -> String {
        self.checkpoint.place().to_string()
    }

    /// How much there is to compute for a job.
    pub(super) fn operations(
        &self,
        job: &Job,
        settings: &LoadSettings,
    ) -> Result<FlopCount, CliError> {
        Ok(backend::operations(&self.checkpoint, job, settings)?)
    }

    /// How many steps probably take as long as decoding the images does.
    pub(super) fn decode_steps(&self, job: &Job, settings: &LoadSettings) -> Result<f64, CliError> {
        let operations = self.operations(job, settings)?;
        Ok(operations.decode as f64 / operations.step as f64)
    }

    /// Loads the weights.
    pub(super) fn pipeline(&self, settings: &LoadSettings) -> Result<Box<dyn Pipeline>, CliError> {
        tracing::info!("loading {}", self.checkpoint.place());
        let started = Instant::now();
        let pipeline = backend::load(&self.checkpoint, settings)?;
        let info = pipeline.info();
        let seconds = started.elapsed().as_secs_f64();
        tracing::info!(
            "loaded in {seconds:.1} s: {} in {}",
            info.device(),
            info.dtype
        );
        Ok(pipeline)
    }
}
