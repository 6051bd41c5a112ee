//! `GET /v1/images/jobs/{id}/content`: a file of a completed job.

use axum::http::header::{
    CACHE_CONTROL, CONTENT_DISPOSITION, CONTENT_TYPE, ETAG, IF_NONE_MATCH, LOCATION, VARY,
};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};

use crate::jobs::{Content, JobId, JobStatus, ResultFile};

use super::super::error::{ApiError, ErrorEnvelope};
use super::query::Parameters;
use super::{Id, Jobs, unknown};

/// Files may be kept by the client alone, which asks each time whether the job still exists.
const CACHING: &str = "private, no-cache";

/// Returns an image file of a completed job, or a redirection to it.
#[utoipa::path(
    get,
    path = "/images/jobs/{id}/content",
    tag = "jobs",
    params(
        ("id" = String, Path, description = "The id of the job."),
        ("index" = Option<u32>, Query, description = "Index of the file, 0 by default."),
    ),
    responses(
        (status = 200, description = "The file. `ETag` is its SHA-256.", content(
            (String = "image/png"),
            (String = "image/jpeg"),
            (String = "image/webp"),
        )),
        (status = 302, description = "The file is at `Location`, for some minutes and without a key."),
        (status = 304, description = "The client has the file."),
        (status = "4XX", body = ErrorEnvelope),
        (status = "5XX", body = ErrorEnvelope),
    ),
    security((), ("bearer" = [])),
)]
pub(super) async fn content(
    jobs: Jobs,
    Id(id): Id,
    parameters: Parameters,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let expected = "a whole number from 0";
    let index = parameters.number("index", 0..=usize::MAX, expected)?;
    let index = index.unwrap_or_default();
    let job = jobs.get(&id).await?.job;
    if job.status != JobStatus::Completed {
        let status = job.status;
        return Err(ApiError::JobWithoutFiles { id, status });
    }
    let count = job.files.len();
    let Some(file) = job.files.get(index) else {
        return Err(ApiError::NoFile { index, count });
    };
    let shared = [
        (ETAG, etag(file)),
        (CACHE_CONTROL, CACHING.to_owned()),
        (VARY, "authorization".to_owned()),
    ];
    if has_file(&headers, file) {
        return Ok((StatusCode::NOT_MODIFIED, shared).into_response());
    }
    let content = jobs.store.content(&id, index).await?;
    // It was deleted meanwhile.
    match content.ok_or_else(|| unknown(id.as_str()))? {
        Content::File { file, content } => {
            let headers = [
                (CONTENT_DISPOSITION, disposition(&id, index, &file)),
                (CONTENT_TYPE, file.media_type),
            ];
            Ok((shared, headers, content).into_response())
        }
        Content::Url(url) => {
            let headers = [(LOCATION, url), (CACHE_CONTROL, "no-store".to_owned())];
            Ok((StatusCode::FOUND, headers).into_response())
        }
    }
}

fn etag(file: &ResultFile) -> String {
    format!("\"{}\"", file.sha256)
}

/// Whether the client has the file, by the header `If-None-Match`.
fn has_file(headers: &HeaderMap, file: &ResultFile) -> bool {
    let tag = etag(file);
    let values = headers.get_all(IF_NONE_MATCH).iter();
    let values = values.filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).any(|given| {
        let given = given.trim();
        given == "*" || given.strip_prefix("W/").unwrap_or(given) == tag
    })
}

/// A name for the file.
fn disposition(id: &JobId, index: usize, file: &ResultFile) -> String {
    let extension = file.media_type.rsplit('/').next().unwrap_or_default();
    format!("inline; filename=\"{id}-{index}.{extension}\"")
}
