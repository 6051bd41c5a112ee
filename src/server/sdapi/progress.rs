//! `GET /sdapi/v1/progress` and `POST /sdapi/v1/interrupt`: the requests of this API that are not
//! finished.

use std::sync::Arc;
use std::time::Instant;

use axum::Extension;
use axum::extract::Query;
use axum::extract::rejection::QueryRejection;
use axum::response::Response;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::{Deserialize, Serialize};
use serde_json::json;
use utoipa::ToSchema;

use crate::jobs::{Caller, JobRecord, JobState};

use super::super::LoadedApp;
use super::super::invalid::InvalidBody;
use super::{SdapiError, SdapiErrorBody, json as answer};

/// Progress of the oldest running request.
#[derive(Serialize, ToSchema)]
struct ProgressResponse {
    /// From 0 to 1; 0 also if there is no request.
    progress: f64,
    /// Estimated seconds until the last step, from the measured speed. While the request waits,
    /// estimated seconds until its first step; 0 if that is unknown.
    eta_relative: f64,
    state: ProgressState,
    /// The newest preview of the first image as a PNG file in Base64, if there is one.
    current_image: Option<String>,
    #[schema(value_type = Option<String>)]
    textinfo: Option<()>,
}

/// State of a request in the web UI's terms.
#[derive(Serialize, ToSchema)]
struct ProgressState {
    skipped: bool,
    interrupted: bool,
    /// Id of the request, empty if there is none.
    job: String,
    /// Number of unfinished requests.
    job_count: usize,
    job_no: usize,
    /// Steps that are over.
    sampling_step: usize,
    sampling_steps: usize,
}

/// The query of a progress request.
#[derive(Deserialize)]
pub(super) struct ProgressQuery {
    #[serde(default)]
    skip_current_image: Flag,
}

/// A boolean, also in the form in which Python's clients write it.
#[derive(Default, PartialEq, Deserialize)]
enum Flag {
    #[serde(rename = "true", alias = "True", alias = "1")]
    On,
    #[default]
    #[serde(rename = "false", alias = "False", alias = "0")]
    Off,
}

/// Returns the progress of the request that is being generated: the oldest one that was sent to
/// this API with the same key.
#[utoipa::path(
    get,
    path = "/v1/progress",
    tag = "progress",
    params((
        "skip_current_image" = Option<bool>, Query,
        description = "Whether to leave out the preview.",
    )),
    responses((status = 200, body = ProgressResponse), (status = "4XX", body = SdapiErrorBody)),
    security((), ("basic" = []), ("bearer" = [])),
)]
pub(super) async fn progress(
    Extension(app): Extension<Arc<LoadedApp>>,
    Extension(caller): Extension<Caller>,
    query: Result<Query<ProgressQuery>, QueryRejection>,
) -> Result<Response, SdapiError> {
    let Query(query) = query.map_err(|_| {
        let param = "skip_current_image".to_owned();
        InvalidBody::value(param, "must be true or false")
    })?;
    let jobs = app.sdapi_jobs.unfinished(caller);
    let job = current(&jobs);
    let (done, total) = job.map_or((0, 0), |job| (job.steps_done(), job.steps));
    let preview = job.and_then(|job| job.preview.as_ref());
    answer(&ProgressResponse {
        progress: done as f64 / total.max(1) as f64,
        eta_relative: job.map_or(0.0, |job| job.remaining(Instant::now()).as_secs_f64()),
        state: ProgressState {
            skipped: false,
            interrupted: false,
            job: job.map(|job| job.id.clone()).unwrap_or_default(),
            job_count: jobs.len(),
            job_no: 0,
            sampling_step: done,
            sampling_steps: total,
        },
        current_image: preview
            .filter(|_| query.skip_current_image == Flag::Off)
            .map(|file| BASE64.encode(file)),
        textinfo: None,
    })
}

/// Cancels the request whose progress `progress` returns. That request fails with status 409, and
/// the device is free after the current step.
#[utoipa::path(
    post,
    path = "/v1/interrupt",
    tag = "progress",
    responses((status = 200, body = Object), (status = "4XX", body = SdapiErrorBody)),
    security((), ("basic" = []), ("bearer" = [])),
)]
pub(super) async fn interrupt(
    Extension(app): Extension<Arc<LoadedApp>>,
    Extension(caller): Extension<Caller>,
) -> Result<Response, SdapiError> {
    if let Some(job) = current(&app.sdapi_jobs.unfinished(caller)) {
        app.sdapi_jobs.cancel(&job.id, caller);
    }
    answer(&json!({}))
}

/// The oldest job that is running, or the oldest one that waits.
fn current<R>(jobs: &[JobRecord<R>]) -> Option<&JobRecord<R>> {
    let is_running = |job: &&JobRecord<R>| matches!(job.state, JobState::Running { .. });
    jobs.iter().find(is_running).or(jobs.first())
}
