//! Parameters in the query of a request.

use std::convert::Infallible;
use std::ops::RangeInclusive;
use std::time::Duration;

use axum::extract::{FromRequestParts, Query};
use axum::http::request::Parts;

use crate::jobs::{JobId, JobStatus};

use super::super::invalid::InvalidBody;
use super::MAX_QUOTE;

/// The parameters in the order of the query. Those that no function asks for are ignored.
#[derive(Debug, Default)]
pub(super) struct Parameters(Vec<(String, String)>);

impl<S: Sync> FromRequestParts<S> for Parameters {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Infallible> {
        // Any text is a list of pairs.
        let pairs = Query::<Vec<(String, String)>>::try_from_uri(&parts.uri);
        Ok(Self(pairs.map(|Query(pairs)| pairs).unwrap_or_default()))
    }
}

impl Parameters {
    /// The value of a parameter.
    fn get(&self, name: &'static str) -> Result<Option<&str>, InvalidBody> {
        let mut values = self.0.iter().filter(|(key, _)| key == name);
        let value = values.next().map(|(_, value)| value.as_str());
        match values.next() {
            None => Ok(value),
            Some(_) => Err(InvalidBody::value(
                name.to_owned(),
                "is in the query twice: give it once",
            )),
        }
    }

    /// A whole number within bounds.
    pub(super) fn number(
        &self,
        name: &'static str,
        bounds: RangeInclusive<usize>,
        expected: &'static str,
    ) -> Result<Option<usize>, InvalidBody> {
        let Some(value) = self.get(name)? else {
            return Ok(None);
        };
        let number = value.parse().ok().filter(|number| bounds.contains(number));
        number
            .map(Some)
            .ok_or_else(|| unexpected(name, expected, value))
    }

    /// A time in seconds, of at most `max`.
    pub(super) fn seconds(
        &self,
        name: &'static str,
        max: Duration,
    ) -> Result<Duration, InvalidBody> {
        let Some(value) = self.get(name)? else {
            return Ok(Duration::ZERO);
        };
        let seconds = value.parse::<f64>().ok();
        let seconds = seconds.filter(|seconds| seconds.is_finite() && *seconds >= 0.0);
        let seconds =
            seconds.ok_or_else(|| unexpected(name, "a number of seconds from 0", value))?;
        Ok(Duration::from_secs_f64(seconds.min(max.as_secs_f64())))
    }

    /// The value of a parameter that is a word. An empty one is absent.
    fn word(&self, name: &'static str) -> Result<Option<&str>, InvalidBody> {
        let value = self.get(name)?;
        Ok(value.filter(|value| !value.is_empty()))
    }

    /// The id of a job.
    pub(super) fn job(&self, name: &'static str) -> Result<Option<JobId>, InvalidBody> {
        let value = self.word(name)?;
        let id = value.map(|value| {
            JobId::parse(value).ok_or_else(|| unexpected(name, "the id of a job", value))
        });
        id.transpose()
    }

    pub(super) fn status(&self, name: &'static str) -> Result<Option<JobStatus>, InvalidBody> {
        const EXPECTED: &str = "queued, in_progress, completed, failed or cancelled";
        let Some(value) = self.word(name)? else {
            return Ok(None);
        };
        let mut all = JobStatus::ALL.into_iter();
        let status = all.find(|status| status.name() == value);
        status
            .map(Some)
            .ok_or_else(|| unexpected(name, EXPECTED, value))
    }
}

fn unexpected(name: &str, expected: &'static str, value: &str) -> InvalidBody {
    let quoted: String = value.chars().take(MAX_QUOTE).collect();
    InvalidBody::Type {
        param: name.to_owned(),
        expected,
        got: format!("{quoted:?}"),
    }
}
