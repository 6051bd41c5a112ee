//! `kiln generate`.

mod args;
mod report;

pub(super) use self::args::{GenerateArgs, Show};

use std::fs;
use std::io::{self, Write};
use std::path::PathBuf;
use std::time::Instant;

use kiln_models::job::Output;

use crate::backend;
use crate::engine::{Engine, EngineSettings, Event, Finished, JobHandle, SubmitOptions, Timings};
use crate::image::{Encoding, encode};
use crate::request::{GenerationRequest, Limits};
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
    let settings = args.loading.settings(args.backend.choice()?)?;
    let noise = args.request.noise.generator();
    let params = args.params();
    // What no model can generate is refused before a model is downloaded.
    let any_model = Limits::for_any_model();
    let num_images = GenerationRequest::new(params.clone(), &any_model, noise)?.num_images;
    let paths = output::image_paths(&args.output, num_images)?;
    args.dump
        .as_deref()
        .map_or(Ok(()), output::check_writable)?;

    backend::check(settings.backend)?;

    let model = Model::find(&args.model_settings())?;
    let request = GenerationRequest::new(params, model.limits(), noise)?;
    let tokens = request.tokenize(model.tokenizer())?;
    let job = request
        .clone()
        .into_job(tokens.clone(), args.dump.is_some());
    let decode_steps = model.decode_steps(&job, &settings)?;
    // Before the progress bar, which would mix with the terminal's answer.
    let screen = Screen::find(args.show, !args.quiet && !args.json);

    let one_job = EngineSettings {
        max_queue: 0,
        max_started: 1,
        max_memory: None,
        warm_up: None,
    };
    let progress = Progress::new(args.quiet);
    let runtime = model.load(&settings)?;
    let engine = Engine::start(runtime.pipeline, one_job);
    let handle = engine.submit(job, SubmitOptions::default())?;
    let finished = generate(handle, progress, request.sampling.steps, decode_steps)?;

    log_timings(&finished.timings);
    let writing = Instant::now();
    let images = write_images(&finished.output, &paths, &request, args, screen)?;
    if let Some(path) = &args.dump {
        dump::write(path, &tokens, &finished.output.trace)?;
    }
    if args.json {
        let timings = &finished.timings;
        let seconds = Seconds::new(
            runtime.load_time,
            timings,
            writing.elapsed(),
            started.elapsed(),
        );
        let dump = args.dump.as_deref();
        let images = (images, finished.output.tiled);
        let report = Report::new(args.model(), engine.info(), &request, images, dump, seconds);
        let text = serde_json::to_string_pretty(&report).map_err(CliError::Json)?;
        writeln!(io::stdout().lock(), "{text}").map_err(CliError::Stdout)?;
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

/// Writes and shows each image, and prints its line unless `--json` is given.
fn write_images(
    output: &Output,
    paths: &[PathBuf],
    request: &GenerationRequest,
    args: &GenerateArgs,
    screen: Option<Screen>,
) -> Result<Vec<Image>, CliError> {
    let encoding = Encoding::new(output::image_format(&args.output)?);
    let mut stdout = io::stdout().lock();
    let mut written = Vec::new();
    for (index, (image, path)) in output.images.iter().zip(paths).enumerate() {
        let metadata =
            (!args.no_metadata).then(|| request.metadata_text(args.model(), index, output.tiled));
        let file = encode(image, encoding, metadata.as_deref())?;
        fs::write(path, &file).map_err(|source| CliError::Write {
            path: path.clone(),
            source,
        })?;
        if let Some(screen) = screen {
            screen.show(image)?;
        }
        if !args.json {
            let (path, width, height, seed) = (
                path.display(),
                image.width,
                image.height,
                request.noise.seed,
            );
            writeln!(stdout, "{path} {width}x{height} seed {seed}").map_err(CliError::Stdout)?;
        }
        written.push(Image::new(
            path,
            encoding.format,
            file.len(),
            image,
            request.noise.seed,
            index,
        ));
    }
    Ok(written)
}
