//! The page at `/`, and the routes that it uses besides the API of `OpenAI`.

use kiln::server::{ApiKeys, Settings};
use serde_json::{Value, json};

use super::client::{Reply, connect, get, post_to, send, with_headers};
use super::pipeline::Pace;
use super::server::TestServer;

/// All files of the page, found by following its links.
fn files(server: &TestServer) -> Vec<(String, Reply)> {
    let mut found = vec!["/".to_owned()];
    let mut files: Vec<(String, Reply)> = Vec::new();
    while let Some(path) = found.pop() {
        if files.iter().any(|(known, _)| *known == path) {
            continue;
        }
        let reply = get(server.address, &path);
        let text = String::from_utf8(reply.bytes.clone()).unwrap();
        for name in text.split(['"', '\'']) {
            if let Some(name) = name.strip_prefix("./") {
                found.push(format!("/page/{name}"));
            } else if name.starts_with("page/") {
                found.push(format!("/{name}"));
            }
        }
        files.push((path, reply));
    }
    files
}

#[test]
fn the_page_is_whole_and_takes_nothing_from_elsewhere() {
    let server = TestServer::start(Pace::Fast, 4);
    let files = files(&server);
    assert!(files.len() > 8, "only {} files", files.len());
    for (path, reply) in &files {
        assert_eq!(reply.status, 200, "{path}");
        let extension = path.rsplit_once('.').map_or("html", |(_, name)| name);
        let media_type = match extension {
            "html" => "text/html; charset=utf-8",
            "css" => "text/css; charset=utf-8",
            "js" => "text/javascript; charset=utf-8",
            "svg" => "image/svg+xml",
            other => panic!("{other}"),
        };
        assert_eq!(reply.header("content-type"), Some(media_type), "{path}");
        assert_eq!(reply.header("x-content-type-options"), Some("nosniff"));
        let policy = reply.header("content-security-policy").unwrap();
        assert!(policy.starts_with("default-src 'none'; "), "{policy}");
        assert!(!policy.contains("unsafe"), "{policy}");

        let text = String::from_utf8_lossy(&reply.bytes);
        let text = text.replace("http://www.w3.org/2000/svg", "");
        assert!(
            !text.contains("http:") && !text.contains("https:"),
            "{path}"
        );
        assert!(
            !text.contains("style=") && !text.contains("<style"),
            "{path}"
        );
        assert!(
            !text.contains(" onclick=\"") && !text.contains("innerHTML"),
            "{path}"
        );
    }
}

#[test]
fn a_file_is_not_sent_again_to_a_browser_that_has_it() {
    let server = TestServer::start(Pace::Fast, 4);
    let mut tags: Vec<String> = Vec::new();
    for (path, reply) in files(&server) {
        assert_eq!(reply.header("cache-control"), Some("no-cache"), "{path}");
        let tag = reply.header("etag").unwrap().to_owned();
        assert!(!tags.contains(&tag), "{path} has the tag of another file");
        for known in [tag.clone(), format!("\"other\", W/{tag}"), "*".to_owned()] {
            let headers = format!("If-None-Match: {known}\r\n");
            let reply = with_headers(server.address, "GET", &path, &headers);
            assert_eq!((reply.status, reply.bytes.len()), (304, 0), "{known}");
            assert_eq!(reply.header("etag"), Some(tag.as_str()));
        }
        let headers = "If-None-Match: \"other\"\r\n";
        let reply = with_headers(server.address, "GET", &path, headers);
        assert_eq!(reply.status, 200, "{path}");
        tags.push(tag);
    }
}

#[test]
fn the_page_answers_to_head_and_to_nothing_else() {
    let server = TestServer::start(Pace::Fast, 4);
    let page = get(server.address, "/");
    let head = with_headers(server.address, "HEAD", "/", "");
    assert_eq!((head.status, head.bytes.len()), (200, 0));
    for name in ["content-type", "content-length", "etag"] {
        assert_eq!(head.header(name), page.header(name), "{name}");
    }
    assert_eq!(
        page.header("content-length").unwrap(),
        page.bytes.len().to_string()
    );
    for method in ["POST", "PUT", "DELETE"] {
        let reply = with_headers(server.address, method, "/", "");
        assert_eq!(reply.status, 405, "{method}");
        assert_eq!(reply.body["error"]["type"], "invalid_request_error");
        assert_eq!(reply.header("allow"), Some("GET,HEAD"));
    }
    assert_eq!(get(server.address, "/page/other.js").status, 404);
}

#[test]
fn the_page_needs_no_key_but_its_requests_do() {
    let settings = Settings {
        api_keys: ApiKeys::new(vec!["k".to_owned()]).unwrap(),
        ..Settings::new("m")
    };
    let server = TestServer::with_settings(Pace::Fast, 4, settings);
    for (path, reply) in files(&server) {
        assert_eq!(reply.status, 200, "{path}");
    }
    assert_eq!(get(server.address, "/v1/status").status, 401);
    let headers = "Authorization: Bearer k\r\n";
    let reply = with_headers(server.address, "GET", "/v1/status", headers);
    assert_eq!(reply.status, 200);
    let reply = post_to(
        server.address,
        "/v1/images/estimate",
        &json!({"prompt": ""}),
    );
    assert_eq!(reply.status, 401);
}

#[test]
fn the_status_has_the_bounds_and_defaults_of_requests() {
    let settings = Settings {
        default_negative_prompt: Some("blurry".to_owned()),
        ..Settings::new("test/model")
    };
    let server = TestServer::with_settings(Pace::Slow, 4, settings);
    let status = get(server.address, "/v1/status").body;
    let empty = |max_bytes: u64| {
        json!({
            "entries": 0, "bytes": 0, "max_bytes": max_bytes, "hits": 0, "misses": 0, "loads": 0,
            "evictions": 0,
        })
    };
    assert_eq!(
        status,
        json!({
            "state": "ready", "model": "test/model", "version": kiln::version::VERSION,
            "instance": Settings::new("m").instance,
            "adapters": {
                "usable": [], "unusable": [], "updates": false, "merged": null,
                "host_cache": empty(0), "device_cache": empty(u64::MAX),
            },
            "device": "test:0 (fake)", "dtype": "f32", "requests": {"running": 0, "waiting": 0},
            "max_step_tokens": 0, "jobs": null,
            "limits": {
                "side_multiple": 16, "max_side": 4096, "max_image_pixels": 33_177_600,
                "max_steps": 1000, "max_num_images": 10,
            },
            "defaults": {
                "width": 64, "height": 64, "num_inference_steps": 50, "true_cfg_scale": 4.0,
                "negative_prompt": "blurry", "cache": "off",
            },
            "prompt_guide": null,
        })
    );

    let body = json!({"prompt": "a cat", "num_inference_steps": 1000});
    let long = || {
        send(
            connect(server.address),
            "POST",
            "/v1/images/generations",
            Some(&body),
        )
    };
    let _first = long();
    server.wait_for_steps(1);
    let _second = long();
    while get(server.address, "/v1/status").body["requests"] != json!({"running": 1, "waiting": 1})
    {
        assert!(server.steps() < 500, "the second request does not wait");
    }
    server.engine.stop();
    assert_eq!(get(server.address, "/v1/status").body["state"], "stopped");
}

#[test]
fn an_estimate_generates_nothing() {
    let server = TestServer::start(Pace::Slow, 1);
    let path = "/v1/images/estimate";
    let ask = |steps: usize| {
        let body = json!({"prompt": "a cat", "size": "97x40", "num_inference_steps": steps});
        post_to(server.address, path, &body)
    };
    let first = ask(10);
    assert_eq!(
        first.body,
        json!({
            "accepted": true, "position": 0, "estimated_wait": 0.0, "estimated_time": null,
            "size": "96x32", "num_inference_steps": 10,
        })
    );
    assert_eq!(server.steps(), 0);

    // A step takes at least 10 ms.
    let body = json!({"prompt": "a cat", "size": "97x40", "num_inference_steps": 5});
    let reply = post_to(server.address, "/v1/images/generations", &body);
    assert_eq!(reply.status, 200);
    let seconds = |reply: &Value, name: &str| reply[name].as_f64().unwrap();
    let (short, long) = (ask(10).body, ask(100).body);
    assert!(seconds(&short, "estimated_time") >= 0.1, "{short}");
    assert!(seconds(&long, "estimated_time") >= 1.0, "{long}");

    let body = json!({"prompt": "a cat", "size": "97x40", "num_inference_steps": 1000});
    let other = || {
        send(
            connect(server.address),
            "POST",
            "/v1/images/generations",
            Some(&body),
        )
    };
    let _first = other();
    server.wait_for_steps(6);
    let behind = ask(1000).body;
    assert_eq!(
        (&behind["accepted"], &behind["position"]),
        (&json!(true), &json!(1))
    );
    assert!(seconds(&behind, "estimated_wait") > 1.0, "{behind}");
    // A small request overtakes.
    assert_eq!(ask(10).body["position"], 0);

    let _second = other();
    while ask(1000).body["accepted"] != json!(false) {
        assert!(server.steps() < 500, "the second request does not wait");
    }
}

#[test]
fn an_estimate_is_refused_as_the_request_would_be() {
    let server = TestServer::start(Pace::Fast, 4);
    for body in [
        json!({}),
        json!({"prompt": "a cat", "size": "1x1"}),
        json!({"prompt": "a cat", "unknown": 1}),
        json!({"prompt": "a cat", "n": 11}),
    ] {
        let refused = |path| {
            let reply = post_to(server.address, path, &body);
            assert_eq!(reply.status, 400, "{body}");
            let mut error = reply.body["error"].clone();
            error.as_object_mut().unwrap().remove("request_id");
            error
        };
        assert_eq!(
            refused("/v1/images/estimate"),
            refused("/v1/images/generations")
        );
    }
}
