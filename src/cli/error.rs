//! The one error of all commands, its exit code and its tip.

use std::io;
use std::path::PathBuf;

use crate::backend::{BackendChoice, BackendError, InvalidChoice};
use crate::compare::{CompareError, ReportError};
use crate::engine::{JobError, StartError, SubmitError};
use crate::image::EncodeError;
use crate::request::{InvalidPrompt, InvalidRequest};
use crate::runtime::RuntimeError;
use crate::server::InvalidApiKey;
use crate::tokenizer::TokenizerError;

use super::dump::DumpError;

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
        "--cfg-parallel-size {size} is not available: both halves of guidance run on one device, \
         in one pass; leave it at 1"
    )]
    CfgParallel { size: usize },
    #[error("--default-negative-prompt cannot be used")]
    DefaultNegativePrompt(#[source] TokenizerError),
    #[error(transparent)]
    ApiKey(#[from] InvalidApiKey),
    #[error("{} is a folder, not a file to write to", path.display())]
    OutputIsFolder { path: PathBuf },
    #[error("there is no folder {} to write to", folder.display())]
    NoOutputFolder { folder: PathBuf },
    #[error("cannot write {}", path.display())]
    Write { path: PathBuf, source: io::Error },
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
    Dump(#[from] DumpError),
    #[error("an image cannot be encoded")]
    Encode(#[from] EncodeError),
    #[error("an image cannot be written as sixels")]
    Sixel(#[source] icy_sixel::SixelError),
    #[error("the report cannot be written as JSON")]
    Json(#[source] serde_json::Error),
    #[error("there is no manual page of {name:?}; the commands are {}", commands.join(", "))]
    NoSuchPage { name: String, commands: Vec<String> },
    #[error("{host}:{port} does not answer")]
    Health {
        host: String,
        port: u16,
        source: io::Error,
    },
    #[error("there is no folder for compiled kernels: neither XDG_CACHE_HOME nor HOME is set")]
    NoCacheFolder,
    #[error("the kernels in {} cannot be read or removed", folder.display())]
    Cache { folder: PathBuf, source: io::Error },
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
    #[error("the server cannot start")]
    Start(#[source] StartError),
    #[error("the server ended")]
    Server(#[source] io::Error),
}

impl CliError {
    /// 2 for invalid arguments, as clap does, otherwise 1.
    pub(super) fn exit_code(&self) -> u8 {
        match self {
            Self::Request(_)
            | Self::Prompt(_)
            | Self::Tiles { .. }
            | Self::CfgParallel { .. }
            | Self::DefaultNegativePrompt(_)
            | Self::ApiKey(_)
            | Self::Choice(_)
            | Self::Extension { .. }
            | Self::ReportExtension { .. }
            | Self::NothingToCompare { .. }
            | Self::NoSuchPage { .. }
            | Self::OutputIsFolder { .. }
            | Self::Submit(SubmitError::TooLarge(_)) => 2,
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
            Self::OutputIsFolder { path } => Some(format!(
                "name a file in it, such as {}",
                path.join("out.png").display()
            )),
            Self::NoOutputFolder { folder } => {
                Some(format!("make it first: mkdir -p {}", folder.display()))
            }
            Self::Listen { source, .. } if source.kind() == io::ErrorKind::AddrInUse => {
                Some("another program has that port: choose a different one with --port".to_owned())
            }
            _ => None,
        }
    }
}
