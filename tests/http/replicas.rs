//! What a router in front of several servers relies on: ids of requests and of servers, the load, the
//! end of a server, and what 503 means.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Command, Stdio};
use std::time::Duration;

use kiln::server::Settings;
use serde_json::{Value, json};

use super::client::{Reply, connect, get, post, post_to, receive, send, with_headers};
use super::pipeline::{LOSE_DEVICE, PANIC_IN_STEP, Pace};
use super::server::TestServer;
use super::user;

const IMAGES: &str = "/v1/images/generations";

fn cat(steps: usize) -> Value {
    json!({"messages": user(&json!("a cat")), "num_inference_steps": steps, "seed": 1})
}

fn named(instance: &str) -> Settings {
    Settings {
        instance: instance.to_owned(),
        sdapi: true,
        ..Settings::new("m")
    }
}

/// A chat request with these header lines.
fn chat(server: &TestServer, headers: &str, body: &Value) -> Reply {
    super::client::json_with_headers(server.address, "/v1/chat/completions", headers, body)
}

#[test]
fn every_answer_names_the_server() {
    let server = TestServer::with_settings(Pace::Fast, 4, named("pod-1 of \"a\\b\""));
    let expected = Some("pod-1 of \"a\\b\"");
    for path in [
        "/health",
        "/health/ready",
        "/metrics",
        "/v1/status",
        "/v1/unknown",
        "/unknown",
        "/",
        "/sdapi/v1/options",
    ] {
        let reply = get(server.address, path);
        assert_eq!(reply.header("x-kiln-instance"), expected, "{path}");
    }
    let mut stream = cat(1);
    stream["stream"] = json!(true);
    for body in [cat(1), stream, json!({"messages": 1})] {
        let reply = post(server.address, &body);
        assert_eq!(reply.header("x-kiln-instance"), expected, "{body}");
    }
    let status = get(server.address, "/v1/status");
    assert_eq!(status.body["instance"], "pod-1 of \"a\\b\"");
}

#[test]
fn a_server_is_named_after_its_machine() {
    let server = TestServer::start(Pace::Fast, 4);
    let name = Settings::new("m").instance;
    assert!(!name.is_empty());
    let reply = get(server.address, "/health");
    assert_eq!(reply.header("x-kiln-instance"), Some(name.as_str()));
}

#[test]
fn pages_of_other_origins_may_read_the_name_and_the_id() {
    let settings = Settings {
        cors_origins: vec!["http://localhost:3000".parse().unwrap()],
        ..named("pod-1")
    };
    let server = TestServer::with_settings(Pace::Fast, 4, settings);
    let origin = "Origin: http://localhost:3000\r\n";
    let reply = with_headers(server.address, "GET", "/v1/models", origin);
    let exposed = reply.header("access-control-expose-headers").unwrap();
    let exposed: Vec<&str> = exposed.split(',').collect();
    for name in ["x-kiln-instance", "x-request-id", "retry-after"] {
        assert!(exposed.contains(&name), "{exposed:?}");
    }
}

#[test]
fn every_error_has_the_id_of_its_request() {
    let server = TestServer::with_settings(Pace::Fast, 4, named("pod-1"));
    let failing = json!({"prompt": "a cat", "seed": PANIC_IN_STEP});
    for (method, path, body, status) in [
        ("GET", "/unknown", None, 404),
        ("GET", "/v1/unknown", None, 404),
        ("DELETE", "/v1/models", None, 405),
        ("POST", IMAGES, Some(json!({"prompt": 1})), 400),
        ("POST", IMAGES, Some(failing), 500),
        ("POST", "/sdapi/v1/txt2img", Some(json!({"steps": 0})), 400),
        ("GET", "/sdapi/v1/unknown", None, 404),
    ] {
        let body = body.map(|body| body.to_string()).unwrap_or_default();
        let headers = "Content-Type: application/json\r\nX-Request-Id: my id\r\n";
        let content = (headers, body.as_bytes());
        let stream = super::client::send_raw(connect(server.address), method, path, content);
        let reply = receive(stream);
        assert_eq!(reply.status, status, "{method} {path}: {}", reply.body);
        assert_eq!(reply.header("x-request-id"), Some("my id"), "{path}");
        assert_eq!(reply.body["error"]["request_id"], "my id", "{path}");
    }
    // One that the server made.
    let reply = get(server.address, "/v1/unknown");
    let made = reply.header("x-request-id").unwrap();
    assert_eq!(reply.body["error"]["request_id"], made);
    // Pages of other origins are refused before any route.
    let origin = "Origin: http://evil.example\r\n";
    let reply = with_headers(server.address, "POST", "/v1/models", origin);
    assert_eq!(reply.status, 403);
    assert!(reply.body["error"]["request_id"].is_string());
}

#[test]
fn errors_in_streams_have_the_id_of_their_request() {
    let server = TestServer::start(Pace::Fast, 4);
    for (path, mut body) in [
        ("/v1/chat/completions", cat(2)),
        (IMAGES, json!({"prompt": "a cat"})),
    ] {
        body["stream"] = json!(true);
        body["seed"] = json!(PANIC_IN_STEP);
        let headers = "X-Request-Id: mine\r\n";
        let reply = super::client::json_with_headers(server.address, path, headers, &body);
        assert_eq!(reply.status, 200);
        let text = String::from_utf8(reply.bytes).unwrap();
        let mut data = text.lines().filter_map(|line| line.strip_prefix("data: "));
        let error = data.find_map(|data| {
            let data: Value = serde_json::from_str(data).ok()?;
            data.get("error").cloned()
        });
        assert_eq!(error.unwrap()["request_id"], "mine", "{path}: {text}");
    }
}

#[test]
fn the_load_is_reported_to_who_asks_for_it() {
    let server = TestServer::start(Pace::Slow, 3);
    let ask = |format: &str| {
        let headers = format!("Endpoint-Load-Metrics-Format: {format}\r\n");
        let reply = with_headers(server.address, "GET", "/v1/models", &headers);
        assert_eq!(reply.status, 200);
        reply.header("endpoint-load-metrics").map(str::to_owned)
    };
    assert_eq!(
        get(server.address, "/v1/models").header("endpoint-load-metrics"),
        None
    );
    for unknown in ["BIN", "", "xml", "TEXT JSON"] {
        assert_eq!(ask(unknown), None, "{unknown}");
    }
    assert_eq!(
        ask("TEXT").unwrap(),
        "TEXT application_utilization=0, named_metrics.num_requests_waiting=0, \
         named_metrics.num_requests_running=0, named_metrics.queue_wait_seconds=0"
    );
    // The speed is measured.
    assert_eq!(post(server.address, &cat(2)).status, 200);
    let running = send(
        connect(server.address),
        "POST",
        "/v1/chat/completions",
        // Less than twice as large as a default request, which would overtake it otherwise.
        Some(&cat(90)),
    );
    let before = server.steps();
    server.wait_for_steps(before + 1);
    let text = ask("text").unwrap();
    assert!(
        text.starts_with("TEXT application_utilization=0.25, "),
        "{text}"
    );
    assert!(
        text.contains("named_metrics.num_requests_running=1"),
        "{text}"
    );
    let json = ask("json").unwrap();
    let json: Value = serde_json::from_str(json.strip_prefix("JSON ").unwrap()).unwrap();
    assert_eq!(json["application_utilization"], 0.25);
    assert_eq!(json["named_metrics"]["num_requests_running"], 1.0);
    assert_eq!(json["named_metrics"]["num_requests_waiting"], 0.0);
    assert!(
        json["named_metrics"]["queue_wait_seconds"].as_f64() > Some(0.0),
        "{json}"
    );
    // Errors and answers of requests have it too, with the load at the answer.
    let headers = "endpoint-load-metrics-format: TEXT\r\n";
    let reply = chat(&server, headers, &json!({"messages": 1}));
    assert_eq!(reply.status, 400);
    assert!(reply.header("endpoint-load-metrics").is_some());
    drop(running);
}

/// The value of a sample of `/metrics`.
fn metric(server: &TestServer, name: &str) -> Option<f64> {
    let text = String::from_utf8(get(server.address, "/metrics").bytes).unwrap();
    let mut lines = text.lines().filter_map(|line| line.split_once(' '));
    lines.find_map(|(found, value)| (found == name).then(|| value.parse().unwrap()))
}

#[test]
fn the_metrics_say_what_the_server_is() {
    let server = TestServer::with_settings(Pace::Fast, 4, named("pod \"1\"\\"));
    let text = String::from_utf8(get(server.address, "/metrics").bytes).unwrap();
    let version = env!("CARGO_PKG_VERSION");
    let start = format!("kiln_info{{model=\"m\",version=\"{version}");
    let end = "\",backend=\"test\",device=\"test:0 (fake)\",instance=\"pod \\\"1\\\"\\\\\"} 1";
    let is_info = |line: &str| line.starts_with(&start) && line.ends_with(end);
    assert!(text.lines().any(is_info), "no {start}…{end} in {text}");
}

#[test]
fn the_wait_is_that_of_a_default_request() {
    let server = TestServer::start(Pace::Slow, 8);
    let wait = || metric(&server, "kiln_queue_wait_seconds");
    assert_eq!(wait(), Some(0.0), "an idle server");
    assert_eq!(post(server.address, &cat(2)).status, 200);
    assert_eq!(wait(), Some(0.0), "an idle server after a request");
    let long = |steps| {
        send(
            connect(server.address),
            "POST",
            "/v1/chat/completions",
            Some(&cat(steps)),
        )
    };
    // 50 steps of 10 ms and more each.
    let running = [long(50), long(50), long(50)];
    let before = server.steps();
    server.wait_for_steps(before + 1);
    server.wait_for_waiting(2);
    let three = wait().unwrap();
    assert!(three > 0.5, "{three}");
    let estimate = post_to(
        server.address,
        "/v1/images/estimate",
        &json!({"prompt": ""}),
    );
    let estimate = estimate.body["estimated_wait"].as_f64().unwrap();
    assert!(
        estimate <= three && estimate > 0.25,
        "{estimate} of {three}"
    );
    for reply in running.map(receive) {
        assert_eq!(reply.status, 200);
    }
    assert_eq!(wait(), Some(0.0));
    server.engine.drain(Duration::from_secs(1));
    assert_eq!(wait(), None, "no request is taken");
}

#[test]
fn a_server_without_a_model_has_metrics_and_a_name() {
    let server = TestServer::without_model(named("pod-1"));
    let reply = with_headers(
        server.address,
        "GET",
        "/metrics",
        "Endpoint-Load-Metrics-Format: TEXT\r\n",
    );
    assert_eq!(reply.status, 200);
    assert_eq!(reply.header("x-kiln-instance"), Some("pod-1"));
    assert_eq!(reply.header("endpoint-load-metrics"), None);
    assert_eq!(metric(&server, "kiln_ready"), Some(0.0));
    assert_eq!(metric(&server, "kiln_queue_wait_seconds"), None);
}

/// The names of vLLM, which routers read, are the only ones that promtool would have otherwise.
#[test]
fn promtool_reads_all_metrics() {
    let server = TestServer::with_settings(Pace::Fast, 4, named("pod \"1\"\\"));
    assert_eq!(post(server.address, &cat(2)).status, 200);
    let page = get(server.address, "/metrics").bytes;
    let promtool = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let Ok(mut promtool) = promtool else {
        eprintln!("promtool is not installed");
        return;
    };
    promtool.stdin.take().unwrap().write_all(&page).unwrap();
    let output = promtool.wait_with_output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    let mut lines = said.lines();
    assert!(
        lines.all(|line| line.starts_with("vllm:") && line.ends_with("':'")),
        "{said}"
    );
}

/// A connection with keep-alive.
struct Client {
    stream: TcpStream,
    answers: BufReader<TcpStream>,
}

impl Client {
    fn new(server: &TestServer) -> Self {
        let stream = connect(server.address);
        let answers = BufReader::new(stream.try_clone().unwrap());
        Self { stream, answers }
    }

    fn send(&mut self, method: &str, path: &str, body: &str) {
        let request = format!(
            "{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n\
             Content-Length: {}\r\n\r\n{body}",
            body.len()
        );
        self.stream.write_all(request.as_bytes()).unwrap();
    }

    /// The head of the next answer, in lower case. Its body is read too, if its length is told.
    fn answer(&mut self) -> String {
        let (mut head, mut length) = (String::new(), 0);
        loop {
            let start = head.len();
            assert_ne!(self.answers.read_line(&mut head).unwrap(), 0, "{head}");
            let line = head[start..].to_lowercase();
            if let Some(value) = line.strip_prefix("content-length: ") {
                length = value.trim().parse().unwrap();
            }
            if line == "\r\n" {
                break;
            }
        }
        self.answers.read_exact(&mut vec![0; length]).unwrap();
        head.to_lowercase()
    }

    fn is_closed(&mut self) -> bool {
        self.answers.read(&mut [0]).is_ok_and(|read| read == 0)
    }
}

const CLOSE: &str = "connection: close\r\n";

#[test]
fn a_server_that_leaves_takes_requests_and_closes_their_connections() {
    let server = TestServer::start(Pace::Slow, 4);
    // The speed is measured.
    assert_eq!(post(server.address, &cat(1)).status, 200);
    let mut idle = Client::new(&server);
    idle.send("GET", "/health/ready", "");
    assert!(!idle.answer().contains(CLOSE));
    let mut busy = Client::new(&server);
    busy.send(
        "POST",
        IMAGES,
        r#"{"prompt": "a cat", "num_inference_steps": 20}"#,
    );
    server.wait_for_steps(2);
    server.leave();

    let ready = get(server.address, "/health/ready");
    assert_eq!(
        (ready.status, &ready.body["status"]),
        (503, &json!("draining"))
    );
    assert_eq!(get(server.address, "/health/live").status, 200);
    assert_eq!(get(server.address, "/v1/status").body["state"], "draining");
    assert_eq!(metric(&server, "kiln_ready"), Some(0.0));
    assert!(metric(&server, "kiln_queue_wait_seconds").is_some());
    let stream = r#"{"prompt": "a cat", "num_inference_steps": 1, "stream": true}"#;
    for (method, path, body, status) in [
        (
            "POST",
            IMAGES,
            r#"{"prompt": "a cat", "num_inference_steps": 1}"#,
            "200",
        ),
        ("POST", IMAGES, stream, "200"),
        ("POST", IMAGES, "{", "400"),
        ("GET", "/unknown", "", "404"),
        ("GET", "/health/ready", "", "503"),
    ] {
        let mut client = Client::new(&server);
        client.send(method, path, body);
        let mut answer = String::new();
        // Until the server closes the connection.
        client.answers.read_to_string(&mut answer).unwrap();
        let answer = answer.to_lowercase();
        assert!(
            answer.starts_with(&format!("http/1.1 {status}")),
            "{path}: {answer}"
        );
        let head = answer.split("\r\n\r\n").next().unwrap();
        assert!(format!("{head}\r\n").contains(CLOSE), "{path}: {head}");
    }
    // Requests that were sent before, and connections that were idle.
    let answer = busy.answer();
    assert!(
        answer.starts_with("http/1.1 200") && answer.contains(CLOSE),
        "{answer}"
    );
    assert!(busy.is_closed());
    idle.send(
        "POST",
        IMAGES,
        r#"{"prompt": "a cat", "num_inference_steps": 1}"#,
    );
    let answer = idle.answer();
    assert!(
        answer.starts_with("http/1.1 200") && answer.contains(CLOSE),
        "{answer}"
    );
    assert!(idle.is_closed());
}

#[test]
fn requests_that_a_lost_device_did_not_run_are_for_another_server() {
    let server = TestServer::start(Pace::Slow, 8);
    let first = send(
        connect(server.address),
        "POST",
        "/v1/chat/completions",
        Some(&cat(10)),
    );
    server.wait_for_steps(1);
    let mut lost = cat(1000);
    lost["seed"] = json!(LOSE_DEVICE);
    let waiting = |body: &Value| {
        send(
            connect(server.address),
            "POST",
            "/v1/chat/completions",
            Some(body),
        )
    };
    let lost = waiting(&lost);
    server.wait_for_waiting(1);
    let after = [waiting(&cat(1000)), waiting(&cat(1000))];
    server.wait_for_waiting(3);
    assert_eq!(receive(first).status, 200);
    // It may be at fault, so it must not go from server to server.
    assert_eq!(receive(lost).status, 500);
    for reply in after.map(receive) {
        assert_eq!(reply.status, 503, "{}", reply.body);
        assert!(reply.header("retry-after").is_some());
        let message = reply.body["error"]["message"].as_str().unwrap();
        assert!(
            message.contains("the device failed: test:1 (fake)"),
            "{message}"
        );
    }
}
