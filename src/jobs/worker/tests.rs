//! The worker with a store in memory and a runner whose jobs end when the test says so.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, Weak};

use kiln_models::noise::NoiseGenerator;
use tokio::sync::Notify;

use super::*;
use crate::image::{Encoding, ImageFormat};
use crate::jobs::webhook::WebhookSettings;
use crate::jobs::{
    Content, JobCounts, JobId, JobLease, JobPage, JobView, ListQuery, NewJob, Owner, Revoked,
    Settled, StoreError, StoreSettings, StoredRequest, Submitted, WebhookLease,
};
use crate::request::{GenerationParams, GenerationRequest, Limits};

/// What the worker told the store of a job.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Told {
    Progress(usize),
    Completed(usize),
    Failed(String),
    Released(Duration),
    Dropped,
}

#[derive(Debug)]
struct FakeStore {
    me: Weak<Self>,
    settings: StoreSettings,
    queued: Mutex<VecDeque<StoredJob>>,
    told: Mutex<Vec<(JobId, Told)>>,
    extensions: AtomicUsize,
    takes: AtomicUsize,
    /// Calls that still fail, because a server of the store is not there.
    outage: AtomicUsize,
    /// How long the store takes to hand a job over.
    handing_over: Mutex<Duration>,
    changed: Notify,
    revoke: watch::Sender<Option<(JobId, Revoked)>>,
}

#[derive(Debug)]
struct FakeLease {
    store: Arc<FakeStore>,
    job: StoredJob,
    settled: Mutex<bool>,
}

impl FakeStore {
    fn new(jobs: usize) -> Arc<Self> {
        let params = GenerationParams {
            prompt: "a red circle".to_owned(),
            ..GenerationParams::default()
        };
        let limits = Limits::for_any_model();
        let request = GenerationRequest::new(params, &limits, NoiseGenerator::Cpu).unwrap();
        let job = |_| {
            let new = NewJob {
                owner: Owner::anyone(),
                request: StoredRequest {
                    request: request.clone(),
                    encoding: Encoding::new(ImageFormat::Png),
                    model: "m".to_owned(),
                },
                idempotency: None,
                webhook: None,
                trace: None,
            };
            new.into_stored("m", 0)
        };
        Arc::new_cyclic(|me| Self {
            me: me.clone(),
            settings: StoreSettings::new("m", "here"),
            queued: Mutex::new((0..jobs).map(job).collect()),
            told: Mutex::default(),
            extensions: AtomicUsize::new(0),
            takes: AtomicUsize::new(0),
            outage: AtomicUsize::new(0),
            handing_over: Mutex::default(),
            changed: Notify::new(),
            revoke: watch::Sender::new(None),
        })
    }

    fn tell(&self, job: &JobId, told: Told) {
        self.told.lock().unwrap().push((job.clone(), told));
    }

    fn answer(&self) -> Result<(), StoreError> {
        let less = |left: usize| left.checked_sub(1);
        let fails = self
            .outage
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, less);
        match fails {
            Ok(_) => Err(StoreError::Unavailable("outage".to_owned())),
            Err(_) => Ok(()),
        }
    }

    /// What was told, without the jobs' ids and without progress.
    fn ends(&self) -> Vec<Told> {
        let told = self.told.lock().unwrap();
        let ends = told
            .iter()
            .filter(|(_, told)| !matches!(told, Told::Progress(_)));
        ends.map(|(_, told)| told.clone()).collect()
    }

    async fn wait_for(&self, ends: &[Told]) {
        wait_until(|| self.ends().len() >= ends.len()).await;
        assert_eq!(self.ends(), ends);
    }
}

#[async_trait]
impl JobStore for FakeStore {
    fn settings(&self) -> &StoreSettings {
        &self.settings
    }

    async fn submit(&self, _: NewJob) -> Result<Submitted, StoreError> {
        unreachable!("no worker calls it")
    }

    async fn get(&self, _: &JobId) -> Result<Option<JobView>, StoreError> {
        unreachable!("no worker calls it")
    }

    async fn watch(&self, _: &JobId) -> Result<Option<watch::Receiver<JobView>>, StoreError> {
        unreachable!("no worker calls it")
    }

    async fn list(&self, _: &Owner, _: &ListQuery) -> Result<JobPage, StoreError> {
        unreachable!("no worker calls it")
    }

    async fn cancel(&self, _: &JobId) -> Result<Option<JobView>, StoreError> {
        unreachable!("no worker calls it")
    }

    async fn delete(&self, _: &JobId) -> Result<bool, StoreError> {
        unreachable!("no worker calls it")
    }

    async fn content(&self, _: &JobId, _: usize) -> Result<Option<Content>, StoreError> {
        unreachable!("no worker calls it")
    }

    async fn take(&self) -> Result<Box<dyn JobLease>, StoreError> {
        loop {
            self.answer()?;
            let next = self.queued.lock().unwrap().pop_front();
            if let Some(mut job) = next {
                job.attempt += 1;
                let time = *self.handing_over.lock().unwrap();
                if !time.is_zero() {
                    sleep(time).await;
                }
                self.takes.fetch_add(1, Ordering::SeqCst);
                return Ok(Box::new(FakeLease {
                    store: self.me.upgrade().unwrap(),
                    job,
                    settled: Mutex::new(false),
                }));
            }
            self.changed.notified().await;
        }
    }

    async fn take_webhook(&self) -> Result<Box<dyn WebhookLease>, StoreError> {
        std::future::pending().await
    }

    async fn sweep(&self) -> Result<(), StoreError> {
        self.answer()
    }

    async fn counts(&self) -> Result<JobCounts, StoreError> {
        Ok(JobCounts {
            queued: self.queued.lock().unwrap().len() as u64,
            ..JobCounts::default()
        })
    }
}

impl FakeLease {
    fn settle(&self, told: Told) -> Settled {
        *self.settled.lock().unwrap() = true;
        self.store.tell(&self.job.id, told);
        Settled::Recorded
    }
}

#[async_trait]
impl JobLease for FakeLease {
    fn job(&self) -> &StoredJob {
        &self.job
    }

    async fn revoked(&self) -> Revoked {
        let mut revoke = self.store.revoke.subscribe();
        let is_it = |revoked: &Option<(JobId, Revoked)>| matches!(revoked, Some((id, _)) if *id == self.job.id);
        let revoked = revoke.wait_for(is_it).await.unwrap();
        revoked.as_ref().unwrap().1
    }

    async fn extend(&self) -> Result<(), StoreError> {
        self.store.answer()?;
        self.store.extensions.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    fn report(&self, progress: Progress) {
        self.store.tell(&self.job.id, Told::Progress(progress.done));
    }

    async fn complete(&self, files: Vec<JobFile>) -> Result<Settled, StoreError> {
        self.store.answer()?;
        Ok(self.settle(Told::Completed(files.len())))
    }

    async fn fail(&self, failure: JobFailure) -> Result<Settled, StoreError> {
        self.store.answer()?;
        Ok(self.settle(Told::Failed(failure.code)))
    }

    async fn release(&self, after: Duration) -> Result<(), StoreError> {
        self.settle(Told::Released(after));
        Ok(())
    }
}

impl Drop for FakeLease {
    /// The job is available again, unless it was cancelled or another worker has it.
    fn drop(&mut self) {
        if !*self.settled.lock().unwrap() {
            self.store.tell(&self.job.id, Told::Dropped);
            if self.store.revoke.borrow().is_some() {
                return;
            }
            self.store
                .queued
                .lock()
                .unwrap()
                .push_back(self.job.clone());
            self.store.changed.notify_one();
        }
    }
}

/// A runner whose jobs wait for [`FakeRunner::begin`] and then for [`FakeRunner::end`].
#[derive(Debug, Default)]
struct FakeRunner {
    begun: watch::Sender<usize>,
    ended: watch::Sender<VecDeque<Result<usize, RunError>>>,
    /// Jobs whose future exists.
    futures: AtomicUsize,
    most: AtomicUsize,
    begins: AtomicUsize,
    work: AtomicU64,
}

impl FakeRunner {
    /// Lets this many jobs begin.
    fn begin(&self, jobs: usize) {
        self.begun.send_modify(|begun| *begun += jobs);
    }

    fn end(&self, outcome: Result<usize, RunError>) {
        self.ended.send_modify(|ended| ended.push_back(outcome));
    }
}

struct Counted<'a>(&'a AtomicUsize);

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

#[async_trait]
impl Runner for FakeRunner {
    async fn run(
        &self,
        _: &StoredJob,
        report: &(dyn Fn(Progress) + Send + Sync),
    ) -> Result<Vec<JobFile>, RunError> {
        let now = self.futures.fetch_add(1, Ordering::SeqCst) + 1;
        self.most.fetch_max(now, Ordering::SeqCst);
        let _counted = Counted(&self.futures);
        let (mut begun, mut ended) = (self.begun.subscribe(), self.ended.subscribe());
        loop {
            begun.wait_for(|begun| *begun > 0).await.unwrap();
            let takes = |begun: &mut usize| {
                let may = *begun > 0;
                *begun -= usize::from(may);
                may
            };
            if self.begun.send_if_modified(takes) {
                break;
            }
        }
        self.begins.fetch_add(1, Ordering::SeqCst);
        report(Progress { done: 0, total: 2 });
        loop {
            ended.wait_for(|ended| !ended.is_empty()).await.unwrap();
            let mut outcome = None;
            self.ended.send_modify(|ended| outcome = ended.pop_front());
            let Some(outcome) = outcome else { continue };
            let file = JobFile {
                media_type: "image/png",
                extension: "png",
                content: Vec::new().into(),
            };
            return outcome.map(|files| vec![file; files]);
        }
    }

    fn has_room(&self, held: Held) -> bool {
        held.waiting == 0 && held.total() < 3
    }

    fn work_done(&self) -> u64 {
        self.work.load(Ordering::SeqCst)
    }
}

fn settings() -> WorkerSettings {
    WorkerSettings {
        not_now: Duration::from_millis(7),
        ..WorkerSettings::new(&StoreSettings::new("m", "here"), None)
    }
}

fn start(store: &Arc<FakeStore>, runner: &Arc<FakeRunner>, settings: WorkerSettings) -> Worker {
    let store: Arc<dyn JobStore> = Arc::clone(store) as Arc<dyn JobStore>;
    Worker::start(store, Arc::clone(runner), settings)
}

/// Time is virtual: it passes when all tasks wait.
async fn wait_until(is_so: impl Fn() -> bool) {
    for _ in 0..100_000 {
        if is_so() {
            return;
        }
        sleep(Duration::from_millis(1)).await;
    }
    panic!("what was waited for did not happen");
}

async fn wait_for_takes(store: &FakeStore, takes: usize) {
    wait_until(|| store.takes.load(Ordering::SeqCst) >= takes).await;
}

fn failure(code: &str) -> JobFailure {
    JobFailure {
        code: code.to_owned(),
        message: "why".to_owned(),
    }
}

#[tokio::test(start_paused = true)]
async fn one_job_is_taken_ahead_and_the_others_stay_in_the_store() {
    let (store, runner) = (FakeStore::new(9), Arc::new(FakeRunner::default()));
    let _worker = start(&store, &runner, settings());
    wait_for_takes(&store, 1).await;
    sleep(Duration::from_secs(1)).await;
    assert_eq!(store.takes.load(Ordering::SeqCst), 1);
    runner.begin(1);
    wait_for_takes(&store, 2).await;
    runner.begin(5);
    wait_for_takes(&store, 3).await;
    // The runner takes no more than three.
    sleep(Duration::from_secs(1)).await;
    assert_eq!(store.takes.load(Ordering::SeqCst), 3);
    runner.end(Ok(2));
    wait_for_takes(&store, 4).await;
    store.wait_for(&[Told::Completed(2)]).await;
    assert!(runner.most.load(Ordering::SeqCst) <= 3);
}

#[tokio::test(start_paused = true)]
async fn every_outcome_is_told() {
    let (store, runner) = (FakeStore::new(3), Arc::new(FakeRunner::default()));
    let _worker = start(&store, &runner, settings());
    for (outcome, told) in [
        (
            Err(RunError::Failed(failure("not_finite"))),
            Told::Failed("not_finite".to_owned()),
        ),
        (
            Err(RunError::NotNow("no memory".to_owned())),
            Told::Released(Duration::from_millis(7)),
        ),
        (Ok(1), Told::Completed(1)),
    ] {
        runner.begin(1);
        runner.end(outcome);
        let ends = store.ends().len();
        wait_until(|| store.ends().len() > ends).await;
        assert_eq!(store.ends()[ends], told);
    }
}

#[tokio::test(start_paused = true)]
async fn an_attempt_that_breaks_counts_and_the_last_one_fails_the_job() {
    let (store, runner) = (FakeStore::new(1), Arc::new(FakeRunner::default()));
    let _worker = start(&store, &runner, settings());
    for _ in 0..3 {
        runner.begin(1);
        runner.end(Err(RunError::Broken(failure("generation_failed"))));
    }
    let failed = Told::Failed("generation_failed".to_owned());
    store
        .wait_for(&[Told::Dropped, Told::Dropped, failed])
        .await;
    assert_eq!(store.takes.load(Ordering::SeqCst), 3);
}

#[tokio::test(start_paused = true)]
async fn a_cancelled_job_and_a_lost_one_stop() {
    for revoked in [Revoked::Cancelled, Revoked::Lost] {
        let (store, runner) = (FakeStore::new(1), Arc::new(FakeRunner::default()));
        let id = store.queued.lock().unwrap()[0].id.clone();
        let _worker = start(&store, &runner, settings());
        runner.begin(1);
        wait_until(|| runner.begins.load(Ordering::SeqCst) == 1).await;
        store.revoke.send_replace(Some((id, revoked)));
        store.wait_for(&[Told::Dropped]).await;
        wait_until(|| runner.futures.load(Ordering::SeqCst) == 0).await;
        store.revoke.send_replace(None);
    }
}

#[tokio::test(start_paused = true)]
async fn a_lease_is_extended_while_the_job_waits_and_runs() {
    let (store, runner) = (FakeStore::new(1), Arc::new(FakeRunner::default()));
    let _worker = start(&store, &runner, settings());
    // The lease has 30 seconds.
    sleep(Duration::from_secs(31)).await;
    assert_eq!(store.extensions.load(Ordering::SeqCst), 3);
    runner.begin(1);
    sleep(Duration::from_secs(30)).await;
    assert_eq!(store.extensions.load(Ordering::SeqCst), 6);
    runner.end(Ok(1));
    store.wait_for(&[Told::Completed(1)]).await;
    sleep(Duration::from_mins(1)).await;
    assert_eq!(store.extensions.load(Ordering::SeqCst), 6);
}

#[tokio::test(start_paused = true)]
async fn files_are_kept_while_the_store_does_not_answer() {
    let (store, runner) = (FakeStore::new(1), Arc::new(FakeRunner::default()));
    let _worker = start(&store, &runner, settings());
    runner.begin(1);
    wait_until(|| runner.begins.load(Ordering::SeqCst) == 1).await;
    store.outage.store(12, Ordering::SeqCst);
    runner.end(Ok(1));
    store.wait_for(&[Told::Completed(1)]).await;
    assert_eq!(store.outage.load(Ordering::SeqCst), 0);
    assert_eq!(runner.begins.load(Ordering::SeqCst), 1);
}

#[tokio::test(start_paused = true)]
async fn files_are_dropped_once_another_worker_has_the_job() {
    let (store, runner) = (FakeStore::new(1), Arc::new(FakeRunner::default()));
    let id = store.queued.lock().unwrap()[0].id.clone();
    let _worker = start(&store, &runner, settings());
    runner.begin(1);
    wait_until(|| runner.begins.load(Ordering::SeqCst) == 1).await;
    store.outage.store(usize::MAX, Ordering::SeqCst);
    runner.end(Ok(1));
    sleep(Duration::from_secs(40)).await;
    assert_eq!(store.ends(), []);
    store.revoke.send_replace(Some((id, Revoked::Lost)));
    store.wait_for(&[Told::Dropped]).await;
}

#[tokio::test(start_paused = true)]
async fn a_store_that_does_not_answer_is_asked_again() {
    let (store, runner) = (FakeStore::new(1), Arc::new(FakeRunner::default()));
    store.outage.store(5, Ordering::SeqCst);
    let began = Instant::now();
    let _worker = start(&store, &runner, settings());
    runner.begin(1);
    runner.end(Ok(1));
    store.wait_for(&[Told::Completed(1)]).await;
    // 0.25, 0.5, 1, 2 and 4 seconds, or half of each.
    let waited = began.elapsed();
    assert!(waited > Duration::from_secs(3) && waited < Duration::from_secs(9));
}

#[tokio::test(start_paused = true)]
async fn a_worker_that_drains_finishes_what_has_begun_and_releases_the_rest() {
    let (store, runner) = (FakeStore::new(5), Arc::new(FakeRunner::default()));
    let mut worker = start(&store, &runner, settings());
    runner.begin(1);
    wait_for_takes(&store, 2).await;
    worker.drain();
    store.wait_for(&[Told::Released(Duration::ZERO)]).await;
    runner.end(Ok(1));
    worker.ended().await;
    assert_eq!(
        store.ends(),
        [Told::Released(Duration::ZERO), Told::Completed(1)]
    );
    assert_eq!(store.takes.load(Ordering::SeqCst), 2);
}

#[tokio::test(start_paused = true)]
async fn a_job_that_is_being_handed_over_is_released() {
    let (store, runner) = (FakeStore::new(1), Arc::new(FakeRunner::default()));
    *store.handing_over.lock().unwrap() = Duration::from_millis(200);
    let mut worker = start(&store, &runner, settings());
    wait_until(|| store.queued.lock().unwrap().is_empty()).await;
    worker.drain();
    worker.ended().await;
    assert_eq!(store.ends(), [Told::Released(Duration::ZERO)]);
}

#[tokio::test(start_paused = true)]
async fn a_worker_that_stops_releases_all() {
    let (store, runner) = (FakeStore::new(5), Arc::new(FakeRunner::default()));
    let mut worker = start(&store, &runner, settings());
    runner.begin(1);
    wait_for_takes(&store, 2).await;
    worker.drain();
    worker.stop();
    worker.ended().await;
    assert_eq!(store.ends(), [const { Told::Released(Duration::ZERO) }; 2]);
    assert_eq!(runner.futures.load(Ordering::SeqCst), 0);
}

#[tokio::test(start_paused = true)]
async fn a_worker_that_stops_gives_up_on_a_store_that_does_not_answer() {
    let (store, runner) = (FakeStore::new(1), Arc::new(FakeRunner::default()));
    let mut worker = start(&store, &runner, settings());
    runner.begin(1);
    wait_until(|| runner.begins.load(Ordering::SeqCst) == 1).await;
    store.outage.store(usize::MAX, Ordering::SeqCst);
    runner.end(Ok(1));
    sleep(Duration::from_secs(5)).await;
    worker.drain();
    sleep(Duration::from_mins(1)).await;
    assert_eq!(store.ends(), []);
    worker.stop();
    worker.ended().await;
    assert_eq!(store.ends(), [Told::Dropped]);
}

#[tokio::test(start_paused = true)]
async fn a_device_that_hangs_loses_its_jobs_and_gets_none() {
    let (store, runner) = (FakeStore::new(5), Arc::new(FakeRunner::default()));
    let settings = WorkerSettings {
        stall_timeout: Some(Duration::from_mins(10)),
        ..settings()
    };
    let _worker = start(&store, &runner, settings);
    runner.begin(1);
    wait_for_takes(&store, 2).await;
    for _ in 0..10 {
        sleep(Duration::from_mins(5)).await;
        runner.work.fetch_add(1, Ordering::SeqCst);
    }
    assert_eq!(store.ends(), []);
    sleep(Duration::from_mins(11)).await;
    let mut ends = store.ends();
    ends.sort_by_key(|told| matches!(told, Told::Dropped));
    // The job that had not begun loses no attempt.
    assert_eq!(ends, [Told::Released(Duration::ZERO), Told::Dropped]);
    sleep(Duration::from_hours(1)).await;
    assert_eq!(store.takes.load(Ordering::SeqCst), 2);
    runner.work.fetch_add(1, Ordering::SeqCst);
    wait_for_takes(&store, 3).await;
}

#[tokio::test(start_paused = true)]
async fn an_idle_worker_does_not_hang() {
    let (store, runner) = (FakeStore::new(0), Arc::new(FakeRunner::default()));
    let settings = WorkerSettings {
        stall_timeout: Some(Duration::from_mins(1)),
        ..settings()
    };
    let worker = start(&store, &runner, settings);
    sleep(Duration::from_hours(1)).await;
    assert_eq!(*worker.phase.borrow(), Phase::Taking);
    assert_eq!(store.ends(), []);
}

#[tokio::test(start_paused = true)]
async fn housekeeping_goes_on_after_an_outage() {
    let store = FakeStore::new(4);
    let stats = &store.settings.stats;
    store.outage.store(3, Ordering::SeqCst);
    let webhooks = WebhookSettings::default();
    let _house = Housekeeping::start(Arc::clone(&store) as Arc<dyn JobStore>, webhooks);
    wait_until(|| stats.counts().is_some()).await;
    assert_eq!(stats.counts().unwrap().queued, 4);
}
