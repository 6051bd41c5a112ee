//! Health, metrics, deadlines, request ids and shutdown.

use std::time::Duration;

use kiln::engine::State;
use kiln::server::Settings;
use serde_json::{Value, json};

use super::client::{connect, get, post, receive, send, with_headers};
use super::pipeline::{LOSE_DEVICE, PANIC_IN_STEP, Pace};
use super::server::TestServer;
use super::user;

fn cat(steps: usize) -> Value {
    json!({"messages": user(&json!("a cat")), "num_inference_steps": steps, "seed": 1})
}

#[test]
fn a_server_is_alive_and_ready() {
    let server = TestServer::start(Pace::Fast, 4);
    for path in ["/health", "/health/live"] {
        let reply = get(server.address, path);
        assert_eq!(
            (reply.status, &reply.body["status"]),
            (200, &json!("healthy"))
        );
    }
    // There is no warm-up, but the thread takes a moment to start.
    assert_eq!(post(server.address, &cat(1)).status, 200);
    let reply = get(server.address, "/health/ready");
    assert_eq!(
        (reply.status, &reply.body["status"]),
        (200, &json!("ready"))
    );
}

#[test]
fn a_draining_server_is_alive_but_not_ready() {
    let server = TestServer::start(Pace::Slow, 4);
    let path = "/v1/chat/completions";
    let running = send(connect(server.address), "POST", path, Some(&cat(100)));
    server.wait_for_steps(1);
    server.engine.drain(Duration::from_mins(1));

    let reply = get(server.address, "/health/ready");
    assert_eq!(
        (reply.status, &reply.body["status"]),
        (503, &json!("draining"))
    );
    assert_eq!(get(server.address, "/health/live").status, 200);
    let refused = post(server.address, &cat(1));
    assert_eq!(refused.status, 503);
    assert!(refused.header("retry-after").is_some());
    assert_eq!(receive(running).status, 200);
}

#[test]
fn a_request_fails_after_its_time_limit() {
    let settings = Settings {
        request_timeout: Some(Duration::from_millis(300)),
        ..Settings::new("m")
    };
    let server = TestServer::with_settings(Pace::Slow, 4, settings);
    let reply = post(server.address, &cat(1000));
    assert_eq!(reply.status, 408);
    assert_eq!(reply.body["error"]["code"], 408);
    assert!(server.steps() < 100, "{} steps were made", server.steps());
    assert_eq!(post(server.address, &cat(1)).status, 200);
    assert_eq!(server.discards(), 1);
}

#[test]
fn the_metrics_count_requests_steps_and_images() {
    let server = TestServer::start(Pace::Fast, 4);
    assert_eq!(post(server.address, &cat(3)).status, 200);
    let two = json!({"messages": user(&json!("a cat")), "num_inference_steps": 2, "n": 2});
    assert_eq!(post(server.address, &two).status, 200);
    let failing = json!({"messages": user(&json!("a cat")), "seed": PANIC_IN_STEP});
    assert_eq!(post(server.address, &failing).status, 500);

    let reply = get(server.address, "/metrics");
    assert_eq!(
        reply.header("content-type"),
        Some("text/plain; version=0.0.4")
    );
    let text = String::from_utf8(reply.bytes).unwrap();
    for line in [
        "kiln_requests_waiting 0",
        "kiln_requests_running 0",
        "vllm:num_requests_waiting 0",
        "vllm:num_requests_running 0",
        "kiln_requests_total{outcome=\"finished\"} 2",
        "kiln_requests_total{outcome=\"failed\"} 1",
        "kiln_steps_total 5",
        "kiln_shared_steps_total 0",
        "kiln_max_step_tokens 0",
        "kiln_images_total 3",
        "kiln_pixels_total 12288",
        "kiln_pixel_steps_total 28672",
        "kiln_step_seconds_count 5",
        "kiln_request_seconds_count 2",
        "kiln_decode_seconds_count 2",
        "kiln_connections 1",
        "kiln_connections_closed_total{reason=\"idle\"} 0",
        "kiln_connections_closed_total{reason=\"slow_head\"} 0",
        "kiln_connections_closed_total{reason=\"not_read\"} 0",
        "kiln_connections_closed_total{reason=\"for_another\"} 0",
    ] {
        assert!(
            text.lines().any(|found| found == line),
            "no {line} in {text}"
        );
    }
}

#[test]
fn an_engine_that_has_stopped_is_neither_alive_nor_ready() {
    let server = TestServer::start(Pace::Fast, 4);
    server.engine.shutdown();
    assert!(matches!(server.engine.state(), State::Stopped));
    for path in ["/health", "/health/live", "/health/ready"] {
        assert_eq!(get(server.address, path).status, 503, "{path}");
    }
}

#[test]
fn a_server_that_lost_a_device_is_not_ready_and_names_the_device() {
    let server = TestServer::start(Pace::Fast, 4);
    assert_eq!(get(server.address, "/health/ready").status, 200);
    let lost = json!({"messages": user(&json!("a cat")), "seed": LOSE_DEVICE});
    assert_eq!(post(server.address, &lost).status, 500);
    let ready = get(server.address, "/health/ready");
    assert_eq!(ready.status, 503);
    assert_eq!(ready.body["status"], "failed");
    let reason = ready.body["reason"].as_str().unwrap();
    assert_eq!(
        reason,
        "the device failed: test:1 (fake): the driver answered nothing"
    );
    assert_eq!(get(server.address, "/health").status, 503);
    assert_eq!(post(server.address, &cat(1)).status, 503);
}

#[test]
fn every_response_has_a_request_id() {
    let server = TestServer::start(Pace::Fast, 4);
    let mut ids: Vec<String> = Vec::new();
    for path in ["/health", "/v1/models", "/unknown", "/v1/unknown", "/"] {
        let reply = get(server.address, path);
        let id = reply.header("x-request-id").unwrap().to_owned();
        assert!(!ids.contains(&id), "{path} repeats {id}");
        ids.push(id);
    }
    let reply = with_headers(
        server.address,
        "GET",
        "/v1/models",
        "X-Request-Id: mine\r\n",
    );
    assert_eq!(reply.header("x-request-id"), Some("mine"));
    let long = "x".repeat(129);
    for unusable in ["", "caf\u{e9}", "a\tb", &long, "a\r\nX-Request-Id: b"] {
        let header = format!("X-Request-Id: {unusable}\r\n");
        let reply = with_headers(server.address, "GET", "/v1/models", &header);
        assert_eq!(
            reply.header("x-request-id").unwrap().len(),
            36,
            "{unusable:?}"
        );
    }
}
