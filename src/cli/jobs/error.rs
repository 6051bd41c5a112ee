//! Why `kiln jobs` failed.

use std::path::PathBuf;

use reqwest::StatusCode;

use super::job::printable;

/// Why `kiln jobs` failed.
#[derive(Debug, thiserror::Error)]
pub(in crate::cli) enum JobsError {
    #[error("{text:?} is not the URL of a server, such as http://127.0.0.1:8091")]
    Url { text: String },
    #[error("the API key has characters that a header cannot have")]
    ApiKey,
    #[error("--idempotency-key must have 1 to 255 visible ASCII characters")]
    IdempotencyKey,
    #[error("there is no HTTP client")]
    Client(#[source] reqwest::Error),
    #[error("{server} refuses connections: no server listens there")]
    Refused { server: String },
    #[error("{server} did not answer in time")]
    Slow { server: String },
    #[error("{server} cannot be asked")]
    Connection {
        server: String,
        source: reqwest::Error,
    },
    #[error("{}{}", printable(message), blamed(*status, param.as_deref()))]
    Status {
        status: StatusCode,
        message: String,
        /// The key of the request that is at fault.
        param: Option<String>,
        retry_after: Option<u64>,
    },
    #[error("the answer of {server} is not {expected}: is it a kiln server?")]
    Junk {
        server: String,
        expected: &'static str,
    },
    #[error("{id} failed: {}{}", printable(message), code_of(code))]
    Failed {
        id: String,
        code: String,
        message: String,
    },
    #[error("{id} was cancelled")]
    Cancelled { id: String },
    #[error("{id} has not ended in this time: its status is {status}")]
    TimedOut { id: String, status: String },
    #[error("{id} has no files, as its status is {status}")]
    NoFiles { id: String, status: String },
    #[error("{} would not have the right extension, as the files are {media_type}", path.display())]
    OtherFormat { path: PathBuf, media_type: String },
    #[error("a file of {id} came with other bytes than the server's record says")]
    OtherBytes { id: String },
}

/// What follows the message of a refused request.
fn blamed(status: StatusCode, param: Option<&str>) -> String {
    match param {
        Some(param) => format!(" ({param}, status {})", status.as_u16()),
        None => format!(" (status {})", status.as_u16()),
    }
    .replace(char::is_control, " ")
}

fn code_of(code: &str) -> String {
    if code.is_empty() {
        String::new()
    } else {
        format!(" ({})", printable(code))
    }
}

impl JobsError {
    pub(in crate::cli) fn exit_code(&self) -> u8 {
        match self {
            Self::Failed { .. } => 3,
            Self::Cancelled { .. } => 4,
            Self::TimedOut { .. } => 5,
            Self::Url { .. } | Self::ApiKey | Self::IdempotencyKey | Self::OtherFormat { .. } => 2,
            // What the server calls a fault of the request is one of the arguments.
            Self::Status { status, .. } => match status.as_u16() {
                400 | 413 | 415 | 422 => 2,
                _ => 1,
            },
            _ => 1,
        }
    }

    pub(in crate::cli) fn tip(&self) -> Option<String> {
        match self {
            Self::Status { status, .. } if *status == StatusCode::UNAUTHORIZED => {
                Some("give the key as --api-key or KILN_API_KEY".to_owned())
            }
            Self::Refused { .. } => Some(
                "start one with kiln serve --jobs DIR, or name another with --server".to_owned(),
            ),
            Self::TimedOut { id, .. } => Some(format!(
                "the job goes on; wait again with kiln jobs wait {id}"
            )),
            _ => None,
        }
    }

    /// Whether the same request may succeed later.
    pub(super) fn is_temporary(&self) -> bool {
        match self {
            Self::Refused { .. } | Self::Slow { .. } | Self::Connection { .. } => true,
            Self::Status { status, .. } => matches!(status.as_u16(), 429 | 502 | 503 | 504),
            _ => false,
        }
    }
}
