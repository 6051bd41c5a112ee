//! A store that fails, and one that has its files elsewhere.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use kiln::image::{Encoding, ImageFormat};
use kiln::jobs::{
    Content, JobCounts, JobId, JobLease, JobPage, JobStatus, JobStore, JobView, ListQuery, NewJob,
    Owner, Progress, ResultFile, StoreError, StoreSettings, StoredRequest, Submitted, WebhookLease,
};
use kiln::kiln_models::noise::NoiseGenerator;
use kiln::request::{GenerationParams, GenerationRequest, Limits};
use kiln::server::Settings;
use serde_json::{Value, json};
use tokio::sync::watch;

use super::super::client;
use super::super::server::TestServer;
use super::{PATH, error_of, path_of, small};

/// A store with one completed job, whose every method may fail.
#[derive(Debug)]
struct FakeStore {
    settings: StoreSettings,
    error: Option<StoreError>,
    view: JobView,
    url: String,
}

impl FakeStore {
    fn new(error: Option<StoreError>, url: &str) -> Self {
        let settings = StoreSettings::new("test/model", "here");
        let params = GenerationParams::default();
        let limits = Limits::for_any_model();
        let request = GenerationRequest::new(params, &limits, NoiseGenerator::Cpu).unwrap();
        let job = NewJob {
            owner: Owner::anyone(),
            request: StoredRequest {
                request,
                encoding: Encoding::new(ImageFormat::Png),
                model: "test/model".to_owned(),
            },
            idempotency: None,
            webhook: None,
            trace: None,
        };
        let mut job = job.into_stored("test/model", 1000);
        job.status = JobStatus::Completed;
        job.files = vec![ResultFile {
            media_type: "image/png".to_owned(),
            bytes: 4,
            sha256: "00".repeat(32),
        }];
        let view = JobView {
            job: Arc::new(job),
            progress: Progress::default(),
            position: None,
        };
        Self {
            settings,
            error,
            view,
            url: url.to_owned(),
        }
    }

    fn fail(&self) -> Result<(), StoreError> {
        self.error.clone().map_or(Ok(()), Err)
    }
}

#[async_trait]
impl JobStore for FakeStore {
    fn settings(&self) -> &StoreSettings {
        &self.settings
    }

    async fn submit(&self, _: NewJob) -> Result<Submitted, StoreError> {
        self.fail().map(|()| Submitted::New(self.view.clone()))
    }

    async fn get(&self, _: &JobId) -> Result<Option<JobView>, StoreError> {
        self.fail().map(|()| Some(self.view.clone()))
    }

    async fn watch(&self, _: &JobId) -> Result<Option<watch::Receiver<JobView>>, StoreError> {
        self.fail()
            .map(|()| Some(watch::channel(self.view.clone()).1))
    }

    async fn list(&self, _: &Owner, _: &ListQuery) -> Result<JobPage, StoreError> {
        self.fail().map(|()| JobPage {
            jobs: vec![self.view.clone()],
            has_more: false,
        })
    }

    async fn cancel(&self, _: &JobId) -> Result<Option<JobView>, StoreError> {
        self.fail().map(|()| Some(self.view.clone()))
    }

    async fn delete(&self, _: &JobId) -> Result<bool, StoreError> {
        self.fail().map(|()| true)
    }

    async fn content(&self, _: &JobId, _: usize) -> Result<Option<Content>, StoreError> {
        self.fail().map(|()| Some(Content::Url(self.url.clone())))
    }

    async fn take(&self) -> Result<Box<dyn JobLease>, StoreError> {
        std::future::pending().await
    }

    async fn take_webhook(&self) -> Result<Box<dyn WebhookLease>, StoreError> {
        std::future::pending().await
    }

    async fn sweep(&self) -> Result<(), StoreError> {
        self.fail()
    }

    async fn counts(&self) -> Result<JobCounts, StoreError> {
        tokio::time::sleep(Duration::from_millis(1)).await;
        self.fail().map(|()| JobCounts::default())
    }
}

fn server(error: Option<StoreError>, url: &str) -> TestServer {
    let store = Arc::new(FakeStore::new(error, url));
    let server = TestServer::with_jobs(Settings::new("test/model"), store);
    server.set_model();
    server
}

fn ask(server: &TestServer, method: &str, path: &str, body: Option<&Value>) -> client::Reply {
    client::receive(client::send(
        client::connect(server.address),
        method,
        path,
        body,
    ))
}

#[test]
fn errors_of_a_store_have_their_status_and_no_secrets() {
    let secret = || "secret detail of nats://10.0.0.1".to_owned();
    let job = path_of("job-00c0ffee00c0ffee00c0ffee");
    for (error, status, expected) in [
        (StoreError::Full { queued: 3 }, 429, "3 jobs are waiting"),
        (
            StoreError::Unavailable(secret()),
            503,
            "does not answer; try again in",
        ),
        (StoreError::TooLarge { bytes: 9, max: 8 }, 413, "9 bytes"),
        (
            StoreError::Broken(secret()),
            500,
            "the server's log says why",
        ),
    ] {
        let server = server(Some(error), "");
        for (method, path) in [
            ("POST", PATH.to_owned()),
            ("GET", PATH.to_owned()),
            ("GET", job.clone()),
            ("GET", format!("{job}?wait=30")),
            ("GET", format!("{job}/content")),
            ("POST", format!("{job}/cancel")),
            ("DELETE", job.clone()),
        ] {
            let reply = ask(&server, method, &path, Some(&small()));
            let message = error_of(&reply, status, None);
            assert!(message.contains(expected), "{method} {path}: {message}");
            assert!(!message.contains("secret"), "{message}");
            let retries = [429, 503].contains(&status);
            assert_eq!(
                reply.header("retry-after").is_some(),
                retries,
                "{method} {path}"
            );
        }
        // The server itself goes on.
        let jobs = &client::get(server.address, "/v1/status").body["jobs"];
        assert_eq!(
            (&jobs["available"], &jobs["queued"]),
            (&json!(false), &Value::Null)
        );
        assert_eq!(jobs["keep_seconds"], 86_400);
    }
}

#[test]
fn a_file_that_is_elsewhere_is_a_redirection() {
    let url = "https://bucket.example/job/0.png?signature=x";
    let server = server(None, url);
    let path = format!("{}/content", path_of("job-00c0ffee00c0ffee00c0ffee"));
    let reply = ask(&server, "GET", &path, None);
    assert_eq!((reply.status, reply.header("location")), (302, Some(url)));
    assert_eq!(reply.header("cache-control"), Some("no-store"));
    assert!(reply.bytes.is_empty());
}

/// The store has stopped to tell of the job, whose newest view is that of its end.
#[test]
fn a_view_that_is_the_last_one_ends_long_polls_and_events() {
    let server = server(None, "");
    let path = path_of("job-00c0ffee00c0ffee00c0ffee");
    let reply = ask(&server, "GET", &format!("{path}?wait=30"), None);
    assert_eq!(reply.body["status"], "completed");
    let accept = "Accept: text/event-stream\r\n";
    let reply = client::with_headers(server.address, "GET", &path, accept);
    let text = String::from_utf8(reply.bytes).unwrap();
    assert_eq!(text.matches("event: status").count(), 1, "{text}");
}
