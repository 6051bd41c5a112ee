//! Jobs with adapters: the bound of the device's adapters, uploads ahead, and who waits for room.

use std::collections::HashSet;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use kiln_models::adapter::Adapter;
use kiln_models::job::Job;
use kiln_models::memory::{MemoryModel, MemoryPlan};
use kiln_models::pipeline::{MemoryRoom, PipelineError};
use kiln_models::testing::{adapter, uses};
use proptest::prelude::*;

use super::bench::{
    Bench, Call, FAIL_IN_UPLOAD, Packs, SimulatedClock, UPLOAD, WAYS, cost, fake_on, guided, job,
    ms, outcome, packing, whole_cost,
};
use crate::engine::cost::Stage;
use crate::engine::{EngineSettings, JobError, JobHandle, SubmitError};

/// Bytes of a value in the model's dtype.
const VALUE: usize = 4;

/// An engine with room for adapters of this many values.
fn bench(room: usize, way: (usize, usize), max_started: usize) -> Bench {
    let (devices, tokens) = way;
    let clock = Arc::new(SimulatedClock::new());
    let log = Arc::new(Mutex::new(Vec::new()));
    let packs = Packs::default();
    let pipeline = fake_on(devices, Arc::clone(&clock), Arc::clone(&log), packs);
    let settings = EngineSettings {
        adapter_cache_bytes: room * VALUE,
        ..packing(1000, max_started, tokens)
    };
    let pipeline = pipeline.with_adapter_cache(room * VALUE);
    Bench::with_pipeline(settings, pipeline, clock, log)
}

/// Adapters of this many values each, named by their numbers.
fn adapters(count: usize, values: usize) -> Vec<Arc<Adapter>> {
    let named = |number: usize| adapter(&number.to_string(), values);
    (0..count).map(named).collect()
}

fn with(adapters: &[&Arc<Adapter>], job: Job) -> Job {
    Job {
        adapters: uses(adapters.iter().copied()),
        ..job
    }
}

/// Index of a call among all calls.
fn place(bench: &Bench, call: Call) -> usize {
    let place = bench.calls().iter().position(|it| *it == call);
    place.unwrap_or_else(|| panic!("{call:?} was not made"))
}

fn uploads(bench: &Bench) -> Vec<u64> {
    let number = |call: Call| match call {
        Call::Upload(number) => Some(number),
        _ => None,
    };
    bench.calls().into_iter().filter_map(number).collect()
}

#[test]
fn adapters_of_waiting_jobs_are_uploaded_in_their_order_while_others_are_generated() {
    let mut bench = bench(3, (1, 0), 8);
    let all = adapters(4, 1);
    let jobs = all.iter().enumerate();
    let submit = |(seed, adapter)| bench.submit(with(&[adapter], job(seed as u64, 6, 3)));
    let handles: Vec<JobHandle> = jobs.map(submit).collect();
    bench.run();
    assert_eq!(uploads(&bench), [0, 1, 2, 3]);
    // The first job's own comes before its start, the next two before its steps.
    assert!(place(&bench, Call::Upload(0)) < place(&bench, Call::Start(0)));
    assert!(place(&bench, Call::Start(0)) < place(&bench, Call::Upload(1)));
    assert!(place(&bench, Call::Upload(2)) < place(&bench, Call::Step(0)));
    // There is room for the last one when the first has ended.
    assert!(place(&bench, Call::Finish(0)) < place(&bench, Call::Upload(3)));
    assert!(place(&bench, Call::Upload(3)) < place(&bench, Call::Finish(1)));
    let cache = bench.shared.stats().adapters.cache;
    assert_eq!((cache.misses, cache.evictions), (4, 1));
    // An upload is part of its job's encoding, and not of its time in the queue.
    for (index, handle) in handles.into_iter().enumerate() {
        let timings = outcome(handle).unwrap().timings;
        let encode = cost(&job(0, 6, 3), Stage::Encode) + UPLOAD;
        assert_eq!(timings.encode, encode, "job {index}");
    }
}

#[test]
fn the_speed_is_measured_without_uploads() {
    let mut bench = bench(100, (1, 0), 8);
    let all = adapters(3, 1);
    for (seed, adapter) in all.iter().enumerate() {
        let handle = bench.submit(with(&[adapter], job(seed as u64, 6, 3)));
        bench.run();
        outcome(handle).unwrap();
    }
    let plain = job(9, 6, 3);
    let forecast = bench.shared.forecast(&plain, &bench.due(ms(100_000)));
    let estimated = forecast.estimated_work.unwrap();
    assert!(
        estimated.abs_diff(whole_cost(&plain)) < ms(1),
        "{estimated:?}"
    );
}

#[test]
fn an_adapter_in_use_is_not_evicted() {
    let mut bench = bench(2, (1, 0), 8);
    let all = adapters(3, 1);
    let large = bench.submit(with(&[&all[0]], job(10, 20, 20)));
    bench.turn_until(Call::Step(10));
    for (seed, adapter) in [(11, 1), (12, 2), (13, 0)] {
        let small = bench.submit(with(&[&all[adapter]], job(seed, 3, 1)));
        bench.turn_until(Call::Finish(seed));
        assert!(outcome(small).is_ok());
    }
    assert_eq!(uploads(&bench), [0, 1, 2]);
    assert_eq!(bench.shared.stats().adapters.cache.evictions, 1);
    bench.run();
    outcome(large).unwrap();
}

#[test]
fn a_job_whose_adapters_do_not_fit_now_waits_and_others_pass_it() {
    for way in WAYS {
        let mut bench = bench(2, way, 8);
        let all = adapters(2, 2);
        let first = bench.submit(with(&[&all[0]], job(1, 10, 10)));
        bench.turn_until(Call::Step(1));
        // By its size it would overtake, as the next two do.
        let waiting = bench.submit(with(&[&all[1]], job(2, 4, 2)));
        let same = bench.submit(with(&[&all[0]], job(3, 4, 2)));
        let base = bench.submit(job(4, 4, 2));
        bench.run();
        let finished = bench.finished();
        assert_eq!(finished.last(), Some(&2), "{way:?}: {finished:?}");
        assert!(place(&bench, Call::Finish(1)) < place(&bench, Call::Upload(1)));
        for handle in [first, waiting, same, base] {
            outcome(handle).unwrap();
        }
    }
}

#[test]
fn jobs_with_other_adapters_do_not_ride_past_one_that_waits_for_room() {
    let mut bench = bench(1, (1, 2000), 8);
    let all = adapters(2, 1);
    let mut handles = vec![bench.submit(with(&[&all[0]], job(1, 6, 4)))];
    handles.push(bench.submit(with(&[&all[1]], job(2, 6, 4))));
    handles.extend((3..10).map(|seed| bench.submit(with(&[&all[0]], job(seed, 6, 4)))));
    handles.push(bench.submit(job(10, 6, 4)));
    bench.run();
    for handle in handles {
        outcome(handle).unwrap();
    }
    // The base model's job rode with the first, the others came after the one that waited.
    let finished = bench.finished();
    assert_eq!(finished[..3], [1, 10, 2], "{finished:?}");
    assert_eq!(uploads(&bench), [0, 1, 0]);
}

/// Small jobs with the adapter of a large one come all the time, so that it is always in use.
#[test]
fn a_job_that_waits_for_room_does_not_starve() {
    for way in WAYS {
        let mut bench = bench(1, way, 8);
        let all = adapters(2, 1);
        let large = bench.submit(with(&[&all[0]], job(1, 12, 10)));
        let waiting = bench.submit(with(&[&all[1]], job(2, 10, 4)));
        let small = with(&[&all[0]], job(3, 7, 2));
        let gap = whole_cost(&small).mul_f64(0.9);
        let later: Vec<_> = (0..90)
            .map(|index| {
                bench.submit_at(
                    gap * index,
                    with(&[&all[0]], job(100 + u64::from(index), 7, 2)),
                )
            })
            .collect();
        bench.run();
        let ended = bench.find(Call::Finish(2)).ended;
        // Four times its own work and that of the job before it, and the small ones that had begun.
        let most = (whole_cost(&job(1, 12, 10)) + whole_cost(&job(2, 10, 4))) * 4;
        let slack = whole_cost(&small) * 16;
        assert!(ended < most + slack, "{way:?}: {ended:?}");
        for handle in [large, waiting]
            .into_iter()
            .chain(later.iter().map(super::bench::Later::handle))
        {
            outcome(handle).unwrap();
        }
    }
}

#[test]
fn adapters_above_the_bound_are_refused_by_name_and_size() {
    let mut bench = bench(10, (1, 0), 8);
    let (seven, four) = (adapter("7", 7), adapter("style/4", 4));
    let submitted = bench.try_submit(with(&[&seven, &four], job(1, 4, 2)));
    let Err(SubmitError::Adapters(error)) = submitted else {
        panic!("{submitted:?}");
    };
    assert_eq!(
        error.to_string(),
        "there is no room on the device for the adapters of the request: \"7\" takes 28 bytes, \
         \"style/4\" takes 16 bytes, 44 bytes together, and --lora-cache allows 40: leave adapters out, \
         or start the server with a larger --lora-cache"
    );
    let forecast = bench.shared.forecast(
        &with(&[&seven, &four], job(1, 4, 2)),
        &bench.due(ms(99_999)),
    );
    assert!(!forecast.is_accepted);
    let handle = bench.submit(with(&[&seven], job(2, 4, 2)));
    bench.run();
    outcome(handle).unwrap();
    let outcomes = bench.shared.stats().adapters.outcomes;
    assert_eq!((outcomes["7"].rejected, outcomes["7"].finished), (1, 1));
    assert_eq!(
        (outcomes["style/4"].rejected, outcomes["style/4"].finished),
        (1, 0)
    );
}

#[test]
fn an_upload_that_fails_ends_that_job_only() {
    for way in WAYS {
        let mut bench = bench(4, way, 8);
        let good = adapter("1", 1);
        let bad = adapter(FAIL_IN_UPLOAD, 1);
        let first = bench.submit(with(&[&good], job(1, 6, 6)));
        let failing = bench.submit(with(&[&good, &bad], job(2, 6, 4)));
        let last = bench.submit(job(3, 6, 4));
        bench.run();
        let error = outcome(failing).unwrap_err();
        let JobError::Pipeline(error) = error else {
            panic!("{error}");
        };
        assert!(matches!(*error, PipelineError::Device(_)), "{error}");
        outcome(first).unwrap();
        outcome(last).unwrap();
        let stats = bench.shared.stats();
        assert_eq!((stats.outcomes.failed, stats.outcomes.finished), (1, 2));
        assert_eq!(stats.adapters.outcomes["13"].failed, 1);
        // Once ahead, once for its start.
        assert_eq!(uploads(&bench), [1, 13, 13]);
        assert_eq!(stats.memory.in_use, Some(0));
    }
}

#[test]
fn a_job_can_be_dropped_and_the_engine_stopped_while_adapters_are_uploaded() {
    let all = adapters(2, 1);
    let started = |bench: &mut Bench| {
        let first = bench.submit(with(&[&all[0]], job(1, 6, 4)));
        let second = bench.submit(with(&[&all[1]], job(2, 6, 4)));
        bench.turn_until(Call::Start(1));
        // In the middle of the second job's upload.
        (first, second, bench.clock.elapsed() + UPLOAD / 2)
    };

    let mut dropped = bench(4, (1, 0), 8);
    let (first, second, middle) = started(&mut dropped);
    dropped.at(middle, move || drop(second));
    dropped.run();
    outcome(first).unwrap();
    assert_eq!(uploads(&dropped), [0, 1]);
    assert!(!dropped.calls().contains(&Call::Start(2)));

    for (timeout, finishes) in [(Duration::from_mins(1), true), (Duration::ZERO, false)] {
        let mut drained = bench(4, (1, 0), 8);
        let (first, second, middle) = started(&mut drained);
        let shared = Arc::clone(&drained.shared);
        drained.at(middle, move || shared.drain(timeout));
        drained.run();
        assert_eq!(uploads(&drained), [0, 1]);
        for handle in [first, second] {
            match outcome(handle) {
                Ok(_) => assert!(finishes),
                Err(JobError::Stopped) => assert!(!finishes),
                Err(error) => panic!("{error}"),
            }
        }
        assert_eq!(drained.shared.stats().memory.in_use, Some(0));
    }
}

#[test]
fn the_stats_name_the_adapters_of_started_and_waiting_jobs() {
    let mut bench = bench(7, (1, 0), 8);
    let all = adapters(3, 3);
    let handles = [
        bench.submit(with(&[&all[0], &all[1]], job(1, 6, 4))),
        bench.submit(with(&[&all[2]], job(2, 6, 4))),
        bench.submit(with(&[&all[0]], job(3, 6, 4))),
    ];
    bench.turn_until(Call::Step(1));
    let stats = bench.shared.stats().adapters;
    let names = |names: &[&str]| names.iter().map(|&it| it.to_owned()).collect();
    assert_eq!(stats.running, names(&["0", "1"]));
    assert_eq!(stats.waiting, names(&["0", "2"]));
    assert_eq!(stats.max_running, 2);
    bench.run();
    let stats = bench.shared.stats().adapters;
    assert!(stats.running.is_empty() && stats.waiting.is_empty());
    let finished = |name: &str| stats.outcomes[name].finished;
    assert_eq!(["0", "1", "2"].map(finished), [2, 1, 1]);
    for handle in handles {
        outcome(handle).unwrap();
    }
}

/// An adapter of 60 MiB, jobs that hold 10 MiB each, and memory for two of them and the adapter.
#[test]
fn jobs_with_one_adapter_take_its_memory_once() {
    const MIB: u64 = 1 << 20;
    let clock = Arc::new(SimulatedClock::new());
    let log = Arc::new(Mutex::new(Vec::new()));
    let room = |mebibytes: u64| MemoryRoom {
        free: (mebibytes + 32) * MIB,
        total: (mebibytes + 32) * MIB,
    };
    let plan = |_: &Job| MemoryPlan {
        held: 10 * MIB,
        ..MemoryPlan::default()
    };
    let shared_adapter = adapter("1", 60 << 18);
    for (mebibytes, together) in [(80, true), (79, false)] {
        let pipeline = fake_on(1, Arc::clone(&clock), Arc::clone(&log), Packs::default())
            .with_memory(MemoryModel::new(plan), move || room(mebibytes));
        let mut bench = Bench::with_pipeline(
            packing(8, 8, 2000),
            pipeline,
            Arc::clone(&clock),
            Arc::clone(&log),
        );
        let handles = [1, 2].map(|seed| bench.submit(with(&[&shared_adapter], job(seed, 6, 4))));
        let mut planned = 0;
        while bench.turn() {
            planned = planned.max(bench.shared.stats().planned_memory);
        }
        let expected = if together { 80 } else { 70 };
        assert_eq!(planned, expected * MIB);
        for handle in handles {
            outcome(handle).unwrap();
        }
    }
    let pipeline = fake_on(1, Arc::clone(&clock), log, Packs::default())
        .with_memory(MemoryModel::new(plan), move || room(69));
    let bench = Bench::with_pipeline(packing(8, 8, 2000), pipeline, clock, Arc::default());
    let submitted = bench.try_submit(with(&[&shared_adapter], job(1, 6, 4)));
    let Err(SubmitError::TooLarge(error)) = submitted else {
        panic!("{submitted:?}");
    };
    assert_eq!((error.needed, error.most), (70 * MIB, 69 * MIB));
}

/// A job of the property test.
#[derive(Debug, Clone)]
struct Submission {
    side: usize,
    steps: usize,
    is_guided: bool,
    /// Numbers of its adapters.
    adapters: HashSet<usize>,
    at: u64,
    /// When its handle is dropped, after its submission.
    dropped_after: Option<u64>,
}

fn submission() -> impl Strategy<Value = Submission> {
    let adapters = proptest::collection::hash_set(0_usize..6, 0..4);
    let dropped = prop_oneof![3 => Just(None), 1 => (0_u64..2000).prop_map(Some)];
    (
        1_usize..12,
        1_usize..6,
        any::<bool>(),
        adapters,
        0_u64..4000,
        dropped,
    )
        .prop_map(
            |(side, steps, is_guided, adapters, at, dropped_after)| Submission {
                side,
                steps,
                is_guided,
                adapters,
                at,
                dropped_after,
            },
        )
}

proptest! {
    /// The fake pipeline panics if a job's adapters do not fit beside those in use, which would fail the
    /// job.
    #[test]
    fn the_bound_holds_and_every_job_ends(
        way in 0..WAYS.len(),
        room in 1_usize..20,
        max_started in 1_usize..9,
        sizes in proptest::array::uniform6(1_usize..9),
        submissions in proptest::collection::vec(submission(), 1..24),
    ) {
        let mut bench = bench(room, WAYS[way], max_started);
        let all: Vec<Arc<Adapter>> = sizes
            .iter()
            .enumerate()
            .map(|(number, &values)| adapter(&number.to_string(), values))
            .collect();
        let mut refused = 0;
        let ended = Arc::new(Mutex::new(Vec::new()));
        for (seed, it) in submissions.iter().enumerate() {
            let own: Vec<&Arc<Adapter>> = it.adapters.iter().map(|&number| &all[number]).collect();
            let make = if it.is_guided { guided } else { job };
            let job = with(&own, make(seed as u64, it.side, it.steps));
            let needed: usize = it.adapters.iter().map(|&number| sizes[number]).sum();
            let fits = needed <= room;
            refused += u64::from(!fits);
            let shared = Arc::clone(&bench.shared);
            let handle = Arc::new(Mutex::new(None));
            let (kept, handles) = (Arc::clone(&handle), Arc::clone(&ended));
            let is_dropped = it.dropped_after.is_some();
            bench.at(ms(it.at), move || {
                let submitted = shared.submit(job, crate::engine::SubmitOptions::default());
                assert_eq!(submitted.is_ok(), fits);
                if let Ok(submitted) = submitted {
                    if is_dropped {
                        *kept.lock().unwrap() = Some(submitted);
                    } else {
                        handles.lock().unwrap().push(submitted);
                    }
                }
            });
            if let Some(after) = it.dropped_after {
                bench.at(ms(it.at + after), move || drop(handle.lock().unwrap().take()));
            }
        }
        let mut turns = 0;
        for _ in 0..8 {
            while bench.turn() {
                turns += 1;
                assert!(turns < 100_000, "the engine makes no progress");
                let cache = bench.shared.stats().adapters.cache;
                prop_assert!(cache.bytes <= room * VALUE, "{cache:?}");
            }
            // Nothing is left to do until the next job comes.
            bench.clock.advance(ms(1000));
        }
        let handles = std::mem::take(&mut *ended.lock().unwrap());
        let outcomes = bench.shared.stats().outcomes;
        prop_assert_eq!(outcomes.rejected, refused);
        prop_assert_eq!(outcomes.failed, 0);
        let kept = submissions.iter().filter(|it| it.dropped_after.is_none()).count() as u64;
        prop_assert!(handles.len() as u64 <= kept);
        for handle in handles {
            prop_assert!(outcome(handle).is_ok());
        }
    }
}
