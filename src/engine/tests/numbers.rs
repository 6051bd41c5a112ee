//! Waiting times, and what is counted.

use std::time::Duration;

use super::bench::{
    Bench, Call, FAIL_IN_STEP, Logged, behaving, cost, job, ms, outcome, received, settings,
    whole_cost,
};
use crate::engine::cost::Stage;
use crate::engine::{BUCKET_BOUNDS, Event, Histogram, JobHandle, SubmitError, SubmitOptions};

/// Positions and estimated waits that a handle has received.
fn queued(handle: &mut JobHandle) -> Vec<(usize, Option<Duration>)> {
    let queued = |event| match event {
        Event::Queued {
            position,
            estimated_wait,
        } => Some((position, estimated_wait)),
        _ => None,
    };
    received(handle).into_iter().filter_map(queued).collect()
}

/// An engine that has measured the device's speed.
fn measured(max_queue: usize) -> Bench {
    let mut bench = Bench::new(settings(max_queue, 8));
    let first = bench.submit(job(100, 5, 3));
    bench.run();
    outcome(first).unwrap();
    bench
}

fn assert_close(actual: Duration, expected: Duration) {
    assert!(
        actual.abs_diff(expected) < ms(1),
        "{actual:?} for {expected:?}"
    );
}

#[test]
fn the_estimated_wait_is_the_wait() {
    let mut bench = measured(8);
    let now = bench.clock.elapsed();
    let sizes = [(8, 10), (8, 12), (16, 30), (3, 4)];
    let mut handles: Vec<JobHandle> = (0..)
        .zip(sizes)
        .map(|(seed, (side, steps))| bench.submit(job(seed, side, steps)))
        .collect();
    let reports: Vec<_> = handles.iter_mut().map(queued).collect();
    bench.run();
    // The last one is small and goes first: the jobs before it receive their new positions.
    let positions = |index: usize| -> Vec<usize> { reports[index].iter().map(|q| q.0).collect() };
    assert_eq!(positions(0), [0, 1]);
    assert_eq!(positions(1), [1, 2]);
    assert_eq!(positions(2), [2, 3]);
    assert_eq!(positions(3), [0]);
    for (seed, reports) in (0..).zip(&reports) {
        let began = bench.find(Call::Start(seed)).began;
        let (_, estimate) = reports.last().unwrap();
        assert_close(now + estimate.unwrap(), began);
    }
}

#[test]
fn a_forecast_agrees_with_the_queue_and_the_work() {
    let bench = measured(4);
    let _others = [1, 2].map(|seed| bench.submit(job(seed, 16, 30)));
    // A small job goes first, a job of the same size last.
    for (steps, position) in [(10, 0), (30, 2)] {
        let asked = job(3, 16, steps);
        let forecast = bench.shared.forecast(&asked, &SubmitOptions::default());
        let mut handle = bench.submit(asked.clone());
        let expected = [(forecast.position, forecast.estimated_wait)];
        assert_eq!(queued(&mut handle), expected);
        assert_eq!(forecast.position, position);
        assert!(forecast.is_accepted);
        assert_close(forecast.estimated_work.unwrap(), whole_cost(&asked));
    }
}

#[test]
fn a_forecast_says_that_a_job_would_be_refused() {
    let bench = Bench::new(settings(1, 8));
    let asked = job(3, 8, 10);
    let _others = [1, 2].map(|seed| bench.submit(job(seed, 8, 10)));
    let forecast = bench.shared.forecast(&asked, &SubmitOptions::default());
    assert!(!forecast.is_accepted);
    assert_eq!(forecast.position, 2);
    assert_eq!(
        (forecast.estimated_wait, forecast.estimated_work),
        (None, None)
    );

    let bench = Bench::new(settings(1, 8));
    assert!(
        bench
            .shared
            .forecast(&asked, &SubmitOptions::default())
            .is_accepted
    );
    bench.shared.drain(ms(10));
    assert!(
        !bench
            .shared
            .forecast(&asked, &SubmitOptions::default())
            .is_accepted
    );
}

#[test]
fn there_is_no_estimate_before_a_measurement() {
    let bench = Bench::new(settings(1, 8));
    let mut first = bench.submit(job(1, 8, 10));
    let mut second = bench.submit(job(2, 8, 10));
    assert_eq!(queued(&mut first), [(0, Some(Duration::ZERO))]);
    assert_eq!(queued(&mut second), [(1, None)]);
    let refused = bench.try_submit(job(3, 8, 10)).unwrap_err();
    let expected = SubmitError::QueueFull {
        waiting: 1,
        retry_after: Duration::from_secs(10),
    };
    assert_eq!(refused, expected);
}

#[test]
fn a_full_queue_says_when_the_next_job_will_be_done() {
    let mut bench = measured(2);
    let handles = [1, 2, 3].map(|seed| bench.submit(job(seed, 8, 10)));
    let Err(SubmitError::QueueFull {
        waiting,
        retry_after,
    }) = bench.try_submit(job(4, 8, 10))
    else {
        panic!("a fourth job was taken");
    };
    assert_eq!(waiting, 2);
    assert_close(retry_after, whole_cost(&job(1, 8, 10)));

    // After that time the queue has room.
    let full = bench.clock.elapsed();
    while bench.clock.elapsed() < full + retry_after {
        bench.turn();
    }
    let fourth = bench.submit(job(4, 8, 10));
    bench.run();
    for handle in handles.into_iter().chain([fourth]) {
        outcome(handle).unwrap();
    }
    assert_eq!(bench.shared.stats().outcomes.rejected, 1);
}

#[test]
fn a_place_is_free_when_a_job_is_dropped() {
    let mut bench = Bench::new(settings(2, 8));
    let first = bench.submit(job(1, 8, 10));
    let second = bench.submit(job(2, 8, 10));
    let mut third = bench.submit(job(3, 8, 10));
    bench.try_submit(job(4, 8, 10)).unwrap_err();
    drop(second);
    let positions: Vec<usize> = queued(&mut third).into_iter().map(|q| q.0).collect();
    assert_eq!(positions, [2, 1]);
    let fourth = bench.submit(job(4, 8, 10));
    bench.run();
    for handle in [first, third, fourth] {
        outcome(handle).unwrap();
    }
}

#[test]
fn one_slow_first_time_does_not_spoil_the_estimates() {
    let mut bench = Bench::new(settings(8, 8));
    let slow = bench.submit(job(1, 8, 4));
    // In the first step, as if kernels were compiled.
    let clock = std::sync::Arc::clone(&bench.clock);
    bench.at(ms(2), move || clock.advance(Duration::from_mins(1)));
    bench.run();
    assert!(bench.clock.elapsed() > Duration::from_mins(1));
    outcome(slow).unwrap();
    let _ahead = bench.submit(job(2, 8, 50));
    let mut waiting = bench.submit(job(3, 8, 50));
    let (_, estimate) = queued(&mut waiting)[0];
    assert_close(estimate.unwrap(), whole_cost(&job(2, 8, 50)));
}

/// The time of all calls of a kind, from the pipeline's log.
fn spent(log: &[Logged], is_kind: impl Fn(Call) -> bool) -> f64 {
    let calls = log.iter().filter(|logged| is_kind(logged.call));
    calls
        .map(|logged| logged.ended.as_secs_f64() - logged.began.as_secs_f64())
        .sum()
}

#[test]
fn what_was_done_is_counted() {
    let mut bench = Bench::new(settings(3, 8));
    let mut two_images = job(1, 8, 10);
    two_images.num_images = 2;
    let first = bench.submit(two_images);
    let second = bench.submit(behaving(FAIL_IN_STEP, job(2, 8, 20)));
    let third = bench.submit(job(3, 8, 10));
    let fourth = bench.submit(job(4, 8, 10));
    bench.try_submit(job(5, 8, 10)).unwrap_err();
    drop(third);
    let stats = bench.shared.stats();
    assert_eq!((stats.waiting, stats.running), (3, 0));
    bench.turn();
    let stats = bench.shared.stats();
    assert_eq!((stats.waiting, stats.running), (2, 1));
    assert_eq!(stats.memory.in_use, Some(1));
    bench.run();

    let timings = [
        outcome(first).unwrap().timings,
        outcome(fourth).unwrap().timings,
    ];
    outcome(second).unwrap_err();
    let (stats, log) = (bench.shared.stats(), bench.log());
    assert_eq!((stats.waiting, stats.running), (0, 0));
    let outcomes = stats.outcomes;
    assert_eq!((outcomes.finished, outcomes.failed), (2, 1));
    assert_eq!((outcomes.cancelled, outcomes.rejected), (1, 1));
    assert_eq!((stats.steps, stats.images), (20, 3));
    // The pipeline's images are 1x1.
    assert_eq!(stats.pixels, 3);
    assert_eq!(stats.embedding_cache.max_bytes, 77);
    assert_eq!(stats.devices.len(), 1);
    assert_eq!(stats.devices[0].forwards, 7);

    let close = |a: f64, b: f64| assert!((a - b).abs() < 1e-6, "{a} for {b}");
    close(
        stats.encode_time.sum,
        spent(&log, |c| matches!(c, Call::Start(_))),
    );
    close(
        stats.decode_time.sum,
        spent(&log, |c| matches!(c, Call::Finish(_))),
    );
    // The step that failed is not counted.
    close(
        stats.step_time.sum,
        spent(&log, |c| matches!(c, Call::Step(1 | 4))),
    );
    close(stats.denoise_time.sum, stats.step_time.sum);
    let sum = |of: &dyn Fn(usize) -> Duration| (of(0) + of(1)).as_secs_f64();
    close(stats.total_time.sum, sum(&|i| timings[i].total()));
    assert_eq!(stats.waiting_time.count(), 3);
    assert_eq!(stats.total_time.count(), 2);
}

#[test]
fn timings_say_where_the_time_went() {
    let mut bench = Bench::new(settings(8, 8));
    let large = job(1, 16, 10);
    let handle = bench.submit(large.clone());
    let small = bench.submit_at(ms(600), job(2, 4, 2));
    bench.run();
    let timings = outcome(handle).unwrap().timings;
    assert_eq!(timings.queue, Duration::ZERO);
    assert_close(timings.encode, cost(&large, Stage::Encode));
    assert_close(timings.denoise, cost(&large, Stage::Step) * 10);
    assert_close(timings.decode, cost(&large, Stage::Decode));
    assert_close(timings.paused, whole_cost(&job(2, 4, 2)));
    assert_close(timings.total(), bench.clock.elapsed());
    let timings = outcome(small.handle()).unwrap().timings;
    assert_close(ms(600) + timings.queue, bench.find(Call::Start(2)).began);
    assert_eq!(timings.paused, Duration::ZERO);
}

#[test]
fn values_fall_into_the_bucket_whose_bound_they_do_not_exceed() {
    let mut histogram = Histogram::default();
    for milliseconds in [0, 1, 2, 100, 101, 5_000_000] {
        histogram.add(ms(milliseconds));
    }
    let bucket = |bound: f64| BUCKET_BOUNDS.iter().position(|b| *b == bound).unwrap();
    let mut expected = [0; BUCKET_BOUNDS.len() + 1];
    expected[bucket(0.001)] = 2;
    expected[bucket(0.0025)] = 1;
    expected[bucket(0.1)] = 1;
    expected[bucket(0.25)] = 1;
    expected[BUCKET_BOUNDS.len()] = 1;
    assert_eq!(histogram.counts, expected);
    assert_eq!(histogram.count(), 6);
    assert!((histogram.sum - 5000.204).abs() < 1e-9);
    assert!(BUCKET_BOUNDS.is_sorted());
}
