//! The store in a folder: every store's tests, and what is its own.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use redb::{Database, TableDefinition};
use tempfile::TempDir;

use super::bench::*;
use super::conformance::conformance_tests;
use crate::jobs::local::LocalStore;
use crate::jobs::{JobId, JobStatus, JobStore, ListQuery, StoreError, StoreSettings};
use crate::request::random_u64;

const META: TableDefinition<&str, u64> = TableDefinition::new("meta");
const JOBS: TableDefinition<&str, (u64, &str, &[u8])> = TableDefinition::new("jobs");

/// Stores in a temporary folder.
#[derive(Debug)]
struct Folder {
    folder: TempDir,
    open: Mutex<Vec<Arc<LocalStore>>>,
}

impl Folder {
    fn new() -> Self {
        Self {
            folder: tempfile::tempdir().unwrap(),
            open: Mutex::new(Vec::new()),
        }
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("jobs")
    }

    fn database(&self) -> PathBuf {
        self.path().join("jobs.redb")
    }

    fn results(&self, id: &JobId) -> PathBuf {
        self.path().join("results").join(id.as_str())
    }

    /// The message with which the store is not opened.
    async fn refusal(&self) -> String {
        refusal(&self.path()).await
    }
}

async fn refusal(path: &Path) -> String {
    match LocalStore::open(path, settings()).await.unwrap_err() {
        StoreError::Broken(message) => message,
        other => panic!("{other:?}"),
    }
}

#[async_trait]
impl Stores for Folder {
    async fn open(&self, settings: StoreSettings) -> Arc<dyn JobStore> {
        let store = LocalStore::open(&self.path(), settings).await.unwrap();
        self.open.lock().unwrap().push(Arc::clone(&store));
        store
    }

    async fn kill(&self, _store: Arc<dyn JobStore>) {
        let open = std::mem::take(&mut *self.open.lock().unwrap());
        for store in open {
            store.close().await;
        }
    }
}

conformance_tests!(Folder::new());

#[tokio::test]
async fn a_folder_is_for_one_process() {
    let folder = Folder::new();
    let store = folder.open(settings()).await;
    let message = folder.refusal().await;
    assert!(
        message.contains("another process uses the jobs in"),
        "{message}"
    );
    assert!(
        message.contains(folder.path().to_str().unwrap()),
        "{message}"
    );
    assert!(message.contains("--jobs nats://HOST"), "{message}");
    // The refused one has changed nothing.
    submit(&store, job("one")).await;
    folder.kill(store).await;
    folder.open(settings()).await;
}

#[tokio::test]
async fn a_path_that_cannot_be_a_folder_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    fs::write(&file, "text").unwrap();
    for path in [file.clone(), file.join("jobs")] {
        let message = refusal(&path).await;
        assert!(message.contains(path.to_str().unwrap()), "{message}");
        assert!(message.contains("name a folder"), "{message}");
    }
}

#[tokio::test]
async fn files_of_others_are_refused_and_left_alone() {
    let folder = Folder::new();
    fs::create_dir(folder.path()).unwrap();
    for content in [
        &b"a text of somebody else, which is no database"[..],
        &[0; 10_000],
    ] {
        fs::write(folder.database(), content).unwrap();
        let message = folder.refusal().await;
        assert!(message.contains("jobs.redb is damaged"), "{message}");
        assert!(message.contains("move it away"), "{message}");
        assert_eq!(fs::read(folder.database()).unwrap(), content);
    }
    fs::remove_file(folder.database()).unwrap();
    let other = TableDefinition::<u64, u64>::new("jobs");
    let database = Database::create(folder.database()).unwrap();
    let change = database.begin_write().unwrap();
    change.open_table(other).unwrap().insert(1, 1).unwrap();
    change.commit().unwrap();
    drop(database);
    let message = folder.refusal().await;
    assert!(
        message.contains("is not a database of kiln's jobs"),
        "{message}"
    );
}

#[tokio::test]
async fn a_newer_format_is_refused() {
    let folder = Folder::new();
    let store = folder.open(settings()).await;
    folder.kill(store).await;
    let database = Database::create(folder.database()).unwrap();
    let change = database.begin_write().unwrap();
    change
        .open_table(META)
        .unwrap()
        .insert("format", 2)
        .unwrap();
    change.commit().unwrap();
    drop(database);
    let message = folder.refusal().await;
    assert!(message.contains("has format 2"), "{message}");
    assert!(message.contains("use the newer kiln"), "{message}");
}

/// An error must name the file.
fn check<T>(outcome: Result<T, StoreError>) {
    if let Err(error) = outcome {
        let message = error.to_string();
        let names = message.contains("jobs.redb") || message.contains("results");
        assert!(names, "{message}");
    }
}

/// Whatever bytes of the database are wrong, every answer is an answer or an error that names the file.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_database_never_panics_the_caller() {
    let folder = Folder::new();
    let store = folder.open(settings()).await;
    let mut ids = Vec::new();
    for prompt in ["one", "two", "three", "four"] {
        ids.push(submit(&store, hooked(prompt)).await);
    }
    complete_next(&store, b"file").await;
    folder.kill(store).await;
    let whole = fs::read(folder.database()).unwrap();
    for round in 0..60 {
        let mut damaged = whole.clone();
        match round % 3 {
            0 => damaged.truncate(random_u64() as usize % whole.len()),
            1 => {
                let begin = random_u64() as usize % whole.len();
                let end = whole.len().min(begin + 4096);
                damaged[begin..end].fill(0xA5);
            }
            _ => {
                for _ in 0..20 {
                    let at = random_u64() as usize % whole.len();
                    damaged[at] ^= random_u64() as u8;
                }
            }
        }
        fs::write(folder.database(), damaged).unwrap();
        match LocalStore::open(&folder.path(), settings()).await {
            Err(error) => check::<()>(Err(error)),
            Ok(store) => {
                let query = ListQuery {
                    limit: 10,
                    ..ListQuery::default()
                };
                check(store.list(&owner("me"), &query).await);
                for id in &ids {
                    check(store.get(id).await);
                    check(store.content(id, 0).await);
                }
                check(store.submit(job("new")).await);
                check(store.sweep().await);
                store.close().await;
            }
        }
    }
}

#[tokio::test]
async fn a_job_that_cannot_be_read_is_in_nobodys_way() {
    let folder = Folder::new();
    let store = folder.open(settings()).await;
    let running = submit(&store, job("running")).await;
    let _lease = take(&store).await;
    let odd = submit(&store, job("odd")).await;
    let next = submit(&store, job("next")).await;
    folder.kill(store).await;
    let database = Database::create(folder.database()).unwrap();
    let change = database.begin_write().unwrap();
    for (number, id) in [(1, &running), (2, &odd)] {
        let mut jobs = change.open_table(JOBS).unwrap();
        let me = owner("me");
        let row = (number, me.as_str(), &b"{\"id\": 1}"[..]);
        jobs.insert(id.as_str(), row).unwrap();
    }
    change.commit().unwrap();
    drop(database);
    let settings = StoreSettings {
        keep: Duration::ZERO,
        ..settings()
    };
    let store = folder.open(settings).await;
    for id in [&running, &odd] {
        let error = store.get(id).await.unwrap_err().to_string();
        assert!(
            error.contains(id.as_str()) && error.contains("cannot be read"),
            "{error}"
        );
    }
    let lease = take(&store).await;
    assert_eq!(lease.job().id, next);
    let query = ListQuery {
        limit: 10,
        ..ListQuery::default()
    };
    let page = store.list(&owner("me"), &query).await.unwrap();
    assert_eq!(page.jobs.len(), 1);
    // It is deleted in its time.
    store.sweep().await.unwrap();
    for id in [&running, &odd] {
        assert_eq!(store.get(id).await.unwrap(), None);
    }
}

#[tokio::test]
async fn files_that_are_damaged_or_gone_are_named() {
    let folder = Folder::new();
    let store = folder.open(settings()).await;
    let id = submit(&store, job("one")).await;
    complete_next(&store, b"content").await;
    let path = folder.results(&id).join("0.png");
    assert_eq!(fs::read(&path).unwrap(), b"content");
    fs::write(&path, b"c0ntent").unwrap();
    let error = store.content(&id, 0).await.unwrap_err().to_string();
    assert!(error.contains("0.png is damaged"), "{error}");
    fs::remove_file(&path).unwrap();
    let error = store.content(&id, 0).await.unwrap_err().to_string();
    assert!(
        error.contains(id.as_str()) && error.contains("no file 0"),
        "{error}"
    );
    fs::remove_dir(folder.results(&id)).unwrap();
    store.content(&id, 0).await.unwrap_err();
    assert!(store.delete(&id).await.unwrap());
}

#[tokio::test]
async fn folders_without_a_job_are_removed() {
    let folder = Folder::new();
    let store = folder.open(settings()).await;
    let kept = submit(&store, job("one")).await;
    complete_next(&store, b"file").await;
    let queued = submit(&store, job("two")).await;
    folder.kill(store).await;
    let gone = JobId::new(&owner("me"), None);
    let results = folder.path().join("results");
    for name in [gone.as_str(), queued.as_str(), ".kiln-x1.tmp", "notes"] {
        fs::create_dir(results.join(name)).unwrap();
        fs::write(results.join(name).join("0.png"), "left").unwrap();
    }
    let store = folder.open(settings()).await;
    store.sweep().await.unwrap();
    let mut names: Vec<_> = fs::read_dir(&results).unwrap().collect();
    names.sort_by_key(|name| name.as_ref().unwrap().file_name());
    let names: Vec<_> = names
        .into_iter()
        .map(|it| it.unwrap().file_name().into_string().unwrap())
        .collect();
    // A folder of somebody else stays.
    assert_eq!(names, [kept.as_str(), "notes"]);
    // A deleted job's folder is removed at once.
    store.delete(&kept).await.unwrap();
    assert!(!folder.results(&kept).exists());
    assert_eq!(complete_next(&store, b"right").await, queued);
    assert_eq!(
        fs::read(folder.results(&queued).join("0.png")).unwrap(),
        b"right"
    );
}

#[tokio::test]
async fn a_take_that_is_dropped_is_no_attempt() {
    let folder = Folder::new();
    let store = folder.open(settings()).await;
    let id = submit(&store, job("one")).await;
    for _ in 0..10 {
        let wait = Duration::from_micros(random_u64() % 3_000);
        if let Ok(lease) = tokio::time::timeout(wait, store.take()).await {
            lease.unwrap().release(Duration::ZERO).await.unwrap();
        }
    }
    let lease = take(&store).await;
    assert_eq!((&lease.job().id, lease.job().attempt), (&id, 1));
}

#[tokio::test]
async fn a_result_that_cannot_be_stored_can_be_stored_later() {
    let folder = Folder::new();
    let settings = StoreSettings {
        max_attempts: 1,
        ..settings()
    };
    let store = folder.open(settings).await;
    let id = submit(&store, job("one")).await;
    let lease = take(&store).await;
    let results = folder.path().join("results");
    fs::remove_dir(&results).unwrap();
    fs::write(&results, "no folder").unwrap();
    let error = lease.complete(vec![file(b"file")]).await.unwrap_err();
    assert!(error.to_string().contains("results"), "{error}");
    // A worker that gives up loses no attempt, as it was not to blame.
    drop(lease);
    let lease = take(&store).await;
    assert_eq!((&lease.job().id, lease.job().attempt), (&id, 1));
    lease.complete(vec![file(b"file")]).await.unwrap_err();
    fs::remove_file(&results).unwrap();
    fs::create_dir(&results).unwrap();
    lease.extend().await.unwrap();
    lease.complete(vec![file(b"file")]).await.unwrap();
    drop(lease);
    assert_eq!(get(&store, &id).await.job.status, JobStatus::Completed);
}

/// Pages of deleted jobs are used again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_database_does_not_grow_with_deleted_jobs() {
    let folder = Folder::new();
    let store = folder.open(settings()).await;
    let long = "long ".repeat(2_000);
    let mut sizes = Vec::new();
    for _ in 0..6 {
        let mut ids = Vec::new();
        for _ in 0..10 {
            ids.push(submit(&store, job(&long)).await);
        }
        for id in ids {
            store.cancel(&id).await.unwrap();
            store.delete(&id).await.unwrap();
        }
        sizes.push(fs::metadata(folder.database()).unwrap().len());
    }
    assert!(sizes[5] <= sizes[1] * 3 / 2, "{sizes:?}");
    folder.kill(store).await;
}

/// The times in docs/jobs.md, in the profile in which the tests are built.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "measures"]
async fn times() {
    let folder = Folder::new();
    let store = folder.open(settings()).await;
    let percent = |mut times: Vec<Duration>| {
        times.sort();
        (times[times.len() / 2], times[times.len() * 99 / 100])
    };
    let content = vec![7; 1_500_000];
    let (mut submits, mut takes, mut completes) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..300 {
        let begin = Instant::now();
        submit(&store, job("a photo of a red bicycle before a white wall")).await;
        submits.push(begin.elapsed());
    }
    for _ in 0..100 {
        let begin = Instant::now();
        let lease = take(&store).await;
        takes.push(begin.elapsed());
        let begin = Instant::now();
        lease.complete(vec![file(&content)]).await.unwrap();
        completes.push(begin.elapsed());
    }
    println!("submit {:?}", percent(submits));
    println!("take {:?}", percent(takes));
    println!("complete 1.5 MB {:?}", percent(completes));
    let bytes = fs::metadata(folder.database()).unwrap().len();
    println!("database of 300 jobs: {bytes} bytes");
}
