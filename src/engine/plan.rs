//! What the scheduler asks of the worker, and what the worker reports back.

use std::time::Duration;

use kiln_models::adapter::AdapterUse;
use kiln_models::job::{Conditioning, Decoding, Job, JobId, Output, RgbImage};
use kiln_models::pipeline::{CacheUses, DeviceUse, MemoryRoom, MemoryUse, Pipeline, StepOutcome};

use super::JobError;

/// What to do next.
#[derive(Debug)]
pub(super) enum Plan {
    /// Encodes the prompts of waiting jobs together, so that each finds them when it is started.
    Encode(Vec<JobId>, Vec<Conditioning>),
    /// Uploads the adapters of a waiting job, so that they are there when it is started.
    LoadAdapters(JobId, Vec<AdapterUse>),
    Start(JobId, Job),
    /// One denoising step of each of these jobs, in one call.
    Step(Vec<JobId>),
    /// A preview of a job. It directly follows the job's step and belongs to the same turn.
    Preview(JobId),
    Finish(JobId),
    /// Measures the memory that is free, after dropping the caches if so.
    Measure {
        drop_caches: bool,
    },
    /// Changes how a job will be decoded.
    Decode(JobId, Decoding),
    /// Removes a job that has ended from the pipeline.
    Discard(JobId),
    /// Times one step of this many copies of a job. No job of the engine is touched.
    Time(Job, usize),
    /// Nothing, until a job is submitted or the engine is drained or stopped.
    Sleep,
    /// Nothing, for ever.
    End,
}

impl Plan {
    /// The jobs that the plan is for.
    pub(super) fn jobs(&self) -> &[JobId] {
        match self {
            Self::Step(ids) | Self::Encode(ids, _) => ids,
            Self::LoadAdapters(id, _)
            | Self::Start(id, _)
            | Self::Preview(id)
            | Self::Finish(id)
            | Self::Decode(id, _)
            | Self::Discard(id) => std::slice::from_ref(id),
            Self::Measure { .. } | Self::Time(..) | Self::Sleep | Self::End => &[],
        }
    }
}

/// The result of the pipeline calls that a plan asked for.
#[derive(Debug)]
pub(super) enum Outcome {
    /// The jobs, and whether their prompts are encoded now. Otherwise each is encoded alone.
    Encoded(Vec<JobId>, Result<(), JobError>),
    /// The job, and whether its adapters are on the devices now. Otherwise its start uploads them.
    LoadedAdapters(JobId, Result<(), JobError>),
    Started(JobId, Result<(), JobError>),
    /// For each job of the plan, in one call.
    Stepped(Vec<(JobId, Result<StepOutcome, JobError>)>),
    /// The step of all jobs together failed; each was stepped alone, in this time.
    SteppedAlone(Vec<(JobId, Result<StepOutcome, JobError>, Duration)>),
    /// How long the step of this many copies took; `None` if it failed.
    Timed(usize, Option<Duration>),
    /// `None` if the preview failed.
    Previewed(JobId, Option<RgbImage>),
    Finished(JobId, Result<Output, JobError>),
    Measured {
        room: Option<MemoryRoom>,
        dropped_caches: bool,
    },
    DecodingChanged,
    Discarded,
}

impl Outcome {
    /// The errors of the jobs that failed.
    pub(super) fn errors(&self) -> Vec<&JobError> {
        match self {
            Self::Encoded(_, Err(error))
            | Self::LoadedAdapters(_, Err(error))
            | Self::Started(_, Err(error))
            | Self::Finished(_, Err(error)) => vec![error],
            Self::SteppedAlone(steps) => {
                let errors = steps.iter().filter_map(|(_, step, _)| step.as_ref().err());
                errors.collect()
            }
            Self::Stepped(steps) => {
                let errors = steps.iter().filter_map(|(_, step)| step.as_ref().err());
                errors.collect()
            }
            _ => Vec::new(),
        }
    }
}

/// What the scheduler books after a plan has been carried out. Jobs that failed have been removed
/// from the pipeline.
#[derive(Debug)]
pub(super) struct Booked {
    pub(super) outcome: Outcome,
    /// Time of the pipeline calls.
    pub(super) took: Duration,
    /// Why no job can be generated any more: the device no longer computes, or a file of the model
    /// changed or failed.
    pub(super) lost: Option<JobError>,
    pub(super) holdings: Holdings,
}

/// Use of the devices, of their memory and of the caches after a call.
#[derive(Debug, Clone, Default)]
pub(super) struct Holdings {
    pub(super) memory: MemoryUse,
    pub(super) devices: Vec<DeviceUse>,
    pub(super) caches: CacheUses,
}

impl Holdings {
    pub(super) fn of(pipeline: &dyn Pipeline) -> Self {
        Self {
            memory: pipeline.memory(),
            devices: pipeline.device_use(),
            caches: pipeline.caches(),
        }
    }
}
