//! How much work a job is, and how fast the devices do such work.

use std::collections::VecDeque;
use std::time::Duration;

use kiln_models::flops::FlopCount;
use kiln_models::job::Job;
use kiln_models::pipeline::StepOutcome;
use kiln_models::step_cache::StepCounts;

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
    /// 0 when the prompts have been encoded together with those of other jobs.
    pub(super) encode: f64,
    /// One full step.
    step: f64,
    /// What all steps together are expected to run.
    denoise: f64,
    decode: f64,
    steps: usize,
    /// 2 with guidance, else 1. The halves of a step can run on two devices.
    halves: usize,
    /// Image tokens of one half, of all images.
    half_tokens: usize,
}

impl Work {
    /// The work of a job whose image tokens are squares of `token_side` pixels.
    pub(super) fn new(count: FlopCount, job: &Job, token_side: usize) -> Self {
        let sides = [job.size.height, job.size.width].map(|side| side / token_side.max(1));
        Self {
            encode: count.encode as f64,
            step: count.step as f64,
            denoise: count.denoise as f64,
            decode: count.decode as f64,
            steps: job.sampling.steps,
            halves: job.branches().count(),
            half_tokens: job.num_images * sides[0] * sides[1],
        }
    }

    /// The work of all stages.
    pub(super) fn total(&self) -> f64 {
        self.encode + self.denoise + self.decode
    }

    /// The work of the same job made in another way. Its prompts are the same, and as far encoded.
    pub(super) fn made(self, other: Self) -> Self {
        Self {
            encode: self.encode,
            ..other
        }
    }

    pub(super) fn of_stage(&self, stage: Stage) -> f64 {
        match stage {
            Stage::Encode => self.encode,
            Stage::Step => self.step,
            Stage::Decode => self.decode,
        }
    }

    /// Image tokens of a step, of both halves.
    pub(super) fn tokens(&self) -> usize {
        self.halves * self.half_tokens
    }

    /// Image tokens of each half.
    pub(super) fn token_units(&self) -> Vec<f64> {
        vec![self.half_tokens as f64; self.halves]
    }

    /// The work of each half of a full step: what one device does at a time.
    pub(super) fn units(&self) -> Vec<f64> {
        self.halved(self.step)
    }

    /// Work of steps, divided among the halves.
    pub(super) fn halved(&self, work: f64) -> Vec<f64> {
        vec![work / self.halves as f64; self.halves]
    }

    /// The work of each half of a step that gave this outcome. `before` counts the steps before it.
    pub(super) fn units_of(&self, outcome: &StepOutcome, before: StepCounts) -> Vec<f64> {
        let ran = self.step * outcome.work;
        let halves = if outcome.counts.gated > before.gated {
            1
        } else {
            self.halves
        };
        vec![ran / halves as f64; halves]
    }

    /// The work that the next `steps` of the remaining steps are expected to run.
    pub(super) fn expected_steps(&self, progress: Progress, steps: usize) -> f64 {
        let rest = self.steps_rest(progress.steps_left, progress.done);
        rest * steps as f64 / progress.steps_left.max(1) as f64
    }

    /// The work that the remaining steps are expected to run. `done` is the work of the steps before
    /// them.
    fn steps_rest(&self, steps_left: usize, done: f64) -> f64 {
        let full = self.step * steps_left as f64;
        let planned = self.denoise - done;
        let steps_done = self.steps.saturating_sub(steps_left);
        if planned > full + 0.01 * self.step && steps_done > 0 {
            // Steps ran less than was planned, and the others will probably run as little.
            let rate = done / (self.step * steps_done as f64);
            return full * rate.min(1.0);
        }
        planned.clamp(0.0, full)
    }
}

/// How far a job is.
#[derive(Debug, Clone, Copy)]
pub(super) struct Progress {
    /// Whether the job's prompts are encoded.
    pub(super) is_started: bool,
    pub(super) steps_left: usize,
    /// Work of the steps that were made.
    pub(super) done: f64,
}

impl Progress {
    /// A job that has not been started.
    pub(super) fn none(steps: usize) -> Self {
        Self {
            is_started: false,
            steps_left: steps,
            done: 0.0,
        }
    }
}

/// The largest sum on any device when these units are given to the devices one after the other, the
/// longest first, each to the device that has the least.
pub(super) fn makespan(units: &[f64], devices: usize) -> f64 {
    if devices <= 1 {
        return units.iter().sum();
    }
    let mut longest_first = units.to_vec();
    longest_first.sort_by(|a, b| b.total_cmp(a));
    let mut devices = vec![0.0_f64; devices];
    for unit in longest_first {
        if let Some(least) = devices.iter_mut().min_by(|a, b| a.total_cmp(b)) {
            *least += unit;
        }
    }
    devices.into_iter().fold(0.0, f64::max)
}

/// Divides the time of one call among its jobs in proportion to their work, equally if there is
/// none. The shares add up to the whole time exactly.
pub(super) fn shares(took: Duration, works: &[f64]) -> Vec<Duration> {
    let all: f64 = works.iter().sum();
    let equal = all <= 0.0;
    let all = if equal { works.len() as f64 } else { all };
    let mut done = 0.0;
    let mut given = Duration::ZERO;
    let mut shares = Vec::with_capacity(works.len());
    for (index, work) in works.iter().enumerate() {
        done += if equal { 1.0 } else { *work };
        let is_last = index + 1 == works.len();
        let until = if is_last {
            took
        } else {
            took.mul_f64((done / all).min(1.0)).min(took)
        };
        shares.push(until.saturating_sub(given));
        given = until;
    }
    shares
}

/// A running estimate of the speed of one device. Each stage has its own estimate, because a device
/// reaches a different part of its peak in each.
///
/// The time of a step is in proportion to the work of the device that has the most, and a fixed part
/// that each step costs besides.
#[derive(Debug)]
pub(super) struct Speed {
    devices: usize,
    /// The fixed part of a step, as the work that a device does in the same time.
    fixed: f64,
    encode: Measurements,
    step: Measurements,
    decode: Measurements,
}

impl Speed {
    /// Nothing measured yet, on this many devices.
    pub(super) fn new(devices: usize) -> Self {
        Self {
            devices: devices.max(1),
            fixed: 0.0,
            encode: Measurements::default(),
            step: Measurements::default(),
            decode: Measurements::default(),
        }
    }

    pub(super) fn devices(&self) -> usize {
        self.devices
    }

    /// The fixed part of a step, as work.
    pub(super) fn fixed(&self) -> f64 {
        self.fixed
    }

    /// Sets the fixed part of a step. Steps that were measured before are forgotten.
    pub(super) fn set_fixed(&mut self, fixed: f64) {
        self.fixed = fixed;
        self.step = Measurements::default();
    }

    /// Adds a measurement: `work` multiply-adds of the first or the last stage took this long.
    pub(super) fn add(&mut self, stage: Stage, work: f64, took: Duration) {
        let measurements = match stage {
            Stage::Encode => &mut self.encode,
            Stage::Step => return self.add_step(&[work], took),
            Stage::Decode => &mut self.decode,
        };
        measurements.add(took.as_secs_f64() / work.max(1.0));
    }

    /// Adds a measurement: a step of these units took this long.
    pub(super) fn add_step(&mut self, units: &[f64], took: Duration) {
        let work = self.step_work(units);
        self.step.add(took.as_secs_f64() / work.max(1.0));
    }

    /// The expected time of a step of these units, as the work that a device does in that time.
    pub(super) fn step_work(&self, units: &[f64]) -> f64 {
        self.fixed + makespan(units, self.devices)
    }

    /// How long this much work of a stage takes. `None` before the stage has been measured.
    pub(super) fn time(&self, stage: Stage, work: f64) -> Option<f64> {
        let measurements = match stage {
            Stage::Encode => &self.encode,
            Stage::Step => &self.step,
            Stage::Decode => &self.decode,
        };
        Some(measurements.median()? * work)
    }

    /// How long one full step of a job alone probably takes. `None` before a step has been measured.
    pub(super) fn step(&self, work: &Work) -> Option<Duration> {
        let seconds = self.time(Stage::Step, self.step_work(&work.units()))?;
        Duration::try_from_secs_f64(seconds).ok()
    }

    /// The remaining steps of a job alone, as work of a device.
    pub(super) fn steps_rest(&self, work: &Work, progress: Progress) -> f64 {
        let fixed = self.fixed * progress.steps_left as f64;
        let rest = work.steps_rest(progress.steps_left, progress.done);
        fixed + makespan(&work.halved(rest), self.devices)
    }

    /// How long the rest of a job alone takes. `None` before each of the job's stages has been
    /// measured once.
    pub(super) fn rest(&self, work: &Work, progress: Progress) -> Option<Duration> {
        let encode = if progress.is_started || work.encode <= 0.0 {
            0.0
        } else {
            self.time(Stage::Encode, work.encode)?
        };
        let decode = self.time(Stage::Decode, work.decode)?;
        let steps = self.time(Stage::Step, self.steps_rest(work, progress))?;
        Duration::try_from_secs_f64(encode + steps + decode).ok()
    }

    /// How long the rest of a job alone takes at least: at the best speed that was measured of each
    /// stage. The first run of a stage may compile kernels, so a stage that was measured once counts as
    /// nothing. `None` before two steps have been measured.
    pub(super) fn least_rest(&self, work: &Work, progress: Progress) -> Option<Duration> {
        let encode = self.encode.best().unwrap_or_default() * work.encode;
        let decode = self.decode.best().unwrap_or_default() * work.decode;
        let steps = self.step.best()? * self.steps_rest(work, progress);
        let encode = if progress.is_started { 0.0 } else { encode };
        Duration::try_from_secs_f64(encode + steps + decode).ok()
    }

    /// The part of the devices that works on a job when it is stepped alone.
    pub(super) fn share(&self, work: &Work) -> f64 {
        work.halves.min(self.devices) as f64 / self.devices as f64
    }

    /// As [`Speed::rest`], for a job that has made a step. Decoding that has not been measured is
    /// assumed to run at the speed of the steps.
    pub(super) fn rest_after_step(&self, work: &Work, progress: Progress) -> Option<Duration> {
        let steps = self.time(Stage::Step, self.steps_rest(work, progress))?;
        let decode = self.time(Stage::Decode, work.decode);
        let decode = decode.or_else(|| self.time(Stage::Step, work.decode))?;
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
