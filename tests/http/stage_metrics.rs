//! What the load generators of vLLM-Omni, `SGLang` and `vllm bench serve --omni` read in a response, and
//! `return_stage_metrics`, which the last one sends.

use std::path::Path;

use serde_json::{Value, json};

use super::client::{Reply, post, post_to};
use super::pipeline::Pace;
use super::real_model::{Server, model};
use super::server::TestServer;
use super::streams::{chunks, events};
use super::{parts, user};

/// Every stage in the order of `timings`, and its name in `stage_durations`.
const STAGES: [(&str, &str); 6] = [
    ("queue", "queue"),
    ("encode", "QwenImagePipeline.text_encoder.forward"),
    ("denoise", "QwenImagePipeline.diffuse"),
    ("previews", "previews"),
    ("decode", "QwenImagePipeline.vae.decode"),
    ("paused", "paused"),
];

fn chat(extra: &Value) -> Value {
    with(json!({"messages": user(&json!("a cat"))}), extra)
}

fn image(extra: &Value) -> Value {
    with(json!({"prompt": "a cat"}), extra)
}

fn with(mut body: Value, extra: &Value) -> Value {
    let extra = extra.as_object().unwrap().clone();
    body.as_object_mut().unwrap().extend(extra);
    body
}

fn generate(server: &TestServer, body: &Value) -> Reply {
    post_to(server.address, "/v1/images/generations", body)
}

/// Checks that `place` has the seconds of `timings` under the names of the profiler.
fn assert_durations(place: &Value, timings: &Value) {
    let durations = place["stage_durations"].as_object().unwrap();
    assert_eq!(durations.len(), STAGES.len());
    for (stage, name) in STAGES {
        let seconds = durations[name].as_f64().unwrap();
        assert_eq!(Some(seconds), timings[stage].as_f64(), "{name}");
    }
}

#[test]
fn stage_durations_are_seconds_and_in_every_response() {
    let server = TestServer::start(Pace::Slow, 4);
    let steps = json!({"num_inference_steps": 5, "n": 2});
    let reply = post(server.address, &chat(&steps));
    let timings = &reply.body["timings"];
    assert_durations(&reply.body, timings);
    // A step takes 10 ms.
    let denoise = timings["denoise"].as_f64().unwrap();
    assert!((0.05..30.0).contains(&denoise), "{denoise} s");
    assert_eq!(parts(&reply).len(), 2);
    for part in parts(&reply) {
        assert_durations(part, timings);
    }

    let reply = generate(&server, &image(&steps));
    assert_eq!(reply.status, 200, "{}", reply.body);
    assert_durations(&reply.body, &reply.body["timings"]);
    // Nobody asked for it.
    assert!(reply.body["metrics"].is_null());
}

#[test]
fn return_stage_metrics_adds_the_metrics_of_the_stage() {
    let server = TestServer::start(Pace::Slow, 4);
    let asked = json!({"return_stage_metrics": true});
    let extra = json!({"num_inference_steps": 4, "n": 2, "size": "64x32"});
    let flat = with(extra.clone(), &asked);
    let nested = with(extra.clone(), &json!({"extra_body": asked}));
    for extra in [flat, nested] {
        let replies = [
            post(server.address, &chat(&extra)),
            generate(&server, &image(&extra)),
        ];
        for reply in replies {
            assert_eq!(reply.status, 200, "{}", reply.body);
            let (metrics, timings) = (&reply.body["metrics"], &reply.body["timings"]);
            assert_durations(metrics, timings);
            assert_eq!(metrics["stage_id"], 0);
            assert_eq!(metrics["final_output_type"], "image");
            let stage = &metrics["stage_metrics"]["0"];
            assert_eq!(stage["stage_id"], 0);
            assert_eq!(stage["stage_name"], "diffusion");
            assert_eq!(stage["final_output_type"], "image");
            assert_eq!(stage["output_unit_type"], "image");
            assert_eq!(stage["output_unit_count"], 2);
            assert_eq!(stage["image_pixels"], 2 * 64 * 32);
            // The times of the stage are in milliseconds.
            let denoise = timings["denoise"].as_f64().unwrap() * 1e3;
            let step = stage["denoise_step_latency_ms"].as_f64().unwrap();
            assert!((step * 4.0 - denoise).abs() < 1e-6, "{step} ms a step");
            let all = stage["stage_gen_time_ms"].as_f64().unwrap();
            assert!(all >= denoise, "{all} ms in all, {denoise} for the steps");
        }
    }
}

/// The replies of every API to `return_stage_metrics` with this value, and where it was given.
fn replies_to(server: &TestServer, value: &Value) -> Vec<(Value, Reply)> {
    let places = [
        json!({"return_stage_metrics": value}),
        json!({"extra_body": {"return_stage_metrics": value}}),
    ];
    let replies = places.into_iter().flat_map(|place| {
        [
            (place.clone(), post(server.address, &chat(&place))),
            (place.clone(), generate(server, &image(&place))),
        ]
    });
    replies.collect()
}

#[test]
fn metrics_are_absent_unless_they_are_asked_for() {
    let server = TestServer::start(Pace::Fast, 4);
    for value in [json!(false), json!(null)] {
        for (place, reply) in replies_to(&server, &value) {
            assert_eq!(reply.status, 200, "{}", reply.body);
            assert!(reply.body.get("metrics").is_none(), "{place}");
            assert!(reply.body["stage_durations"].is_object(), "{place}");
        }
    }
    let body = image(&json!({"return_stage_metrics": true}));
    let reply = post_to(server.address, "/v1/images/estimate", &body);
    assert_eq!(reply.status, 200, "{}", reply.body);
}

#[test]
fn return_stage_metrics_is_true_or_false() {
    let server = TestServer::start(Pace::Fast, 4);
    for value in [json!("true"), json!(1), json!([true]), json!({})] {
        for (place, reply) in replies_to(&server, &value) {
            assert_eq!(reply.status, 400, "accepted {place}");
            assert_eq!(reply.body["error"]["param"], "return_stage_metrics");
        }
    }
    let contradiction =
        json!({"return_stage_metrics": true, "extra_body": {"return_stage_metrics": false}});
    let reply = generate(&server, &image(&contradiction));
    assert_eq!(reply.status, 400, "{}", reply.body);
}

#[test]
fn streams_have_them_beside_the_images() {
    let server = TestServer::start(Pace::Fast, 4);
    let extra = json!({"stream": true, "num_inference_steps": 3, "return_stage_metrics": true});
    let chunks = chunks(&post(server.address, &chat(&extra)));
    let (last, others) = chunks.split_last().unwrap();
    assert_durations(last, &last["timings"]);
    assert_durations(&last["metrics"], &last["timings"]);
    assert!(
        others
            .iter()
            .all(|chunk| chunk["stage_durations"].is_null())
    );

    let body = image(&with(extra, &json!({"n": 2, "partial_images": 1})));
    let events = events(&generate(&server, &body));
    let mut completed = 0;
    for (name, data) in events {
        let data: Value = serde_json::from_str(&data).unwrap();
        if name.as_deref() == Some("image_generation.completed") {
            assert_durations(&data, &data["timings"]);
            assert_eq!(
                data["metrics"]["stage_metrics"]["0"]["output_unit_count"],
                2
            );
            completed += 1;
        } else {
            assert!(data["stage_durations"].is_null());
        }
    }
    assert_eq!(completed, 2);
}

/// vLLM-Omni's load generator compares the value with 0, and fails on null.
#[test]
fn the_peak_is_absent_where_the_backend_does_not_count_memory() {
    let server = TestServer::start(Pace::Fast, 4);
    let asked = json!({"return_stage_metrics": true});
    let reply = post(server.address, &chat(&asked));
    let part = &parts(&reply)[0];
    for place in [&reply.body, part, &reply.body["metrics"]] {
        assert!(place.get("peak_memory_mb").is_none(), "{place}");
    }
    let body = generate(&server, &image(&asked)).body;
    for place in [&body, &body["usage"], &body["metrics"]] {
        assert!(place.is_object());
        assert!(place.get("peak_memory_mb").is_none(), "{place}");
    }
}

/// On a CPU the device's memory is that of the process.
#[cfg(target_os = "linux")]
#[test]
fn the_peak_is_that_of_the_process_in_mebibytes() {
    let server = Server::start_with(Some(&model()), &[]);
    let extra = json!({"num_inference_steps": 1, "size": "32x32", "return_stage_metrics": true});
    let reply = post(server.address, &chat(&extra));
    let chat_peaks = [
        &reply.body["peak_memory_mb"],
        &parts(&reply)[0]["peak_memory_mb"],
        &reply.body["metrics"]["peak_memory_mb"],
    ]
    .map(|peak| peak.as_f64().unwrap());
    let body = post_to(server.address, "/v1/images/generations", &image(&extra)).body;
    let image_peaks = [
        &body["peak_memory_mb"],
        &body["usage"]["peak_memory_mb"],
        &body["metrics"]["peak_memory_mb"],
    ]
    .map(|peak| peak.as_f64().unwrap());

    let status = Path::new("/proc").join(server.process.id().to_string());
    let status = std::fs::read_to_string(status.join("status")).unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kibibytes: f64 = peak
        .unwrap()
        .trim()
        .strip_suffix(" kB")
        .unwrap()
        .parse()
        .unwrap();
    for peaks in [chat_peaks, image_peaks] {
        assert!(peaks.iter().all(|peak| *peak == peaks[0]), "{peaks:?}");
        // Linux's counters are off by some pages per thread, and the answer takes memory itself.
        let (low, high) = (kibibytes / 1024.0 - 32.0, kibibytes / 1024.0 + 8.0);
        assert!(
            (low..high).contains(&peaks[0]),
            "{peaks:?}, {low} to {high}"
        );
    }
}
