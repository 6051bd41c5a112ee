//! What the engine has done so far, as plain numbers.

use std::time::Duration;

use kiln_models::job::Output;
use kiln_models::pipeline::{CacheUse, MemoryUse};

use super::Timings;

/// Upper bounds of the buckets of every [`Histogram`], in seconds. A value equal to a bound is in
/// its bucket.
pub const BUCKET_BOUNDS: [f64; 19] = [
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0,
    100.0, 250.0, 500.0, 1000.0,
];

/// How often something took how long.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Histogram {
    /// Values of each bucket of [`BUCKET_BOUNDS`] alone, not cumulative; the last are those above
    /// all bounds.
    pub counts: [u64; BUCKET_BOUNDS.len() + 1],
    /// Of all values, in seconds.
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

/// How jobs have ended.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Outcomes {
    pub finished: u64,
    /// The client went away.
    pub cancelled: u64,
    /// The deadline passed.
    pub deadline_passed: u64,
    /// The pipeline returned an error or panicked.
    pub failed: u64,
    /// The engine was stopped, or its time to drain was over.
    pub stopped: u64,
    /// Not accepted: the queue was full, or the engine was draining or had stopped.
    pub rejected: u64,
}

/// A snapshot of the engine. Counters and histograms only grow. The warm-up is in none of them.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct EngineStats {
    /// Accepted jobs that have not been started.
    pub waiting: usize,
    /// Jobs that have been started and not ended.
    pub running: usize,
    pub outcomes: Outcomes,
    /// Denoising steps, of unfinished jobs too.
    pub steps: u64,
    /// Images of finished jobs.
    pub images: u64,
    /// Pixels of those images.
    pub pixels: u64,
    /// From the submission of a job to its start.
    pub waiting_time: Histogram,
    /// Prompts, noise and schedule of one job.
    pub encode_time: Histogram,
    /// One denoising step of one job.
    pub step_time: Histogram,
    /// All denoising steps of one finished job.
    pub denoise_time: Histogram,
    /// Decoding of all images of one job.
    pub decode_time: Histogram,
    /// One preview.
    pub preview_time: Histogram,
    /// From the submission of a job to its output.
    pub total_time: Histogram,
    /// Prompt embeddings that are kept.
    pub embedding_cache: CacheUse,
    /// Modulation tables that are kept.
    pub modulation_cache: CacheUse,
    /// Of the device, after the pipeline's last work.
    pub memory: MemoryUse,
}

impl EngineStats {
    pub(super) fn add_finished(&mut self, output: &Output, timings: &Timings) {
        self.outcomes.finished += 1;
        self.images += output.images.len() as u64;
        let pixels = output.images.iter().map(|image| image.height * image.width);
        self.pixels += pixels.sum::<usize>() as u64;
        self.denoise_time.add(timings.denoise);
        self.total_time.add(timings.total());
    }
}
