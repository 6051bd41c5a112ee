use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use kiln_models::pipeline::{
    CacheUses, ImageSizes, Job, JobId, MemoryUse, ModelInfo, Output, Pipeline, PipelineError,
    RgbImage,
};

/// A job with this seed panics in its first step.
pub(super) const PANIC_IN_STEP: u64 = 1 << 40;
/// A job with this seed fails when it is started.
pub(super) const FAIL_IN_START: u64 = 1 << 41;

#[derive(Debug, Clone, Copy)]
pub(super) enum Pace {
    Fast,
    /// 10 ms a step.
    Slow,
}

/// What a pipeline has been asked to do.
#[derive(Debug, Default)]
pub(super) struct Record {
    pub(super) steps: AtomicUsize,
    pub(super) discards: AtomicUsize,
    pub(super) last_job: Mutex<Option<Job>>,
}

/// Generates every pixel in the lowest byte of the seed.
pub(super) struct FakePipeline {
    info: ModelInfo,
    pace: Pace,
    jobs: HashMap<JobId, (Job, usize)>,
    record: Arc<Record>,
}

impl FakePipeline {
    pub(super) fn new(pace: Pace, record: Arc<Record>) -> Self {
        let info = ModelInfo {
            sizes: ImageSizes {
                multiple: 16,
                max_side: 4096,
                default_side: 64,
            },
            vocab_size: 200_000,
            device: "test".to_owned(),
            dtype: "f32",
        };
        Self {
            info,
            pace,
            jobs: HashMap::new(),
            record,
        }
    }
}

impl Pipeline for FakePipeline {
    fn info(&self) -> &ModelInfo {
        &self.info
    }

    fn start(&mut self, id: JobId, job: Job) -> Result<(), PipelineError> {
        if job.seed == FAIL_IN_START {
            return Err(PipelineError::Device("secret detail".to_owned()));
        }
        *self.record.last_job.lock().unwrap() = Some(job.clone());
        let steps = job.num_inference_steps;
        self.jobs.insert(id, (job, steps));
        Ok(())
    }

    fn step(&mut self, ids: &[JobId]) -> Result<Vec<usize>, PipelineError> {
        if let Pace::Slow = self.pace {
            std::thread::sleep(Duration::from_millis(10));
        }
        let mut steps_left = Vec::new();
        for id in ids {
            let (job, left) = self
                .jobs
                .get_mut(id)
                .ok_or(PipelineError::UnknownJob(*id))?;
            assert!(job.seed != PANIC_IN_STEP, "secret detail");
            *left -= 1;
            steps_left.push(*left);
            self.record.steps.fetch_add(1, Ordering::SeqCst);
        }
        Ok(steps_left)
    }

    fn preview(&mut self, id: JobId) -> Result<RgbImage, PipelineError> {
        let (job, _) = self.jobs.get(&id).ok_or(PipelineError::UnknownJob(id))?;
        Ok(RgbImage {
            height: 16,
            width: 16,
            pixels: vec![job.seed as u8; 16 * 16 * 3],
        })
    }

    fn finish(&mut self, id: JobId) -> Result<Output, PipelineError> {
        let (job, _) = self.jobs.remove(&id).ok_or(PipelineError::UnknownJob(id))?;
        let pixels = vec![job.seed as u8; job.height * job.width * 3];
        let image = RgbImage {
            height: job.height,
            width: job.width,
            pixels,
        };
        Ok(Output {
            images: vec![image; job.num_images],
            trace: Vec::new(),
        })
    }

    fn discard(&mut self, id: JobId) {
        self.record.discards.fetch_add(1, Ordering::SeqCst);
        self.jobs.remove(&id);
    }

    fn memory(&self) -> MemoryUse {
        MemoryUse::default()
    }

    fn caches(&self) -> CacheUses {
        CacheUses::default()
    }
}
