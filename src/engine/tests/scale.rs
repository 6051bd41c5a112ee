//! Several replicas of the engine behind a router, simulated: each replica has the real scheduler and a
//! clock of its own. Requests arrive at random; the router sends each to one replica, which it keeps.
//!
//! The times are those of a stated device ([`flops`]), not of this machine.

use std::collections::VecDeque;
use std::fmt::Write as _;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use kiln_models::flops::{CostModel, FlopCount};
use kiln_models::job::{Job, RgbImage};
use kiln_models::pipeline::{ImageSizes, ModelInfo};
use kiln_models::testing::{self, FakePipeline};

use super::bench::{Bench, SimulatedClock, guided, packing, received};
use crate::engine::{Event, JobHandle, SubmitOptions};

/// A kind of request: image tokens of a side, steps, and its share of all requests. They are those of
/// vLLM-Omni's benchmark "Dataset C", with guidance: 512², 768², 1024² and 1536² pixels.
const MIX: [(usize, usize, f64); 4] = [
    (32, 20, 0.15),
    (48, 20, 0.25),
    (64, 25, 0.45),
    (96, 35, 0.15),
];

/// Microseconds of a guided step, of two prompts and of the decoding of 1024² pixels, as measured on an
/// H200 (`benches/results/2026-11-27-h200.md`). Other sizes take as long as their multiply-adds.
const STEP: f64 = 286_500.0;
const ENCODE: f64 = 98_100.0;
const DECODE: f64 = 48_700.0;

/// Image tokens of 1024² pixels.
const TOKENS: f64 = 4096.0;

/// A request is in time if it takes at most this many times as long as it takes alone.
const IN_TIME: f64 = 3.0;

/// The work of a job in microseconds of the device.
fn flops(job: &Job) -> FlopCount {
    // Attention takes as many multiply-adds as all else at 18,432 tokens.
    let forward = |tokens: f64| tokens * (1.0 + tokens / 18_432.0);
    let tokens = job.size.pixels() as f64;
    let step = STEP * forward(tokens) / forward(TOKENS);
    FlopCount {
        encode: ENCODE as u64,
        modulation: 0,
        step: step as u64,
        denoise: (step * job.sampling.steps as f64) as u64,
        decode: (DECODE * tokens / TOKENS) as u64,
    }
}

/// Seconds that the device works for a request of this kind.
fn seconds(job: &Job) -> f64 {
    let count = flops(job);
    (count.encode + count.denoise + count.decode) as f64 / 1e6
}

/// Seconds that the device works for a request on average.
fn mean_seconds() -> f64 {
    let of = |(side, steps, share)| seconds(&guided(0, side, steps)) * share;
    MIX.map(of).iter().sum()
}

/// How a router chooses a replica.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Router {
    /// The fewest requests, in turn among equals: `leastconn`, `active-request-scorer`.
    LeastRequests,
    /// The same, and requests wait in the router while every replica has this many.
    AtMost(usize),
    /// The one with fewer requests of two at random.
    TwoChoices,
    RoundRobin,
    /// The one whose forecast ends first.
    Forecast,
}

impl Router {
    const ALL: [Self; 6] = [
        Self::LeastRequests,
        Self::AtMost(4),
        Self::AtMost(1),
        Self::TwoChoices,
        Self::RoundRobin,
        Self::Forecast,
    ];

    fn name(self) -> String {
        match self {
            Self::LeastRequests => "least requests".to_owned(),
            Self::AtMost(most) => format!("least requests of at most {most}"),
            Self::TwoChoices => "two choices".to_owned(),
            Self::RoundRobin => "round robin".to_owned(),
            Self::Forecast => "forecast".to_owned(),
        }
    }
}

/// `SplitMix64`: the same numbers on every machine.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// From 0, which is included, to 1, which is not.
    fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1_u64 << 53) as f64
    }

    /// The time between two of events that happen at random, at this mean.
    fn wait(&mut self, mean: f64) -> f64 {
        -mean * (1.0 - self.unit()).ln()
    }
}

/// A request on its way.
struct Request {
    arrival: Duration,
    job: Job,
}

/// A request that a replica has.
struct Running {
    arrival: Duration,
    alone: f64,
    handle: JobHandle,
}

/// A request that has ended, in seconds.
#[derive(Debug, Clone, Copy)]
struct Ended {
    at: Duration,
    latency: f64,
    alone: f64,
}

struct Replica {
    bench: Bench,
    running: Vec<Running>,
    ended: Vec<Ended>,
    /// Time in which the device worked.
    busy: Duration,
}

impl Replica {
    fn new() -> Self {
        let clock = Arc::new(SimulatedClock::new());
        let of_pipeline = Arc::clone(&clock);
        let info = ModelInfo {
            sizes: ImageSizes {
                multiple: 1,
                max_side: 1024,
                default_side: 64,
            },
            ..testing::model_info()
        };
        let on_call = move |call: testing::Call<'_>| {
            let micros = match call {
                // A job's prompts are two.
                testing::Call::Encode(prompts) => prompts.len() as u64 * ENCODE as u64 / 2,
                testing::Call::Steps(jobs) => jobs.iter().map(|job| flops(job).step).sum(),
                testing::Call::Finish(job) => flops(job).decode,
                _ => 0,
            };
            of_pipeline.advance(Duration::from_micros(micros));
            Ok(())
        };
        let pixel = |_: &Job, _: usize| RgbImage {
            height: 1,
            width: 1,
            pixels: vec![0; 3],
        };
        let pipeline = FakePipeline::new(info)
            .with_cost_model(CostModel::new(flops))
            .images(pixel)
            .on_call(on_call);
        // As `kiln serve` without a warm-up, but for the bound of the queue.
        let settings = packing(1_000_000, crate::engine::DEFAULT_MAX_STARTED, 4096);
        Self {
            bench: Bench::with_pipeline(settings, pipeline, clock, Arc::new(Mutex::default())),
            running: Vec::new(),
            ended: Vec::new(),
            busy: Duration::ZERO,
        }
    }

    fn now(&self) -> Duration {
        self.bench.clock.elapsed()
    }

    /// Works until this time, or until the end of the call that runs then. Stops after a call in which
    /// a request ended, and then returns true.
    fn work_until(&mut self, time: Duration) -> bool {
        while self.now() < time {
            if self.running.is_empty() {
                self.bench.clock.advance(time.saturating_sub(self.now()));
                return false;
            }
            let began = self.now();
            assert!(
                self.bench.turn(),
                "a replica with requests has something to do"
            );
            let now = self.now();
            self.busy += now.saturating_sub(began);
            let before = self.running.len();
            let ended = &mut self.ended;
            self.running.retain_mut(|running| {
                let mut events = received(&mut running.handle).into_iter();
                let has_ended = events.any(|event| match event {
                    Event::Failed(error) => panic!("{error}"),
                    event => matches!(event, Event::Finished(_)),
                });
                if has_ended {
                    ended.push(Ended {
                        at: now,
                        latency: now.saturating_sub(running.arrival).as_secs_f64(),
                        alone: running.alone,
                    });
                }
                !has_ended
            });
            if self.running.len() < before {
                return true;
            }
        }
        false
    }

    /// Requests that the replica has at this time, which is not later than its clock.
    fn load(&self, time: Duration) -> usize {
        let since = self.ended.iter().rev().take_while(|ended| ended.at > time);
        self.running.len() + since.count()
    }

    fn submit(&mut self, request: Request) {
        let alone = seconds(&request.job);
        let handle = self.bench.submit(request.job);
        self.running.push(Running {
            arrival: request.arrival,
            alone,
            handle,
        });
    }

    /// When the request would end here.
    fn forecast(&self, job: &Job) -> Duration {
        let forecast = self.bench.shared.forecast(job, &SubmitOptions::default());
        // Before the speed has been measured.
        let unknown = || Duration::from_secs_f64(mean_seconds() * self.running.len() as f64);
        let wait = forecast.estimated_wait.unwrap_or_else(unknown);
        let work = Duration::from_secs_f64(seconds(job));
        self.now() + wait + forecast.estimated_work.unwrap_or(work)
    }
}

/// A number of replicas behind a router.
struct Cluster {
    replicas: Vec<Replica>,
    router: Router,
    random: Random,
    next: usize,
    /// Requests that wait in the router.
    waiting: VecDeque<Request>,
}

impl Cluster {
    fn new(replicas: usize, router: Router, seed: u64) -> Self {
        Self {
            replicas: (0..replicas).map(|_| Replica::new()).collect(),
            router,
            random: Random(seed ^ 0x5eed),
            next: 0,
            waiting: VecDeque::new(),
        }
    }

    /// Lets all replicas work until this time.
    fn work_until(&mut self, time: Duration) {
        // The one that is the farthest behind goes on first, so that ends are seen in their order.
        while let Some(index) = (0..self.replicas.len())
            .filter(|&index| self.replicas[index].now() < time)
            .min_by_key(|&index| self.replicas[index].now())
        {
            let horizon = match self.router {
                Router::AtMost(_) => {
                    let others = self.replicas.iter().map(Replica::now);
                    let behind = self.replicas[index].now();
                    let next = others.filter(|&now| now > behind).min();
                    next.unwrap_or(time).min(time)
                }
                _ => time,
            };
            if self.replicas[index].work_until(horizon)
                && matches!(self.router, Router::AtMost(_))
                && let Some(request) = self.waiting.pop_front()
            {
                self.replicas[index].submit(request);
            }
        }
    }

    fn arrive(&mut self, request: Request) {
        let time = request.arrival;
        self.work_until(time);
        let count = self.replicas.len();
        let loads: Vec<usize> = self.replicas.iter().map(|it| it.load(time)).collect();
        let turn = self.next;
        let in_turn = move |index: usize| (index + count - turn % count) % count;
        let least = (0..count).min_by_key(|&index| (loads[index], in_turn(index)));
        let least = least.expect("there is a replica");
        let chosen = match self.router {
            Router::AtMost(most) if loads[least] >= most => return self.waiting.push_back(request),
            Router::LeastRequests | Router::AtMost(_) => least,
            Router::RoundRobin => turn % count,
            Router::TwoChoices => {
                let mut pick = || (self.random.next() % count as u64) as usize;
                let (first, second) = (pick(), pick());
                if loads[second] < loads[first] {
                    second
                } else {
                    first
                }
            }
            Router::Forecast => {
                let of = |index: &usize| {
                    (
                        self.replicas[*index].forecast(&request.job),
                        in_turn(*index),
                    )
                };
                (0..count).min_by_key(of).expect("there is a replica")
            }
        };
        self.next = chosen + 1;
        self.replicas[chosen].submit(request);
    }
}

/// What was measured of a run, after its first fifth.
#[derive(Debug, Clone, Copy)]
struct Measured {
    /// Requests that arrived per second and replica.
    offered: f64,
    /// Requests that ended per second and replica.
    throughput: f64,
    /// The part of the time in which devices worked.
    utilisation: f64,
    p50: f64,
    p95: f64,
    /// The part of the requests that took at most [`IN_TIME`] times as long as alone.
    in_time: f64,
}

/// Runs `requests` at this part of the replicas' capacity.
fn simulate(replicas: usize, router: Router, load: f64, requests: usize, seed: u64) -> Measured {
    let kinds = MIX.map(|(side, steps, _)| guided(0, side, steps));
    let between = mean_seconds() / load / replicas as f64;
    // Streams of their own, so that the requests are the same whoever routes them.
    let (mut times, mut choices) = (Random(seed), Random(!seed));
    let mut cluster = Cluster::new(replicas, router, seed);
    let (mut time, mut begin) = (0.0, Duration::ZERO);
    let mut busy_before = Duration::ZERO;
    let busy = |cluster: &Cluster| cluster.replicas.iter().map(|it| it.busy).sum::<Duration>();
    for number in 0..requests {
        time += times.wait(between);
        let arrival = Duration::from_secs_f64(time);
        let mut choice = choices.unit();
        let kind = MIX.iter().position(|(.., share)| {
            choice -= share;
            choice < 0.0
        });
        let mut job = kinds[kind.unwrap_or(0)].clone();
        job.noise.seed = number as u64;
        cluster.arrive(Request { arrival, job });
        if number == requests / 5 {
            begin = arrival;
            busy_before = busy(&cluster);
        }
    }
    let end = Duration::from_secs_f64(time);
    let worked = busy(&cluster).saturating_sub(busy_before).as_secs_f64();
    let span = end.saturating_sub(begin).as_secs_f64() * replicas as f64;
    // What still runs counts for the latencies, not for the throughput.
    let mut until = end;
    while cluster.replicas.iter().any(|it| !it.running.is_empty()) || !cluster.waiting.is_empty() {
        until += Duration::from_secs(10);
        cluster.work_until(until);
    }
    let all = cluster.replicas.iter().flat_map(|replica| &replica.ended);
    let counted: Vec<Ended> = all.filter(|ended| ended.at > begin).copied().collect();
    let within = counted.iter().filter(|ended| ended.at <= end).count();
    let mut latencies: Vec<f64> = counted.iter().map(|ended| ended.latency).collect();
    latencies.sort_by(f64::total_cmp);
    let at = |part: f64| latencies[(part * (latencies.len() - 1) as f64).round() as usize];
    let in_time = |ended: &&Ended| ended.latency <= IN_TIME * ended.alone;
    Measured {
        offered: (requests - requests / 5 - 1) as f64 / span,
        throughput: within as f64 / span,
        utilisation: worked / span,
        p50: at(0.5),
        p95: at(0.95),
        in_time: counted.iter().filter(in_time).count() as f64 / counted.len() as f64,
    }
}

/// The mean of runs with different seeds.
fn mean_of(runs: &[Measured]) -> Measured {
    let mean =
        |value: fn(&Measured) -> f64| runs.iter().map(value).sum::<f64>() / runs.len() as f64;
    Measured {
        offered: mean(|it| it.offered),
        throughput: mean(|it| it.throughput),
        utilisation: mean(|it| it.utilisation),
        p50: mean(|it| it.p50),
        p95: mean(|it| it.p95),
        in_time: mean(|it| it.in_time),
    }
}

impl Measured {
    /// The part of the offered requests that ended.
    fn done(&self) -> f64 {
        self.throughput / self.offered
    }

    /// The part of the offered requests that ended in time.
    fn good(&self) -> f64 {
        self.done() * self.in_time
    }
}

#[test]
fn the_simulated_device_is_as_loaded_as_was_asked() {
    for load in [0.5, 0.8] {
        let measured = simulate(4, Router::LeastRequests, load, 400, 7);
        assert!(
            (measured.utilisation - load).abs() < 0.1,
            "{load}: {measured:?}"
        );
    }
}

/// The rule of the scale: at 80 % load, eight replicas do at least 95 % of eight times what one does.
#[test]
fn eight_replicas_do_the_work_of_eight() {
    let run = |replicas: usize, seeds: std::ops::Range<u64>, requests| {
        let runs = seeds.map(|seed| simulate(replicas, Router::LeastRequests, 0.8, requests, seed));
        mean_of(&runs.collect::<Vec<_>>())
    };
    let (one, eight) = (run(1, 0..4, 200), run(8, 0..1, 800));
    let efficiency = eight.done() / one.done();
    assert!(efficiency >= 0.95, "{efficiency}: {one:?} {eight:?}");
    // What a user sees: as many requests in time, and shorter waits than those of a single queue.
    assert!(eight.good() / one.good() >= 0.95, "{one:?} {eight:?}");
    assert!(eight.p95 <= one.p95, "{one:?} {eight:?}");
}

#[test]
fn an_unbalanced_router_is_seen() {
    let in_turn = simulate(8, Router::RoundRobin, 0.8, 800, 3);
    let least = simulate(8, Router::LeastRequests, 0.8, 800, 3);
    assert!(in_turn.p95 > 1.1 * least.p95, "{in_turn:?} {least:?}");
}

/// A row of the table: a router, a number of replicas and a load.
type Row = (Router, usize, f64);

/// Writes the table of `benches/results` as CSV to the file that `KILN_SCALE_CSV` names.
/// `KILN_SCALE_REQUESTS` is the number of requests for each replica.
#[test]
#[ignore = "runs for many minutes; scripts/scale.sh runs it"]
fn all_routers_numbers_and_loads() {
    let path = std::env::var("KILN_SCALE_CSV").expect("KILN_SCALE_CSV names a file");
    let requests = std::env::var("KILN_SCALE_REQUESTS").unwrap_or_else(|_| "500".to_owned());
    let requests: usize = requests.parse().expect("KILN_SCALE_REQUESTS is a number");
    let at_64 = [
        Router::LeastRequests,
        Router::TwoChoices,
        Router::RoundRobin,
    ];
    let mut rows: Vec<Row> = Vec::new();
    // The long ones first, so that all threads end together.
    for load in [0.95, 0.8, 0.5] {
        rows.extend(at_64.map(|router| (router, 64, load)));
    }
    for load in [0.95, 0.8, 0.5] {
        rows.extend(Router::ALL.map(|router| (router, 8, load)));
        rows.push((Router::LeastRequests, 1, load));
    }
    let (next, done) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    let threads = std::thread::available_parallelism()
        .map_or(1, usize::from)
        .max(4);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while let Some(&(router, replicas, load)) =
                    rows.get(next.fetch_add(1, Ordering::Relaxed))
                {
                    // One replica is run as often as eight have, for as many requests.
                    let seeds = if replicas == 1 { 0..8 } else { 1..2 };
                    let run = |seed| simulate(replicas, router, load, replicas * requests, seed);
                    let measured = mean_of(&seeds.map(run).collect::<Vec<_>>());
                    let mut done = done.lock().expect("no thread has panicked");
                    done.push(((router, replicas, load), measured));
                    std::fs::write(&path, table(&done)).expect("the file is written");
                }
            });
        }
    });
}

/// The rows that have been measured, as CSV.
fn table(done: &[(Row, Measured)]) -> String {
    let mut table = "router,replicas,load,offered,throughput,utilisation,p50_s,p95_s,in_time,\
                     efficiency,good_efficiency\n"
        .to_owned();
    let mut sorted = done.to_vec();
    let order = |(router, replicas, load): &Row| {
        let place = Router::ALL.iter().position(|other| other == router);
        ((load * 100.0) as u64, *replicas, place)
    };
    sorted.sort_by_key(|(row, _)| order(row));
    for ((router, replicas, load), measured) in &sorted {
        let one = sorted
            .iter()
            .find(|((_, replicas, other), _)| *replicas == 1 && other == load);
        let ratio = |of: fn(&Measured) -> f64| {
            one.map_or(String::new(), |(_, one)| {
                format!("{:.4}", of(measured) / of(one))
            })
        };
        writeln!(
            table,
            "{},{replicas},{load},{:.5},{:.5},{:.4},{:.2},{:.2},{:.4},{},{}",
            router.name(),
            measured.offered,
            measured.throughput,
            measured.utilisation,
            measured.p50,
            measured.p95,
            measured.in_time,
            ratio(Measured::done),
            ratio(Measured::good),
        )
        .expect("text is written to memory");
    }
    table
}
