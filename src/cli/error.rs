//! The one error of all commands, its exit code and its tip.

use std::env;
use std::io;
use std::path::PathBuf;

use kiln_models::step_cache::CacheError;

use crate::adapters::AdapterError;
use crate::backend::{BackendChoice, BackendError, InvalidChoice};
use crate::bench::{CalibrationError, LoraBenchError};
use crate::compare::{CompareError, ReportError};
use crate::engine::{JobError, StartError, SubmitError};
use crate::image::{EncodeError, ImageFormat, SideTooLong};
use crate::jobs::webhook::InvalidWebhookSecret;
use crate::jobs::{InvalidLocation, JobsLocation, StoreError};
use crate::request::{InvalidCache, InvalidPrompt, InvalidRequest, MAX_PROMPT_BYTES};
use crate::runtime::RuntimeError;
use crate::server::InvalidApiKey;
use crate::telemetry::TelemetryError;
use crate::tokenizer::TokenizerError;

use super::args::API_KEY;
use super::dump::DumpError;
use super::health::NoAnswer;
use super::jobs::JobsError;

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum CliError {
    #[error(transparent)]
    Request(#[from] InvalidRequest),
    #[error(transparent)]
    Prompt(#[from] InvalidPrompt),
    #[error("--vae-tile-stride must be from 1 to --vae-tile-size, which is {size}, got {stride}")]
    Tiles { size: usize, stride: usize },
    #[error("{} does not end in .png, .jpg or .webp, which are the files that can be written", path.display())]
    Extension { path: PathBuf },
    #[error("{} does not end in .html, .json or .md, so the format is not known", path.display())]
    ReportExtension { path: PathBuf },
    #[error(
        "--backends names nothing but the reference {reference}: name a backend to compare with it"
    )]
    NothingToCompare { reference: String },
    #[error(
        "--cache-backend {backend} is not available: for Qwen-Image there are cache_dit, mag_cache, \
         balanced and fast, or none"
    )]
    CacheBackend { backend: String },
    #[error("--cache-config for --cache-backend {backend}: {error}")]
    CacheConfig {
        backend: String,
        error: InvalidCache,
    },
    #[error("--cache-config cannot be used")]
    CacheBlocks(#[source] CacheError),
    #[error("--default-negative-prompt cannot be used")]
    DefaultNegativePrompt(#[source] TokenizerError),
    #[error(transparent)]
    ApiKey(#[from] InvalidApiKey),
    #[error("{}", empty_api_key())]
    EmptyApiKey,
    #[error("stdin cannot be read for the prompt")]
    Stdin(#[source] io::Error),
    #[error("the prompt on stdin is empty")]
    EmptyStdin,
    #[error("the prompt on stdin has more than {MAX_PROMPT_BYTES} bytes: shorten it")]
    LongStdin,
    #[error("the prompt on stdin is not UTF-8: the byte at {at} is not valid")]
    StdinEncoding { at: usize },
    #[error("--output - writes one image to stdout, and not {num_images}")]
    SeveralToStdout { num_images: usize },
    #[error("--output - and --json cannot both write to stdout")]
    JsonToStdout,
    #[error("--output - would write a PNG file to the terminal")]
    ImageToTerminal,
    #[error("only an image can be written to stdout: name a file, or ./- for a file of that name")]
    FileToStdout,
    #[error("{} would be written twice: name another file", path.display())]
    SameFile { path: PathBuf },
    #[error(transparent)]
    Side(#[from] SideTooLong),
    #[error("{} is a folder, not a file to write to", path.display())]
    OutputIsFolder { path: PathBuf },
    #[error("there is no folder {} to write to", folder.display())]
    NoOutputFolder { folder: PathBuf },
    #[error("cannot write {}", path.display())]
    Write { path: PathBuf, source: io::Error },
    #[error(
        "there is no adapter {}{}", given.display(), known_adapters(known)
    )]
    NoAdapter {
        given: PathBuf,
        /// Names that could be given.
        known: Vec<String>,
    },
    #[error(transparent)]
    Adapter(#[from] AdapterError),
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    #[error(transparent)]
    Choice(#[from] InvalidChoice),
    #[error(transparent)]
    Backend(#[from] BackendError),
    #[error(transparent)]
    Submit(#[from] SubmitError),
    #[error(transparent)]
    Job(#[from] JobError),
    #[error("the run on {backend} failed")]
    Run {
        backend: BackendChoice,
        source: JobError,
    },
    #[error(transparent)]
    Compare(#[from] CompareError),
    #[error("over the tolerance, compared with {reference}: {}", names.join(", "))]
    OverTolerance {
        names: Vec<String>,
        reference: String,
    },
    #[error(transparent)]
    Report(#[from] ReportError),
    #[error(transparent)]
    StepCache(#[from] CacheError),
    #[error("the ratios of the step cache cannot be measured")]
    Calibration(#[from] CalibrationError),
    #[error("the cost of LoRAs cannot be measured")]
    LoraBench(#[from] LoraBenchError),
    #[error(transparent)]
    Dump(#[from] DumpError),
    #[error("an image cannot be encoded")]
    Encode(#[from] EncodeError),
    #[error("an image cannot be written as sixels")]
    Sixel(#[source] icy_sixel::SixelError),
    #[error("the report cannot be written as JSON")]
    Json(#[source] serde_json::Error),
    #[error("there is no manual page of {name:?}; the commands are {}", commands.join(", "))]
    NoSuchPage { name: String, commands: Vec<String> },
    #[error("{host}:{port} {error}")]
    Health {
        host: String,
        port: u16,
        error: NoAnswer,
    },
    #[error(transparent)]
    JobsCommand(#[from] JobsError),
    #[error("there is no folder for compiled kernels: neither XDG_CACHE_HOME nor HOME is set")]
    NoCacheFolder,
    #[error("the kernels in {} cannot be read or removed", folder.display())]
    Cache { folder: PathBuf, source: io::Error },
    #[error("not ready: {readiness}")]
    NotReadyYet { readiness: String },
    #[error("not ready: the answer is {status_line:?}")]
    NotReady { status_line: String },
    #[error("cannot write to stdout")]
    Stdout(#[source] io::Error),
    #[error("cannot listen on {host}:{port}")]
    Listen {
        host: String,
        port: u16,
        source: io::Error,
    },
    #[error(
        "--role {role} needs the jobs that the servers share: give --jobs nats://HOST, or leave --role \
         out"
    )]
    RoleWithoutJobs { role: &'static str },
    #[error(
        "--role {role} cannot work on the jobs in the folder {folder}, which one server has for itself: \
         give --jobs nats://HOST to share jobs, or leave --role out"
    )]
    RoleOfFolder { role: &'static str, folder: String },
    #[error("--jobs {0}")]
    JobsLocation(InvalidLocation),
    #[error("--webhook-secret cannot be used")]
    WebhookSecret(#[from] InvalidWebhookSecret),
    #[error("the store of jobs, --jobs {location}, cannot be opened: {error}")]
    Jobs {
        location: JobsLocation,
        error: StoreError,
    },
    #[error("the server cannot start")]
    Start(#[source] StartError),
    #[error(transparent)]
    Telemetry(#[from] TelemetryError),
    #[error("the server ended")]
    Server(#[source] io::Error),
}

impl CliError {
    /// 2 for invalid arguments, as clap does, 3 to 5 for jobs without images, otherwise 1.
    pub(super) fn exit_code(&self) -> u8 {
        match self {
            Self::Request(_)
            | Self::Prompt(_)
            | Self::Tiles { .. }
            | Self::CacheBackend { .. }
            | Self::CacheConfig { .. }
            | Self::CacheBlocks(_)
            | Self::Backend(BackendError::TooFewDevices { .. })
            | Self::Runtime(RuntimeError::Backend(BackendError::TooFewDevices { .. }))
            | Self::DefaultNegativePrompt(_)
            | Self::ApiKey(_)
            | Self::EmptyApiKey
            | Self::Telemetry(_)
            | Self::EmptyStdin
            | Self::LongStdin
            | Self::StdinEncoding { .. }
            | Self::SeveralToStdout { .. }
            | Self::JsonToStdout
            | Self::ImageToTerminal
            | Self::FileToStdout
            | Self::SameFile { .. }
            | Self::Side(_)
            | Self::StepCache(_)
            | Self::Choice(_)
            | Self::Extension { .. }
            | Self::ReportExtension { .. }
            | Self::NothingToCompare { .. }
            | Self::NoSuchPage { .. }
            | Self::NoAdapter { .. }
            | Self::RoleWithoutJobs { .. }
            | Self::RoleOfFolder { .. }
            | Self::JobsLocation(_)
            | Self::WebhookSecret(_)
            | Self::Adapter(_)
            | Self::OutputIsFolder { .. }
            | Self::Submit(SubmitError::TooLarge(_) | SubmitError::Adapters(_)) => 2,
            Self::JobsCommand(error) => error.exit_code(),
            _ => 1,
        }
    }

    /// What the user can do, where the message itself does not say it.
    pub(super) fn tip(&self) -> Option<String> {
        match self {
            Self::Extension { path } => Some(format!(
                "use --output {}",
                path.with_extension("png").display()
            )),
            Self::SeveralToStdout { .. } | Self::JsonToStdout => {
                Some("name a file: --output out.png".to_owned())
            }
            Self::ImageToTerminal => {
                Some("name a file, or send stdout to a program or a file".to_owned())
            }
            Self::Side(error) if error.format == ImageFormat::Png => {
                Some("choose a smaller size".to_owned())
            }
            Self::Side(_) => {
                Some("choose a smaller size, or an --output that ends in .png".to_owned())
            }
            Self::OutputIsFolder { path } => Some(format!(
                "name a file in it, such as {}",
                path.join("out.png").display()
            )),
            Self::NoOutputFolder { folder } => {
                Some(format!("make it first: mkdir -p {}", folder.display()))
            }
            Self::JobsCommand(error) => error.tip(),
            Self::Listen { source, .. } if source.kind() == io::ErrorKind::AddrInUse => {
                Some("another program has that port: choose a different one with --port".to_owned())
            }
            _ => None,
        }
    }
}

fn known_adapters(names: &[String]) -> String {
    match names {
        [] => String::new(),
        [name] => format!(": there is {name}"),
        names => format!(": there are {}", names.join(", ")),
    }
}

/// An empty key never means that no key is needed.
fn empty_api_key() -> String {
    if env::var_os(API_KEY).is_some_and(|value| value.is_empty()) {
        format!("{API_KEY} is set and empty: unset it, or give a key")
    } else {
        "an API key is empty: give a key, or leave it out".to_owned()
    }
}
