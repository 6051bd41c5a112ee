//! Arguments of `kiln generate`.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Parser, ValueEnum};

use crate::cli::error::CliError;
use crate::cli::lora_args::LoraArgs;
use crate::cli::prompt_args::PromptArgs;
use crate::cli::shared_args::{BackendArgs, LoadArgs, NoiseArgs, RequestArgs};
use crate::request::{GenerationParams, Integer};
use crate::runtime::ModelSettings;

/// Generate images from one prompt and write them to files.
///
/// Prints one line for each image: its path, its size and its seed. Progress goes to stderr, and so
/// do the images on a terminal that can show them.
#[derive(Debug, Parser)]
pub(in crate::cli) struct GenerateArgs {
    #[command(flatten)]
    prompt: PromptArgs,

    /// Folder in diffusers layout, Hugging Face id, or demo [default: demo]
    ///
    /// An id such as Qwen/Qwen-Image is downloaded unless the Hugging Face cache has it. demo is
    /// the small model in this program, which generates one coloured shape on a coloured background.
    #[arg(long, value_name = "PATH_OR_ID")]
    model: Option<OsString>,

    #[command(flatten)]
    pub(super) request: RequestArgs,

    #[command(flatten)]
    pub(super) noise: NoiseArgs,

    #[command(flatten)]
    pub(super) lora: LoraArgs,

    /// Images to generate, from 1 to 10 [default: 1]
    ///
    /// They share the seed and are generated together: time and memory are proportional to their
    /// number.
    #[arg(long, value_name = "COUNT", allow_negative_numbers = true)]
    num_images: Option<Integer>,

    /// Image file to write: .png, .jpg or .webp; - writes one PNG file to stdout
    ///
    /// With several images out.png becomes out-0.png, out-1.png and so on. An existing file is
    /// replaced when the new one is complete.
    #[arg(long, short, value_name = "FILE", default_value = "out.png")]
    pub(super) output: PathBuf,

    /// Write no generation parameters into PNG files
    ///
    /// By default PNG files contain the prompt, the seed and the settings as text, as
    /// AUTOMATIC1111's web UI writes them.
    #[arg(long)]
    pub(super) no_metadata: bool,

    /// Also write the intermediate results to a safetensors file
    ///
    /// Token ids, prompt embeddings, noise, the latents after each step and the image before
    /// rounding, to compare runs with `kiln compare`. Takes more time and memory.
    #[arg(long, value_name = "FILE")]
    pub(super) dump: Option<PathBuf>,

    /// Print JSON: the files, the parameters, and the time of each stage
    ///
    /// Stdout then contains one object and nothing else. If the command fails, the object's only
    /// key is `error`, with `message`, `tip` and `exit_code`; stderr has the message too.
    #[arg(long)]
    pub(in crate::cli) json: bool,

    /// Whether and how to show the images on the terminal
    ///
    /// auto asks the terminal which protocol it supports. It shows nothing if stdout or stderr is
    /// not a terminal, or with --json or --quiet. The other values use their protocol without
    /// asking. Images go to stderr.
    #[arg(long, value_enum, default_value_t = Show::Auto, value_name = "HOW")]
    pub(super) show: Show,

    /// Print warnings, errors and the paths of the images only
    #[arg(long, short)]
    pub(in crate::cli) quiet: bool,

    #[command(flatten)]
    pub(super) backend: BackendArgs,

    #[command(flatten)]
    pub(super) loading: LoadArgs,
}

impl GenerateArgs {
    pub(super) fn model_settings(&self) -> ModelSettings {
        self.loading.model_settings(self.model.as_deref())
    }

    /// The parameters of the request. Reads a prompt that is `-` from stdin.
    pub(in crate::cli) fn params(&self) -> Result<GenerationParams, CliError> {
        let prompt = self.prompt.read()?;
        Ok(GenerationParams {
            num_images: self.num_images.map(|Integer(images)| images),
            ..self.request.params(prompt)
        })
    }
}

/// How the terminal shows images.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(in crate::cli) enum Show {
    Auto,
    Kitty,
    Iterm2,
    Sixel,
    Never,
}
