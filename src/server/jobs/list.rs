//! `GET /v1/images/jobs`: the jobs of a client, page by page.

use axum::response::Response;
use serde::Serialize;
use utoipa::ToSchema;

use crate::jobs::{JobId, JobObject, ListQuery};

use super::super::error::{ApiError, ErrorEnvelope};
use super::super::invalid::InvalidBody;
use super::super::json::json;
use super::Jobs;
use super::query::Parameters;

/// Jobs of a page without `limit`, and of the largest page.
const DEFAULT_LIMIT: usize = 20;
const MAX_LIMIT: usize = 100;

/// Some jobs of a client, the newest first.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = ImageJobList)]
pub(super) struct JobList {
    /// `list`
    object: &'static str,
    data: Vec<JobObject>,
    first_id: Option<String>,
    /// To be given as `after` for the next page.
    last_id: Option<String>,
    /// Whether there are older jobs.
    has_more: bool,
}

/// Lists the jobs of the API key, the newest first.
#[utoipa::path(
    get,
    path = "/images/jobs",
    tag = "jobs",
    params(
        ("limit" = Option<u8>, Query, minimum = 1, maximum = 100, description = "Number of jobs, 20 by default."),
        ("after" = Option<String>, Query, description = "The id of a job: only older ones are listed."),
        (
            "status" = Option<String>,
            Query,
            description = "Only jobs that are `queued`, `in_progress`, `completed`, `failed` or `cancelled`.",
        ),
    ),
    responses(
        (status = 200, body = JobList),
        (status = "4XX", body = ErrorEnvelope),
        (status = "5XX", body = ErrorEnvelope),
    ),
    security((), ("bearer" = [])),
)]
pub(super) async fn list(jobs: Jobs, parameters: Parameters) -> Result<Response, ApiError> {
    let expected = "a whole number from 1 to 100";
    let limit = parameters.number("limit", 1..=MAX_LIMIT, expected)?;
    let after = parameters.job("after")?;
    if let Some(after) = &after {
        jobs.check_after(after).await?;
    }
    let query = ListQuery {
        limit: limit.unwrap_or(DEFAULT_LIMIT),
        after,
        status: parameters.status("status")?,
    };
    let page = jobs.store.list(&jobs.owner, &query).await?;
    let data: Vec<JobObject> = page.jobs.iter().map(JobObject::from).collect();
    let id = |job: Option<&crate::jobs::JobView>| job.map(|job| job.job.id.to_string());
    json(&JobList {
        object: "list",
        first_id: id(page.jobs.first()),
        last_id: id(page.jobs.last()),
        has_more: page.has_more,
        data,
    })
}

impl Jobs {
    /// Refuses a page after a job that the client does not have.
    async fn check_after(&self, after: &JobId) -> Result<(), ApiError> {
        match self.get(after).await {
            Ok(_) => Ok(()),
            Err(ApiError::UnknownJob { .. }) => Err(InvalidBody::value(
                "after".to_owned(),
                "there is no such job, or no longer: list from the first page again",
            )
            .into()),
            Err(error) => Err(error),
        }
    }
}
