//! A durable job as clients see it: in answers of the server and in webhooks.

use serde::Serialize;
use utoipa::ToSchema;

use super::{JobFailure, JobStatus, JobView, Progress, ResultFile, StoredJob, StoredRequest};

/// A durable job.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
#[schema(as = ImageJob)]
pub struct JobObject {
    id: String,
    /// `image.job`
    object: &'static str,
    /// `queued`, `in_progress`, `completed`, `failed` or `cancelled`. The last three are final.
    status: &'static str,
    /// How much of the current attempt is done, from 0 to 100 percent. It is 100 only of completed jobs.
    progress: u8,
    /// Number of jobs that come before a queued one; null if it is not queued or not known.
    queue_position: Option<usize>,
    /// Unix time at which the job was stored, in seconds.
    created_at: u64,
    /// Unix time at which the last attempt began, in seconds.
    started_at: Option<u64>,
    /// Unix time at which the job was completed, failed or cancelled, in seconds.
    completed_at: Option<u64>,
    /// Unix time at which the job and its files are deleted, in seconds; null before the end of the job.
    expires_at: Option<u64>,
    /// The seed of the images, whether the client gave it or the server chose it.
    seed: u64,
    /// Name of the model.
    model: String,
    /// How often a worker has begun the job.
    attempt: u32,
    /// Why the job failed; null for all others.
    error: Option<JobError>,
    /// URL to which the ended job is posted.
    webhook: Option<String>,
    /// The images of a completed job, in order.
    files: Vec<JobFileObject>,
    /// Name of the server that made the last attempt.
    instance: Option<String>,
    request: JobRequest,
    /// Values of the request that do not fit each other, one sentence each; absent if there are none.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    warnings: Vec<String>,
}

/// Why a job failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub(super) struct JobError {
    /// A word for programs: `worker_lost` if the servers that began the job ended before it.
    code: String,
    /// What was wrong, and what to do.
    message: String,
}

/// An image file of a completed job.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
#[schema(as = ImageJobFile)]
pub(super) struct JobFileObject {
    index: usize,
    media_type: String,
    bytes: u64,
    /// SHA-256 of the file in hexadecimal digits.
    sha256: String,
    /// Path of the file on this server.
    url: String,
}

/// What the job generates, with all defaults filled in.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
#[schema(as = ImageJobParameters)]
pub(super) struct JobRequest {
    prompt: String,
    negative_prompt: Option<String>,
    /// Size of the images, `WIDTHxHEIGHT` in pixels.
    size: String,
    num_inference_steps: usize,
    /// Number of images.
    n: usize,
    true_cfg_scale: f64,
    /// The time shift, if there is a fixed one.
    #[serde(skip_serializing_if = "Option::is_none")]
    shift: Option<f64>,
    /// The step cache, if there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    cache: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cfg_gate_step: Option<f64>,
    /// The adapters; absent if there are none.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    loras: Vec<JobAdapter>,
    output_format: &'static str,
    output_compression: u8,
}

/// An adapter of a job.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
#[schema(as = ImageJobAdapter)]
pub(super) struct JobAdapter {
    name: String,
    scale: f64,
}

impl JobObject {
    /// The object of a job that is this far.
    pub fn new(job: &StoredJob, progress: Progress, position: Option<usize>) -> Self {
        let seconds = |milliseconds: u64| milliseconds / 1000;
        let files = job.files.iter().enumerate();
        Self {
            id: job.id.to_string(),
            object: "image.job",
            status: job.status.name(),
            progress: percent(job.status, progress),
            queue_position: position.filter(|_| job.status == JobStatus::Queued),
            created_at: seconds(job.created_ms),
            started_at: job.started_ms.map(seconds),
            completed_at: job.ended_ms.map(seconds),
            expires_at: job.expires_ms.map(seconds),
            seed: job.request.request.noise.seed,
            model: job.request.model.clone(),
            attempt: job.attempt,
            error: job.error.as_ref().map(JobError::new),
            webhook: job.webhook.clone(),
            files: files
                .map(|(index, file)| JobFileObject::new(job, index, file))
                .collect(),
            instance: job.instance.clone(),
            request: JobRequest::new(&job.request),
            warnings: job.request.request.warnings.clone(),
        }
    }
}

impl From<&JobView> for JobObject {
    fn from(view: &JobView) -> Self {
        Self::new(&view.job, view.progress, view.position)
    }
}

/// How much is done. Only a job whose files are stored has 100 percent.
fn percent(status: JobStatus, Progress { done, total }: Progress) -> u8 {
    match status {
        JobStatus::Completed => 100,
        JobStatus::Queued => 0,
        _ if total == 0 => 0,
        _ => (done.saturating_mul(100) / total).min(99) as u8,
    }
}

impl JobError {
    fn new(failure: &JobFailure) -> Self {
        Self {
            code: failure.code.clone(),
            message: failure.message.clone(),
        }
    }
}

impl JobFileObject {
    fn new(job: &StoredJob, index: usize, file: &ResultFile) -> Self {
        Self {
            index,
            media_type: file.media_type.clone(),
            bytes: file.bytes,
            sha256: file.sha256.clone(),
            url: format!("/v1/images/jobs/{}/content?index={index}", job.id),
        }
    }
}

impl JobRequest {
    fn new(stored: &StoredRequest) -> Self {
        let StoredRequest {
            request, encoding, ..
        } = stored;
        let adapters = request.adapters.iter();
        Self {
            prompt: request.prompt.clone(),
            negative_prompt: request.negative_prompt.clone(),
            size: request.size.to_string(),
            num_inference_steps: request.sampling.steps,
            n: request.num_images,
            true_cfg_scale: request.true_cfg_scale,
            shift: request.sampling.shift(),
            cache: request.cache.name(),
            cfg_gate_step: request.cfg_gate_step,
            loras: adapters
                .map(|chosen| JobAdapter {
                    name: chosen.info.name.clone(),
                    scale: chosen.scale,
                })
                .collect(),
            output_format: encoding.format.name(),
            output_compression: encoding.quality,
        }
    }
}
