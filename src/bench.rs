//! How long a pipeline takes for the same work, again and again, and what that is in operations.

use std::fmt;

use kiln_models::families::PromptTemplate;
use kiln_models::flops::FlopCount;
use kiln_models::job::{Job, JobId};
use kiln_models::pipeline::{ModelInfo, Pipeline};
use serde::Serialize;

use crate::compare::{Cost, Table, measured};
use crate::engine::JobError;
use crate::request::{GenerationRequest, PromptTokens};

/// Tokens of a blank negative prompt: one, and the five that the template puts after it.
pub const NEGATIVE_PROMPT_TOKENS: usize = 6;

/// The work of one run, but for the words of its prompts.
#[derive(Debug, Clone)]
pub struct Workload {
    /// Size, steps, images, scale. With a negative prompt, whatever it says, guidance runs if the
    /// scale is above 1.
    pub request: GenerationRequest,
    /// Tokens of the prompt, without the template's first ones.
    pub prompt_tokens: usize,
    pub template: &'static PromptTemplate,
}

impl Workload {
    /// The job of one run. Every run has other prompts, so that none finds them encoded.
    pub fn job(&self, run: usize, vocab_size: usize) -> Job {
        let prompt = |tokens: usize, which: usize| {
            (0..self.template.dropped_tokens + tokens)
                .map(|place| made_up_id([run, which, place], vocab_size))
                .collect()
        };
        let guided = self.request.guidance().is_some();
        let tokens = PromptTokens {
            prompt: prompt(self.prompt_tokens, 0),
            negative_prompt: guided.then(|| prompt(NEGATIVE_PROMPT_TOKENS, 1)),
        };
        self.request.clone().into_job(tokens, false)
    }
}

/// Scatters numbers over a vocabulary (the finaliser of `SplitMix64`).
fn made_up_id(seed: [usize; 3], vocab_size: usize) -> u32 {
    let mix = |state: u64, value: usize| {
        let mut x = (state ^ value as u64).wrapping_add(0x9e37_79b9_7f4a_7c15);
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    };
    (seed.into_iter().fold(0, mix) % vocab_size as u64) as u32
}

/// What each stage of a run took, in seconds.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Run {
    /// Prompts, noise and schedule.
    pub encode: f64,
    pub steps: Vec<f64>,
    pub decode: f64,
    pub total: f64,
    /// The most memory held at once, in bytes, if the backend counts.
    pub peak_memory_bytes: Option<u64>,
}

impl Run {
    /// Runs a job alone on a pipeline.
    pub fn measure(pipeline: &mut dyn Pipeline, job: Job) -> Result<Self, JobError> {
        const ID: JobId = 0;
        let total_steps = job.sampling.steps;
        let ((), encode) = measured(pipeline, |pipeline| pipeline.start(ID, job))?;
        let mut steps = Vec::with_capacity(total_steps);
        for _ in 0..total_steps {
            steps.push(measured(pipeline, |pipeline| pipeline.step(&[ID]))?.1);
        }
        let (_, decode) = measured(pipeline, |pipeline| pipeline.finish(ID))?;

        let costs = || steps.iter().chain([&encode, &decode]);
        Ok(Self {
            total: costs().map(|cost| cost.seconds).sum(),
            peak_memory_bytes: costs().filter_map(peak).max(),
            encode: encode.seconds,
            decode: decode.seconds,
            steps: steps.iter().map(|cost| cost.seconds).collect(),
        })
    }
}

/// The most memory of a stage. GPU backends keep what they took from the device, so that what is
/// reserved at the end is what was needed.
fn peak(cost: &Cost) -> Option<u64> {
    cost.memory_peak.or(cost.memory_reserved)
}

/// The same figure of every stage.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Stages {
    pub encode: f64,
    /// One step.
    pub step: f64,
    pub decode: f64,
    /// A whole run.
    pub total: f64,
}

impl Stages {
    /// Medians over the runs, of a step over the steps of all runs.
    fn medians(runs: &[Run]) -> Self {
        let over = |figure: &dyn Fn(&Run) -> f64| median(runs.iter().map(figure).collect());
        Self {
            encode: over(&|run| run.encode),
            step: median(runs.iter().flat_map(|run| run.steps.clone()).collect()),
            decode: over(&|run| run.decode),
            total: over(&|run| run.total),
        }
    }

    /// 10¹² floating-point operations: two for each multiply-add. Without the modulation of the
    /// schedule, which only the warm-up computes.
    fn tflop(operations: FlopCount, steps: usize) -> Self {
        let tera = |multiply_adds: u64| 2e-12 * multiply_adds as f64;
        let (encode, step) = (tera(operations.encode), tera(operations.step));
        let decode = tera(operations.decode);
        Self {
            encode,
            step,
            decode,
            total: encode + steps as f64 * step + decode,
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

/// The middle value, or the mean of the two in the middle; 0 of none.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => 0.0,
        count if count % 2 == 1 => values[count / 2],
        count => f64::midpoint(values[count / 2 - 1], values[count / 2]),
    }
}

/// A model that was loaded and run.
#[derive(Debug, Clone)]
pub struct Measurement {
    pub load: Cost,
    /// The first run, which also compiles, tunes and fills caches.
    pub warm_up: Run,
    pub runs: Vec<Run>,
}

impl Measurement {
    /// Runs the workload once to warm up, then `runs` times. `on_run` hears of every run that is
    /// over; the warm-up is number 0.
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

/// All that was measured, and of what. Times are in seconds.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Version.
    pub kiln: &'static str,
    /// As messages name it.
    pub model: String,
    pub device: String,
    pub dtype: &'static str,
    pub width: usize,
    pub height: usize,
    pub images: usize,
    pub num_inference_steps: usize,
    /// Whether each step runs the transformer on a negative prompt too.
    pub guidance: bool,
    pub prompt_tokens: usize,
    pub load_seconds: f64,
    pub warm_up: Run,
    pub runs: Vec<Run>,
    pub median_seconds: Stages,
    /// Counted, not measured.
    pub tflop: Stages,
    pub tflop_per_second: Stages,
    /// TFLOP/s that the device is said to reach.
    pub peak_tflops: Option<f64>,
    pub share_of_peak: Option<Stages>,
    /// Of all stages, loading with them.
    pub peak_memory_bytes: Option<u64>,
}

impl Report {
    pub fn new(
        model: String,
        info: &ModelInfo,
        workload: &Workload,
        operations: FlopCount,
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
        let tflop = Stages::tflop(operations, request.sampling.steps);
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
            guidance: request.guidance().is_some(),
            prompt_tokens: workload.prompt_tokens,
            load_seconds: load.seconds,
            peak_memory_bytes: peaks.chain([peak(&load)]).flatten().max(),
            warm_up,
            runs,
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

/// As Markdown.
impl fmt::Display for Report {
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
        writeln!(formatter, "{}\n", self.table())?;
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
                sampling: Sampling { steps: 2 },
                num_images: 1,
                noise: Noise {
                    seed: 0,
                    generator: NoiseGenerator::Cpu,
                },
            },
            prompt_tokens: 10,
            template: &TEMPLATE,
        }
    }

    #[test]
    fn every_run_has_prompts_of_its_own_in_the_vocabulary() {
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
    fn a_run_is_its_stages() {
        let operations = FlopCount {
            encode: 1_000_000_000_000,
            modulation: 7,
            step: 2_000_000_000_000,
            decode: 500_000_000_000,
        };
        assert_eq!(
            Stages::tflop(operations, 10),
            Stages {
                encode: 2.0,
                step: 4.0,
                decode: 1.0,
                total: 43.0,
            }
        );
    }
}
