//! `POST /v1/images/jobs/{id}/cancel` and `DELETE /v1/images/jobs/{id}`.

use axum::response::Response;
use serde::Serialize;
use utoipa::ToSchema;

use crate::jobs::{JobId, JobObject, JobStatus};

use super::super::error::{ApiError, ErrorEnvelope};
use super::super::json::json;
use super::{Id, Jobs, unknown};

/// A job that has been deleted.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = DeletedImageJob)]
#[expect(clippy::struct_field_names, reason = "the keys are OpenAI's")]
pub(super) struct Deleted {
    id: String,
    /// `image.job.deleted`
    object: &'static str,
    deleted: bool,
}

/// What `DELETE` has done.
#[derive(Debug, Serialize, ToSchema)]
#[serde(untagged)]
#[schema(as = EndedImageJob)]
pub(super) enum Ended {
    Cancelled(Box<JobObject>),
    Deleted(Deleted),
}

/// Cancels a job that has not ended. One that has ended is returned as it is.
#[utoipa::path(
    post,
    path = "/images/jobs/{id}/cancel",
    tag = "jobs",
    params(("id" = String, Path, description = "The id of the job.")),
    responses(
        (status = 200, body = JobObject),
        (status = "4XX", body = ErrorEnvelope),
        (status = "5XX", body = ErrorEnvelope),
    ),
    security((), ("bearer" = [])),
)]
pub(super) async fn cancel(jobs: Jobs, Id(id): Id) -> Result<Response, ApiError> {
    let view = jobs.get(&id).await?;
    if view.job.status.is_ended() {
        return json(&JobObject::from(&view));
    }
    json(&jobs.cancel(&id).await?)
}

/// Cancels a job that has not ended, and returns it; deletes a job that has ended, with its files.
#[utoipa::path(
    delete,
    path = "/images/jobs/{id}",
    tag = "jobs",
    params(("id" = String, Path, description = "The id of the job.")),
    responses(
        (status = 200, body = Ended, description = "The cancelled job, or that the job is deleted."),
        (status = "4XX", body = ErrorEnvelope),
        (status = "5XX", body = ErrorEnvelope),
    ),
    security((), ("bearer" = [])),
)]
pub(super) async fn delete(jobs: Jobs, Id(id): Id) -> Result<Response, ApiError> {
    let view = jobs.get(&id).await?;
    if !view.job.status.is_ended() {
        return json(&Ended::Cancelled(Box::new(jobs.cancel(&id).await?)));
    }
    if !jobs.store.delete(&id).await? {
        return Err(unknown(id.as_str()));
    }
    json(&Ended::Deleted(Deleted {
        id: id.to_string(),
        object: "image.job.deleted",
        deleted: true,
    }))
}

impl Jobs {
    /// Cancels a job of the client that had not ended.
    async fn cancel(&self, id: &JobId) -> Result<JobObject, ApiError> {
        let view = self.store.cancel(id).await?;
        let view = view.ok_or_else(|| unknown(id.as_str()))?;
        if view.job.status == JobStatus::Cancelled {
            self.store.settings().stats.count_cancelled();
        }
        Ok(JobObject::from(&view))
    }
}
