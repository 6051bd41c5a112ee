//! What the user typed. The doc comments are the help texts.

mod tools;

use std::fmt;
use std::num::{NonZeroU64, NonZeroUsize};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{ArgGroup, Parser, Subcommand, ValueEnum};
use kiln_models::families::qwen_image::TEMPLATE;
use kiln_models::loading::ModelDType;
use kiln_models::noise::NoiseGenerator;
use kiln_models::pipeline::ImageSizes;

use crate::backend::{BackendChoice, BackendKind, DTypeChoice, InvalidChoice, LoadSettings};
use crate::checkpoint::{DEMO, QWEN_IMAGE};
use crate::engine::DEFAULT_MAX_QUEUE;
use crate::request::{
    DEFAULT_MAX_IMAGE_PIXELS, DEFAULT_MAX_NUM_IMAGES, DEFAULT_MAX_STEPS, GenerationParams, Limits,
};
use crate::server::{ApiKeys, CorsOrigin, DEFAULT_MAX_BODY_BYTES, Settings};

use super::error::CliError;

pub(super) use self::tools::{CacheAction, CacheArgs, CompletionsArgs, HealthArgs, ManArgs};

/// Text-to-image with Qwen-Image, from one binary.
#[derive(Debug, Parser)]
#[command(version, arg_required_else_help = true)]
#[command(after_help = "\
Examples:
  kiln generate \"a large red circle on a blue background\"
  kiln generate \"a red fox in the snow\" --model Qwen/Qwen-Image --output fox.png
  kiln serve Qwen/Qwen-Image --port 8091
  kiln compare --backends wgpu,ndarray --report report.html
  kiln bench --load-format dummy --backend cuda --size 1024x1024

Without a model named, the small demo model in this program draws: one coloured shape on a coloured
background.")]
pub(super) struct Args {
    #[command(subcommand)]
    pub(super) command: Command,
}

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    Generate(Box<GenerateArgs>),
    Serve(Box<ServeArgs>),
    Backends(BackendsArgs),
    Compare(Box<CompareArgs>),
    Bench(Box<BenchArgs>),
    Cache(CacheArgs),
    Health(HealthArgs),
    Completions(CompletionsArgs),
    Man(ManArgs),
}

impl Command {
    /// Whether stdout is for a program.
    pub(super) fn json(&self) -> bool {
        match self {
            Self::Generate(args) => args.json,
            Self::Backends(args) => args.json,
            Self::Bench(args) => args.json,
            _ => false,
        }
    }
}

/// Generate images of one prompt and write the images to files.
///
/// Writes one line to stdout for each image: its path, its real size and its seed. Progress goes
/// to stderr, and so does the picture on a terminal that can show it.
#[derive(Debug, Parser)]
#[command(group = ArgGroup::new("prompts").required(true).args(["prompt", "prompt_option"]))]
pub(super) struct GenerateArgs {
    /// What to generate
    prompt: Option<String>,

    /// What to generate, as an option
    #[arg(long = "prompt", value_name = "PROMPT", allow_hyphen_values = true)]
    prompt_option: Option<String>,

    /// Folder in diffusers layout, Hugging Face id, or demo [default: demo]
    ///
    /// An id such as Qwen/Qwen-Image is downloaded unless the Hugging Face cache has it. demo is
    /// the small model in this program, which draws one coloured shape on a coloured background.
    #[arg(long, value_name = "PATH_OR_ID")]
    model: Option<String>,

    #[command(flatten)]
    pub(super) request: RequestArgs,

    /// Images to generate, from 1 to 10 [default: 1]
    ///
    /// They come from one draw of noise and are generated together: time and memory grow in
    /// proportion.
    #[arg(long, value_name = "COUNT", allow_negative_numbers = true)]
    num_images: Option<i128>,

    /// Image file to write: .png, .jpg or .webp
    ///
    /// With several images out.png becomes out-0.png, out-1.png and so on. Files that exist are
    /// replaced.
    #[arg(long, short, value_name = "FILE", default_value = "out.png")]
    pub(super) output: PathBuf,

    /// Leave out of PNG files how they were made
    ///
    /// By default they hold the prompt, the seed and the settings as text, as image tools read it.
    #[arg(long)]
    pub(super) no_metadata: bool,

    /// Also write what the run went through, as safetensors
    ///
    /// Token ids, prompt embeddings, noise, the latents after each step and the image before
    /// rounding, for comparing runs. Slower, and takes memory.
    #[arg(long, value_name = "FILE")]
    pub(super) dump: Option<PathBuf>,

    /// Print JSON: the files, what they were made of, and what each stage took
    ///
    /// Stdout then holds one object and nothing else. If the command fails, all that is in it is
    /// `error`, with `message`, `tip` and `exit_code`; stderr has the message too.
    #[arg(long)]
    pub(super) json: bool,

    /// Whether the terminal shows the images, and how
    ///
    /// auto asks the terminal what it can, and shows nothing where stdout or stderr is no terminal,
    /// nor with --json or --quiet. The other ways are taken at your word. Images go to stderr.
    #[arg(long, value_enum, default_value_t = Show::Auto, value_name = "HOW")]
    pub(super) show: Show,

    /// Say nothing but warnings and errors, and where the images are
    #[arg(long, short)]
    pub(super) quiet: bool,

    #[command(flatten)]
    pub(super) backend: BackendArgs,

    #[command(flatten)]
    pub(super) loading: LoadArgs,
}

impl GenerateArgs {
    pub(super) fn model(&self) -> &str {
        self.loading.model_or_default(self.model.as_deref())
    }

    pub(super) fn params(&self) -> GenerationParams {
        let prompt = self.prompt.as_ref().or(self.prompt_option.as_ref());
        GenerationParams {
            num_images: self.num_images,
            ..self.request.params(prompt.cloned().unwrap_or_default())
        }
    }
}

/// How the terminal shows images.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Show {
    Auto,
    Kitty,
    Iterm2,
    Sixel,
    Never,
}

/// What is generated, apart from the prompt.
#[derive(Debug, clap::Args)]
pub(super) struct RequestArgs {
    /// What to steer away from; turns guidance on
    ///
    /// Guidance doubles the time of each step. An empty or blank text turns it on as well.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    negative_prompt: Option<String>,

    /// How strongly to steer away from the negative prompt [default: 4]
    ///
    /// There is no guidance at 1 and below, nor without a negative prompt.
    #[arg(
        long,
        visible_alias = "cfg",
        value_name = "SCALE",
        allow_negative_numbers = true
    )]
    true_cfg_scale: Option<f64>,

    /// Width and height of the image in pixels, such as 1328x1328
    #[arg(
        long,
        value_name = "WIDTHxHEIGHT",
        allow_hyphen_values = true,
        conflicts_with_all = ["height", "width"],
        value_parser = parse_size
    )]
    size: Option<Size>,

    /// Height of the image in pixels [default: the model's, 1024 for Qwen-Image]
    ///
    /// Rounded down to a multiple of 16. Time grows a little faster than height x width.
    #[arg(long, value_name = "PIXELS", allow_negative_numbers = true)]
    height: Option<i128>,

    /// Width of the image in pixels [default: the model's, 1024 for Qwen-Image]
    ///
    /// Rounded down to a multiple of 16.
    #[arg(long, value_name = "PIXELS", allow_negative_numbers = true)]
    width: Option<i128>,

    /// Denoising steps, from 1 to 1000 [default: 50]
    ///
    /// Time grows in proportion; with few steps details suffer.
    #[arg(
        long,
        visible_alias = "steps",
        value_name = "STEPS",
        allow_negative_numbers = true
    )]
    num_inference_steps: Option<i128>,

    /// Seed of the noise, from 0 to 2^64 - 1 [default: chosen, and reported]
    ///
    /// The same seed and settings give the same image.
    #[arg(long, allow_negative_numbers = true)]
    seed: Option<i128>,

    #[command(flatten)]
    pub(super) noise: NoiseArgs,
}

/// In pixels.
#[derive(Debug, Clone, Copy)]
struct Size {
    width: i128,
    height: i128,
}

fn parse_size(text: &str) -> Result<Size, String> {
    let side = |text: &str| text.parse().ok();
    text.split_once('x')
        .and_then(|(width, height)| {
            Some(Size {
                width: side(width)?,
                height: side(height)?,
            })
        })
        .ok_or_else(|| "a size looks like 1024x768, width first".to_owned())
}

impl RequestArgs {
    /// Of one image.
    pub(super) fn params(&self, prompt: String) -> GenerationParams {
        GenerationParams {
            prompt,
            negative_prompt: self.negative_prompt.clone(),
            true_cfg_scale: self.true_cfg_scale,
            height: self.size.map(|size| size.height).or(self.height),
            width: self.size.map(|size| size.width).or(self.width),
            num_inference_steps: self.num_inference_steps,
            num_images: None,
            seed: self.seed,
        }
    }
}

/// Serve an OpenAI-compatible HTTP API.
///
/// Answers POST /v1/chat/completions and POST /v1/images/generations; GET /docs shows the whole API.
/// Ctrl-c or SIGTERM lets the requests under way finish; a second one ends them.
#[derive(Debug, Parser)]
pub(super) struct ServeArgs {
    /// Folder in diffusers layout, Hugging Face id, or demo [default: demo]
    ///
    /// An id such as Qwen/Qwen-Image is downloaded unless the Hugging Face cache has it. demo is
    /// the small model in this program, which draws one coloured shape on a coloured background.
    #[arg(value_name = "MODEL", conflicts_with = "model_option")]
    model: Option<String>,

    /// The model, as an option
    #[arg(long = "model", value_name = "MODEL")]
    model_option: Option<String>,

    /// Address to listen on
    ///
    /// With 0.0.0.0 everyone who reaches this machine can use the API, unless --api-key is given.
    #[arg(long, default_value = "127.0.0.1")]
    pub(super) host: String,

    /// TCP port to listen on; 0 takes a free one
    #[arg(long, default_value_t = 8091)]
    pub(super) port: u16,

    /// Names of the model in responses, separated by spaces [default: as the model was given]
    ///
    /// Requests may ask for any model: they are answered under the name they ask for if it is one
    /// of these, and else under the first.
    #[arg(long, value_name = "NAME", num_args = 1..)]
    served_model_name: Vec<String>,

    /// Negative prompt of requests that have none
    ///
    /// It turns guidance on for them, which doubles the time of each step; " " is what the
    /// authors of Qwen-Image use. Without this option they are drawn without guidance.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub(super) default_negative_prompt: Option<String>,

    /// Leave out of PNG files how they were made
    ///
    /// By default they hold the prompt, the seed and the settings as text, as image tools read it.
    #[arg(long)]
    no_metadata: bool,

    /// Also answer the API of AUTOMATIC1111's web UI, below /sdapi/v1
    ///
    /// For clients that know that API, such as Open WebUI and SillyTavern. With --api-key they need
    /// a key as the password of HTTP Basic authentication.
    #[arg(long)]
    enable_sdapi: bool,

    /// Take requests as ready before a picture has been drawn
    ///
    /// By default one step is made first, so that the first request does not pay for what is done
    /// once; GET /health/ready answers 503 until then.
    #[arg(long)]
    pub(super) no_warm_up: bool,

    /// Seconds that requests under way have to finish after ctrl-c or SIGTERM
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    drain_timeout: u64,

    /// How the log is written to stderr
    #[arg(long, value_enum, default_value_t = LogFormat::Text, value_name = "FORMAT")]
    pub(super) log_format: LogFormat,

    /// Devices that share the two halves of guidance; 1 is all there is
    #[arg(long, value_name = "DEVICES", default_value_t = 1)]
    pub(super) cfg_parallel_size: usize,

    #[command(flatten)]
    pub(super) noise: NoiseArgs,

    #[command(flatten)]
    access: AccessArgs,

    #[command(flatten)]
    pub(super) limits: LimitArgs,

    #[command(flatten)]
    pub(super) backend: BackendArgs,

    #[command(flatten)]
    pub(super) loading: LoadArgs,
}

impl ServeArgs {
    pub(super) fn model(&self) -> &str {
        let model = self.model.as_deref().or(self.model_option.as_deref());
        self.loading.model_or_default(model)
    }

    pub(super) fn drain_timeout(&self) -> Duration {
        Duration::from_secs(self.drain_timeout)
    }

    pub(super) fn settings(&self) -> Result<Settings, CliError> {
        let mut settings = Settings::new(self.model());
        if !self.served_model_name.is_empty() {
            settings
                .served_model_names
                .clone_from(&self.served_model_name);
        }
        Ok(Settings {
            api_keys: ApiKeys::new(self.access.api_key.clone())?,
            cors_origins: self.access.cors_origin.clone(),
            max_body_bytes: self.limits.max_body_bytes,
            request_timeout: self
                .limits
                .request_timeout
                .map(|seconds| Duration::from_secs(seconds.get())),
            default_negative_prompt: self.default_negative_prompt.clone(),
            metadata: !self.no_metadata,
            sdapi: self.enable_sdapi,
            ..settings
        })
    }
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub(super) enum LogFormat {
    /// Lines for people
    Text,
    /// One JSON object a line
    Json,
}

/// Who may use the server.
#[derive(clap::Args)]
#[command(next_help_heading = "Access")]
struct AccessArgs {
    /// Key that requests to /v1 must have as a bearer token; may be given several times
    ///
    /// Other users of this machine can see the command line, but not the environment. Commas
    /// separate several keys.
    #[arg(
        long,
        value_name = "KEY",
        env = "KILN_API_KEY",
        hide_env_values = true,
        value_delimiter = ','
    )]
    api_key: Vec<String>,

    /// Origin whose web pages may use the API from a browser, or * for all
    ///
    /// A scheme and a host; may be given several times. By default browsers let no other page read the answers.
    #[arg(long, value_name = "ORIGIN")]
    cors_origin: Vec<CorsOrigin>,
}

impl fmt::Debug for AccessArgs {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Not the keys.
        formatter
            .debug_struct("AccessArgs")
            .field("cors_origin", &self.cors_origin)
            .finish_non_exhaustive()
    }
}

/// What requests may ask for.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Limits")]
pub(super) struct LimitArgs {
    /// Requests that may wait while one is generated
    ///
    /// Further ones are refused with status 429 and a time to retry.
    #[arg(long, value_name = "REQUESTS", default_value_t = DEFAULT_MAX_QUEUE)]
    pub(super) max_queue: usize,

    /// Pixels of all images of a request together: height x width x images
    #[arg(long, value_name = "PIXELS", default_value_t = DEFAULT_MAX_IMAGE_PIXELS)]
    max_image_pixels: usize,

    /// Denoising steps of a request
    #[arg(long, value_name = "STEPS", default_value_t = at_least_1(DEFAULT_MAX_STEPS))]
    max_steps: NonZeroUsize,

    /// Images of a request
    #[arg(long, value_name = "COUNT", default_value_t = at_least_1(DEFAULT_MAX_NUM_IMAGES))]
    max_num_images: NonZeroUsize,

    /// Bytes of a request's body; larger ones are refused with status 413
    #[arg(long, value_name = "BYTES", default_value_t = DEFAULT_MAX_BODY_BYTES)]
    max_body_bytes: usize,

    /// Seconds that a request may take, waiting included [default: any]
    ///
    /// One that takes longer ends with status 408, after the step that it is at.
    #[arg(long, value_name = "SECONDS")]
    request_timeout: Option<NonZeroU64>,
}

/// For the defaults above, which are.
fn at_least_1(count: usize) -> NonZeroUsize {
    NonZeroUsize::new(count).unwrap_or(NonZeroUsize::MIN)
}

impl LimitArgs {
    /// For a model that draws these sizes.
    pub(super) fn limits(&self, sizes: ImageSizes) -> Limits {
        Limits {
            sizes,
            max_image_pixels: self.max_image_pixels,
            max_steps: self.max_steps.get(),
            max_num_images: self.max_num_images.get(),
        }
    }
}

/// List what can compute: the backends and their devices.
///
/// The first word of each line is what --backend and --device choose: cuda:1 is --backend cuda
/// --device 1. Backends that have no device here say why.
#[derive(Debug, Parser)]
pub(super) struct BackendsArgs {
    /// Print JSON
    #[arg(long)]
    pub(super) json: bool,
}

/// Draw one picture on several backends and compare them stage by stage.
///
/// Prints how far each backend is from the reference, from the prompt embeddings to the 8-bit
/// picture, and what each stage took. Ends with code 1 if a stage is over the tolerance. The models
/// are loaded one after the other.
#[derive(Debug, Parser)]
pub(super) struct CompareArgs {
    /// What is compared: backends, with a device if need be, as in flex,cuda:1
    #[arg(
        long,
        required = true,
        value_delimiter = ',',
        value_name = "BACKENDS",
        value_parser = parse_backend
    )]
    pub(super) backends: Vec<BackendChoice>,

    /// What they are compared with: a backend, or dump:FILE
    ///
    /// A file is one that `kiln generate --dump` wrote, or any safetensors file with tensors of
    /// these names, made by another program from the same prompts, size, steps and seed.
    #[arg(long, value_name = "BACKEND", default_value = "flex")]
    pub(super) reference: Reference,

    /// Folder in diffusers layout, Hugging Face id, or demo
    #[arg(long, value_name = "PATH_OR_ID", default_value = DEMO)]
    pub(super) model: String,

    /// What to generate
    #[arg(
        long,
        value_name = "PROMPT",
        allow_hyphen_values = true,
        default_value = "a large red circle on a blue background"
    )]
    pub(super) prompt: String,

    #[command(flatten)]
    pub(super) request: RequestArgs,

    /// File to write a report to, as its name ends: .html, .json or .md
    ///
    /// The HTML file shows the pictures side by side, where they differ, and the difference after
    /// every step. It loads nothing else. Files that exist are replaced.
    #[arg(long, value_name = "FILE")]
    pub(super) report: Option<PathBuf>,

    /// Largest difference of a stage, relative to its largest magnitude [default: by --dtype,
    /// 1e-3 in f32, 1e-1 in bf16, 1e-2 in f16]
    ///
    /// What is asked of the 8-bit picture stays: 99.9 % equal values in f32, 36 dB in bf16, 54 dB
    /// in f16.
    #[arg(long, value_name = "DIFFERENCE", value_parser = parse_tolerance)]
    pub(super) tolerance: Option<f64>,

    /// Type that all run in
    #[arg(
        long,
        default_value = "f32",
        value_parser = PossibleValuesParser::new(ModelDType::ALL.map(ModelDType::name))
            .try_map(|name| ModelDType::named(&name).ok_or("no such type"))
    )]
    pub(super) dtype: ModelDType,

    #[command(flatten)]
    pub(super) vae: VaeArgs,
}

/// What the others are compared with.
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

/// Any but auto, which may be the same backend as another one.
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

/// Time a model, stage by stage.
///
/// Loads it, runs once to warm up, then repeats the same work with other prompts, which are made
/// up. Prints the medians, the operations that they stand for, and the memory in use.
#[derive(Debug, Parser)]
pub(super) struct BenchArgs {
    /// Folder in diffusers layout, Hugging Face id, or demo [default: demo]
    ///
    /// With --load-format dummy a folder needs configurations only, and Qwen/Qwen-Image, the
    /// default then, no file at all.
    #[arg(long, value_name = "PATH_OR_ID")]
    model: Option<String>,

    /// Width and height of the images in pixels [default: the model's]
    #[arg(
        long,
        value_name = "WIDTHxHEIGHT",
        allow_hyphen_values = true,
        value_parser = parse_size
    )]
    size: Option<Size>,

    /// Denoising steps, from 1 to 1000
    #[arg(
        long,
        value_name = "STEPS",
        allow_negative_numbers = true,
        default_value_t = 20
    )]
    steps: i128,

    /// Scale of the guidance; there is none at 1 and below
    ///
    /// With guidance each step runs the transformer twice, the second time on a blank prompt.
    #[arg(
        long,
        value_name = "SCALE",
        allow_negative_numbers = true,
        default_value_t = 4.0
    )]
    cfg: f64,

    /// Images generated together, from 1 to 10
    #[arg(
        long,
        value_name = "COUNT",
        allow_negative_numbers = true,
        default_value_t = 1
    )]
    batch: i128,

    /// Tokens of the prompt
    #[arg(
        long,
        value_name = "COUNT",
        default_value_t = 64,
        value_parser = clap::value_parser!(u16).range(1..=TEMPLATE.max_prompt_tokens as i64)
    )]
    prompt_tokens: u16,

    /// Runs to take the median of, after the one that warms up
    #[arg(long, value_name = "COUNT", default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..))]
    runs: u16,

    /// TFLOP/s that the device can reach, to say which share of it is
    #[arg(long, value_name = "TFLOPS", value_parser = parse_peak)]
    pub(super) peak_tflops: Option<f64>,

    /// Print JSON, with every run's times
    #[arg(long)]
    pub(super) json: bool,

    #[command(flatten)]
    pub(super) backend: BackendArgs,

    #[command(flatten)]
    pub(super) loading: LoadArgs,
}

impl BenchArgs {
    pub(super) fn model(&self) -> &str {
        self.loading.model_or_default(self.model.as_deref())
    }

    pub(super) fn prompt_tokens(&self) -> usize {
        self.prompt_tokens.into()
    }

    pub(super) fn runs(&self) -> usize {
        self.runs.into()
    }

    /// With prompts of no words.
    pub(super) fn params(&self) -> GenerationParams {
        GenerationParams {
            prompt: String::new(),
            negative_prompt: Some(String::new()),
            true_cfg_scale: Some(self.cfg),
            height: self.size.map(|size| size.height),
            width: self.size.map(|size| size.width),
            num_inference_steps: Some(self.steps),
            num_images: Some(self.batch),
            seed: Some(0),
        }
    }
}

fn parse_peak(text: &str) -> Result<f64, String> {
    let peak = text.parse().ok();
    peak.filter(|peak: &f64| peak.is_finite() && *peak > 0.0)
        .ok_or_else(|| "a peak is a number above 0".to_owned())
}

#[derive(Debug, clap::Args)]
pub(super) struct NoiseArgs {
    /// Generator whose noise a seed stands for
    ///
    /// That of torch on the CPU, or on CUDA. Both work on every backend: choose the one that the
    /// images are to be compared with.
    #[arg(long, value_enum, default_value_t = Rng::Cpu, value_name = "GENERATOR")]
    rng: Rng,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Rng {
    Cpu,
    Cuda,
}

impl NoiseArgs {
    pub(super) fn generator(&self) -> NoiseGenerator {
        match self.rng {
            Rng::Cpu => NoiseGenerator::Cpu,
            Rng::Cuda => NoiseGenerator::Cuda,
        }
    }
}

/// What computes.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Device")]
pub(super) struct BackendArgs {
    /// What computes
    ///
    /// flex and ndarray use the CPU, wgpu and cuda a GPU; auto takes the best that this binary
    /// has and that answers on this machine. `kiln backends` lists them.
    #[arg(
        long,
        default_value = "flex",
        value_parser = PossibleValuesParser::new(["flex", "ndarray", "wgpu", "cuda", "auto"])
            .try_map(|name| name.parse::<BackendKind>())
    )]
    backend: BackendKind,

    /// Which of the backend's devices, by its number in `kiln backends` [default: the first]
    #[arg(long, value_name = "NUMBER")]
    device: Option<usize>,
}

impl BackendArgs {
    pub(super) fn choice(&self) -> Result<BackendChoice, InvalidChoice> {
        BackendChoice::new(self.backend, self.device)
    }
}

/// How a model is loaded.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Loading")]
pub(super) struct LoadArgs {
    /// Where the weights come from
    ///
    /// auto reads the model's files. dummy makes random weights in the model's shape, for measuring
    /// speed and memory: the images are noise. It reads configurations alone, of a folder, or of
    /// Qwen/Qwen-Image without any file, which is the default model then.
    #[arg(long, value_enum, default_value_t = LoadFormat::Auto)]
    pub(super) load_format: LoadFormat,

    /// Type of the weights
    ///
    /// auto keeps the type of the checkpoint where the backend computes in it. f32 takes twice
    /// the memory of bf16 and f16, and is the most exact.
    #[arg(
        long,
        default_value = "auto",
        value_parser = PossibleValuesParser::new(["auto", "f32", "bf16", "f16"])
            .try_map(|name| name.parse::<DTypeChoice>())
    )]
    dtype: DTypeChoice,

    #[command(flatten)]
    vae: VaeArgs,
}

/// How images are decoded.
#[derive(Debug, clap::Args)]
#[expect(clippy::struct_field_names, reason = "the names are the options'")]
pub(super) struct VaeArgs {
    /// Decode the images of a request one at a time
    ///
    /// Takes less memory with several images, and a little longer.
    #[arg(long)]
    vae_use_slicing: bool,

    /// Decode an image in overlapping tiles
    ///
    /// Takes far less memory for large images; slower, and not exactly the same pixels.
    #[arg(long)]
    vae_use_tiling: bool,

    /// Height and width of a tile, in pixels
    #[arg(long, value_name = "PIXELS", default_value_t = 256)]
    vae_tile_size: usize,

    /// Pixels from one tile to the next
    ///
    /// What is left of a tile overlaps the next one and is blended.
    #[arg(long, value_name = "PIXELS", default_value_t = 192)]
    vae_tile_stride: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum LoadFormat {
    Auto,
    Dummy,
}

impl LoadArgs {
    /// The model that was named, or the one that is meant without a name.
    pub(super) fn model_or_default<'a>(&self, given: Option<&'a str>) -> &'a str {
        given.unwrap_or(match self.load_format {
            LoadFormat::Auto => DEMO,
            LoadFormat::Dummy => QWEN_IMAGE,
        })
    }

    pub(super) fn settings(&self, backend: BackendChoice) -> Result<LoadSettings, CliError> {
        self.vae.settings(backend, self.dtype)
    }
}

impl VaeArgs {
    pub(super) fn settings(
        &self,
        backend: BackendChoice,
        dtype: DTypeChoice,
    ) -> Result<LoadSettings, CliError> {
        let (size, stride) = (self.vae_tile_size, self.vae_tile_stride);
        if stride == 0 || stride > size {
            return Err(CliError::Tiles { size, stride });
        }
        Ok(LoadSettings {
            backend,
            dtype,
            vae_use_slicing: self.vae_use_slicing,
            vae_use_tiling: self.vae_use_tiling,
            vae_tile_size: size,
            vae_tile_stride: stride,
        })
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_arguments_are_well_formed() {
        Args::command().debug_assert();
    }

    #[test]
    fn keys_are_not_shown() {
        let arguments = [
            "kiln",
            "serve",
            "--api-key",
            "hunter2",
            "--api-key",
            "hunter3",
        ];
        let args = Args::try_parse_from(arguments).unwrap();
        assert!(!format!("{args:?}").contains("hunter"));
    }

    #[test]
    fn a_size_is_width_and_height() {
        let parse = |size: &str| {
            let Command::Generate(args) =
                Args::try_parse_from(["kiln", "generate", "a cat", "--size", size])?.command
            else {
                panic!("serve")
            };
            let params = args.params();
            Ok::<_, clap::Error>((params.width, params.height))
        };
        assert_eq!(parse("64x48").unwrap(), (Some(64), Some(48)));
        assert_eq!(parse("-64x48").unwrap(), (Some(-64), Some(48)));
        for size in ["64", "x", "64x", "64x48x3", "64 x 48", "1.5x2"] {
            assert!(parse(size).is_err(), "{size}");
        }
    }

    #[test]
    fn the_prompt_is_given_once() {
        let parse = |args: &[&str]| Args::try_parse_from([&["kiln", "generate"], args].concat());
        assert!(parse(&["--model", "m"]).is_err());
        assert!(parse(&["a", "--prompt", "b", "--model", "m"]).is_err());
        for args in [
            ["a cat", "--model", "m"].as_slice(),
            &["--prompt", "a cat", "--model", "m"],
        ] {
            let Command::Generate(args) = parse(args).unwrap().command else {
                panic!("serve")
            };
            assert_eq!(args.params().prompt, "a cat");
        }
    }
}
