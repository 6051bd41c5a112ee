//! All errors of the API, with their status codes and the error body of `OpenAI`.

use std::time::Duration;

use axum::extract::rejection::BytesRejection;
use axum::http::header::{CONTENT_TYPE, RETRY_AFTER, WWW_AUTHENTICATE};
use axum::http::{HeaderValue, Method, StatusCode};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use utoipa::ToSchema;

use crate::engine::{JobError, SubmitError};
use crate::image::{EncodeError, MAX_WEBP_SIDE};
use crate::request::InvalidRequest;
use crate::tokenizer::TokenizerError;

use super::invalid::InvalidBody;

/// An error that is returned to the client.
#[derive(Debug, thiserror::Error)]
pub(super) enum ApiError {
    #[error("there is nothing at {path}")]
    UnknownRoute { path: String },
    #[error("there is nothing at {path}: the server was started without --enable-sdapi")]
    SdapiOff { path: String },
    #[error("there is no model {name:?}; this server has {served}")]
    UnknownModel { name: String, served: String },
    #[error("{path} does not answer to {method}")]
    Method { method: Method, path: String },
    #[error("the request needs the header \"Authorization: Bearer KEY\" with a key of this server")]
    Unauthorized,
    #[error(
        "the request needs HTTP Basic authentication with a key of this server as the password"
    )]
    UnauthorizedBasic,
    #[error("the request was interrupted")]
    Interrupted,
    #[error("the request needs the header \"Content-Type: application/json\"")]
    ContentType,
    #[error(
        "a body with the header \"Content-Encoding: {encoding}\" cannot be read: send it without \
         that header and uncompressed"
    )]
    ContentEncoding { encoding: String },
    #[error("the body is larger than {max} bytes")]
    BodyTooLarge { max: usize },
    #[error("the body took too long to arrive")]
    SlowBody,
    #[error("the body could not be read")]
    Body(#[source] BytesRejection),
    #[error("the body begins with the byte order mark of UTF-16: send JSON in UTF-8")]
    Utf16,
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
    #[error("{param}: a WebP file has {MAX_WEBP_SIDE} pixels a side at most, got {got}")]
    WebpSide { param: &'static str, got: usize },
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
    Encode(#[from] EncodeError),
    #[error("several images could not be put into one file")]
    Archive(#[from] zip::result::ZipError),
    #[error("a response could not be made")]
    Response(#[source] serde_json::Error),
    #[error("a worker thread failed")]
    Worker(#[from] tokio::task::JoinError),
    #[error("a request handler panicked: {0}")]
    HandlerPanicked(String),
}

impl ApiError {
    pub(super) fn status(&self) -> StatusCode {
        match self {
            Self::UnknownRoute { .. } | Self::SdapiOff { .. } | Self::UnknownModel { .. } => {
                StatusCode::NOT_FOUND
            }
            Self::Method { .. } => StatusCode::METHOD_NOT_ALLOWED,
            Self::Unauthorized | Self::UnauthorizedBasic => StatusCode::UNAUTHORIZED,
            Self::Interrupted => StatusCode::CONFLICT,
            Self::BodyTooLarge { .. } => StatusCode::PAYLOAD_TOO_LARGE,
            Self::ContentEncoding { .. } => StatusCode::UNSUPPORTED_MEDIA_TYPE,
            Self::SlowBody | Self::Job(JobError::DeadlinePassed) => StatusCode::REQUEST_TIMEOUT,
            // vLLM-Omni also returns 400 for a wrong content type.
            Self::ContentType
            | Self::Body(_)
            | Self::Utf16
            | Self::Json(_)
            | Self::NotAnObject
            | Self::Invalid(_)
            | Self::Request { .. }
            | Self::WebpSide { .. }
            | Self::Prompt { .. } => StatusCode::BAD_REQUEST,
            Self::Submit(SubmitError::QueueFull { .. }) => StatusCode::TOO_MANY_REQUESTS,
            Self::Submit(SubmitError::Draining | SubmitError::Stopped)
            | Self::Job(JobError::Stopped) => StatusCode::SERVICE_UNAVAILABLE,
            Self::Job(JobError::Pipeline(_) | JobError::Panicked(_))
            | Self::Encode(_)
            | Self::Archive(_)
            | Self::Response(_)
            | Self::Worker(_)
            | Self::HandlerPanicked(_) => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }

    /// The key of the request that the error is about.
    fn param(&self) -> Option<&str> {
        match self {
            Self::Invalid(error) => Some(error.param()),
            Self::Request { param, .. }
            | Self::WebpSide { param, .. }
            | Self::Prompt { param, .. } => Some(param),
            Self::UnknownModel { .. } => Some("model"),
            _ => None,
        }
    }

    /// Seconds after which the client may try again.
    fn retry_after_seconds(&self) -> Option<u64> {
        let wait = match self {
            Self::Submit(SubmitError::QueueFull { retry_after, .. }) => Some(*retry_after),
            // Another instance may have replaced this one by then.
            Self::Submit(SubmitError::Draining | SubmitError::Stopped)
            | Self::Job(JobError::Stopped) => Some(RETRY_AFTER_STOP),
            _ => None,
        };
        wait.map(|wait| wait.as_secs().clamp(1, 3600))
    }

    /// The body of the response. Details of internal errors go to the log, not to the client.
    pub(super) fn envelope(&self) -> ErrorEnvelope {
        let status = self.status();
        let message = if status == StatusCode::INTERNAL_SERVER_ERROR {
            let detail = crate::error_chain(self);
            tracing::error!("a request failed: {detail}");
            "the image could not be generated; the server's log says why".to_owned()
        } else if let Some(seconds) = self.retry_after_seconds() {
            format!("{self}; try again in {seconds} s")
        } else {
            self.to_string()
        };
        ErrorEnvelope {
            error: ErrorBody {
                message,
                r#type: error_type(status),
                param: self.param().map(str::to_owned),
                code: status.as_u16(),
            },
        }
    }
}

/// Suggested wait after the server has stopped.
const RETRY_AFTER_STOP: Duration = Duration::from_secs(10);

/// The body of an error response.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct ErrorEnvelope {
    error: ErrorBody,
}

impl ErrorEnvelope {
    pub(super) fn message(&self) -> &str {
        &self.error.message
    }
}

#[derive(Debug, Serialize, ToSchema)]
struct ErrorBody {
    /// What is wrong, and how to correct it.
    message: String,
    r#type: &'static str,
    /// The key of the request that the error is about, with dots between levels.
    param: Option<String>,
    /// The HTTP status code.
    code: u16,
}

impl ApiError {
    /// A response with the error's status and headers, and a body that contains
    /// [`ApiError::envelope`].
    pub(super) fn respond(&self, body: &impl Serialize) -> Response {
        let body = serde_json::to_vec(body).unwrap_or_default();
        let content_type = [(CONTENT_TYPE, "application/json")];
        let mut response = (self.status(), content_type, body).into_response();
        let headers = response.headers_mut();
        if let Some(seconds) = self.retry_after_seconds() {
            headers.insert(RETRY_AFTER, HeaderValue::from(seconds));
        }
        let scheme = match self {
            Self::Unauthorized => Some("Bearer"),
            Self::UnauthorizedBasic => Some("Basic realm=\"kiln\", charset=\"UTF-8\""),
            _ => None,
        };
        if let Some(scheme) = scheme {
            headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static(scheme));
        }
        response
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        self.respond(&self.envelope())
    }
}

/// `OpenAI`'s name of a type of errors.
fn error_type(status: StatusCode) -> &'static str {
    match status {
        StatusCode::UNAUTHORIZED => "authentication_error",
        StatusCode::NOT_FOUND => "not_found_error",
        StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
        status if status.is_client_error() => "invalid_request_error",
        _ => "server_error",
    }
}
