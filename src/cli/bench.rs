use std::io::{self, Write};

use kiln_models::noise::NoiseGenerator;

use crate::backend;
use crate::bench::{BenchReport as Report, Measurement, Run, Workload};
use crate::compare::ReportError;
use crate::measure::CostMeter;
use crate::request::{GenerationRequest, Limits};

use super::args::BenchArgs;
use super::error::CliError;
use super::model::Model;

/// `kiln bench`. Everything that can be refused is refused before the weights are loaded.
pub(super) fn run(args: &BenchArgs) -> Result<(), CliError> {
    let settings = args.loading.settings(args.backend.choice()?)?;
    let request =
        |limits: &Limits| GenerationRequest::new(args.params(), limits, NoiseGenerator::Cpu);
    request(&Limits::for_any_model())?;
    backend::check(settings.backend)?;
    let model = Model::open(args.model(), args.loading.load_format)?;
    let workload = Workload {
        request: request(&Limits::for_sizes(model.image_sizes()?))?,
        prompt_tokens: args.prompt_tokens(),
        template: model.tokenizer.template(),
    };

    let meter = CostMeter::start();
    let mut pipeline = model.pipeline(&settings)?;
    let load = meter.stop(pipeline.memory());
    let info = pipeline.info().clone();
    let operations = model.operations(&workload.job(0, info.vocab_size), &settings)?;
    let runs = args.runs();
    let measurement = Measurement::take(&mut *pipeline, load, &workload, runs, |number, run| {
        say(number, runs, run);
    })?;

    let report = Report::new(
        model.description(),
        &info,
        &workload,
        operations,
        measurement,
        args.peak_tflops,
    );
    let text = if args.json {
        serde_json::to_string_pretty(&report).map_err(ReportError::Json)? + "\n"
    } else {
        report.to_string()
    };
    let mut stdout = io::stdout().lock();
    stdout.write_all(text.as_bytes()).map_err(CliError::Stdout)
}

fn say(number: usize, runs: usize, run: &Run) {
    let which = match number {
        0 => "warm-up".to_owned(),
        _ => format!("run {number} of {runs}"),
    };
    tracing::info!(
        "{which}: {:.3} s: prompts {:.3} s, steps {:.3} s, decoding {:.3} s",
        run.total,
        run.encode,
        run.steps.iter().sum::<f64>(),
        run.decode,
    );
}
