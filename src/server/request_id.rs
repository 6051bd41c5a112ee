//! The id of the request that is being answered, for the bodies of errors.

use std::pin::Pin;
use std::task::{Context, Poll};

use axum::body::{Body, Bytes, HttpBody};
use axum::http::HeaderName;
use hyper::body::{Frame, SizeHint};

/// Id of a request: the client's own, if it is short and printable, or one that the server makes. The
/// response repeats it.
pub(super) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

tokio::task_local! {
    static CURRENT: Option<String>;
}

/// The id of the request that this task answers.
pub(super) fn current() -> Option<String> {
    CURRENT.try_with(Clone::clone).ok().flatten()
}

/// Runs `answer` as the answer to the request with this id.
pub(super) async fn scope<F: Future>(id: Option<String>, answer: F) -> F::Output {
    CURRENT.scope(id, answer).await
}

/// The body of the response to the request with this id, which may be made while it is sent.
pub(super) fn body(id: Option<String>, body: Body) -> Body {
    Body::new(Scoped { id, body })
}

struct Scoped {
    id: Option<String>,
    body: Body,
}

impl HttpBody for Scoped {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let id = self.id.clone();
        CURRENT.sync_scope(id, || Pin::new(&mut self.body).poll_frame(context))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
