//! A job as server-sent events.

use std::time::Duration;

use axum::response::Response;
use axum::response::sse::Event;
use futures_util::stream;
use tokio::sync::watch;
use tokio::time::{sleep, timeout};

use crate::jobs::{JobId, JobObject, JobStatus, JobView};

use super::super::error::ApiError;
use super::super::stream::{error_event, event, events_response};
use super::{Jobs, REWATCH};

/// How often a job is read again that tells nothing: its place in the queue may have changed.
const REFRESH: Duration = Duration::from_secs(5);

/// Responds with the changes of a job until it has ended, or the server ends.
pub(super) async fn respond(jobs: Jobs, id: JobId) -> Result<Response, ApiError> {
    let views = jobs.watch(&id).await?;
    let state = Events {
        jobs,
        id,
        views,
        sent: None,
        is_over: false,
    };
    Ok(events_response(stream::unfold(state, async |mut state| {
        let event = state.next().await?;
        Some((event, state))
    })))
}

struct Events {
    jobs: Jobs,
    id: JobId,
    views: watch::Receiver<JobView>,
    /// What the last event said.
    sent: Option<Sent>,
    is_over: bool,
}

#[derive(PartialEq)]
struct Sent {
    /// What makes an event one of the status.
    status: (JobStatus, u32),
    object: JobObject,
}

impl Events {
    /// The next event, or `None` at the end.
    async fn next(&mut self) -> Option<Event> {
        while !self.is_over {
            let view = match self.view().await {
                Ok(view) => view?,
                Err(error) => {
                    self.is_over = true;
                    return Some(error_event(&error).event("error"));
                }
            };
            self.is_over |= view.job.status.is_ended();
            let new = Sent {
                status: (view.job.status, view.job.attempt),
                object: JobObject::from(&view),
            };
            if self.sent.as_ref() == Some(&new) {
                continue;
            }
            let sent = self.sent.as_ref().map(|sent| sent.status);
            let name = if sent == Some(new.status) {
                "progress"
            } else {
                "status"
            };
            let event = event(&new.object);
            self.sent = Some(new);
            return Some(event.unwrap_or_default().event(name));
        }
        None
    }

    /// The job after its next change; the first time, the job as it is. `None` if the server ends, or
    /// the job is deleted.
    async fn view(&mut self) -> Result<Option<JobView>, ApiError> {
        if self.sent.is_none() {
            return Ok(Some(self.views.borrow_and_update().clone()));
        }
        let changed = tokio::select! {
            changed = timeout(REFRESH, self.views.changed()) => changed,
            () = self.jobs.app.closing.closed() => return Ok(None),
        };
        let view = match changed {
            Ok(Ok(())) => Ok(self.views.borrow_and_update().clone()),
            // Nothing happened.
            Err(_) => self.jobs.get(&self.id).await,
            Ok(Err(_)) => self.watch_again().await,
        };
        match view {
            Ok(view) => Ok(Some(view)),
            Err(ApiError::UnknownJob { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The job as it is, after the store has stopped to tell of it before its end.
    async fn watch_again(&mut self) -> Result<JobView, ApiError> {
        sleep(REWATCH).await;
        self.views = self.jobs.watch(&self.id).await?;
        Ok(self.views.borrow_and_update().clone())
    }
}
