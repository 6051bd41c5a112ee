//! Errors of jobs: those of generations, of ids, of the store, and of a server without jobs.

use kiln::jobs::webhook::WebhookSettings;
use kiln::server::Settings;
use serde_json::{Value, json};

use super::super::client;
use super::super::pipeline::Pace;
use super::super::server::TestServer;
use super::{PATH, Site, error_of, path_of, small};

#[test]
fn a_job_is_refused_with_the_errors_of_a_generation() {
    let site = Site::start();
    let address = site.server.address;
    for (body, param) in [
        (json!({}), "prompt"),
        (json!({"prompt": 1}), "prompt"),
        (json!({"prompt": "a", "size": "17"}), "size"),
        (json!({"prompt": "a", "size": "1x1"}), "size"),
        (json!({"prompt": "a", "height": 0}), "height"),
        (
            json!({"prompt": "a", "num_inference_steps": 0}),
            "num_inference_steps",
        ),
        (json!({"prompt": "a", "n": 11}), "n"),
        (json!({"prompt": "a", "seed": -2}), "seed"),
        (json!({"prompt": "a", "cfg_scale": 21}), "cfg_scale"),
        (json!({"prompt": "a", "loras": "none"}), "loras"),
        (
            json!({"prompt": "a", "extra_body": {"width": "x"}}),
            "width",
        ),
        (
            json!({"prompt": "a", "guidance_scale": 7.5}),
            "guidance_scale",
        ),
        (json!({"prompt": "a", "unknown": 1}), "unknown"),
        (
            json!({"prompt": "a", "output_format": "gif"}),
            "output_format",
        ),
        (
            json!({"prompt": "a", "response_format": "x"}),
            "response_format",
        ),
        (
            json!({"prompt": "a", "cache": "fast", "num_inference_steps": 2}),
            "cache",
        ),
        (json!({"prompt": "x".repeat(70_000)}), "prompt"),
    ] {
        let expected = client::post_to(address, "/v1/images/generations", &body);
        let message = error_of(&site.post(&body), 400, Some(param));
        assert_eq!(message, error_of(&expected, 400, Some(param)));
    }
    // Nothing was stored.
    assert_eq!(site.get(PATH).body["data"], json!([]));
}

#[test]
fn what_a_job_cannot_do_is_named() {
    let site = Site::start();
    for (key, value) in [("stream", json!(true)), ("deadline_ms", json!(1000))] {
        let mut body = small();
        body[key] = value;
        error_of(&site.post(&body), 400, Some(key));
    }
    let mut body = small();
    body["partial_images"] = json!(2);
    error_of(&site.post(&body), 400, Some("partial_images"));
    for headers in ["Content-Type: text/plain\r\n", "Content-Encoding: gzip\r\n"] {
        let content = (headers, b"{}".as_slice());
        let stream = super::connect(site.server.address);
        let reply = super::receive(super::send_raw(stream, "POST", PATH, content));
        assert!([400, 415].contains(&reply.status), "{}", reply.status);
        assert!(reply.body["error"]["message"].is_string());
    }
}

#[test]
fn a_webhook_needs_an_allowed_host() {
    let site = Site::start();
    let with_webhook = |webhook: Value| {
        let mut body = small();
        body["webhook"] = webhook;
        body
    };
    let body = with_webhook(json!("https://example.org/hook"));
    let message = error_of(&site.post(&body), 400, Some("webhook"));
    assert!(message.contains("--webhook-host"), "{message}");
    error_of(&site.post(&with_webhook(json!(1))), 400, Some("webhook"));
    assert_eq!(site.post(&with_webhook(Value::Null)).status, 202);
    // Only jobs have one.
    let address = site.server.address;
    let reply = client::post_to(address, "/v1/images/generations", &body);
    let message = error_of(&reply, 400, Some("webhook"));
    assert!(message.contains(PATH), "{message}");

    let settings = Settings {
        webhooks: WebhookSettings {
            hosts: vec!["example.org".parse().unwrap()],
            secrets: vec!["whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw".parse().unwrap()],
            allow_private: false,
        },
        ..Settings::new("test/model")
    };
    let site = Site::with(settings, |_| {});
    let job = site.submit(&body);
    assert_eq!(job["webhook"], "https://example.org/hook");
    assert_eq!(
        site.take().job().webhook.as_deref(),
        Some("https://example.org/hook")
    );
    for url in ["https://example.com/hook", "ftp://example.org/", "hook", ""] {
        error_of(&site.post(&with_webhook(json!(url))), 400, Some("webhook"));
    }
}

#[test]
fn ids_that_no_store_makes_are_unknown() {
    let site = Site::start();
    let long = "x".repeat(3000);
    for id in [
        "job-00c0ffee00c0ffee00c0ffee",
        "job-",
        "x",
        "JOB-00c0ffee00c0ffee00c0ffee",
        "..",
        "%2e%2e%2f",
        "%FF",
        "%00",
        "a%20b",
        "%F0%9F%A6%8A",
        &long,
    ] {
        let path = path_of(id);
        for (method, path) in [
            ("GET", path.clone()),
            ("DELETE", path.clone()),
            ("GET", format!("{path}/content")),
            ("POST", format!("{path}/cancel")),
        ] {
            let message = error_of(&site.ask(method, &path, "", None), 404, None);
            assert!(message.len() < 500, "{message}");
        }
    }
    for (method, path) in [
        ("PUT", PATH.to_owned()),
        ("DELETE", PATH.to_owned()),
        ("POST", path_of("job-00c0ffee00c0ffee00c0ffee")),
        (
            "GET",
            format!("{}/cancel", path_of("job-00c0ffee00c0ffee00c0ffee")),
        ),
        (
            "POST",
            format!("{}/content", path_of("job-00c0ffee00c0ffee00c0ffee")),
        ),
    ] {
        error_of(&site.ask(method, &path, "", None), 405, None);
    }
}

#[test]
fn a_server_without_jobs_names_the_option() {
    let server = TestServer::start(Pace::Fast, 4);
    let path = path_of("job-00c0ffee00c0ffee00c0ffee");
    for (method, path) in [
        ("POST", PATH.to_owned()),
        ("GET", PATH.to_owned()),
        ("GET", path.clone()),
        ("DELETE", path.clone()),
        ("GET", format!("{path}/content")),
        ("POST", format!("{path}/cancel")),
    ] {
        let stream = super::connect(server.address);
        let reply = super::receive(client::send(stream, method, &path, Some(&small())));
        let message = error_of(&reply, 404, None);
        assert!(message.contains("--jobs"), "{message}");
        assert!(message.contains(&path), "{message}");
    }
}

#[test]
fn a_full_store_is_429_with_a_time_to_retry() {
    let site = Site::with(Settings::new("test/model"), |settings| {
        settings.max_queued = 1;
    });
    let key = "Idempotency-Key: a\r\n";
    assert_eq!(site.ask("POST", PATH, key, Some(&small())).status, 202);
    let reply = site.post(&small());
    let message = error_of(&reply, 429, None);
    assert!(
        message.contains("1 jobs are waiting") && message.contains("try again"),
        "{message}"
    );
    assert_eq!(reply.body["error"]["type"], "rate_limit_error");
    assert!(reply.header("retry-after").is_some());
    // A repeated request is no new job.
    assert_eq!(site.ask("POST", PATH, key, Some(&small())).status, 200);
    let lease = site.take();
    assert_eq!(site.post(&small()).status, 202);
    drop(lease);
}
