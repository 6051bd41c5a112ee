//! Jobs from their submission to their end.

use kiln::jobs::{JobFailure, JobId, Progress, Revoked, TraceContext};
use kiln::server::Settings;
use serde_json::{Value, json};

use super::super::client::with_headers;
use super::super::pipeline::Pace;
use super::super::server::TestServer;
use super::{PATH, Site, error_of, id, path_of, small};

fn keys(object: &Value) -> Vec<&str> {
    object
        .as_object()
        .unwrap()
        .keys()
        .map(String::as_str)
        .collect()
}

#[test]
fn a_job_goes_from_queued_to_completed() {
    let site = Site::start();
    let body = json!({
        "model": "test/model", "prompt": "a cat", "negative_prompt": "rain", "size": "64x48", "n": 2,
        "num_inference_steps": 4, "true_cfg_scale": 2.5, "output_format": "webp", "output_compression": 80,
        "seed": u64::MAX, "user": "me", "response_format": "url",
    });
    let reply = site.post(&body);
    assert_eq!(reply.status, 202, "{}", reply.body);
    let job = reply.body.clone();
    let path = path_of(&id(&job));
    assert_eq!(reply.header("location"), Some(path.as_str()));
    assert_eq!(reply.header("preference-applied"), None);
    assert_eq!(
        keys(&job),
        [
            "attempt",
            "completed_at",
            "created_at",
            "error",
            "expires_at",
            "files",
            "id",
            "instance",
            "model",
            "object",
            "progress",
            "queue_position",
            "request",
            "seed",
            "started_at",
            "status",
            "webhook",
        ]
    );
    assert_eq!(job["object"], "image.job");
    assert_eq!(job["status"], "queued");
    assert_eq!(job["seed"], u64::MAX);
    assert_eq!(job["model"], "test/model");
    assert_eq!(
        (&job["progress"], &job["queue_position"]),
        (&json!(0), &json!(0))
    );
    assert_eq!((&job["attempt"], &job["files"]), (&json!(0), &json!([])));
    for absent in [
        "started_at",
        "completed_at",
        "expires_at",
        "error",
        "webhook",
        "instance",
    ] {
        assert!(job[absent].is_null(), "{absent}");
    }
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    assert!(
        now.unwrap()
            .as_secs()
            .abs_diff(job["created_at"].as_u64().unwrap())
            < 60
    );
    assert_eq!(
        job["request"],
        json!({
            "prompt": "a cat", "negative_prompt": "rain", "size": "64x48", "num_inference_steps": 4, "n": 2,
            "true_cfg_scale": 2.5, "output_format": "webp", "output_compression": 80,
        })
    );
    assert_eq!(site.get(&path).body, job);

    let lease = site.take();
    let stored = &lease.job().request;
    assert_eq!(stored.request.noise.seed, u64::MAX);
    assert_eq!(stored.request.prompt, "a cat");
    let job = site.object(lease.job().id.as_str());
    assert_eq!(
        (&job["status"], &job["attempt"]),
        (&json!("in_progress"), &json!(1))
    );
    assert_eq!(job["instance"], "here");
    assert!(job["started_at"].is_u64() && job["queue_position"].is_null());
    lease.report(Progress { done: 3, total: 4 });
    assert_eq!(site.get(&path).body["progress"], 75);
    // Only a job whose files are stored has 100.
    lease.report(Progress { done: 4, total: 4 });
    assert_eq!(site.get(&path).body["progress"], 99);

    site.complete(lease, &[b"first", b"second"]);
    let job = site.get(&path).body;
    assert_eq!(
        (&job["status"], &job["progress"]),
        (&json!("completed"), &json!(100))
    );
    let (ended, expires) = (
        job["completed_at"].as_u64().unwrap(),
        job["expires_at"].as_u64(),
    );
    assert!(expires.unwrap().abs_diff(ended + 24 * 3600) <= 1);
    let files = job["files"].as_array().unwrap();
    assert_eq!(files.len(), 2);
    assert_eq!(files[1]["index"], 1);
    assert_eq!(
        (&files[1]["media_type"], &files[1]["bytes"]),
        (&json!("image/png"), &json!(6))
    );
    assert_eq!(
        files[1]["sha256"],
        "16367aacb67a4a017c8da8ab95682ccb390863780f7114dda0a0e0c55644c7c4"
    );
    let url = files[1]["url"].as_str().unwrap();
    assert_eq!(url, format!("{path}/content?index=1"));
    assert_eq!(site.get(url).bytes, b"second");
}

#[test]
fn a_job_without_a_seed_gets_one_that_stays() {
    let site = Site::start();
    let seeds = [(), ()].map(|()| site.submit(&small())["seed"].as_u64().unwrap());
    assert_ne!(seeds[0], seeds[1]);
    let leases = [site.take(), site.take()];
    for (lease, seed) in leases.iter().zip(seeds) {
        assert_eq!(lease.job().request.request.noise.seed, seed);
    }
}

#[test]
fn a_failed_job_says_why() {
    let site = Site::start();
    let id = site.job();
    let failure = JobFailure {
        code: "adapter_changed".to_owned(),
        message: "the file of adapter \"ink\" has changed".to_owned(),
    };
    site.run(site.take().fail(failure)).unwrap();
    let job = site.object(&id);
    assert_eq!(job["status"], "failed");
    let message = "the file of adapter \"ink\" has changed";
    assert_eq!(
        job["error"],
        json!({"code": "adapter_changed", "message": message})
    );
    assert!(job["completed_at"].is_u64() && job["expires_at"].is_u64());
}

#[test]
fn a_queued_job_is_cancelled_and_then_deleted() {
    let site = Site::start();
    let (first, second) = (site.job(), site.job());
    assert_eq!(site.object(&second)["queue_position"], 1);
    let cancel = format!("{}/cancel", path_of(&first));
    let reply = site.ask("POST", &cancel, "", None);
    assert_eq!(
        (reply.status, &reply.body["status"]),
        (200, &json!("cancelled"))
    );
    assert_eq!(reply.body["id"], first.as_str());
    assert_eq!(site.object(&second)["queue_position"], 0);
    assert_eq!(site.take().job().id.as_str(), second);
    // A second time it is not changed.
    let again = site.ask("POST", &cancel, "", Some(&json!({})));
    assert_eq!((again.status, &again.body), (200, &reply.body));

    let reply = site.ask("DELETE", &path_of(&first), "", None);
    let deleted = json!({"id": first, "object": "image.job.deleted", "deleted": true});
    assert_eq!((reply.status, &reply.body), (200, &deleted));
    for method in ["GET", "DELETE"] {
        error_of(&site.ask(method, &path_of(&first), "", None), 404, None);
    }
    error_of(&site.ask("POST", &cancel, "", None), 404, None);
}

#[test]
fn a_running_job_is_cancelled_by_delete() {
    let site = Site::start();
    let id = site.job();
    let lease = site.take();
    let reply = site.ask("DELETE", &path_of(&id), "", None);
    assert_eq!(
        (reply.status, &reply.body["status"]),
        (200, &json!("cancelled"))
    );
    assert_eq!(site.run(lease.revoked()), Revoked::Cancelled);
    site.complete(lease, &[b"late"]);
    let job = site.object(&id);
    assert_eq!(
        (&job["status"], &job["files"]),
        (&json!("cancelled"), &json!([]))
    );
}

#[test]
fn a_completed_job_is_deleted_with_its_files() {
    let site = Site::start();
    let id = site.completed(&[b"file"]);
    // It cannot be cancelled any more.
    let reply = site.ask("POST", &format!("{}/cancel", path_of(&id)), "", None);
    assert_eq!(reply.body["status"], "completed");
    let reply = site.ask("DELETE", &path_of(&id), "", None);
    assert_eq!(reply.body["deleted"], true);
    error_of(&site.get(&format!("{}/content", path_of(&id))), 404, None);
}

#[test]
fn an_expired_job_is_gone() {
    let site = Site::with(Settings::new("test/model"), |settings| {
        settings.keep = std::time::Duration::ZERO;
    });
    let id = site.completed(&[b"file"]);
    std::thread::sleep(std::time::Duration::from_millis(5));
    site.run(site.store.sweep()).unwrap();
    let message = error_of(&site.get(&path_of(&id)), 404, None);
    assert!(message.contains("expired"), "{message}");
    error_of(&site.get(&format!("{}/content", path_of(&id))), 404, None);
}

#[test]
fn a_job_may_name_an_adapters_or_another_name_of_the_model() {
    let settings = Settings {
        served_model_names: vec!["test/model".to_owned(), "alias".to_owned()],
        ..Settings::new("test/model")
    };
    let site = Site::with(settings, |_| {});
    let mut body = small();
    body["model"] = json!("alias");
    let job = site.submit(&body);
    assert_eq!(job["model"], "alias");
    // A worker of the model takes it.
    assert_eq!(site.take().job().id.as_str(), id(&job));
}

#[test]
fn a_preference_makes_a_generation_a_job() {
    let site = Site::start();
    let generations = "/v1/images/generations";
    let prefer = "Prefer: respond-async, wait=5\r\n";
    let reply = site.ask("POST", generations, prefer, Some(&small()));
    assert_eq!(reply.status, 202, "{}", reply.body);
    assert_eq!(reply.header("preference-applied"), Some("respond-async"));
    let path = path_of(&id(&reply.body));
    assert_eq!(reply.header("location"), Some(path.as_str()));
    assert_eq!(site.get(&path).body["object"], "image.job");

    // Without the preference the answer has the images.
    for headers in ["", "Prefer: wait=5\r\n"] {
        let reply = site.ask("POST", generations, headers, Some(&small()));
        assert_eq!(reply.status, 200, "{}", reply.body);
        assert!(reply.body["data"][0]["b64_json"].is_string());
    }

    let mut body = small();
    body["stream"] = json!(true);
    let reply = site.ask("POST", generations, prefer, Some(&body));
    let message = error_of(&reply, 400, Some("stream"));
    assert!(message.contains("text/event-stream"), "{message}");
    // `stream: false` asks for nothing.
    body["stream"] = json!(false);
    assert_eq!(
        site.ask("POST", generations, prefer, Some(&body)).status,
        202
    );
}

#[test]
fn a_server_without_jobs_leaves_the_preference_out() {
    let server = TestServer::start(Pace::Fast, 4);
    let headers = "Prefer: respond-async\r\n";
    let path = "/v1/images/generations";
    let reply = super::super::client::json_with_headers(server.address, path, headers, &small());
    assert_eq!(reply.status, 200, "{}", reply.body);
    assert_eq!(reply.header("preference-applied"), None);
    assert!(reply.body["data"][0]["b64_json"].is_string());
}

#[test]
fn the_trace_context_of_a_request_is_stored_if_it_is_valid() {
    let site = Site::start();
    let parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let submit = |headers: &str| {
        let reply = site.ask("POST", PATH, headers, Some(&small()));
        assert_eq!(reply.status, 202, "{}", reply.body);
        let lease = site.take();
        let trace = lease.job().trace.clone();
        site.complete(lease, &[]);
        trace
    };
    let headers = format!("Traceparent: {parent}\r\nTracestate: a=1\r\ntracestate: b=2\r\n");
    let expected = TraceContext {
        traceparent: parent.to_owned(),
        tracestate: Some("a=1,b=2".to_owned()),
    };
    assert_eq!(submit(&headers), Some(expected));
    assert_eq!(submit("traceparent: 00-0-0-0\r\ntracestate: a=1\r\n"), None);
    assert_eq!(submit(""), None);
}

#[test]
fn jobs_are_read_while_the_model_loads_and_while_the_server_drains() {
    let site = Site::without_model(Settings::new("test/model"), |_| {});
    let reply = site.post(&small());
    error_of(&reply, 503, None);
    assert!(reply.header("retry-after").is_some());
    assert_eq!(site.get(PATH).body["data"], json!([]));
    let unknown = path_of("job-00c0ffee00c0ffee00c0ffee");
    error_of(&site.get(&unknown), 404, None);

    site.server.set_model();
    let key = "Idempotency-Key: once\r\n";
    let job = site.ask("POST", PATH, key, Some(&small())).body;
    let path = path_of(&id(&job));
    site.server.engine.stop();
    assert_eq!(site.get(&path).status, 200);
    assert_eq!(site.get(PATH).body["data"][0]["id"], job["id"]);
    let lease = site.take();
    site.complete(lease, &[b"file"]);
    assert_eq!(site.get(&format!("{path}/content")).bytes, b"file");
    assert_eq!(site.ask("DELETE", &path, "", None).status, 200);
}

#[test]
fn a_repeated_request_is_answered_while_the_model_loads() {
    let site = Site::without_model(Settings::new("test/model"), |_| {});
    let key = "Idempotency-Key: once\r\n";
    assert_eq!(site.ask("POST", PATH, key, Some(&small())).status, 503);
    site.server.set_model();
    let job = site.ask("POST", PATH, key, Some(&small()));
    assert_eq!(job.status, 202);

    // Another server that is being started over the same store.
    let store = std::sync::Arc::clone(&site.store);
    let starting = TestServer::with_jobs(Settings::new("test/model"), store);
    let headers = format!("Content-Type: application/json\r\n{key}");
    let body = small().to_string();
    let content = (headers.as_str(), body.as_bytes());
    let stream = super::connect(starting.address);
    let reply = super::receive(super::send_raw(stream, "POST", PATH, content));
    assert_eq!((reply.status, &reply.body["id"]), (200, &job.body["id"]));
}

#[test]
fn the_status_says_whether_there_are_jobs() {
    let server = TestServer::start(Pace::Fast, 4);
    assert_eq!(
        super::client::get(server.address, "/v1/status").body["jobs"],
        Value::Null
    );

    let site = Site::start();
    site.job();
    site.job();
    let lease = site.take();
    let jobs = &site.get("/v1/status").body["jobs"];
    let expected = json!({
        "available": true, "queued": 1, "in_progress": 1, "max_queued": 10_000, "keep_seconds": 86_400,
    });
    assert_eq!(*jobs, expected);
    drop(lease);
}

#[test]
fn web_pages_may_delete_and_send_the_headers_of_jobs() {
    let settings = Settings {
        cors_origins: vec!["https://a.example".parse().unwrap()],
        ..Settings::new("test/model")
    };
    let site = Site::with(settings, |_| {});
    let preflight = "Origin: https://a.example\r\nAccess-Control-Request-Method: DELETE\r\n\
                     Access-Control-Request-Headers: idempotency-key,prefer\r\n";
    let path = path_of("job-00c0ffee00c0ffee00c0ffee");
    let reply = with_headers(site.server.address, "OPTIONS", &path, preflight);
    assert_eq!(reply.status, 200);
    let methods = reply.header("access-control-allow-methods").unwrap();
    assert!(methods.contains("DELETE"), "{methods}");
    let headers = reply.header("access-control-allow-headers").unwrap();
    assert!(
        headers.contains("idempotency-key") && headers.contains("prefer"),
        "{headers}"
    );
    let origin = "Origin: https://a.example\r\nPrefer: respond-async\r\n";
    let reply = site.ask("POST", PATH, origin, Some(&small()));
    assert_eq!(reply.status, 202);
    let exposed = reply.header("access-control-expose-headers").unwrap();
    for name in ["location", "preference-applied", "retry-after"] {
        assert!(exposed.contains(name), "{exposed}");
    }
    // A page of another origin may not delete.
    let other = "Origin: https://b.example\r\nSec-Fetch-Site: cross-site\r\n";
    let path = path_of(&id(&reply.body));
    assert_eq!(site.ask("DELETE", &path, other, None).status, 403);
    let id = JobId::parse(&id(&reply.body)).unwrap();
    assert!(site.run(site.store.get(&id)).unwrap().is_some());
}

#[test]
fn the_document_describes_every_route() {
    let site = Site::start();
    let document = site.get("/openapi.json").body;
    for (path, methods) in [
        (PATH, &["get", "post"][..]),
        ("/v1/images/jobs/{id}", &["get", "delete"]),
        ("/v1/images/jobs/{id}/cancel", &["post"]),
        ("/v1/images/jobs/{id}/content", &["get"]),
    ] {
        for method in methods {
            let route = &document["paths"][path][method];
            assert!(
                route["description"].is_string() || route["summary"].is_string(),
                "{path}"
            );
            assert!(route["responses"]["200"].is_object(), "{method} {path}");
            assert!(route["responses"]["4XX"].is_object(), "{method} {path}");
        }
    }
    let schemas = &document["components"]["schemas"];
    let body = &schemas["ImageJobRequest"]["properties"];
    assert!(
        body["prompt"].is_object() && body["webhook"].is_object(),
        "{body}"
    );
    assert!(body["stream"].is_null() && body["deadline_ms"].is_null());
    assert_eq!(body["num_inference_steps"]["maximum"], 1000);
    let job = site.submit(&small());
    let described = &schemas["ImageJob"]["properties"];
    for key in keys(&job) {
        assert!(described[key].is_object(), "{key}");
    }
}
