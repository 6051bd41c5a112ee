//! Reads config.json files strictly: no value is ignored silently.

use serde_json::{Map, Value};

/// The text of a configuration file.
#[derive(Debug, Clone)]
pub struct ConfigText {
    /// The file's name, for messages.
    pub file: String,
    pub text: String,
}

/// Why a configuration file is refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The text is not valid JSON.
    #[error("{file} is not valid JSON")]
    Json {
        file: String,
        source: serde_json::Error,
    },
    /// A required key does not exist.
    #[error("{file} has no `{key}`")]
    Missing { file: String, key: String },
    /// A value is of another JSON type, or out of range.
    #[error("{file}: `{key}` must be {expected}, it is {found}")]
    Type {
        file: String,
        key: String,
        expected: &'static str,
        found: String,
    },
    /// A value is valid, but kiln does not implement it.
    #[error("{file}: `{key}` is {found}, which kiln does not support; it supports {supported}")]
    Unsupported {
        file: String,
        key: String,
        found: String,
        supported: String,
    },
    /// Two values contradict each other.
    #[error("{file}: {problem}")]
    Inconsistent { file: String, problem: String },
}

/// One JSON object of a configuration file.
#[derive(Debug)]
pub(crate) struct ConfigReader {
    file: String,
    values: Map<String, Value>,
}

impl ConfigReader {
    /// # Errors
    /// If the text is no JSON object.
    pub(crate) fn parse(config: &ConfigText) -> Result<Self, ConfigError> {
        let file = config.file.clone();
        match serde_json::from_str(&config.text) {
            Ok(Value::Object(values)) => Ok(Self { file, values }),
            Ok(other) => Err(ConfigError::Type {
                file,
                key: "(the whole file)".to_owned(),
                expected: "a JSON object",
                found: brief(&other),
            }),
            Err(source) => Err(ConfigError::Json { file, source }),
        }
    }

    /// The object under `key`, `None` if it is absent or null.
    pub(crate) fn object(&self, key: &str) -> Result<Option<Self>, ConfigError> {
        match self.value(key) {
            None => Ok(None),
            Some(Value::Object(values)) => Ok(Some(Self {
                file: format!("{} ({key})", self.file),
                values: values.clone(),
            })),
            Some(other) => Err(self.wrong_type(key, "an object", other)),
        }
    }

    /// The value under `key`, `None` if it is absent or null.
    pub(crate) fn value(&self, key: &str) -> Option<&Value> {
        self.values.get(key).filter(|value| !value.is_null())
    }

    pub(crate) fn size(&self, key: &str) -> Result<usize, ConfigError> {
        self.optional_size(key)?.ok_or_else(|| self.missing(key))
    }

    pub(crate) fn size_or(&self, key: &str, default: usize) -> Result<usize, ConfigError> {
        Ok(self.optional_size(key)?.unwrap_or(default))
    }

    /// A whole number from 1 to 2³².
    pub(crate) fn optional_size(&self, key: &str) -> Result<Option<usize>, ConfigError> {
        let Some(value) = self.value(key) else {
            return Ok(None);
        };
        value
            .as_u64()
            .filter(|&size| (1..=1 << 32).contains(&size))
            .map(|size| Some(size as usize))
            .ok_or_else(|| self.wrong_type(key, "a whole number of at least 1", value))
    }

    pub(crate) fn optional_number(&self, key: &str) -> Result<Option<f64>, ConfigError> {
        let Some(value) = self.value(key) else {
            return Ok(None);
        };
        value
            .as_f64()
            .map(Some)
            .ok_or_else(|| self.wrong_type(key, "a number", value))
    }

    pub(crate) fn number_or(&self, key: &str, default: f64) -> Result<f64, ConfigError> {
        Ok(self.optional_number(key)?.unwrap_or(default))
    }

    pub(crate) fn flag_or(&self, key: &str, default: bool) -> Result<bool, ConfigError> {
        let Some(value) = self.value(key) else {
            return Ok(default);
        };
        value
            .as_bool()
            .ok_or_else(|| self.wrong_type(key, "true or false", value))
    }

    pub(crate) fn sizes(&self, key: &str) -> Result<Vec<usize>, ConfigError> {
        let value = self.value(key).ok_or_else(|| self.missing(key))?;
        let sizes: Option<Vec<usize>> = value.as_array().and_then(|items| {
            items
                .iter()
                .map(|item| {
                    item.as_u64()
                        .filter(|&n| n > 0 && n <= 1 << 32)
                        .map(|n| n as usize)
                })
                .collect()
        });
        sizes.ok_or_else(|| self.wrong_type(key, "a list of whole numbers of at least 1", value))
    }

    pub(crate) fn numbers(&self, key: &str) -> Result<Vec<f64>, ConfigError> {
        let value = self.value(key).ok_or_else(|| self.missing(key))?;
        let numbers: Option<Vec<f64>> = value
            .as_array()
            .and_then(|items| items.iter().map(Value::as_f64).collect());
        numbers.ok_or_else(|| self.wrong_type(key, "a list of numbers", value))
    }

    pub(crate) fn text_or(&self, key: &str, default: &str) -> Result<String, ConfigError> {
        let Some(value) = self.value(key) else {
            return Ok(default.to_owned());
        };
        value
            .as_str()
            .map(str::to_owned)
            .ok_or_else(|| self.wrong_type(key, "a text", value))
    }

    /// Refuses a `_class_name` other than this one.
    pub(crate) fn require_class(&self, class: &str) -> Result<(), ConfigError> {
        self.require_class_of(&[class]).map(|_| ())
    }

    /// Finds `_class_name` in a list of the classes that kiln implements, and returns its place.
    pub(crate) fn require_class_of(&self, classes: &[&str]) -> Result<usize, ConfigError> {
        let value = self
            .value("_class_name")
            .ok_or_else(|| self.missing("_class_name"))?;
        let place = classes
            .iter()
            .position(|class| value.as_str() == Some(class));
        place.ok_or_else(|| self.unsupported("_class_name", &classes.join(" and ")))
    }

    /// Refuses a switch that is on.
    pub(crate) fn require_off(&self, key: &str) -> Result<(), ConfigError> {
        if self.flag_or(key, false)? {
            Err(self.unsupported(key, "only false"))
        } else {
            Ok(())
        }
    }

    /// Refuses keys that are not in `known`, unless the value is null or false or the key begins with
    /// `_`: a value that kiln does not implement must not be ignored.
    pub(crate) fn refuse_unknown(&self, known: &[&str]) -> Result<(), ConfigError> {
        let unknown = self.values.iter().find(|(key, value)| {
            !key.starts_with('_')
                && !known.contains(&key.as_str())
                && !matches!(value, Value::Null | Value::Bool(false))
        });
        match unknown {
            Some((key, _)) => Err(self.unsupported(key, "no such key")),
            None => Ok(()),
        }
    }

    pub(crate) fn unsupported(&self, key: &str, supported: impl Into<String>) -> ConfigError {
        ConfigError::Unsupported {
            file: self.file.clone(),
            key: key.to_owned(),
            found: self.value(key).map_or_else(|| "absent".to_owned(), brief),
            supported: supported.into(),
        }
    }

    pub(crate) fn inconsistent(&self, problem: impl Into<String>) -> ConfigError {
        ConfigError::Inconsistent {
            file: self.file.clone(),
            problem: problem.into(),
        }
    }

    fn missing(&self, key: &str) -> ConfigError {
        ConfigError::Missing {
            file: self.file.clone(),
            key: key.to_owned(),
        }
    }

    fn wrong_type(&self, key: &str, expected: &'static str, found: &Value) -> ConfigError {
        let (file, key) = (self.file.clone(), key.to_owned());
        ConfigError::Type {
            file,
            key,
            expected,
            found: brief(found),
        }
    }
}

/// A value as JSON, cut to 80 characters.
fn brief(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(80) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reader(text: &str) -> ConfigReader {
        ConfigReader::parse(&ConfigText {
            file: "c.json".to_owned(),
            text: text.to_owned(),
        })
        .unwrap()
    }

    #[test]
    fn errors_name_the_file_the_key_and_the_value() {
        let config = reader(r#"{"a": -1, "b": "x", "c": true, "list": [1, "two"]}"#);
        let message = |error: ConfigError| error.to_string();
        assert_eq!(
            message(config.size("a").unwrap_err()),
            "c.json: `a` must be a whole number of at least 1, it is -1"
        );
        assert_eq!(message(config.size("z").unwrap_err()), "c.json has no `z`");
        assert_eq!(
            message(config.require_off("c").unwrap_err()),
            "c.json: `c` is true, which kiln does not support; it supports only false"
        );
        assert_eq!(
            message(config.numbers("list").unwrap_err()),
            r#"c.json: `list` must be a list of numbers, it is [1,"two"]"#
        );
    }

    #[test]
    fn unknown_keys_are_refused_unless_inert() {
        let config = reader(r#"{"known": 1, "_note": 2, "off": false, "none": null}"#);
        assert!(config.refuse_unknown(&["known"]).is_ok());
        let error = config.refuse_unknown(&[]).unwrap_err().to_string();
        assert_eq!(
            error,
            "c.json: `known` is 1, which kiln does not support; it supports no such key"
        );
    }
}
