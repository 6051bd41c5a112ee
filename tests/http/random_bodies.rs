//! Random JSON bodies.

use proptest::prelude::*;
use serde_json::{Map, Value, json};

use super::client::post_to;
use super::pipeline::Pace;
use super::server::TestServer;

/// Keys of all endpoints, so that most bodies pass the first checks.
const KEYS: &[&str] = &[
    "messages",
    "prompt",
    "model",
    "n",
    "size",
    "height",
    "width",
    "seed",
    "stream",
    "num_inference_steps",
    "true_cfg_scale",
    "cfg_scale",
    "negative_prompt",
    "num_outputs_per_prompt",
    "extra_body",
    "output_format",
    "output_compression",
    "response_format",
    "quality",
    "partial_images",
    "preview_every",
    "generator_device",
    "stream_options",
    "user",
    "temperature",
    "cache",
    "cfg_gate_step",
    "enable_cache_dit",
    "cache_dit_params",
    "mode",
    "Fn_compute_blocks",
    "max_cached_steps",
    "scm_preset",
    "scm_compute_bins",
    "scm_cache_bins",
    "steps_computation_mask",
    "mag_ratios",
    "mag_threshold",
    "lora",
    "loras",
    "name",
    "lora_path",
    "scale",
];

fn scalar() -> impl Strategy<Value = Value> {
    const WORDS: &[&str] = &[
        "",
        "a cat",
        "auto",
        "64x64",
        "0x0",
        "16X32",
        "png",
        "webp",
        "file",
        "url",
        "b64_json",
        "low",
        "cuda",
        "user",
        "text",
        "雪\u{0}\u{fffd}",
        "balanced",
        "dbcache",
        "magcache",
        "fast",
        "1,2,3",
    ];
    prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        (-3i64..70).prop_map(Value::from),
        proptest::sample::select(WORDS).prop_map(Value::from),
        any::<String>().prop_map(Value::from),
    ]
}

fn value() -> impl Strategy<Value = Value> {
    let message = (scalar(), scalar()).prop_map(|(role, content)| {
        json!([{"role": "user", "content": "x"}, {"role": role, "content": content}])
    });
    let leaf = prop_oneof![4 => scalar(), 1 => message];
    leaf.prop_recursive(3, 24, 6, |inner| {
        let key = prop_oneof![
            proptest::sample::select(KEYS).prop_map(str::to_owned),
            any::<String>(),
        ];
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::vec((key, inner), 0..6)
                .prop_map(|entries| Value::Object(entries.into_iter().collect())),
        ]
    })
}

/// A valid body with random values under some keys.
fn body() -> impl Strategy<Value = Value> {
    let key = proptest::sample::select(KEYS).prop_map(str::to_owned);
    let entries = prop::collection::vec((key, value()), 0..4);
    let changed = (any::<bool>(), entries).prop_map(|(is_chat, entries)| {
        let mut body = Map::new();
        if is_chat {
            body.insert(
                "messages".to_owned(),
                json!([{"role": "user", "content": "x"}]),
            );
        } else {
            body.insert("prompt".to_owned(), json!("a cat"));
        }
        body.extend(entries);
        Value::Object(body)
    });
    prop_oneof![3 => changed, 1 => value()]
}

#[test]
fn any_json_is_accepted_or_refused_with_the_error_body() {
    let server = TestServer::start(Pace::Fast, 4);
    proptest!(ProptestConfig::with_cases(400), |(body in body())| {
        for path in ["/v1/chat/completions", "/v1/images/generations"] {
            let reply = post_to(server.address, path, &body);
            if reply.status == 200 {
                prop_assert!(!reply.bytes.is_empty());
                continue;
            }
            prop_assert!((400..500).contains(&reply.status), "{} for {body}", reply.status);
            let error = &reply.body["error"];
            prop_assert!(error["message"].is_string(), "{}", reply.body);
            prop_assert_eq!(&error["code"], &json!(reply.status));
        }
    });
}
