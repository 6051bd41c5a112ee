//! Compares step caches and the guidance gate with the exact run: time, SSIM and PSNR of the images.
//!
//! `cargo bench --bench caches -- MODEL SIDE STEPS PROMPTS` prints a table as Markdown. MODEL is `demo`, a
//! folder, or `width-768` for random weights of the demo's shape with a transformer of width 768 (6 heads
//! of 128, 4 layers). The prompts are those that the demo understands; every mode generates every prompt
//! with the same seed, in turn.

#![expect(clippy::print_stdout, reason = "prints its results")]

use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use kiln::backend::LoadSettings;
use kiln::bench::CacheRatios;

use kiln::compare::{Comparison, ImageDifference, Recording, Tolerance};
use kiln::runtime::{LoadFormat, Model, ModelSettings};
use kiln_models::job::{Job, Noise, Output, RgbImage, Sampling, Size};
use kiln_models::loading::ModelDType;
use kiln_models::noise::NoiseGenerator;
use kiln_models::pipeline::Pipeline;
use kiln_models::step_cache::{CachePolicy, DbCache, MagCache, QWEN_IMAGE_RATIOS};
use kiln_models::testing;
use serde_json::{Value, json};

const SHAPES: [&str; 3] = ["circle", "square", "triangle"];
const COLOURS: [&str; 8] = [
    "red", "orange", "yellow", "green", "blue", "purple", "white", "black",
];
const SIZES: [&str; 2] = ["large", "small"];
const PLACES: [&str; 5] = [
    "in the center",
    "at the top",
    "on the left",
    "in the bottom right corner",
    "at the bottom",
];

/// Prompts that the ratios are measured with; the images of the others are compared as well.
const CALIBRATION_PROMPTS: usize = 4;

/// Prompt number `index`: every shape and colour comes in turn.
fn prompt(index: usize) -> String {
    format!(
        "a {} {} {} {} on a {} background",
        SIZES[index / 3 % 2],
        COLOURS[index % 8],
        SHAPES[index % 3],
        PLACES[index % 5],
        COLOURS[(3 * index + 5 + index / 8) % 8],
    )
}

/// One way of generating an image.
struct Mode {
    name: String,
    steps: usize,
    cache: CachePolicy,
    gate: Option<f64>,
}

/// The exact run, and everything that is compared with it.
fn modes(steps: usize, measured: &[f64]) -> Vec<Mode> {
    let mask = |settings: MagCache| CachePolicy::Mask(settings.mask(steps));
    let qwen = || Some(QWEN_IMAGE_RATIOS.into());
    let own = || Some(measured.into());
    let linear = DbCache {
        taylorseer_order: 1,
        ..DbCache::default()
    };
    let dbcache = || CachePolicy::DbCache(DbCache::default());
    let caches = [
        ("exact", CachePolicy::Off),
        ("every second step", mask(MagCache::balanced(None))),
        ("balanced, own ratios", mask(MagCache::balanced(own()))),
        ("fast, own ratios", mask(MagCache::fast(own()))),
        (
            "balanced, Qwen-Image's ratios",
            mask(MagCache::balanced(qwen())),
        ),
        ("fast, Qwen-Image's ratios", mask(MagCache::fast(qwen()))),
        ("dbcache", dbcache()),
        ("dbcache, taylorseer_order 1", CachePolicy::DbCache(linear)),
    ];
    let mode = |name: &str, cache, gate| Mode {
        name: name.to_owned(),
        steps,
        cache,
        gate,
    };
    let mut modes: Vec<Mode> = caches
        .into_iter()
        .map(|(name, cache)| mode(name, cache, None))
        .collect();
    modes.push(mode("gate 0.7", CachePolicy::Off, Some(0.7)));
    modes.push(mode("gate 0.5", CachePolicy::Off, Some(0.5)));
    modes.push(mode("dbcache, gate 0.5", dbcache(), Some(0.5)));
    // What a cache competes with: fewer steps, all computed.
    for fewer in [steps * 3 / 5, steps / 3] {
        modes.push(Mode {
            steps: fewer,
            ..mode(&format!("exact, {fewer} steps"), CachePolicy::Off, None)
        });
    }
    modes
}

/// What one mode took, and how far its images are from the exact ones.
#[derive(Default)]
struct Results {
    computed: usize,
    gated: usize,
    /// Seconds of each prompt's steps.
    denoise: Vec<f64>,
    /// Seconds of each prompt's whole run.
    total: Vec<f64>,
    differences: Vec<ImageDifference>,
}

impl Results {
    /// Columns of the table. Times and their ratios are medians over the prompts.
    fn row(&self, mode: &Mode, exact: &Self) -> String {
        let count = self.differences.len() as f64;
        let speed = |exact: &[f64], own: &[f64]| {
            median(
                exact
                    .iter()
                    .zip(own)
                    .map(|(exact, own)| exact / own)
                    .collect(),
            )
        };
        let mean = |sum: usize| sum as f64 / count;
        let ssim = self.differences.iter().filter_map(|it| it.ssim);
        let psnr = self.differences.iter().filter_map(|it| it.psnr_db);
        format!(
            "| {} | {:.1} of {} | {:.1} | {:.4} | {:.2} | {:.4} | {:.2} | {} | {} |",
            mode.name,
            mean(self.computed),
            mode.steps,
            mean(self.gated),
            median(self.denoise.clone()),
            speed(&exact.denoise, &self.denoise),
            median(self.total.clone()),
            speed(&exact.total, &self.total),
            mean_and_least(ssim.collect(), 4),
            mean_and_least(psnr.collect(), 1),
        )
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// `mean, least`. Images that are equal have no PSNR and are left out.
fn mean_and_least(values: Vec<f64>, digits: usize) -> String {
    if values.is_empty() {
        return "equal".to_owned();
    }
    let mean = values.iter().sum::<f64>() / values.len() as f64;
    let least = values.into_iter().fold(f64::INFINITY, f64::min);
    format!("{mean:.digits$}, {least:.digits$}")
}

/// Generates one image. Returns it with the seconds of its steps and of the whole run.
fn generate(pipeline: &mut dyn Pipeline, job: Job) -> Result<(Output, f64, f64), Box<dyn Error>> {
    let started = Instant::now();
    pipeline.start(0, job)?;
    let first_step = Instant::now();
    while pipeline.step(&[0])?[0].steps_left > 0 {}
    let denoise = first_step.elapsed().as_secs_f64();
    let output = pipeline.finish(0)?;
    Ok((output, denoise, started.elapsed().as_secs_f64()))
}

fn difference(reference: &RgbImage, image: &RgbImage) -> Result<ImageDifference, Box<dyn Error>> {
    let recording = |name: &str, image: &RgbImage| Recording {
        name: name.to_owned(),
        trace: Vec::new(),
        image: image.clone(),
    };
    let comparison = Comparison::new(
        &recording("exact", reference),
        &recording("other", image),
        Tolerance::of(ModelDType::F32),
    )?;
    let image = comparison.stages.last().and_then(|stage| stage.image);
    image.ok_or_else(|| "the comparison has no image".into())
}

/// Writes the demo's files with the configuration of a transformer of width 768 to a folder.
fn make_width_768(folder: &Path) -> Result<(), Box<dyn Error>> {
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/demo");
    for part in [
        "scheduler",
        "text_encoder",
        "tokenizer",
        "transformer",
        "vae",
    ] {
        fs::create_dir_all(folder.join(part))?;
        for file in fs::read_dir(demo.join(part))? {
            let file = file?;
            if file.path().extension().is_none_or(|it| it != "safetensors") {
                fs::copy(file.path(), folder.join(part).join(file.file_name()))?;
            }
        }
    }
    fs::copy(
        demo.join("model_index.json"),
        folder.join("model_index.json"),
    )?;
    let path = folder.join("transformer/config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path)?)?;
    config["num_layers"] = json!(4);
    config["num_attention_heads"] = json!(6);
    config["attention_head_dim"] = json!(128);
    config["axes_dims_rope"] = json!([16, 56, 56]);
    fs::write(path, config.to_string())?;
    Ok(())
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args()
        .skip(1)
        .filter(|argument| !argument.starts_with("--"))
        .collect();
    let [name, side, steps, prompts] = &arguments[..] else {
        return Err("arguments: MODEL SIDE STEPS PROMPTS".into());
    };
    let (side, steps): (usize, usize) = (side.parse()?, steps.parse()?);
    let prompts: usize = prompts.parse()?;

    let random = tempfile::tempdir()?;
    let settings = if name == "width-768" {
        make_width_768(random.path())?;
        ModelSettings {
            load_format: LoadFormat::Dummy,
            ..ModelSettings::new(PathBuf::from(random.path()))
        }
    } else {
        ModelSettings::new(name)
    };
    let model = Model::find(&settings)?;
    let runtime = model.load(&LoadSettings::default())?;
    let mut pipeline = runtime.pipeline;
    let negative = runtime.tokenizer.encode_prompt(" ")?;
    let job = |index: usize| -> Result<Job, Box<dyn Error>> {
        Ok(Job {
            conditioning: runtime.tokenizer.encode_prompt(&prompt(index))?.into(),
            guidance: testing::guidance(negative.clone(), 4.0),
            size: Size::square(side),
            noise: Noise {
                seed: index as u64,
                generator: NoiseGenerator::Cpu,
            },
            ..testing::job(side, steps)
        })
    };

    let calibration: Vec<Job> = (0..CALIBRATION_PROMPTS.min(prompts))
        .map(job)
        .collect::<Result<_, _>>()?;
    let ratios = CacheRatios::measure(&mut *pipeline, calibration, |_, _| {})?;
    let modes = modes(steps, &ratios.mag_ratios);
    let mut results: Vec<Results> = modes.iter().map(|_| Results::default()).collect();
    for index in 0..prompts {
        let mut exact: Option<RgbImage> = None;
        for (mode, results) in modes.iter().zip(&mut results) {
            let job = Job {
                sampling: Sampling::new(mode.steps),
                cache: mode.cache.clone(),
                cfg_gate_step: mode.gate,
                ..job(index)?
            };
            let (output, denoise, total) = generate(&mut *pipeline, job)?;
            let image = output.images.first().ok_or("a job without images")?;
            let reference = exact.get_or_insert_with(|| image.clone());
            results.differences.push(difference(reference, image)?);
            results.computed += output.steps.computed;
            results.gated += output.steps.gated;
            results.denoise.push(denoise);
            results.total.push(total);
        }
    }

    println!(
        "{name} on {}, {side}x{side}, {steps} steps with guidance 4, {prompts} prompts of one image\n",
        runtime.info.device(),
    );
    println!("Its own ratios: {}\n", serde_json::to_string(&ratios)?);
    println!(
        "| mode | computed steps | gated steps | steps s | speed | image s | speed | SSIM mean, least | \
         PSNR dB mean, least |\n|---|---|---|---|---|---|---|---|---|"
    );
    for (mode, of_mode) in modes.iter().zip(&results) {
        println!("{}", of_mode.row(mode, &results[0]));
    }
    Ok(())
}
