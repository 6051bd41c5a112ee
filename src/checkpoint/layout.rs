//! The folder layout of diffusers: `model_index.json`, and one folder for each component.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use kiln_models::TensorSource;
use kiln_models::config::ConfigText;
use kiln_models::families::{CheckpointConfigs, CheckpointParts};

use super::CheckpointError;
use super::files::{list_folder, read_text};
use super::safetensors::SafetensorsWeights;

const COMPONENTS: [&str; 5] = [
    "scheduler",
    "text_encoder",
    "tokenizer",
    "transformer",
    "vae",
];

/// File stems under which transformers and diffusers save a component's weights.
const TRANSFORMERS_STEM: &str = "model";
const DIFFUSERS_STEM: &str = "diffusion_pytorch_model";

/// Reads the configurations of a model folder and maps its weight files.
///
/// Reads the header of each safetensors file, and no weights.
pub(super) fn open(folder: &Path) -> Result<CheckpointParts, CheckpointError> {
    check_is_model_folder(folder)?;
    for component in COMPONENTS {
        if !folder.join(component).is_dir() {
            return Err(CheckpointError::ComponentMissing {
                folder: folder.to_owned(),
                component,
            });
        }
    }
    let weights = |component, stem| -> Result<Arc<dyn TensorSource>, CheckpointError> {
        let folder = folder.join(component);
        Ok(Arc::new(SafetensorsWeights::open(&folder, stem)?))
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
    if !path.exists() {
        return Err(CheckpointError::ConfigMissing { path });
    }
    let text = read_text(&path)?;
    let file = path.display().to_string();
    Ok(ConfigText { file, text })
}
