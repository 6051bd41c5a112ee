//! Headers of requests for jobs: `Prefer`, `Idempotency-Key` and the trace context.

use axum::http::{HeaderMap, HeaderName, HeaderValue};
use serde_json::{Map, Value};

use crate::jobs::{IdempotencyKey, TraceContext};
use crate::telemetry::is_trace_parent;

use super::super::error::{ApiError, IDEMPOTENCY_KEY};

/// Header of an answer that names the preferences that the server followed.
pub(in super::super) const PREFERENCE_APPLIED: HeaderName =
    HeaderName::from_static("preference-applied");

/// The preference for a job, in requests and answers.
pub(super) const RESPOND_ASYNC: HeaderValue = HeaderValue::from_static("respond-async");

/// Longest idempotency key, in characters.
const MAX_KEY: usize = 255;

/// Longest `tracestate`, in characters: what the W3C wants to be kept at least.
const MAX_TRACESTATE: usize = 512;

/// Whether the client prefers a job to an answer with the images: `Prefer: respond-async`.
pub(in super::super) fn prefers_async(headers: &HeaderMap) -> bool {
    let values = headers.get_all("prefer").iter();
    let values = values.filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).any(|preference| {
        let name = preference.split([';', '=']).next().unwrap_or_default();
        name.trim().eq_ignore_ascii_case("respond-async")
    })
}

/// The idempotency key of a request with this body, if it has one.
///
/// Bodies are the same if they are equal as JSON: the order of keys and the spaces between them do not
/// count.
pub(super) fn idempotency_key(
    headers: &HeaderMap,
    body: &Map<String, Value>,
) -> Result<Option<IdempotencyKey>, ApiError> {
    let mut values = headers.get_all(IDEMPOTENCY_KEY).iter();
    let Some(value) = values.next() else {
        return Ok(None);
    };
    let refused = |message| ApiError::Header {
        name: IDEMPOTENCY_KEY,
        message,
    };
    if values.next().is_some() {
        return Err(refused("is in the request twice: send it once"));
    }
    let is_visible = |byte: &u8| byte.is_ascii_graphic() || *byte == b' ';
    let key = value.as_bytes();
    if !(1..=MAX_KEY).contains(&key.len()) || !key.iter().all(is_visible) {
        return Err(refused(
            "must have 1 to 255 visible ASCII characters, such as those of a UUID",
        ));
    }
    let mut body = Value::Object(body.clone());
    body.sort_all_objects();
    let key = String::from_utf8_lossy(key);
    Ok(Some(IdempotencyKey::new(&key, body.to_string().as_bytes())))
}

/// The W3C trace context of a request. One that is not valid is left out, as the W3C wants it.
pub(in super::super) fn trace_context(headers: &HeaderMap) -> Option<TraceContext> {
    let mut parents = headers.get_all("traceparent").iter();
    let traceparent = parents.next()?.to_str().ok()?;
    if parents.next().is_some() || !is_trace_parent(traceparent) {
        return None;
    }
    let states = headers.get_all("tracestate").iter();
    let states: Option<Vec<&str>> = states.map(|state| state.to_str().ok()).collect();
    let state = states.unwrap_or_default().join(",");
    let is_usable = !state.trim().is_empty() && state.len() <= MAX_TRACESTATE;
    Some(TraceContext {
        traceparent: traceparent.to_owned(),
        tracestate: is_usable.then_some(state),
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.append(*name, HeaderValue::from_bytes(value.as_bytes()).unwrap());
        }
        headers
    }

    #[test]
    fn a_preference_may_stand_among_others() {
        for value in [
            "respond-async",
            "Respond-Async",
            "wait=10, respond-async",
            "respond-async; a=b,return=minimal",
            "respond-async=\"\"",
            " respond-async ,",
        ] {
            assert!(prefers_async(&headers(&[("prefer", value)])), "{value}");
        }
        assert!(prefers_async(&headers(&[
            ("prefer", "wait=3"),
            ("prefer", "respond-async")
        ])));
        for value in [
            "",
            "wait=3",
            "respond-sync",
            "x=respond-async",
            "respond async",
            "é",
        ] {
            assert!(!prefers_async(&headers(&[("prefer", value)])), "{value}");
        }
    }

    fn key(value: &str, body: &Value) -> Result<Option<IdempotencyKey>, ApiError> {
        let headers = headers(&[("idempotency-key", value)]);
        idempotency_key(&headers, body.as_object().unwrap())
    }

    #[test]
    fn a_key_is_visible_text_of_some_length() {
        let body = json!({});
        assert_eq!(
            idempotency_key(&HeaderMap::new(), &Map::new()).unwrap(),
            None
        );
        for value in [
            "a",
            "a b",
            "\"8e03978e-40d5-43dd-bc93-6894a57f9324\"",
            &"x".repeat(255),
        ] {
            assert_eq!(key(value, &body).unwrap().unwrap().key, value);
        }
        for value in ["", &"x".repeat(256), "é", "a\tb"] {
            assert!(key(value, &body).is_err(), "{value:?}");
        }
        let twice = headers(&[("idempotency-key", "a"), ("idempotency-key", "a")]);
        assert!(idempotency_key(&twice, &Map::new()).is_err());
    }

    #[test]
    fn bodies_are_compared_as_json() {
        let hash = |text: &str| {
            let body: Value = serde_json::from_str(text).unwrap();
            key("k", &body).unwrap().unwrap().body
        };
        let body = hash(
            r#"{"prompt":"a","loras":[{"name":"x","scale":0.5}],"seed":18446744073709551615}"#,
        );
        let same = r#" { "seed" : 18446744073709551615, "loras": [ {"scale": 0.5, "name": "x"} ], "prompt": "\u0061" } "#;
        assert_eq!(hash(same), body);
        for other in [
            r#"{"prompt":"a","loras":[{"name":"x","scale":0.5}],"seed":18446744073709551614}"#,
            r#"{"prompt":"a","loras":[{"name":"x","scale":0.5}]}"#,
            r#"{"prompt":"a ","loras":[{"name":"x","scale":0.5}],"seed":18446744073709551615}"#,
        ] {
            assert_ne!(hash(other), body, "{other}");
        }
        // The order of a list counts.
        assert_ne!(hash(r#"{"a":[1,2]}"#), hash(r#"{"a":[2,1]}"#));
    }

    const PARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    #[test]
    fn a_trace_context_is_kept_if_it_is_valid() {
        let trace = trace_context(&headers(&[("traceparent", PARENT)])).unwrap();
        assert_eq!(
            (trace.traceparent.as_str(), trace.tracestate),
            (PARENT, None)
        );
        let trace = trace_context(&headers(&[
            ("traceparent", PARENT),
            ("tracestate", "a=1"),
            ("tracestate", "b=2"),
        ]));
        assert_eq!(trace.unwrap().tracestate.as_deref(), Some("a=1,b=2"));
        let long = "x".repeat(513);
        let trace = trace_context(&headers(&[("traceparent", PARENT), ("tracestate", &long)]));
        assert_eq!(trace.unwrap().tracestate, None);
        let later = PARENT.replacen("00", "01", 1) + "-more";
        assert!(trace_context(&headers(&[("traceparent", &later)])).is_some());
    }

    #[test]
    fn a_trace_context_that_is_not_valid_is_left_out() {
        for parent in [
            "",
            "00",
            "garbage",
            &PARENT.to_uppercase(),
            &PARENT.replacen("00", "ff", 1),
            &PARENT.replace("b7ad6b7169203331", "0000000000000000"),
            &PARENT.replace("0af7651916cd43dd8448eb211c80319c", &"0".repeat(32)),
            &PARENT.replace("-01", "-1"),
            &format!("{PARENT}-more"),
            &format!(" {PARENT}x"),
            "é",
        ] {
            assert_eq!(
                trace_context(&headers(&[("traceparent", parent)])),
                None,
                "{parent}"
            );
        }
        let twice = headers(&[("traceparent", PARENT), ("traceparent", PARENT)]);
        assert_eq!(trace_context(&twice), None);
        assert_eq!(trace_context(&headers(&[("tracestate", "a=1")])), None);
    }
}
