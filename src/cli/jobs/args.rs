//! Arguments of `kiln jobs`.

use std::fmt;
use std::path::PathBuf;

use clap::builder::{OsStringValueParser, PossibleValuesParser, StyledStr, TypedValueParser};
use clap::{Arg, Args, Parser, Subcommand, ValueEnum};
use serde_json::{Map, Value};

use crate::cli::error::CliError;
use crate::cli::lora_args::WrittenLora;
use crate::cli::prompt_args::PromptArgs;
use crate::cli::shared_args::{RequestArgs, Rng, integer};
use crate::image::ImageFormat;
use crate::jobs::{JobId, JobStatus};
use crate::request::Integer;

use super::error::JobsError;

/// Submit images as jobs to a server, and follow, download and cancel them.
///
/// A job is generated whether or not anybody waits for it, and survives restarts of the server, which
/// must have been started with --jobs. Exits with code 3 if a job failed, 4 if it was cancelled, 5 if it
/// has not ended within --timeout, 2 if the arguments are at fault, and 1 after any other failure.
#[derive(Debug, Parser)]
#[command(
    arg_required_else_help = true,
    after_help = "\
Examples:
  kiln jobs submit \"a red fox in the snow\" --steps 40
  kiln jobs submit \"a red fox in the snow\" --wait --output fox.png
  kiln jobs wait job-00c0ffee00c0ffee00c0ffee --output fox.png
  kiln jobs list --status queued
  kiln jobs cancel job-00c0ffee00c0ffee00c0ffee"
)]
pub(in crate::cli) struct JobsArgs {
    #[command(subcommand)]
    pub(super) command: JobsCommand,
}

#[derive(Debug, Subcommand)]
pub(super) enum JobsCommand {
    Submit(Box<SubmitArgs>),
    List(ListArgs),
    Show(ShowArgs),
    Wait(WaitArgs),
    Download(DownloadArgs),
    Cancel(CancelArgs),
}

impl JobsArgs {
    /// Whether stdout is to contain one JSON value.
    pub(in crate::cli) fn json(&self) -> bool {
        match &self.command {
            JobsCommand::Submit(args) => args.json,
            JobsCommand::List(args) => args.json,
            JobsCommand::Show(args) => args.json,
            JobsCommand::Wait(args) => args.json,
            JobsCommand::Download(args) => args.json,
            JobsCommand::Cancel(_) => false,
        }
    }

    /// Whether progress is left out.
    pub(in crate::cli) fn quiet(&self) -> bool {
        match &self.command {
            JobsCommand::Submit(args) => args.quiet,
            JobsCommand::Wait(args) => args.quiet,
            _ => false,
        }
    }
}

/// The server.
#[derive(Args)]
#[command(next_help_heading = "Server")]
pub(super) struct ServerArgs {
    /// URL of the server
    #[arg(long, value_name = "URL", default_value = "http://127.0.0.1:8091")]
    pub(super) server: String,

    /// API key, if the server needs one
    ///
    /// Other users of this machine can see the command line, but not the environment.
    #[arg(long, value_name = "KEY")]
    api_key: Option<String>,
}

impl ServerArgs {
    /// The key. The variable may have several for a server, whose first one is taken.
    pub(super) fn key(&self) -> Result<Option<&str>, CliError> {
        let first = |keys: &'_ str| keys.find(',').unwrap_or(keys.len());
        match self.api_key.as_deref() {
            None => Ok(None),
            Some("") => Err(CliError::EmptyApiKey),
            Some(keys) => Ok(Some(&keys[..first(keys)])),
        }
    }
}

/// Leaves out the key.
impl fmt::Debug for ServerArgs {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("ServerArgs")
            .field("server", &self.server)
            .finish_non_exhaustive()
    }
}

/// Submit a job, and print its id.
///
/// The job is stored when the id is printed. A submission that the server did not answer is repeated
/// without making a second job.
#[derive(Debug, Parser)]
#[command(mut_arg("cache", of_server))]
pub(super) struct SubmitArgs {
    #[command(flatten)]
    prompt: PromptArgs,

    #[command(flatten)]
    request: RequestArgs,

    /// Random number generator of the noise: PyTorch's for the CPU, or for CUDA [default: the server's]
    #[arg(long, value_enum, value_name = "GENERATOR")]
    rng: Option<Rng>,

    /// LoRA adapter of the server to generate with, and its scale [default: 1]; may be repeated
    #[arg(long, value_name = "NAME[:SCALE]", value_parser = OsStringValueParser::new().map(WrittenLora::parse))]
    lora: Vec<WrittenLora>,

    /// Images to generate [default: 1]
    ///
    /// They share the seed and are generated together.
    #[arg(
        long,
        visible_alias = "n",
        value_name = "COUNT",
        allow_negative_numbers = true
    )]
    num_images: Option<Integer>,

    /// Format of the files [default: that of --output, or png]
    #[arg(long, value_enum, value_name = "FORMAT")]
    format: Option<Format>,

    /// Text that makes a repeated submission the same job
    ///
    /// A second submission with the same text and the same options prints the id of the first one's job;
    /// with other options it is refused. Without it, each command submits a job of its own.
    #[arg(long, value_name = "KEY")]
    pub(super) idempotency_key: Option<String>,

    /// URL to which the server posts the job when it has ended
    ///
    /// The server's option --webhook-host must allow its host.
    #[arg(long, value_name = "URL")]
    webhook: Option<String>,

    /// Wait until the job has ended
    #[arg(long)]
    pub(super) wait: bool,

    /// Longest time to wait in seconds [default: unlimited]
    ///
    /// The job goes on when the time is over.
    #[arg(long, value_name = "SECONDS", requires = "wait")]
    pub(super) timeout: Option<u64>,

    /// File to write the image to, or an existing folder; - writes to stdout
    ///
    /// With several images out.png becomes out-0.png, out-1.png and so on.
    #[arg(long, short, value_name = "PATH", requires = "wait")]
    pub(super) output: Option<PathBuf>,

    /// Print the job as JSON, with the paths of files that were written
    #[arg(long)]
    pub(super) json: bool,

    /// Print warnings, errors and results only
    #[arg(long, short)]
    pub(super) quiet: bool,

    #[command(flatten)]
    pub(super) server: ServerArgs,
}

impl SubmitArgs {
    /// The body of the request.
    pub(super) fn body(&self) -> Result<Map<String, Value>, CliError> {
        let mut body = self.request.fields();
        body.insert("prompt".to_owned(), self.prompt.read()?.into());
        let loras: Vec<Value> = self.lora.iter().map(WrittenLora::to_json).collect();
        let others = [
            ("n", self.num_images.map(|Integer(count)| integer(count))),
            (
                "output_format",
                self.format()?.map(|format| format.name().into()),
            ),
            ("generator_device", self.rng.map(|rng| rng.name().into())),
            ("loras", (!loras.is_empty()).then_some(loras.into())),
            ("webhook", self.webhook.clone().map(Value::from)),
        ];
        let given = others.into_iter();
        body.extend(given.filter_map(|(key, value)| Some((key.to_owned(), value?))));
        Ok(body)
    }

    /// The given format, or that of the file's extension.
    fn format(&self) -> Result<Option<ImageFormat>, CliError> {
        let given = self.format.map(Format::image_format);
        let extension = self.output.as_ref().and_then(|path| path.extension());
        let extension = extension.unwrap_or_default().to_string_lossy();
        match (given, ImageFormat::from_extension(&extension)) {
            (Some(format), Some(named)) if format != named => Err(JobsError::OtherFormat {
                path: self.output.clone().unwrap_or_default(),
                media_type: format.media_type().to_owned(),
            }
            .into()),
            (given, named) => Ok(given.or(named)),
        }
    }

    /// Number of images, as far as it is one.
    pub(super) fn images(&self) -> Option<usize> {
        let Integer(count) = self.num_images.unwrap_or(Integer(1));
        usize::try_from(count).ok()
    }
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Format {
    Png,
    #[value(alias = "jpg")]
    Jpeg,
    Webp,
}

impl Format {
    fn image_format(self) -> ImageFormat {
        match self {
            Self::Png => ImageFormat::Png,
            Self::Jpeg => ImageFormat::Jpeg,
            Self::Webp => ImageFormat::Webp,
        }
    }
}

/// List the jobs of the API key, the newest first.
#[derive(Debug, Parser)]
pub(super) struct ListArgs {
    /// Only jobs with this status
    #[arg(long, value_name = "STATUS", value_parser = PossibleValuesParser::new(JobStatus::ALL.map(JobStatus::name)))]
    status: Option<String>,

    /// Most jobs to list
    #[arg(long, value_name = "COUNT", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..), conflicts_with = "all")]
    limit: u32,

    /// List all jobs
    #[arg(long)]
    pub(super) all: bool,

    /// Print JSON: an object whose data is the list
    #[arg(long)]
    pub(super) json: bool,

    #[command(flatten)]
    pub(super) server: ServerArgs,
}

impl ListArgs {
    pub(super) fn limit(&self) -> usize {
        self.limit as usize
    }

    pub(super) fn status(&self) -> Option<&str> {
        self.status.as_deref()
    }
}

/// Show a job: how far it is, and what it generates.
#[derive(Debug, Parser)]
pub(super) struct ShowArgs {
    /// Id of the job
    #[arg(value_parser = parse_id)]
    pub(super) id: JobId,

    /// Print the job as JSON
    #[arg(long)]
    pub(super) json: bool,

    #[command(flatten)]
    pub(super) server: ServerArgs,
}

/// Wait until a job has ended.
///
/// Goes on while the server restarts, and gives up when it has not answered for ten minutes. Exits with
/// code 3 if the job failed, 4 if it was cancelled, 5 if it has not ended within --timeout.
#[derive(Debug, Parser)]
pub(super) struct WaitArgs {
    /// Id of the job
    #[arg(value_parser = parse_id)]
    pub(super) id: JobId,

    /// Longest time to wait in seconds [default: unlimited]
    ///
    /// The job goes on when the time is over.
    #[arg(long, value_name = "SECONDS")]
    pub(super) timeout: Option<u64>,

    /// File to write the image to, or an existing folder; - writes to stdout
    ///
    /// With several images out.png becomes out-0.png, out-1.png and so on.
    #[arg(long, short, value_name = "PATH")]
    pub(super) output: Option<PathBuf>,

    /// Print the job as JSON, with the paths of files that were written
    #[arg(long)]
    pub(super) json: bool,

    /// Print warnings, errors and results only
    #[arg(long, short)]
    pub(super) quiet: bool,

    #[command(flatten)]
    pub(super) server: ServerArgs,
}

/// Write the files of a completed job.
#[derive(Debug, Parser)]
pub(super) struct DownloadArgs {
    /// Id of the job
    #[arg(value_parser = parse_id)]
    pub(super) id: JobId,

    /// File to write the image to, or an existing folder; - writes to stdout
    ///
    /// With several images out.png becomes out-0.png, out-1.png and so on. In a folder, files have the id of
    /// the job as their name.
    #[arg(long, short, value_name = "PATH", default_value = ".")]
    pub(super) output: PathBuf,

    /// Print the job as JSON, with the paths of the files
    #[arg(long)]
    pub(super) json: bool,

    #[command(flatten)]
    pub(super) server: ServerArgs,
}

/// Cancel jobs that have not ended.
#[derive(Debug, Parser)]
pub(super) struct CancelArgs {
    /// Ids of the jobs
    #[arg(required = true, value_name = "ID", value_parser = parse_id)]
    pub(super) ids: Vec<JobId>,

    #[command(flatten)]
    pub(super) server: ServerArgs,
}

/// The option of a local command, whose default is the server's here.
fn of_server(arg: Arg) -> Arg {
    let told = |text: Option<&StyledStr>| {
        let text = text.map(ToString::to_string).unwrap_or_default();
        text.replace("[default: off]", "[default: the server's]")
    };
    let (short, long) = (told(arg.get_help()), told(arg.get_long_help()));
    arg.help(short).long_help(long)
}

fn parse_id(text: &str) -> Result<JobId, String> {
    JobId::parse(text.trim())
        .ok_or_else(|| "the id of a job is job- and 24 hexadecimal digits".to_owned())
}
