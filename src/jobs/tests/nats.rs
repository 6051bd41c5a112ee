//! The store in NATS, on a server that the tests start.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use tempfile::TempDir;
use tokio::time::sleep;

use super::bench::*;
use super::conformance::conformance_tests;
use super::nats_server::NatsServer;
use crate::jobs::nats::{NatsSettings, NatsStore};
use crate::jobs::{
    Content, JobStatus, JobStore, ListQuery, Progress, Revoked, Settled, StoreError, StoreSettings,
    Submitted,
};

/// Stores on one server.
#[derive(Debug)]
struct OneServer {
    server: NatsServer,
    open: Mutex<Vec<Arc<NatsStore>>>,
}

impl OneServer {
    /// `None` without nats-server.
    async fn start() -> Option<Self> {
        Some(Self {
            server: NatsServer::started(&[]).await?,
            open: Mutex::new(Vec::new()),
        })
    }
}

#[async_trait]
impl Stores for OneServer {
    async fn open(&self, settings: StoreSettings) -> Arc<dyn JobStore> {
        let store = Arc::new(open(&self.server, settings).await);
        self.open.lock().unwrap().push(Arc::clone(&store));
        store
    }

    async fn kill(&self, _store: Arc<dyn JobStore>) {
        for store in std::mem::take(&mut *self.open.lock().unwrap()) {
            store.kill();
        }
    }
}

/// The server, or the end of the test.
macro_rules! or_skip {
    ($server:expr) => {
        match $server.await {
            Some(server) => server,
            None => return,
        }
    };
}

conformance_tests!(or_skip!(OneServer::start()));

fn nats(server: &NatsServer) -> NatsSettings {
    NatsSettings::new(&[server.url()], None).unwrap()
}

async fn open(server: &NatsServer, settings: StoreSettings) -> NatsStore {
    NatsStore::open(&nats(server), settings).await.unwrap()
}

async fn open_dyn(server: &NatsServer, instance: &str) -> Arc<dyn JobStore> {
    let settings = StoreSettings {
        instance: instance.to_owned(),
        ..settings()
    };
    Arc::new(open(server, settings).await)
}

/// JetStream as another program sees it.
async fn raw(server: &NatsServer) -> async_nats::jetstream::Context {
    async_nats::jetstream::new(async_nats::connect(server.url()).await.unwrap())
}

async fn messages(server: &NatsServer, stream: &str) -> u64 {
    let stream = raw(server).await.get_stream(stream).await.unwrap();
    stream.cached_info().state.messages
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_servers_share_jobs() {
    let server = or_skip!(NatsServer::started(&[]));
    let (a, b) = (open_dyn(&server, "a").await, open_dyn(&server, "b").await);
    let id = submit(&a, job("one")).await;
    let later = submit(&b, job("two")).await;
    let mut views = a.watch(&id).await.unwrap().unwrap();
    let lease = take(&b).await;
    assert_eq!(lease.job().id, id);
    soon(views.wait_for(|view| view.job.status == JobStatus::InProgress))
        .await
        .unwrap();
    assert_eq!(views.borrow().job.instance.as_deref(), Some("b"));
    let progress = Progress { done: 3, total: 20 };
    lease.report(progress);
    soon(views.wait_for(|view| view.progress == progress))
        .await
        .unwrap();
    assert_eq!(get(&a, &id).await.progress, progress);
    // The first one is no longer before the second one.
    assert_eq!(until_position(&a, &later, 0).await, Some(0));
    let listed = async {
        loop {
            let page = a.list(&owner("me"), &all()).await.unwrap();
            if page.jobs.len() == 2 {
                return page;
            }
            sleep(Duration::from_millis(10)).await;
        }
    };
    let page = soon(listed).await;
    assert_eq!(page.jobs[0].job.id, later);
    // Cancelled on one server, stopped on the other.
    let cancelled = a.cancel(&id).await.unwrap().unwrap();
    assert_eq!(cancelled.job.status, JobStatus::Cancelled);
    assert_eq!(soon(lease.revoked()).await, Revoked::Cancelled);
    let settled = lease.complete(vec![file(b"late")]).await.unwrap();
    assert_eq!(settled, Settled::Superseded);
    assert_eq!(a.content(&id, 0).await.unwrap(), None);
    assert_eq!(messages(&server, "KILN").await, 1);
    // Nothing is left of the file that came too late but the marker of its deletion.
    assert_eq!(messages(&server, "OBJ_kiln-results").await, 1);
}

/// The position of a job once it is this one.
async fn until_position(
    store: &Arc<dyn JobStore>,
    id: &crate::jobs::JobId,
    position: usize,
) -> Option<usize> {
    let wait = async {
        loop {
            let view = get(store, id).await;
            if view.position == Some(position) {
                return view.position;
            }
            sleep(Duration::from_millis(10)).await;
        }
    };
    soon(wait).await
}

fn all() -> ListQuery {
    ListQuery {
        limit: 100,
        ..ListQuery::default()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_repeated_request_adds_the_message_that_a_crash_left_out() {
    let server = or_skip!(NatsServer::started(&[]));
    let store = open_dyn(&server, "a").await;
    let id = submit(&store, keyed("one", "key")).await;
    // As if the first server had stopped between the record and the message.
    let stream = raw(&server).await.get_stream("KILN").await.unwrap();
    stream.purge().await.unwrap();
    let again = store.submit(keyed("one", "key")).await.unwrap();
    assert!(matches!(again, Submitted::Existing(view) if view.job.id == id));
    assert_eq!(messages(&server, "KILN").await, 1);
    // A second repetition adds nothing.
    store.submit(keyed("one", "key")).await.unwrap();
    assert_eq!(messages(&server, "KILN").await, 1);
    assert_eq!(complete_next(&store, b"image").await, id);
    assert_eq!(messages(&server, "KILN").await, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_sweep_compares_the_queue_with_the_records() {
    let server = or_skip!(NatsServer::started(&[]));
    let store = Arc::new(open(&server, settings()).await);
    let shared: Arc<dyn JobStore> = store.clone();
    let lost = submit(&shared, job("lost")).await;
    let stream = raw(&server).await.get_stream("KILN").await.unwrap();
    stream.purge().await.unwrap();
    // Not yet: the message of a young job may be on its way.
    store.compare(Duration::from_mins(1)).await.unwrap();
    assert_eq!(messages(&server, "KILN").await, 0);
    sleep(Duration::from_millis(5)).await;
    store.compare(Duration::ZERO).await.unwrap();
    assert_eq!(messages(&server, "KILN").await, 1);
    assert_eq!(complete_next(&shared, b"image").await, lost);
    // A message of an ended job is removed.
    let context = raw(&server).await;
    let subject = format!("kiln.jobs.{MODEL}.{lost}");
    context
        .publish(subject, "{}".into())
        .await
        .unwrap()
        .await
        .unwrap();
    assert_eq!(messages(&server, "KILN").await, 1);
    sleep(Duration::from_millis(5)).await;
    store.compare(Duration::ZERO).await.unwrap();
    assert_eq!(messages(&server, "KILN").await, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deleted_job_leaves_its_key_free() {
    let server = or_skip!(NatsServer::started(&[]));
    let store = open_dyn(&server, "a").await;
    let id = submit(&store, keyed("one", "key")).await;
    complete_next(&store, b"image").await;
    assert!(store.delete(&id).await.unwrap());
    assert_eq!(store.get(&id).await.unwrap(), None);
    assert!(!store.delete(&id).await.unwrap());
    // Within the window in which NATS drops messages with the same id.
    assert_eq!(submit(&store, keyed("other", "key")).await, id);
    assert_eq!(complete_next(&store, b"image").await, id);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_is_gone_is_named_quickly_and_comes_back() {
    let server = or_skip!(NatsServer::started(&[]));
    let store = open_dyn(&server, "a").await;
    let id = submit(&store, job("one")).await;
    let queued: Vec<_> = {
        let mut queued = Vec::new();
        for index in 0..20 {
            queued.push(submit(&store, job(&format!("job {index}"))).await);
        }
        queued
    };
    let lease = take(&store).await;
    server.kill();
    let begin = Instant::now();
    for _ in 0..2 {
        let error = store.submit(job("two")).await.unwrap_err();
        assert!(matches!(error, StoreError::Unavailable(_)), "{error}");
        assert!(error.to_string().contains(&server.address()), "{error}");
        let error = store.get(&id).await.unwrap_err();
        assert!(matches!(error, StoreError::Unavailable(_)), "{error}");
    }
    assert!(store.list(&owner("me"), &all()).await.is_err());
    assert!(store.counts().await.is_err());
    assert!(store.sweep().await.is_err());
    assert!(soon(store.take()).await.is_err());
    let took = begin.elapsed();
    assert!(took < Duration::from_secs(30), "{took:?}");
    server.start().await;
    // The worker tries again until the outcome is stored, as it was all along.
    let settled = async {
        loop {
            match lease.complete(vec![file(b"image")]).await {
                Ok(settled) => return settled,
                Err(_) => sleep(Duration::from_millis(50)).await,
            }
        }
    };
    assert_eq!(soon(settled).await, Settled::Recorded);
    assert_eq!(get(&store, &id).await.job.status, JobStatus::Completed);
    for _ in &queued {
        complete_next(&store, b"image").await;
    }
    for id in &queued {
        assert_eq!(get(&store, id).await.job.status, JobStatus::Completed);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_opens_without_its_server_and_connects_later() {
    let Some(server) = NatsServer::new(&[]) else {
        return;
    };
    let store = open_dyn(&server, "a").await;
    let error = store.submit(job("one")).await.unwrap_err();
    assert!(matches!(error, StoreError::Unavailable(_)), "{error}");
    server.start().await;
    let submitted = async {
        while store.submit(job("one")).await.is_err() {
            sleep(Duration::from_millis(50)).await;
        }
    };
    soon(submitted).await;
    complete_next(&store, b"image").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn credentials_are_used_and_wrong_ones_are_refused() {
    let server = or_skip!(NatsServer::started(&["--user", "kiln", "--pass", "p@ss:%"]));
    let open = |login: &str| {
        let server = format!("nats://{login}{}", server.address());
        let nats = NatsSettings::new(&[server], None).unwrap();
        async move { NatsStore::open(&nats, settings()).await }
    };
    open("kiln:p%40ss%3A%25@").await.unwrap();
    for wrong in ["", "kiln:other@", "token@"] {
        let error = open(wrong).await.unwrap_err();
        assert!(matches!(error, StoreError::Broken(_)), "{error}");
        assert!(error.to_string().contains(&server.address()), "{error}");
        assert!(!error.to_string().contains("other"), "{error}");
    }
    let server = or_skip!(NatsServer::started(&["--auth", "s3cret"]));
    let nats = NatsSettings::new(&[format!("nats://s3cret@{}", server.address())], None);
    NatsStore::open(&nats.unwrap(), settings()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_of_another_program_is_refused() {
    let server = or_skip!(NatsServer::started(&[]));
    let config = async_nats::jetstream::stream::Config {
        name: "KILN".to_owned(),
        subjects: vec!["pottery.>".to_owned()],
        ..Default::default()
    };
    raw(&server).await.create_stream(config).await.unwrap();
    let error = NatsStore::open(&nats(&server), settings())
        .await
        .unwrap_err();
    assert!(error.to_string().contains("pottery"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_that_is_too_large_is_not_stored() {
    let server = or_skip!(NatsServer::started(&[]));
    let store = open_dyn(&server, "a").await;
    let mut large = job("one");
    large.request.request.prompt = "x".repeat(2 << 20);
    let error = store.submit(large).await.unwrap_err();
    let StoreError::TooLarge { bytes, max } = error else {
        panic!("{error}");
    };
    assert!(bytes > 2 << 20 && max < 1 << 20, "{bytes} of {max}");
    assert_eq!(messages(&server, "KV_kiln-jobs").await, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn files_can_be_in_a_folder_of_all_servers() {
    let server = or_skip!(NatsServer::started(&[]));
    let folder = TempDir::new().unwrap();
    let results = format!("file://{}/a b", folder.path().display());
    let nats = NatsSettings::new(&[server.url()], Some(results)).unwrap();
    let store: Arc<dyn JobStore> = Arc::new(NatsStore::open(&nats, settings()).await.unwrap());
    let id = submit(&store, job("one")).await;
    complete_next(&store, b"image").await;
    let path = folder.path().join(format!("a b/{id}/1/0.png"));
    assert_eq!(std::fs::read(&path).unwrap(), b"image");
    let Some(Content::File { content, .. }) = store.content(&id, 0).await.unwrap() else {
        panic!("no file");
    };
    assert_eq!(content, b"image".as_slice());
    assert!(store.delete(&id).await.unwrap());
    assert!(!path.exists());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn models_do_not_take_each_others_jobs() {
    let server = or_skip!(NatsServer::started(&[]));
    let of_model = |model: &str| StoreSettings {
        model: model.to_owned(),
        ..settings()
    };
    let names = ["Qwen/Qwen-Image", "Qwen_2FQwen-Image", "größe 1.0 > *"];
    let mut stores: Vec<Arc<dyn JobStore>> = Vec::new();
    let mut ids = Vec::new();
    for name in names {
        let store: Arc<dyn JobStore> = Arc::new(open(&server, of_model(name)).await);
        ids.push(submit(&store, job(name)).await);
        stores.push(store);
    }
    for (store, id) in stores.iter().zip(&ids) {
        assert_eq!(store.counts().await.unwrap().queued, 1);
        assert_eq!(take(store).await.job().id, *id);
    }
}

/// Prints how long it takes to store 10,000 jobs, and to list and count them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "takes a minute"]
async fn ten_thousand_jobs_are_listed() {
    const JOBS: usize = 10_000;
    let server = or_skip!(NatsServer::started(&[]));
    let settings = StoreSettings {
        max_queued: JOBS,
        ..settings()
    };
    let store: Arc<dyn JobStore> = Arc::new(open(&server, settings.clone()).await);
    let begin = Instant::now();
    let mut clients = tokio::task::JoinSet::new();
    for _ in 0..20 {
        let store = Arc::clone(&store);
        clients.spawn(async move {
            for _ in 0..JOBS / 20 {
                submit(&store, job("one")).await;
            }
        });
    }
    clients.join_all().await;
    println!("stored in {:?}", begin.elapsed());
    let begin = Instant::now();
    let other = open(&server, settings).await;
    println!("another server knows them after {:?}", begin.elapsed());
    assert_eq!(other.counts().await.unwrap().queued, JOBS as u64);
    let begin = Instant::now();
    let query = ListQuery { limit: 20, ..all() };
    let page = other.list(&owner("me"), &query).await.unwrap();
    println!("20 listed in {:?}", begin.elapsed());
    assert!(page.has_more && page.jobs.len() == 20);
    let begin = Instant::now();
    let newest = &page.jobs[0];
    let view = other.get(&newest.job.id).await.unwrap().unwrap();
    println!("one read in {:?}", begin.elapsed());
    assert_eq!(view.position, Some(JOBS - 1));
    let begin = Instant::now();
    other.compare(Duration::ZERO).await.unwrap();
    println!("queue compared in {:?}", begin.elapsed());
}
