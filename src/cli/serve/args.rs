//! Arguments of `kiln serve`. Each option also has an environment variable: see
//! [`command`](crate::cli::args::command).

use std::ffi::OsString;
use std::fmt;
use std::num::{NonZeroU64, NonZeroUsize};
use std::time::Duration;

use clap::{Arg, ArgAction, Args, Parser, ValueEnum};

use super::jobs_args::JobsArgs;
use super::webhook_args::WebhookArgs;
use crate::cli::cache_args::CacheDefaultArgs;
use crate::cli::error::CliError;
use crate::cli::lora_args::LoraServeArgs;
use crate::cli::shared_args::{BackendArgs, LoadArgs, NoiseArgs, parse_host};
use crate::engine::DEFAULT_MAX_QUEUE;
use crate::request::{
    DEFAULT_MAX_IMAGE_PIXELS, DEFAULT_MAX_NUM_IMAGES, DEFAULT_MAX_STEPS, Limits, StepCaches,
};
use crate::runtime::ModelSettings;
use crate::server::{
    AllowedHost, ApiKeys, CorsOrigin, DEFAULT_MAX_BODY_BYTES, InvalidInstance, Role, Settings,
    ShutdownTimes, check_instance, host_name,
};

/// Serve an OpenAI-compatible HTTP API.
///
/// The main routes are POST /v1/chat/completions and POST /v1/images/generations; GET /docs shows
/// the whole API. Ctrl-c, SIGTERM or SIGHUP stops the server after the running requests, a second one
/// stops it at once.
///
/// Every option can be set by an environment variable, such as KILN_MAX_QUEUE for --max-queue; the
/// command line takes precedence. An option without a value takes true or false there, and commas
/// separate several values. An empty variable counts as not set, but for KILN_API_KEY, where it is an
/// error.
#[expect(clippy::doc_markdown, reason = "clap prints the comment as it is")]
#[derive(Debug, Parser)]
#[command(arg = omni())]
pub(in crate::cli) struct ServeArgs {
    /// Folder in diffusers layout, Hugging Face id, or demo [default: demo]
    ///
    /// An id such as Qwen/Qwen-Image is downloaded unless the Hugging Face cache has it. demo is
    /// the small model in this program, which generates one coloured shape on a coloured background.
    #[arg(value_name = "MODEL")]
    model: Option<OsString>,

    /// The model, as an option
    #[arg(long = "model", value_name = "MODEL")]
    model_option: Option<OsString>,

    /// Address to listen on
    ///
    /// With 0.0.0.0 everyone who can reach this machine can use the API, unless --api-key is given.
    #[arg(long, default_value = "127.0.0.1", value_parser = parse_host)]
    pub(super) host: String,

    /// TCP port to listen on; 0 takes a free one
    #[arg(long, default_value_t = 8091)]
    pub(super) port: u16,

    /// Names of the model in responses, separated by spaces or commas [default: the given MODEL, or
    /// the last part of its path]
    ///
    /// Requests may name any model. The response has the same name if it is one of these or an
    /// adapter's, and otherwise the first of these.
    #[arg(long, value_name = "NAME", num_args = 1.., value_parser = parse_name)]
    served_model_name: Vec<String>,

    /// Negative prompt of requests that have none
    ///
    /// Turns guidance on for these requests, which doubles the time of each step; the authors of
    /// Qwen-Image use " ". By default these requests run without guidance.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub(super) default_negative_prompt: Option<String>,

    /// Write no generation parameters into PNG files
    ///
    /// By default PNG files contain the prompt, the seed and the settings as text, as
    /// AUTOMATIC1111's web UI writes them.
    #[arg(long)]
    no_metadata: bool,

    /// Also serve the API of AUTOMATIC1111's web UI, below /sdapi/v1
    ///
    /// For clients of that API, such as Open WebUI and SillyTavern. With --api-key they send a key
    /// as the password of HTTP Basic authentication.
    #[arg(long)]
    enable_sdapi: bool,

    /// Report ready without a warm-up
    ///
    /// By default the server runs one denoising step first, so that the first request does not wait
    /// for work that is done once; until then GET /health/ready returns 503.
    #[arg(long)]
    pub(super) no_warm_up: bool,

    /// Seconds that running requests may take to finish after ctrl-c, SIGTERM or SIGHUP
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    drain_timeout: u64,

    /// Seconds after ctrl-c, SIGTERM or SIGHUP in which requests are still taken
    ///
    /// GET /health/ready returns 503 and every answer closes its connection from the signal on, so
    /// that a router that checks the server sends its requests elsewhere before they are refused:
    /// give more than two of the router's checks take. --drain-timeout begins after it.
    #[arg(long, value_name = "SECONDS", default_value_t = 0)]
    shutdown_delay: u64,

    /// Name of this server among others [default: the host name]
    ///
    /// In the header x-kiln-instance of every answer, in /v1/status and in the metric kiln_info;
    /// printable ASCII.
    #[arg(long, value_name = "NAME", value_parser = parse_instance)]
    instance: Option<String>,

    /// Format of the log on stderr
    #[arg(long, value_enum, default_value_t = LogFormat::Text, value_name = "FORMAT")]
    pub(in crate::cli) log_format: LogFormat,

    #[command(flatten)]
    pub(super) noise: NoiseArgs,

    #[command(flatten)]
    pub(super) caches: CacheDefaultArgs,

    #[command(flatten)]
    pub(super) lora: LoraServeArgs,

    #[command(flatten)]
    access: AccessArgs,

    #[command(flatten)]
    pub(super) limits: LimitArgs,

    #[command(flatten)]
    pub(super) jobs: JobsArgs,

    #[command(flatten)]
    webhooks: WebhookArgs,

    #[command(flatten)]
    pub(super) backend: BackendArgs,

    #[command(flatten)]
    pub(super) loading: LoadArgs,
}

impl ServeArgs {
    pub(super) fn model_settings(&self) -> ModelSettings {
        let model = self.model.as_deref().or(self.model_option.as_deref());
        self.loading.model_settings(model)
    }

    /// The name of this server among others.
    pub(in crate::cli) fn instance(&self) -> String {
        self.instance.clone().unwrap_or_else(host_name)
    }

    pub(super) fn shutdown_times(&self) -> ShutdownTimes {
        ShutdownTimes {
            // No router sends requests to a worker.
            delay: match self.jobs.role() {
                Role::Worker => Duration::ZERO,
                Role::All | Role::Api => Duration::from_secs(self.shutdown_delay),
            },
            drain: Duration::from_secs(self.drain_timeout),
        }
    }

    /// Settings of a server that calls its model `model` unless other names are given.
    pub(super) fn settings(&self, model: &str) -> Result<Settings, CliError> {
        let mut settings = Settings::new(model);
        settings.instance = self.instance();
        let mut allowed_hosts = self.access.allowed_host.clone();
        // The name that this machine has for itself, which may be one of a loopback address.
        allowed_hosts.extend(self.host.parse::<AllowedHost>());
        if !self.served_model_name.is_empty() {
            settings
                .served_model_names
                .clone_from(&self.served_model_name);
        }
        Ok(Settings {
            api_keys: self.access.api_keys()?,
            cors_origins: self.access.cors_origin.clone(),
            allowed_hosts,
            max_body_bytes: self.limits.max_body_bytes,
            request_timeout: self
                .limits
                .request_timeout
                .map(|seconds| Duration::from_secs(seconds.get())),
            default_negative_prompt: self.default_negative_prompt.clone(),
            cache_summary: self.caches.enable_cache_dit_summary,
            metadata: !self.no_metadata,
            noise_generator: self.noise.generator(),
            sdapi: self.enable_sdapi,
            lora_updates: self.lora.enable_lora_updates,
            role: self.jobs.role(),
            webhooks: self.webhooks.settings()?,
            ..settings
        })
    }
}

/// `--omni` does nothing: command lines of vLLM-Omni have it.
fn omni() -> Arg {
    let omni = Arg::new("omni").long("omni").action(ArgAction::SetTrue);
    omni.hide(true)
}

fn parse_name(text: &str) -> Result<String, String> {
    if text.trim().is_empty() {
        return Err("a name has at least one letter".to_owned());
    }
    Ok(text.to_owned())
}

fn parse_instance(text: &str) -> Result<String, InvalidInstance> {
    check_instance(text)?;
    Ok(text.to_owned())
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub(in crate::cli) enum LogFormat {
    /// Human-readable lines
    Text,
    /// One JSON object per line
    Json,
}

/// Who may use the server.
#[derive(Args)]
#[command(next_help_heading = "Access")]
#[expect(clippy::doc_markdown, reason = "clap prints the comments as they are")]
struct AccessArgs {
    /// Bearer token that requests to /v1 must have; may be given several times
    ///
    /// Commas separate several keys. Other users of this machine can see the command line, but not
    /// the environment.
    #[arg(long, value_name = "KEY")]
    api_key: Vec<String>,

    /// Origin whose web pages may use the API from a browser, or * for all
    ///
    /// A scheme and a host, such as https://example.org or app://obsidian.md, or null; may be given
    /// several times, or separated by commas. By default pages of other origins can neither read the
    /// responses nor generate images.
    #[arg(long, value_name = "ORIGIN")]
    cors_origin: Vec<CorsOrigin>,

    /// Host name by which clients may call a server that listens on this machine only
    ///
    /// A name without a port, such as host.docker.internal, or * for all; may be given several times,
    /// or separated by commas. On a loopback address and without --api-key the server answers to
    /// localhost and to loopback addresses only, so that no web page can use it under the name of its
    /// own site. Other servers answer to every name.
    #[arg(long, value_name = "HOST")]
    allowed_host: Vec<AllowedHost>,
}

impl AccessArgs {
    fn api_keys(&self) -> Result<ApiKeys, CliError> {
        if self.api_key.iter().any(String::is_empty) {
            return Err(CliError::EmptyApiKey);
        }
        Ok(ApiKeys::new(self.api_key.clone())?)
    }
}

/// Leaves out the keys.
impl fmt::Debug for AccessArgs {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("AccessArgs")
            .field("cors_origin", &self.cors_origin)
            .field("allowed_host", &self.allowed_host)
            .finish_non_exhaustive()
    }
}

/// Bounds of requests and of the queue.
#[derive(Debug, Args)]
#[command(next_help_heading = "Limits")]
pub(super) struct LimitArgs {
    /// Requests that may wait while one is generated
    ///
    /// Further requests are refused with status 429 and a time to retry.
    #[arg(long, value_name = "REQUESTS", default_value_t = DEFAULT_MAX_QUEUE)]
    pub(super) max_queue: usize,

    /// Image tokens up to which several requests share a denoising step; 0 for never [default: measured
    /// at the warm-up]
    ///
    /// An image of 512x512 has 1024 tokens, with guidance 2048. With 0 every image is the same to the
    /// bit alone and beside others, else within rounding. Without a warm-up the default is 4096.
    #[arg(long, value_name = "TOKENS")]
    pub(super) max_step_tokens: Option<usize>,

    /// Pixels of all images of a request together: height x width x images
    #[arg(long, value_name = "PIXELS", default_value_t = DEFAULT_MAX_IMAGE_PIXELS)]
    max_image_pixels: usize,

    /// Denoising steps of a request
    #[arg(long, value_name = "STEPS", default_value_t = at_least_1(DEFAULT_MAX_STEPS))]
    max_steps: NonZeroUsize,

    /// Images of a request
    #[arg(long, value_name = "COUNT", default_value_t = at_least_1(DEFAULT_MAX_NUM_IMAGES))]
    max_num_images: NonZeroUsize,

    /// Bytes of a request's body; larger bodies are refused with status 413
    #[arg(long, value_name = "BYTES", default_value_t = DEFAULT_MAX_BODY_BYTES)]
    max_body_bytes: usize,

    /// Bytes that all requests in progress may take together [default: what is free]
    ///
    /// The model itself does not count. A request that fits only in tiles is decoded in tiles; one
    /// that does not fit at all is refused with status 400.
    #[arg(long, value_name = "BYTES")]
    pub(super) max_memory: Option<u64>,

    /// Seconds that a request may take, including the time in the queue [default: unlimited]
    ///
    /// A request that takes longer ends with status 408 after its current step.
    #[arg(long, value_name = "SECONDS")]
    request_timeout: Option<NonZeroU64>,
}

/// A default above, none of which is 0.
fn at_least_1(count: usize) -> NonZeroUsize {
    NonZeroUsize::new(count).unwrap_or(NonZeroUsize::MIN)
}

impl LimitArgs {
    /// The limits of requests to a model with these limits of its own, and with these step caches.
    pub(super) fn limits(&self, model: Limits, caches: StepCaches) -> Limits {
        Limits {
            caches,
            max_image_pixels: self.max_image_pixels,
            max_steps: self.max_steps.get(),
            max_num_images: self.max_num_images.get(),
            ..model
        }
    }
}
