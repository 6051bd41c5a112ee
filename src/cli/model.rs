use std::time::Instant;

use kiln_models::painter::{ImageSizes, Painter};

use crate::backend::{self, LoadSettings};
use crate::checkpoint::{Checkpoint, DEMO};
use crate::hub::{self, HubSettings};
use crate::tokenizer::PromptTokenizer;

use super::error::CliError;

/// A model's files, before its weights are read.
pub(super) struct Model {
    checkpoint: Checkpoint,
    pub(super) tokenizer: PromptTokenizer,
}

impl Model {
    /// Finds, or downloads, the model, and opens what is small in it.
    pub(super) fn open(name: &str) -> Result<Self, CliError> {
        let checkpoint = if name == DEMO {
            Checkpoint::demo()?
        } else {
            Checkpoint::open(&hub::resolve(name, &HubSettings::from_env())?)?
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

    /// Loads the weights.
    pub(super) fn painter(&self, settings: &LoadSettings) -> Result<Box<dyn Painter>, CliError> {
        tracing::info!("loading {}", self.checkpoint.place());
        let started = Instant::now();
        let painter = backend::load(&self.checkpoint, settings)?;
        let info = painter.info();
        let seconds = started.elapsed().as_secs_f64();
        tracing::info!(
            "loaded in {seconds:.1} s: {} in {}",
            info.device,
            info.dtype
        );
        Ok(painter)
    }
}
