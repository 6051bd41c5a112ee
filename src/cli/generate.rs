use std::fs;
use std::io::{self, Write};
use std::path::PathBuf;

use kiln_models::painter::Painting;

use crate::backend;
use crate::engine::{Engine, EngineSettings, Event, Finished, JobHandle, SubmitOptions, Timings};
use crate::image::{Encoding, encode};
use crate::request::{GenerationRequest, Limits};

use super::args::GenerateArgs;
use super::dump;
use super::error::CliError;
use super::model::Model;
use super::output;
use super::progress::Progress;

/// `kiln generate`. Everything that can be refused is refused before the weights are loaded.
pub(super) fn run(args: &GenerateArgs) -> Result<(), CliError> {
    let settings = args.loading.settings(args.backend.choice()?)?;
    let noise = args.request.noise.generator();
    let params = args.params();
    // What no model could draw is refused before one is downloaded.
    let any_model = Limits::for_any_model();
    let num_images = GenerationRequest::new(params.clone(), &any_model, noise)?.num_images;
    let paths = output::image_paths(&args.output, num_images)?;
    args.dump
        .as_deref()
        .map_or(Ok(()), output::check_writable)?;

    backend::check(settings.backend)?;

    let model = Model::open(args.model(), args.loading.load_format)?;
    let limits = Limits::for_sizes(model.image_sizes()?);
    let request = GenerationRequest::new(params, &limits, noise)?;
    let tokens = request.tokenize(&model.tokenizer)?;
    let one_job = EngineSettings {
        max_queue: 0,
        max_started: 1,
        warm_up: None,
    };
    let engine = Engine::start(model.painter(&settings)?, one_job);
    let job = request
        .clone()
        .into_job(tokens.clone(), args.dump.is_some());
    let handle = engine.submit(job, SubmitOptions::default())?;
    let finished = paint(handle, request.num_inference_steps)?;

    say_timings(&finished.timings);
    write_images(&finished.painting, &paths, &request, args)?;
    if let Some(path) = &args.dump {
        dump::write(path, &tokens, &finished.painting.trace)?;
    }
    Ok(())
}

fn paint(mut handle: JobHandle, steps: usize) -> Result<Finished, CliError> {
    let mut progress = Progress::new(steps);
    let outcome = loop {
        match handle.blocking_next_event() {
            Event::Queued { .. } | Event::Preview { .. } => {}
            Event::Started => progress.started(),
            Event::Step { done, total } => progress.step(done, total),
            Event::Finished(finished) => break Ok(finished),
            Event::Failed(error) => break Err(error),
        }
    };
    progress.end();
    Ok(outcome?)
}

fn say_timings(timings: &Timings) {
    tracing::info!(
        "painted in {:.1} s: prompts {:.1} s, steps {:.1} s, decoding {:.1} s",
        timings.total().as_secs_f64(),
        timings.encode.as_secs_f64(),
        timings.denoise.as_secs_f64(),
        timings.decode.as_secs_f64(),
    );
}

fn write_images(
    painting: &Painting,
    paths: &[PathBuf],
    request: &GenerationRequest,
    args: &GenerateArgs,
) -> Result<(), CliError> {
    let encoding = Encoding::new(output::image_format(&args.output)?);
    let mut stdout = io::stdout().lock();
    for (index, (image, path)) in painting.images.iter().zip(paths).enumerate() {
        let metadata = (!args.no_metadata).then(|| request.metadata_text(args.model(), index));
        let file = encode(image, encoding, metadata.as_deref())?;
        fs::write(path, file).map_err(|source| CliError::Write {
            path: path.clone(),
            source,
        })?;
        let (path, width, height, seed) = (path.display(), image.width, image.height, request.seed);
        writeln!(stdout, "{path} {width}x{height} seed {seed}").map_err(CliError::Stdout)?;
    }
    Ok(())
}
