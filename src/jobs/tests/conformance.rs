//! What every store must do. Each function gets stores of no jobs.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio::task::JoinSet;

use super::bench::*;
use crate::jobs::{
    Content, JobFailure, JobId, JobStatus, JobStore, JobView, ListQuery, NewJob, Progress, Revoked,
    Settled, StoreError, StoreSettings, Submitted,
};
use crate::request::random_u64;

/// Makes a test of each function of this module and of `random`. `$stores` makes [`Stores`] of no jobs.
macro_rules! conformance_tests {
    ($stores:expr) => {
        $crate::jobs::tests::conformance::conformance_tests!($stores =>
            conformance::a_submitted_job_is_found_after_a_restart,
            conformance::a_job_runs_from_submission_to_its_files,
            conformance::a_key_names_one_job,
            conformance::a_key_that_many_submit_at_once_names_one_job,
            conformance::jobs_are_taken_in_the_order_of_submission,
            conformance::jobs_of_another_model_wait_for_it,
            conformance::a_lease_that_is_not_extended_is_lost,
            conformance::a_lease_that_is_extended_is_kept,
            conformance::a_dropped_lease_makes_the_job_available,
            conformance::a_released_job_waits_and_its_attempt_does_not_count,
            conformance::a_dropped_take_loses_no_job,
            conformance::a_job_whose_workers_are_lost_fails,
            conformance::a_failed_job_says_why,
            conformance::a_cancelled_job_has_ended_at_once,
            conformance::a_running_job_that_is_cancelled_is_revoked,
            conformance::an_ended_job_cannot_be_cancelled,
            conformance::cancel_and_complete_never_both_win,
            conformance::an_ended_job_can_be_deleted,
            conformance::ended_jobs_expire,
            conformance::the_first_ended_jobs_make_room_for_files,
            conformance::lists_are_of_one_owner_and_newest_first,
            conformance::pages_are_stable_while_jobs_are_added,
            conformance::a_watcher_sees_a_job_to_its_end,
            conformance::a_watcher_sees_a_cancelled_job_end,
            conformance::a_full_queue_refuses_jobs,
            conformance::counts_follow_the_jobs,
            conformance::webhooks_are_tried_until_they_are_settled,
            conformance::webhooks_survive_restarts,
            conformance::every_end_has_its_webhook,
            conformance::a_dropped_webhook_is_available_again,
            conformance::a_deleted_job_has_no_webhook,
            conformance::many_workers_complete_each_job_once,
            conformance::a_restart_in_the_middle_of_everything_loses_nothing,
            random::random_operations_keep_every_promise,
        );
    };
    ($stores:expr => $($module:ident::$test:ident,)*) => {$(
        #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        async fn $test() {
            let stores = $stores;
            $crate::jobs::tests::$module::$test(&stores).await;
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
    assert_eq!(view.job.request, request);
    assert_eq!(view.job.attempt, 0);
    let created_ms = view.job.created_ms;
    assert!(created_ms > 1_700_000_000_000, "{created_ms}");
    stores.kill(store).await;
    let store = stores.open(settings()).await;
    assert_eq!(get(&store, &view.job.id).await.job, view.job);
    let unknown = JobId::parse("job-000000000000000000000000").unwrap();
    assert_eq!(store.get(&unknown).await.unwrap(), None);
    assert!(store.watch(&unknown).await.unwrap().is_none());
    assert_eq!(store.cancel(&unknown).await.unwrap(), None);
    assert!(!store.delete(&unknown).await.unwrap());
    assert_eq!(store.content(&unknown, 0).await.unwrap(), None);
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
    assert_eq!(store.content(&id, 0).await.unwrap(), None);
    let files = vec![file(b"first"), file(b"second")];
    let settled = lease.complete(files.clone()).await.unwrap();
    assert_eq!(settled, Settled::Recorded);
    let view = get(&store, &id).await;
    assert_eq!(view.job.status, JobStatus::Completed);
    assert_eq!(view.job.files, [files[0].describe(), files[1].describe()]);
    let ended_ms = view.job.ended_ms.unwrap();
    assert!(ended_ms >= view.job.started_ms.unwrap());
    let keep_ms = 24 * 3_600_000;
    assert_eq!(view.job.expires_ms.unwrap(), ended_ms + keep_ms);
    stores.kill(store).await;
    let store = stores.open(settings()).await;
    for (index, file) in files.iter().enumerate() {
        assert_eq!(content(&store, &id, index).await.unwrap(), file.content);
    }
    assert_eq!(store.content(&id, 2).await.unwrap(), None);
}

pub(super) async fn a_key_names_one_job(stores: &dyn Stores) {
    let mut store = stores.open(settings()).await;
    let id = submit(&store, keyed("one", "key")).await;
    for status in [JobStatus::Queued, JobStatus::Completed] {
        let same = store.submit(keyed("one", "key")).await.unwrap();
        let Submitted::Existing(view) = same else {
            panic!("{same:?}");
        };
        assert_eq!((&view.job.id, view.job.status), (&id, status));
        let other_body = store.submit(keyed("two", "key")).await.unwrap();
        assert_eq!(other_body, Submitted::OtherBody(id.clone()));
        if status == JobStatus::Queued {
            stores.kill(store).await;
            store = stores.open(settings()).await;
            assert_eq!(complete_next(&store, b"file").await, id);
        }
    }
    let others = NewJob {
        owner: owner("other"),
        ..keyed("two", "key")
    };
    assert_ne!(submit(&store, others).await, id);
    assert_ne!(submit(&store, keyed("one", "another key")).await, id);
}

pub(super) async fn a_key_that_many_submit_at_once_names_one_job(stores: &dyn Stores) {
    let store = stores.open(settings()).await;
    let mut clients = JoinSet::new();
    for client in 0..12 {
        let store = Arc::clone(&store);
        let prompt = if client % 4 == 0 { "other" } else { "one" };
        clients.spawn(async move { store.submit(keyed(prompt, "key")).await.unwrap() });
    }
    let outcomes = soon(clients.join_all()).await;
    let news = outcomes.iter().filter(|it| matches!(it, Submitted::New(_)));
    assert_eq!(news.count(), 1, "{outcomes:?}");
    let mut ids: Vec<_> = outcomes.iter().map(id_of).collect();
    ids.dedup();
    assert_eq!(ids.len(), 1, "{outcomes:?}");
    assert_eq!(complete_next(&store, b"file").await, ids[0]);
    assert!(nothing_to_take(&store).await);
}

pub(super) async fn jobs_are_taken_in_the_order_of_submission(stores: &dyn Stores) {
    let store = stores.open(settings()).await;
    let mut ids = Vec::new();
    for prompt in ["one", "two", "three", "four"] {
        ids.push(submit(&store, job(prompt)).await);
    }
    assert_eq!(complete_next(&store, b"file").await, ids.remove(0));
    // A store may not know positions.
    for (index, id) in ids.iter().enumerate() {
        let position = get(&store, id).await.position;
        assert!(
            position.is_none_or(|position| position == index),
            "{position:?}"
        );
    }
    stores.kill(store).await;
    let store = stores.open(settings()).await;
    for id in ids {
        assert_eq!(complete_next(&store, b"file").await, id);
    }
    assert!(nothing_to_take(&store).await);
}

pub(super) async fn jobs_of_another_model_wait_for_it(stores: &dyn Stores) {
    let other_model = || StoreSettings {
        model: "other-model".to_owned(),
        ..settings()
    };
    let store = stores.open(settings()).await;
    let id = submit(&store, job("one")).await;
    stores.kill(store).await;
    let store = stores.open(other_model()).await;
    assert!(nothing_to_take(&store).await);
    assert_eq!(store.counts().await.unwrap().queued, 0);
    assert_eq!(get(&store, &id).await.job.status, JobStatus::Queued);
    stores.kill(store).await;
    let store = stores.open(settings()).await;
    assert_eq!(complete_next(&store, b"file").await, id);
}

pub(super) async fn a_lease_that_is_not_extended_is_lost(stores: &dyn Stores) {
    let store = stores.open(settings()).await;
    let id = submit(&store, job("one")).await;
    let hung = take(&store).await;
    let second = take(&store).await;
    assert_eq!((&second.job().id, second.job().attempt), (&id, 2));
    assert_eq!(soon(hung.revoked()).await, Revoked::Lost);
    hung.report(Progress { done: 7, total: 9 });
    let settled = hung.complete(vec![file(b"late")]).await.unwrap();
    assert_eq!(settled, Settled::Superseded);
    let view = get(&store, &id).await;
    assert_eq!(view.job.status, JobStatus::InProgress);
    assert_eq!(view.progress, Progress::default());
    let settled = second.complete(vec![file(b"right")]).await.unwrap();
    assert_eq!(settled, Settled::Recorded);
    assert_eq!(content(&store, &id, 0).await.unwrap(), b"right"[..]);
}

pub(super) async fn a_lease_that_is_extended_is_kept(stores: &dyn Stores) {
    // Long enough for a machine that is busy.
    let settings = StoreSettings {
        lease: Duration::from_secs(1),
        ..settings()
    };
    let lease_time = settings.lease;
    let store = stores.open(settings).await;
    let id = submit(&store, job("one")).await;
    let lease = take(&store).await;
    let begin = Instant::now();
    while begin.elapsed() < 2 * lease_time {
        lease.extend().await.unwrap();
        let other = tokio::time::timeout(lease_time / 8, store.take()).await;
        assert!(other.is_err(), "{other:?}");
        store.sweep().await.unwrap();
    }
    let settled = lease.complete(vec![file(b"file")]).await.unwrap();
    assert_eq!(settled, Settled::Recorded);
    assert_eq!(get(&store, &id).await.job.attempt, 1);
}

pub(super) async fn a_dropped_lease_makes_the_job_available(stores: &dyn Stores) {
    let store = stores.open(settings()).await;
    let id = submit(&store, job("one")).await;
    drop(take(&store).await);
    let lease = take(&store).await;
    assert_eq!((&lease.job().id, lease.job().attempt), (&id, 2));
    let failure = failure();
    assert_eq!(lease.fail(failure).await.unwrap(), Settled::Recorded);
}

pub(super) async fn a_released_job_waits_and_its_attempt_does_not_count(stores: &dyn Stores) {
    let settings = StoreSettings {
        max_attempts: 1,
        ..settings()
    };
    let store = stores.open(settings).await;
    let id = submit(&store, job("one")).await;
    take(&store).await.release(Duration::ZERO).await.unwrap();
    let lease = take(&store).await;
    assert_eq!((&lease.job().id, lease.job().attempt), (&id, 1));
    let wait = Duration::from_secs(1);
    let begin = Instant::now();
    lease.release(wait).await.unwrap();
    let view = get(&store, &id).await;
    assert_eq!((view.job.status, view.job.attempt), (JobStatus::Queued, 0));
    let later = submit(&store, job("two")).await;
    assert_eq!(complete_next(&store, b"file").await, later);
    let lease = take(&store).await;
    assert!(begin.elapsed() >= wait, "{:?}", begin.elapsed());
    assert_eq!((&lease.job().id, lease.job().attempt), (&id, 1));
    lease.complete(vec![file(b"file")]).await.unwrap();
}

pub(super) async fn a_dropped_take_loses_no_job(stores: &dyn Stores) {
    let store = stores.open(settings()).await;
    let id = submit(&store, job("one")).await;
    for _ in 0..20 {
        let wait = Duration::from_micros(random_u64() % 3_000);
        if let Ok(lease) = tokio::time::timeout(wait, store.take()).await {
            lease.unwrap().release(Duration::ZERO).await.unwrap();
        }
    }
    until(&store, &id, JobStatus::Queued).await;
    assert_eq!(complete_next(&store, b"file").await, id);
}

pub(super) async fn a_job_whose_workers_are_lost_fails(stores: &dyn Stores) {
    let settings = || StoreSettings {
        max_attempts: 2,
        ..settings()
    };
    let mut store = stores.open(settings()).await;
    let id = submit(&store, job("one")).await;
    for attempt in 1..=2 {
        let lease = take(&store).await;
        assert_eq!((&lease.job().id, lease.job().attempt), (&id, attempt));
        // Once the process ends, once the worker alone.
        if attempt == 1 {
            stores.kill(store).await;
            store = stores.open(settings()).await;
        }
    }
    let view = until(&store, &id, JobStatus::Failed).await;
    let error = view.job.error.clone().unwrap();
    assert_eq!(error.code, JobFailure::WORKER_LOST);
    assert!(error.message.contains("here"), "{}", error.message);
    assert!(view.job.expires_ms.is_some());
    assert!(nothing_to_take(&store).await);
}

pub(super) async fn a_failed_job_says_why(stores: &dyn Stores) {
    let store = stores.open(settings()).await;
    let id = submit(&store, job("one")).await;
    let settled = take(&store).await.fail(failure()).await.unwrap();
    assert_eq!(settled, Settled::Recorded);
    stores.kill(store).await;
    let store = stores.open(settings()).await;
    let view = get(&store, &id).await;
    assert_eq!(view.job.status, JobStatus::Failed);
    assert_eq!(view.job.error, Some(failure()));
    assert!(view.job.expires_ms.unwrap() > view.job.ended_ms.unwrap());
    assert!(nothing_to_take(&store).await);
}

pub(super) async fn a_cancelled_job_has_ended_at_once(stores: &dyn Stores) {
    let store = stores.open(settings()).await;
    let id = submit(&store, job("one")).await;
    let kept = submit(&store, job("two")).await;
    let view = store.cancel(&id).await.unwrap().unwrap();
    assert_eq!(view.job.status, JobStatus::Cancelled);
    assert!(view.job.ended_ms.is_some() && view.job.expires_ms.is_some());
    assert_eq!(store.cancel(&id).await.unwrap().unwrap().job, view.job);
    assert_eq!(complete_next(&store, b"file").await, kept);
    stores.kill(store).await;
    let store = stores.open(settings()).await;
    assert_eq!(get(&store, &id).await.job, view.job);
    assert!(nothing_to_take(&store).await);
}

pub(super) async fn a_running_job_that_is_cancelled_is_revoked(stores: &dyn Stores) {
    let store = stores.open(settings()).await;
    let id = submit(&store, job("one")).await;
    let lease = take(&store).await;
    let (why, cancelled) = tokio::join!(soon(lease.revoked()), store.cancel(&id));
    assert_eq!(why, Revoked::Cancelled);
    let view = cancelled.unwrap().unwrap();
    assert_eq!(view.job.status, JobStatus::Cancelled);
    // Whoever asks later is told as well.
    assert_eq!(soon(lease.revoked()).await, Revoked::Cancelled);
    let settled = lease.complete(vec![file(b"file")]).await.unwrap();
    assert_eq!(settled, Settled::Superseded);
    assert_eq!(get(&store, &id).await.job, view.job);
    assert_eq!(store.content(&id, 0).await.unwrap(), None);
    assert!(nothing_to_take(&store).await);
}

pub(super) async fn an_ended_job_cannot_be_cancelled(stores: &dyn Stores) {
    let store = stores.open(settings()).await;
    let id = submit(&store, job("one")).await;
    complete_next(&store, b"file").await;
    let job = get(&store, &id).await.job;
    assert_eq!(store.cancel(&id).await.unwrap().unwrap().job, job);
    assert_eq!(get(&store, &id).await.job, job);
    assert_eq!(content(&store, &id, 0).await.unwrap(), b"file"[..]);
}

pub(super) async fn cancel_and_complete_never_both_win(stores: &dyn Stores) {
    let store = stores.open(settings()).await;
    for round in 0..25 {
        let id = submit(&store, job("one")).await;
        let lease = take(&store).await;
        let begin = |wait: u64| tokio::time::sleep(Duration::from_micros(wait));
        let (first, second) = (random_u64() % 4_000, random_u64() % 4_000);
        let fails = round % 5 == 0;
        let end = tokio::spawn(async move {
            begin(first).await;
            if fails {
                lease.fail(failure()).await.unwrap()
            } else {
                lease.complete(vec![file(b"file")]).await.unwrap()
            }
        });
        let cancel = tokio::spawn({
            let (store, id) = (Arc::clone(&store), id.clone());
            async move {
                begin(second).await;
                store.cancel(&id).await.unwrap().unwrap()
            }
        });
        let (settled, cancelled) = (soon(end).await.unwrap(), soon(cancel).await.unwrap());
        let case = format!("{first} {second}: {settled:?} {cancelled:?}");
        let status = match (settled, fails) {
            (Settled::Superseded, _) => JobStatus::Cancelled,
            (Settled::Recorded, true) => JobStatus::Failed,
            (Settled::Recorded, false) => JobStatus::Completed,
        };
        assert_eq!(cancelled.job.status, status, "{case}");
        assert_eq!(get(&store, &id).await.job, cancelled.job, "{case}");
        let content = store.content(&id, 0).await.unwrap();
        assert_eq!(content.is_some(), status == JobStatus::Completed, "{case}");
    }
    assert!(nothing_to_take(&store).await);
}

pub(super) async fn an_ended_job_can_be_deleted(stores: &dyn Stores) {
    let store = stores.open(settings()).await;
    let id = submit(&store, keyed("one", "key")).await;
    assert!(!store.delete(&id).await.unwrap(), "it is queued");
    let lease = take(&store).await;
    assert!(!store.delete(&id).await.unwrap(), "it is in progress");
    lease.complete(vec![file(b"file")]).await.unwrap();
    assert!(store.delete(&id).await.unwrap());
    for _ in 0..2 {
        assert_eq!(store.get(&id).await.unwrap(), None);
        assert_eq!(store.content(&id, 0).await.unwrap(), None);
        assert!(!store.delete(&id).await.unwrap());
        let page = store.list(&owner("me"), &all()).await.unwrap();
        assert!(page.jobs.is_empty());
        store.sweep().await.unwrap();
    }
    // The key is free again.
    assert_eq!(submit(&store, keyed("another", "key")).await, id);
    assert_eq!(complete_next(&store, b"again").await, id);
    assert_eq!(content(&store, &id, 0).await.unwrap(), b"again"[..]);
}

pub(super) async fn ended_jobs_expire(stores: &dyn Stores) {
    let settings = StoreSettings {
        keep: Duration::from_millis(300),
        ..settings()
    };
    let store = stores.open(settings).await;
    let ended = submit(&store, job("one")).await;
    complete_next(&store, b"file").await;
    let cancelled = submit(&store, job("two")).await;
    store.cancel(&cancelled).await.unwrap();
    let queued = submit(&store, job("three")).await;
    for id in [&ended, &cancelled] {
        until_gone(&store, id).await;
        assert_eq!(store.content(id, 0).await.unwrap(), None);
    }
    assert_eq!(get(&store, &queued).await.job.status, JobStatus::Queued);
    let page = store.list(&owner("me"), &all()).await.unwrap();
    assert_eq!(ids(&page.jobs), [queued]);
}

pub(super) async fn the_first_ended_jobs_make_room_for_files(stores: &dyn Stores) {
    let settings = StoreSettings {
        max_bytes: 2_500,
        ..settings()
    };
    let store = stores.open(settings).await;
    let cancelled = submit(&store, job("none")).await;
    store.cancel(&cancelled).await.unwrap();
    let mut done = Vec::new();
    for prompt in ["one", "two", "three", "four"] {
        done.push(submit(&store, job(prompt)).await);
        complete_next(&store, &[7; 1_000]).await;
    }
    until_gone(&store, &done[0]).await;
    until_gone(&store, &done[1]).await;
    store.sweep().await.unwrap();
    for id in &done[2..] {
        assert_eq!(content(&store, id, 0).await.unwrap(), [7; 1_000][..]);
    }
    // Its deletion would make no room.
    get(&store, &cancelled).await;
    let bytes = store.counts().await.unwrap().bytes;
    assert!(bytes.is_none_or(|bytes| bytes == 2_000), "{bytes:?}");
}

pub(super) async fn lists_are_of_one_owner_and_newest_first(stores: &dyn Stores) {
    let store = stores.open(settings()).await;
    let mut mine = Vec::new();
    for prompt in ["one", "two", "three"] {
        mine.insert(0, submit(&store, job(prompt)).await);
        apart().await;
    }
    let other = NewJob {
        owner: owner("other"),
        ..job("four")
    };
    let others = submit(&store, other).await;
    complete_next(&store, b"file").await;
    store.cancel(&mine[1]).await.unwrap();

    let page = store.list(&owner("me"), &all()).await.unwrap();
    assert_eq!((ids(&page.jobs), page.has_more), (mine.clone(), false));
    let page = store.list(&owner("other"), &all()).await.unwrap();
    assert_eq!(ids(&page.jobs), [others]);
    let page = store.list(&owner("nobody"), &all()).await.unwrap();
    assert!(page.jobs.is_empty() && !page.has_more);
    let of_status = [
        (JobStatus::Queued, Some(0)),
        (JobStatus::InProgress, None),
        (JobStatus::Completed, Some(2)),
        (JobStatus::Failed, None),
        (JobStatus::Cancelled, Some(1)),
    ];
    for (status, index) in of_status {
        let query = ListQuery {
            status: Some(status),
            ..all()
        };
        let page = store.list(&owner("me"), &query).await.unwrap();
        let expected: Vec<_> = index
            .map(|index: usize| mine[index].clone())
            .into_iter()
            .collect();
        assert_eq!(
            (ids(&page.jobs), page.has_more),
            (expected, false),
            "{status:?}"
        );
    }
}

pub(super) async fn pages_are_stable_while_jobs_are_added(stores: &dyn Stores) {
    let store = stores.open(settings()).await;
    let mut expected = Vec::new();
    for _ in 0..7 {
        expected.insert(0, submit(&store, job("old")).await);
        apart().await;
    }
    let mut found = Vec::new();
    let mut query = ListQuery {
        limit: 3,
        ..ListQuery::default()
    };
    loop {
        let page = store.list(&owner("me"), &query).await.unwrap();
        found.extend(ids(&page.jobs));
        assert_eq!(page.has_more, found.len() < 7, "{found:?}");
        if !page.has_more {
            break;
        }
        query.after = found.last().cloned();
        submit(&store, job("new")).await;
    }
    assert_eq!(found, expected);
    // Exactly full pages have no page after them.
    let query = ListQuery { limit: 9, ..query };
    let query = ListQuery {
        after: None,
        ..query
    };
    assert!(!store.list(&owner("me"), &query).await.unwrap().has_more);
}

pub(super) async fn a_watcher_sees_a_job_to_its_end(stores: &dyn Stores) {
    let store = stores.open(settings()).await;
    let first = submit(&store, job("first")).await;
    let id = submit(&store, job("watched")).await;
    let mut watched = store.watch(&id).await.unwrap().unwrap();
    let mut again = store.watch(&id).await.unwrap().unwrap();
    assert_eq!(watched.borrow().job.status, JobStatus::Queued);
    let position = watched.borrow().position;
    assert!(
        position.is_none_or(|position| position == 1),
        "{position:?}"
    );
    assert_eq!(complete_next(&store, b"file").await, first);
    if position.is_some() {
        see(&mut watched, |view| view.position == Some(0)).await;
    }
    let lease = take(&store).await;
    see(&mut watched, |view| {
        view.job.status == JobStatus::InProgress
    })
    .await;
    let progress = Progress { done: 3, total: 20 };
    lease.report(progress);
    see(&mut watched, |view| view.progress == progress).await;
    assert_eq!(get(&store, &id).await.progress, progress);
    lease.complete(vec![file(b"file")]).await.unwrap();
    for watched in [&mut watched, &mut again] {
        see(watched, |view| view.job.status == JobStatus::Completed).await;
        assert!(
            soon(watched.changed()).await.is_err(),
            "nothing follows the end"
        );
        assert_eq!(watched.borrow().job.files.len(), 1);
    }
    // Who comes late sees the end.
    let mut late = store.watch(&id).await.unwrap().unwrap();
    assert_eq!(late.borrow().job.status, JobStatus::Completed);
    assert!(soon(late.changed()).await.is_err());
}

pub(super) async fn a_watcher_sees_a_cancelled_job_end(stores: &dyn Stores) {
    let store = stores.open(settings()).await;
    let id = submit(&store, job("one")).await;
    let mut watched = store.watch(&id).await.unwrap().unwrap();
    store.cancel(&id).await.unwrap();
    see(&mut watched, |view| view.job.status == JobStatus::Cancelled).await;
    assert!(soon(watched.changed()).await.is_err());
    assert_eq!(watched.borrow().position, None);
}

pub(super) async fn a_full_queue_refuses_jobs(stores: &dyn Stores) {
    let settings = StoreSettings {
        max_queued: 2,
        ..settings()
    };
    let store = stores.open(settings).await;
    submit(&store, keyed("one", "key")).await;
    submit(&store, job("two")).await;
    let refused = store.submit(job("three")).await.unwrap_err();
    assert_eq!(refused, StoreError::Full { queued: 2 });
    // A job that is there already is not refused.
    let same = store.submit(keyed("one", "key")).await.unwrap();
    assert!(matches!(same, Submitted::Existing(_)), "{same:?}");
    complete_next(&store, b"file").await;
    submit(&store, job("three")).await;
}

pub(super) async fn counts_follow_the_jobs(stores: &dyn Stores) {
    let store = stores.open(settings()).await;
    let counts = store.counts().await.unwrap();
    assert_eq!((counts.queued, counts.in_progress), (0, 0));
    assert_eq!(counts.oldest_queued_ms, None);
    let first = submit(&store, job("one")).await;
    apart().await;
    let second = submit(&store, job("two")).await;
    let counts = store.counts().await.unwrap();
    assert_eq!((counts.queued, counts.in_progress), (2, 0));
    let created = |view: JobView| Some(view.job.created_ms);
    assert_eq!(counts.oldest_queued_ms, created(get(&store, &first).await));
    let lease = take(&store).await;
    let counts = store.counts().await.unwrap();
    assert_eq!((counts.queued, counts.in_progress), (1, 1));
    assert_eq!(counts.oldest_queued_ms, created(get(&store, &second).await));
    lease
        .complete(vec![file(&[1; 100]), file(&[2; 11])])
        .await
        .unwrap();
    for _ in 0..2 {
        let counts = store.counts().await.unwrap();
        assert_eq!((counts.queued, counts.in_progress), (1, 0));
        assert!(counts.bytes.is_none_or(|bytes| bytes == 111), "{counts:?}");
    }
    stores.kill(store).await;
    let store = stores.open(settings()).await;
    let counts = store.counts().await.unwrap();
    assert_eq!((counts.queued, counts.in_progress), (1, 0));
    assert!(counts.bytes.is_none_or(|bytes| bytes == 111), "{counts:?}");
    store.delete(&first).await.unwrap();
    let bytes = store.counts().await.unwrap().bytes;
    assert!(bytes.is_none_or(|bytes| bytes == 0), "{bytes:?}");
}

pub(super) async fn webhooks_are_tried_until_they_are_settled(stores: &dyn Stores) {
    let store = stores.open(settings()).await;
    submit(&store, job("without")).await;
    let id = submit(&store, hooked("with")).await;
    complete_next(&store, b"file").await;
    assert!(no_webhook(&store).await, "the job has not ended");
    complete_next(&store, b"file").await;
    let lease = take_webhook(&store).await;
    assert_eq!((&lease.job().id, lease.tries()), (&id, 0));
    assert_eq!(lease.job().status, JobStatus::Completed);
    assert!(no_webhook(&store).await, "it is being sent");
    let (begin, wait) = (Instant::now(), Duration::from_millis(300));
    lease.retry(wait).await.unwrap();
    let lease = take_webhook(&store).await;
    assert!(begin.elapsed() >= wait, "{:?}", begin.elapsed());
    assert_eq!((&lease.job().id, lease.tries()), (&id, 1));
    lease.settle().await.unwrap();
    assert!(no_webhook(&store).await, "it was settled");
}

pub(super) async fn webhooks_survive_restarts(stores: &dyn Stores) {
    let mut store = stores.open(settings()).await;
    let id = submit(&store, hooked("one")).await;
    complete_next(&store, b"file").await;
    for tries in 0..3 {
        stores.kill(store).await;
        store = stores.open(settings()).await;
        let lease = take_webhook(&store).await;
        assert_eq!((&lease.job().id, lease.tries()), (&id, tries));
        lease.retry(Duration::ZERO).await.unwrap();
    }
    // One that was not settled when its process ended is sent again.
    let lease = take_webhook(&store).await;
    stores.kill(store).await;
    drop(lease);
    let store = stores.open(settings()).await;
    let lease = take_webhook(&store).await;
    assert_eq!((&lease.job().id, lease.tries()), (&id, 3));
    lease.settle().await.unwrap();
    stores.kill(store).await;
    let store = stores.open(settings()).await;
    assert!(no_webhook(&store).await, "it was settled");
}

pub(super) async fn every_end_has_its_webhook(stores: &dyn Stores) {
    let settings = StoreSettings {
        max_attempts: 1,
        ..settings()
    };
    let store = stores.open(settings).await;
    let mut expected = Vec::new();
    for status in [JobStatus::Cancelled, JobStatus::Failed, JobStatus::Failed] {
        let id = submit(&store, hooked("one")).await;
        match expected.len() {
            0 => drop(store.cancel(&id).await.unwrap()),
            1 => drop(take(&store).await.fail(failure()).await.unwrap()),
            _ => drop(take(&store).await),
        }
        let view = until(&store, &id, status).await;
        let lease = take_webhook(&store).await;
        assert_eq!(lease.job(), &*view.job);
        lease.settle().await.unwrap();
        expected.push(id);
    }
    assert!(no_webhook(&store).await);
}

pub(super) async fn a_dropped_webhook_is_available_again(stores: &dyn Stores) {
    let store = stores.open(settings()).await;
    let id = submit(&store, hooked("one")).await;
    store.cancel(&id).await.unwrap();
    for _ in 0..2 {
        assert_eq!(take_webhook(&store).await.job().id, id);
    }
    let mut waiting = JoinSet::new();
    for _ in 0..8 {
        let store = Arc::clone(&store);
        let wait = Duration::from_micros(random_u64() % 2_000);
        waiting.spawn(async move {
            tokio::time::timeout(wait, store.take_webhook())
                .await
                .is_ok()
        });
    }
    soon(waiting.join_all()).await;
    assert_eq!(take_webhook(&store).await.job().id, id);
}

pub(super) async fn a_deleted_job_has_no_webhook(stores: &dyn Stores) {
    let store = stores.open(settings()).await;
    let (first, second) = (
        submit(&store, hooked("one")).await,
        submit(&store, hooked("two")).await,
    );
    store.cancel(&first).await.unwrap();
    assert!(store.delete(&first).await.unwrap());
    assert!(no_webhook(&store).await, "it was deleted");
    store.cancel(&second).await.unwrap();
    let lease = take_webhook(&store).await;
    assert_eq!(lease.job().id, second);
    assert!(store.delete(&second).await.unwrap());
    lease.retry(Duration::ZERO).await.unwrap();
    assert!(no_webhook(&store).await, "it was deleted while it was sent");
}

pub(super) async fn many_workers_complete_each_job_once(stores: &dyn Stores) {
    const JOBS: usize = 24;
    let settings = StoreSettings {
        lease: Duration::from_secs(2),
        ..settings()
    };
    let store = stores.open(settings).await;
    let done = Arc::new(AtomicUsize::new(0));
    let mut workers = JoinSet::new();
    for worker in 0..4_u64 {
        let (store, done) = (Arc::clone(&store), Arc::clone(&done));
        workers.spawn(async move {
            let mut recorded = Vec::new();
            // Each worker drops a lease now and then.
            for round in worker.. {
                if done.load(Ordering::SeqCst) == JOBS {
                    break;
                }
                let idle = Duration::from_millis(50);
                let Ok(lease) = tokio::time::timeout(idle, store.take()).await else {
                    continue;
                };
                let lease = lease.unwrap();
                if round % 7 == 0 && lease.job().attempt == 1 {
                    continue;
                }
                let id = lease.job().id.clone();
                if lease.complete(vec![file(b"file")]).await.unwrap() == Settled::Recorded {
                    recorded.push(id);
                    done.fetch_add(1, Ordering::SeqCst);
                }
            }
            recorded
        });
    }
    let mut submitted = Vec::new();
    for _ in 0..JOBS {
        submitted.push(submit(&store, job("one")).await);
    }
    let mut recorded: Vec<_> = soon(workers.join_all()).await.concat();
    recorded.sort();
    submitted.sort();
    assert_eq!(recorded, submitted);
    assert!(nothing_to_take(&store).await);
}

pub(super) async fn a_restart_in_the_middle_of_everything_loses_nothing(stores: &dyn Stores) {
    let store = stores.open(settings()).await;
    let completed = submit(&store, hooked("completed")).await;
    complete_next(&store, b"file").await;
    let failed = submit(&store, job("failed")).await;
    take(&store).await.fail(failure()).await.unwrap();
    let cancelled = submit(&store, job("cancelled")).await;
    store.cancel(&cancelled).await.unwrap();
    let released = submit(&store, job("released")).await;
    take(&store)
        .await
        .release(Duration::from_millis(50))
        .await
        .unwrap();
    let deleted = submit(&store, job("deleted")).await;
    store.cancel(&deleted).await.unwrap();
    store.delete(&deleted).await.unwrap();
    let running = submit(&store, job("running")).await;
    let lease = loop {
        let lease = take(&store).await;
        if lease.job().id == running {
            break lease;
        }
        lease.release(Duration::from_millis(50)).await.unwrap();
    };
    let queued = submit(&store, keyed("queued", "key")).await;
    stores.kill(store).await;
    // The worker of the old process, if it lives, changes nothing.
    drop(lease);

    let store = stores.open(settings()).await;
    let ended = [
        (&completed, JobStatus::Completed),
        (&failed, JobStatus::Failed),
        (&cancelled, JobStatus::Cancelled),
    ];
    for (id, status) in ended {
        assert_eq!(get(&store, id).await.job.status, status);
    }
    assert_eq!(store.get(&deleted).await.unwrap(), None);
    assert_eq!(content(&store, &completed, 0).await.unwrap(), b"file"[..]);
    let same = store.submit(keyed("queued", "key")).await.unwrap();
    assert!(matches!(same, Submitted::Existing(_)), "{same:?}");
    let mut attempts = Vec::new();
    for _ in 0..3 {
        let lease = take(&store).await;
        attempts.push((lease.job().id.clone(), lease.job().attempt));
        lease.complete(vec![file(b"after")]).await.unwrap();
    }
    attempts.sort();
    let mut expected = vec![(released, 1), (running, 2), (queued, 1)];
    expected.sort();
    assert_eq!(attempts, expected);
    assert!(nothing_to_take(&store).await);
    assert_eq!(take_webhook(&store).await.job().id, completed);
}

fn failure() -> JobFailure {
    JobFailure {
        code: "out_of_memory".to_owned(),
        message: "the device has no memory for it".to_owned(),
    }
}

fn all() -> ListQuery {
    ListQuery {
        limit: 100,
        ..ListQuery::default()
    }
}

fn ids(views: &[JobView]) -> Vec<JobId> {
    views.iter().map(|view| view.job.id.clone()).collect()
}

fn id_of(submitted: &Submitted) -> JobId {
    match submitted {
        Submitted::New(view) | Submitted::Existing(view) => view.job.id.clone(),
        Submitted::OtherBody(id) => id.clone(),
    }
}

/// Gives the next job another time of creation.
async fn apart() {
    tokio::time::sleep(Duration::from_millis(3)).await;
}

/// Waits until a watcher sees a view.
async fn see(watched: &mut watch::Receiver<JobView>, is_it: impl Fn(&JobView) -> bool) {
    let seen = soon(watched.wait_for(is_it)).await;
    assert!(seen.is_ok(), "it was never seen");
}

/// The content of a file; `None` if the store gives only its URL.
async fn content(store: &Arc<dyn JobStore>, id: &JobId, index: usize) -> Option<bytes::Bytes> {
    match store
        .content(id, index)
        .await
        .unwrap()
        .expect("the file exists")
    {
        Content::File { file, content } => {
            assert_eq!(file.bytes, content.len() as u64);
            Some(content)
        }
        Content::Url(_) => None,
    }
}

/// Whether no webhook is due within a short time.
async fn no_webhook(store: &Arc<dyn JobStore>) -> bool {
    let wait = Duration::from_millis(100);
    tokio::time::timeout(wait, store.take_webhook())
        .await
        .is_err()
}

/// Waits until a job is deleted.
async fn until_gone(store: &Arc<dyn JobStore>, id: &JobId) {
    let wait = async {
        while store.get(id).await.unwrap().is_some() {
            store.sweep().await.unwrap();
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    soon(wait).await;
}
