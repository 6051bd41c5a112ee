//! Durable jobs from their submission to their files, by the binary with the demo model.

use std::net::SocketAddr;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use base64::Engine as _;
use kiln::server::{Role, Settings};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use super::client::{Reply, connect, get, post_to, receive, send, with_headers};
use super::pipeline::Pace;
use super::real_model::Server;
use super::server::TestServer;

const JOBS: &str = "/v1/images/jobs";
const GENERATIONS: &str = "/v1/images/generations";

/// A server whose jobs are in this folder. Steps have one request each, so that files do not depend on
/// what else is generated.
fn start(folder: &Path, args: &[&str]) -> Server {
    let folder = folder.to_str().unwrap();
    let first = ["--no-warm-up", "--max-step-tokens", "0", "--jobs", folder];
    Server::start_with(None, &[&first, args].concat())
}

/// A request of so many steps that it does not end in a test.
fn endless() -> Value {
    json!({"prompt": "a red circle", "num_inference_steps": 1000, "seed": 1})
}

fn short(seed: u64) -> Value {
    json!({"prompt": "a red circle", "num_inference_steps": 4, "seed": seed, "size": "64x64"})
}

/// Submits a job. Returns its id.
fn submit(address: SocketAddr, body: &Value) -> String {
    let reply = post_to(address, JOBS, body);
    assert_eq!(reply.status, 202, "{}", reply.body);
    reply.body["id"].as_str().unwrap().to_owned()
}

fn job(address: SocketAddr, id: &str) -> Value {
    let reply = get(address, &format!("{JOBS}/{id}"));
    assert_eq!(reply.status, 200, "{}", reply.body);
    reply.body
}

/// Waits until a job has this status.
fn wait_for(address: SocketAddr, id: &str, status: &str) -> Value {
    let start = Instant::now();
    loop {
        let job = job(address, id);
        if job["status"] == status {
            return job;
        }
        assert!(start.elapsed() < Duration::from_mins(2), "{job}");
        thread::sleep(Duration::from_millis(20));
    }
}

fn content(address: SocketAddr, id: &str, index: usize) -> Reply {
    let reply = get(address, &format!("{JOBS}/{id}/content?index={index}"));
    assert_eq!(reply.status, 200, "{}", reply.body);
    reply
}

/// The value of a metric, which must be there.
fn metric(address: SocketAddr, name: &str) -> f64 {
    let text = String::from_utf8(get(address, "/metrics").bytes).unwrap();
    let mut values = text.lines().filter_map(|line| line.strip_prefix(name));
    let value = values.find_map(|rest| rest.trim().parse().ok());
    value.unwrap_or_else(|| panic!("no {name} in {text}"))
}

fn wait_for_metric(address: SocketAddr, name: &str, expected: f64) {
    let start = Instant::now();
    while (metric(address, name) - expected).abs() > 1e-9 {
        let now = metric(address, name);
        assert!(
            start.elapsed() < Duration::from_mins(1),
            "{name} is {now}, not {expected}"
        );
        thread::sleep(Duration::from_millis(20));
    }
}

fn signal(server: &Server, signal: Signal) {
    let pid = Pid::from_child(&server.process);
    kill_process(pid, signal).unwrap();
}

/// Sends SIGTERM and waits for the end.
fn end(mut server: Server) {
    signal(&server, Signal::TERM);
    let start = Instant::now();
    while server.process.try_wait().unwrap().is_none() {
        assert!(
            start.elapsed() < Duration::from_mins(1),
            "the server does not end"
        );
        thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn the_files_of_a_job_are_those_of_a_request_to_the_byte() {
    let folder = tempfile::tempdir().unwrap();
    let server = start(folder.path(), &[]);
    let address = server.address;
    let plain = json!({
        "prompt": "a large red circle on a blue background", "seed": 7, "n": 2, "model": "demo",
        "num_inference_steps": 3, "size": "96x64", "negative_prompt": " ", "true_cfg_scale": 3.5,
    });
    let cached = json!({
        "prompt": "a green square", "seed": u64::MAX, "num_inference_steps": 10, "size": "64x64",
        "cache": "auto", "output_format": "jpeg", "output_compression": 80,
    });
    let adapted = json!({
        "prompt": "a yellow star", "seed": 3, "num_inference_steps": 2, "size": "64x64",
        "lora": "stripes", "output_format": "webp",
    });
    for (body, extension) in [(plain, "png"), (cached, "jpeg"), (adapted, "webp")] {
        let reply = post_to(address, GENERATIONS, &body);
        assert_eq!(reply.status, 200, "{}", reply.body);
        let images = reply.body["data"].as_array().unwrap();
        let id = submit(address, &body);
        let job = wait_for(address, &id, "completed");
        assert_eq!(job["seed"], body["seed"]);
        assert_eq!(job["progress"], 100);
        assert_eq!(job["attempt"], 1);
        assert_eq!(job["files"].as_array().unwrap().len(), images.len());
        for (index, image) in images.iter().enumerate() {
            let expected = base64::engine::general_purpose::STANDARD
                .decode(image["b64_json"].as_str().unwrap())
                .unwrap();
            let file = content(address, &id, index);
            let media_type = format!("image/{extension}");
            assert_eq!(file.header("content-type"), Some(media_type.as_str()));
            assert!(file.bytes == expected, "file {index} of {body} differs");
        }
    }
    for (name, value) in [
        ("kiln_jobs_submitted_total", 3.0),
        ("kiln_jobs_attempts_total", 3.0),
        ("kiln_jobs_ended_total{outcome=\"completed\"}", 3.0),
        ("kiln_jobs_ended_total{outcome=\"failed\"}", 0.0),
        ("kiln_jobs_failed_total{reason=\"worker_lost\"}", 0.0),
        ("kiln_webhooks_total{outcome=\"delivered\"}", 0.0),
    ] {
        assert!((metric(address, name) - value).abs() < 1e-9, "{name}");
    }
    // The store is asked every few seconds.
    for name in [
        "kiln_jobs_queued",
        "kiln_jobs_in_progress",
        "kiln_jobs_oldest_queued_seconds",
    ] {
        wait_for_metric(address, name, 0.0);
    }
}

#[test]
fn a_server_without_jobs_has_no_metrics_of_them() {
    let server = TestServer::start(Pace::Fast, 4);
    let text = String::from_utf8(get(server.address, "/metrics").bytes).unwrap();
    assert!(
        !text.contains("kiln_jobs_") && !text.contains("kiln_webhooks"),
        "{text}"
    );
}

#[test]
fn a_cancelled_job_frees_the_device() {
    let folder = tempfile::tempdir().unwrap();
    let server = start(folder.path(), &[]);
    let address = server.address;
    let id = submit(address, &endless());
    wait_for(address, &id, "in_progress");
    wait_for_metric(address, "kiln_requests_running", 1.0);
    let reply = with_headers(address, "DELETE", &format!("{JOBS}/{id}"), "");
    assert_eq!(
        (reply.status, &reply.body["status"]),
        (200, &json!("cancelled"))
    );
    wait_for_metric(address, "kiln_requests_running", 0.0);
    assert!(metric(address, "kiln_steps_total") < 900.0);
    let next = submit(address, &short(1));
    wait_for(address, &next, "completed");
    assert_eq!(job(address, &id)["status"], "cancelled");
    let cancelled = metric(address, "kiln_jobs_ended_total{outcome=\"cancelled\"}");
    assert!((cancelled - 1.0).abs() < 1e-9);
}

#[test]
fn jobs_take_no_place_of_the_queue_and_requests_do_not_wait_for_all_of_them() {
    let folder = tempfile::tempdir().unwrap();
    // A second request would be refused.
    let server = start(folder.path(), &["--max-queue", "0"]);
    let address = server.address;
    let mut long = short(0);
    long["num_inference_steps"] = json!(60);
    let ids: Vec<String> = (0..8).map(|_| submit(address, &long)).collect();
    wait_for(address, &ids[0], "in_progress");
    let mut between = 0;
    while job(address, &ids[7])["status"] != "completed" {
        let reply = post_to(address, GENERATIONS, &long);
        assert_eq!(reply.status, 200, "{}", reply.body);
        between += 1;
    }
    // Jobs and requests take turns.
    assert!(
        (2..=12).contains(&between),
        "{between} requests were generated"
    );
    for id in &ids {
        assert_eq!(job(address, id)["status"], "completed");
    }
}

#[test]
fn the_jobs_of_a_server_that_ends_are_generated_after_its_restart() {
    let folder = tempfile::tempdir().unwrap();
    let server = start(folder.path(), &[]);
    let mut running = short(0);
    running["num_inference_steps"] = json!(60);
    let mut ids = vec![submit(server.address, &running)];
    wait_for(server.address, &ids[0], "in_progress");
    ids.extend((1..5).map(|seed| submit(server.address, &short(seed))));
    end(server);

    let server = start(folder.path(), &["--drain-timeout", "0"]);
    for id in &ids {
        let job = wait_for(server.address, id, "completed");
        // What was released has lost no attempt.
        assert_eq!(job["attempt"], 1, "{job}");
    }
    // Without time to finish, the running job is released.
    let id = submit(server.address, &endless());
    wait_for(server.address, &id, "in_progress");
    wait_for_metric(server.address, "kiln_requests_running", 1.0);
    end(server);

    let server = start(folder.path(), &["--drain-timeout", "600"]);
    let again = wait_for(server.address, &id, "in_progress");
    assert_eq!(again["attempt"], 1, "{again}");
    wait_for_metric(server.address, "kiln_requests_running", 1.0);
    // A second signal ends it at once.
    signal(&server, Signal::TERM);
    while get(server.address, "/health/ready").status == 200 {
        thread::sleep(Duration::from_millis(5));
    }
    end(server);
    let server = start(folder.path(), &[]);
    let again = wait_for(server.address, &id, "in_progress");
    assert_eq!(again["attempt"], 1, "{again}");
}

#[test]
fn a_second_server_cannot_have_the_folder() {
    let folder = tempfile::tempdir().unwrap();
    let _server = start(folder.path(), &[]);
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_kiln"))
        .args(["serve", "--port", "0", "--jobs"])
        .arg(folder.path())
        .output()
        .unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    let named = folder.path().to_str().unwrap();
    let line = stderr.lines().find(|line| line.contains("error"));
    assert!(line.is_some_and(|line| line.contains(named)), "{stderr}");
}

#[test]
fn a_server_of_the_role_api_generates_nothing_and_is_ready() {
    let settings = Settings {
        role: Role::Api,
        ..Settings::new("test/model")
    };
    let server = TestServer::without_engine(settings);
    assert_eq!(get(server.address, "/health/ready").status, 200);
    assert_eq!(get(server.address, "/v1/models").status, 200);
    let status = get(server.address, "/v1/status");
    assert_eq!((status.status, &status.body["device"]), (200, &Value::Null));
    let body = json!({"prompt": "a cat"});
    for path in [GENERATIONS, "/v1/images/estimate"] {
        let reply = post_to(server.address, path, &body);
        assert_eq!(reply.status, 400, "{}", reply.body);
        let message = reply.body["error"]["message"].as_str().unwrap();
        assert!(
            message.contains("--role api") && message.contains(JOBS),
            "{message}"
        );
    }
}

#[test]
fn a_server_of_the_role_worker_has_the_routes_of_monitoring_only() {
    let settings = Settings {
        role: Role::Worker,
        ..Settings::new("test/model")
    };
    let server = TestServer::with_settings(Pace::Fast, 4, settings);
    for path in [
        "/health",
        "/health/live",
        "/health/ready",
        "/metrics",
        "/version",
    ] {
        assert_eq!(get(server.address, path).status, 200, "{path}");
    }
    for path in [
        "/",
        "/v1/models",
        "/v1/images/jobs",
        "/docs",
        "/openapi.json",
    ] {
        let reply = get(server.address, path);
        assert_eq!(reply.status, 404, "{path}");
        let message = reply.body["error"]["message"].as_str().unwrap();
        assert!(message.contains("--role worker"), "{message}");
    }
    let reply = receive(send(
        connect(server.address),
        "POST",
        GENERATIONS,
        Some(&json!({"prompt": "a cat"})),
    ));
    assert_eq!(reply.status, 404);
}

/// Writes an adapter file with another text in its header, and so with another hash.
fn change_adapter(path: &Path) {
    let file = std::fs::read(path).unwrap();
    let length = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    let (header, rest) = file[8..].split_at(length);
    let mut header: Value = serde_json::from_slice(header).unwrap();
    header["__metadata__"]["note"] = json!("changed");
    let header = header.to_string();
    let length = (header.len() as u64).to_le_bytes();
    std::fs::write(path, [&length, header.as_bytes(), rest].concat()).unwrap();
}

#[test]
fn a_job_whose_adapter_has_changed_fails() {
    let (folder, adapters) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/demo/lora/stripes.safetensors");
    let [kept, changed, gone] =
        ["kept", "changed", "gone"].map(|name| adapters.path().join(format!("{name}.safetensors")));
    for file in [&kept, &changed, &gone] {
        std::fs::copy(&root, file).unwrap();
    }
    let lora_dir = adapters.path().to_str().unwrap();
    let server = start(
        folder.path(),
        &["--lora-dir", lora_dir, "--enable-lora-updates"],
    );
    let address = server.address;
    // One job runs, and one is ahead; the others stay in the store.
    let first = [(); 2].map(|()| submit(address, &endless()));
    wait_for(address, &first[0], "in_progress");
    wait_for(address, &first[1], "in_progress");
    let later = ["kept", "changed", "gone"].map(|name| {
        let mut body = short(5);
        body["lora"] = json!({"name": name, "scale": 0.5});
        submit(address, &body)
    });
    change_adapter(&changed);
    std::fs::remove_file(&gone).unwrap();
    let refreshed = post_to(address, "/v1/refresh_lora_adapters", &json!({}));
    assert_eq!(refreshed.status, 200);
    for id in &first {
        with_headers(address, "DELETE", &format!("{JOBS}/{id}"), "");
    }
    wait_for(address, &later[0], "completed");
    for (id, code, name) in [
        (&later[1], "adapter_changed", "changed"),
        (&later[2], "adapter_unavailable", "gone"),
    ] {
        let job = wait_for(address, id, "failed");
        assert_eq!(job["error"]["code"], code);
        let message = job["error"]["message"].as_str().unwrap();
        assert!(message.contains(&format!("{name:?}")), "{message}");
        let failed = format!("kiln_jobs_failed_total{{reason=\"{code}\"}}");
        assert!((metric(address, &failed) - 1.0).abs() < 1e-9);
    }
}
