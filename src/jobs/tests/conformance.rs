//! What every store must do. Each function gets stores of no jobs.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use super::bench::*;
use crate::jobs::{
    Content, JobFailure, JobId, JobStatus, ListQuery, NewJob, Progress, Revoked, Settled,
    StoreError, StoreSettings, Submitted,
};

/// Makes a test of each function of this module. `$stores` makes [`Stores`] of no jobs.
macro_rules! conformance_tests {
    ($stores:expr) => {
        $crate::jobs::tests::conformance::conformance_tests!(
            $stores:
            a_submitted_job_is_found_after_a_restart,
            a_job_runs_from_submission_to_its_files,
        );
    };
    ($stores:expr: $($test:ident,)*) => {$(
        #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        async fn $test() {
            let stores = $stores;
            $crate::jobs::tests::conformance::$test(&stores).await;
        }
    )*};
}
pub(super) use conformance_tests;

pub(super) async fn a_submitted_job_is_found_after_a_restart(stores: &dyn Stores) {
    let store = stores.open(settings()).await;
    let new = job("one");
    let request = new.request.clone();
    let Submitted::New(view) = store.submit(new).await.unwrap() else {
        panic!("not new");
    };
    assert_eq!(view.job.status, JobStatus::Queued);
    assert_eq!(view.position, Some(0));
    assert_eq!(view.job.request, request);
    assert!(
        view.job.created_ms > 1_700_000_000_000,
        "{}",
        view.job.created_ms
    );
    stores.kill(store).await;
    let store = stores.open(settings()).await;
    assert_eq!(get(&store, &view.job.id).await, view);
    let unknown = JobId::parse("job-000000000000000000000000").unwrap();
    assert_eq!(store.get(&unknown).await.unwrap(), None);
    assert!(store.watch(&unknown).await.unwrap().is_none());
}

pub(super) async fn a_job_runs_from_submission_to_its_files(stores: &dyn Stores) {
    let store = stores.open(settings()).await;
    let id = submit(&store, job("one")).await;
    let lease = take(&store).await;
    assert_eq!(lease.job().id, id);
    assert_eq!(lease.job().attempt, 1);
    let view = get(&store, &id).await;
    assert_eq!(view.job.status, JobStatus::InProgress);
    assert_eq!(view.job.instance.as_deref(), Some("here"));
    assert!(view.job.started_ms.unwrap() >= view.job.created_ms);
    assert_eq!(view.position, None);
    let files = vec![file(b"first"), file(b"second")];
    let settled = lease.complete(files.clone()).await.unwrap();
    assert_eq!(settled, Settled::Recorded);
    let view = get(&store, &id).await;
    assert_eq!(view.job.status, JobStatus::Completed);
    assert_eq!(view.job.files, [files[0].describe(), files[1].describe()]);
    assert!(view.job.ended_ms.unwrap() >= view.job.started_ms.unwrap());
    assert_eq!(
        view.job.expires_ms.unwrap(),
        view.job.ended_ms.unwrap() + 24 * 3_600_000
    );
    stores.kill(store).await;
    let store = stores.open(settings()).await;
    for (index, file) in files.iter().enumerate() {
        let content = store.content(&id, index).await.unwrap().unwrap();
        let expected = Content::File {
            file: file.describe(),
            content: file.content.clone(),
        };
        assert_eq!(content, expected);
    }
    assert_eq!(store.content(&id, 2).await.unwrap(), None);
}
