//! Measures time and peak memory of each stage of generating one image, and prints them as JSON.
//!
//! `cargo bench --bench stages -- MODEL HEIGHT WIDTH STEPS DTYPE`; `benches/compare_diffusers.py`
//! compares it with diffusers.

#![expect(clippy::print_stdout, reason = "prints its results")]

use std::error::Error;
use std::fs;
use std::path::Path;
use std::time::Instant;

use kiln::backend::{self, LoadSettings};
use kiln::checkpoint::Checkpoint;
use kiln_models::job::{Job, Noise, Size};
use kiln_models::noise::NoiseGenerator;
use kiln_models::testing;
use serde_json::{Value, json};

/// Peak resident memory in MiB since the last call; `None` if the system is not Linux.
fn take_peak() -> Option<f64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: f64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    fs::write("/proc/self/clear_refs", "5").ok()?;
    Some(kib / 1024.0)
}

/// Runs one stage and measures its time and peak memory.
fn stage<R>(run: impl FnOnce() -> R) -> (R, Value) {
    take_peak();
    let start = Instant::now();
    let result = run();
    let seconds = start.elapsed().as_secs_f64();
    (
        result,
        json!({ "seconds": seconds, "peak_mib": take_peak() }),
    )
}

fn main() -> Result<(), Box<dyn Error>> {
    let process_start = Instant::now();
    let arguments: Vec<String> = std::env::args()
        .skip(1)
        .filter(|a| !a.starts_with("--"))
        .collect();
    let [model, height, width, steps, dtype] = &arguments[..] else {
        return Err("arguments: MODEL HEIGHT WIDTH STEPS DTYPE".into());
    };
    let settings = LoadSettings {
        dtype: dtype.parse()?,
        ..LoadSettings::default()
    };
    let (loaded, load) = stage(|| -> Result<_, Box<dyn Error>> {
        let checkpoint = Checkpoint::open(Path::new(model))?;
        let tokenizer = checkpoint.tokenizer()?;
        Ok((backend::load(&checkpoint, &settings)?, tokenizer))
    });
    let (mut pipeline, tokenizer) = loaded?;
    let job = Job {
        conditioning: tokenizer
            .encode_prompt("A red fox in the snow, watercolor")?
            .into(),
        guidance: testing::guidance(tokenizer.encode_prompt(" ")?, 4.0),
        size: Size {
            height: height.parse()?,
            width: width.parse()?,
        },
        noise: Noise {
            seed: 42,
            generator: NoiseGenerator::Cpu,
        },
        ..testing::job(16, steps.parse()?)
    };
    let (started, encode) = stage(|| pipeline.start(0, job));
    started?;
    let to_first_step = process_start.elapsed().as_secs_f64();
    let mut denoise = Vec::new();
    loop {
        let (left, measured) = stage(|| pipeline.step(&[0]));
        denoise.push(measured);
        if left?[0].steps_left == 0 {
            break;
        }
    }
    let (output, decode) = stage(|| pipeline.finish(0));
    output?;
    println!(
        "{}",
        json!({
            "load": load, "encode": encode, "steps": denoise, "decode": decode,
            "process_start_to_first_step": to_first_step,
        })
    );
    Ok(())
}
