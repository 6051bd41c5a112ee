//! Reads the values of an object with a cache's settings, and says what is wrong with them.

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::request::Integer;

/// Largest count of steps or blocks in a setting.
const MAX_COUNT: usize = 10_000;
/// Largest threshold, and largest ratio.
const MAX_NUMBER: f64 = 1000.0;
/// Largest number of entries of a list.
const MAX_ENTRIES: usize = 1000;
/// How many characters of a word a message repeats.
const MAX_QUOTE: usize = 40;

/// Why the text or the object of a step cache is invalid.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidCache {
    #[error("unknown key {key}; known are {known}")]
    Unknown { key: String, known: String },
    /// A value under a key of the object.
    #[error("{key} {message}")]
    Value { key: &'static str, message: String },
    /// The value as a whole.
    #[error("{0}")]
    Whole(String),
}

/// The entries of an object. `null` counts as absent.
pub(super) struct Fields<'a>(&'a Map<String, Value>);

impl<'a> Fields<'a> {
    /// Refuses keys that are not in `known`.
    pub(super) fn new(
        object: &'a Map<String, Value>,
        known: &[&[&str]],
    ) -> Result<Self, InvalidCache> {
        let known: Vec<&str> = known.iter().copied().flatten().copied().collect();
        let mut given = object.iter().filter(|(_, value)| !value.is_null());
        match given.find(|(key, _)| !known.contains(&key.as_str())) {
            None => Ok(Self(object)),
            Some((key, _)) => Err(InvalidCache::Unknown {
                key: quote(key),
                known: known.join(", "),
            }),
        }
    }

    /// The entries of an object that may have any keys.
    pub(super) fn unchecked(object: &'a Map<String, Value>) -> Self {
        Self(object)
    }

    pub(super) fn get(&self, key: &str) -> Option<&'a Value> {
        self.0.get(key).filter(|value| !value.is_null())
    }

    /// The value under one of several names for the same setting, and that name.
    pub(super) fn any(
        &self,
        keys: &[&'static str],
    ) -> Result<Option<(&'static str, &'a Value)>, InvalidCache> {
        let mut given = keys.iter().filter_map(|&key| Some((key, self.get(key)?)));
        let first = given.next();
        match (first, given.next()) {
            (Some((key, value)), Some((other, second))) if value != second => Err(wrong(
                key,
                format!("and {other} were given different values: give only one of them"),
            )),
            _ => Ok(first),
        }
    }

    pub(super) fn count(
        &self,
        key: &'static str,
        min: usize,
    ) -> Result<Option<usize>, InvalidCache> {
        let value = self.get(key);
        value.map(|value| count(key, value, min)).transpose()
    }

    /// The largest number of steps; -1 stands for any number, which is `None`.
    pub(super) fn cap(
        &self,
        key: &'static str,
        default: Option<usize>,
    ) -> Result<Option<usize>, InvalidCache> {
        match self.get(key) {
            None => Ok(default),
            Some(value) if Integer::deserialize(value).ok() == Some(Integer(-1)) => Ok(None),
            Some(value) => count(key, value, 0).map(Some),
        }
    }

    /// A number from 0 to `max`.
    pub(super) fn number(&self, key: &'static str, max: f64) -> Result<Option<f64>, InvalidCache> {
        let read = |value: &Value| {
            let number = value.as_f64().filter(|number| (0.0..=max).contains(number));
            number.ok_or_else(|| must(key, &format!("be a number from 0 to {max}"), value))
        };
        self.get(key).map(read).transpose()
    }

    pub(super) fn threshold(&self, key: &'static str) -> Result<Option<f64>, InvalidCache> {
        self.number(key, MAX_NUMBER)
    }

    pub(super) fn flag(&self, key: &'static str) -> Result<Option<bool>, InvalidCache> {
        let read = |value: &Value| {
            let flag = value.as_bool();
            flag.ok_or_else(|| must(key, "be true or false", value))
        };
        self.get(key).map(read).transpose()
    }

    /// Counts of steps, as a list or as a text with commas between them.
    pub(super) fn bins(&self, key: &'static str) -> Result<Option<Vec<usize>>, InvalidCache> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        let texts: Vec<Value>;
        let bins = match value {
            Value::String(text) => {
                let numbers = text.split(',').map(|bin| bin.trim().parse::<usize>());
                texts = numbers
                    .map(|bin| bin.map_or(Value::Null, Value::from))
                    .collect();
                &texts
            }
            value => list(key, value)?,
        };
        let bins = bins.iter().map(|bin| count(key, bin, 0));
        bins.collect::<Result<_, _>>().map(Some)
    }

    /// One value for each step, of which true and 1 stand for a computed one.
    pub(super) fn mask(&self, key: &'static str) -> Result<Option<Vec<bool>>, InvalidCache> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        let step = |value: &Value| {
            let number = Integer::deserialize(value).ok().map(|Integer(it)| it);
            let step = value.as_bool().or(match number {
                Some(0) => Some(false),
                Some(1) => Some(true),
                _ => None,
            });
            step.ok_or_else(|| must(key, "be a list of 0 and 1", value))
        };
        let steps = list(key, value)?.iter().map(step);
        steps.collect::<Result<_, _>>().map(Some)
    }

    /// Numbers above 0.
    pub(super) fn ratios(&self, key: &'static str) -> Result<Option<Vec<f64>>, InvalidCache> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        let ratio = |value: &Value| {
            let is_ratio = |ratio: &f64| *ratio > 0.0 && *ratio <= MAX_NUMBER;
            let ratio = value.as_f64().filter(is_ratio);
            let expected = format!("be a list of numbers above 0, {MAX_NUMBER} at most");
            ratio.ok_or_else(|| must(key, &expected, value))
        };
        let ratios = list(key, value)?.iter().map(ratio);
        ratios.collect::<Result<_, _>>().map(Some)
    }
}

/// The choice of a word in any case. Blank texts count as absent.
pub(super) fn word<T: Copy>(
    key: &'static str,
    value: &Value,
    words: &[(&str, T)],
) -> Result<Option<T>, InvalidCache> {
    let given = value.as_str().map(|text| text.trim().to_ascii_lowercase());
    if given.as_deref() == Some("") {
        return Ok(None);
    }
    let found = words
        .iter()
        .find(|(name, _)| Some(*name) == given.as_deref());
    let names: Vec<&str> = words.iter().map(|(name, _)| *name).collect();
    found.map(|(_, choice)| Some(*choice)).ok_or_else(|| {
        let expected = format!("be one of {}", names.join(", "));
        must(key, &expected, value)
    })
}

fn count(key: &'static str, value: &Value, min: usize) -> Result<usize, InvalidCache> {
    let Integer(given) = Integer::deserialize(value).map_err(|_| {
        must(
            key,
            &format!("be an integer from {min} to {MAX_COUNT}"),
            value,
        )
    })?;
    let count = usize::try_from(given).ok();
    let count = count.filter(|count| (min..=MAX_COUNT).contains(count));
    count.ok_or_else(|| {
        wrong(
            key,
            format!("must be from {min} to {MAX_COUNT}, got {given}"),
        )
    })
}

fn list<'a>(key: &'static str, value: &'a Value) -> Result<&'a Vec<Value>, InvalidCache> {
    let entries = value
        .as_array()
        .ok_or_else(|| must(key, "be a list", value))?;
    if entries.is_empty() || entries.len() > MAX_ENTRIES {
        let message = format!(
            "must have from 1 to {MAX_ENTRIES} entries, got {}",
            entries.len()
        );
        return Err(wrong(key, message));
    }
    Ok(entries)
}

pub(super) fn wrong(key: &'static str, message: impl Into<String>) -> InvalidCache {
    let message = message.into();
    InvalidCache::Value { key, message }
}

fn must(key: &'static str, what: &str, got: &Value) -> InvalidCache {
    wrong(key, format!("must {what}, got {}", described(got)))
}

/// A value for a message: numbers and words as they are, others by their type.
pub(super) fn described(value: &Value) -> String {
    match value {
        Value::Null => "nothing".to_owned(),
        Value::Bool(value) => value.to_string(),
        Value::Number(number) => number.to_string(),
        Value::String(text) => format!("{:?}", quote(text)),
        Value::Array(_) => "a list".to_owned(),
        Value::Object(_) => "an object".to_owned(),
    }
}

fn quote(text: &str) -> String {
    let mut quoted: String = text.chars().take(MAX_QUOTE).collect();
    if quoted.len() < text.len() {
        quoted.push('…');
    }
    quoted
}
