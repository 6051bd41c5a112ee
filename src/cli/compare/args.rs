//! Arguments of `kiln compare`.

use std::ffi::OsString;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use clap::Parser;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use kiln_models::loading::ModelDType;

use crate::backend::{BackendChoice, BackendKind, InvalidChoice};
use crate::checkpoint::DEMO;
use crate::cli::lora_args::LoraArgs;
use crate::cli::shared_args::{NoiseArgs, RequestArgs, VaeArgs, dtypes};

/// Generate one image on several backends and compare them stage by stage.
///
/// Prints how much each backend differs from the reference, from the prompt embeddings to the 8-bit
/// image, and the time of each stage. Exits with code 1 if a stage is over the tolerance. The
/// models are loaded one after the other.
#[derive(Debug, Parser)]
pub(in crate::cli) struct CompareArgs {
    /// Backends to compare, separated by commas, with devices if needed: flex,cuda:1,cuda:0+1
    #[arg(
        long,
        required = true,
        value_delimiter = ',',
        value_name = "BACKENDS",
        value_parser = parse_backend
    )]
    pub(super) backends: Vec<BackendChoice>,

    /// Reference to compare with: a backend, or dump:FILE
    ///
    /// FILE is one that `kiln generate --dump` wrote, or any safetensors file with tensors of the
    /// same names, made by another program from the same prompts, size, steps and seed.
    #[arg(long, value_name = "BACKEND", default_value = "flex")]
    pub(super) reference: Reference,

    /// Folder in diffusers layout, Hugging Face id, or demo
    #[arg(long, value_name = "PATH_OR_ID", default_value = DEMO)]
    pub(super) model: OsString,

    /// Prompt: what the image shows
    #[arg(
        long,
        value_name = "PROMPT",
        allow_hyphen_values = true,
        default_value = "a large red circle on a blue background"
    )]
    pub(super) prompt: String,

    #[command(flatten)]
    pub(super) request: RequestArgs,

    #[command(flatten)]
    pub(super) noise: NoiseArgs,

    #[command(flatten)]
    pub(super) lora: LoraArgs,

    /// Report to write; the extension chooses the format: .html, .json or .md
    ///
    /// The HTML file shows the images side by side, where they differ, and the difference after
    /// every step. It loads no other file. Existing files are replaced.
    #[arg(long, value_name = "FILE")]
    pub(super) report: Option<PathBuf>,

    /// Largest difference of a stage, relative to the stage's largest magnitude [default: by
    /// --dtype, 1e-3 in f32, 1e-1 in bf16, 1e-2 in f16]
    ///
    /// The bound of the 8-bit image does not change: 99.9 % equal values in f32, a PSNR of 36 dB in
    /// bf16, 54 dB in f16.
    #[arg(long, value_name = "DIFFERENCE", value_parser = parse_tolerance)]
    pub(super) tolerance: Option<f64>,

    /// Type of the weights, the same on all backends
    #[arg(
        long,
        default_value = "f32",
        value_parser = PossibleValuesParser::new(dtypes())
            .try_map(|name| ModelDType::named(&name).ok_or("no such type"))
    )]
    pub(super) dtype: ModelDType,

    #[command(flatten)]
    pub(super) vae: VaeArgs,
}

/// The run that the others are compared with.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Reference {
    Backend(BackendChoice),
    Dump(PathBuf),
}

impl Reference {
    pub(super) fn backend(&self) -> Option<&BackendChoice> {
        match self {
            Self::Backend(backend) => Some(backend),
            Self::Dump(_) => None,
        }
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Backend(backend) => backend.fmt(formatter),
            Self::Dump(path) => write!(formatter, "dump:{}", path.display()),
        }
    }
}

impl FromStr for Reference {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.strip_prefix("dump:") {
            Some(path) => Ok(Self::Dump(path.into())),
            None => parse_backend(text).map(Self::Backend),
        }
    }
}

/// Any backend but auto, which may be the same as another one.
fn parse_backend(text: &str) -> Result<BackendChoice, String> {
    let choice: BackendChoice = text
        .parse()
        .map_err(|error: InvalidChoice| error.to_string())?;
    if choice.kind() == BackendKind::Auto {
        return Err("name the backend: auto may be one that is named already".to_owned());
    }
    Ok(choice)
}

fn parse_tolerance(text: &str) -> Result<f64, String> {
    let value = text.parse().ok();
    value
        .filter(|value: &f64| value.is_finite() && *value >= 0.0)
        .ok_or_else(|| "a tolerance is a number of at least 0, such as 1e-3".to_owned())
}
