//! A model folder as diffusers writes it: five JSON files, a tokenizer, and the weights of three
//! components in safetensors files. Or the demo model, which has the same files in the binary. Or
//! the configurations alone, with random weights.
//!
//! [`Checkpoint::open`] reads headers and configurations only. The weights are memory-mapped and
//! reach the models tensor by tensor, through [`TensorSource`].

mod demo;
mod dummy;
mod qwen_image;
mod weights;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use kiln_models::TensorSource;
use kiln_models::config::ConfigText;
use kiln_models::families::{CheckpointConfigs, CheckpointParts};

use weights::Weights;

use crate::tokenizer::{PromptTokenizer, TokenizerError};

/// What names the demo model wherever a model is named.
pub const DEMO: &str = "demo";

/// The published model whose configuration is in the binary.
pub const QWEN_IMAGE: &str = "Qwen/Qwen-Image";

/// What a model draws and how to word it, where that can be said.
#[derive(Debug)]
pub struct PromptGuide {
    /// What it draws, in a sentence.
    pub about: &'static str,
    /// Prompts that it draws well.
    pub examples: &'static [&'static str],
    /// All the words that it knows, by what they have in common.
    pub words: &'static [(&'static str, &'static [&'static str])],
}

/// An open model.
#[derive(Debug, Clone)]
pub struct Checkpoint {
    place: Place,
    parts: CheckpointParts,
}

/// Where a model's files are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    Folder(PathBuf),
    /// In the binary.
    Demo,
    /// Nowhere: random weights in the shape of a model.
    Dummy(Shape),
}

/// Whose configurations random weights follow.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Shape {
    /// A model folder's; it needs no weight files.
    Folder(PathBuf),
    Demo,
    /// [`QWEN_IMAGE`]'s, without a file.
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

/// Why a folder cannot be used as a model. Every message says what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    #[error(
        "there is no folder {path}: give the path of a model folder, or a Hub id such as \
         Qwen/Qwen-Image"
    )]
    FolderMissing { path: PathBuf },

    #[error(
        "{path} is a file, and a model is a folder in diffusers layout (model_index.json, \
         transformer/, text_encoder/, vae/, ...): give the folder, or a Hub id such as \
         Qwen/Qwen-Image. Single-file checkpoints (.safetensors, .gguf) cannot be loaded"
    )]
    IsFile { path: PathBuf },

    #[error(
        "{folder} holds a single-file checkpoint ({file}), which cannot be loaded: get the same \
         model in diffusers layout (a folder with model_index.json, transformer/, text_encoder/, \
         vae/, ...), for example with `hf download Qwen/Qwen-Image`"
    )]
    SingleFile { folder: PathBuf, file: String },

    #[error(
        "{folder} is not a model folder: it has no model_index.json. Looked for model_index.json, \
         scheduler/scheduler_config.json, text_encoder/config.json, transformer/config.json, \
         vae/config.json and tokenizer/; found {}. Give the folder that holds model_index.json",
        listing(found)
    )]
    NotAModelFolder { folder: PathBuf, found: Vec<String> },

    #[error(
        "the model folder {folder} has no {component}/: the copy is incomplete, download the \
         model again"
    )]
    ComponentMissing {
        folder: PathBuf,
        component: &'static str,
    },

    #[error("{path} is missing: the copy of the model is incomplete, download it again")]
    ConfigMissing { path: PathBuf },

    #[error(
        "no weights in {folder}: looked for {stem}.safetensors.index.json and {stem}.safetensors, \
         found {}. Download them, or save the model with diffusers' \
         save_pretrained(safe_serialization=True)",
        listing(found)
    )]
    NoWeights {
        folder: PathBuf,
        stem: &'static str,
        found: Vec<String>,
    },

    #[error("{path} is not a valid index of weight files: download it again")]
    IndexInvalid {
        path: PathBuf,
        source: serde_json::Error,
    },

    #[error(
        "{path} places the tensor {tensor} in {shard:?}, which is not the name of a file beside \
         the index: download the index again"
    )]
    ShardName {
        path: PathBuf,
        tensor: String,
        shard: String,
    },

    #[error(
        "{shard} is missing, and {index} places {tensors} tensors in it: download this file, or \
         the model again"
    )]
    ShardMissing {
        shard: PathBuf,
        index: PathBuf,
        tensors: usize,
    },

    #[error(
        "{index} places the tensor {tensor} in {shard}, which does not have it: the index and the \
         weights are not of the same version, download both again"
    )]
    TensorMissing {
        tensor: String,
        shard: PathBuf,
        index: PathBuf,
    },

    #[error(
        "the tensor {tensor} is both in {first} and in {second}: the folder mixes two versions of \
         the model, download it into an empty folder"
    )]
    DuplicateTensor {
        tensor: String,
        first: String,
        second: String,
    },

    #[error(
        "{path} has {actual} bytes where its header needs {expected}: the copy is incomplete or \
         damaged, download this file again"
    )]
    WrongSize {
        path: PathBuf,
        expected: u64,
        actual: u64,
    },

    #[error("{path} is not a safetensors file ({reason}): download this file again")]
    NotSafetensors { path: PathBuf, reason: String },

    #[error(
        "{path} is a Git LFS pointer, not the file itself: run `git lfs pull` in the model folder"
    )]
    LfsPointer { path: PathBuf },

    #[error("cannot read {path}")]
    Io { path: PathBuf, source: io::Error },
}

impl Checkpoint {
    /// Opens a model folder: reads its configuration files and maps its weight files.
    ///
    /// Costs one read of each safetensors header; no weights are read.
    ///
    /// ```
    /// use kiln::checkpoint::Checkpoint;
    ///
    /// let checkpoint = Checkpoint::open("models/demo".as_ref())?;
    /// assert!(!checkpoint.tokenizer()?.encode_prompt("a red circle")?.is_empty());
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn open(folder: &Path) -> Result<Self, CheckpointError> {
        check_is_model_folder(folder)?;
        for component in [
            "scheduler",
            "text_encoder",
            "tokenizer",
            "transformer",
            "vae",
        ] {
            if !folder.join(component).is_dir() {
                return Err(CheckpointError::ComponentMissing {
                    folder: folder.to_owned(),
                    component,
                });
            }
        }
        let configs = read_configs(folder)?;
        // The stems are transformers' and diffusers' names for a component's weights.
        let parts = CheckpointParts {
            configs,
            text_encoder: Arc::new(open_weights(&folder.join("text_encoder"), "model")?),
            transformer: open_diffusers_weights(&folder.join("transformer"))?,
            vae: open_diffusers_weights(&folder.join("vae"))?,
        };
        Ok(Self {
            place: Place::Folder(folder.to_owned()),
            parts,
        })
    }

    /// Opens the demo model, which needs no file.
    pub fn demo() -> Result<Self, CheckpointError> {
        Ok(Self {
            place: Place::Demo,
            parts: demo::parts()?,
        })
    }

    /// Random weights in the shape of a model, made as they are loaded.
    pub fn dummy(shape: Shape) -> Result<Self, CheckpointError> {
        let configs = match &shape {
            Shape::Folder(folder) => {
                check_is_model_folder(folder)?;
                read_configs(folder)?
            }
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

    /// How to word a prompt, for a model that does not understand all words.
    pub fn prompt_guide(&self) -> Option<&'static PromptGuide> {
        matches!(self.place, Place::Demo).then_some(&demo::GUIDE)
    }

    /// Loads the tokenizer. Random weights make no use of what a prompt says: where their shape
    /// comes without a tokenizer, the demo model's stands in.
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

    /// The configurations and the weights, as the models take them.
    pub fn parts(&self) -> &CheckpointParts {
        &self.parts
    }
}

fn check_is_model_folder(folder: &Path) -> Result<(), CheckpointError> {
    if folder.is_file() {
        return Err(CheckpointError::IsFile {
            path: folder.to_owned(),
        });
    }
    if !folder.is_dir() {
        return Err(CheckpointError::FolderMissing {
            path: folder.to_owned(),
        });
    }
    if folder.join("model_index.json").is_file() {
        return Ok(());
    }
    let found = list_folder(folder)?;
    let single_file = |name: &String| {
        Path::new(name)
            .extension()
            .is_some_and(|it| it == "safetensors" || it == "gguf")
    };
    let mut checkpoints = found.iter().filter(|name| single_file(name));
    if let (Some(file), None) = (checkpoints.next(), checkpoints.next()) {
        let (folder, file) = (folder.to_owned(), file.clone());
        return Err(CheckpointError::SingleFile { folder, file });
    }
    Err(CheckpointError::NotAModelFolder {
        folder: folder.to_owned(),
        found,
    })
}

/// What they mean is the business of the networks that read them.
fn read_configs(folder: &Path) -> Result<CheckpointConfigs, CheckpointError> {
    Ok(CheckpointConfigs {
        model_index: read_config(folder.join("model_index.json"))?,
        scheduler: read_config(folder.join("scheduler/scheduler_config.json"))?,
        text_encoder: read_config(folder.join("text_encoder/config.json"))?,
        transformer: read_config(folder.join("transformer/config.json"))?,
        vae: read_config(folder.join("vae/config.json"))?,
    })
}

fn read_config(path: PathBuf) -> Result<ConfigText, CheckpointError> {
    if !path.exists() {
        return Err(CheckpointError::ConfigMissing { path });
    }
    let text = read_text(&path)?;
    let file = path.display().to_string();
    Ok(ConfigText { file, text })
}

fn open_diffusers_weights(folder: &Path) -> Result<Arc<dyn TensorSource>, CheckpointError> {
    Ok(Arc::new(open_weights(folder, "diffusion_pytorch_model")?))
}

/// Opens `{stem}.safetensors.index.json` and its shards, or `{stem}.safetensors` where there is no
/// index.
fn open_weights(folder: &Path, stem: &'static str) -> Result<Weights, CheckpointError> {
    let mut weights = Weights::new(folder);
    let index = folder.join(format!("{stem}.safetensors.index.json"));
    let single = folder.join(format!("{stem}.safetensors"));
    if index.exists() {
        add_shards(&mut weights, folder, &index)?;
    } else if single.exists() {
        weights.add_file(&single)?;
    } else {
        let found = list_folder(folder)?;
        return Err(CheckpointError::NoWeights {
            folder: folder.to_owned(),
            stem,
            found,
        });
    }
    Ok(weights)
}

/// The index of a sharded component; its "metadata" is of no use here.
#[derive(serde::Deserialize)]
struct ShardIndex {
    /// Tensor name to file name.
    weight_map: BTreeMap<String, String>,
}

fn add_shards(weights: &mut Weights, folder: &Path, index: &Path) -> Result<(), CheckpointError> {
    let ShardIndex { weight_map } = serde_json::from_str(&read_text(index)?).map_err(|source| {
        CheckpointError::IndexInvalid {
            path: index.to_owned(),
            source,
        }
    })?;

    let mut shards: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (tensor, shard) in &weight_map {
        shards.entry(shard).or_default().push(tensor);
    }
    for (name, tensors) in shards {
        // The index came from the network: it must not reach outside its folder.
        if Path::new(name).file_name() != Some(name.as_ref()) {
            return Err(CheckpointError::ShardName {
                path: index.to_owned(),
                tensor: tensors[0].to_owned(),
                shard: name.to_owned(),
            });
        }
        let shard = folder.join(name);
        let index = index.to_owned();
        if !shard.exists() {
            return Err(CheckpointError::ShardMissing {
                shard,
                index,
                tensors: tensors.len(),
            });
        }
        weights.add_file(&shard)?;
        if let Some(tensor) = tensors
            .into_iter()
            .find(|tensor| !weights.has(tensor, &shard))
        {
            return Err(CheckpointError::TensorMissing {
                tensor: tensor.to_owned(),
                shard,
                index,
            });
        }
    }
    Ok(())
}

fn read_text(path: &Path) -> Result<String, CheckpointError> {
    let text = fs::read_to_string(path).map_err(|source| io_error(path, source))?;
    if is_lfs_pointer(text.as_bytes()) {
        return Err(CheckpointError::LfsPointer {
            path: path.to_owned(),
        });
    }
    Ok(text)
}

/// What a clone without Git LFS has in place of a large file:
/// <https://github.com/git-lfs/git-lfs/blob/v3.5.1/docs/spec.md>.
fn is_lfs_pointer(content: &[u8]) -> bool {
    content.starts_with(b"version https://git-lfs")
}

/// The names in a folder, sorted; folders end in a slash.
fn list_folder(folder: &Path) -> Result<Vec<String>, CheckpointError> {
    let mut names = fs::read_dir(folder)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|source| io_error(folder, source))?
        .into_iter()
        .map(|entry| {
            let slash = if entry.path().is_dir() { "/" } else { "" };
            format!("{}{slash}", entry.file_name().display())
        })
        .collect::<Vec<_>>();
    names.sort();
    Ok(names)
}

/// A folder's content in a message: a dozen names at most.
fn listing(names: &[String]) -> String {
    const SHOWN: usize = 12;
    match names {
        [] => "nothing".to_owned(),
        names if names.len() <= SHOWN => names.join(", "),
        names => format!(
            "{} and {} more",
            names[..SHOWN].join(", "),
            names.len() - SHOWN
        ),
    }
}

fn io_error(path: &Path, source: io::Error) -> CheckpointError {
    CheckpointError::Io {
        path: path.to_owned(),
        source,
    }
}
