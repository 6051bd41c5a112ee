//! Noise levels in requests, and the schedule, its origin and warnings in answers, streams, metadata and the
//! status.

use kiln::request::{Limits, fused_lightning};
use kiln::server::Settings;
use kiln_models::config::ConfigText;
use kiln_models::job::NoiseLevels;
use kiln_models::sampling::SchedulerConfig;
use serde_json::{Value, json};

use super::client::{Reply, get, post_to};
use super::server::TestServer;
use super::{from_base64, metadata, user};

const IMAGES: &str = "/v1/images/generations";
const CHAT: &str = "/v1/chat/completions";
const SDAPI: &str = "/sdapi/v1/txt2img";

fn scheduler(values: &Value) -> SchedulerConfig {
    let mut config = json!({
        "_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": true, "base_shift": 0.5,
        "max_shift": 0.9, "max_image_seq_len": 8192, "shift_terminal": 0.02,
    });
    let values = values.as_object().unwrap().clone();
    config.as_object_mut().unwrap().extend(values);
    SchedulerConfig::from_json(&ConfigText {
        file: "scheduler_config.json".to_owned(),
        text: config.to_string(),
    })
    .unwrap()
}

fn settings() -> Settings {
    Settings {
        sdapi: true,
        ..Settings::new("test/model")
    }
}

/// The base model.
fn start() -> TestServer {
    TestServer::with_limits(settings(), |limits: &mut Limits| {
        limits.scheduler = Some(scheduler(&json!({})));
    })
}

/// A model with Lightning fused in.
fn start_fused(settings: Settings) -> TestServer {
    TestServer::with_limits(settings, |limits: &mut Limits| {
        let ln_3 = 3_f64.ln();
        let values = json!({"base_shift": ln_3, "max_shift": ln_3, "shift_terminal": null});
        limits.scheduler = Some(scheduler(&values));
        limits.model_recipe = Some(fused_lightning("tiny-8steps"));
    })
}

/// A request with these keys; `CHAT` has them in `extra_body`.
fn generate(server: &TestServer, path: &str, keys: &Value) -> Reply {
    let mut body = json!({"prompt": "a cat"});
    if path == CHAT {
        body = json!({"messages": user(&json!("a cat")), "extra_body": keys});
    } else {
        let keys = keys.as_object().unwrap().clone();
        body.as_object_mut().unwrap().extend(keys);
    }
    post_to(server.address, path, &body)
}

fn floats(values: &Value) -> Vec<f32> {
    let values = values.as_array().unwrap().iter();
    values.map(|it| it.as_f64().unwrap() as f32).collect()
}

#[test]
fn every_api_takes_the_levels_and_answers_with_them() {
    let server = start();
    let lightning = json!({
        "origin": "request", "name": "lightning", "shift": 3.0, "terminal": null,
        "sigmas": [1.0, 0.9, 0.75, 0.5],
    });
    let sigmas = json!({
        "origin": "request", "name": null, "shift": null, "terminal": null, "sigmas": [1.0, 0.5],
    });
    let stochastic = json!({
        "origin": "request", "name": null, "shift": 1.0, "terminal": null, "stochastic": true,
        "sigmas": [1.0, 0.5],
    });
    for path in [IMAGES, CHAT, SDAPI] {
        let steps = if path == SDAPI {
            "steps"
        } else {
            "num_inference_steps"
        };
        for (keys, expected) in [
            (json!({"schedule": "lightning"}), &lightning),
            (json!({"sigmas": [1, 0.5, 0]}), &sigmas),
            (
                json!({"schedule": {"shift": 1, "stochastic": true}, steps: 2}),
                &stochastic,
            ),
        ] {
            let reply = generate(&server, path, &keys);
            assert_eq!(reply.status, 200, "{path} {keys}: {}", reply.body);
            let facts = match path {
                SDAPI => serde_json::from_str(reply.body["info"].as_str().unwrap()).unwrap(),
                _ => reply.body.clone(),
            };
            assert_eq!(facts["schedule"], *expected, "{path} {keys}");
            assert!(facts["warnings"].is_null() && facts["adapters"].is_null());
            let job = server.last_job().sampling;
            assert_eq!(job.steps, floats(&expected["sigmas"]).len());
            assert_eq!(job.stochastic == Some(true), expected["stochastic"] == true);
        }
    }
    let reply = generate(&server, IMAGES, &json!({"schedule": "dmd2-3step"}));
    assert_eq!(reply.body["shift"], 2.5);
    assert_eq!(reply.body["schedule"]["terminal"], 0.02);
    let levels = NoiseLevels::Shifted {
        shift: 2.5,
        terminal: Some(0.02),
    };
    assert_eq!(server.last_job().sampling.levels, levels);
}

#[test]
fn the_models_own_schedule_is_reported_as_well() {
    let server = start();
    let reply = generate(&server, IMAGES, &json!({"num_inference_steps": 4}));
    let schedule = &reply.body["schedule"];
    assert_eq!(schedule["origin"], "model");
    assert!(schedule["name"].is_null() && schedule["shift"].is_null());
    let sigmas = floats(&schedule["sigmas"]);
    assert_eq!((sigmas.len(), sigmas[0]), (4, 1.0));
    assert!((sigmas[3] - 0.02).abs() < 1e-6);
    assert!(reply.body["shift"].is_null());
    assert_eq!(server.last_job().sampling.levels, NoiseLevels::Model);
}

#[test]
fn conflicts_are_400_and_name_both_fields() {
    let server = start();
    for (keys, param, message) in [
        (
            json!({"shift": 3, "sigmas": [1, 0.5]}),
            "sigmas",
            "shift and sigmas both set the noise levels",
        ),
        (
            json!({"shift": 3, "schedule": "model"}),
            "schedule",
            "shift and schedule both set the noise levels",
        ),
        (
            json!({"sigmas": [1], "schedule": "lightning"}),
            "schedule",
            "sigmas and schedule both set",
        ),
        (
            json!({"sigmas": [1, 0.5], "num_inference_steps": 4}),
            "num_inference_steps",
            "num_inference_steps is 4, but sigmas has 2 noise levels",
        ),
        (
            json!({"sigmas": [0.5, 1]}),
            "sigmas",
            "sigmas must fall from step to step, got 1 after 0.5",
        ),
        (
            json!({"sigmas": [2]}),
            "sigmas",
            "sigmas must be above 0 and at most 1, got 2",
        ),
        (json!({"sigmas": []}), "sigmas", "sigmas has no noise level"),
        (
            json!({"sigmas": vec![0.5; 1001]}),
            "sigmas",
            "sigmas may have 1000 noise levels at most, got 1001",
        ),
        (json!({"sigmas": [1, "x"]}), "sigmas[1]", "invalid type"),
        (
            json!({"schedule": "lighting"}),
            "schedule",
            "must be one of model, lightning, wuli-turbo, ",
        ),
        (
            json!({"schedule": {"shift": 3, "mu": 1}}),
            "schedule.mu",
            "unknown field `mu`",
        ),
        (
            json!({"schedule": {"shift": 300}}),
            "schedule.shift",
            "must be from 0.001 to 100, got 300",
        ),
        (
            json!({"schedule": {"terminal": 0.1}}),
            "schedule.terminal",
            "give shift as well",
        ),
    ] {
        for path in [IMAGES, CHAT] {
            let reply = generate(&server, path, &keys);
            assert_eq!(reply.status, 400, "{path} {keys}: {}", reply.body);
            let error = &reply.body["error"];
            assert_eq!(error["param"], param, "{path} {keys}: {error}");
            let text = error["message"].as_str().unwrap();
            assert!(text.contains(message), "{path} {keys}: {text}");
        }
    }
}

#[test]
fn a_fused_model_needs_neither_steps_nor_a_scale() {
    let server = start_fused(Settings {
        default_negative_prompt: Some("blurry".to_owned()),
        ..settings()
    });
    for keys in [
        json!({}),
        json!({"negative_prompt": "dark"}),
        json!({"quality": "low"}),
        json!({"schedule": null, "sigmas": null}),
    ] {
        let reply = generate(&server, IMAGES, &keys);
        assert_eq!(reply.status, 200, "{}", reply.body);
        assert_eq!(reply.body["num_inference_steps"], 8);
        let schedule = &reply.body["schedule"];
        assert_eq!(
            (&schedule["origin"], &schedule["name"]),
            (&json!("model"), &json!("lightning"))
        );
        assert!((floats(&schedule["sigmas"])[1] - 0.954_545_5).abs() < 1e-6);
        assert!(reply.body["warnings"].is_null());
        // The default negative prompt turns no guidance on.
        assert_eq!(server.last_job().guidance, None);
        let file = from_base64(reply.body["data"][0]["b64_json"].as_str().unwrap());
        let text = metadata(&file).unwrap();
        assert!(text.contains("CFG scale: 1, "), "{text}");
        assert!(text.contains(", Schedule: lightning (model), "), "{text}");
    }
    let status = get(server.address, "/v1/status").body;
    assert_eq!(
        status["model_recipe"],
        json!({"name": "lightning", "num_inference_steps": 8, "true_cfg_scale": 1.0})
    );
    assert_eq!(status["defaults"]["num_inference_steps"], 8);
    assert_eq!(status["defaults"]["true_cfg_scale"], 1.0);
    let status = get(start().address, "/v1/status").body;
    assert!(status["model_recipe"].is_null());
    assert_eq!(status["defaults"]["num_inference_steps"], 50);
}

#[test]
fn values_that_do_not_fit_are_kept_with_warnings_in_answers_and_streams() {
    let server = start_fused(settings());
    let keys = json!({"num_inference_steps": 20, "true_cfg_scale": 4, "negative_prompt": ""});
    let expected = json!([
        "num_inference_steps is 20, but recipe lightning of the model is for 8",
        "true_cfg_scale is 4, but recipe lightning of the model is for 1, which is no guidance",
    ]);
    for path in [IMAGES, CHAT] {
        let reply = generate(&server, path, &keys);
        assert_eq!(reply.body["warnings"], expected, "{path}: {}", reply.body);
        assert_eq!(server.last_job().sampling.steps, 20);
        assert!(server.last_job().guidance.is_some());
    }
    let mut streamed = keys.clone();
    streamed["stream"] = json!(true);
    let chat = json!({"messages": user(&json!("a cat")), "stream": true, "extra_body": keys});
    for reply in [
        generate(&server, IMAGES, &streamed),
        post_to(server.address, CHAT, &chat),
    ] {
        let text = String::from_utf8(reply.bytes).unwrap();
        let data = text.lines().filter_map(|line| line.strip_prefix("data: "));
        let chunks = data.filter_map(|data| serde_json::from_str::<Value>(data).ok());
        let mut chunks = chunks.filter(|chunk| !chunk["schedule"].is_null());
        let last = chunks.next_back().unwrap();
        assert_eq!(last["warnings"], expected);
        assert_eq!(last["schedule"]["origin"], "model");
    }
}
