//! Random requests to all routes of jobs.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::{PATH, Site, small};

/// What stands in a place of a path or query: valid words, and others.
fn word() -> impl Strategy<Value = String> {
    const WORDS: &[&str] = &[
        "",
        "0",
        "1",
        "-1",
        "0.01",
        "nan",
        "queued",
        "failed",
        "job-00c0ffee00c0ffee00c0ffee",
        "%FF",
        "%00",
        "..",
        "a%2Fb",
        "=",
        "&",
        "null",
        "[]",
        "cancel",
        "content",
    ];
    // What a client may write in a URL.
    let random = "[a-zA-Z0-9._~!$'()*,;:@%=&/+-]{0,12}";
    prop_oneof![
        3 => proptest::sample::select(WORDS).prop_map(str::to_owned),
        1 => random.prop_map(|text: String| text),
    ]
}

fn query() -> impl Strategy<Value = String> {
    const NAMES: &[&str] = &["limit", "after", "status", "wait", "index", "x"];
    let pair = (proptest::sample::select(NAMES), word());
    let pairs = prop::collection::vec(
        pair.prop_map(|(name, value)| format!("{name}={value}")),
        0..3,
    );
    pairs.prop_map(|pairs| pairs.join("&"))
}

fn headers() -> impl Strategy<Value = String> {
    const NAMES: &[&str] = &[
        "Accept",
        "Prefer",
        "Idempotency-Key",
        "If-None-Match",
        "Range",
        "Traceparent",
        "Tracestate",
    ];
    const VALUES: &[&str] = &[
        "",
        "*",
        "respond-async",
        "a",
        ",;=\"",
        "bytes=0-1",
        "é",
        "00-0-0-0",
        "\"x\", W/\"y\"",
    ];
    let line = (
        proptest::sample::select(NAMES),
        proptest::sample::select(VALUES),
    );
    let lines = prop::collection::vec(
        line.prop_map(|(name, value)| format!("{name}: {value}\r\n")),
        0..3,
    );
    lines.prop_map(|lines| lines.concat())
}

fn body() -> impl Strategy<Value = Value> {
    const KEYS: &[&str] = &[
        "stream",
        "webhook",
        "seed",
        "n",
        "prompt",
        "deadline_ms",
        "loras",
        "x",
    ];
    let value = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        any::<String>().prop_map(Value::from),
        Just(json!([])),
        Just(json!({"x": [1]})),
    ];
    proptest::option::of((proptest::sample::select(KEYS), value)).prop_map(|entry| {
        let mut body = small();
        if let Some((key, value)) = entry {
            body[key] = value;
        }
        body
    })
}

#[test]
fn any_request_is_answered_without_a_failure() {
    let site = Site::start();
    let known = site.completed(&[b"file"]);
    let methods = proptest::sample::select(&["GET", "POST", "DELETE", "HEAD", "PUT"][..]);
    let place = prop_oneof![
        Just(String::new()),
        word().prop_map(|id| format!("/{id}")),
        Just(format!("/{known}")),
        word().prop_map(|id| format!("/{id}/cancel")),
        Just(format!("/{known}/content")),
        word().prop_map(move |end| format!("/{known}/{end}")),
    ];
    let requests = (methods, place, query(), headers(), body());
    proptest!(ProptestConfig::with_cases(300), |(request in requests)| {
        let (method, place, query, headers, body) = request;
        let path = format!("{PATH}{place}?{query}");
        let reply = site.ask(method, &path, &headers, Some(&body));
        prop_assert!(reply.status < 500, "{} {method} {path} {headers}", reply.status);
        let has_body = method != "HEAD";
        if reply.status >= 400 && has_body {
            prop_assert_eq!(&reply.body["error"]["code"], &json!(reply.status), "{} {}", method, path);
        }
    });
}
