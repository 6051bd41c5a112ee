//! The registry with a virtual clock: times are seconds after an arbitrary instant.

use futures_util::FutureExt;

use super::*;

const ME: Caller = Caller(Some(0));
const OTHER: Caller = Caller(Some(1));

struct Clock(Instant);

impl Clock {
    fn at(&self, seconds: u64) -> Instant {
        self.0 + Duration::from_secs(seconds)
    }
}

/// A registry that keeps two ended jobs for a minute, and its clock.
fn registry() -> (Arc<JobRegistry<&'static str>>, Clock) {
    let retention = Retention {
        max_ended: 2,
        max_age: Duration::from_mins(1),
    };
    (Arc::new(JobRegistry::new(retention)), Clock(Instant::now()))
}

fn ids<R>(jobs: &[JobRecord<R>]) -> Vec<&str> {
    jobs.iter().map(|job| job.id.as_str()).collect()
}

#[test]
fn a_job_is_queued_then_running_then_done() {
    let (registry, clock) = registry();
    let job = registry.add("a", ME, 10, clock.at(0));
    let get = |seconds| registry.get("a", ME, clock.at(seconds)).unwrap();
    assert_eq!(get(0).state, JobState::Queued);
    assert_eq!(get(0).steps, 10);
    assert_eq!(get(0).created, clock.at(0));
    job.stepped(1, 10, clock.at(1));
    job.preview(Bytes::from_static(b"png"));
    let running = JobState::Running { step: 1, total: 10 };
    assert_eq!(get(1).state, running);
    assert_eq!(get(1).preview.as_deref(), Some(&b"png"[..]));
    job.done(Some("result"), clock.at(5));
    assert_eq!(get(5).state, JobState::Done);
    assert_eq!(get(5).result, Some("result"));
    assert_eq!(get(5).steps_done(), 10);
    assert_eq!(get(5).preview, None);
    assert!(registry.unfinished(ME).is_empty());
}

#[test]
fn a_job_that_failed_or_was_dropped_says_so() {
    let (registry, clock) = registry();
    registry
        .add("a", ME, 1, clock.at(0))
        .failed(Some("reason"), clock.at(0));
    let failed = registry.get("a", ME, clock.at(0)).unwrap();
    assert_eq!(failed.state, JobState::Failed);
    assert_eq!(failed.result, Some("reason"));
    drop(registry.add("b", ME, 1, clock.at(0)));
    let dropped = registry.get("b", ME, clock.at(0)).unwrap();
    assert_eq!((dropped.state, dropped.result), (JobState::Cancelled, None));
}

#[test]
fn a_caller_sees_and_cancels_only_its_own_jobs() {
    let (registry, clock) = registry();
    let mine = registry.add("a", ME, 1, clock.at(0));
    let theirs = registry.add("b", OTHER, 1, clock.at(0));
    assert_eq!(ids(&registry.unfinished(ME)), ["a"]);
    assert!(registry.get("b", ME, clock.at(0)).is_none());
    assert!(!registry.cancel("b", ME));
    assert!(!registry.cancel("c", ME));
    assert!(theirs.cancelled().now_or_never().is_none());
    // The cancellation is kept for a task that waits for it later.
    assert!(registry.cancel("a", ME));
    assert!(mine.cancelled().now_or_never().is_some());
    drop(mine);
    assert!(!registry.cancel("a", ME));
}

#[test]
fn jobs_that_ended_first_are_dropped_first() {
    let (registry, clock) = registry();
    let [a, b, c] = ["a", "b", "c"].map(|id| registry.add(id, ME, 1, clock.at(0)));
    let unfinished = registry.add("d", ME, 1, clock.at(0));
    let kept = |seconds| {
        let all = ["a", "b", "c", "d"];
        all.map(|id| registry.get(id, ME, clock.at(seconds)).is_some())
    };
    c.done(None, clock.at(1));
    a.done(None, clock.at(2));
    assert_eq!(kept(2), [true, true, true, true]);
    b.done(None, clock.at(2));
    assert_eq!(kept(2), [true, true, false, true]);
    // Those two for a minute after their end, and an unfinished one for ever.
    assert_eq!(kept(61), [true, true, false, true]);
    assert_eq!(kept(62), [false, false, false, true]);
    assert_eq!(kept(1_000_000), [false, false, false, true]);
    drop(unfinished);
}

#[test]
fn any_number_of_unfinished_jobs_is_kept_in_order() {
    let (registry, clock) = registry();
    let names: Vec<String> = (0..50).map(|index| format!("job-{index}")).collect();
    let add = |(name, seconds): (&String, u64)| registry.add(name, ME, 1, clock.at(seconds));
    let _guards: Vec<_> = names.iter().zip((0..).step_by(100)).map(add).collect();
    assert_eq!(ids(&registry.unfinished(ME)), names);
}

#[test]
fn the_remaining_time_is_estimated_from_what_was_measured() {
    let (registry, clock) = registry();
    let job = registry.add("a", ME, 10, clock.at(0));
    let remaining = |seconds| {
        let record = registry.get("a", ME, clock.at(seconds)).unwrap();
        record.remaining(clock.at(seconds)).as_secs()
    };
    assert_eq!(remaining(0), 0);
    job.queued(Some(Duration::from_secs(30)), clock.at(0));
    assert_eq!(remaining(10), 20);
    assert_eq!(remaining(40), 0);
    job.queued(Some(Duration::ZERO), clock.at(40));
    job.stepped(1, 10, clock.at(43));
    assert_eq!(remaining(43), 27);
    for step in 2..=5 {
        job.stepped(step, 10, clock.at(43 + 2 * (step as u64 - 1)));
    }
    assert_eq!(remaining(51), 10);
    job.stepped(10, 10, clock.at(61));
    assert_eq!(remaining(61), 0);
    job.done(None, clock.at(62));
    assert_eq!(remaining(62), 0);
}
