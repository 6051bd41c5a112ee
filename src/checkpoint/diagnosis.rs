//! What a path is that is no model folder, for a message that says what to give instead.

use std::path::{Path, PathBuf};

use super::files::{is_there, list_folder, read_text, refuse_lfs_pointer};
use super::layout::COMPONENTS;
use super::safetensors::tensor_names;
use super::{CheckpointError, QWEN_IMAGE};

/// The file that describes an adapter in the layout of peft.
const ADAPTER: &str = "adapter_config.json";

/// Parts of tensor names that only adapters have: of peft, diffusers, kohya-ss and lycoris.
const ADAPTER_PARTS: [&str; 8] = [
    "lora_", ".lora.", "lokr_", "loha_", "hada_", "oft_", "dora_", ".diff_b",
];

/// Folders that models for `ComfyUI` are distributed in.
const COMFY_FOLDERS: [&str; 3] = ["split_files/", "diffusion_models/", "text_encoders/"];

/// Endings of files that hold a whole model, or one network of it.
const SINGLE_FILES: [&str; 6] = ["safetensors", "gguf", "ckpt", "pt", "pth", "bin"];

/// Why a file is no model.
pub(super) fn of_file(path: &Path) -> CheckpointError {
    let folder = parent_of(path);
    let own_name = path.file_name().unwrap_or_default().display().to_string();
    if is_model(&folder) {
        return CheckpointError::PartOfModel {
            path: path.to_owned(),
            what: format!("the {own_name}"),
            model: folder,
        };
    }
    let model = parent_of(&folder);
    if is_model(&model) {
        let what = format!("a file of {}", component(&folder));
        let path = path.to_owned();
        return CheckpointError::PartOfModel { path, what, model };
    }
    match refuse_lfs_pointer(path) {
        Err(error) => error,
        Ok(()) => lora(path).unwrap_or_else(|| CheckpointError::IsFile {
            path: path.to_owned(),
        }),
    }
}

/// Why a folder without `model_index.json` is no model.
pub(super) fn of_folder(folder: &Path) -> CheckpointError {
    let found = match list_folder(folder) {
        Ok(found) => found,
        Err(error) => return error,
    };
    let folder = folder.to_owned();
    let model = parent_of(&folder);
    if is_model(&model) {
        let what = component(&folder);
        return CheckpointError::PartOfModel {
            path: folder,
            what,
            model,
        };
    }
    let folders = found.iter().filter(|name| name.ends_with('/'));
    let models = folders.map(|name| folder.join(name.trim_end_matches('/')));
    let models: Vec<PathBuf> = models.filter(|folder| is_model(folder)).collect();
    if !models.is_empty() {
        return CheckpointError::HoldsModel { folder, models };
    }
    if found.iter().any(|name| name == ADAPTER) {
        return CheckpointError::Adapter {
            base: base_model(&folder),
            file: ADAPTER,
            folder,
        };
    }
    let single_files: Vec<String> = (found.iter().filter(|name| is_single_file(name)))
        .cloned()
        .collect();
    let paths = single_files.iter().map(|name| folder.join(name));
    if let Some(error) = paths.map(|path| is_there(&path)).find_map(Result::err) {
        return error;
    }
    if let Some(lora) = single_files
        .iter()
        .find_map(|name| lora(&folder.join(name)))
    {
        return lora;
    }
    let comfy = found.iter().filter(|name| {
        let name = name.to_ascii_lowercase();
        COMFY_FOLDERS.contains(&name.as_str())
    });
    let files: Vec<String> = comfy.cloned().collect();
    if !files.is_empty() {
        return CheckpointError::ComfyUi { folder, files };
    }
    match single_files.as_slice() {
        [] => CheckpointError::NotAModelFolder { folder, found },
        [file] => CheckpointError::SingleFile {
            folder,
            file: file.clone(),
        },
        files if files.iter().any(|name| has_extension(name, "gguf")) => CheckpointError::Gguf {
            folder,
            files: single_files,
        },
        _ => CheckpointError::NotAModelFolder { folder, found },
    }
}

fn is_single_file(name: &str) -> bool {
    SINGLE_FILES
        .iter()
        .any(|extension| has_extension(name, extension))
}

fn has_extension(name: &str, extension: &str) -> bool {
    Path::new(name)
        .extension()
        .is_some_and(|found| found.eq_ignore_ascii_case(extension))
}

fn is_model(folder: &Path) -> bool {
    folder.join("model_index.json").is_file()
}

/// The folder that a path is in. The last part of the path may be missing, or dots.
fn parent_of(path: &Path) -> PathBuf {
    let named = path.file_name().and_then(|_| path.parent());
    match named {
        Some(parent) if parent.as_os_str().is_empty() => PathBuf::from("."),
        Some(parent) => parent.to_owned(),
        None => {
            let real = path.canonicalize();
            let parent = real.ok().and_then(|real| Some(real.parent()?.to_owned()));
            parent.unwrap_or_else(|| path.join(".."))
        }
    }
}

/// What a folder inside of a model's folder is.
fn component(folder: &Path) -> String {
    let real = folder.canonicalize().unwrap_or_default();
    let name = folder.file_name().or(real.file_name()).unwrap_or_default();
    if COMPONENTS.iter().any(|component| name == *component) {
        format!("the {}", name.display())
    } else {
        "a part".to_owned()
    }
}

/// The error of a file that is an adapter.
fn lora(path: &Path) -> Option<CheckpointError> {
    let names = has_extension(&path.to_string_lossy(), "safetensors")
        .then(|| tensor_names(path))?
        .ok()?;
    let is_of_adapter = |name: &&String| ADAPTER_PARTS.iter().any(|part| name.contains(part));
    Some(CheckpointError::Lora {
        path: path.to_owned(),
        tensor: names.iter().find(is_of_adapter)?.clone(),
        base: base_model(&parent_of(path)),
    })
}

/// The model that an adapter in a folder is for, or an example.
fn base_model(folder: &Path) -> String {
    let text = read_text(&folder.join(ADAPTER)).ok();
    let config = text.and_then(|text| serde_json::from_str::<serde_json::Value>(&text).ok());
    let base =
        config.and_then(|config| Some(config["base_model_name_or_path"].as_str()?.to_owned()));
    base.filter(|base| !base.is_empty())
        .unwrap_or_else(|| format!("such as {QWEN_IMAGE}"))
}
