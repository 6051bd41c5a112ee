//! `GET /v1/images/jobs/{id}`: how far a job is, at once, at its end, or as events.

use std::time::Duration;

use axum::http::HeaderMap;
use axum::http::header::ACCEPT;
use axum::response::Response;
use tokio::time::{sleep, timeout};

use crate::jobs::{JobId, JobObject, JobView};

use super::super::error::{ApiError, ErrorEnvelope};
use super::super::json::json;
use super::query::Parameters;
use super::{Id, Jobs, REWATCH, events};

/// Longest time of a long poll: shorter than the 60 s after which many proxies give up.
const MAX_WAIT: Duration = Duration::from_secs(50);

/// Returns a job. With `wait`, the answer comes when the job has ended, or after this time.
///
/// With the header `Accept: text/event-stream`, the answer is server-sent events until the job has ended:
/// `status` at first and when the status changes, and `progress`; the data of each is the job.
#[utoipa::path(
    get,
    path = "/images/jobs/{id}",
    tag = "jobs",
    params(
        ("id" = String, Path, description = "The id of the job."),
        (
            "wait" = Option<f64>,
            Query,
            minimum = 0,
            description = "Seconds to wait for the end of the job; more than 50 count as 50.",
        ),
    ),
    responses(
        (status = 200, content(
            (JobObject = "application/json"),
            (String = "text/event-stream"),
        )),
        (status = "4XX", body = ErrorEnvelope),
        (status = "5XX", body = ErrorEnvelope),
    ),
    security((), ("bearer" = [])),
)]
pub(super) async fn retrieve(
    jobs: Jobs,
    Id(id): Id,
    parameters: Parameters,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let wait = parameters.seconds("wait", MAX_WAIT)?;
    if accepts_events(&headers) {
        return events::respond(jobs, id).await;
    }
    let view = if wait.is_zero() {
        jobs.get(&id).await?
    } else {
        jobs.wait(&id, wait).await?
    };
    json(&JobObject::from(&view))
}

impl Jobs {
    /// The client's job when it has ended, when this time is over, or when the server ends.
    async fn wait(&self, id: &JobId, time: Duration) -> Result<JobView, ApiError> {
        tokio::select! {
            ended = timeout(time, self.ended(id)) => match ended {
                Ok(ended) => ended,
                Err(_) => self.get(id).await,
            },
            () = self.app.closing.closed() => self.get(id).await,
        }
    }

    /// The client's job after its end.
    async fn ended(&self, id: &JobId) -> Result<JobView, ApiError> {
        loop {
            let mut views = self.watch(id).await?;
            let ended = views.wait_for(|view| view.job.status.is_ended());
            let ended = ended.await.ok().map(|view| view.clone());
            if let Some(view) = ended {
                return Ok(view);
            }
            sleep(REWATCH).await;
        }
    }
}

/// Whether the client accepts events, and names them before JSON.
fn accepts_events(headers: &HeaderMap) -> bool {
    let values = headers.get_all(ACCEPT).iter();
    let values = values.filter_map(|value| value.to_str().ok());
    let types = values.flat_map(|value| value.split(','));
    let mut types = types.map(|range| range.split(';').next().unwrap_or_default().trim());
    let named = types.find(|name| {
        ["text/event-stream", "application/json"]
            .iter()
            .any(|known| name.eq_ignore_ascii_case(known))
    });
    named.is_some_and(|name| name.eq_ignore_ascii_case("text/event-stream"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_accepted_by_name() {
        let accepts = |value: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(ACCEPT, value.parse().unwrap());
            accepts_events(&headers)
        };
        for value in [
            "text/event-stream",
            "Text/Event-Stream; charset=utf-8",
            "text/html, text/event-stream, */*",
            "text/event-stream, application/json",
        ] {
            assert!(accepts(value), "{value}");
        }
        for value in ["", "*/*", "text/*", "application/json, text/event-stream"] {
            assert!(!accepts(value), "{value}");
        }
        assert!(!accepts_events(&HeaderMap::new()));
    }
}
