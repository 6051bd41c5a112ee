//! Jobs that the engine may make cheaper.

use std::time::Duration;

use kiln_models::job::Job;
use kiln_models::step_cache::CachePolicy;
use kiln_models::testing::guidance;

use super::bench::{Bench, Call, job, ms, outcome, settings, whole_cost};
use crate::engine::{Cheaper, JobHandle, SubmitError, SubmitOptions};

/// Steps of the jobs of these tests, of which the caches compute 12 and 10.
const STEPS: usize = 20;

fn ways() -> Vec<Cheaper> {
    let mask = |computed: usize| {
        let mask: Vec<bool> = (0..STEPS).map(|step| step < computed).collect();
        CachePolicy::Mask(mask.into())
    };
    let way = |name, cache, cfg_gate_step| Cheaper {
        name,
        cache,
        cfg_gate_step,
    };
    vec![
        way("balanced", mask(12), None),
        way("fast", mask(10), None),
        way("fast", mask(10), Some(0.25)),
    ]
}

/// A job with guidance.
fn guided(seed: u64) -> Job {
    Job {
        guidance: guidance(vec![0], 4.0),
        ..job(seed, 8, STEPS)
    }
}

fn made(seed: u64, way: usize) -> Job {
    let way = &ways()[way];
    Job {
        cache: way.cache.clone(),
        cfg_gate_step: way.cfg_gate_step,
        ..guided(seed)
    }
}

/// Submits a job of which the engine decides how it is made, due after some time.
fn submit(bench: &Bench, seed: u64, time: Option<Duration>) -> Result<JobHandle, SubmitError> {
    let due = |time| bench.due(bench.clock.elapsed() + time);
    let options = SubmitOptions {
        cheaper: ways(),
        ..time.map_or_else(SubmitOptions::default, due)
    };
    bench.shared.submit(guided(seed), options)
}

/// How a finished job was made.
fn way_of(handle: JobHandle) -> Option<(&'static str, Option<f64>)> {
    let finished = outcome(handle).unwrap();
    finished.made.map(|made| (made.name, made.cfg_gate_step))
}

#[test]
fn an_idle_engine_makes_jobs_as_they_were_asked_for() {
    let own = whole_cost(&guided(1));
    for time in [None, Some(own + ms(1)), Some(own * 10)] {
        let mut bench = Bench::measured();
        let handle = submit(&bench, 1, time).unwrap();
        bench.run();
        let finished = outcome(handle).unwrap();
        assert_eq!(finished.made, None, "{time:?}");
        assert_eq!(finished.output.steps.computed, STEPS);
        assert_eq!(bench.shared.stats().made_cheaper, 0);
    }
}

#[test]
fn nothing_is_made_cheaper_before_the_speed_is_known() {
    let mut bench = Bench::new(settings(1000, 8));
    let first = submit(&bench, 1, None).unwrap();
    let _others: Vec<_> = (2..20).map(|seed| bench.submit(job(seed, 8, 20))).collect();
    bench.run();
    assert_eq!(way_of(first), None);
}

#[test]
fn a_job_is_made_only_as_cheap_as_its_deadline_needs() {
    let expected = [
        Some(("balanced", None)),
        Some(("fast", None)),
        Some(("fast", Some(0.25))),
    ];
    for (way, expected) in expected.into_iter().enumerate() {
        let mut bench = Bench::measured();
        let time = whole_cost(&made(1, way)) + ms(1);
        let due = bench.clock.elapsed() + time;
        let handle = submit(&bench, 1, Some(time)).unwrap();
        bench.run();
        assert!(bench.clock.elapsed() <= due);
        assert_eq!(way_of(handle), expected);
        assert_eq!(bench.shared.stats().made_cheaper, 1);
    }
    // Not even the cheapest way is fast enough.
    let bench = Bench::measured();
    let time = whole_cost(&made(1, 2)).saturating_sub(ms(1));
    let refused = submit(&bench, 1, Some(time));
    assert!(matches!(refused, Err(SubmitError::DeadlineTooShort { .. })));
}

/// What a crowd is given that all comes at once.
fn crowd(number: u64) -> Vec<Option<(&'static str, Option<f64>)>> {
    let mut bench = Bench::measured();
    let handles: Vec<_> = (0..number)
        .map(|seed| submit(&bench, seed, None).unwrap())
        .collect();
    bench.run();
    handles.into_iter().map(way_of).collect()
}

#[test]
fn a_crowd_is_made_cheaper_by_its_length() {
    assert_eq!(crowd(3), [None; 3]);
    let balanced = Some(("balanced", None));
    assert_eq!(crowd(4), [balanced, balanced, balanced, None]);
    let gated = Some(("fast", Some(0.25)));
    assert_eq!(crowd(10)[..3], [gated; 3]);
}

#[test]
fn a_cheaper_crowd_is_finished_sooner() {
    let took = |ways: Vec<Cheaper>| {
        let mut bench = Bench::measured();
        let start = bench.clock.elapsed();
        for seed in 0..12 {
            let options = SubmitOptions {
                cheaper: ways.clone(),
                ..SubmitOptions::default()
            };
            let handle = bench.shared.submit(guided(seed), options).unwrap();
            std::mem::forget(handle);
        }
        bench.run();
        bench.clock.elapsed().saturating_sub(start)
    };
    let (exact, cheaper) = (took(Vec::new()), took(ways()));
    assert!(cheaper * 3 < exact * 2, "{cheaper:?} for {exact:?}");
}

/// Two jobs that are due together, with time for one whole job and a cheap one.
#[test]
fn a_job_is_made_cheaper_so_that_no_other_is_late() {
    let mut bench = Bench::measured();
    let time = whole_cost(&guided(1)) + whole_cost(&made(1, 0)) + ms(2);
    let due = bench.clock.elapsed() + time;
    let handles = [1, 2].map(|seed| submit(&bench, seed, Some(time)).unwrap());
    bench.run();
    for seed in [1, 2] {
        assert!(bench.find(Call::Finish(seed)).ended <= due, "job {seed}");
    }
    let ways = handles.map(way_of);
    assert!(ways.iter().any(Option::is_some), "{ways:?}");
}

/// Without cheaper ways, half of these jobs would be refused.
#[test]
fn admission_counts_on_the_cheapest_way() {
    let mut bench = Bench::measured();
    let start = bench.clock.elapsed();
    let time = whole_cost(&made(1, 2)) * 6;
    let handles: Vec<_> = (0..6)
        .map(|seed| submit(&bench, seed, Some(time)))
        .collect();
    assert!(handles.iter().all(Result::is_ok), "{handles:?}");
    let seventh = submit(&bench, 7, Some(time));
    assert!(matches!(seventh, Err(SubmitError::TooLate { .. })));
    bench.run();
    for (seed, handle) in handles.into_iter().enumerate() {
        outcome(handle.unwrap()).unwrap();
        let ended = bench.find(Call::Finish(seed as u64)).ended;
        assert!(ended <= start + time + ms(2), "job {seed}: {ended:?}");
    }
}
