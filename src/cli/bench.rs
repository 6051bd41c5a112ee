//! `kiln bench`.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use clap::Parser;
use clap::builder::ArgPredicate;
use kiln_models::families::qwen_image::TEMPLATE;
use kiln_models::job::Job;
use kiln_models::noise::NoiseGenerator;
use kiln_models::step_cache::{CacheError, MIN_CACHED_STEPS};

use crate::backend::{self, LoadSettings};
use crate::bench::{
    BenchReport, CALIBRATION_PROMPTS, CacheRatios, LoraCosts, Measurement, RandomLoras, Run,
    Workload,
};
use crate::compare::ReportError;
use crate::measure::CostMeter;
use crate::request::{
    GenerationParams, GenerationRequest, Integer, InvalidPrompt, Limits, WrittenSize,
};
use crate::runtime::{Model, ModelSettings};

use super::cache_args::StepCacheArgs;
use super::error::CliError;
use super::output;
use super::shared_args::{BackendArgs, LoadArgs};

/// Time a model, stage by stage.
///
/// Loads the model, runs once to warm up, then repeats the same work with other random prompts.
/// Prints the median times, the floating-point operations of each stage, and the peak memory.
#[derive(Debug, Parser)]
pub(super) struct BenchArgs {
    /// Folder in diffusers layout, Hugging Face id, or demo [default: demo]
    ///
    /// With --load-format dummy a folder needs its configuration files only, and the default is
    /// Qwen/Qwen-Image, which needs no file.
    #[arg(long, value_name = "PATH_OR_ID")]
    model: Option<OsString>,

    /// Width and height of the images in pixels [default: the model's]
    #[arg(long, value_name = "WIDTHxHEIGHT", allow_hyphen_values = true)]
    size: Option<WrittenSize>,

    /// Denoising steps, from 1 to 1000; 50 by default with --calibrate-cache
    #[arg(
        long,
        value_name = "STEPS",
        allow_negative_numbers = true,
        default_value = "20",
        default_value_if("calibrate_cache", ArgPredicate::IsPresent, "50")
    )]
    steps: Integer,

    /// Guidance scale, from 0 to 20; guidance is off at 1 and below
    ///
    /// With guidance each step also runs the transformer on a blank negative prompt.
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
        default_value = "1"
    )]
    batch: Integer,

    #[command(flatten)]
    cache: StepCacheArgs,

    /// Tokens of the prompt
    #[arg(
        long,
        value_name = "COUNT",
        default_value_t = 64,
        value_parser = clap::value_parser!(u16).range(1..=TEMPLATE.max_prompt_tokens as i64)
    )]
    prompt_tokens: u16,

    /// Measured runs, after the warm-up
    #[arg(long, value_name = "COUNT", default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..))]
    runs: u16,

    /// Peak TFLOP/s of the device; adds a utilisation column
    #[arg(long, value_name = "TFLOPS", value_parser = parse_peak)]
    peak_tflops: Option<f64>,

    /// Measure the cost of LoRAs of these ranks, from 1 to 512
    ///
    /// After the runs without an adapter, runs jobs without one and with a random LoRA of each rank on
    /// the linear layers of every block, one step of each in turn. Adds to the report the ratio of the
    /// steps' times, the time to read the adapter's file, and the time to start a job whose adapter is in
    /// host memory or on the device.
    #[arg(
        long,
        value_name = "RANKS",
        value_delimiter = ',',
        value_parser = clap::value_parser!(u16).range(1..=512),
        conflicts_with = "calibrate_cache"
    )]
    lora_rank: Vec<u16>,

    /// Measure what step caches need to know of the model instead of times, and write it to a file
    ///
    /// Generates one image of each prompt with all steps computed, and writes the mean ratios of the
    /// residuals' magnitudes from step to step as JSON, `{"mag_ratios": [...]}`, which --cache-config
    /// of `kiln serve` takes. Writes to stdout if no file is named. Also logs which steps the caches
    /// `balanced` and `fast` compute with these ratios.
    #[arg(
        long,
        value_name = "FILE",
        num_args = 0..=1,
        default_missing_value = "-",
        conflicts_with_all = ["json", "peak_tflops", "batch", "prompt_tokens", "runs"]
    )]
    calibrate_cache: Option<PathBuf>,

    /// A prompt to calibrate with instead of four built-in ones; may be repeated
    #[arg(long, value_name = "TEXT", requires = "calibrate_cache")]
    calibration_prompt: Vec<String>,

    /// Print JSON, with the times of every run
    #[arg(long)]
    pub(super) json: bool,

    #[command(flatten)]
    backend: BackendArgs,

    #[command(flatten)]
    loading: LoadArgs,
}

impl BenchArgs {
    fn model_settings(&self) -> ModelSettings {
        self.loading.model_settings(self.model.as_deref())
    }

    /// Parameters with an empty negative prompt, and with an empty prompt, which only takes part in
    /// the checks.
    fn params(&self) -> GenerationParams {
        let (width, height) = self.size.map(WrittenSize::sides).unwrap_or_default();
        GenerationParams {
            negative_prompt: Some(String::new()),
            true_cfg_scale: Some(self.cfg),
            height,
            width,
            num_inference_steps: Some(self.steps.0),
            num_images: Some(self.batch.0),
            seed: Some(0),
            cache: self.cache.given(),
            cfg_gate_step: self.cache.cfg_gate_step,
            ..GenerationParams::default()
        }
    }
}

fn parse_peak(text: &str) -> Result<f64, String> {
    let peak = text.parse().ok();
    peak.filter(|peak: &f64| peak.is_finite() && *peak > 0.0)
        .ok_or_else(|| "a peak is a number above 0".to_owned())
}

/// Checks everything that can be checked before it loads the weights.
pub(super) fn run(args: &BenchArgs) -> Result<(), CliError> {
    let settings = args.loading.settings(&args.backend)?;
    let request =
        |limits: &Limits| GenerationRequest::new(args.params(), limits, NoiseGenerator::Cpu);
    let for_any_model = request(&Limits::for_any_model())?;
    if let Some(file) = &args.calibrate_cache {
        let steps = for_any_model.sampling.steps;
        if steps < MIN_CACHED_STEPS {
            return Err(CacheError::TooFewSteps(steps).into());
        }
        if !output::is_stdout(file) {
            output::check_writable(file)?;
        }
    }
    backend::check(&settings.backend, settings.split_guidance)?;
    let model = Model::find(&args.model_settings())?;
    let request = request(model.limits())?;
    match &args.calibrate_cache {
        Some(file) => calibrate(args, &model, &settings, &request, file),
        None => measure(args, &model, &settings, request),
    }
}

fn measure(
    args: &BenchArgs,
    model: &Model,
    settings: &LoadSettings,
    request: GenerationRequest,
) -> Result<(), CliError> {
    let workload = Workload {
        request,
        prompt_tokens: args.prompt_tokens.into(),
        template: model.tokenizer().template(),
    };

    let meter = CostMeter::start();
    let mut pipeline = model.load(settings)?.pipeline;
    let load = meter.stop(pipeline.memory());
    let info = pipeline.info().clone();
    let operations = model.operations(&workload.job(0, info.vocab_size), settings)?;
    let runs = args.runs.into();
    let measurement = Measurement::take(&mut *pipeline, load, &workload, runs, |number, run| {
        log_run(number, runs, run);
    })?;

    let loras = match &args.lora_rank[..] {
        [] => None,
        ranks => {
            let targets = model.adapter_targets()?;
            let loras = RandomLoras::new(&targets, info.dtype)?;
            let ranks: Vec<usize> = ranks.iter().map(|rank| (*rank).into()).collect();
            let job = workload.job(0, info.vocab_size);
            let on_run = |number| tracing::info!("LoRAs: {}", run_name(number, runs));
            let costs = LoraCosts::measure(&mut *pipeline, &job, &loras, &ranks, runs, on_run)?;
            Some(costs)
        }
    };

    let report = BenchReport {
        loras,
        ..BenchReport::new(
            model.description(),
            &info,
            &workload,
            operations,
            measurement,
            args.peak_tflops,
        )
    };
    let text = if args.json {
        serde_json::to_string_pretty(&report).map_err(ReportError::Json)? + "\n"
    } else {
        report.to_string()
    };
    output::print(text.as_bytes())
}

/// Measures the ratios of step caches and writes them to a file, `-` for stdout.
fn calibrate(
    args: &BenchArgs,
    model: &Model,
    settings: &LoadSettings,
    request: &GenerationRequest,
    file: &Path,
) -> Result<(), CliError> {
    let built_in = || CALIBRATION_PROMPTS.map(str::to_owned).to_vec();
    let prompts = match &args.calibration_prompt[..] {
        [] => built_in(),
        prompts => prompts.to_vec(),
    };
    let count = prompts.len();
    let jobs: Vec<Job> = prompts
        .into_iter()
        .map(|prompt| {
            let request = GenerationRequest {
                prompt,
                ..request.clone()
            };
            let tokens = request.tokenize(model.tokenizer())?;
            Ok(request.into_job(tokens, Vec::new(), true))
        })
        .collect::<Result<_, InvalidPrompt>>()?;
    let steps = request.sampling.steps;
    let mut pipeline = model.load(settings)?.pipeline;
    let ratios = CacheRatios::measure(&mut *pipeline, jobs, |number, step| {
        if step == steps {
            tracing::info!("prompt {} of {count}: {steps} steps", number + 1);
        }
    })?;
    for (name, mask) in ratios.masks() {
        let computed = mask.iter().filter(|&&computed| computed).count();
        let mask = mask.iter().map(|&it| if it { '1' } else { '0' });
        let mask: String = mask.collect();
        tracing::info!("{name} computes {computed} of {steps} steps: {mask}");
    }
    let json = serde_json::to_string(&ratios).map_err(CliError::Json)? + "\n";
    if output::is_stdout(file) {
        output::print(json.as_bytes())
    } else {
        output::write(file, json.as_bytes())
    }
}

fn run_name(number: usize, runs: usize) -> String {
    if number == 0 {
        "warm-up".to_owned()
    } else {
        format!("run {number} of {runs}")
    }
}

fn log_run(number: usize, runs: usize, run: &Run) {
    tracing::info!(
        "{}: {:.3} s: prompts {:.3} s, steps {:.3} s, decoding {:.3} s",
        run_name(number, runs),
        run.total,
        run.encode,
        run.steps.iter().sum::<f64>(),
        run.decode,
    );
}
