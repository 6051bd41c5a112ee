//! A server whose model is on its way: what answers, and with what.

use kiln::hub::Transfer;
use kiln::runtime::Stage;
use kiln::server::{ApiKeys, CorsOrigin, Settings};
use serde_json::{Value, json};

use super::client::{Reply, get, json_with_headers, post_to, with_headers};
use super::server::TestServer;

/// Method and path of every route that needs the model.
const NEED_THE_MODEL: [(&str, &str); 17] = [
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/images/generations"),
    ("POST", "/v1/images/estimate"),
    ("GET", "/v1/status"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/m"),
    ("POST", "/sdapi/v1/txt2img"),
    ("GET", "/sdapi/v1/progress"),
    ("POST", "/sdapi/v1/interrupt"),
    ("GET", "/sdapi/v1/options"),
    ("POST", "/sdapi/v1/options"),
    ("GET", "/sdapi/v1/sd-models"),
    ("GET", "/sdapi/v1/samplers"),
    ("GET", "/sdapi/v1/schedulers"),
    ("GET", "/sdapi/v1/upscalers"),
    ("GET", "/sdapi/v1/latent-upscale-modes"),
    ("GET", "/sdapi/v1/sd-vae"),
];

fn settings() -> Settings {
    Settings {
        sdapi: true,
        ..Settings::new("m")
    }
}

fn retry_after(reply: &Reply) -> u64 {
    reply.header("retry-after").unwrap().parse().unwrap()
}

/// `/health/ready` without the times.
fn readiness(server: &TestServer) -> Value {
    let reply = get(server.address, "/health/ready");
    assert_eq!(reply.status, 503);
    let mut body = reply.body;
    let body = body.as_object_mut().unwrap();
    assert!(body.remove("elapsed").unwrap().as_f64().unwrap() >= 0.0);
    body.remove("estimated_rest");
    Value::Object(body.clone())
}

#[test]
fn the_api_is_503_with_a_time_to_retry_until_there_is_a_model() {
    let server = TestServer::without_model(settings());
    for (method, path) in NEED_THE_MODEL {
        let reply = with_headers(server.address, method, path, "");
        assert_eq!(reply.status, 503, "{method} {path}");
        let error = &reply.body["error"];
        let id = reply.header("x-request-id").unwrap();
        assert_eq!(
            error,
            &json!({
                "message": "the model's files are being looked for; try again in 5 s",
                "type": "server_error", "param": null, "code": 503, "request_id": id,
            }),
            "{method} {path}"
        );
        assert_eq!(retry_after(&reply), 5, "{method} {path}");
        if path.starts_with("/sdapi") {
            assert_eq!(reply.body["detail"], error["message"]);
        }
    }
    server.set_model();
    for (method, path) in NEED_THE_MODEL {
        let reply = with_headers(server.address, method, path, "");
        let expected = if method == "GET" || path.ends_with("interrupt") {
            200
        } else {
            400
        };
        assert_eq!(reply.status, expected, "{method} {path}: {}", reply.body);
    }
    let body = json!({"prompt": "a cat", "num_inference_steps": 1});
    let reply = post_to(server.address, "/v1/images/generations", &body);
    assert_eq!(reply.status, 200);
}

#[test]
fn what_needs_no_model_answers_at_once() {
    let server = TestServer::without_model(settings());
    for path in ["/health", "/health/live"] {
        let reply = get(server.address, path);
        assert_eq!(
            (reply.status, &reply.body),
            (200, &json!({"status": "healthy"}))
        );
    }
    for path in ["/", "/page/main.js", "/docs", "/openapi.json", "/version"] {
        assert_eq!(get(server.address, path).status, 200, "{path}");
    }
    assert_eq!(get(server.address, "/unknown").status, 404);
    assert_eq!(get(server.address, "/v1/unknown").status, 404);

    // The limits of requests depend on the model.
    let sides = |server: &TestServer| {
        let document = get(server.address, "/openapi.json").body;
        document["components"]["schemas"]["ImagesRequest"]["properties"]["height"].clone()
    };
    assert_eq!(sides(&server)["maximum"], Value::Null);
    server.set_model();
    assert_eq!(sides(&server)["maximum"], 4096);
}

#[test]
fn every_stage_is_told_with_its_progress() {
    let server = TestServer::without_model(settings());
    let start = server.progress();
    assert_eq!(
        readiness(&server),
        json!({"status": "loading", "stage": "finding"})
    );
    start.download(Transfer {
        files: 3,
        total_files: 14,
        bytes: 420,
        total_bytes: 1000,
    });
    assert_eq!(
        readiness(&server),
        json!({
            "status": "loading", "stage": "downloading", "progress": 0.42,
            "bytes": 420, "total_bytes": 1000, "files": 3, "total_files": 14,
        })
    );
    let reply = get(server.address, "/v1/models");
    assert_eq!(
        reply.body["error"]["message"],
        "the model is being downloaded, 42 % done; try again in 5 s"
    );
    start.load(200);
    start.add_loaded(100);
    assert_eq!(
        readiness(&server),
        json!({
            "status": "loading", "stage": "loading", "progress": 0.5,
            "bytes": 100, "total_bytes": 200,
        })
    );
    start.enter(Stage::WarmingUp);
    assert_eq!(
        readiness(&server),
        json!({"status": "loading", "stage": "warming_up"})
    );
    server.set_model();
    // The engine's thread takes a moment to start.
    let body = json!({"prompt": "a cat", "num_inference_steps": 1});
    post_to(server.address, "/v1/images/generations", &body);
    let reply = get(server.address, "/health/ready");
    assert_eq!(
        (reply.status, &reply.body),
        (200, &json!({"status": "ready"}))
    );
}

#[test]
fn the_time_to_retry_follows_from_the_speed_of_the_download() {
    let server = TestServer::without_model(settings());
    let transfer = |bytes| Transfer {
        bytes,
        total_bytes: 1_000_000,
        ..Transfer::default()
    };
    server.progress().download(transfer(0));
    std::thread::sleep(std::time::Duration::from_millis(100));
    // At least 100 ms for a thousandth.
    server.progress().download(transfer(1000));
    let seconds = retry_after(&get(server.address, "/v1/models"));
    assert!((99..=3600).contains(&seconds), "{seconds}");
    let reply = get(server.address, "/health/ready");
    assert!(reply.body["estimated_rest"].as_f64().unwrap() >= 99.0);
}

#[test]
fn keys_and_origins_are_checked_before_there_is_a_model() {
    let server = TestServer::without_model(Settings {
        api_keys: ApiKeys::new(vec!["k".to_owned()]).unwrap(),
        cors_origins: vec!["http://page.example".parse::<CorsOrigin>().unwrap()],
        ..settings()
    });
    for path in ["/v1/status", "/sdapi/v1/options"] {
        assert_eq!(get(server.address, path).status, 401, "{path}");
        let headers = "Authorization: Bearer k\r\nOrigin: http://page.example\r\n";
        let reply = with_headers(server.address, "GET", path, headers);
        assert_eq!(reply.status, 503, "{path}");
        let allowed = reply.header("access-control-allow-origin");
        assert_eq!(allowed, Some("http://page.example"));
        let exposed = reply.header("access-control-expose-headers").unwrap();
        assert!(exposed.contains("retry-after"), "{exposed}");
    }
    // A body that is refused later is not read now.
    let headers = "Authorization: Bearer k\r\n";
    let path = "/v1/images/generations";
    let reply = json_with_headers(server.address, path, headers, &json!({"no": "prompt"}));
    assert_eq!(reply.status, 503);
}

#[test]
fn the_metrics_tell_the_start() {
    let server = TestServer::without_model(settings());
    let text = || String::from_utf8(get(server.address, "/metrics").bytes).unwrap();
    let has = |text: &str, line: &str| assert!(text.lines().any(|it| it == line), "{line}: {text}");
    let during = text();
    for line in [
        "kiln_ready 0",
        "kiln_start_seconds{stage=\"loading\"} 0",
        "kiln_requests_waiting 0",
        "vllm:num_requests_running 0",
        "kiln_steps_total 0",
    ] {
        has(&during, line);
    }
    server.set_model();
    let body = json!({"prompt": "a cat", "num_inference_steps": 3});
    post_to(server.address, "/v1/images/generations", &body);
    let after = text();
    has(&after, "kiln_ready 1");
    has(&after, "kiln_steps_total 3");
    let finding = |text: &str| {
        let lines = text.lines();
        let mut found =
            lines.filter_map(|it| it.strip_prefix("kiln_start_seconds{stage=\"finding\"} "));
        found.next().unwrap().parse::<f64>().unwrap()
    };
    assert!(finding(&after) > 0.0);
    assert_eq!(finding(&after), finding(&text()), "it stands still");
}
