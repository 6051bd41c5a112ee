//! Why a model cannot be opened.

use std::io;
use std::path::{Path, PathBuf};

use kiln_models::FileFault;

/// What to give in place of a model in another layout.
const DIFFUSERS_LAYOUT: &str = "get the same model in diffusers layout (a folder with \
                                model_index.json, transformer/, text_encoder/, vae/, ...), for \
                                example with `hf download Qwen/Qwen-Image`";

/// Why a model cannot be opened. Every message says how to fix it.
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
        "{path} is a link to {target}, which is not there: copy the model with its links followed \
         (cp -aL), or download it again"
    )]
    DanglingLink { path: PathBuf, target: PathBuf },

    #[error(
        "{path} is a LoRA (it has the tensor {tensor}), not a model: give its base model, {base}, and \
         the LoRA with --lora (kiln generate) or in --lora-dir (kiln serve)"
    )]
    Lora {
        path: PathBuf,
        tensor: String,
        base: String,
    },

    #[error(
        "{folder} is a LoRA (it has {file}), not a model: give its base model, {base}, and the LoRA \
         with --lora (kiln generate) or in --lora-dir (kiln serve)"
    )]
    Adapter {
        folder: PathBuf,
        file: &'static str,
        base: String,
    },

    #[error(
        "{folder} holds GGUF files ({}), which cannot be loaded: {DIFFUSERS_LAYOUT}",
        listing(files)
    )]
    Gguf { folder: PathBuf, files: Vec<String> },

    #[error(
        "{folder} holds files for ComfyUI ({}), which cannot be loaded: {DIFFUSERS_LAYOUT}",
        listing(files)
    )]
    ComfyUi { folder: PathBuf, files: Vec<String> },

    #[error("{path} is {what} of a model: give {model}, the model's folder")]
    PartOfModel {
        path: PathBuf,
        what: String,
        model: PathBuf,
    },

    #[error("{folder} is not a model folder, but {} is: give that one", models[0].display())]
    HoldsModel {
        folder: PathBuf,
        models: Vec<PathBuf>,
    },

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
        "{shard} is missing, and so is {index}: the copy is incomplete, download both, or the model \
         again"
    )]
    ShardMissingOf { shard: PathBuf, index: PathBuf },

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

    #[error("{path} is empty: the copy is incomplete, download this file again")]
    Empty { path: PathBuf },

    #[error(
        "{path} is a Git LFS pointer, not the file itself: run `git lfs pull` in the model folder"
    )]
    LfsPointer { path: PathBuf },

    #[error(transparent)]
    File(#[from] FileFault),

    #[error("cannot read {path}")]
    Io { path: PathBuf, source: io::Error },
}

impl CheckpointError {
    pub(super) fn io(path: &Path, source: io::Error) -> Self {
        Self::Io {
            path: path.to_owned(),
            source,
        }
    }
}

/// Joins a folder's entries for a message: at most twelve names, then the number of the others.
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
