//! The load of the server in the header `endpoint-load-metrics`, in two formats of ORCA (Open Request
//! Cost Aggregation), for clients that ask for it. vLLM and Triton have the same headers.

use axum::http::{HeaderMap, HeaderName, HeaderValue};
use serde_json::{Map, Number, Value};

use crate::engine::Engine;

use super::LoadedApp;

/// Header of a request: the format of the report.
const FORMAT: HeaderName = HeaderName::from_static("endpoint-load-metrics-format");

/// Header of a response: the report.
pub(super) const LOAD: HeaderName = HeaderName::from_static("endpoint-load-metrics");

/// A format of the report.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    /// `TEXT name=value, named_metrics.name=value`
    Text,
    /// `JSON {"name": value, "named_metrics": {"name": value}}`
    Json,
}

impl Format {
    /// The format that a request asks for; `None` for none, and for one that is not known.
    pub(super) fn asked_for(headers: &HeaderMap) -> Option<Self> {
        let format = headers.get(FORMAT)?.as_bytes().trim_ascii();
        [(Self::Text, "TEXT"), (Self::Json, "JSON")]
            .into_iter()
            .find(|(_, name)| format.eq_ignore_ascii_case(name.as_bytes()))
            .map(|(format, _)| format)
    }
}

/// The load of a server.
#[derive(Debug, Clone, Copy)]
struct Load {
    /// The part of the places for requests that is taken, from 0 to 1.
    utilization: f64,
    waiting: f64,
    running: f64,
    /// Seconds that a default request would wait; `None` if they are not known.
    wait: Option<f64>,
}

impl Load {
    fn of(app: &LoadedApp, engine: &Engine) -> Self {
        let stats = engine.stats();
        let unfinished = stats.waiting + stats.running;
        Self {
            utilization: unfinished as f64 / stats.max_unfinished.max(1) as f64,
            waiting: stats.waiting as f64,
            running: stats.running as f64,
            wait: app.expected_wait().map(|wait| wait.as_secs_f64()),
        }
    }

    /// The metrics that ORCA has no field of its own for.
    fn named(self) -> impl Iterator<Item = (&'static str, f64)> {
        [
            ("num_requests_waiting", Some(self.waiting)),
            ("num_requests_running", Some(self.running)),
            ("queue_wait_seconds", self.wait),
        ]
        .into_iter()
        .filter_map(|(name, value)| Some((name, value?)))
    }

    fn write(self, format: Format) -> String {
        match format {
            Format::Text => {
                let named = self.named();
                let named = named.map(|(name, value)| format!(", named_metrics.{name}={value}"));
                let named: String = named.collect();
                format!("TEXT application_utilization={}{named}", self.utilization)
            }
            Format::Json => {
                let number = |value| Number::from_f64(value).map_or(Value::Null, Value::Number);
                let named = self.named();
                let named: Map<String, Value> = named
                    .map(|(name, value)| (name.to_owned(), number(value)))
                    .collect();
                let report = serde_json::json!({
                    "application_utilization": number(self.utilization),
                    "named_metrics": named,
                });
                format!("JSON {report}")
            }
        }
    }
}

/// The value of [`LOAD`] for the server's load now; `None` for a server without an engine.
pub(super) fn header(format: Format, app: &LoadedApp) -> Option<HeaderValue> {
    let load = Load::of(app, app.engine.as_ref()?);
    HeaderValue::try_from(load.write(format)).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOAD: Load = Load {
        utilization: 0.25,
        waiting: 7.0,
        running: 1.0,
        wait: Some(12.5),
    };

    #[test]
    fn both_formats_have_the_same_numbers() {
        assert_eq!(
            LOAD.write(Format::Text),
            "TEXT application_utilization=0.25, named_metrics.num_requests_waiting=7, \
             named_metrics.num_requests_running=1, named_metrics.queue_wait_seconds=12.5"
        );
        let json = LOAD.write(Format::Json);
        let json: Value = serde_json::from_str(json.strip_prefix("JSON ").unwrap()).unwrap();
        let expected = serde_json::json!({
            "application_utilization": 0.25,
            "named_metrics": {
                "num_requests_waiting": 7.0, "num_requests_running": 1.0, "queue_wait_seconds": 12.5,
            },
        });
        assert_eq!(json, expected);
    }

    #[test]
    fn a_wait_that_is_not_known_is_left_out() {
        let load = Load { wait: None, ..LOAD };
        for format in [Format::Text, Format::Json] {
            assert!(!load.write(format).contains("queue_wait"), "{format:?}");
        }
    }

    #[test]
    fn formats_are_known_in_any_case_and_others_are_ignored() {
        for (value, format) in [
            ("TEXT", Some(Format::Text)),
            ("text", Some(Format::Text)),
            (" Json ", Some(Format::Json)),
            ("BIN", None),
            ("", None),
            ("TEXT, JSON", None),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert(FORMAT, HeaderValue::from_static(value));
            assert_eq!(Format::asked_for(&headers), format, "{value:?}");
        }
        assert_eq!(Format::asked_for(&HeaderMap::new()), None);
    }
}
