//! Model files: configurations, tokenizer and weights.
//!
//! A [`Checkpoint`] is a model folder in the layout of diffusers, the demo model, whose files are
//! embedded in the binary, or the configurations of a model with random weights.
//!
//! [`Checkpoint::open`] reads headers and configurations only. Weights are memory-mapped and reach
//! the models tensor by tensor, through [`TensorSource`].
//!
//! - `layout`: the folder layout of diffusers; another layout is another module beside it
//! - `diagnosis`: what a path that is no model folder is, for messages
//! - `mapped`, `bus_errors`: memory maps of files that may change or fail while they are in use
//! - `safetensors`: a reader of weight files; another format is another module beside it
//! - [`lora`]: adapter files
//! - `dummy`: random weights
//! - `demo`, `qwen_image`: the demo model with its adapter, and the configurations of Qwen-Image
//!
//! [`TensorSource`]: kiln_models::TensorSource

#[cfg(unix)]
mod bus_errors;
mod demo;
mod diagnosis;
mod dummy;
mod error;
mod files;
mod layout;
pub mod lora;
mod mapped;
mod qwen_image;
mod safetensors;

#[cfg(test)]
mod tests;

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use kiln_models::TensorSource;
use kiln_models::families::CheckpointParts;

use crate::tokenizer::{PromptTokenizer, TokenizerError};

pub use self::demo::{EmbeddedAdapter, demo_adapters};
pub use self::error::CheckpointError;

/// The name of the demo model.
pub const DEMO: &str = "demo";

/// Hub id of the model whose configurations are embedded in the binary.
pub const QWEN_IMAGE: &str = "Qwen/Qwen-Image";

/// What a model with a small vocabulary can generate, and how to word its prompts.
#[derive(Debug)]
pub struct PromptGuide {
    /// What the model generates, in one sentence.
    pub about: &'static str,
    /// Example prompts.
    pub examples: &'static [&'static str],
    /// All words that the model knows, in named groups.
    pub words: &'static [(&'static str, &'static [&'static str])],
}

/// Where the content of weight files is while a model is in use.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum WeightAccess {
    /// In the files, which are mapped and must not change.
    #[default]
    Mapped,
    /// In memory: as much as the files are large.
    InMemory,
}

/// An open model.
#[derive(Debug, Clone)]
pub struct Checkpoint {
    place: Place,
    parts: CheckpointParts,
}

/// Where a model comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// A folder in the layout of diffusers.
    Folder(PathBuf),
    /// The demo model, embedded in the binary.
    Demo,
    /// Random weights with the configurations of a model.
    Dummy(Shape),
}

/// The model whose configurations random weights follow.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Shape {
    /// A model folder, which needs no weight files.
    Folder(PathBuf),
    /// The demo model.
    Demo,
    /// [`QWEN_IMAGE`], whose configurations are embedded in the binary.
    QwenImage,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Folder(path) => path.display().fmt(f),
            Self::Demo => f.write_str("the built-in demo model"),
            Self::Dummy(shape) => write!(f, "random weights in the shape of {shape}"),
        }
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Folder(path) => path.display().fmt(f),
            Self::Demo => Place::Demo.fmt(f),
            Self::QwenImage => f.write_str(QWEN_IMAGE),
        }
    }
}

impl Checkpoint {
    /// Opens a model folder: reads its configuration files and maps its weight files.
    ///
    /// Reads the header of each safetensors file, and no weights.
    ///
    /// ```
    /// use kiln::checkpoint::Checkpoint;
    ///
    /// let checkpoint = Checkpoint::open("models/demo".as_ref())?;
    /// assert!(!checkpoint.tokenizer()?.encode_prompt("a red circle")?.is_empty());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn open(folder: &Path) -> Result<Self, CheckpointError> {
        Self::open_with(folder, WeightAccess::Mapped)
    }

    /// As [`Checkpoint::open`], and reads the weights at once if they are to be in memory.
    pub fn open_with(folder: &Path, access: WeightAccess) -> Result<Self, CheckpointError> {
        Ok(Self {
            place: Place::Folder(folder.to_owned()),
            parts: layout::open(folder, access)?,
        })
    }

    /// Opens the configurations and the tokenizer of a model in diffusers layout. The folder needs no
    /// weights, and none can be read.
    pub fn open_without_weights(folder: &Path) -> Result<Self, CheckpointError> {
        let dummy = Self::dummy(Shape::Folder(folder.to_owned()))?;
        let place = Place::Folder(folder.to_owned());
        Ok(Self { place, ..dummy })
    }

    /// Opens the demo model, which needs no files.
    pub fn demo() -> Result<Self, CheckpointError> {
        Ok(Self {
            place: Place::Demo,
            parts: demo::parts()?,
        })
    }

    /// Opens a model of random weights, which are generated when they are loaded.
    pub fn dummy(shape: Shape) -> Result<Self, CheckpointError> {
        let configs = match &shape {
            Shape::Folder(folder) => layout::open_configs(folder)?,
            Shape::Demo => demo::configs(),
            Shape::QwenImage => qwen_image::configs(),
        };
        let [text_encoder, transformer, vae] =
            dummy::sources(["text_encoder", "transformer", "vae"]);
        Ok(Self {
            place: Place::Dummy(shape),
            parts: CheckpointParts {
                configs,
                text_encoder,
                transformer,
                vae,
            },
        })
    }

    pub fn place(&self) -> &Place {
        &self.place
    }

    /// The adapters that come with the model.
    pub fn embedded_adapters(&self) -> &'static [EmbeddedAdapter] {
        match self.place {
            Place::Demo => demo_adapters(),
            Place::Folder(_) | Place::Dummy(_) => &[],
        }
    }

    /// How to word prompts, for a model with a small vocabulary.
    pub fn prompt_guide(&self) -> Option<&'static PromptGuide> {
        matches!(self.place, Place::Demo).then_some(&demo::GUIDE)
    }

    /// Loads the tokenizer. A model of random weights falls back to the demo model's tokenizer if it
    /// has none of its own.
    pub fn tokenizer(&self) -> Result<PromptTokenizer, TokenizerError> {
        let template = self.parts.configs.family()?.template();
        match &self.place {
            Place::Folder(folder) => PromptTokenizer::load(&folder.join("tokenizer"), template),
            Place::Dummy(Shape::Folder(folder)) if folder.join("tokenizer").is_dir() => {
                PromptTokenizer::load(&folder.join("tokenizer"), template)
            }
            Place::Demo | Place::Dummy(_) => {
                PromptTokenizer::from_json(&demo::tokenizer(), template)
            }
        }
    }

    /// The same model with each component's weights behind another source.
    #[must_use]
    pub fn map_sources(
        &self,
        wrap: impl Fn(Arc<dyn TensorSource>) -> Arc<dyn TensorSource>,
    ) -> Self {
        let CheckpointParts {
            configs,
            text_encoder,
            transformer,
            vae,
        } = self.parts.clone();
        Self {
            place: self.place.clone(),
            parts: CheckpointParts {
                configs,
                text_encoder: wrap(text_encoder),
                transformer: wrap(transformer),
                vae: wrap(vae),
            },
        }
    }

    /// The same model with the transformer's weights behind another source.
    #[must_use]
    pub fn map_transformer(
        mut self,
        wrap: impl FnOnce(Arc<dyn TensorSource>) -> Arc<dyn TensorSource>,
    ) -> Self {
        self.parts.transformer = wrap(self.parts.transformer);
        self
    }

    /// The configurations and the weights, for loading the networks.
    pub fn parts(&self) -> &CheckpointParts {
        &self.parts
    }
}
