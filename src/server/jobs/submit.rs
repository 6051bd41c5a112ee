//! `POST /v1/images/jobs`: stores a job.

use axum::http::header::LOCATION;
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use serde_json::{Map, Value};

use crate::jobs::{IdempotencyKey, JobId, JobObject, JobView, NewJob, Submitted};
use crate::telemetry::{self, Kind};

use super::super::body::JsonObject;
use super::super::error::{ApiError, ErrorEnvelope};
use super::super::images::{self, JobBody, JobBodySchema};
use super::super::json::json;
use super::super::traces;
use super::Jobs;
use super::headers::{PREFERENCE_APPLIED, RESPOND_ASYNC, idempotency_key, prefers_async};

/// Stores images to generate as a job. The request is checked as by `/v1/images/generations`, and its
/// seed is chosen at once. The job is not lost after this answer, whatever happens to the server.
///
/// With the header `Idempotency-Key`, a repeated request gets the job of the first one.
#[utoipa::path(
    post,
    path = "/images/jobs",
    tag = "jobs",
    request_body = JobBodySchema,
    params((
        "Idempotency-Key" = Option<String>,
        Header,
        description = "Up to 255 visible ASCII characters that the client has chosen for this request.",
    )),
    responses(
        (status = 202, body = JobObject, description = "The job is stored. `Location` has its path."),
        (status = 200, body = JobObject, description = "The job of an earlier request with the same `Idempotency-Key`."),
        (status = "4XX", body = ErrorEnvelope),
        (status = "5XX", body = ErrorEnvelope),
    ),
    security((), ("bearer" = [])),
)]
pub(super) async fn submit(
    jobs: Jobs,
    headers: HeaderMap,
    JsonObject(object): JsonObject,
) -> Result<Response, ApiError> {
    jobs.submit(&headers, object).await
}

impl Jobs {
    /// Checks a request and stores it.
    pub(in super::super) async fn submit(
        &self,
        headers: &HeaderMap,
        object: Map<String, Value>,
    ) -> Result<Response, ApiError> {
        let idempotency = idempotency_key(headers, &object)?;
        let repeated = self.repeated(idempotency.as_ref()).await?;
        let submitted = if let Some(submitted) = repeated {
            submitted
        } else {
            let span = telemetry::span_for(None, Kind::Producer, "job submit", &[]);
            let job = NewJob {
                trace: traces::stored_trace(&span, headers),
                ..self.new_job(object, idempotency).await?
            };
            let submitted = self.store.submit(job).await?;
            if let Submitted::New(view) = &submitted {
                telemetry::set(&span, &[("kiln.job.id", view.job.id.as_str().into())]);
            }
            submitted
        };
        let (status, view) = match submitted {
            Submitted::New(view) => {
                self.store.settings().stats.count_submitted();
                (StatusCode::ACCEPTED, view)
            }
            Submitted::Existing(view) => (StatusCode::OK, view),
            Submitted::OtherBody(id) => return Err(ApiError::OtherBody { id }),
        };
        tracing::debug!(id = %view.job.id, "stored a job");
        let mut response = answer(status, &view)?;
        if prefers_async(headers) {
            let headers = response.headers_mut();
            headers.insert(PREFERENCE_APPLIED, RESPOND_ASYNC);
        }
        Ok(response)
    }

    /// The outcome of a request whose key is known: it is not checked again, as the model may not be
    /// loaded, or an adapter may be gone.
    async fn repeated(&self, key: Option<&IdempotencyKey>) -> Result<Option<Submitted>, ApiError> {
        let Some(key) = key else {
            return Ok(None);
        };
        let id = JobId::new(&self.owner, Some(key));
        let view = self.store.get(&id).await?;
        Ok(view.map(|view| {
            if view.job.idempotency.as_ref() == Some(key) {
                Submitted::Existing(view)
            } else {
                Submitted::OtherBody(id)
            }
        }))
    }

    async fn new_job(
        &self,
        object: Map<String, Value>,
        idempotency: Option<IdempotencyKey>,
    ) -> Result<NewJob, ApiError> {
        let starting = || ApiError::Starting(self.app.start.progress());
        let app = self.app.loaded().ok_or_else(starting)?;
        let JobBody {
            request,
            model,
            webhook,
        } = images::parse(object)?.into_job()?;
        if let Some(url) = &webhook {
            self.check_webhook(url)?;
        }
        Ok(NewJob {
            owner: self.owner.clone(),
            request: request
                .check(app, model.as_deref())?
                .into_stored(app)
                .await?,
            idempotency,
            webhook,
            trace: None,
        })
    }

    /// Refuses a URL to which the server must not post.
    fn check_webhook(&self, url: &str) -> Result<(), ApiError> {
        Ok(self.app.settings.webhooks.check(url)?)
    }
}

fn answer(status: StatusCode, view: &JobView) -> Result<Response, ApiError> {
    let path = format!("/v1/images/jobs/{}", view.job.id);
    let mut response = (status, json(&JobObject::from(view))?).into_response();
    if let Ok(path) = HeaderValue::from_str(&path) {
        response.headers_mut().insert(LOCATION, path);
    }
    Ok(response)
}
