//! Errors in the JSON of a request that need no knowledge of the model.

use serde_json::Value;

/// Maximum length of a message of the JSON reader in a response, in characters: it may quote the
/// request.
const MAX_QUOTE: usize = 200;

/// An error in the JSON of a request.
#[derive(Debug, PartialEq, thiserror::Error)]
pub(super) enum InvalidBody {
    #[error("{param} is required")]
    Missing { param: String },
    #[error("{param} must be {expected}, got {got}")]
    Type {
        param: String,
        expected: &'static str,
        got: String,
    },
    #[error("{param}: {message}")]
    Value { param: String, message: String },
    #[error("{param} must be from {min} to {max}, got {got}")]
    Range {
        param: &'static str,
        min: i128,
        max: i128,
        got: i128,
    },
    #[error("{param} and {other} were given different values: give only one of them")]
    Conflict { param: String, other: String },
    #[error("unknown parameter {param}; known are {known}")]
    Unknown { param: String, known: String },
    #[error("{param} is not available here: {instead}")]
    Unavailable {
        param: String,
        instead: &'static str,
    },
    #[error(
        "{param}: {file:?} is not the file of an adapter that GET /v1/models lists: give the name of one"
    )]
    UnlistedFile { param: String, file: String },
    #[error("messages has no message of the role \"user\", whose text would be the prompt")]
    NoUserMessage,
    #[error("{param} is not text: this model takes text only, no images or other media")]
    NotText { param: String },
    #[error("{param} is an empty list: it needs a part such as {{\"type\":\"text\",\"text\":…}}")]
    NoParts { param: String },
}

impl InvalidBody {
    pub(super) fn missing(param: &str) -> Self {
        let param = param.to_owned();
        Self::Missing { param }
    }

    pub(super) fn wrong_type(param: &str, expected: &'static str, got: &Value) -> Self {
        Self::Type {
            param: param.to_owned(),
            expected,
            got: describe(got),
        }
    }

    pub(super) fn conflict(param: &str, other: &str) -> Self {
        Self::Conflict {
            param: param.to_owned(),
            other: other.to_owned(),
        }
    }

    pub(super) fn needs_stream(param: &str) -> Self {
        Self::value(
            param.to_owned(),
            "is for streams only: set stream to true, or leave it out",
        )
    }

    /// A value that the JSON reader refused with this message.
    pub(super) fn value(param: String, message: &str) -> Self {
        let mut quoted: String = message.chars().take(MAX_QUOTE).collect();
        if quoted.len() < message.len() {
            quoted.push('…');
        }
        let message = quoted;
        Self::Value { param, message }
    }

    /// The key that the error is about, with dots between levels.
    pub(super) fn param(&self) -> &str {
        match self {
            Self::Missing { param }
            | Self::Type { param, .. }
            | Self::Value { param, .. }
            | Self::Conflict { param, .. }
            | Self::Unknown { param, .. }
            | Self::Unavailable { param, .. }
            | Self::UnlistedFile { param, .. }
            | Self::NotText { param }
            | Self::NoParts { param } => param,
            Self::Range { param, .. } => param,
            Self::NoUserMessage => "messages",
        }
    }
}

/// A short description for a message: numbers in full, other values by their type.
fn describe(value: &Value) -> String {
    match value {
        Value::Null => "null".to_owned(),
        Value::Bool(_) => "a boolean".to_owned(),
        Value::Number(number) => number.to_string(),
        Value::String(_) => "a string".to_owned(),
        Value::Array(_) => "a list".to_owned(),
        Value::Object(_) => "an object".to_owned(),
    }
}
