//! `kiln generate`.

mod args;
mod report;

pub(super) use self::args::{GenerateArgs, Show};

use std::path::{self, Path, PathBuf};
use std::time::Instant;

use kiln_models::job::{RgbImage, Size};
use kiln_models::pipeline::PipelineError;
use kiln_models::step_cache::StepCounts;
use kiln_models::vae::TilingMode;

use crate::backend;
use crate::engine::{
    Engine, EngineSettings, Event, Finished, JobError, JobHandle, SubmitOptions, Timings,
};
use crate::image::{Encoding, encode};
use crate::request::{GenerationParams, GenerationRequest, Limits};
use crate::runtime::Model;

use super::dump;
use super::error::CliError;
use super::output;
use super::progress::Progress;
use super::show::Screen;

use self::report::{Image, Report, Seconds};

/// Checks everything that can be checked before it loads the weights.
pub(super) fn run(args: &GenerateArgs) -> Result<(), CliError> {
    let started = Instant::now();
    let settings = args.loading.settings(&args.backend)?;
    let noise = args.noise.generator();
    let params = args.params()?;
    // What no model can generate is refused before a model is downloaded.
    let any_model = Limits::for_any_model();
    let any_request = GenerationRequest::new(params.clone(), &any_model, noise)?;
    let paths = output::image_paths(&args.output, any_request.num_images)?;
    let format = output::image_format(&args.output)?;
    format.check_size(rounded_down(any_request.size))?;
    if args.json && output::is_stdout(&args.output) {
        return Err(CliError::JsonToStdout);
    }
    if let Some(dump) = &args.dump {
        output::check_writable(dump)?;
        check_differs(dump, &paths)?;
    }

    backend::check(&settings.backend, settings.split_guidance)?;

    let loras = args.lora.add_to(Model::find(&args.model_settings())?)?;
    let model = &loras.model;
    let params = GenerationParams {
        adapters: loras.given.clone(),
        ..params
    };
    let request = GenerationRequest::new(params, &loras.limits, noise)?;
    format.check_size(request.size)?;
    for warning in &request.warnings {
        tracing::warn!("{warning}");
    }
    let tokens = request.tokenize(model.tokenizer())?;
    let weights = loras.weights(&request.adapters)?;
    let job = request
        .clone()
        .into_job(tokens.clone(), weights, args.dump.is_some());
    let decode_steps = model.decode_steps(&job, &settings)?;
    // Before the progress bar, which would mix with the terminal's answer.
    let screen = Screen::find(args.show, !args.quiet && !args.json);

    let one_job = EngineSettings {
        max_queue: 0,
        max_started: 1,
        max_memory: None,
        adapter_cache_bytes: usize::MAX,
        max_step_tokens: Some(0),
        warm_up: None,
    };
    let progress = Progress::new(args.quiet);
    let runtime = model.load(&settings)?;
    let engine = Engine::start(runtime.pipeline, one_job);
    let handle = engine.submit(job, SubmitOptions::default())?;
    let finished = generate(handle, progress, request.sampling.steps, decode_steps)?;

    log_timings(&finished.timings);
    log_steps(request.sampling.steps, finished.output.steps);
    let write_dump = || match &args.dump {
        Some(path) => dump::write(path, &tokens, &finished.output.trace),
        None => Ok(()),
    };
    if let Some(not_finite) = finished.output.not_finite {
        // Only a recorded run gets so far; its values are worth to be looked at.
        write_dump()?;
        return Err(JobError::from(PipelineError::from(not_finite)).into());
    }
    let writing = Instant::now();
    let writer = Writer {
        request: &request,
        model: model.name(),
        encoding: Encoding::new(format),
        metadata: !args.no_metadata,
        tiled: finished.output.tiled,
        steps: finished.output.steps,
    };
    let images = &finished.output.images;
    // All files are written, whatever fails, before anything is reported.
    let (written, mut outcome) = writer.write_all(images, &paths);
    let dumped = write_dump().map_err(CliError::from);
    outcome = outcome.and(dumped);
    let writing = writing.elapsed();
    for image in &written {
        if let Some(screen) = screen {
            outcome = outcome.and(screen.show(&images[image.index]));
        }
        if !args.json {
            outcome = outcome.and(report_line(image));
        }
    }
    outcome?;
    if args.json {
        let timings = &finished.timings;
        let seconds = Seconds::new(runtime.load_time, timings, writing, started.elapsed());
        let dump = args.dump.as_deref();
        let report = Report::new(
            model.name(),
            engine.info(),
            &request,
            (written, &finished.output),
            dump,
            seconds,
        );
        let text = serde_json::to_string_pretty(&report).map_err(CliError::Json)?;
        output::print(format!("{text}\n").as_bytes())?;
    }
    Ok(())
}

/// The size without what every model rounds off.
fn rounded_down(size: Size) -> Size {
    const MULTIPLE: usize = 16;
    Size {
        height: size.height / MULTIPLE * MULTIPLE,
        width: size.width / MULTIPLE * MULTIPLE,
    }
}

/// Refuses a dump that has the name of an image.
fn check_differs(dump: &Path, images: &[PathBuf]) -> Result<(), CliError> {
    let absolute = |path: &Path| path::absolute(path).unwrap_or_else(|_| path.to_owned());
    if images.iter().any(|image| absolute(image) == absolute(dump)) {
        return Err(CliError::SameFile {
            path: dump.to_owned(),
        });
    }
    Ok(())
}

/// Waits for the images, and shows the progress until then.
fn generate(
    mut handle: JobHandle,
    mut progress: Progress,
    steps: usize,
    decode_steps: f64,
) -> Result<Finished, CliError> {
    loop {
        match handle.blocking_next_event() {
            Event::Queued { .. } | Event::Preview { .. } => {}
            Event::Started => progress.started(steps, decode_steps),
            Event::Step { done, total, .. } => progress.step(done, total),
            Event::Finished(finished) => return Ok(finished),
            Event::Failed(error) => return Err(error.into()),
        }
    }
}

fn log_timings(timings: &Timings) {
    tracing::info!(
        "generated in {:.1} s: prompts {:.1} s, steps {:.1} s, decoding {:.1} s",
        timings.total().as_secs_f64(),
        timings.encode.as_secs_f64(),
        timings.denoise.as_secs_f64(),
        timings.decode.as_secs_f64(),
    );
}

/// Says which steps were not computed whole.
fn log_steps(steps: usize, counts: StepCounts) {
    if counts.skipped > 0 || counts.gated > 0 {
        tracing::info!(
            "of {steps} steps, {} reused an earlier one, and {} ran without the negative prompt",
            counts.skipped,
            counts.gated,
        );
    }
}

/// Prints the path, the size and the seed of an image; on stderr, if stdout has the image itself.
fn report_line(image: &Image) -> Result<(), CliError> {
    if output::is_stdout(&image.path) {
        tracing::info!("wrote {image}");
        return Ok(());
    }
    output::print(format!("{image}\n").as_bytes())
}

/// Writes the images of a request.
struct Writer<'a> {
    request: &'a GenerationRequest,
    /// Name of the model.
    model: &'a str,
    encoding: Encoding,
    /// Whether a PNG file contains the parameters.
    metadata: bool,
    /// How the images were decoded in tiles, if they were.
    tiled: Option<TilingMode>,
    /// What the steps ran.
    steps: StepCounts,
}

impl Writer<'_> {
    /// Writes every image that can be written. Returns what was written, and the first failure;
    /// the others are logged.
    fn write_all(
        &self,
        images: &[RgbImage],
        paths: &[PathBuf],
    ) -> (Vec<Image>, Result<(), CliError>) {
        let mut written = Vec::new();
        let mut outcome = Ok(());
        for (index, (image, path)) in images.iter().zip(paths).enumerate() {
            match self.write(image, path, index) {
                Ok(image) => written.push(image),
                Err(error) if outcome.is_ok() => outcome = Err(error),
                Err(error) => tracing::error!("error: {}", crate::error_chain(&error)),
            }
        }
        (written, outcome)
    }

    fn write(&self, image: &RgbImage, path: &Path, index: usize) -> Result<Image, CliError> {
        let metadata = || {
            self.request
                .metadata_text(self.model, index, self.tiled, self.steps)
        };
        let metadata = self.metadata.then(metadata);
        let file = encode(image, self.encoding, metadata.as_deref())?;
        if output::is_stdout(path) {
            output::write_image_to_stdout(&file)?;
        } else {
            output::write(path, &file)?;
        }
        let (format, seed) = (self.encoding.format, self.request.noise.seed);
        Ok(Image::new(path, format, file.len(), image, seed, index))
    }
}
