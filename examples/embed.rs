//! Generates an image in a program of one's own: `cargo run --example embed -- circle.png`.
//!
//! The model is the demo model, which needs no download. `RuntimeSettings::new("Qwen/Qwen-Image")`
//! loads Qwen-Image.

use std::env;
use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};

use kiln::engine::{Engine, EngineSettings, Event, Finished, SubmitOptions};
use kiln::image::{Encoding, ImageFormat, encode};
use kiln::kiln_models::noise::NoiseGenerator;
use kiln::request::{GenerationParams, GenerationRequest};
use kiln::runtime::{Runtime, RuntimeSettings};

fn main() -> Result<(), Box<dyn Error>> {
    let path = env::args_os()
        .nth(1)
        .map_or("embed.png".into(), PathBuf::from);
    generate("a large red circle on a blue background", &path)
}

/// Generates an image and writes it to a PNG file.
pub(crate) fn generate(prompt: &str, path: &Path) -> Result<(), Box<dyn Error>> {
    let runtime = Runtime::open(&RuntimeSettings::new("demo"))?;

    // Fills in defaults and checks every value against the model's limits.
    let params = GenerationParams {
        prompt: prompt.to_owned(),
        num_inference_steps: Some(8),
        seed: Some(42),
        ..GenerationParams::default()
    };
    let request = GenerationRequest::new(params, &runtime.limits, NoiseGenerator::Cpu)?;
    let tokens = request.tokenize(&runtime.tokenizer)?;

    // The engine's thread owns the pipeline. Jobs may be submitted from any thread.
    let settings = EngineSettings {
        max_queue: 0,
        max_started: 1,
        max_memory: None,
        adapter_cache_bytes: usize::MAX,
        max_step_tokens: None,
        warm_up: None,
    };
    let engine = Engine::start(runtime.pipeline, settings);
    let job = request.clone().into_job(tokens, Vec::new(), false);
    let mut handle = engine.submit(job, SubmitOptions::default())?;
    let Finished { output, .. } = loop {
        match handle.blocking_next_event() {
            Event::Finished(finished) => break finished,
            Event::Failed(error) => return Err(error.into()),
            Event::Queued { .. } | Event::Started | Event::Step { .. } | Event::Preview { .. } => {}
        }
    };

    let metadata = request.metadata_text("demo", 0, output.tiled, output.steps);
    let png = encode(
        &output.images[0],
        Encoding::new(ImageFormat::Png),
        Some(&metadata),
    )?;
    fs::write(path, png)?;
    Ok(())
}
