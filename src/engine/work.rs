//! How much work a job is, and how fast the device does such work.

use std::collections::VecDeque;
use std::time::Duration;

use kiln_models::pipeline::Job;

/// Tokens at which a sequence's attention costs as much as its linear layers: six times the width
/// of Qwen-Image's transformer (3,072).
const ATTENTION_TOKENS: f64 = 18_432.0;
/// Decoding one token of Qwen-Image's latents takes 1.15 GFLOP, one token of a forward 13.6.
const DECODE_WORK_PER_TOKEN: f64 = 0.085;
/// Measurements of a stage that are remembered.
const REMEMBERED: usize = 15;

/// What a job does on the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stage {
    Encode,
    Step,
    Decode,
}

/// A job's work by stage. The unit is what one token costs in one forward of Qwen-Image's
/// transformer without attention; its text encoder's cost per token happens to be the same.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Work {
    encode: f64,
    /// One of them.
    step: f64,
    decode: f64,
    steps: usize,
}

impl Work {
    /// `pixels_per_token` is the side of the square that is one token.
    pub(super) fn of(job: &Job, pixels_per_token: usize) -> Self {
        let image_tokens = (job.height / pixels_per_token) * (job.width / pixels_per_token);
        let negative = job.negative_prompt.as_deref().filter(|_| job.uses_cfg());
        let texts = || std::iter::once(job.prompt.as_slice()).chain(negative);
        let forward = |text: &[u32]| {
            let tokens = (image_tokens + text.len()) as f64;
            tokens * (1.0 + tokens / ATTENTION_TOKENS)
        };
        let images = job.num_images as f64;
        Self {
            encode: texts().map(|text| text.len() as f64).sum(),
            step: images * texts().map(forward).sum::<f64>(),
            decode: images * image_tokens as f64 * DECODE_WORK_PER_TOKEN,
            steps: job.num_inference_steps,
        }
    }

    /// All of it.
    pub(super) fn total(&self) -> f64 {
        self.encode + self.step * self.steps as f64 + self.decode
    }

    pub(super) fn of_stage(&self, stage: Stage) -> f64 {
        match stage {
            Stage::Encode => self.encode,
            Stage::Step => self.step,
            Stage::Decode => self.decode,
        }
    }
}

/// A running estimate of the device's speed. Each stage has its own, as no device is equally good
/// at all of them.
#[derive(Debug, Default)]
pub(super) struct Speed {
    encode: Measurements,
    step: Measurements,
    decode: Measurements,
}

impl Speed {
    pub(super) fn measured(&mut self, stage: Stage, work: &Work, took: Duration) {
        let measurements = match stage {
            Stage::Encode => &mut self.encode,
            Stage::Step => &mut self.step,
            Stage::Decode => &mut self.decode,
        };
        measurements.add(took.as_secs_f64() / work.of_stage(stage).max(1.0));
    }

    /// How long a step probably takes.
    pub(super) fn step(&self, work: &Work) -> Option<Duration> {
        Duration::try_from_secs_f64(self.step.median()? * work.step).ok()
    }

    /// How long the rest of a job takes on the device, or `None` before each of its stages has
    /// been measured once. `started` is whether its prompts are encoded.
    pub(super) fn rest(&self, work: &Work, started: bool, steps_left: usize) -> Option<Duration> {
        let encode = if started {
            0.0
        } else {
            self.encode.median()? * work.encode
        };
        let steps = self.step.median()? * work.step * steps_left as f64;
        let decode = self.decode.median()? * work.decode;
        Duration::try_from_secs_f64(encode + steps + decode).ok()
    }
}

/// The last measurements, in seconds a unit of work.
#[derive(Debug, Default)]
struct Measurements(VecDeque<f64>);

impl Measurements {
    fn add(&mut self, seconds_per_unit: f64) {
        if self.0.len() == REMEMBERED {
            self.0.pop_front();
        }
        self.0.push_back(seconds_per_unit);
    }

    /// The median, because the first run of a shape can take many times as long as later ones
    /// (kernels are compiled and tuned). Of an even number, the faster of the middle two.
    fn median(&self) -> Option<f64> {
        let mut sorted: Vec<f64> = self.0.iter().copied().collect();
        sorted.sort_by(f64::total_cmp);
        let middle = sorted.len().checked_sub(1)? / 2;
        sorted.get(middle).copied()
    }
}
