//! Steps of several jobs: who rides, what happens when a common step fails, and the budget.

use std::time::Duration;

use kiln_models::job::Job;
use kiln_models::pipeline::StepOutcome;
use kiln_models::step_cache::StepCounts;

use super::bench::{
    Bench, Call, FAIL_IN_COMPANY, FAIL_IN_STEP, PANIC_IN_ENCODE, PANIC_IN_STEP, behaving, cost,
    guided, job, ms, outcome, packing, received, settings, step_cost, whole_cost, work,
};
use crate::engine::adapters::AdapterNeed;
use crate::engine::calibration::Calibration;
use crate::engine::cost::{Stage, Work, makespan};
use crate::engine::riders::{Budget, DEFAULT_BUDGET, Rider, Room, riders};
use crate::engine::{Event, JobError, JobHandle, State, SubmitOptions};

fn room(tokens: usize, devices: usize) -> Room {
    Room {
        budget: Budget::new(tokens),
        devices,
        fixed: 0.0,
        places: usize::MAX,
    }
}

/// Who rides with the first of these jobs, all of which are started.
fn ride(jobs: &[Job], room: Room) -> Vec<usize> {
    let works: Vec<Work> = jobs.iter().map(work).collect();
    let jobs = works.iter().map(|work| Rider {
        work,
        started: true,
        alone: false,
        adapters: AdapterNeed::None,
        has_steps: true,
    });
    riders(&jobs.collect::<Vec<_>>(), 0, room)
}

#[test]
fn the_makespan_is_that_of_the_longest_first() {
    for (units, devices, expected) in [
        (vec![], 2, 0.0),
        (vec![3.0], 1, 3.0),
        (vec![3.0, 4.0], 1, 7.0),
        (vec![3.0, 4.0], 2, 4.0),
        (vec![1.0, 2.0, 3.0, 4.0], 2, 5.0),
        (vec![3.0, 3.0, 2.0, 2.0, 2.0], 2, 7.0),
        (vec![5.0, 1.0], 4, 5.0),
        (vec![2.0; 9], 4, 6.0),
    ] {
        assert_eq!(
            makespan(&units, devices),
            expected,
            "{units:?} on {devices}"
        );
    }
}

#[test]
fn riders_fit_the_budget_or_an_eighth_of_the_first_job() {
    // 64 tokens each.
    let equal = vec![job(0, 8, 9); 4];
    assert!(ride(&equal, room(0, 1)).is_empty());
    assert!(ride(&equal, room(127, 1)).is_empty());
    assert_eq!(ride(&equal, room(128, 1)), [1]);
    // Tokens of both halves and of all images count.
    assert!(ride(&vec![guided(0, 8, 9); 2], room(255, 1)).is_empty());
    assert_eq!(ride(&vec![guided(0, 8, 9); 2], room(256, 1)), [1]);
    let two_images = Job {
        num_images: 2,
        ..job(0, 8, 9)
    };
    assert!(ride(&[job(0, 12, 9), two_images.clone()], room(271, 1)).is_empty());
    assert_eq!(ride(&[job(0, 12, 9), two_images], room(272, 1)), [1]);
    // 256 tokens take an eighth along, 32, whatever the budget.
    let large = [
        job(0, 16, 9),
        job(0, 6, 9),
        job(0, 5, 1),
        job(0, 2, 1),
        job(0, 2, 1),
    ];
    assert_eq!(ride(&large, room(1, 1)), [2, 3]);
    assert!(ride(&large, room(0, 1)).is_empty());
}

#[test]
fn a_step_takes_at_most_twice_as_long_as_without_riders() {
    // Small jobs ride with a large one, which does not ride with them.
    let mixed = [
        job(0, 8, 9),
        job(0, 16, 9),
        job(0, 5, 9),
        job(0, 5, 9),
        job(0, 4, 9),
    ];
    assert_eq!(ride(&mixed, room(10_000, 1)), [2, 3]);
    // A step that costs much besides its work has room for more.
    let fixed = work(&job(0, 8, 9)).of_stage(Stage::Step) * 2.0;
    let costly = Room {
        fixed,
        ..room(10_000, 1)
    };
    assert_eq!(ride(&vec![job(0, 8, 9); 9], costly), [1, 2, 3]);
}

#[test]
fn riders_that_wait_need_a_place() {
    let work = work(&job(0, 4, 9));
    let waiting = Rider {
        work: &work,
        started: false,
        alone: false,
        adapters: AdapterNeed::None,
        has_steps: true,
    };
    let started = Rider {
        started: true,
        ..waiting
    };
    let done = Rider {
        has_steps: false,
        ..started
    };
    let costly = Room {
        fixed: work.of_stage(Stage::Step) * 100.0,
        places: 1,
        ..room(10_000, 1)
    };
    let jobs = [waiting, waiting, started, done, started];
    assert_eq!(riders(&jobs, 2, costly), [0, 4]);
    // For which there is no memory: younger ones must not take it.
    let alone = Rider {
        alone: true,
        ..waiting
    };
    assert_eq!(riders(&[started, alone, waiting, started], 0, costly), [3]);
    // For whose adapters there is no room: younger ones with adapters must not take it.
    let with = |adapters| Rider {
        adapters,
        ..waiting
    };
    let (waits, fits) = (with(AdapterNeed::Waits), with(AdapterNeed::Fits));
    let jobs = [started, fits, waits, fits, waiting];
    let two = Room {
        places: 2,
        ..costly
    };
    assert_eq!(riders(&jobs, 0, two), [1, 4]);
    let jobs = [started, waits, fits, waiting];
    assert_eq!(riders(&jobs, 0, costly), [3]);
    assert_eq!(Room::places(16, 1, 1), 7);
    assert_eq!(Room::places(16, 9, 1), 0);
    assert_eq!(Room::places(1, 1, 1), 0);
    assert_eq!(Room::places(4, 1, 4), 3);
}

#[test]
fn every_device_has_a_job_if_there_are_enough() {
    for devices in 2..=8 {
        for make in [job, guided] {
            let jobs = vec![make(0, 8, 9); 2 * devices];
            let packed = ride(&jobs, room(64, devices)).len() + 1;
            // Guided jobs are whole jobs when there are as many as devices.
            assert!(packed >= devices, "{packed} on {devices}");
        }
        // Halves that have devices for themselves are not packed, so they need no budget.
        let jobs = vec![job(0, 8, 9); 2 * devices];
        assert_eq!(ride(&jobs, room(0, devices)).len() + 1, devices);
        let jobs = vec![guided(0, 8, 9); 2 * devices];
        assert_eq!(ride(&jobs, room(0, devices)).len() + 1, devices / 2);
    }
    // A large job does not ride with a small one on an idle device.
    assert!(ride(&[job(0, 8, 9), job(0, 16, 9)], room(0, 2)).is_empty());
    assert_eq!(ride(&[job(0, 16, 9), job(0, 8, 9)], room(0, 2)), [1]);
}

#[test]
fn the_budget_halves_and_grows_back() {
    let mut budget = Budget::new(1000);
    for tokens in [500, 250, 125] {
        budget.fail();
        assert_eq!(budget.tokens(), tokens);
    }
    for _ in 0..64 {
        budget.succeed();
    }
    assert_eq!(budget.tokens(), 250);
    // A failure begins the count again.
    for _ in 0..63 {
        budget.succeed();
    }
    budget.fail();
    budget.succeed();
    assert_eq!(budget.tokens(), 125);
    for _ in 0..20 {
        budget.fail();
    }
    assert_eq!(budget.tokens(), 0);
    // A budget of nothing is one job, whose own eighth is not taken either.
    let reduced = Room {
        budget,
        ..room(1, 1)
    };
    assert!(ride(&[job(0, 16, 9), job(0, 2, 9)], reduced).is_empty());
    for _ in 0..64 * 20 {
        budget.succeed();
    }
    assert_eq!(budget.tokens(), 1000);
    assert!(!Budget::new(0).packs());
}

/// An engine on one device whose steps have any number of tokens.
fn bench() -> Bench {
    Bench::new(packing(20, 16, 100_000))
}

fn finished(handles: impl IntoIterator<Item = JobHandle>) {
    for handle in handles {
        outcome(handle).unwrap();
    }
}

#[test]
fn jobs_that_come_together_share_their_steps() {
    let mut bench = bench();
    let handles = [
        bench.submit(job(1, 8, 3)),
        bench.submit(guided(2, 5, 5)),
        bench.submit(job(3, 3, 2)),
    ];
    bench.run();
    // The smallest comes first and takes nobody along: the others are too large.
    let expected = [
        vec![3],
        vec![3],
        vec![1, 2],
        vec![1, 2],
        vec![1, 2],
        vec![2],
        vec![2],
    ];
    assert_eq!(bench.packs(), expected);
    finished(handles);
    let stats = bench.shared.stats();
    assert_eq!((stats.steps, stats.shared_steps), (10, 6));
    assert_eq!(stats.max_step_tokens, 100_000);
}

#[test]
fn a_rider_that_is_done_is_finished_at_once() {
    let mut bench = bench();
    let long = bench.submit(job(1, 8, 20));
    let short = bench.submit(job(2, 8, 12));
    bench.run();
    assert_eq!(bench.finished(), [2, 1]);
    let ended = bench.find(Call::Finish(2)).ended;
    let both = step_cost(&[&job(1, 8, 20), &job(2, 8, 12)], 1) * 12;
    let decode = cost(&job(2, 8, 12), Stage::Decode);
    assert!(ended.abs_diff(both + decode) < ms(4), "{ended:?}");
    finished([long, short]);
}

#[test]
fn early_riders_leave_half_of_the_places_to_small_jobs() {
    let mut bench = Bench::new(packing(100, 8, 100_000));
    // Nine ride with the large one if they may.
    let large = job(0, 40, 64);
    let step = cost(&large, Stage::Step);
    let mut handles = vec![bench.submit(large)];
    bench.turn_until(Call::Start(0));
    for seed in 1..10 {
        handles.push(bench.submit(job(seed, 10, 700)));
    }
    while bench.packs().is_empty() {
        bench.turn();
    }
    assert_eq!(bench.packs(), [[0, 1, 2, 3]]);
    assert_eq!(bench.shared.stats().running, 4);
    let came = bench.clock.elapsed();
    handles.push(bench.submit(job(20, 4, 1)));
    bench.run();
    let began = bench.find(Call::Start(20)).began;
    assert!(began <= came + step * 2, "{came:?} {began:?}");
    finished(handles);
}

#[test]
fn no_memory_for_a_common_step_fails_nobody_and_halves_the_budget() {
    let mut bench = bench();
    let handles = [
        bench.submit(job(1, 8, 4)),
        bench.submit(behaving(FAIL_IN_COMPANY, job(2, 8, 4))),
    ];
    bench.run();
    // Within one turn: together, and then each alone; then with a smaller budget.
    assert_eq!(bench.packs()[..3], [vec![1, 2], vec![1], vec![2]]);
    assert_eq!(bench.finished(), [1, 2]);
    finished(handles);
    let stats = bench.shared.stats();
    assert_eq!((stats.outcomes.finished, stats.outcomes.failed), (2, 0));
    assert_eq!((stats.steps, stats.shared_steps), (8, 0));
    let failures = bench.packs().iter().filter(|pack| pack.len() > 1).count();
    assert_eq!(stats.max_step_tokens, 100_000 >> failures);

    // After 64 good steps the budget doubles.
    let handle = bench.submit(job(3, 2, 64));
    bench.run();
    finished([handle]);
    assert_eq!(
        bench.shared.stats().max_step_tokens,
        100_000 >> (failures - 1)
    );
}

#[test]
fn a_job_that_fails_alone_ends_alone() {
    for behaviour in [PANIC_IN_STEP, FAIL_IN_STEP] {
        for devices in [1, 2] {
            let mut bench = Bench::on(devices, packing(20, 16, 100_000));
            let good = [job(1, 8, 4), guided(2, 5, 4), job(4, 6, 9)];
            let bad = bench.submit(behaving(behaviour, job(3, 8, 4)));
            let handles = good.map(|job| bench.submit(job));
            bench.run();
            outcome(bad).unwrap_err();
            for handle in handles {
                let images = outcome(handle).unwrap().output.images;
                assert_eq!(images[0].pixels[1], 255);
            }
            let outcomes = bench.shared.stats().outcomes;
            assert_eq!((outcomes.finished, outcomes.failed), (3, 1));
        }
    }
}

#[test]
fn cancelling_one_job_of_a_step_leaves_the_others() {
    for gone in [1, 2, 3] {
        let mut bench = bench();
        let jobs = [job(1, 8, 6), job(2, 4, 9), job(3, 4, 12)];
        let mut handles: Vec<Option<JobHandle>> = jobs
            .into_iter()
            .map(|job| Some(bench.submit(job)))
            .collect();
        let handle = handles[gone - 1].take();
        // In the middle of a step.
        bench.at(ms(130), move || drop(handle));
        bench.run();
        assert!(bench.packs().iter().any(|pack| pack.len() > 1));
        let calls = bench.calls();
        assert!(calls.contains(&Call::Discard(gone as u64)));
        assert!(!calls.contains(&Call::Finish(gone as u64)));
        finished(handles.into_iter().flatten());
    }
}

#[test]
fn the_deadline_of_one_job_of_a_step_ends_that_job_alone() {
    let mut bench = bench();
    let late = bench.submit_with_deadline(job(1, 8, 9), ms(200));
    let rider = bench.submit_with_deadline(job(2, 8, 20), ms(300));
    let good = bench.submit(job(3, 8, 12));
    bench.run();
    for handle in [late, rider] {
        assert!(matches!(outcome(handle), Err(JobError::DeadlinePassed)));
    }
    finished([good]);
    assert_eq!(bench.packs()[0], [1, 2]);
}

#[test]
fn a_failed_common_step_does_not_change_the_estimates() {
    let mut bench = bench();
    // Each common step fails, and takes a minute before it does.
    let handles = [
        bench.submit(job(1, 8, 20)),
        bench.submit(behaving(FAIL_IN_COMPANY, job(2, 8, 20))),
    ];
    let clock = std::sync::Arc::clone(&bench.clock);
    bench.at(ms(3), move || clock.advance(Duration::from_mins(1)));
    bench.run();
    finished(handles);
    let asked = job(3, 8, 10);
    let estimate = bench
        .shared
        .forecast(&asked, &SubmitOptions::default())
        .estimated_work
        .unwrap();
    assert!(
        estimate.abs_diff(whole_cost(&asked)) < ms(2),
        "{estimate:?}"
    );
}

/// Positions and estimated waits that a handle has received.
fn queued(handle: &mut JobHandle) -> Vec<(usize, Duration)> {
    let queued = |event| match event {
        Event::Queued {
            position,
            estimated_wait,
        } => Some((position, estimated_wait?)),
        _ => None,
    };
    received(handle).into_iter().filter_map(queued).collect()
}

#[test]
fn waiting_times_take_the_riders_into_account() {
    for devices in [1, 2, 3] {
        let mut bench = Bench::on(devices, packing(20, 16, 300));
        let first = bench.submit(guided(100, 5, 3));
        bench.run();
        finished([first]);
        let now = bench.clock.elapsed();
        let jobs = [
            job(0, 8, 10),
            guided(1, 8, 12),
            job(2, 8, 10),
            job(3, 3, 4),
            guided(4, 6, 50),
            job(5, 16, 30),
        ];
        let mut handles: Vec<JobHandle> =
            jobs.iter().map(|job| bench.submit(job.clone())).collect();
        let last: Vec<_> = handles
            .iter_mut()
            .map(|handle| *queued(handle).last().unwrap())
            .collect();
        bench.run();
        assert!(bench.packs().iter().any(|pack| pack.len() > 1));
        for (seed, (_, wait)) in (0..).zip(last) {
            let began = bench.find(Call::Start(seed)).began.saturating_sub(now);
            let close = ms(10);
            assert!(
                wait.abs_diff(began) <= close,
                "{devices} devices, job {seed}: {wait:?} for {began:?}"
            );
        }
        finished(handles);
    }
}

#[test]
fn a_forecast_agrees_with_the_queue() {
    for devices in [1, 2] {
        let mut bench = Bench::on(devices, packing(20, 16, 300));
        let first = bench.submit(guided(100, 5, 3));
        bench.run();
        finished([first]);
        let others = [1, 2, 3].map(|seed| bench.submit(guided(seed, 8, 30)));
        for _ in 0..9 {
            bench.turn();
        }
        for asked in [job(4, 8, 10), guided(5, 8, 30), job(6, 20, 50)] {
            let forecast = bench.shared.forecast(&asked, &SubmitOptions::default());
            let mut handle = bench.submit(asked.clone());
            let wait = forecast.estimated_wait.unwrap();
            assert_eq!(queued(&mut handle), [(forecast.position, wait)]);
            // Two devices make a step of a guided job in half of the time.
            let halves = asked.branches().count();
            let step = cost(&asked, Stage::Step) * asked.sampling.steps as u32;
            let rest = whole_cost(&asked).saturating_sub(step);
            let alone = step / halves.min(devices) as u32 + rest;
            let estimated = forecast.estimated_work.unwrap();
            assert!(
                estimated.abs_diff(alone) < ms(3),
                "{estimated:?} for {alone:?}"
            );
        }
        finished_later(&mut bench, others);
    }
}

fn finished_later(bench: &mut Bench, handles: impl IntoIterator<Item = JobHandle>) {
    bench.run();
    finished(handles);
}

#[test]
fn a_gated_step_is_one_half_and_a_reused_one_is_none() {
    let work = work(&guided(0, 8, 9));
    let step = work.of_stage(Stage::Step);
    let outcome = |part: f64, gated: usize| StepOutcome {
        id: 0,
        steps_left: 3,
        counts: StepCounts {
            computed: 6,
            gated,
            ..StepCounts::default()
        },
        work: part,
    };
    let before = StepCounts {
        gated: 1,
        ..StepCounts::default()
    };
    assert_eq!(work.units_of(&outcome(1.0, 1), before), [step / 2.0; 2]);
    assert_eq!(work.units_of(&outcome(0.5, 2), before), [step / 2.0]);
    assert_eq!(work.units_of(&outcome(0.0, 1), before), [0.0; 2]);
}

#[test]
fn a_full_queue_says_when_a_job_that_shares_its_steps_will_be_done() {
    let mut bench = Bench::new(packing(1, 8, 1000));
    let first = bench.submit(job(100, 5, 3));
    bench.run();
    finished([first]);
    let handles = [1, 2].map(|seed| bench.submit(job(seed, 8, 10)));
    let Err(crate::engine::SubmitError::QueueFull { retry_after, .. }) =
        bench.try_submit(job(3, 8, 10))
    else {
        panic!("a third job was taken");
    };
    let full = bench.clock.elapsed();
    bench.turn_until(Call::Finish(1));
    let took = bench.clock.elapsed().saturating_sub(full);
    assert!(
        retry_after.abs_diff(took) < ms(4),
        "{retry_after:?} for {took:?}"
    );
    bench.run();
    finished(handles);
}

#[test]
fn prompts_of_waiting_jobs_are_encoded_together() {
    let mut bench = bench();
    let handles: Vec<_> = (0..6).map(|seed| bench.submit(job(seed, 8, 2))).collect();
    bench.run();
    for handle in handles {
        // Each has its part of the time.
        let timings = outcome(handle).unwrap().timings;
        assert_eq!(timings.encode, ms(1));
    }
    let stats = bench.shared.stats();
    assert_eq!(stats.encode_time.count(), 6);
    assert!((stats.encode_time.sum - 0.006).abs() < 1e-9);
    let starts: Vec<_> = (0..6).map(|seed| bench.find(Call::Start(seed))).collect();
    // Four at first, then the other two.
    assert!(starts.iter().all(|start| start.began == start.ended));
    assert_eq!(starts[0].began, ms(4));
}

#[test]
fn prompts_that_cannot_be_encoded_together_are_encoded_alone() {
    let mut bench = bench();
    let handles = [
        bench.submit(job(1, 8, 2)),
        bench.submit(behaving(PANIC_IN_ENCODE, job(2, 8, 2))),
        bench.submit(job(3, 8, 2)),
    ];
    bench.run();
    finished(handles);
    for seed in 1..=3 {
        let start = bench.find(Call::Start(seed));
        assert_eq!(start.ended, start.began + ms(1));
    }
    assert!(matches!(*bench.shared.state().borrow(), State::Ready));
}

#[test]
fn without_a_budget_every_prompt_is_encoded_alone() {
    let mut bench = Bench::new(settings(8, 8));
    let handles = [1, 2, 3].map(|seed| bench.submit(behaving(PANIC_IN_ENCODE, job(seed, 8, 2))));
    bench.run();
    finished(handles);
    assert!(bench.packs().iter().all(|pack| pack.len() == 1));
    assert_eq!(bench.shared.stats().max_step_tokens, 0);
}

/// Measures steps of a fixed part and a part for each copy. Returns the budget and the fixed part in
/// copies.
fn calibrated(fixed: u64, each: u64) -> (usize, f64) {
    let job = guided(0, 8, 1);
    let mut calibration = Calibration::of(&job, 1);
    let mut made = Vec::new();
    while let Some(copies) = calibration.next() {
        made.push(copies);
        // The first step of each number compiles kernels.
        let is_first = made.iter().filter(|&&it| it == copies).count() == 1;
        let took = ms(fixed + each * copies as u64) + ms(if is_first { 900 } else { 0 });
        calibration.book(Some(took), took);
    }
    assert_eq!(made, [1, 1, 1, 1, 2, 2, 2, 2, 4, 4, 4, 4]);
    let knee = calibration.knee(&work(&job));
    (knee.tokens, knee.fixed(|copies| copies as f64))
}

#[test]
fn the_budget_is_the_smallest_with_almost_the_best_throughput() {
    // A copy has 128 tokens.
    let close = |(tokens, fixed): (usize, f64), expected: (usize, f64)| {
        assert_eq!(tokens, expected.0);
        assert!(
            (fixed - expected.1).abs() < 1e-6,
            "{fixed} for {expected:?}"
        );
    };
    close(calibrated(0, 100), (128, 0.0));
    // Copies per second: 0.952, 0.976 and 0.988 of the best possible.
    close(calibrated(5, 100), (128, 0.05));
    close(calibrated(10, 100), (256, 0.1));
    close(calibrated(100, 20), (512, 5.0));
    // Launches only: a step of four takes as long as one. The fixed part has a bound.
    close(calibrated(100, 0), (512, 9.0));
}

#[test]
fn a_slow_backend_takes_the_default_budget() {
    let job = guided(0, 8, 1);
    let knee = |steps: &[Option<u64>], expected: Option<u64>| {
        let mut calibration = Calibration::of(&job, 1);
        calibration.expect(expected.map(ms));
        let mut steps = steps.iter();
        while calibration.next().is_some() {
            let step = steps.next().unwrap().map(ms);
            calibration.book(step, step.unwrap_or_default());
        }
        assert_eq!(steps.next(), None);
        calibration.knee(&work(&job)).tokens
    };
    // By the warm-up's speed, by the first timed step, by all of the time, and because steps fail.
    assert_eq!(knee(&[], Some(30_000)), DEFAULT_BUDGET);
    assert_eq!(knee(&[Some(600), Some(501)], None), DEFAULT_BUDGET);
    assert_eq!(knee(&[Some(11_000)], Some(400)), DEFAULT_BUDGET);
    assert_eq!(knee(&[None], None), DEFAULT_BUDGET);
    // A disturbed measurement is corrected by the one after it.
    let calls = [10, 28, 28, 28, 10, 86, 86, 86, 10, 41, 41, 41];
    assert_eq!(knee(&calls.map(Some), None), 512);
    // Two numbers of jobs are enough.
    let four = [Some(9), Some(9), Some(9), Some(9)];
    assert_eq!(knee(&[four.as_slice(), &four, &[None]].concat(), None), 256);
}

#[test]
fn the_warm_up_is_followed_by_the_measurement() {
    let mut bench = Bench::new(crate::engine::EngineSettings {
        max_step_tokens: None,
        warm_up: Some(guided(99, 16, 1)),
        ..settings(8, 8)
    });
    let waiting = bench.submit(job(1, 8, 2));
    while matches!(*bench.shared.state().borrow(), State::Starting) {
        assert!(!bench.calls().contains(&Call::Start(1)));
        assert!(bench.turn());
    }
    // Steps of 259 ms a half: too long to go on after one.
    assert_eq!(bench.packs(), [vec![99], vec![99], vec![99]]);
    assert_eq!(bench.shared.stats().max_step_tokens, DEFAULT_BUDGET);
    bench.run();
    finished([waiting]);
    let stats = bench.shared.stats();
    assert_eq!((stats.outcomes.finished, stats.steps), (1, 2));

    let mut bench = Bench::new(crate::engine::EngineSettings {
        max_step_tokens: None,
        warm_up: Some(guided(99, 4, 1)),
        ..settings(8, 8)
    });
    bench.run();
    let lengths: Vec<usize> = bench.packs().iter().map(Vec::len).collect();
    assert_eq!(lengths, [1, 1, 1, 1, 1, 2, 2, 2, 2, 4, 4, 4, 4]);
    // The work is all that counts here, so one job is as good as four.
    assert_eq!(bench.shared.stats().max_step_tokens, 32);
    assert_eq!(bench.shared.stats().running, 0);
    // Nothing of it is left in the pipeline.
    assert_eq!(bench.shared.stats().memory.in_use, Some(0));
}

#[test]
fn an_engine_that_is_stopped_while_it_measures_ends() {
    for drain in [true, false] {
        let mut bench = Bench::new(crate::engine::EngineSettings {
            max_step_tokens: None,
            warm_up: Some(guided(99, 4, 1)),
            ..settings(8, 8)
        });
        while bench.packs().len() < 4 {
            bench.turn();
        }
        if drain {
            bench.shared.drain(Duration::from_hours(1));
        } else {
            bench.shared.stop();
        }
        bench.run();
        assert_eq!(bench.packs().len(), 4);
        assert!(matches!(*bench.shared.state().borrow(), State::Stopped));
    }
}
