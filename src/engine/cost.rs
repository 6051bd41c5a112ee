//! How much work a job is, and how fast the device does such work.

use std::collections::VecDeque;
use std::time::Duration;

use kiln_models::flops::FlopCount;

/// Number of measurements of a stage that the estimates are made from.
const REMEMBERED: usize = 15;

/// What a job does on the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stage {
    Encode,
    /// One denoising step.
    Step,
    Decode,
}

/// A job's work by stage, in multiply-adds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Work {
    encode: f64,
    /// Work of one full step.
    step: f64,
    /// Work of all steps, without what a step cache is known to leave out.
    denoise: f64,
    decode: f64,
    steps: usize,
}

impl Work {
    pub(super) fn new(count: FlopCount, steps: usize) -> Self {
        Self {
            encode: count.encode as f64,
            step: count.step as f64,
            denoise: count.denoise as f64,
            decode: count.decode as f64,
            steps,
        }
    }

    /// The work of all stages.
    pub(super) fn total(&self) -> f64 {
        self.encode + self.denoise + self.decode
    }

    /// Work of the last steps, if all steps took the same.
    fn denoise_left(&self, steps_left: usize) -> f64 {
        self.denoise * steps_left as f64 / self.steps.max(1) as f64
    }

    pub(super) fn of_stage(&self, stage: Stage) -> f64 {
        match stage {
            Stage::Encode => self.encode,
            Stage::Step => self.step,
            Stage::Decode => self.decode,
        }
    }
}

/// Divides the time of one call among its jobs in proportion to their work. The shares add up to
/// the whole time exactly.
pub(super) fn shares(took: Duration, works: &[f64]) -> Vec<Duration> {
    let all: f64 = works.iter().sum();
    let mut done = 0.0;
    let mut given = Duration::ZERO;
    let mut shares = Vec::with_capacity(works.len());
    for (index, work) in works.iter().enumerate() {
        done += work;
        let is_last = index + 1 == works.len();
        let until = if is_last || all <= 0.0 {
            took
        } else {
            took.mul_f64((done / all).min(1.0)).min(took)
        };
        shares.push(until.saturating_sub(given));
        given = until;
    }
    shares
}

/// A running estimate of the device's speed. Each stage has its own estimate, because a device
/// reaches a different part of its peak in each.
#[derive(Debug, Default)]
pub(super) struct Speed {
    encode: Measurements,
    step: Measurements,
    decode: Measurements,
}

impl Speed {
    /// Adds a measurement: `work` multiply-adds of a stage took this long.
    pub(super) fn add(&mut self, stage: Stage, work: f64, took: Duration) {
        let measurements = match stage {
            Stage::Encode => &mut self.encode,
            Stage::Step => &mut self.step,
            Stage::Decode => &mut self.decode,
        };
        measurements.add(took.as_secs_f64() / work.max(1.0));
    }

    /// How long one step of a job probably takes. `None` before a step has been measured.
    pub(super) fn step(&self, work: &Work) -> Option<Duration> {
        Duration::try_from_secs_f64(self.step.median()? * work.step).ok()
    }

    /// How long the rest of a job takes on the device. `None` before each of the job's stages has
    /// been measured once. `is_started` says whether the job's prompts are encoded.
    pub(super) fn rest(
        &self,
        work: &Work,
        is_started: bool,
        steps_left: usize,
    ) -> Option<Duration> {
        let encode = if is_started {
            0.0
        } else {
            self.encode.median()? * work.encode
        };
        let decode = self.decode.median()? * work.decode;
        let steps = self.step.median()? * work.denoise_left(steps_left);
        Duration::try_from_secs_f64(encode + steps + decode).ok()
    }

    /// How long the rest of a job takes at least: at the best speed that was measured of each stage.
    /// The first run of a stage may compile kernels, so a stage that was measured once counts as
    /// nothing. `None` before two steps have been measured.
    pub(super) fn least_rest(
        &self,
        work: &Work,
        is_started: bool,
        steps_left: usize,
    ) -> Option<Duration> {
        let encode = self.encode.best().unwrap_or_default() * work.encode;
        let decode = self.decode.best().unwrap_or_default() * work.decode;
        let steps = self.step.best()? * work.denoise_left(steps_left);
        let encode = if is_started { 0.0 } else { encode };
        Duration::try_from_secs_f64(encode + steps + decode).ok()
    }

    /// As [`Speed::rest`], for a job that has made a step. Decoding that has not been measured is
    /// assumed to run at the speed of the steps.
    pub(super) fn rest_after_step(&self, work: &Work, steps_left: usize) -> Option<Duration> {
        let step = self.step.median()?;
        let decode = self.decode.median().unwrap_or(step) * work.decode;
        let steps = step * work.denoise_left(steps_left);
        Duration::try_from_secs_f64(steps + decode).ok()
    }
}

/// The last measurements, in seconds per multiply-add.
#[derive(Debug, Default)]
struct Measurements(VecDeque<f64>);

impl Measurements {
    fn add(&mut self, seconds_per_unit: f64) {
        if self.0.len() == REMEMBERED {
            self.0.pop_front();
        }
        self.0.push_back(seconds_per_unit);
    }

    /// The least of at least two measurements.
    fn best(&self) -> Option<f64> {
        let least = self.0.iter().copied().min_by(f64::total_cmp);
        least.filter(|_| self.0.len() > 1)
    }

    /// The median, because the first run of a shape can take many times as long as later ones
    /// (kernels are compiled and tuned). Of an even number of measurements, the faster of the
    /// middle two.
    fn median(&self) -> Option<f64> {
        let mut sorted: Vec<f64> = self.0.iter().copied().collect();
        sorted.sort_by(f64::total_cmp);
        let middle = sorted.len().checked_sub(1)? / 2;
        sorted.get(middle).copied()
    }
}
