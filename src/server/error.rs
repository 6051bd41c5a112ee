//! Every failure a client can see, with its status code and the error body of `OpenAI`.

use std::time::Duration;

use axum::extract::rejection::BytesRejection;
use axum::http::header::{CONTENT_TYPE, RETRY_AFTER};
use axum::http::{HeaderValue, Method, StatusCode};
use axum::response::{IntoResponse, Response};
use serde::Serialize;

use crate::engine::{JobError, SubmitError};
use crate::request::{InvalidPrompt, InvalidRequest};
use crate::tokenizer::TokenizerError;

use super::MAX_BODY_BYTES;
use super::invalid::InvalidBody;

#[derive(Debug, thiserror::Error)]
pub(super) enum ApiError {
    #[error("there is nothing at {path}")]
    UnknownRoute { path: String },
    #[error("{path} does not answer to {method}")]
    Method { method: Method, path: String },
    #[error("the request needs the header \"Content-Type: application/json\"")]
    ContentType,
    #[error("the body is larger than {MAX_BODY_BYTES} bytes")]
    BodyTooLarge,
    #[error("the body could not be read")]
    Body(#[source] BytesRejection),
    #[error("the body is not valid JSON: {0}")]
    Json(#[source] serde_json::Error),
    #[error("the body must be a JSON object")]
    NotAnObject,
    #[error(transparent)]
    Invalid(#[from] InvalidBody),
    #[error("{error}")]
    Request {
        error: InvalidRequest,
        param: &'static str,
    },
    #[error("{param}: {error}")]
    Prompt {
        error: TokenizerError,
        param: &'static str,
    },
    #[error(transparent)]
    Submit(#[from] SubmitError),
    #[error(transparent)]
    Job(#[from] JobError),
    #[error("an image could not be encoded")]
    Encode(#[from] png::EncodingError),
    #[error("a response could not be made")]
    Response(#[source] serde_json::Error),
    #[error("a worker thread failed")]
    Worker(#[from] tokio::task::JoinError),
}

impl From<InvalidPrompt> for ApiError {
    fn from(InvalidPrompt { param, source }: InvalidPrompt) -> Self {
        Self::Prompt {
            error: source,
            // The prompt is the text of a message.
            param: if param == "prompt" { "messages" } else { param },
        }
    }
}

impl ApiError {
    pub(super) fn status(&self) -> StatusCode {
        match self {
            Self::UnknownRoute { .. } => StatusCode::NOT_FOUND,
            Self::Method { .. } => StatusCode::METHOD_NOT_ALLOWED,
            Self::BodyTooLarge => StatusCode::PAYLOAD_TOO_LARGE,
            // 400 also for the content type, as the reference has it.
            Self::ContentType
            | Self::Body(_)
            | Self::Json(_)
            | Self::NotAnObject
            | Self::Invalid(_)
            | Self::Request { .. }
            | Self::Prompt { .. } => StatusCode::BAD_REQUEST,
            Self::Submit(SubmitError::QueueFull { .. }) => StatusCode::TOO_MANY_REQUESTS,
            Self::Submit(SubmitError::Stopped) | Self::Job(JobError::Stopped) => {
                StatusCode::SERVICE_UNAVAILABLE
            }
            Self::Job(JobError::Paint(_) | JobError::Panicked(_))
            | Self::Encode(_)
            | Self::Response(_)
            | Self::Worker(_) => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }

    /// The key of the request that is to blame.
    fn param(&self) -> Option<&str> {
        match self {
            Self::Invalid(error) => Some(error.param()),
            Self::Request { param, .. } | Self::Prompt { param, .. } => Some(param),
            _ => None,
        }
    }

    fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Submit(SubmitError::QueueFull { retry_after, .. }) => Some(*retry_after),
            _ => None,
        }
    }
}

#[derive(Serialize)]
struct Envelope<'a> {
    error: Body<'a>,
}

#[derive(Serialize)]
struct Body<'a> {
    message: String,
    r#type: &'static str,
    param: Option<&'a str>,
    /// The status once more, as the reference has it.
    code: u16,
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let status = self.status();
        // What goes wrong inside is for the log, not for the client.
        let message = if status == StatusCode::INTERNAL_SERVER_ERROR {
            let detail = crate::error_chain(&self);
            tracing::error!("a request failed: {detail}");
            "the image could not be generated; the server's log says why".to_owned()
        } else {
            self.to_string()
        };
        let body = Envelope {
            error: Body {
                message,
                r#type: error_type(status),
                param: self.param(),
                code: status.as_u16(),
            },
        };
        let body = serde_json::to_vec(&body).unwrap_or_default();
        let mut response = (status, [(CONTENT_TYPE, "application/json")], body).into_response();
        if let Some(wait) = self.retry_after() {
            let seconds = wait.as_secs().clamp(1, 3600);
            response
                .headers_mut()
                .insert(RETRY_AFTER, HeaderValue::from(seconds));
        }
        response
    }
}

/// The names that `OpenAI` has for kinds of errors.
fn error_type(status: StatusCode) -> &'static str {
    match status {
        StatusCode::NOT_FOUND => "not_found_error",
        StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
        status if status.is_client_error() => "invalid_request_error",
        _ => "server_error",
    }
}
