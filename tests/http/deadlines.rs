//! `deadline_ms`: what is refused, and with which status, body and headers.

use serde_json::{Value, json};

use super::client::{Reply, connect, get, post, post_to, send};
use super::pipeline::Pace;
use super::server::TestServer;
use super::user;

const CHAT: &str = "/v1/chat/completions";
const IMAGES: &str = "/v1/images/generations";

fn chat(steps: usize, deadline_ms: u32) -> Value {
    json!({
        "messages": user(&json!("a cat")), "num_inference_steps": steps, "deadline_ms": deadline_ms,
    })
}

fn image(steps: usize, deadline_ms: u32) -> Value {
    json!({"prompt": "a cat", "num_inference_steps": steps, "deadline_ms": deadline_ms})
}

/// A server that has measured its speed: a step takes 10 ms.
fn measured() -> TestServer {
    let server = TestServer::start(Pace::Slow, 8);
    for _ in 0..2 {
        assert_eq!(post(server.address, &chat(3, 60_000)).status, 200);
    }
    server
}

fn assert_late(reply: &Reply, status: u16) {
    let error = &reply.body["error"];
    assert_eq!(reply.status, status, "{error}");
    assert_eq!(error["code"], status, "{error}");
    assert_eq!(error["param"], "deadline_ms", "{error}");
    assert!(
        error["message"].as_str().unwrap().contains("deadline_ms"),
        "{error}"
    );
}

#[test]
fn a_deadline_is_taken_by_every_api_and_within_extra_body() {
    let server = TestServer::start(Pace::Fast, 4);
    let nested = json!({"extra_body": {"deadline_ms": 60_000.0}});
    for (path, mut body) in [
        (CHAT, json!({"messages": user(&json!("a cat"))})),
        (IMAGES, json!({"prompt": "a cat"})),
        ("/v1/images/estimate", json!({"prompt": "a cat"})),
    ] {
        body["deadline_ms"] = json!(86_400_000);
        assert_eq!(post_to(server.address, path, &body).status, 200, "{path}");
        body["deadline_ms"] = nested["extra_body"]["deadline_ms"].clone();
        body["extra_body"] = nested["extra_body"].clone();
        assert_eq!(post_to(server.address, path, &body).status, 200, "{path}");
        for value in [
            json!(0),
            json!(-5),
            json!(86_400_001),
            json!(1.5),
            json!("100"),
        ] {
            body["extra_body"] = json!({});
            body["deadline_ms"] = value;
            assert_late(&post_to(server.address, path, &body), 400);
        }
    }
}

#[test]
fn a_deadline_that_is_too_short_for_the_images_is_400_with_their_time() {
    let server = measured();
    for reply in [
        post(server.address, &chat(100, 300)),
        post_to(server.address, IMAGES, &image(100, 300)),
    ] {
        assert_late(&reply, 400);
        let error = &reply.body["error"];
        assert_eq!(error["type"], "invalid_request_error");
        assert_eq!(error["estimated_wait"], 0.0);
        let time = error["estimated_time"].as_f64().unwrap();
        assert!((1.0..10.0).contains(&time), "{time}");
        assert!(reply.header("retry-after").is_none());
    }
    let estimate = post_to(server.address, "/v1/images/estimate", &image(100, 300));
    assert_eq!(estimate.body["accepted"], false);
    let estimate = post_to(server.address, "/v1/images/estimate", &image(100, 60_000));
    assert_eq!(estimate.body["accepted"], true);
    let text = String::from_utf8(get(server.address, "/metrics").bytes).unwrap();
    assert!(
        text.contains("kiln_requests_total{outcome=\"rejected\"} 2\n"),
        "{text}"
    );
}

#[test]
fn a_deadline_that_the_queue_makes_late_is_429_with_a_time_to_retry() {
    let server = measured();
    let steps = server.steps();
    let running = send(
        connect(server.address),
        "POST",
        CHAT,
        Some(&chat(300, 5000)),
    );
    server.wait_for_steps(steps + 1);
    let reply = post(server.address, &chat(300, 5000));
    assert_late(&reply, 429);
    let error = &reply.body["error"];
    assert_eq!(error["type"], "rate_limit_error");
    assert!(error["estimated_wait"].as_f64().unwrap() > 1.5, "{error}");
    assert!(error["estimated_time"].as_f64().unwrap() > 2.5, "{error}");
    let seconds: u64 = reply.header("retry-after").unwrap().parse().unwrap();
    assert!((1..10).contains(&seconds), "{seconds}");
    drop(running);
}

#[test]
fn a_request_that_can_no_longer_be_in_time_is_408() {
    let server = TestServer::start(Pace::Slow, 4);
    let reply = post(server.address, &chat(1000, 400));
    assert_late(&reply, 408);
    // It was known early that a thousand steps take ten seconds.
    assert!(server.steps() < 20, "{} steps were made", server.steps());
    let message = reply.body["error"]["message"].as_str().unwrap();
    assert!(
        message.contains(" ms too late for its deadline_ms"),
        "{message}"
    );
    let text = String::from_utf8(get(server.address, "/metrics").bytes).unwrap();
    assert!(
        text.contains("kiln_requests_total{outcome=\"too_late\"} 1\n"),
        "{text}"
    );
    assert_eq!(post(server.address, &chat(3, 60_000)).status, 200);
    assert_eq!(server.discards(), 1);
}
