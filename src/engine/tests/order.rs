//! Which job has the device when.

use std::sync::Arc;
use std::time::Duration;

use kiln_models::job::Job;

use super::bench::{
    Bench, Call, Logged, WAYS, cost, guided, job, ms, outcome, packing, settings, step_cost,
    whole_cost, work,
};
use crate::engine::SubmitOptions;
use crate::engine::cost::{Stage, makespan};

/// Number of steps of the job with this seed that began in a span of time.
fn steps_begun(log: &[Logged], seed: u64, from: Duration, to: Duration) -> usize {
    let in_span = |logged: &&Logged| from <= logged.began && logged.began < to;
    let steps = log.iter().filter(|logged| logged.call == Call::Step(seed));
    steps.filter(in_span).count()
}

/// An engine in each of the ways in which steps are made.
fn benches(max_queue: usize, max_started: usize) -> impl Iterator<Item = (String, Bench)> {
    WAYS.into_iter().map(move |(devices, tokens)| {
        let bench = Bench::on(devices, packing(max_queue, max_started, tokens));
        (format!("{devices} devices, {tokens} tokens"), bench)
    })
}

#[test]
fn a_small_job_waits_for_one_step_of_a_large_one() {
    for (way, bench) in benches(8, 8) {
        small_waits_for_one_step(&way, bench);
    }
}

fn small_waits_for_one_step(way: &str, mut bench: Bench) {
    let large = bench.submit(job(1, 32, 50));
    // In the middle of the third step.
    let came = cost(&job(1, 32, 50), Stage::Step) * 5 / 2;
    let small = bench.submit_at(came, job(2, 8, 4));
    bench.run();
    let log = bench.log();
    let began = bench.find(Call::Start(2)).began;
    let finished = bench.find(Call::Finish(2)).ended;
    assert!(began <= came + cost(&job(1, 32, 50), Stage::Step), "{way}");
    // No step of the large job began in between.
    assert_eq!(steps_begun(&log, 1, came, finished), 0, "{way}");
    outcome(small.handle()).unwrap();
    outcome(large).unwrap();
}

#[test]
fn small_jobs_wait_for_one_step_even_with_every_place_taken() {
    for (way, bench) in benches(100, 8) {
        small_waits_with_every_place_taken(&way, bench);
    }
}

fn small_waits_with_every_place_taken(way: &str, mut bench: Bench) {
    let large = job(0, 40, 64);
    let step = cost(&large, Stage::Step);
    let mut handles = vec![bench.submit(large)];
    // Each is half as large as the one before, and is started as soon as it is submitted.
    let halves = [
        (39, 31),
        (39, 15),
        (39, 7),
        (39, 3),
        (39, 1),
        (27, 1),
        (18, 1),
    ];
    for (seed, (side, steps)) in (1..).zip(halves) {
        bench.turn_until(Call::Start(seed - 1));
        handles.push(bench.submit(job(seed, side, steps)));
    }
    bench.turn_until(Call::Start(7));
    assert_eq!(bench.shared.stats().running, 8, "{way}");
    let came = bench.clock.elapsed();
    handles.push(bench.submit(job(8, 2, 1)));
    bench.run();
    let began = bench.find(Call::Start(8)).began;
    assert!(
        began <= came + step * 2,
        "{way}: came {came:?}, began {began:?}"
    );
    for handle in handles {
        outcome(handle).unwrap();
    }
}

#[test]
fn equal_jobs_are_finished_one_after_the_other_in_the_order_they_came() {
    let mut bench = Bench::new(settings(8, 8));
    let handles: Vec<_> = (0..5).map(|seed| bench.submit(job(seed, 8, 10))).collect();
    let late = bench.submit_at(ms(2000), job(5, 8, 10));
    let mut most_running = 0;
    while bench.turn() {
        most_running = most_running.max(bench.shared.stats().running);
    }
    assert_eq!(bench.finished(), [0, 1, 2, 3, 4, 5]);
    // No job was interrupted: waiting jobs take no memory.
    assert_eq!(most_running, 1);
    for handle in handles.into_iter().chain([late.handle()]) {
        assert_eq!(outcome(handle).unwrap().timings.paused, Duration::ZERO);
    }
}

#[test]
fn equal_jobs_that_share_their_steps_are_finished_in_the_order_they_came() {
    for (way, mut bench) in benches(8, 8) {
        let mut handles: Vec<_> = (0..5).map(|seed| bench.submit(job(seed, 8, 10))).collect();
        let late = bench.submit_at(ms(900), job(5, 8, 10));
        bench.run();
        assert_eq!(bench.finished(), [0, 1, 2, 3, 4, 5], "{way}");
        handles.push(late.handle());
        for handle in handles {
            outcome(handle).unwrap();
        }
    }
}

#[test]
fn jobs_of_comparable_size_do_not_overtake() {
    for (way, mut bench) in benches(8, 8) {
        let first = bench.submit(job(1, 8, 50));
        let second = bench.submit_at(ms(500), job(2, 8, 26));
        bench.run();
        let order = bench.finished();
        // A job that rides is not held back when its steps are over: it delays nobody.
        let rode = bench.packs().iter().filter(|pack| pack.len() > 1).count();
        assert!(order == [1, 2] || rode == 26, "{way}: {order:?}");
        let [first, second] = [outcome(first), outcome(second.handle())];
        let bound = whole_cost(&job(1, 8, 50)) + whole_cost(&job(2, 8, 26)) + ms(1);
        assert!(first.unwrap().timings.total() <= bound, "{way}");
        second.unwrap();
    }
}

#[test]
fn a_large_job_is_not_starved_by_small_ones_without_end() {
    for (way, bench) in benches(10, 8) {
        large_is_not_starved(&way, bench);
    }
}

fn large_is_not_starved(way: &str, mut bench: Bench) {
    let large = job(0, 16, 50);
    let handle = bench.submit(large.clone());
    // Small jobs are submitted twice as fast as the device can generate them.
    let small = job(1, 8, 4);
    let every = whole_cost(&small) / 2;
    for index in 0..5000 {
        let (shared, job) = (Arc::clone(&bench.shared), job(1 + index, 8, 4));
        bench.at(every * index as u32, move || {
            // The handle of an accepted job is never dropped.
            if let Ok(handle) = shared.submit(job, SubmitOptions::default()) {
                std::mem::forget(handle);
            }
        });
    }
    bench.turn_until(Call::Finish(0));
    let took = bench.find(Call::Finish(0)).ended;
    let (alone, turn) = (whole_cost(&large), cost(&small, Stage::Step));
    if !bench.packs().iter().any(|pack| pack.len() > 1) {
        assert!(took > alone * 3, "{way}: there was no crowd: {took:?}");
    }
    // Four times the job's own time; each of its waits can be one turn of others too long, and two
    // small jobs can share a turn.
    let bound = alone * 4 + turn * 2 * 52;
    assert!(took <= bound, "{way}: {took:?} > {bound:?}");
    outcome(handle).unwrap();
}

#[test]
fn with_one_place_nothing_overtakes() {
    for (way, mut bench) in benches(8, 1) {
        let large = bench.submit(job(1, 16, 50));
        let small = bench.submit_at(ms(500), job(2, 1, 1));
        bench.run();
        assert_eq!(bench.finished(), [1, 2], "{way}");
        assert!(bench.packs().iter().all(|pack| pack.len() == 1), "{way}");
        outcome(large).unwrap();
        outcome(small.handle()).unwrap();
    }
}

/// A random number generator with a fixed seed, so that a failure can be repeated.
pub(super) struct Numbers(pub(super) u64);

impl Numbers {
    pub(super) fn next(&mut self, below: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (self.0 >> 33) % below
    }
}

struct Arrival {
    came: Duration,
    job: Job,
}

/// Random arrivals, checked against the guarantees of the policy.
#[test]
fn every_crowd_is_served_in_bounded_time() {
    for crowd in 0..20 {
        crowd_is_served(crowd, 1, 0);
    }
    for crowd in 0..5 {
        for (devices, tokens) in WAYS {
            crowd_is_served(20 + crowd, devices, tokens);
        }
    }
}

fn crowd_is_served(crowd: u64, devices: usize, tokens: usize) {
    let mut numbers = Numbers(crowd);
    let max_started = 1 + numbers.next(8) as usize;
    let mut bench = Bench::on(devices, packing(1000, max_started, tokens));
    let mut came = Duration::ZERO;
    let arrivals: Vec<Arrival> = (0..40)
        .map(|seed| {
            came += ms(numbers.next(400));
            let (side, steps) = (1 + numbers.next(20), 1 + numbers.next(50));
            let make = if numbers.next(3) == 0 { guided } else { job };
            let job = make(seed, side as usize, steps as usize);
            Arrival { came, job }
        })
        .collect();
    let handles: Vec<_> = arrivals
        .iter()
        .map(|arrival| bench.submit_at(arrival.came, arrival.job.clone()))
        .collect();
    let what = format!("crowd {crowd}, {devices} devices, {tokens} tokens");
    // Time passes on an idle device too.
    while bench.turn() || bench.clock.elapsed() < came {
        if bench.shared.stats().running == 0 {
            bench.clock.advance(ms(1));
        }
        assert!(bench.shared.stats().running <= max_started, "{what}");
    }
    assert_eq!(bench.finished().len(), 40, "{what}");
    nothing_starved(&bench, &arrivals, &what);
    equals_are_in_order(&bench, &arrivals, &what);
    packs_are_small(&bench, &arrivals, devices, tokens, &what);
    for handle in handles {
        outcome(handle.handle()).unwrap();
    }
}

/// The jobs of every step have no more tokens than the budget or than one of them has and an eighth,
/// and take at most twice as long together as one of them alone: the one that had the turn.
fn packs_are_small(bench: &Bench, arrivals: &[Arrival], devices: usize, budget: usize, what: &str) {
    for pack in bench.packs() {
        let jobs: Vec<&Job> = pack
            .iter()
            .map(|&seed| &arrivals[seed as usize].job)
            .collect();
        let units: usize = jobs.iter().map(|job| job.branches().count()).sum();
        let tokens: Vec<f64> = jobs
            .iter()
            .flat_map(|job| work(job).token_units())
            .collect();
        // The first one has the turn.
        let first = work(jobs[0]).tokens();
        let most = budget.max(first + first / 8) as f64;
        let is_small = budget > 0 && makespan(&tokens, devices) <= most;
        assert!(
            jobs.len() == 1 || is_small || units <= devices,
            "{what}: {pack:?}"
        );
        let alone = step_cost(&jobs[..1], devices);
        assert!(
            step_cost(&jobs, devices) <= alone * 2 + ms(1),
            "{what}: {pack:?}"
        );
    }
}

/// Every job is finished within four times the sum of its own work and the work of the jobs that
/// were unfinished when it came. Encoding and decoding wait as long as a step does, and each wait
/// can be one turn of others too long, which is at most twice as long as that of one job.
fn nothing_starved(bench: &Bench, arrivals: &[Arrival], what: &str) {
    let turns = |job: &Job| job.sampling.steps as u32 + 2;
    let longest_turn = arrivals.iter().map(|a| cost(&a.job, Stage::Step)).max();
    let longest_turn = longest_turn.unwrap() * 2;
    for (index, arrival) in arrivals.iter().enumerate() {
        let done = bench.find(Call::Finish(arrival.job.noise.seed)).ended;
        let unfinished = arrivals[..=index].iter().filter(|earlier| {
            bench.find(Call::Finish(earlier.job.noise.seed)).ended > arrival.came
        });
        let bound: Duration = unfinished
            .map(|Arrival { job, .. }| {
                (whole_cost(job) + cost(job, Stage::Step) * 2) * 4 + longest_turn * turns(job)
            })
            .sum();
        assert!(
            done <= arrival.came + bound,
            "{what}, job {index}: {done:?} > {bound:?}"
        );
    }
}

fn equals_are_in_order(bench: &Bench, arrivals: &[Arrival], what: &str) {
    let order = bench.finished();
    let place = |arrival: &Arrival| {
        order
            .iter()
            .position(|seed| *seed == arrival.job.noise.seed)
    };
    for (index, later) in arrivals.iter().enumerate() {
        for earlier in &arrivals[..index] {
            if whole_cost(&earlier.job) == whole_cost(&later.job) {
                assert!(place(earlier) < place(later), "{what}, job {index}");
            }
        }
    }
}
