//! Arguments of adapters.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;
use clap::builder::{OsStringValueParser, TypedValueParser};
use serde_json::{Value, json};

use kiln_models::adapter::Adapter;

use crate::adapters::{AdapterError, AdapterSettings, AdapterStore};
use crate::request::{ChosenAdapter, GivenAdapter, Limits, MAX_ADAPTER_SCALE};
use crate::runtime::Model;

use super::error::CliError;

/// An adapter on the command line, `FILE[:SCALE]` or `NAME[:SCALE]`.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct WrittenLora {
    /// The file, or the name.
    file: PathBuf,
    scale: Option<f64>,
}

/// The adapters of a command that generates images.
#[derive(Debug, Args)]
#[command(next_help_heading = "Adapters")]
pub(super) struct LoraArgs {
    /// LoRA adapter to generate with, and its scale [default: 1]; may be repeated
    ///
    /// A safetensors file, a folder as PEFT saves it, or the name of an adapter of the demo model. The
    /// recipe of the adapter, from a JSON file beside it, from its header or by its name, gives the steps,
    /// the noise levels and the guidance scale that are left out. A colon in a path is no problem, unless
    /// a number follows it at the end.
    #[arg(long, value_name = "FILE[:SCALE]", value_parser = OsStringValueParser::new().map(WrittenLora::parse))]
    lora: Vec<WrittenLora>,

    /// LoRA adapter to merge into the model's weights as they are loaded, and its scale [default: 1]
    ///
    /// As --lora, and every step takes as long as without an adapter. In 16 bits, merging rounds a small
    /// change away in part.
    #[arg(long, value_name = "FILE[:SCALE]", value_parser = OsStringValueParser::new().try_map(WrittenLora::parse_merged))]
    lora_merge: Option<WrittenLora>,

    /// Accept adapters that also change the text encoder, and leave these changes out
    ///
    /// By default such adapters are refused.
    #[arg(long)]
    lora_ignore_text_encoder: bool,
}

/// A model with the adapters of a command.
#[derive(Debug)]
pub(super) struct WithLoras {
    pub(super) model: Model,
    /// Those of the model, with the adapters.
    pub(super) limits: Limits,
    pub(super) given: Vec<GivenAdapter>,
    store: AdapterStore,
}

impl LoraArgs {
    /// Reads the headers of the adapters' files, and merges the one that is to be merged.
    pub(super) fn add_to(&self, model: Model) -> Result<WithLoras, CliError> {
        let store = model.open_adapters(AdapterSettings {
            dir: None,
            host_cache_bytes: u64::MAX,
            ignore_text_encoder: self.lora_ignore_text_encoder,
        })?;
        let mut given = Vec::new();
        for WrittenLora { file, scale } in &self.lora {
            let name = name_of(file, &store)?;
            given.push(GivenAdapter {
                name,
                scale: *scale,
            });
        }
        let merge = self.lora_merge.as_ref();
        let merge = merge.map(|WrittenLora { file, scale }| {
            let file = name_of(file, &store)?.into();
            Ok::<_, CliError>(WrittenLora {
                file,
                scale: *scale,
            })
        });
        let model = merged(model, &store, merge.transpose()?.as_ref())?;
        let limits = Limits {
            adapters: store.catalogue(),
            ..model.limits().clone()
        };
        Ok(WithLoras {
            model,
            limits,
            given,
            store,
        })
    }
}

impl WithLoras {
    /// Reads the weights of a request's adapters.
    pub(super) fn weights(&self, chosen: &[ChosenAdapter]) -> Result<Vec<Arc<Adapter>>, CliError> {
        let names = chosen.iter().map(|chosen| &chosen.info.name);
        let weights: Result<_, AdapterError> = names.map(|name| self.store.get(name)).collect();
        Ok(weights?)
    }
}

/// The name of the adapter in a file, which is added to the store, or of one that the model brings.
fn name_of(file: &Path, store: &AdapterStore) -> Result<String, CliError> {
    let name = file
        .to_str()
        .filter(|name| store.catalogue().get(name).is_some());
    match name {
        Some(name) if !file.exists() => Ok(name.to_owned()),
        None if !file.exists() => {
            let adapters = store.catalogue();
            let known = adapters.iter().map(|info| info.name.clone()).collect();
            let given = file.to_owned();
            Err(CliError::NoAdapter { given, known })
        }
        _ => Ok(store.add_file(file)?),
    }
}

/// The model with an adapter of the store merged into it, which is no longer on the store's list.
pub(super) fn merged(
    model: Model,
    store: &AdapterStore,
    adapter: Option<&WrittenLora>,
) -> Result<Model, CliError> {
    let Some(WrittenLora { file, scale }) = adapter else {
        return Ok(model);
    };
    let name = file.to_string_lossy();
    if let Some(reason) = store.why_unusable(&name) {
        let name = name.into_owned();
        return Err(AdapterError::Unusable { name, reason }.into());
    }
    let adapters = store.catalogue();
    let Some(info) = adapters.get(&name) else {
        let known = adapters.iter().map(|info| info.name.clone()).collect();
        let given = file.clone();
        return Err(CliError::NoAdapter { given, known });
    };
    let weights = store.get(&name)?;
    store.remove(&name)?;
    let chosen = ChosenAdapter {
        info: Arc::clone(info),
        scale: scale.unwrap_or(1.0),
    };
    Ok(model.with_merged(weights, chosen))
}

impl WrittenLora {
    /// An adapter of a server's, as a request names it.
    pub(super) fn to_json(&self) -> Value {
        let name = self.file.to_string_lossy();
        match self.scale {
            Some(scale) => json!({ "name": name, "scale": scale }),
            None => json!({ "name": name }),
        }
    }

    /// Splits at the last colon if a number follows it.
    pub(super) fn parse(text: OsString) -> Self {
        let parts = text.to_str().and_then(|text| text.rsplit_once(':'));
        let split = parts.and_then(|(file, scale)| Some((file.into(), scale.parse().ok()?)));
        match split {
            Some((file, scale)) => Self {
                file,
                scale: Some(scale),
            },
            None => Self {
                file: text.into(),
                scale: None,
            },
        }
    }

    /// As [`WrittenLora::parse`], with the bounds of a scale that changes something.
    pub(super) fn parse_merged(text: OsString) -> Result<Self, String> {
        let written = Self::parse(text);
        let scale = written.scale.unwrap_or(1.0);
        if scale as f32 == 0.0 || !(-MAX_ADAPTER_SCALE..=MAX_ADAPTER_SCALE).contains(&scale) {
            return Err(format!(
                "the scale must be from -{MAX_ADAPTER_SCALE} to {MAX_ADAPTER_SCALE} and not 0, got {scale}"
            ));
        }
        Ok(written)
    }
}

/// The adapters that a server has.
#[derive(Debug, Args)]
#[command(next_help_heading = "Adapters")]
#[expect(clippy::doc_markdown, reason = "clap prints the comments as they are")]
pub(super) struct LoraServeArgs {
    /// Folder of LoRA adapters that requests may name
    ///
    /// The file style/ink.safetensors in it is the adapter style/ink, and so is a folder style/ink as
    /// PEFT saves it. Other files are never read.
    #[arg(long, value_name = "DIR")]
    lora_dir: Option<PathBuf>,

    /// Bytes of adapters that are kept in host memory, such as 512MiB or 4G
    ///
    /// The adapter that was used last is dropped last. Requests whose adapters do not fit beside those in
    /// use wait.
    #[arg(long, value_name = "SIZE", value_parser = parse_size, default_value = "4GiB")]
    lora_host_cache: u64,

    /// Bytes of adapters that are kept on the device, such as 512MiB or 4G
    ///
    /// Adapters of running requests are never dropped: a request whose adapters do not fit beside them
    /// waits, and one whose adapters do not fit at all is refused.
    #[arg(long, value_name = "SIZE", value_parser = parse_size, default_value = "2GiB")]
    pub(super) lora_cache: u64,

    /// Let clients change the list of adapters with POST /v1/load_lora_adapter and
    /// /v1/unload_lora_adapter
    ///
    /// Clients can list files of the folder only. With --api-key they need a key.
    #[arg(long)]
    pub(super) enable_lora_updates: bool,

    /// Accept adapters that also change the text encoder, and leave these changes out
    ///
    /// By default such adapters are refused.
    #[arg(long)]
    lora_ignore_text_encoder: bool,

    /// Adapter to merge into the model's weights as they are loaded, and its scale [default: 1]
    ///
    /// One of --lora-dir, or of the demo model. It is in every image, without a cost at run time, and its
    /// recipe gives the steps and the guidance scale of requests. Requests cannot name it. In 16 bits,
    /// merging rounds a small change away in part; adapters that requests name are not merged.
    #[arg(long, value_name = "NAME[:SCALE]", value_parser = OsStringValueParser::new().try_map(WrittenLora::parse_merged))]
    pub(super) lora_merge: Option<WrittenLora>,
}

impl LoraServeArgs {
    pub(super) fn settings(&self) -> AdapterSettings {
        AdapterSettings {
            dir: self.lora_dir.clone(),
            host_cache_bytes: self.lora_host_cache,
            ignore_text_encoder: self.lora_ignore_text_encoder,
        }
    }
}

/// Units of a size, with their powers of two; those with a `B` alone are powers of ten.
const UNITS: &[(&str, u64)] = &[
    ("", 1),
    ("B", 1),
    ("K", 1 << 10),
    ("KIB", 1 << 10),
    ("KB", 1_000),
    ("M", 1 << 20),
    ("MIB", 1 << 20),
    ("MB", 1_000_000),
    ("G", 1 << 30),
    ("GIB", 1 << 30),
    ("GB", 1_000_000_000),
    ("T", 1 << 40),
    ("TIB", 1 << 40),
    ("TB", 1_000_000_000_000),
];

/// Reads a number of bytes, such as `1048576`, `1MiB` or `1.5G`.
pub(super) fn parse_size(text: &str) -> Result<u64, String> {
    let wrong = || "give a number of bytes, such as 1048576, 512MiB or 1.5G".to_owned();
    let text = text.trim();
    let end = text.find(|letter: char| !letter.is_ascii_digit() && letter != '.');
    let (number, unit) = text.split_at(end.unwrap_or(text.len()));
    let unit = unit.trim().to_uppercase();
    let unit = UNITS.iter().find(|(name, _)| *name == unit);
    let (_, unit) = unit.ok_or_else(wrong)?;
    if let Ok(whole) = number.parse::<u64>() {
        return whole.checked_mul(*unit).ok_or_else(wrong);
    }
    let number: f64 = number.parse().map_err(|_| wrong())?;
    let bytes = number * *unit as f64;
    let is_size = bytes.is_finite() && bytes < u64::MAX as f64;
    if is_size {
        Ok(bytes as u64)
    } else {
        Err(wrong())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_after_the_last_colon_is_the_scale() {
        for (text, file, scale) in [
            ("ink", "ink", None),
            ("ink.safetensors:0.8", "ink.safetensors", Some(0.8)),
            ("ink:-1", "ink", Some(-1.0)),
            ("ink:0", "ink", Some(0.0)),
            ("ink:1e-1", "ink", Some(0.1)),
            (
                r"C:\loras\ink.safetensors",
                r"C:\loras\ink.safetensors",
                None,
            ),
            (
                r"C:\loras\ink.safetensors:0.5",
                r"C:\loras\ink.safetensors",
                Some(0.5),
            ),
            ("a:b/ink", "a:b/ink", None),
            ("a:1:2", "a:1", Some(2.0)),
            ("ink:", "ink:", None),
            ("ink:0.8x", "ink:0.8x", None),
        ] {
            let written = WrittenLora {
                file: file.into(),
                scale,
            };
            assert_eq!(WrittenLora::parse(text.into()), written, "{text}");
        }
        for text in ["ink", "ink:8", "ink:-0.5"] {
            assert!(WrittenLora::parse_merged(text.into()).is_ok(), "{text}");
        }
        for text in ["ink:0", "ink:8.1", "ink:nan", "ink:inf", "ink:1e-50"] {
            assert!(WrittenLora::parse_merged(text.into()).is_err(), "{text}");
        }
    }

    #[test]
    fn sizes_have_units() {
        for (text, bytes) in [
            ("0", 0),
            ("1048576", 1 << 20),
            ("512MiB", 512 << 20),
            ("4G", 4 << 30),
            ("4 gib", 4 << 30),
            ("1.5k", 1536),
            ("2GB", 2_000_000_000),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for text in ["", "G", "-1", "1X", "1e3", "1.2.3", "99999999999T"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }
}
