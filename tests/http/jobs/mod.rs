//! Durable jobs over HTTP, with the store of one machine. The tests are the workers.

mod content;
mod errors;
mod faults;
mod idempotency;
mod junk;
mod lifecycle;
mod list;
mod watching;

use std::sync::Arc;
use std::time::Duration;

use kiln::jobs::{JobFile, JobLease, JobStore, LocalStore, StoreSettings};
use kiln::server::{ApiKeys, Settings};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::runtime::Runtime;
use tokio::time::timeout;

use super::client::{self, Reply, connect, receive, send_raw};
use super::server::TestServer;

const PATH: &str = "/v1/images/jobs";

/// A server with a store, which the tests use beside it.
struct Site {
    server: TestServer,
    store: Arc<dyn JobStore>,
    runtime: Runtime,
    _folder: TempDir,
}

impl Site {
    fn start() -> Self {
        Self::with(Settings::new("test/model"), |_| {})
    }

    /// A server with these API keys.
    fn with_keys(keys: &[&str]) -> Self {
        let keys = keys.iter().map(|key| (*key).to_owned()).collect();
        let settings = Settings {
            api_keys: ApiKeys::new(keys).unwrap(),
            ..Settings::new("test/model")
        };
        Self::with(settings, |_| {})
    }

    fn with(settings: Settings, change: impl FnOnce(&mut StoreSettings)) -> Self {
        let site = Self::without_model(settings, change);
        site.server.set_model();
        site
    }

    fn without_model(settings: Settings, change: impl FnOnce(&mut StoreSettings)) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let folder = tempfile::tempdir().unwrap();
        let mut store_settings = StoreSettings::new("test/model", "here");
        change(&mut store_settings);
        let store: Arc<dyn JobStore> = runtime
            .block_on(LocalStore::open(folder.path(), store_settings))
            .unwrap();
        Self {
            server: TestServer::with_jobs(settings, Arc::clone(&store)),
            store,
            runtime,
            _folder: folder,
        }
    }

    /// Sends a request with these header lines, and with a JSON body if there is one.
    fn ask(&self, method: &str, path: &str, headers: &str, body: Option<&Value>) -> Reply {
        receive(self.begin(method, path, headers, body))
    }

    fn begin(
        &self,
        method: &str,
        path: &str,
        headers: &str,
        body: Option<&Value>,
    ) -> std::net::TcpStream {
        let body = body.map(Value::to_string).unwrap_or_default();
        let headers = format!("Content-Type: application/json\r\n{headers}");
        let content = (headers.as_str(), body.as_bytes());
        send_raw(connect(self.server.address), method, path, content)
    }

    fn get(&self, path: &str) -> Reply {
        client::get(self.server.address, path)
    }

    fn post(&self, body: &Value) -> Reply {
        client::post_to(self.server.address, PATH, body)
    }

    /// Submits a job, and returns its object.
    fn submit(&self, body: &Value) -> Value {
        let reply = self.post(body);
        assert_eq!(reply.status, 202, "{}", reply.body);
        reply.body
    }

    /// Submits a small job, and returns its id.
    fn job(&self) -> String {
        id(&self.submit(&small()))
    }

    /// The object of a job.
    fn object(&self, id: &str) -> Value {
        let reply = self.get(&path_of(id));
        assert_eq!(reply.status, 200, "{}", reply.body);
        reply.body
    }

    fn run<T>(&self, future: impl Future<Output = T>) -> T {
        self.runtime.block_on(async {
            let outcome = timeout(Duration::from_mins(1), future).await;
            outcome.expect("it takes too long")
        })
    }

    /// Takes the next job.
    fn take(&self) -> Box<dyn JobLease> {
        self.run(self.store.take()).unwrap()
    }

    /// Ends a job with these files.
    fn complete(&self, lease: Box<dyn JobLease>, files: &[&[u8]]) {
        let files = files.iter().map(|content| png(content)).collect();
        self.run(lease.complete(files)).unwrap();
    }

    /// A job that is completed with these files.
    fn completed(&self, files: &[&[u8]]) -> String {
        let id = self.job();
        let lease = self.take();
        assert_eq!(lease.job().id.as_str(), id);
        self.complete(lease, files);
        id
    }
}

fn png(content: &[u8]) -> JobFile {
    JobFile {
        media_type: "image/png",
        extension: "png",
        content: content.to_vec().into(),
    }
}

fn small() -> Value {
    json!({"prompt": "a cat", "size": "64x64", "num_inference_steps": 4})
}

fn id(object: &Value) -> String {
    object["id"].as_str().unwrap().to_owned()
}

fn path_of(id: &str) -> String {
    format!("{PATH}/{id}")
}

/// Checks that an answer has the error body, and returns its message.
fn error_of(reply: &Reply, status: u16, param: Option<&str>) -> String {
    assert_eq!(reply.status, status, "{}", reply.body);
    let error = &reply.body["error"];
    assert_eq!(error["code"], status, "{error}");
    assert_eq!(error["param"].as_str(), param, "{error}");
    error["message"].as_str().unwrap().to_owned()
}
