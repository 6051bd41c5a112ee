//! What the engine has done so far, as plain numbers.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use kiln_models::job::Output;
use kiln_models::pipeline::{CacheUse, DeviceUse, MemoryUse};
use kiln_models::step_cache::StepCounts;

use super::adapters::JobAdapter;
use super::cost::Stage;
use super::plan::Holdings;
use super::{JobError, Timings};

/// Upper bounds of the buckets of every [`Histogram`], in seconds. A value equal to a bound is in
/// its bucket.
pub const BUCKET_BOUNDS: [f64; 19] = [
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0,
    100.0, 250.0, 500.0, 1000.0,
];

/// A distribution of durations.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Histogram {
    /// Number of values in each bucket of [`BUCKET_BOUNDS`], not cumulative; the last number is
    /// that of the values above all bounds.
    pub counts: [u64; BUCKET_BOUNDS.len() + 1],
    /// Sum of all values, in seconds.
    pub sum: f64,
}

impl Histogram {
    pub(super) fn add(&mut self, value: Duration) {
        let seconds = value.as_secs_f64();
        self.counts[BUCKET_BOUNDS.partition_point(|bound| *bound < seconds)] += 1;
        self.sum += seconds;
    }

    /// Number of values.
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }
}

/// Number of jobs by the way they ended.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Outcomes {
    pub finished: u64,
    /// The handle was dropped, because the client disconnected.
    pub cancelled: u64,
    /// The deadline passed.
    pub deadline_passed: u64,
    /// The job could not be finished any more before it was due.
    pub too_late: u64,
    /// A pipeline call returned an error or panicked.
    pub failed: u64,
    /// The engine was stopped, or the time to drain was over.
    pub stopped: u64,
    /// Not accepted: the queue was full, the job was too large for the memory or could not be
    /// finished before it was due, or the engine was draining or had stopped.
    pub rejected: u64,
}

impl Outcomes {
    pub(super) fn add_failed(&mut self, error: &JobError) {
        match error {
            JobError::Pipeline(_)
            | JobError::Panicked(_)
            | JobError::Lost { .. }
            | JobError::NoMemory { .. } => self.failed += 1,
            JobError::DeadlinePassed => self.deadline_passed += 1,
            JobError::TooLate { .. } => self.too_late += 1,
            JobError::Stopped => self.stopped += 1,
        }
    }
}

/// Jobs with adapters, and the adapters on the device.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct AdapterStats {
    /// Names of the adapters of waiting jobs.
    pub waiting: BTreeSet<String>,
    /// Names of the adapters of started jobs.
    pub running: BTreeSet<String>,
    /// How many adapters started jobs can use at a time, if each is as large as the largest that a job
    /// has had.
    pub max_running: usize,
    /// The ends of jobs by the name of their adapter. A job with several adapters counts for each.
    pub outcomes: BTreeMap<String, Outcomes>,
    /// The pipeline's cache of adapters.
    pub cache: CacheUse,
}

/// A snapshot of the engine. Counters and histograms only grow. None of them contains the warm-up.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct EngineStats {
    /// Accepted jobs that have not been started.
    pub waiting: usize,
    /// Jobs that have been started and not ended.
    pub running: usize,
    /// How many jobs may be accepted and not ended at a time.
    pub max_unfinished: usize,
    pub outcomes: Outcomes,
    /// Started jobs that were made cheaper: see [`SubmitOptions::cheaper`](super::SubmitOptions).
    pub made_cheaper: u64,
    /// Number of denoising steps, those of unfinished jobs included.
    pub steps: u64,
    /// Those of the steps that ran the whole transformer.
    pub computed_steps: u64,
    /// Those of the steps that reused an earlier one, because of a step cache.
    pub skipped_steps: u64,
    /// Those of the steps that ran no unconditional half, because of
    /// [`Job::cfg_gate_step`](kiln_models::job::Job::cfg_gate_step).
    pub gated_steps: u64,
    /// Number of those steps that a job shared with others.
    pub shared_steps: u64,
    /// Image tokens up to which several jobs share a step now; 0 if they never do.
    pub max_step_tokens: usize,
    /// Number of images of finished jobs.
    pub images: u64,
    /// Number of pixels of those images.
    pub pixels: u64,
    /// Those pixels times the denoising steps of their images.
    pub pixel_steps: u64,
    /// From the submission of a job to its start.
    pub waiting_time: Histogram,
    /// Encoding the prompts, generating the noise and making the schedule of one job.
    pub encode_time: Histogram,
    /// One denoising step of one job: its part of the time, if several jobs shared the step.
    pub step_time: Histogram,
    /// All denoising steps of one finished job.
    pub denoise_time: Histogram,
    /// Decoding all images of one job.
    pub decode_time: Histogram,
    /// One preview.
    pub preview_time: Histogram,
    /// From the submission of a job to its output.
    pub total_time: Histogram,
    /// The cache of prompt embeddings.
    pub embedding_cache: CacheUse,
    /// The cache of modulation tables.
    pub modulation_cache: CacheUse,
    pub adapters: AdapterStats,
    /// Device memory after the pipeline's last call.
    pub memory: MemoryUse,
    /// Use of each device after the pipeline's last call; empty if it is not known.
    pub devices: Vec<DeviceUse>,
    /// Bytes that the started jobs take at most, by plan.
    pub planned_memory: u64,
    /// Bytes that could be allocated when that was last measured; `None` if it is not known.
    pub free_memory: Option<u64>,
}

impl EngineStats {
    pub(super) fn set_holdings(&mut self, holdings: Holdings) {
        self.memory = holdings.memory;
        self.devices = holdings.devices;
        self.embedding_cache = holdings.caches.embeddings;
        self.modulation_cache = holdings.caches.modulation;
        self.adapters.cache = holdings.caches.adapters;
    }

    /// Counts the end of a job with these adapters.
    pub(super) fn count(&mut self, adapters: &[JobAdapter], add: impl Fn(&mut Outcomes)) {
        add(&mut self.outcomes);
        for adapter in adapters {
            let name = adapter.used.adapter.name().to_owned();
            add(self.adapters.outcomes.entry(name).or_default());
        }
    }

    /// Adds a successful turn of one job, whose timings contain it already.
    pub(super) fn add_turn(&mut self, stage: Stage, took: Duration, timings: &Timings) {
        match stage {
            Stage::Encode => {
                self.waiting_time.add(timings.queue);
                self.encode_time.add(timings.encode);
            }
            Stage::Step => {
                self.steps += 1;
                self.step_time.add(took);
            }
            Stage::Decode => self.decode_time.add(took),
        }
    }

    /// Adds the steps of one job between two counts of it.
    pub(super) fn add_counts(&mut self, before: StepCounts, now: StepCounts) {
        let since = |now: usize, before: usize| now.saturating_sub(before) as u64;
        self.computed_steps += since(now.computed, before.computed);
        self.skipped_steps += since(now.skipped, before.skipped);
        self.gated_steps += since(now.gated, before.gated);
    }

    pub(super) fn add_finished(&mut self, output: &Output, timings: &Timings) {
        self.images += output.images.len() as u64;
        let pixels = output.images.iter().map(|image| image.height * image.width);
        let pixels = pixels.sum::<usize>() as u64;
        self.pixels += pixels;
        self.pixel_steps += pixels * (output.steps.computed + output.steps.skipped) as u64;
        self.denoise_time.add(timings.denoise);
        self.total_time.add(timings.total());
    }
}
