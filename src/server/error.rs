//! All errors of the API, with their status codes and the error body of `OpenAI`.

use std::time::Duration;

use axum::extract::rejection::BytesRejection;
use axum::http::header::{CONTENT_TYPE, RETRY_AFTER, WWW_AUTHENTICATE};
use axum::http::{HeaderValue, Method, StatusCode};
use axum::response::{IntoResponse, Response};
use kiln_models::pipeline::PipelineError;
use serde::Serialize;
use utoipa::ToSchema;

use crate::adapters::AdapterError;
use crate::engine::{JobError, SubmitError, TooLarge};
use crate::image::{EncodeError, SideTooLong};
use crate::jobs::webhook::InvalidWebhook;
use crate::jobs::{JobId, JobStatus, StoreError};
use crate::request::InvalidRequest;
use crate::runtime::Progress;
use crate::tokenizer::TokenizerError;

use super::invalid::InvalidBody;
use super::request_id;

/// An error that is returned to the client.
#[derive(Debug, thiserror::Error)]
pub(super) enum ApiError {
    #[error("there is nothing at {path}")]
    UnknownRoute { path: String },
    #[error("there is nothing at {path}: the server was started without --enable-sdapi")]
    SdapiOff { path: String },
    #[error("there is nothing at {path}: the server was started without --enable-lora-updates")]
    LoraUpdatesOff { path: String },
    #[error("there is nothing at {path}: the server was started without --jobs")]
    JobsOff { path: String },
    #[error(
        "there is no job {id:?}: it has expired, was deleted, belongs to another API key, or never existed"
    )]
    UnknownJob { id: String },
    #[error("job {id} is {}, so it has no files{}", status.name(), hint(*status))]
    JobWithoutFiles { id: JobId, status: JobStatus },
    #[error("index must be below {count}, the number of files of the job, got {index}")]
    NoFile { index: usize, count: usize },
    #[error(
        "the Idempotency-Key belongs to job {id}, whose request had another body: use another key for \
         another request"
    )]
    OtherBody { id: JobId },
    #[error("the header {name} {message}")]
    Header {
        name: &'static str,
        message: &'static str,
    },
    #[error("{}", store_message(.0))]
    Store(StoreError),
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
    #[error("{0}")]
    Starting(Progress),
    #[error(
        "this server has --role api and generates no images itself: send the request to POST \
         /v1/images/jobs, or to a server of --role all"
    )]
    NoEngine,
    #[error(
        "there is nothing at {path}: this server has --role worker, which serves /health, /metrics and \
         /version only; send requests to a server of --role api"
    )]
    WorkerOnly { path: String },
    #[error(
        "the server listens on this machine only and does not answer to the host {host:?}: if clients \
         are to call it so, start it with --allowed-host and this name, or with --api-key"
    )]
    OtherHost { host: String },
    #[error(
        "a web page of the origin {origin:?} may not do this: if it is to use the API, start the \
         server with --cors-origin and this origin"
    )]
    OtherOrigin { origin: String },
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
    #[error("webhook: {0}")]
    Webhook(#[from] InvalidWebhook),
    #[error("{error}")]
    Request {
        error: InvalidRequest,
        param: &'static str,
    },
    #[error("{error}")]
    TooLarge {
        error: TooLarge,
        param: &'static str,
    },
    #[error("{param}: {error}: choose a smaller size or another output_format")]
    Side {
        param: &'static str,
        error: SideTooLong,
    },
    #[error("{param}: {error}")]
    Prompt {
        error: TokenizerError,
        param: &'static str,
    },
    #[error("{error}")]
    Adapter {
        error: AdapterError,
        param: Option<String>,
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
    #[error("the metrics could not be written: {0}")]
    Metrics(String),
    #[error("a worker thread failed")]
    Worker(#[from] tokio::task::JoinError),
    #[error("a request handler panicked: {0}")]
    HandlerPanicked(String),
}

impl ApiError {
    pub(super) fn status(&self) -> StatusCode {
        match self {
            Self::UnknownRoute { .. }
            | Self::SdapiOff { .. }
            | Self::LoraUpdatesOff { .. }
            | Self::JobsOff { .. }
            | Self::UnknownJob { .. }
            | Self::NoFile { .. }
            | Self::WorkerOnly { .. }
            | Self::UnknownModel { .. } => StatusCode::NOT_FOUND,
            Self::Adapter { error, .. } => adapter_status(error),
            Self::Method { .. } => StatusCode::METHOD_NOT_ALLOWED,
            Self::Unauthorized | Self::UnauthorizedBasic => StatusCode::UNAUTHORIZED,
            Self::OtherHost { .. } | Self::OtherOrigin { .. } => StatusCode::FORBIDDEN,
            Self::Interrupted | Self::JobWithoutFiles { .. } => StatusCode::CONFLICT,
            Self::OtherBody { .. } => StatusCode::UNPROCESSABLE_ENTITY,
            Self::Store(error) => store_status(error),
            Self::BodyTooLarge { .. } => StatusCode::PAYLOAD_TOO_LARGE,
            Self::ContentEncoding { .. } => StatusCode::UNSUPPORTED_MEDIA_TYPE,
            Self::SlowBody | Self::Job(JobError::DeadlinePassed | JobError::TooLate { .. }) => {
                StatusCode::REQUEST_TIMEOUT
            }
            // vLLM-Omni also returns 400 for a wrong content type.
            Self::NoEngine
            | Self::ContentType
            | Self::Body(_)
            | Self::Utf16
            | Self::Json(_)
            | Self::NotAnObject
            | Self::Header { .. }
            | Self::Invalid(_)
            | Self::Webhook(_)
            | Self::Request { .. }
            | Self::Side { .. }
            | Self::TooLarge { .. }
            | Self::Submit(
                SubmitError::TooLarge(_)
                | SubmitError::Adapters(_)
                | SubmitError::DeadlineTooShort { .. },
            )
            | Self::Prompt { .. } => StatusCode::BAD_REQUEST,
            Self::Submit(SubmitError::QueueFull { .. } | SubmitError::TooLate { .. }) => {
                StatusCode::TOO_MANY_REQUESTS
            }
            // Nothing was done, and another server can do it: proxies send these again by themselves.
            Self::Submit(
                SubmitError::Draining | SubmitError::Stopped | SubmitError::Failed { .. },
            )
            | Self::Job(JobError::Stopped | JobError::Lost { .. } | JobError::NoMemory { .. })
            | Self::Starting(_) => StatusCode::SERVICE_UNAVAILABLE,
            Self::Job(JobError::Pipeline(_) | JobError::Panicked(_))
            | Self::Encode(_)
            | Self::Archive(_)
            | Self::Response(_)
            | Self::Metrics(_)
            | Self::Worker(_)
            | Self::HandlerPanicked(_) => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }

    /// Whether the model's or an adapter's files or values are at fault: the message has no more detail than who
    /// runs the server can publish, and other requests fail as well.
    fn is_of_model(&self) -> bool {
        match self {
            Self::Job(JobError::Pipeline(error)) => {
                matches!(
                    **error,
                    PipelineError::NotFinite(_) | PipelineError::File(_)
                )
            }
            Self::Adapter { .. } => true,
            _ => false,
        }
    }

    /// The key of the request that the error is about.
    fn param(&self) -> Option<&str> {
        match self {
            Self::Invalid(error) => Some(error.param()),
            Self::Request { param, .. }
            | Self::Side { param, .. }
            | Self::TooLarge { param, .. }
            | Self::Prompt { param, .. } => Some(param),
            Self::Adapter { param, .. } => param.as_deref(),
            Self::UnknownModel { .. } => Some("model"),
            Self::Header { name, .. } => Some(name),
            Self::Webhook(_) => Some("webhook"),
            Self::OtherBody { .. } => Some(IDEMPOTENCY_KEY),
            Self::NoFile { .. } => Some("index"),
            Self::Submit(SubmitError::TooLarge(_)) => Some("size"),
            Self::Submit(SubmitError::Adapters(_)) => Some("loras"),
            Self::Submit(SubmitError::DeadlineTooShort { .. } | SubmitError::TooLate { .. })
            | Self::Job(JobError::TooLate { .. }) => Some("deadline_ms"),
            _ => None,
        }
    }

    /// Seconds after which the client may try again.
    fn retry_after_seconds(&self) -> Option<u64> {
        let wait = match self {
            Self::Submit(SubmitError::QueueFull { retry_after, .. }) => Some(*retry_after),
            // Whole seconds, after which the wait is short enough.
            Self::Submit(SubmitError::TooLate { retry_after, .. }) => {
                Some(retry_after.saturating_add(Duration::from_millis(999)))
            }
            Self::Starting(progress) => Some(progress.estimated_rest.unwrap_or(RETRY_AFTER_START)),
            // Another instance may have replaced this one by then, or memory may be free.
            Self::Submit(
                SubmitError::Draining | SubmitError::Stopped | SubmitError::Failed { .. },
            )
            | Self::Job(JobError::Stopped | JobError::Lost { .. } | JobError::NoMemory { .. })
            // A job may have ended by then, or a server of the store may be back.
            | Self::Store(StoreError::Full { .. } | StoreError::Unavailable(_)) => {
                Some(RETRY_AFTER_STOP)
            }
            _ => None,
        };
        wait.map(|wait| wait.as_secs().clamp(1, 3600))
    }

    /// What a refused deadline was compared with.
    fn estimate(&self) -> Option<DeadlineEstimate> {
        let (wait, work) = match self {
            Self::Submit(SubmitError::DeadlineTooShort { work }) => (Duration::ZERO, work),
            Self::Submit(SubmitError::TooLate { wait, work, .. }) => (*wait, work),
            _ => return None,
        };
        Some(DeadlineEstimate {
            estimated_wait: wait.as_secs_f64(),
            estimated_time: work.as_secs_f64(),
        })
    }

    /// The body of the response. Details of internal errors go to the log, not to the client, unless
    /// the model is at fault.
    pub(super) fn envelope(&self) -> ErrorEnvelope {
        let status = self.status();
        let message = if status == StatusCode::INTERNAL_SERVER_ERROR {
            let detail = crate::error_chain(self);
            tracing::error!("a request failed: {detail}");
            if self.is_of_model() {
                self.to_string()
            } else if matches!(self, Self::Store(_)) {
                "the store of jobs cannot be used; the server's log says why".to_owned()
            } else {
                "the image could not be generated; the server's log says why".to_owned()
            }
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
                request_id: request_id::current(),
                estimate: self.estimate(),
            },
        }
    }
}

impl From<StoreError> for ApiError {
    fn from(error: StoreError) -> Self {
        if let StoreError::Unavailable(detail) = &error {
            tracing::warn!("the store of jobs does not answer: {detail}");
        }
        Self::Store(error)
    }
}

/// The message of a store's error. Details of its servers and files go to the log only.
fn store_message(error: &StoreError) -> String {
    match error {
        StoreError::Unavailable(_) => "the store of jobs does not answer".to_owned(),
        error => error.to_string(),
    }
}

fn store_status(error: &StoreError) -> StatusCode {
    match error {
        StoreError::Full { .. } => StatusCode::TOO_MANY_REQUESTS,
        StoreError::Unavailable(_) => StatusCode::SERVICE_UNAVAILABLE,
        StoreError::TooLarge { .. } => StatusCode::PAYLOAD_TOO_LARGE,
        StoreError::Broken(_) => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

/// What to do about a job without files.
fn hint(status: JobStatus) -> &'static str {
    if status.is_ended() {
        ""
    } else {
        " yet: wait until it is completed"
    }
}

impl From<AdapterError> for ApiError {
    fn from(error: AdapterError) -> Self {
        Self::Adapter { error, param: None }
    }
}

fn adapter_status(error: &AdapterError) -> StatusCode {
    match error {
        AdapterError::Unknown { .. } | AdapterError::NoFile { .. } => StatusCode::NOT_FOUND,
        AdapterError::Changed { .. } | AdapterError::Gone { .. } => StatusCode::CONFLICT,
        AdapterError::Unusable { .. }
        | AdapterError::Listed { .. }
        | AdapterError::Merged { .. }
        | AdapterError::Name { .. }
        | AdapterError::NoFolder
        | AdapterError::Outside { .. }
        | AdapterError::Kind(_) => StatusCode::BAD_REQUEST,
        AdapterError::Open { .. }
        | AdapterError::File { .. }
        | AdapterError::Folder(_)
        | AdapterError::Io { .. } => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

/// The header that makes a repeated request the same job.
pub(super) const IDEMPOTENCY_KEY: &str = "Idempotency-Key";

/// Suggested wait during a start whose end cannot be estimated.
const RETRY_AFTER_START: Duration = Duration::from_secs(5);

/// Suggested wait after the server has stopped, or found no memory.
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
    /// The header `x-request-id` of the response.
    #[serde(skip_serializing_if = "Option::is_none")]
    request_id: Option<String>,
    /// Only in errors about a `deadline_ms` that cannot be kept.
    #[serde(flatten)]
    estimate: Option<DeadlineEstimate>,
}

/// Why a `deadline_ms` cannot be kept, by the measured speed.
#[derive(Debug, Serialize, ToSchema)]
struct DeadlineEstimate {
    /// Seconds that the device works on other requests before this one is finished; 0 if the deadline
    /// cannot be kept even without other requests.
    estimated_wait: f64,
    /// Seconds that the device takes for the images.
    estimated_time: f64,
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
