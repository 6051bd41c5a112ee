use serde_json::Value;

/// What is wrong with a request's JSON, before anything is known of the model.
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
    #[error("size must be WIDTHxHEIGHT in pixels, such as \"1024x768\", got {got:?}")]
    Size { got: String },
    #[error("{param} and {other} were given different values: give only one of them")]
    Conflict { param: String, other: String },
    #[error("unknown parameter {param}; known are {known}")]
    Unknown { param: String, known: String },
    #[error("streaming is not available: leave stream out, or set it to false")]
    Stream,
    #[error("messages has no message of the role \"user\", whose text would be the prompt")]
    NoUserMessage,
    #[error("{param} is not text: this model takes text only, no images or other media")]
    NotText { param: String },
    #[error("{param} is an empty list: it needs a part such as {{\"type\":\"text\",\"text\":…}}")]
    NoParts { param: String },
}

impl InvalidBody {
    pub(super) fn wrong_type(param: &str, expected: &'static str, got: &Value) -> Self {
        Self::Type {
            param: param.to_owned(),
            expected,
            got: describe(got),
        }
    }

    /// The request's key that is to blame, dots between levels.
    pub(super) fn param(&self) -> &str {
        match self {
            Self::Missing { param }
            | Self::Type { param, .. }
            | Self::Conflict { param, .. }
            | Self::Unknown { param, .. }
            | Self::NotText { param }
            | Self::NoParts { param } => param,
            Self::Size { .. } => "size",
            Self::Stream => "stream",
            Self::NoUserMessage => "messages",
        }
    }
}

/// Short enough for a message: numbers as they are, the rest by kind.
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
