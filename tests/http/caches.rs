//! Step caches and the guidance gate: requests, defaults, answers, streams, metadata and metrics.

use kiln::request::{CacheChoice, StepCaches};
use kiln::server::Settings;
use kiln_models::step_cache::{CachePolicy, DbCache, MaskPolicy, QWEN_IMAGE_RATIOS};
use serde_json::{Value, json};

use super::client::{Reply, get, post, post_to};
use super::server::TestServer;
use super::{from_base64, metadata, user};

const IMAGES: &str = "/v1/images/generations";
const CHAT: &str = "/v1/chat/completions";

/// A server for a model with the ratios of Qwen-Image, and this default.
fn start(default: CacheChoice) -> TestServer {
    let caches = StepCaches {
        default,
        mag_ratios: Some(QWEN_IMAGE_RATIOS.into()),
        blocks: Some(60),
    };
    TestServer::with_caches(Settings::new("test/model"), caches)
}

fn choice(cache: &Value) -> CacheChoice {
    CacheChoice::from_json(cache).unwrap().unwrap()
}

/// A request to an endpoint with these keys, beside or inside `extra_body`.
fn generate(server: &TestServer, path: &str, keys: &Value, nested: bool) -> Reply {
    let mut body = match path {
        CHAT => json!({"messages": user(&json!("a cat"))}),
        _ => json!({"prompt": "a cat"}),
    };
    if nested {
        body["extra_body"] = keys.clone();
    } else {
        let keys = keys.as_object().unwrap().clone();
        body.as_object_mut().unwrap().extend(keys);
    }
    post_to(server.address, path, &body)
}

/// The steps of a mask that are computed.
fn computed(policy: &CachePolicy) -> usize {
    match policy {
        CachePolicy::Mask(mask) => mask.iter().filter(|&&computed| computed).count(),
        other => panic!("no mask: {other:?}"),
    }
}

/// The step events of a stream.
fn steps_of(reply: &Reply) -> Vec<Value> {
    let text = String::from_utf8(reply.bytes.clone()).unwrap();
    let data = text.lines().filter_map(|line| line.strip_prefix("data: "));
    data.filter_map(|data| serde_json::from_str::<Value>(data).ok())
        .map(|chunk| chunk["progress"].clone())
        .filter(|progress| progress["stage"] == "step")
        .collect()
}

fn metric(server: &TestServer, name: &str) -> u64 {
    let text = String::from_utf8(get(server.address, "/metrics").bytes).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    let value = line.unwrap_or_else(|| panic!("no {name} in {text}"));
    value.trim().parse().unwrap()
}

#[test]
fn every_api_takes_every_cache() {
    let server = start(CacheChoice::Off);
    let db_cache = |change: fn(&mut DbCache)| {
        let mut settings = DbCache::default();
        change(&mut settings);
        CachePolicy::DbCache(settings)
    };
    let bins = |settings: &mut DbCache| {
        settings.steps_mask = Some([true, true, true, true, true, true, false, true].into());
        settings.steps_mask_policy = MaskPolicy::Static;
    };
    let policies = [
        (json!({"cache": "off"}), CachePolicy::Off),
        (json!({"cache": null}), CachePolicy::Off),
        (json!({"cache": ""}), CachePolicy::Off),
        (json!({"enable_cache_dit": false}), CachePolicy::Off),
        (json!({"cache": "dbcache"}), db_cache(|_| ())),
        (json!({"cache": {"mode": "dbcache"}}), db_cache(|_| ())),
        (json!({"enable_cache_dit": true}), db_cache(|_| ())),
        (
            json!({"cache": {"mode": "dbcache", "max_continuous_cached_steps": -1}}),
            db_cache(|settings| settings.max_continuous_cached_steps = None),
        ),
        (
            json!({"enable_cache_dit": true, "cache_dit_params": {"Fn_compute_blocks": 8}}),
            db_cache(|settings| settings.fn_compute_blocks = 8),
        ),
        (
            json!({"cache_dit_params": {"enable_taylorseer": true, "max_warmup_steps": 2}}),
            db_cache(|settings| {
                settings.taylorseer_order = 1;
                settings.max_warmup_steps = 2;
            }),
        ),
        (
            json!({
                "num_inference_steps": 8,
                "cache_dit_params": {
                    "scm_compute_bins": [6, 1], "scm_cache_bins": [1], "scm_policy": "static",
                },
            }),
            db_cache(bins),
        ),
    ];
    for path in [CHAT, IMAGES] {
        for nested in [false, true] {
            for (keys, policy) in &policies {
                let reply = generate(&server, path, keys, nested);
                assert_eq!(reply.status, 200, "{keys}: {}", reply.body);
                assert_eq!(&server.last_job().cache, policy, "{keys}");
            }
            for (keys, steps) in [
                (json!({"cache": "balanced"}), 30),
                (json!({"cache": "fast"}), 24),
                (
                    json!({"cache": {"mode": "magcache", "mag_threshold": 0.15,
                    "mag_max_skip_steps": 3, "mag_retention_ratio": 0.2}}),
                    27,
                ),
                (json!({"cache": "fast", "extra_body": null}), 24),
            ] {
                let reply = generate(
                    &server,
                    path,
                    &keys,
                    nested && keys.get("extra_body").is_none(),
                );
                assert_eq!(reply.status, 200, "{keys}: {}", reply.body);
                assert_eq!(computed(&server.last_job().cache), steps, "{keys}");
                assert_eq!(reply.body["computed_steps"], steps, "{keys}");
                assert_eq!(reply.body["skipped_steps"], 50 - steps, "{keys}");
            }
            for (gate, expected) in [
                (json!(0.5), Some(0.5)),
                (json!(0), Some(0.0)),
                (json!(1), None),
            ] {
                generate(&server, path, &json!({"cfg_gate_step": gate}), nested);
                assert_eq!(server.last_job().cfg_gate_step, expected, "{gate}");
            }
        }
    }
    // A value may be given twice, if it is the same.
    let body = json!({
        "prompt": "a cat", "cache": {"mode": "dbcache"}, "extra_body": {"cache": {"mode": "dbcache"}},
    });
    assert_eq!(post_to(server.address, IMAGES, &body).status, 200);
}

/// Checks that every endpoint refuses these keys, and names the parameter and says this.
fn assert_refused(cases: &[(Value, &str, &str)]) {
    let server = start(CacheChoice::Off);
    for path in [CHAT, IMAGES, "/v1/images/estimate"] {
        for (keys, param, message) in cases {
            for nested in [false, true] {
                let reply = generate(&server, path, keys, nested);
                assert_eq!(reply.status, 400, "accepted {keys}");
                let error = &reply.body["error"];
                let named = error["param"].as_str().unwrap();
                let named = named.strip_prefix("extra_body.").unwrap_or(named);
                assert_eq!(named, *param, "{keys}");
                let text = error["message"].as_str().unwrap();
                assert!(text.contains(message), "{text}");
            }
        }
    }
}

#[test]
fn what_is_no_cache_is_refused_with_its_name() {
    assert_refused(&[
        (json!({"cache": "slow"}), "cache", "balanced, fast, auto"),
        (json!({"cache": true}), "cache", "got true"),
        (json!({"cache": ["fast"]}), "cache", "got a list"),
        (json!({"cache": {}}), "cache.mode", "dbcache or magcache"),
        (
            json!({"cache": {"mode": "easycache"}}),
            "cache.mode",
            "dbcache, magcache",
        ),
        (
            json!({"cache": {"mode": "dbcache", "mag_threshold": 1}}),
            "cache.mag_threshold",
            "known are mode, Fn_compute_blocks",
        ),
        (
            json!({"cache": {"mode": "dbcache", "Fn_compute_blocks": 61}}),
            "cache",
            "at most 60",
        ),
        (
            json!({"cache": {"mode": "magcache", "mag_ratios": [1, -1]}}),
            "cache.mag_ratios",
            "above 0",
        ),
        (
            json!({"enable_cache_dit": true, "cache_dit_params": {"threshold": 0.1}}),
            "cache_dit_params.threshold",
            "unknown parameter",
        ),
        (
            json!({"enable_cache_dit": false, "cache_dit_params": {"threshold": 0.1}}),
            "cache_dit_params.threshold",
            "known are Fn_compute_blocks",
        ),
        (
            json!({"enable_cache_dit": "yes"}),
            "enable_cache_dit",
            "boolean",
        ),
        (
            json!({"cache_dit_params": 4}),
            "cache_dit_params",
            "must be an object",
        ),
        (
            json!({"cache_dit_params": {"Bn_compute_blocks": 60}}),
            "cache_dit_params",
            "at most 60",
        ),
    ]);
}

#[test]
fn contradictions_and_few_steps_are_refused() {
    assert_refused(&[
        (
            json!({"cache": "fast", "enable_cache_dit": true}),
            "cache",
            "enable_cache_dit",
        ),
        (
            json!({"cache": "off", "enable_cache_dit": false}),
            "cache",
            "give only one of them",
        ),
        (
            json!({"cache": "fast", "cache_dit_params": {}}),
            "cache",
            "cache_dit_params",
        ),
        (
            json!({"cfg_gate_step": -0.1}),
            "cfg_gate_step",
            "from 0 to 1",
        ),
        (json!({"cfg_gate_step": 1.5}), "cfg_gate_step", "got 1.5"),
        (json!({"cfg_gate_step": "half"}), "cfg_gate_step", "f64"),
        (
            json!({"enable_teacache": true}),
            "enable_teacache",
            "use cache",
        ),
        (
            json!({"cache": "fast", "num_inference_steps": 7}),
            "cache",
            "cache needs at least 8 steps, got 7: ask for more steps, or leave cache out",
        ),
        (
            json!({"cache": {"mode": "dbcache"}, "num_inference_steps": 4}),
            "cache",
            "got 4",
        ),
        (
            json!({"enable_cache_dit": true, "num_inference_steps": 4}),
            "enable_cache_dit",
            "leave enable_cache_dit out",
        ),
        (
            json!({"cfg_gate_step": 0.5, "num_inference_steps": 4}),
            "cfg_gate_step",
            "cfg_gate_step needs at least 8 steps, got 4",
        ),
    ]);
    let server = start(CacheChoice::Off);
    let twice = json!({"cache": "fast", "extra_body": {"cache": "balanced"}});
    for path in [CHAT, IMAGES] {
        let reply = generate(&server, path, &twice, false);
        assert_eq!(reply.body["error"]["param"], "cache");
    }
    // What asks for nothing is accepted with few steps.
    for keys in [
        json!({"cache": "off", "num_inference_steps": 4}),
        json!({"cache": "auto", "num_inference_steps": 4}),
        json!({"enable_cache_dit": false, "num_inference_steps": 4}),
        json!({"cfg_gate_step": 1, "num_inference_steps": 4}),
        json!({"enable_teacache": false, "num_inference_steps": 4}),
    ] {
        assert_eq!(
            generate(&server, IMAGES, &keys, false).status,
            200,
            "{keys}"
        );
    }
}

#[test]
fn the_answer_and_the_file_say_what_was_left_out() {
    let server = start(CacheChoice::Off);
    let keys = json!({"cache": "balanced", "cfg_gate_step": 0.5, "negative_prompt": " "});
    let facts = |body: &Value| {
        let names = [
            "cache",
            "cfg_gate_step",
            "computed_steps",
            "skipped_steps",
            "gated_steps",
        ];
        names.map(|name| body[name].clone())
    };
    let expected = [
        json!("balanced"),
        json!(0.5),
        json!(30),
        json!(20),
        json!(25),
    ];
    let reply = generate(&server, IMAGES, &keys, false);
    assert_eq!(facts(&reply.body), expected);
    let file = from_base64(reply.body["data"][0]["b64_json"].as_str().unwrap());
    let text = metadata(&file).unwrap();
    assert!(
        text.contains(", Cache: balanced 30/50, CFG gate: 0.5, Version"),
        "{text}"
    );
    let reply = generate(&server, CHAT, &keys, true);
    assert_eq!(facts(&reply.body), expected);

    // Without guidance there is nothing to gate, and without a cache nothing to name.
    let reply = generate(&server, IMAGES, &json!({"cfg_gate_step": 0.5}), false);
    let none = [Value::Null, json!(0.5), json!(50), json!(0), json!(0)];
    assert_eq!(facts(&reply.body), none);
    let file = from_base64(reply.body["data"][0]["b64_json"].as_str().unwrap());
    let text = metadata(&file).unwrap();
    assert!(!text.contains("Cache") && !text.contains("gate"), "{text}");
    let reply = generate(&server, IMAGES, &json!({"num_inference_steps": 3}), false);
    let none = [Value::Null, Value::Null, json!(3), json!(0), json!(0)];
    assert_eq!(facts(&reply.body), none);

    // The settings in the file make the same request.
    let keys = json!({"cache": {"mode": "dbcache", "max_warmup_steps": 9, "scm_preset": "slow"}});
    let reply = generate(&server, IMAGES, &keys, false);
    let job = server.last_job();
    let file = from_base64(reply.body["data"][0]["b64_json"].as_str().unwrap());
    let text = metadata(&file).unwrap();
    assert!(
        text.contains(", Cache: dbcache 50/50, Cache settings: \""),
        "{text}"
    );
    let (_, quoted) = text.split_once("Cache settings: ").unwrap();
    let settings: String = serde_json::Deserializer::from_str(quoted)
        .into_iter()
        .next()
        .unwrap()
        .unwrap();
    let mut cache: Value = serde_json::from_str(&settings).unwrap();
    cache["mode"] = json!("dbcache");
    generate(&server, IMAGES, &json!({"cache": cache}), false);
    assert_eq!(server.last_job().cache, job.cache);
}

#[test]
fn a_stream_counts_the_steps_as_they_are_made() {
    let server = start(CacheChoice::Off);
    let body = json!({
        "messages": user(&json!("a cat")), "stream": true, "cache": "fast", "negative_prompt": "",
        "cfg_gate_step": 0.9,
    });
    let reply = post(server.address, &body);
    let CachePolicy::Mask(mask) = server.last_job().cache else {
        panic!("no mask")
    };
    let steps = steps_of(&reply);
    assert_eq!(steps.len(), 50);
    for (index, step) in steps.iter().enumerate() {
        let done = index + 1;
        let computed = mask[..done].iter().filter(|&&computed| computed).count();
        assert_eq!(step["step"], done);
        assert_eq!(step["computed_steps"], computed);
        assert_eq!(step["skipped_steps"], done - computed);
        assert_eq!(step["gated_steps"], done.saturating_sub(45));
    }
    let text = String::from_utf8(reply.bytes).unwrap();
    assert!(
        text.contains("\"computed_steps\":24,\"skipped_steps\":26"),
        "{text}"
    );

    let body = json!({"prompt": "a cat", "stream": true, "cache": "fast"});
    let reply = post_to(server.address, IMAGES, &body);
    let text = String::from_utf8(reply.bytes).unwrap();
    assert!(
        text.contains("\"computed_steps\":24,\"skipped_steps\":26"),
        "{text}"
    );
}

#[test]
fn a_default_holds_until_a_request_says_otherwise() {
    let server = start(CacheChoice::Balanced);
    let status = get(server.address, "/v1/status").body;
    assert_eq!(status["defaults"]["cache"], "balanced");
    for path in [CHAT, IMAGES] {
        let cache = |keys: Value| {
            let reply = generate(&server, path, &keys, false);
            assert_eq!(reply.status, 200, "{}", reply.body);
            (server.last_job().cache, reply.body["cache"].clone())
        };
        let (policy, name) = cache(json!({}));
        assert_eq!((computed(&policy), name), (30, json!("balanced")));
        let (policy, name) = cache(json!({"cache": "fast"}));
        assert_eq!((computed(&policy), name), (24, json!("fast")));
        let off = (CachePolicy::Off, Value::Null);
        assert_eq!(cache(json!({"cache": "off"})), off);
        assert_eq!(cache(json!({"enable_cache_dit": false})), off);
        assert_eq!(cache(json!({"num_inference_steps": 7})), off);
        // An idle server leaves no step out.
        assert_eq!(cache(json!({"cache": "auto"})), off);
        let (policy, _) = cache(json!({"num_inference_steps": 8}));
        assert!(matches!(policy, CachePolicy::Mask(_)));
    }
    let settings = json!({"mode": "dbcache", "Fn_compute_blocks": 8});
    let server = start(choice(&settings));
    let default = get(server.address, "/v1/status").body["defaults"]["cache"].clone();
    assert_eq!(choice(&default), choice(&settings), "{default}");
}

/// The web UI has no such field, so its clients only get the default.
#[test]
fn the_default_holds_for_the_web_uis_api() {
    let settings = Settings {
        sdapi: true,
        ..Settings::new("test/model")
    };
    let caches = StepCaches {
        default: CacheChoice::Fast,
        mag_ratios: Some(QWEN_IMAGE_RATIOS.into()),
        blocks: None,
    };
    let server = TestServer::with_caches(settings, caches);
    let path = "/sdapi/v1/txt2img";
    let reply = post_to(server.address, path, &json!({"prompt": "a cat"}));
    assert_eq!(reply.status, 200, "{}", reply.body);
    assert_eq!(computed(&server.last_job().cache), 24);
    assert!(
        reply.body["info"]
            .as_str()
            .unwrap()
            .contains("Cache: fast 24/50")
    );
    let reply = post_to(
        server.address,
        path,
        &json!({"prompt": "a cat", "cache": "off"}),
    );
    assert_eq!(reply.status, 400);
}

#[test]
fn the_metrics_count_computed_skipped_and_gated_steps() {
    let server = start(CacheChoice::Off);
    let keys = json!({"cache": "fast", "cfg_gate_step": 0.5, "negative_prompt": ""});
    assert_eq!(generate(&server, IMAGES, &keys, false).status, 200);
    let few = json!({"num_inference_steps": 3});
    assert_eq!(generate(&server, CHAT, &few, false).status, 200);
    for (name, steps) in [
        ("kiln_steps_total", 53),
        ("kiln_steps_computed_total", 27),
        ("kiln_steps_skipped_total", 26),
        ("kiln_steps_gated_total", 25),
    ] {
        assert_eq!(metric(&server, name), steps, "{name}");
    }
}

#[test]
fn the_document_has_the_fields_of_requests_and_answers() {
    let server = start(CacheChoice::Off);
    let document = get(server.address, "/openapi.json").body;
    let schemas = &document["components"]["schemas"];
    for request in [
        "ChatRequest",
        "ExtraBody",
        "ImagesRequest",
        "ImagesExtraBody",
    ] {
        let fields = &schemas[request]["properties"];
        for name in ["cache", "enable_cache_dit", "cache_dit_params"] {
            assert!(fields[name].is_object(), "{request}.{name}");
        }
        assert_eq!(fields["cfg_gate_step"]["minimum"], 0, "{request}");
        assert_eq!(fields["cfg_gate_step"]["maximum"], 1, "{request}");
    }
    let names = &schemas["CacheName"]["enum"];
    for name in ["off", "balanced", "fast", "auto", "dbcache", "magcache", ""] {
        assert!(names.as_array().unwrap().contains(&json!(name)), "{names}");
    }
    let settings = &schemas["CacheDitParams"]["properties"];
    for key in kiln::request::DBCACHE_KEYS {
        assert!(settings[key].is_object(), "{key}");
    }
    let settings = &schemas["MagCacheField"]["properties"];
    for key in kiln::request::MAGCACHE_KEYS {
        assert!(settings[key].is_object(), "{key}");
    }
}
