//! Server-sent events.

use std::io::{BufRead, BufReader};
use std::time::Duration;

use serde_json::{Value, json};

use super::client::{Reply, connect, post, post_to, send};
use super::pipeline::{PANIC_IN_STEP, Pace};
use super::server::TestServer;
use super::{decode, decode_png, from_base64, user};

/// Name and data of each event.
pub(super) fn events(reply: &Reply) -> Vec<(Option<String>, String)> {
    assert_eq!(reply.status, 200, "{}", reply.body);
    assert_eq!(reply.header("content-type"), Some("text/event-stream"));
    let text = std::str::from_utf8(&reply.bytes).unwrap();
    let of = |event: &str, field: &str| {
        let value = event.lines().find_map(|line| line.strip_prefix(field));
        value.map(|value| value.trim_start().to_owned())
    };
    text.split("\n\n")
        .filter(|event| !event.is_empty() && !event.starts_with(':'))
        .map(|event| (of(event, "event:"), of(event, "data:").unwrap()))
        .collect()
}

/// The chunks of a chat, without `[DONE]`.
pub(super) fn chunks(reply: &Reply) -> Vec<Value> {
    let mut data: Vec<String> = events(reply).into_iter().map(|(_, data)| data).collect();
    assert_eq!(data.pop().as_deref(), Some("[DONE]"));
    data.iter()
        .map(|data| serde_json::from_str(data).unwrap())
        .collect()
}

fn chat(extra: &Value) -> Value {
    let mut body = json!({
        "messages": user(&json!("a cat")), "stream": true, "num_inference_steps": 5, "seed": 7,
    });
    let extra = extra.as_object().unwrap().clone();
    body.as_object_mut().unwrap().extend(extra);
    body
}

#[test]
fn a_chat_streams_every_step_and_then_the_images() {
    let server = TestServer::start(Pace::Fast, 4);
    let reply = post(server.address, &chat(&json!({"n": 2})));
    let chunks = chunks(&reply);
    for chunk in &chunks {
        assert_eq!(chunk["object"], "chat.completion.chunk");
        assert_eq!(chunk["id"], chunks[0]["id"]);
        assert_eq!(chunk["model"], "test/model");
        assert_eq!(chunk["choices"][0]["index"], 0);
        assert!(chunk["choices"][0]["delta"].is_object());
    }
    assert_eq!(chunks[0]["choices"][0]["delta"]["role"], "assistant");
    assert_eq!(chunks[1]["progress"]["stage"], "queued");
    assert_eq!(chunks[1]["progress"]["position"], 0);

    let steps: Vec<&Value> = chunks
        .iter()
        .map(|chunk| &chunk["progress"])
        .filter(|progress| progress["stage"] == "step")
        .collect();
    assert_eq!(steps.len(), 5);
    for (index, progress) in steps.iter().enumerate() {
        assert_eq!(progress["step"], index + 1);
        assert_eq!(progress["steps"], 5);
    }

    let [images, last] = chunks.last_chunk().unwrap();
    let parts = images["choices"][0]["delta"]["images"].as_array().unwrap();
    assert_eq!(parts.len(), 2);
    for (index, part) in parts.iter().enumerate() {
        assert_eq!(part["index"], index);
        assert_eq!(decode(part), (64, 64, vec![7; 64 * 64 * 3]));
    }
    assert_eq!(images["choices"][0]["finish_reason"], Value::Null);
    assert_eq!(last["choices"][0]["finish_reason"], "stop");
    assert_eq!(last["seed"], 7);
    assert_eq!(last["size"], "64x64");
    assert_eq!(last["num_inference_steps"], 5);
    assert!(last["timings"]["denoise"].is_number());
    assert!(chunks.iter().all(|chunk| chunk["usage"].is_null()));
}

/// Chat programs append `content` to a text: Open WebUI writes a list into the answer as text, or
/// drops the chunk, and `LiteLLM` joins the chunks as texts.
#[test]
fn the_content_of_every_chunk_is_text() {
    let server = TestServer::start(Pace::Fast, 4);
    let body =
        chat(&json!({"n": 2, "preview_every": 2, "stream_options": {"include_usage": true}}));
    let chunks = chunks(&post(server.address, &body));
    let deltas = chunks.iter().map(|chunk| &chunk["choices"][0]["delta"]);
    assert!(deltas.clone().any(|delta| delta["images"].is_array()));
    for delta in deltas {
        let content = &delta["content"];
        assert!(content.is_null() || content == "", "{content}");
    }
}

#[test]
fn usage_and_previews_come_on_request() {
    let server = TestServer::start(Pace::Fast, 4);
    let body = chat(&json!({
        "stream_options": {"include_usage": true}, "extra_body": {"preview_every": 2},
    }));
    let reply = post(server.address, &body);
    let chunks = chunks(&reply);
    let previews: Vec<&Value> = chunks
        .iter()
        .map(|chunk| &chunk["progress"])
        .filter(|progress| progress["stage"] == "preview")
        .collect();
    assert_eq!(previews.len(), 2);
    for (preview, step) in previews.iter().zip([2, 4]) {
        assert_eq!(preview["step"], step);
        let url = preview["image_url"]["url"].as_str().unwrap();
        let file = from_base64(url.strip_prefix("data:image/png;base64,").unwrap());
        assert_eq!(decode_png(&file), (16, 16, vec![7; 16 * 16 * 3]));
    }
    let usage = chunks.last().unwrap();
    assert_eq!(usage["choices"], json!([]));
    assert_eq!(usage["usage"]["completion_tokens"], 16);
}

#[test]
fn each_image_is_an_event() {
    let server = TestServer::start(Pace::Fast, 4);
    let body = json!({
        "prompt": "a cat", "stream": true, "partial_images": 2, "n": 2, "seed": 9,
        "num_inference_steps": 6, "output_format": "webp", "quality": "medium",
    });
    let events = events(&post_to(server.address, "/v1/images/generations", &body));
    let names: Vec<&str> = events
        .iter()
        .map(|(name, _)| name.as_deref().unwrap())
        .collect();
    let (partial, completed) = (
        "image_generation.partial_image",
        "image_generation.completed",
    );
    assert_eq!(names, [partial, partial, completed, completed]);
    for (index, (name, data)) in events.iter().enumerate() {
        let data: Value = serde_json::from_str(data).unwrap();
        assert_eq!(data["type"], name.as_deref().unwrap());
        assert_eq!(data["quality"], "medium");
        assert_eq!(data["background"], "opaque");
        assert!(data["created_at"].as_u64().unwrap() > 1_700_000_000);
        let file = from_base64(data["b64_json"].as_str().unwrap());
        if index < 2 {
            assert_eq!(data["partial_image_index"], index);
            assert_eq!(data["size"], "16x16");
            assert_eq!(data["output_format"], "png");
            assert_eq!(decode_png(&file), (16, 16, vec![9; 16 * 16 * 3]));
        } else {
            assert_eq!(data["size"], "64x64");
            assert_eq!(data["output_format"], "webp");
            assert!(file.starts_with(b"RIFF"));
            assert_eq!(data["usage"]["output_tokens"], 32);
            assert_eq!(data["seed"], 9);
        }
    }
}

#[test]
fn an_error_after_the_start_is_an_event() {
    let server = TestServer::start(Pace::Fast, 4);
    let chunks = chunks(&post(
        server.address,
        &chat(&json!({"seed": PANIC_IN_STEP})),
    ));
    let error = &chunks.last().unwrap()["error"];
    assert_eq!(error["code"], 500);
    assert!(!error["message"].as_str().unwrap().contains("secret"));

    let body = json!({"prompt": "a cat", "stream": true, "seed": PANIC_IN_STEP});
    let events = events(&post_to(server.address, "/v1/images/generations", &body));
    let (name, data) = events.last().unwrap();
    assert_eq!(name.as_deref(), Some("error"));
    let data: Value = serde_json::from_str(data).unwrap();
    assert_eq!(data["error"]["type"], "server_error");
}

#[test]
fn an_error_before_the_start_is_a_status() {
    let server = TestServer::start(Pace::Fast, 4);
    let reply = post(server.address, &chat(&json!({"height": 1})));
    assert_eq!(reply.status, 400);
    assert_eq!(reply.body["error"]["param"], "height");
}

#[test]
fn a_waiting_request_has_a_position_and_a_disconnected_one_is_cancelled() {
    let server = TestServer::start(Pace::Slow, 4);
    let long = chat(&json!({"num_inference_steps": 1000}));
    let path = "/v1/chat/completions";
    let first = send(connect(server.address), "POST", path, Some(&long));
    server.wait_for_steps(1);
    let second = send(connect(server.address), "POST", path, Some(&long));
    let queued = BufReader::new(second)
        .lines()
        .map(Result::unwrap)
        .find(|line| line.contains("queued"))
        .unwrap();
    let chunk: Value = serde_json::from_str(queued.strip_prefix("data: ").unwrap()).unwrap();
    assert_eq!(chunk["progress"]["position"], 1);
    // The reader of the second response has been dropped.
    drop(first);

    let short = chat(&json!({"num_inference_steps": 1}));
    assert!(!chunks(&post(server.address, &short)).is_empty());
    assert!(server.steps() < 500, "{} steps were made", server.steps());
    std::thread::sleep(Duration::from_millis(100));
    let stats = server.engine.stats();
    assert_eq!((stats.running, stats.waiting), (0, 0));
    assert_eq!(stats.outcomes.cancelled, 2);
}
