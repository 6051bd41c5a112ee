//! `kiln compare`.

mod args;

pub(super) use self::args::CompareArgs;

use std::path::Path;
use std::sync::Arc;

use kiln_models::adapter::Adapter;

use crate::backend::{self, BackendChoice, DTypeChoice};
use crate::compare::{
    CompareReport, CompareSettings, Comparison, Recording, ReportFormat, RunReport, Tolerance,
    record,
};
use crate::measure::CostMeter;
use crate::request::{GenerationParams, GenerationRequest, Limits, PromptTokens};
use crate::runtime::{Model, ModelSettings};
use crate::version;

use super::dump;
use super::error::CliError;
use super::output;
use super::progress::Progress;

use self::args::Reference;

/// Checks everything that can be checked before it loads the weights.
pub(super) fn run(args: &CompareArgs) -> Result<(), CliError> {
    let noise = args.noise.generator();
    let params = args.request.params(args.prompt.clone());
    // What no model can generate is refused before a model is downloaded.
    GenerationRequest::new(params.clone(), &Limits::for_any_model(), noise)?;
    let report_file = args.report.as_deref().map(report_file).transpose()?;
    let backends = other_backends(args)?;
    let first = args.reference.backend();
    first
        .into_iter()
        .chain(&backends)
        .try_for_each(|backend| backend::check(backend, None))?;
    let tolerance = Tolerance {
        max_relative: args
            .tolerance
            .unwrap_or(Tolerance::of(args.dtype).max_relative),
        ..Tolerance::of(args.dtype)
    };

    let loras = args
        .lora
        .add_to(Model::find(&ModelSettings::new(&args.model))?)?;
    let params = GenerationParams {
        adapters: loras.given.clone(),
        ..params
    };
    let request = GenerationRequest::new(params, &loras.limits, noise)?;
    let runner = Runner {
        args,
        tokens: request.tokenize(loras.model.tokenizer())?,
        weights: loras.weights(&request.adapters)?,
        model: loras.model,
        request,
    };
    let mut runs = Vec::new();
    let reference = match &args.reference {
        Reference::Backend(backend) => {
            let (recording, run) = runner.run(backend)?;
            runs.push(run);
            recording
        }
        Reference::Dump(path) => dump::read(path, &runner.tokens)?,
    };
    let mut comparisons = Vec::new();
    for backend in &backends {
        let (recording, run) = runner.run(backend)?;
        runs.push(run);
        comparisons.push(Comparison::new(&reference, &recording, tolerance)?);
    }

    let report = CompareReport {
        kiln: version::VERSION,
        settings: CompareSettings::new(runner.model.name(), args.dtype, &runner.request),
        tolerance,
        reference: reference.name,
        runs,
        comparisons,
        reference_image: reference.image,
    };
    if let Some((path, format)) = report_file {
        write_report(&report, path, format)?;
    }
    output::print(report.summary().as_bytes())?;
    verdict(&report)
}

/// The backends to compare with the reference: each named one once, without the reference itself.
fn other_backends(args: &CompareArgs) -> Result<Vec<BackendChoice>, CliError> {
    let mut backends: Vec<BackendChoice> = Vec::new();
    for backend in &args.backends {
        let is_reference = args.reference.backend() == Some(backend);
        if !is_reference && !backends.contains(backend) {
            backends.push(backend.clone());
        }
    }
    if backends.is_empty() {
        return Err(CliError::NothingToCompare {
            reference: args.reference.to_string(),
        });
    }
    Ok(backends)
}

struct Runner<'a> {
    args: &'a CompareArgs,
    model: Model,
    request: GenerationRequest,
    tokens: PromptTokens,
    /// Those of the request's adapters.
    weights: Vec<Arc<Adapter>>,
}

impl Runner<'_> {
    /// Loads the model onto a backend, generates, and drops the pipeline: one is loaded at a time.
    fn run(&self, backend: &BackendChoice) -> Result<(Recording, RunReport), CliError> {
        let dtype = DTypeChoice::This(self.args.dtype);
        let settings = self.args.vae.settings(backend.clone(), dtype)?;
        tracing::info!("{backend}:");
        let mut progress = Progress::new(false);
        let meter = CostMeter::start();
        let mut pipeline = self.model.load(&settings)?.pipeline;
        let load = meter.stop(pipeline.memory());
        let device = pipeline.info().device();

        let job = self
            .request
            .clone()
            .into_job(self.tokens.clone(), self.weights.clone(), true);
        let total = job.sampling.steps;
        progress.started(total, self.model.decode_steps(&job, &settings)?);
        let outcome = record(backend.to_string(), &mut *pipeline, load, job, |done| {
            progress.step(done, total);
        });
        drop(progress);
        let (recording, costs) = outcome.map_err(|source| CliError::Run {
            backend: backend.clone(),
            source,
        })?;
        let run = RunReport {
            name: recording.name.clone(),
            device,
            costs,
        };
        Ok((recording, run))
    }
}

/// The report file, and the format that its extension chooses.
fn report_file(path: &Path) -> Result<(&Path, ReportFormat), CliError> {
    let extension = path.extension().unwrap_or_default();
    let known = [
        ("html", ReportFormat::Html),
        ("json", ReportFormat::Json),
        ("md", ReportFormat::Markdown),
    ];
    let (_, format) = known
        .into_iter()
        .find(|(name, _)| extension.eq_ignore_ascii_case(name))
        .ok_or_else(|| CliError::ReportExtension {
            path: path.to_owned(),
        })?;
    output::check_writable(path)?;
    Ok((path, format))
}

fn write_report(report: &CompareReport, path: &Path, format: ReportFormat) -> Result<(), CliError> {
    let text = report.render(format)?;
    output::write(path, text.as_bytes())?;
    tracing::info!("wrote {}", path.display());
    Ok(())
}

fn verdict(report: &CompareReport) -> Result<(), CliError> {
    let over = report
        .comparisons
        .iter()
        .filter(|comparison| !comparison.within_tolerance());
    let names: Vec<String> = over.map(|comparison| comparison.name.clone()).collect();
    if names.is_empty() {
        return Ok(());
    }
    Err(CliError::OverTolerance {
        names,
        reference: report.reference.clone(),
    })
}
