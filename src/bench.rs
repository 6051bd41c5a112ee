//! Times repeated runs of the same workload, and relates the times to operation counts.

mod calibrate;
mod lora;

use std::fmt;

use kiln_models::families::PromptTemplate;
use kiln_models::flops::FlopCount;
use kiln_models::job::{Job, JobId};
use kiln_models::pipeline::{ModelInfo, Pipeline};
use kiln_models::step_cache::StepCounts;
use serde::Serialize;
use serde_json::Value;

use crate::engine::JobError;
use crate::measure::{Cost, Table, measure_call, median};
use crate::request::{GenerationRequest, PromptTokens};

pub use self::calibrate::{CALIBRATION_PROMPTS, CacheRatios, CalibrationError};
pub use self::lora::{LoraBenchError, LoraCost, LoraCosts, RandomLoras};

/// Tokens of a blank negative prompt: one, plus the five of the template's suffix.
pub const NEGATIVE_PROMPT_TOKENS: usize = 6;

/// The work of one run: everything but the token ids of the prompts.
#[derive(Debug, Clone)]
pub struct Workload {
    /// Size, steps, number of images and scale. The texts of the prompts are not used; a negative
    /// prompt enables guidance if the scale is above 1.
    pub request: GenerationRequest,
    /// Tokens of the prompt and the template's suffix, without the template's dropped prefix.
    pub prompt_tokens: usize,
    pub template: &'static PromptTemplate,
}

impl Workload {
    /// The job of one run. Every run has prompts of its own, so that none is served from the cache
    /// of prompt embeddings.
    pub fn job(&self, run: usize, vocab_size: usize) -> Job {
        let prompt = |tokens: usize, which: usize| {
            (0..self.template.dropped_tokens + tokens)
                .map(|place| random_id([run, which, place], vocab_size))
                .collect()
        };
        let guided = self.request.guidance().is_some();
        let tokens = PromptTokens {
            prompt: prompt(self.prompt_tokens, 0),
            negative_prompt: guided.then(|| prompt(NEGATIVE_PROMPT_TOKENS, 1)),
        };
        self.request.clone().into_job(tokens, Vec::new(), false)
    }
}

/// A pseudorandom token id (the finaliser of `SplitMix64`).
fn random_id(seed: [usize; 3], vocab_size: usize) -> u32 {
    let mix = |state: u64, value: usize| {
        let mut x = (state ^ value as u64).wrapping_add(0x9e37_79b9_7f4a_7c15);
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    };
    (seed.into_iter().fold(0, mix) % vocab_size as u64) as u32
}

/// Duration of each stage of a run, in seconds.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Run {
    /// Text encoder, noise and schedule.
    pub encode: f64,
    pub steps: Vec<f64>,
    /// What the steps ran.
    #[serde(flatten)]
    pub counts: StepCounts,
    pub decode: f64,
    pub total: f64,
    /// Peak memory in bytes, `None` if the backend does not count it.
    pub peak_memory_bytes: Option<u64>,
}

impl Run {
    /// Runs one job on a pipeline and measures its stages.
    pub fn measure(pipeline: &mut dyn Pipeline, job: Job) -> Result<Self, JobError> {
        const ID: JobId = 0;
        let total_steps = job.sampling.steps;
        let ((), encode) = measure_call(pipeline, |pipeline| pipeline.start(ID, job))?;
        let mut steps = Vec::with_capacity(total_steps);
        let mut counts = StepCounts::default();
        for _ in 0..total_steps {
            let (outcomes, cost) = measure_call(pipeline, |pipeline| pipeline.step(&[ID]))?;
            counts = outcomes.first().map_or(counts, |outcome| outcome.counts);
            steps.push(cost);
        }
        let (_, decode) = measure_call(pipeline, |pipeline| pipeline.finish(ID))?;

        let costs = || steps.iter().chain([&encode, &decode]);
        Ok(Self {
            total: costs().map(|cost| cost.seconds).sum(),
            peak_memory_bytes: costs().filter_map(peak).max(),
            encode: encode.seconds,
            decode: decode.seconds,
            steps: steps.iter().map(|cost| cost.seconds).collect(),
            counts,
        })
    }
}

/// Peak memory of a stage in bytes. GPU backends do not return memory to the device, so memory
/// reserved after a stage is its peak.
fn peak(cost: &Cost) -> Option<u64> {
    cost.memory_peak.or(cost.memory_reserved)
}

/// One value for each stage.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Stages {
    pub encode: f64,
    /// One step.
    pub step: f64,
    pub decode: f64,
    /// The whole run.
    pub total: f64,
}

impl Stages {
    /// Medians over the runs; `step` is the median over the steps of all runs.
    fn medians(runs: &[Run]) -> Self {
        let of = |values: Vec<f64>| median(values).unwrap_or(0.0);
        let over = |stage: &dyn Fn(&Run) -> f64| of(runs.iter().map(stage).collect());
        Self {
            encode: over(&|run| run.encode),
            step: of(runs.iter().flat_map(|run| run.steps.clone()).collect()),
            decode: over(&|run| run.decode),
            total: over(&|run| run.total),
        }
    }

    /// Floating-point operations in units of 10¹², two for each multiply-add. Excludes the
    /// modulation table of the schedule, which only the warm-up computes.
    fn tflop(counts: FlopCount) -> Self {
        let tera = |multiply_adds: u64| 2e-12 * multiply_adds as f64;
        let (encode, step) = (tera(counts.encode), tera(counts.step));
        let decode = tera(counts.decode);
        Self {
            encode,
            step,
            decode,
            total: encode + tera(counts.denoise) + decode,
        }
    }

    fn all(value: f64) -> Self {
        Self {
            encode: value,
            step: value,
            decode: value,
            total: value,
        }
    }

    fn zip_with(self, other: Self, with: impl Fn(f64, f64) -> f64) -> Self {
        Self {
            encode: with(self.encode, other.encode),
            step: with(self.step, other.step),
            decode: with(self.decode, other.decode),
            total: with(self.total, other.total),
        }
    }

    fn named(self) -> [(&'static str, f64); 4] {
        [
            ("encode", self.encode),
            ("step", self.step),
            ("decode", self.decode),
            ("total", self.total),
        ]
    }
}

/// Costs of loading a model and of its runs.
#[derive(Debug, Clone)]
pub struct Measurement {
    pub load: Cost,
    /// The first run, which also compiles and tunes kernels and fills caches.
    pub warm_up: Run,
    pub runs: Vec<Run>,
}

impl Measurement {
    /// Runs the workload once to warm up, then `runs` times. Calls `on_run` with the number and the
    /// durations of every finished run; the warm-up is number 0.
    pub fn take(
        pipeline: &mut dyn Pipeline,
        load: Cost,
        workload: &Workload,
        runs: usize,
        mut on_run: impl FnMut(usize, &Run),
    ) -> Result<Self, JobError> {
        let vocab_size = pipeline.info().vocab_size;
        let mut run = |number: usize| {
            let run = Run::measure(pipeline, workload.job(number, vocab_size))?;
            on_run(number, &run);
            Ok(run)
        };
        Ok(Self {
            load,
            warm_up: run(0)?,
            runs: (1..=runs).map(run).collect::<Result<_, JobError>>()?,
        })
    }
}

/// The workload and the measurements, as `kiln bench --json` prints them. Durations are in seconds.
#[derive(Debug, Clone, Serialize)]
pub struct BenchReport {
    /// kiln's version.
    pub kiln: &'static str,
    /// The model's name, as in messages.
    pub model: String,
    pub device: String,
    pub dtype: &'static str,
    pub width: usize,
    pub height: usize,
    pub images: usize,
    pub num_inference_steps: usize,
    /// The step cache, as in a request.
    pub cache: Value,
    /// Part of the steps after which guidance was gated, 1 for none.
    pub cfg_gate_step: f64,
    /// Whether each step also runs the transformer on a negative prompt.
    pub guidance: bool,
    pub prompt_tokens: usize,
    pub load_seconds: f64,
    pub warm_up: Run,
    pub runs: Vec<Run>,
    pub median_seconds: Stages,
    /// Operations of each stage in TFLOP, counted from the model's shapes.
    pub tflop: Stages,
    pub tflop_per_second: Stages,
    /// Peak TFLOP/s of the device, as given by the user.
    pub peak_tflops: Option<f64>,
    /// `tflop_per_second` divided by `peak_tflops`.
    pub share_of_peak: Option<Stages>,
    /// Peak memory over all stages, loading included.
    pub peak_memory_bytes: Option<u64>,
    /// What adapters cost, if that was measured.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loras: Option<LoraCosts>,
}

impl BenchReport {
    pub fn new(
        model: String,
        info: &ModelInfo,
        workload: &Workload,
        counts: FlopCount,
        measurement: Measurement,
        peak_tflops: Option<f64>,
    ) -> Self {
        let Measurement {
            load,
            warm_up,
            runs,
        } = measurement;
        let request = &workload.request;
        let median_seconds = Stages::medians(&runs);
        let tflop = Stages::tflop(counts);
        let ratio = |a, b| a / b;
        let tflop_per_second = tflop.zip_with(median_seconds, ratio);
        let peaks = runs
            .iter()
            .chain([&warm_up])
            .map(|run| run.peak_memory_bytes);
        Self {
            kiln: crate::version::VERSION,
            model,
            device: info.device(),
            dtype: info.dtype,
            width: request.size.width,
            height: request.size.height,
            images: request.num_images,
            num_inference_steps: request.sampling.steps,
            cache: request.cache.choice.to_json(),
            cfg_gate_step: request.cfg_gate_step.unwrap_or(1.0),
            guidance: request.guidance().is_some(),
            prompt_tokens: workload.prompt_tokens,
            load_seconds: load.seconds,
            peak_memory_bytes: peaks.chain([peak(&load)]).flatten().max(),
            warm_up,
            runs,
            loras: None,
            median_seconds,
            tflop,
            tflop_per_second,
            peak_tflops,
            share_of_peak: peak_tflops
                .map(|peak| tflop_per_second.zip_with(Stages::all(peak), ratio)),
        }
    }

    fn table(&self) -> Table {
        let mut head = vec!["stage", "seconds", "TFLOP", "TFLOP/s"];
        head.extend(self.share_of_peak.map(|_| "of peak"));
        let stages = self.median_seconds.named().into_iter();
        let rows = stages.enumerate().map(|(index, (name, seconds))| {
            let tflop = self.tflop.named()[index].1;
            let rate = self.tflop_per_second.named()[index].1;
            let mut row = vec![
                name.to_owned(),
                format!("{seconds:.4}"),
                format!("{tflop:.4}"),
                format!("{rate:.3}"),
            ];
            let share = self.share_of_peak.map(|share| share.named()[index].1);
            row.extend(share.map(|share| format!("{:.1} %", 100.0 * share)));
            row
        });
        Table {
            caption: format!("Medians of {} runs after a warm-up", self.runs.len()),
            rows: rows.collect(),
            head: head.into_iter().map(str::to_owned).collect(),
        }
    }
}

/// Formats the report as Markdown.
impl fmt::Display for BenchReport {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (width, height) = (self.width, self.height);
        writeln!(
            formatter,
            "{} on {} in {}: {width}x{height}, images: {}, steps: {}{}, tokens of the prompt: {}\n",
            self.model,
            self.device,
            self.dtype,
            self.images,
            self.num_inference_steps,
            if self.guidance { " with guidance" } else { "" },
            self.prompt_tokens,
        )?;
        let counts = self.warm_up.counts;
        if counts.skipped > 0 || counts.gated > 0 {
            writeln!(
                formatter,
                "Steps that reused an earlier one: {}, without the negative prompt: {}\n",
                counts.skipped, counts.gated
            )?;
        }
        writeln!(formatter, "{}\n", self.table())?;
        if let Some(loras) = &self.loras {
            writeln!(formatter, "{loras}\n")?;
        }
        let warm_up = self.warm_up.total;
        write!(
            formatter,
            "Loaded in {:.2} s, warm-up {warm_up:.2} s",
            self.load_seconds
        )?;
        if let Some(bytes) = self.peak_memory_bytes {
            write!(formatter, ", at most {} MiB of memory", bytes >> 20)?;
        }
        writeln!(formatter, ".")
    }
}

#[cfg(test)]
mod tests {
    use kiln_models::families::qwen_image::TEMPLATE;
    use kiln_models::job::{Guidance, Noise, Sampling, Size};
    use kiln_models::noise::NoiseGenerator;

    use super::*;
    use crate::request::{RequestCache, RequestSchedule, ScheduleOrigin};

    fn workload(true_cfg_scale: f64) -> Workload {
        Workload {
            request: GenerationRequest {
                prompt: String::new(),
                negative_prompt: Some(String::new()),
                true_cfg_scale,
                size: Size {
                    height: 32,
                    width: 48,
                },
                sampling: Sampling::new(2),
                num_images: 1,
                noise: Noise {
                    seed: 0,
                    generator: NoiseGenerator::Cpu,
                },
                cache: RequestCache::default(),
                cfg_gate_step: None,
                adapters: Vec::new(),
                merged: None,
                schedule: RequestSchedule {
                    origin: ScheduleOrigin::Model,
                    name: None,
                    shift: None,
                    terminal: None,
                    stochastic: false,
                    sigmas: Vec::new(),
                },
                warnings: Vec::new(),
            },
            prompt_tokens: 10,
            template: &TEMPLATE,
        }
    }

    #[test]
    fn runs_have_different_prompts_within_the_vocabulary() {
        let negative = |job: &Job| job.guidance.clone().map(|it: Guidance| it.negative.tokens);
        let jobs = [0, 1].map(|run| workload(4.0).job(run, 100));
        for job in &jobs {
            let negative = negative(job).unwrap();
            assert_eq!(job.conditioning.tokens.len(), TEMPLATE.dropped_tokens + 10);
            assert_eq!(negative.len(), TEMPLATE.dropped_tokens + 6);
            assert!(
                job.conditioning
                    .tokens
                    .iter()
                    .chain(&negative)
                    .all(|&id| id < 100)
            );
            assert_ne!(job.conditioning.tokens[..negative.len()], negative[..]);
        }
        assert_ne!(jobs[0].conditioning, jobs[1].conditioning);
        assert_ne!(negative(&jobs[0]), negative(&jobs[1]));
        assert_eq!(workload(1.0).job(0, 100).guidance, None);
    }

    fn run(encode: f64, steps: &[f64], decode: f64) -> Run {
        Run {
            encode,
            steps: steps.to_vec(),
            counts: StepCounts::default(),
            decode,
            total: encode + steps.iter().sum::<f64>() + decode,
            peak_memory_bytes: None,
        }
    }

    #[test]
    fn medians_are_over_runs_and_over_all_steps() {
        let runs = [
            run(1.0, &[5.0, 7.0], 2.0),
            run(3.0, &[6.0, 100.0], 2.5),
            run(2.0, &[1.0, 2.0], 9.0),
        ];
        assert_eq!(
            Stages::medians(&runs),
            Stages {
                encode: 2.0,
                step: 5.5,
                decode: 2.5,
                total: 15.0,
            }
        );
    }

    #[test]
    fn total_operations_are_the_sum_of_the_stages() {
        let counts = FlopCount {
            encode: 1_000_000_000_000,
            modulation: 7,
            step: 2_000_000_000_000,
            denoise: 20_000_000_000_000,
            decode: 500_000_000_000,
        };
        assert_eq!(
            Stages::tflop(counts),
            Stages {
                encode: 2.0,
                step: 4.0,
                decode: 1.0,
                total: 43.0,
            }
        );
    }
}
