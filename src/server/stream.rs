//! Server-sent events: the updates of a running request.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::{Stream, StreamExt as _, stream};
use serde::Serialize;
use tokio::task::spawn_blocking;

use super::error::ApiError;
use super::generation::{RequestInfo, RequestProgress, RunningRequest};

/// Keep-alive interval; stops proxies from closing an idle stream.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// How an API writes the updates of a request as events.
pub(super) trait EventFormat: Clone + Send + 'static {
    /// Events before the first update.
    fn begin(&self, info: &RequestInfo) -> Result<Vec<Event>, ApiError>;

    /// Events for an update. It is called on a thread that may block.
    fn update(&self, info: &RequestInfo, update: RequestProgress) -> Result<Vec<Event>, ApiError>;

    /// The event for an error. Only the events of [`EventFormat::end`] follow it.
    fn fail(&self, error: &ApiError) -> Event;

    /// Events at the end of every stream.
    fn end(&self) -> Vec<Event>;
}

/// An event with JSON as its data.
pub(super) fn event(data: &impl Serialize) -> Result<Event, ApiError> {
    let json = serde_json::to_string(data).map_err(ApiError::Response)?;
    Ok(Event::default().data(json))
}

/// The error body as an event, for errors after the status code has been sent.
pub(super) fn error_event(error: &ApiError) -> Event {
    event(&error.envelope()).unwrap_or_default()
}

/// Responds with the updates of a request until it has ended. If the client disconnects, the
/// response is dropped, which cancels the request.
pub(super) fn respond<F: EventFormat>(running: RunningRequest, format: F) -> Response {
    let state = EventStream {
        running: Some(running),
        format,
        has_begun: false,
        pending: VecDeque::new(),
    };
    let events = stream::unfold(state, async |mut state| {
        let event = state.next().await?;
        Some((event, state))
    });
    events_response(events)
}

/// A response with these events, and with comments while there are none.
pub(super) fn events_response(events: impl Stream<Item = Event> + Send + 'static) -> Response {
    let events = events.map(Ok::<_, Infallible>);
    let keep_alive = KeepAlive::new().interval(KEEP_ALIVE);
    let mut response = Sse::new(events).keep_alive(keep_alive).into_response();
    // Without this header, proxies such as nginx buffer the events.
    response.headers_mut().insert(
        "x-accel-buffering",
        axum::http::HeaderValue::from_static("no"),
    );
    response
}

struct EventStream<F> {
    /// `None` once the request has ended.
    running: Option<RunningRequest>,
    format: F,
    has_begun: bool,
    /// Events that have not been sent.
    pending: VecDeque<Event>,
}

impl<F: EventFormat> EventStream<F> {
    /// The next event, or `None` at the end.
    async fn next(&mut self) -> Option<Event> {
        while self.pending.is_empty() {
            match self.next_events().await {
                Ok(Some(events)) => self.pending.extend(events),
                Ok(None) => return None,
                Err(error) => {
                    tracing::info!(status = error.status().as_u16(), "failed in a stream");
                    self.pending.push_back(self.format.fail(&error));
                    self.end();
                }
            }
        }
        self.pending.pop_front()
    }

    /// The events of the next update, or `None` at the end.
    async fn next_events(&mut self) -> Result<Option<Vec<Event>>, ApiError> {
        let Some(running) = &mut self.running else {
            return Ok(None);
        };
        if !self.has_begun {
            self.has_begun = true;
            return self.format.begin(running.info()).map(Some);
        }
        let update = running.update().await?;
        let is_last = matches!(update, RequestProgress::EncodedImages(_));
        let (format, info) = (self.format.clone(), Arc::clone(running.info()));
        let events = spawn_blocking(move || format.update(&info, update)).await??;
        if is_last {
            self.pending.extend(events);
            self.end();
            return Ok(Some(Vec::new()));
        }
        Ok(Some(events))
    }

    fn end(&mut self) {
        self.running = None;
        self.pending.extend(self.format.end());
    }
}
