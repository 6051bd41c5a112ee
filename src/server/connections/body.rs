//! The bodies of requests and responses, which tell their connection when they end.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::body::{Body, Bytes, HttpBody};
use axum::http::HeaderMap;
use axum::http::header::EXPECT;
use futures_util::StreamExt;
use hyper::body::{Frame, Incoming, SizeHint};
use tokio::runtime::Handle;
use tokio::time::timeout;

use super::slot::{Phase, Slot};

/// How much of a body that no handler wants is read, and for how long.
const MAX_UNWANTED_BYTES: usize = 64 << 20;
const MAX_UNWANTED_TIME: Duration = Duration::from_secs(5);

/// The body of a request.
///
/// What a handler leaves is read and thrown away, within bounds: if the server closed the connection
/// instead, a client that sends its whole body before it reads would get no answer.
pub(super) struct Received {
    /// `None` at its end.
    body: Option<Incoming>,
    /// Whether the client sends the body only after a "100 Continue", which the first poll sends.
    is_held_back: bool,
    slot: Arc<Slot>,
}

impl Received {
    pub(super) fn new(body: Incoming, headers: &HeaderMap, slot: Arc<Slot>) -> Self {
        let expected = headers.get(EXPECT);
        let is_held_back =
            expected.is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"100-continue"));
        let body = Some(body).filter(|body| !body.is_end_stream());
        slot.enter(if body.is_some() {
            Phase::Body
        } else {
            Phase::Answer
        });
        Self {
            body,
            is_held_back,
            slot,
        }
    }
}

impl HttpBody for Received {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        self.is_held_back = false;
        let Some(body) = &mut self.body else {
            return Poll::Ready(None);
        };
        let frame = ready!(Pin::new(&mut *body).poll_frame(context));
        if body.is_end_stream() || !matches!(frame, Some(Ok(_))) {
            self.body = None;
            self.slot.advance(Phase::Body, Phase::Answer);
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_none()
    }

    fn size_hint(&self) -> SizeHint {
        let body = self.body.as_ref();
        body.map_or(SizeHint::with_exact(0), Incoming::size_hint)
    }
}

impl Drop for Received {
    fn drop(&mut self) {
        if let Some(body) = self.body.take() {
            self.slot.advance(Phase::Body, Phase::Answer);
            if !self.is_held_back
                && let Ok(runtime) = Handle::try_current()
            {
                runtime.spawn(throw_away(body));
            }
        }
    }
}

async fn throw_away(body: Incoming) {
    let mut chunks = Body::new(body).into_data_stream();
    let read = async {
        let mut left = MAX_UNWANTED_BYTES;
        while let Some(Ok(chunk)) = chunks.next().await
            && chunk.len() < left
        {
            left -= chunk.len();
        }
    };
    // At the limit, the connection is closed.
    timeout(MAX_UNWANTED_TIME, read).await.ok();
}

/// The body of a response. When it ends, its connection waits for the next request.
pub(super) struct Sent {
    body: Body,
    slot: Arc<Slot>,
}

impl Sent {
    pub(super) fn new(body: Body, slot: Arc<Slot>) -> Self {
        Self { body, slot }
    }
}

impl HttpBody for Sent {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for Sent {
    fn drop(&mut self) {
        self.slot.enter(Phase::Idle);
    }
}
