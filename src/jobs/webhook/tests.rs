//! Webhooks to a receiver on this machine, from a store whose clock jumps to what is due next.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use kiln_models::noise::NoiseGenerator;
use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::sync::{Notify, watch};

use super::deliver::send_all;
use super::schedule::WAITS;
use super::secret;
use super::send::Sender;
use super::*;
use crate::image::{Encoding, ImageFormat};
use crate::jobs::{
    Content, JobCounts, JobId, JobLease, JobPage, JobStatus, JobStore, JobView, ListQuery, NewJob,
    Owner, StoreError, StoreSettings, StoredJob, StoredRequest, Submitted, WebhookLease,
};
use crate::request::{GenerationParams, GenerationRequest, Limits};

const SECRETS: [&str; 2] = [
    "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
    "whsec_AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=",
];

/// A request that a receiver got.
#[derive(Debug, Clone)]
struct Got {
    /// Lower-case names.
    headers: Vec<(String, String)>,
    line: String,
    body: Vec<u8>,
}

impl Got {
    fn header(&self, name: &str) -> &str {
        let found = self.headers.iter().find(|(key, _)| key == name);
        &found.unwrap_or_else(|| panic!("no {name} in {self:?}")).1
    }
}

/// A server that answers each request with the next of these heads, and the last one for ever.
#[derive(Debug)]
struct Receiver {
    address: SocketAddr,
    got: Arc<Mutex<Vec<Got>>>,
}

impl Receiver {
    async fn start(answers: &[&str]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let got: Arc<Mutex<Vec<Got>>> = Arc::default();
        let all = Arc::clone(&got);
        let answers: Vec<String> = answers.iter().map(|&it| it.to_owned()).collect();
        tokio::spawn(async move {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                let Some(request) = read(&mut stream).await else {
                    continue;
                };
                let number = {
                    let mut all = all.lock().unwrap();
                    all.push(request);
                    all.len() - 1
                };
                let head = answers.get(number).or(answers.last()).unwrap();
                let answer = format!("HTTP/1.1 {head}\r\nContent-Length: 0\r\n\r\n");
                stream.write_all(answer.as_bytes()).await.unwrap();
            }
        });
        Self { address, got }
    }

    fn url(&self) -> String {
        format!("http://{}/hook?key=hunter2", self.address)
    }

    fn got(&self) -> Vec<Got> {
        self.got.lock().unwrap().clone()
    }
}

async fn read(stream: &mut tokio::net::TcpStream) -> Option<Got> {
    let mut bytes = Vec::new();
    loop {
        let text = String::from_utf8_lossy(&bytes).into_owned();
        if let Some((head, body)) = text.split_once("\r\n\r\n") {
            let mut lines = head.lines();
            let line = lines.next()?.to_owned();
            let headers: Vec<(String, String)> = lines
                .filter_map(|line| line.split_once(": "))
                .map(|(name, value)| (name.to_lowercase(), value.to_owned()))
                .collect();
            let length = headers.iter().find(|(name, _)| name == "content-length")?;
            if body.len() >= length.1.parse().ok()? {
                let body = body.as_bytes().to_vec();
                return Some(Got {
                    headers,
                    line,
                    body,
                });
            }
        }
        if stream.read_buf(&mut bytes).await.ok()? == 0 {
            return None;
        }
    }
}

/// A store with one webhook, which is due whenever it is not settled.
#[derive(Debug, Clone)]
struct OneWebhook {
    job: StoredJob,
    state: Arc<Mutex<State>>,
    changed: Arc<Notify>,
    settings: StoreSettings,
}

#[derive(Debug, Default)]
struct State {
    taken: bool,
    settled: bool,
    waits: Vec<Duration>,
}

impl OneWebhook {
    fn new(url: &str) -> Self {
        Self {
            job: ended_job(url),
            state: Arc::default(),
            changed: Arc::default(),
            settings: StoreSettings::new("demo", "here"),
        }
    }

    async fn settled(&self) -> Vec<Duration> {
        loop {
            let changed = self.changed.notified();
            {
                let state = self.state.lock().unwrap();
                if state.settled {
                    return state.waits.clone();
                }
            }
            changed.await;
        }
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state.lock().unwrap());
        self.changed.notify_waiters();
    }

    fn absent<T>() -> Result<T, StoreError> {
        Err(StoreError::Broken("not part of the test".to_owned()))
    }
}

#[async_trait]
impl JobStore for OneWebhook {
    fn settings(&self) -> &StoreSettings {
        &self.settings
    }

    async fn submit(&self, _: NewJob) -> Result<Submitted, StoreError> {
        Self::absent()
    }

    async fn get(&self, _: &JobId) -> Result<Option<JobView>, StoreError> {
        Self::absent()
    }

    async fn watch(&self, _: &JobId) -> Result<Option<watch::Receiver<JobView>>, StoreError> {
        Self::absent()
    }

    async fn list(&self, _: &Owner, _: &ListQuery) -> Result<JobPage, StoreError> {
        Self::absent()
    }

    async fn cancel(&self, _: &JobId) -> Result<Option<JobView>, StoreError> {
        Self::absent()
    }

    async fn delete(&self, _: &JobId) -> Result<bool, StoreError> {
        Self::absent()
    }

    async fn content(&self, _: &JobId, _: usize) -> Result<Option<Content>, StoreError> {
        Self::absent()
    }

    async fn take(&self) -> Result<Box<dyn JobLease>, StoreError> {
        Self::absent()
    }

    async fn take_webhook(&self) -> Result<Box<dyn WebhookLease>, StoreError> {
        loop {
            let changed = self.changed.notified();
            {
                let mut state = self.state.lock().unwrap();
                if !state.settled && !state.taken {
                    state.taken = true;
                    return Ok(Box::new(self.clone()));
                }
            }
            changed.await;
        }
    }

    async fn sweep(&self) -> Result<(), StoreError> {
        Self::absent()
    }

    async fn counts(&self) -> Result<JobCounts, StoreError> {
        Self::absent()
    }
}

#[async_trait]
impl WebhookLease for OneWebhook {
    fn job(&self) -> &StoredJob {
        &self.job
    }

    fn tries(&self) -> u32 {
        self.state.lock().unwrap().waits.len() as u32
    }

    async fn settle(self: Box<Self>) -> Result<(), StoreError> {
        self.change(|state| state.settled = true);
        Ok(())
    }

    async fn retry(self: Box<Self>, after: Duration) -> Result<(), StoreError> {
        self.change(|state| {
            state.taken = false;
            state.waits.push(after);
        });
        Ok(())
    }
}

fn ended_job(url: &str) -> StoredJob {
    let params = GenerationParams {
        prompt: "a cat".to_owned(),
        ..GenerationParams::default()
    };
    let limits = Limits::for_any_model();
    let request = GenerationRequest::new(params, &limits, NoiseGenerator::Cpu).unwrap();
    let job = NewJob {
        owner: Owner::anyone(),
        request: StoredRequest {
            request,
            encoding: Encoding::new(ImageFormat::Png),
            model: "demo".to_owned(),
        },
        idempotency: None,
        webhook: Some(url.to_owned()),
        trace: None,
    };
    StoredJob {
        status: JobStatus::Completed,
        ended_ms: Some(1_614_265_330_123),
        ..job.into_stored("demo", 1_614_265_000_000)
    }
}

fn settings(hosts: &[&str], allow_private: bool) -> WebhookSettings {
    WebhookSettings {
        hosts: hosts.iter().map(|host| host.parse().unwrap()).collect(),
        secrets: SECRETS.map(|secret| secret.parse().unwrap()).to_vec(),
        allow_private,
    }
}

/// Sends the webhook until it is settled. Returns the waits between the tries.
async fn run(store: &OneWebhook, sender: Sender) -> (Vec<Duration>, Arc<WebhookStats>) {
    let stats = Arc::<WebhookStats>::default();
    let waits = tokio::select! {
        () = send_all(store, sender, Arc::clone(&stats)) => panic!("ended"),
        waits = store.settled() => waits,
        () = tokio::time::sleep(Duration::from_mins(1)) => panic!("not settled: {store:?}"),
    };
    (waits, stats)
}

fn counts(stats: &WebhookStats) -> [u64; 4] {
    WebhookOutcome::ALL.map(|outcome| stats.count(outcome))
}

/// Sends a webhook to a receiver with these answers.
async fn sent(answers: &[&str]) -> (Vec<Got>, Vec<Duration>, [u64; 4]) {
    let receiver = Receiver::start(answers).await;
    let store = OneWebhook::new(&receiver.url());
    let sender = Sender::new(settings(&["127.0.0.1"], true)).unwrap();
    let (waits, stats) = run(&store, sender).await;
    (receiver.got(), waits, counts(&stats))
}

#[tokio::test]
async fn a_webhook_has_the_job_and_a_signature_of_each_secret() {
    let (got, waits, counts) = sent(&["204 No Content"]).await;
    assert_eq!((got.len(), waits.len(), counts), (1, 0, [1, 0, 0, 0]));
    let got = &got[0];
    assert_eq!(got.line, "POST /hook?key=hunter2 HTTP/1.1");
    assert_eq!(got.header("content-type"), "application/json");
    assert!(got.header("user-agent").starts_with("kiln/"));
    let id = got.header("webhook-id");
    let timestamp: u64 = got.header("webhook-timestamp").parse().unwrap();
    assert!(id.starts_with("job-") && id.ends_with("-1614265330123") && !id.contains('.'));
    assert!(timestamp > 1_700_000_000);
    let secrets = SECRETS.map(|secret| secret.parse().unwrap());
    let expected = secret::signatures(&secrets, id, timestamp, &got.body);
    assert_eq!(got.header("webhook-signature"), expected);
    assert_eq!(expected.split(' ').count(), 2);
    let body: serde_json::Value = serde_json::from_slice(&got.body).unwrap();
    assert_eq!(body["type"], "image.job.completed");
    assert_eq!(body["timestamp"], "2021-02-25T15:02:10.123Z");
    assert!(id.starts_with(body["data"]["id"].as_str().unwrap()));
    assert_eq!(body["data"]["object"], "image.job");
    assert_eq!(body["data"]["status"], "completed");
    assert_eq!(body["data"]["request"]["prompt"], "a cat");
}

#[tokio::test]
async fn a_receiver_that_fails_is_tried_ten_times() {
    let (got, waits, counts) = sent(&["500 Internal Server Error"]).await;
    assert_eq!((got.len(), counts), (10, [0, 9, 1, 0]));
    assert_eq!(waits.len(), WAITS.len());
    for (wait, table) in waits.iter().zip(WAITS) {
        assert!((table..=table.mul_f64(1.1)).contains(wait), "{waits:?}");
    }
    for again in &got {
        assert_eq!(again.header("webhook-id"), got[0].header("webhook-id"));
        assert_eq!(again.body, got[0].body);
    }
}

#[tokio::test]
async fn a_later_try_can_succeed_after_the_time_that_the_receiver_asks_for() {
    let (got, waits, counts) = sent(&[
        "429 Too Many Requests\r\nRetry-After: 600",
        "503 Service Unavailable\r\nRetry-After: 1",
        "200 OK",
    ])
    .await;
    assert_eq!((got.len(), counts), (3, [1, 2, 0, 0]));
    assert_eq!(waits[0], Duration::from_mins(10));
    assert!(waits[1] >= WAITS[1]);
}

#[tokio::test]
async fn a_receiver_that_is_gone_is_given_up_at_once() {
    let (got, waits, counts) = sent(&["410 Gone"]).await;
    assert_eq!((got.len(), waits.len(), counts), (1, 0, [0, 0, 1, 0]));
}

#[tokio::test]
async fn redirects_are_not_followed() {
    let target = Receiver::start(&["200 OK"]).await;
    for status in ["301 Moved", "302 Found", "307 Temporary", "308 Permanent"] {
        let head = format!("{status}\r\nLocation: {}", target.url());
        let (got, waits, counts) = sent(&[&head, "200 OK"]).await;
        assert_eq!((got.len(), waits.len(), counts), (2, 1, [1, 1, 0, 0]));
    }
    assert!(target.got().is_empty());
}

#[tokio::test]
async fn an_answer_that_is_no_http_is_a_failed_try() {
    let (got, _, counts) = sent(&["junk\r\n\0", "200 OK"]).await;
    assert_eq!((got.len(), counts), (2, [1, 1, 0, 0]));
}

#[tokio::test]
async fn a_url_that_is_no_longer_allowed_is_refused() {
    let receiver = Receiver::start(&["200 OK"]).await;
    for settings in [
        settings(&["example.org"], true),
        settings(&["127.0.0.1"], false),
    ] {
        let store = OneWebhook::new(&receiver.url());
        let (waits, stats) = run(&store, Sender::new(settings).unwrap()).await;
        assert_eq!((waits.len(), counts(&stats)), (0, [0, 0, 0, 1]));
    }
    assert!(receiver.got().is_empty());
}

/// Finds a public address for the first look-up of a name, and this machine for the others.
#[derive(Default)]
struct Rebinding {
    lookups: Arc<Mutex<usize>>,
    first: Vec<SocketAddr>,
}

impl Resolve for Rebinding {
    fn resolve(&self, _: Name) -> Resolving {
        let mut lookups = self.lookups.lock().unwrap();
        *lookups += 1;
        let found = if *lookups == 1 && !self.first.is_empty() {
            self.first.clone()
        } else {
            vec![
                "127.0.0.1:0".parse().unwrap(),
                "[::ffff:127.0.0.1]:0".parse().unwrap(),
            ]
        };
        Box::pin(async move { Ok(Box::new(found.into_iter()) as Addrs) })
    }
}

#[tokio::test]
async fn a_name_that_stands_for_a_private_address_is_not_connected_to() {
    let receiver = Receiver::start(&["200 OK"]).await;
    let url = format!("http://hook.example:{}/", receiver.address.port());
    let run_with = async |allow_private| {
        let settings = settings(&["hook.example"], allow_private);
        let resolver = Arc::<Rebinding>::default();
        let lookups = Arc::clone(&resolver.lookups);
        let store = OneWebhook::new(&url);
        let sender = Sender::with_resolver(settings, resolver).unwrap();
        let (_, stats) = run(&store, sender).await;
        let lookups = *lookups.lock().unwrap();
        (counts(&stats), lookups)
    };
    // Every try asks the resolver again.
    assert_eq!(run_with(false).await, ([0, 9, 1, 0], 10));
    assert!(receiver.got().is_empty());
    assert_eq!(run_with(true).await, ([1, 0, 0, 0], 1));
    assert_eq!(receiver.got().len(), 1);
}

#[tokio::test]
async fn private_addresses_are_left_out_beside_public_ones() {
    let mixed: Vec<SocketAddr> = ["8.8.8.8:0", "10.0.0.1:0", "[fd00::1]:0", "[::1]:0"]
        .map(|address| address.parse().unwrap())
        .to_vec();
    let inner = Arc::new(Rebinding {
        first: mixed,
        ..Rebinding::default()
    });
    let resolver = resolver::PublicResolver::new(inner);
    let name = || "hook.example".parse::<Name>().unwrap();
    let found: Vec<_> = resolver.resolve(name()).await.unwrap().collect();
    assert_eq!(found, ["8.8.8.8:0".parse().unwrap()]);
    // The same name stands for this machine now.
    let error = resolver.resolve(name()).await.err().unwrap().to_string();
    assert!(error.contains("--webhook-allow-private"), "{error}");
}

#[tokio::test]
async fn a_server_without_secrets_takes_no_webhooks() {
    let store = OneWebhook::new("http://127.0.0.1/");
    let unsigned = WebhookSettings {
        secrets: Vec::new(),
        ..settings(&["127.0.0.1"], true)
    };
    deliver(Arc::new(store.clone()), unsigned, Arc::default()).await;
    assert!(!store.state.lock().unwrap().taken);
}
