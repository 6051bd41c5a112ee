//! How much work a job is, and how fast the device does such work.

use std::collections::VecDeque;
use std::time::Duration;

use kiln_models::flops::FlopCount;

/// Measurements of a stage that are remembered.
const REMEMBERED: usize = 15;

/// What a job does on the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stage {
    Encode,
    Step,
    Decode,
}

/// A job's work by stage, in multiply-adds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Work {
    encode: f64,
    /// Work of one step.
    step: f64,
    decode: f64,
    steps: usize,
}

impl Work {
    pub(super) fn new(count: FlopCount, steps: usize) -> Self {
        Self {
            encode: count.encode as f64,
            step: count.step as f64,
            decode: count.decode as f64,
            steps,
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
