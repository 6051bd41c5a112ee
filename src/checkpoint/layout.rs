//! The folder layout of diffusers: `model_index.json`, and one folder for each component.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use kiln_models::TensorSource;
use kiln_models::config::ConfigText;
use kiln_models::families::{CheckpointConfigs, CheckpointParts};

use super::diagnosis;
use super::files::{is_there, read_text, refuse_lfs_pointer};
use super::safetensors::SafetensorsWeights;
use super::{CheckpointError, WeightAccess};

pub(super) const COMPONENTS: [&str; 5] = [
    "scheduler",
    "text_encoder",
    "tokenizer",
    "transformer",
    "vae",
];

const TOKENIZER_FILES: [&str; 5] = [
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "added_tokens.json",
];

/// File stems under which transformers and diffusers save a component's weights.
const TRANSFORMERS_STEM: &str = "model";
const DIFFUSERS_STEM: &str = "diffusion_pytorch_model";

/// Reads the configurations of a model folder and opens its weight files.
///
/// Reads the header of each safetensors file, and the weights if they are to be in memory.
pub(super) fn open(
    folder: &Path,
    access: WeightAccess,
) -> Result<CheckpointParts, CheckpointError> {
    check_is_model_folder(folder)?;
    for component in COMPONENTS {
        let path = folder.join(component);
        if !is_there(&path)? || !path.is_dir() {
            return Err(CheckpointError::ComponentMissing {
                folder: folder.to_owned(),
                component,
            });
        }
    }
    for file in TOKENIZER_FILES {
        // The tokenizer says which of them it needs.
        let path = folder.join("tokenizer").join(file);
        if is_there(&path)? {
            refuse_lfs_pointer(&path)?;
        }
    }
    let weights = |component, stem| -> Result<Arc<dyn TensorSource>, CheckpointError> {
        let folder = folder.join(component);
        Ok(Arc::new(SafetensorsWeights::open(&folder, stem, access)?))
    };
    Ok(CheckpointParts {
        configs: read_configs(folder)?,
        text_encoder: weights("text_encoder", TRANSFORMERS_STEM)?,
        transformer: weights("transformer", DIFFUSERS_STEM)?,
        vae: weights("vae", DIFFUSERS_STEM)?,
    })
}

/// Reads the configurations of a model folder, which needs no weight files.
pub(super) fn open_configs(folder: &Path) -> Result<CheckpointConfigs, CheckpointError> {
    check_is_model_folder(folder)?;
    read_configs(folder)
}

fn check_is_model_folder(folder: &Path) -> Result<(), CheckpointError> {
    if !is_there(folder)? {
        return Err(CheckpointError::FolderMissing {
            path: folder.to_owned(),
        });
    }
    if !folder.is_dir() {
        return Err(diagnosis::of_file(folder));
    }
    let model_index = folder.join("model_index.json");
    if is_there(&model_index)? && model_index.is_file() {
        Ok(())
    } else {
        Err(diagnosis::of_folder(folder))
    }
}

/// Reads the files as text; the model families parse them.
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
    if !is_there(&path)? {
        return Err(CheckpointError::ConfigMissing { path });
    }
    let text = read_text(&path)?;
    let file = path.display().to_string();
    Ok(ConfigText { file, text })
}
