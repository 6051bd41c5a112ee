//! Server-sent events: a request as it is watched.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::time::Duration;

use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::stream;
use serde::Serialize;
use tokio::task::spawn_blocking;

use super::error::ApiError;
use super::generation::{RequestInfo, RequestProgress, RunningRequest};

/// How often something is said while nothing happens, so that nobody between server and client
/// takes the connection for dead.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// What an endpoint has to say about a request.
pub(super) trait EventFormat: Clone + Send + 'static {
    /// Said before anything happens.
    fn begin(&self, info: &RequestInfo) -> Result<Vec<Event>, ApiError>;

    /// May take its time: it is called where that is no harm.
    fn tell(&self, info: &RequestInfo, update: RequestProgress) -> Result<Vec<Event>, ApiError>;

    /// What is wrong; nothing is said after it but [`EventFormat::end`].
    fn fail(&self, error: &ApiError) -> Event;

    fn end(&self) -> Vec<Event>;
}

/// An event with JSON as its data.
pub(super) fn event(data: &impl Serialize) -> Result<Event, ApiError> {
    let json = serde_json::to_string(data).map_err(ApiError::Response)?;
    Ok(Event::default().data(json))
}

/// An error that comes after the status code has been sent.
pub(super) fn error_event(error: &ApiError) -> Event {
    event(&error.envelope()).unwrap_or_default()
}

/// Tells about a request until it has ended. The request is cancelled when the client goes away:
/// the response is dropped then.
pub(super) fn respond<N: EventFormat>(accepted: RunningRequest, narrator: N) -> Response {
    let state = EventStream {
        accepted: Some(accepted),
        narrator,
        begun: false,
        said: VecDeque::new(),
    };
    let events = stream::unfold(state, async |mut telling| {
        let event = telling.next().await?;
        Some((Ok::<_, Infallible>(event), telling))
    });
    let keep_alive = KeepAlive::new().interval(KEEP_ALIVE);
    let mut response = Sse::new(events).keep_alive(keep_alive).into_response();
    // Proxies such as nginx would collect the events otherwise.
    response.headers_mut().insert(
        "x-accel-buffering",
        axum::http::HeaderValue::from_static("no"),
    );
    response
}

struct EventStream<N> {
    /// None once the request has ended.
    accepted: Option<RunningRequest>,
    narrator: N,
    begun: bool,
    /// Events that the client has yet to get.
    said: VecDeque<Event>,
}

impl<N: EventFormat> EventStream<N> {
    async fn next(&mut self) -> Option<Event> {
        while self.said.is_empty() {
            match self.listen().await {
                Ok(Some(events)) => self.said.extend(events),
                Ok(None) => return None,
                Err(error) => {
                    self.said.push_back(self.narrator.fail(&error));
                    self.end();
                }
            }
        }
        self.said.pop_front()
    }

    /// What there is to say next, or nothing at the end.
    async fn listen(&mut self) -> Result<Option<Vec<Event>>, ApiError> {
        let Some(accepted) = &mut self.accepted else {
            return Ok(None);
        };
        if !self.begun {
            self.begun = true;
            return self.narrator.begin(accepted.info()).map(Some);
        }
        let update = accepted.update().await?;
        let is_last = matches!(update, RequestProgress::EncodedImages(_));
        let (narrator, info) = (self.narrator.clone(), accepted.info().clone());
        let events = spawn_blocking(move || narrator.tell(&info, update)).await??;
        if is_last {
            self.said.extend(events);
            self.end();
            return Ok(Some(Vec::new()));
        }
        Ok(Some(events))
    }

    fn end(&mut self) {
        self.accepted = None;
        self.said.extend(self.narrator.end());
    }
}
