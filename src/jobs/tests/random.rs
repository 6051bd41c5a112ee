//! Random operations in a random order, compared with what a store promises.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use super::bench::*;
use crate::jobs::{JobFailure, JobId, JobLease, JobStatus, JobStore, Settled, StoreSettings};
use crate::request::random_u64;

/// Operations of one run.
const OPERATIONS: usize = 150;

/// What must become of a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Promise {
    /// Its end was recorded, or its deletion.
    Ended(JobStatus),
    Deleted,
    /// It must end, in whatever way.
    Open,
}

/// A linear congruential generator, so that a failed run can be repeated from its seed.
struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % end
    }
}

pub(super) async fn random_operations_keep_every_promise(stores: &dyn Stores) {
    let seed = random_u64();
    println!("seed {seed}");
    let mut random = Random(seed);
    // Leases end only with their holders: what is compared does not depend on the machine's speed.
    let settings = || StoreSettings {
        lease: Duration::from_secs(2),
        max_attempts: 3,
        ..settings()
    };
    let mut store = stores.open(settings()).await;
    let mut jobs: HashMap<JobId, Promise> = HashMap::new();
    let mut leases: Vec<Box<dyn JobLease>> = Vec::new();
    for _ in 0..OPERATIONS {
        match random.below(12) {
            0..=3 => {
                let id = submit(&store, job("one")).await;
                jobs.insert(id, Promise::Open);
            }
            4 | 5 => {
                let lease = tokio::time::timeout(Duration::from_millis(30), store.take()).await;
                leases.extend(lease.map(Result::unwrap));
            }
            6 => end(&mut random, &mut leases, &mut jobs, true).await,
            7 => end(&mut random, &mut leases, &mut jobs, false).await,
            8 => {
                if let Some(lease) = pick(&mut random, &mut leases) {
                    match random.below(2) {
                        0 => lease.release(Duration::ZERO).await.unwrap(),
                        _ => drop(lease),
                    }
                }
            }
            9 => {
                if let Some(id) = any(&mut random, &jobs) {
                    let view = store.cancel(&id).await.unwrap();
                    let status = view.map(|view| view.job.status);
                    promise(&mut jobs, &id, status);
                }
            }
            10 => {
                if let Some(id) = any(&mut random, &jobs)
                    && store.delete(&id).await.unwrap()
                {
                    let before = jobs.insert(id, Promise::Deleted);
                    assert_ne!(before, Some(Promise::Deleted));
                }
            }
            _ if random.below(3) == 0 => {
                stores.kill(store).await;
                leases.clear();
                store = stores.open(settings()).await;
            }
            _ => store.sweep().await.unwrap(),
        }
    }
    stores.kill(store).await;
    leases.clear();
    let store = stores.open(settings()).await;
    drain(&store, &mut jobs).await;
    for (id, promise) in &jobs {
        let view = store.get(id).await.unwrap();
        let status = view.map(|view| view.job.status);
        match promise {
            Promise::Deleted => assert_eq!(status, None, "{id}"),
            Promise::Ended(ended) => assert_eq!(status, Some(*ended), "{id}"),
            Promise::Open => assert_eq!(status, Some(JobStatus::Failed), "{id}"),
        }
    }
}

/// Ends a lease.
async fn end(
    random: &mut Random,
    leases: &mut Vec<Box<dyn JobLease>>,
    jobs: &mut HashMap<JobId, Promise>,
    completes: bool,
) {
    let Some(lease) = pick(random, leases) else {
        return;
    };
    let id = lease.job().id.clone();
    let failure = JobFailure {
        code: "failed".to_owned(),
        message: "as it should".to_owned(),
    };
    let (settled, status) = if completes {
        let settled = lease.complete(vec![file(b"file")]).await;
        (settled, JobStatus::Completed)
    } else {
        (lease.fail(failure).await, JobStatus::Failed)
    };
    if settled.unwrap() == Settled::Recorded {
        let before = jobs.insert(id, Promise::Ended(status));
        assert_eq!(before, Some(Promise::Open));
    }
}

/// Compares the end of a job with the promise, and records it.
fn promise(jobs: &mut HashMap<JobId, Promise>, id: &JobId, status: Option<JobStatus>) {
    let now = match status {
        None => Promise::Deleted,
        Some(status) if status.is_ended() => Promise::Ended(status),
        Some(_) => Promise::Open,
    };
    let before = jobs.insert(id.clone(), now);
    assert!(
        before == Some(now) || before == Some(Promise::Open),
        "{id}: {before:?} {now:?}"
    );
}

/// Completes every job that can be taken.
async fn drain(store: &Arc<dyn JobStore>, jobs: &mut HashMap<JobId, Promise>) {
    // A store of several servers keeps the leases of one that stopped until they end.
    while let Ok(lease) = tokio::time::timeout(Duration::from_secs(3), store.take()).await {
        let lease = lease.unwrap();
        let id = lease.job().id.clone();
        assert_eq!(jobs.get(&id), Some(&Promise::Open), "{id} was taken");
        let settled = lease.complete(vec![file(b"file")]).await.unwrap();
        assert_eq!(settled, Settled::Recorded);
        jobs.insert(id, Promise::Ended(JobStatus::Completed));
    }
    store.sweep().await.unwrap();
}

fn pick<T>(random: &mut Random, from: &mut Vec<T>) -> Option<T> {
    match from.len() {
        0 => None,
        len => Some(from.swap_remove(random.below(len))),
    }
}

fn any(random: &mut Random, jobs: &HashMap<JobId, Promise>) -> Option<JobId> {
    let mut ids: Vec<_> = jobs.keys().cloned().collect();
    ids.sort();
    pick(random, &mut ids)
}
