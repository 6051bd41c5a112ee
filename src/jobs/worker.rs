//! Runs the jobs of a store, as many at once as the device has use for.
//!
//! A [`Worker`] takes a job only when its [`Runner`] can begin it: jobs that wait stay in the store, where
//! every worker can take them. Each job has two tasks besides the loop that takes jobs: one runs it, and
//! one extends its lease, so that a long step never looks like a dead worker. A third watches the runner:
//! if no step has ended for [`WorkerSettings::stall_timeout`], the device hangs, and the jobs are given up
//! to other workers.

mod attempt;
mod house;

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{Instant, sleep, timeout};

use super::{JobFailure, JobFile, JobStats, JobStore, Progress, StoredJob};

use self::attempt::Attempt;

pub use self::house::Housekeeping;

/// Generates the images of jobs.
#[async_trait]
pub trait Runner: Send + Sync + 'static {
    /// Generates the images of one job. `report` is called when the job begins, with no step done, and
    /// after each step. Dropping the future cancels the work.
    async fn run(
        &self,
        job: &StoredJob,
        report: &(dyn Fn(Progress) + Send + Sync),
    ) -> Result<Vec<JobFile>, RunError>;

    /// Whether one more job should be taken from the store, if the worker has these.
    fn has_room(&self, held: Held) -> bool;

    /// A number that changes whenever a piece of work has ended: a step of any job, for example.
    fn work_done(&self) -> u64;
}

/// Why a job did not end with images.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RunError {
    /// Every worker would fail in the same way.
    Failed(JobFailure),
    /// The job, or this machine, is at fault: the attempt counts, and the last one fails the job.
    Broken(JobFailure),
    /// This worker cannot run it now, as it is stopping or has no memory: another attempt may work.
    /// The text says why.
    NotNow(String),
}

/// Settings of a worker.
#[derive(Debug, Clone)]
pub struct WorkerSettings {
    /// [`StoreSettings::lease`](super::StoreSettings::lease).
    pub lease: Duration,
    /// [`StoreSettings::max_attempts`](super::StoreSettings::max_attempts).
    pub max_attempts: u32,
    /// Jobs are given up if no step has ended for this time; `None` for never.
    pub stall_timeout: Option<Duration>,
    /// Time after which a job is available again that this worker could not run.
    pub not_now: Duration,
}

impl WorkerSettings {
    /// The settings of a worker of a store with these settings.
    pub fn new(store: &super::StoreSettings, stall_timeout: Option<Duration>) -> Self {
        Self {
            lease: store.lease,
            max_attempts: store.max_attempts,
            stall_timeout,
            not_now: Duration::from_secs(5),
        }
    }
}

/// Jobs that a worker has taken and that have not ended.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Held {
    /// Those that have not begun.
    pub waiting: usize,
    /// Those that have begun.
    pub running: usize,
    /// Those whose outcome is being recorded.
    pub storing: usize,
}

impl Held {
    pub fn total(self) -> usize {
        self.waiting + self.running + self.storing
    }
}

/// What a worker does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Phase {
    /// It takes jobs.
    Taking,
    /// It finishes the jobs that have begun, and releases the others.
    Draining,
    /// It releases all jobs.
    Stopping,
}

/// A running worker. Dropping it aborts its jobs, which become available again when their leases end.
#[derive(Debug)]
pub struct Worker {
    phase: watch::Sender<Phase>,
    tasks: JoinHandle<()>,
}

impl Worker {
    /// Starts to take jobs from the store. Must be called in a tokio runtime.
    pub fn start<R: Runner>(
        store: Arc<dyn JobStore>,
        runner: Arc<R>,
        settings: WorkerSettings,
    ) -> Self {
        let phase = watch::Sender::new(Phase::Taking);
        let shared = Arc::new(Shared {
            stats: Arc::clone(&store.settings().stats),
            store,
            runner,
            settings,
            held: watch::Sender::default(),
            stalled: watch::Sender::new(false),
        });
        let receiver = phase.subscribe();
        let tasks = tokio::spawn(async move {
            tokio::select! {
                () = shared.take_jobs(receiver) => {}
                () = shared.watch_for_stalls() => {}
            }
        });
        Self { phase, tasks }
    }

    /// Takes no more jobs, releases those that have not begun, and goes on with the others.
    pub fn drain(&self) {
        self.enter(Phase::Draining);
    }

    /// Takes no more jobs, and releases all.
    pub fn stop(&self) {
        self.enter(Phase::Stopping);
    }

    fn enter(&self, next: Phase) {
        self.phase.send_if_modified(|phase| {
            let changes = *phase < next;
            *phase = next.max(*phase);
            changes
        });
    }

    /// Waits until no job is left, after [`Worker::drain`] or [`Worker::stop`].
    pub async fn ended(&mut self) {
        // An error means that a task panicked, which the log says.
        drop((&mut self.tasks).await);
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.tasks.abort();
    }
}

/// What the tasks of a worker share.
#[derive(Debug)]
struct Shared<R> {
    store: Arc<dyn JobStore>,
    runner: Arc<R>,
    settings: WorkerSettings,
    stats: Arc<JobStats>,
    held: watch::Sender<Held>,
    /// Whether the device hangs.
    stalled: watch::Sender<bool>,
}

/// How often a worker without room looks for it, besides when one of its jobs changes.
const LOOK_FOR_ROOM: Duration = Duration::from_millis(100);

/// How long a worker that stops waits for a job that the store may be handing over.
const LAST_TAKE: Duration = Duration::from_millis(500);

impl<R: Runner> Shared<R> {
    /// Takes jobs until the phase changes, and waits for the end of those that it took.
    async fn take_jobs(self: &Arc<Self>, mut phase: watch::Receiver<Phase>) {
        let mut attempts = JoinSet::new();
        let mut held = self.held.subscribe();
        let mut backoff = Backoff::new();
        while *phase.borrow_and_update() == Phase::Taking {
            while attempts.try_join_next().is_some() {}
            let now = *held.borrow_and_update();
            if *self.stalled.borrow() || !self.runner.has_room(now) {
                tokio::select! {
                    _ = phase.changed() => {}
                    _ = held.changed() => {}
                    () = sleep(LOOK_FOR_ROOM) => {}
                }
                continue;
            }
            let mut take = self.store.take();
            let taken = tokio::select! {
                biased;
                _ = phase.changed() => None,
                taken = &mut take => Some(taken),
            };
            let taken = match taken {
                Some(taken) => taken,
                // A job that is being handed over is released like others, and so loses no attempt.
                None => match timeout(LAST_TAKE, take).await {
                    Ok(taken) => taken,
                    Err(_) => break,
                },
            };
            match taken {
                Ok(lease) => {
                    backoff = Backoff::new();
                    // Before the next look at `held`.
                    self.held.send_modify(|held| held.waiting += 1);
                    let attempt = Attempt::new(Arc::clone(self), lease, phase.clone());
                    attempts.spawn(attempt.run());
                }
                Err(error) => {
                    let wait = backoff.next();
                    let seconds = wait.as_secs_f64();
                    tracing::warn!("no job could be taken, next try in {seconds:.1} s: {error}");
                    tokio::select! {
                        _ = phase.changed() => {}
                        () = sleep(wait) => {}
                    }
                }
            }
        }
        while attempts.join_next().await.is_some() {}
    }

    /// Sets and clears `stalled`. Never returns.
    async fn watch_for_stalls(&self) {
        let Some(stall_timeout) = self.settings.stall_timeout else {
            return std::future::pending().await;
        };
        let interval = (stall_timeout / 4).min(Duration::from_secs(5));
        let (mut done, mut since) = (self.runner.work_done(), Instant::now());
        loop {
            sleep(interval).await;
            let now_done = self.runner.work_done();
            let held = *self.held.borrow();
            let is_stalled = *self.stalled.borrow();
            if now_done != done || (held.waiting + held.running == 0 && !is_stalled) {
                (done, since) = (now_done, Instant::now());
                if self.stalled.send_replace(false) {
                    tracing::info!("a step has ended: jobs are taken again");
                }
            } else if !is_stalled && since.elapsed() >= stall_timeout {
                let seconds = stall_timeout.as_secs_f64();
                tracing::error!(
                    "no step has ended for {seconds} s (--stall-timeout): the jobs of this server are left \
                     to others, and none is taken until a step ends. Restart kiln if the device hangs"
                );
                self.stalled.send_replace(true);
            }
        }
    }
}

/// Waits between tries: each is twice as long as the one before, up to a bound, and a random part is
/// left out.
#[derive(Debug)]
struct Backoff(Duration);

impl Backoff {
    const FIRST: Duration = Duration::from_millis(250);
    const LONGEST: Duration = Duration::from_secs(15);

    fn new() -> Self {
        Self(Self::FIRST)
    }

    fn next(&mut self) -> Duration {
        let wait = self.0;
        self.0 = (2 * wait).min(Self::LONGEST);
        let part = (crate::request::random_u64() >> 40) as f64 / f64::from(1 << 24);
        wait.mul_f64(0.5 + 0.5 * part)
    }
}

#[cfg(test)]
mod tests;
