//! The scheduler alone, on a virtual clock: plans are carried out by adding up their costs.

use std::collections::HashMap;
use std::num::NonZeroUsize;
use std::time::{Duration, Instant};

use kiln_models::flops::{CostModel, FlopCount};
use kiln_models::job::{Decoding, Job, JobId, Output, RgbImage, Size};
use kiln_models::memory::{MemoryModel, MemoryPlan};
use kiln_models::pipeline::{MemoryRoom, Pipeline, PipelineError, StepOutcome};
use kiln_models::step_cache::StepCounts;
use kiln_models::testing::{self, FakePipeline, model_info};

use super::bench::{UPLOAD, cost, flops, job, ms, packing, settings, step_cost, whole_cost};
use crate::engine::cost::{Stage, shares};
use crate::engine::plan::{Booked, Holdings, Outcome, Plan};
use crate::engine::scheduler::{Events, Facts, Scheduler};
use crate::engine::{
    EngineSettings, Event, Forecast, JobError, State, SubmitError, SubmitOptions, Timings,
};

/// Device time of a preview.
const PREVIEW: Duration = ms(5);

/// The outcome of a full step.
fn stepped(id: JobId, job: &Job, steps_left: usize) -> StepOutcome {
    StepOutcome {
        id,
        steps_left,
        counts: StepCounts {
            computed: job.sampling.steps - steps_left,
            ..StepCounts::default()
        },
        work: 1.0,
    }
}

struct Driver {
    scheduler: Scheduler,
    start: Instant,
    now: Instant,
    /// The jobs that a pipeline would have, and the steps that are left of them.
    started: HashMap<JobId, (Job, usize)>,
    /// All events so far.
    events: Events,
    /// What a measurement of the memory finds.
    room: Option<MemoryRoom>,
    /// What every step costs besides its work.
    fixed: Duration,
    /// Which part of a full step's work the step of this number runs.
    part: fn(usize) -> f64,
}

impl Driver {
    fn new(settings: EngineSettings) -> Self {
        let start = Instant::now();
        let pipeline = FakePipeline::new(model_info());
        Self::with_pipeline(settings, &pipeline, start)
    }

    fn with_pipeline(settings: EngineSettings, pipeline: &FakePipeline, start: Instant) -> Self {
        let facts = Facts {
            cost_model: CostModel::new(flops),
            token_side: 1,
            ..Facts::of(pipeline, &settings)
        };
        Self {
            scheduler: Scheduler::new(settings, facts, Holdings::default(), start),
            start,
            now: start,
            started: HashMap::new(),
            events: Events::new(),
            room: pipeline.memory_room(),
            fixed: Duration::ZERO,
            part: |_| 1.0,
        }
    }

    fn submit(&mut self, job: Job) -> JobId {
        self.submit_with(job, &SubmitOptions::default())
    }

    fn submit_with(&mut self, job: Job, options: &SubmitOptions) -> JobId {
        let (id, events) = self.scheduler.submit(job, options, self.now).unwrap();
        self.events.extend(events);
        id
    }

    fn forecast(&self, job: &Job) -> Forecast {
        let options = SubmitOptions::default();
        self.scheduler.forecast(job, &options, self.now)
    }

    fn forget(&mut self, id: JobId) {
        self.events.extend(self.scheduler.forget(id, self.now));
    }

    fn drain(&mut self, timeout: Duration) {
        self.scheduler.drain(Some(self.now + timeout));
    }

    fn stop(&mut self) {
        self.events.extend(self.scheduler.stop(self.now));
    }

    fn plan(&mut self) -> Plan {
        let (plan, events) = self.scheduler.plan(self.now);
        self.events.extend(events);
        plan
    }

    fn book(&mut self, outcome: Outcome, took: Duration) {
        self.book_with(outcome, took, None);
    }

    fn book_with(&mut self, outcome: Outcome, took: Duration, lost: Option<JobError>) {
        self.now += took;
        let booked = Booked {
            outcome,
            took,
            lost,
            holdings: Holdings::default(),
        };
        self.events.extend(self.scheduler.book(booked, self.now));
    }

    /// Carries out a plan that succeeds, at the cost of its jobs. Returns what the plan was.
    fn execute(&mut self, plan: Plan) -> String {
        match plan {
            Plan::Start(id, job) => {
                let took = cost(&job, Stage::Encode);
                let steps = job.sampling.steps;
                self.started.insert(id, (job, steps));
                self.book(Outcome::Started(id, Ok(())), took);
                format!("start {id}")
            }
            Plan::LoadAdapters(id, _) => {
                self.book(Outcome::LoadedAdapters(id, Ok(())), UPLOAD);
                format!("load {id}")
            }
            Plan::Encode(ids, prompts) => {
                let tokens: usize = prompts.iter().map(|it| it.tokens.len()).sum();
                self.book(Outcome::Encoded(ids.clone(), Ok(())), ms(tokens as u64));
                format!("encode {ids:?}")
            }
            Plan::Time(job, copies) => {
                let took = step_cost(&vec![&job; copies], 1) + self.fixed;
                self.book(Outcome::Timed(copies, Some(took)), took * 2);
                format!("time {copies}")
            }
            Plan::Step(ids) => {
                let mut steps = Vec::new();
                let mut took = self.fixed;
                for &id in &ids {
                    let (job, steps_left) = self.started.get_mut(&id).unwrap();
                    let part = (self.part)(job.sampling.steps - *steps_left);
                    *steps_left -= 1;
                    took += cost(job, Stage::Step).mul_f64(part);
                    let outcome = stepped(id, job, *steps_left);
                    steps.push((
                        id,
                        Ok(StepOutcome {
                            work: part,
                            ..outcome
                        }),
                    ));
                }
                self.book(Outcome::Stepped(steps), took);
                format!("step {ids:?}")
            }
            Plan::Preview(id) => {
                self.book(Outcome::Previewed(id, Some(image())), PREVIEW);
                format!("preview {id}")
            }
            Plan::Finish(id) => {
                let (job, steps_left) = self.started.remove(&id).unwrap();
                assert_eq!(steps_left, 0);
                let output = Output {
                    not_finite: None,
                    images: vec![image()],
                    tiled: None,
                    steps: StepCounts::default(),
                    trace: Vec::new(),
                };
                let took = cost(&job, Stage::Decode);
                self.book(Outcome::Finished(id, Ok(output)), took);
                format!("finish {id}")
            }
            Plan::Measure { drop_caches } => {
                let outcome = Outcome::Measured {
                    room: self.room,
                    dropped_caches: drop_caches,
                };
                self.book(outcome, Duration::ZERO);
                format!("measure {drop_caches}")
            }
            Plan::Decode(id, decoding) => {
                self.started.get_mut(&id).unwrap().0.decoding = decoding;
                self.book(Outcome::DecodingChanged, Duration::ZERO);
                format!("decode {id} {decoding:?}")
            }
            Plan::Discard(id) => {
                self.started.remove(&id).unwrap();
                self.book(Outcome::Discarded, Duration::ZERO);
                format!("discard {id}")
            }
            Plan::Sleep => "sleep".to_owned(),
            Plan::End => "end".to_owned(),
        }
    }

    /// Plans once and carries the plan out.
    fn cycle(&mut self) -> String {
        let plan = self.plan();
        self.execute(plan)
    }

    /// Cycles until there is nothing to do. Returns the plans.
    fn run(&mut self) -> Vec<String> {
        let mut plans = Vec::new();
        while plans
            .last()
            .is_none_or(|plan| plan != "sleep" && plan != "end")
        {
            plans.push(self.cycle());
        }
        plans
    }

    /// The events of a job.
    fn of(&self, id: JobId) -> impl Iterator<Item = &Event> {
        let events = self.events.iter();
        events.filter_map(move |(owner, event)| (*owner == id).then_some(event))
    }

    /// How a job ended, or `None` if no event says so.
    fn end(&self, id: JobId) -> Option<Result<Timings, &JobError>> {
        match self.of(id).last()? {
            Event::Finished(finished) => Some(Ok(finished.timings)),
            Event::Failed(error) => Some(Err(error)),
            _ => None,
        }
    }

    fn steps(&self, id: JobId) -> Vec<(usize, Option<Duration>)> {
        let step = |event: &Event| match event {
            Event::Step {
                done,
                estimated_rest,
                ..
            } => Some((*done, *estimated_rest)),
            _ => None,
        };
        self.of(id).filter_map(step).collect()
    }
}

fn image() -> RgbImage {
    RgbImage {
        height: 1,
        width: 1,
        pixels: vec![0; 3],
    }
}

fn device_error() -> JobError {
    PipelineError::Device("gone".into()).into()
}

fn assert_close(actual: Duration, expected: Duration) {
    assert!(
        actual.abs_diff(expected) < ms(1),
        "{actual:?} for {expected:?}"
    );
}

#[test]
fn an_idle_scheduler_sleeps() {
    let mut driver = Driver::new(settings(8, 8));
    assert_eq!(driver.run(), ["sleep"]);
}

#[test]
fn equal_jobs_are_finished_in_order_and_a_small_job_overtakes() {
    let mut driver = Driver::new(settings(8, 8));
    driver.submit(job(0, 8, 2));
    driver.submit(job(0, 8, 2));
    assert_eq!(driver.cycle(), "start 0");
    assert_eq!(driver.cycle(), "step [0]");
    driver.submit(job(0, 2, 1));
    let plans = [
        "start 2", "step [2]", "finish 2", "step [0]", "finish 0", "start 1", "step [1]",
        "step [1]", "finish 1", "sleep",
    ];
    assert_eq!(driver.run(), plans);
    assert!(matches!(
        driver.of(2).collect::<Vec<_>>().as_slice(),
        [
            Event::Queued { position: 0, .. },
            Event::Started,
            Event::Step {
                done: 1,
                total: 1,
                ..
            },
            Event::Finished(_),
        ]
    ));
    let timings = driver.end(0).unwrap().unwrap();
    assert_close(timings.paused, whole_cost(&job(0, 2, 1)));
}

#[test]
fn the_oldest_job_has_a_quarter_of_the_device() {
    let mut driver = Driver::new(settings(1000, 8));
    let large = job(0, 16, 20);
    let small = job(0, 8, 2);
    driver.submit(large.clone());
    driver.cycle();
    let from = driver.now;
    while driver.end(0).is_none() {
        // One small job is always waiting.
        if driver.scheduler.stats().waiting == 0 {
            driver.submit(small.clone());
        }
        driver.cycle();
    }
    let (alone, turn) = (whole_cost(&large), cost(&small, Stage::Step));
    let took = driver.now - from;
    assert!(took > alone * 3, "{took:?}");
    // The decoding waits as long as a step does, and every wait can be one turn too long.
    let bound = alone * 4 + cost(&large, Stage::Step) * 3 + turn * 21;
    assert!(took <= bound, "{took:?} > {bound:?}");
}

#[test]
fn a_deadline_ends_a_waiting_job_without_a_discard_and_a_started_one_with_it() {
    let mut driver = Driver::new(settings(8, 8));
    let step = cost(&job(0, 8, 9), Stage::Step);
    let options = SubmitOptions {
        deadline: Some(driver.start + step * 3 / 2),
        ..SubmitOptions::default()
    };
    for _ in 0..2 {
        driver.submit_with(job(0, 8, 9), &options);
    }
    let plans = ["start 0", "step [0]", "step [0]", "discard 0", "sleep"];
    assert_eq!(driver.run(), plans);
    for id in [0, 1] {
        assert!(matches!(
            driver.end(id),
            Some(Err(JobError::DeadlinePassed))
        ));
    }
    assert_eq!(driver.scheduler.stats().outcomes.deadline_passed, 2);
}

#[test]
fn a_forgotten_job_is_discarded_and_has_no_last_event() {
    let mut driver = Driver::new(settings(8, 8));
    driver.submit(job(0, 8, 9));
    driver.submit(job(0, 8, 9));
    driver.cycle();
    driver.forget(0);
    driver.forget(1);
    driver.forget(1);
    assert_eq!(driver.run(), ["discard 0", "sleep"]);
    assert!(driver.end(0).is_none() && driver.end(1).is_none());
    assert_eq!(driver.scheduler.stats().outcomes.cancelled, 2);
}

#[test]
fn draining_finishes_the_jobs_that_the_time_allows() {
    let mut driver = Driver::new(settings(8, 8));
    let one = job(0, 8, 3);
    driver.submit(one.clone());
    driver.submit(one.clone());
    driver.drain(whole_cost(&one) * 3 / 2);
    let refused = driver
        .scheduler
        .submit(one, &SubmitOptions::default(), driver.now);
    assert!(matches!(refused, Err(SubmitError::Draining)));
    let plans = driver.run();
    assert_eq!(plans[plans.len() - 2..], ["discard 1", "end"]);
    assert!(matches!(driver.end(0), Some(Ok(_))));
    assert!(matches!(driver.end(1), Some(Err(JobError::Stopped))));
    assert!(matches!(driver.scheduler.state(), State::Stopped));
}

#[test]
fn the_warm_up_comes_first_and_sends_nothing() {
    let mut driver = Driver::new(EngineSettings {
        warm_up: Some(job(0, 8, 2)),
        ..settings(8, 8)
    });
    assert!(matches!(driver.scheduler.state(), State::Starting));
    // Much smaller than the warm-up.
    driver.submit(job(0, 1, 1));
    let plans = ["start 0", "step [0]", "step [0]", "finish 0"];
    for plan in plans {
        assert!(matches!(driver.scheduler.state(), State::Starting));
        assert_eq!(driver.cycle(), plan);
    }
    assert!(matches!(driver.scheduler.state(), State::Ready));
    driver.run();
    assert!(driver.end(0).is_none());
    assert!(matches!(driver.end(1), Some(Ok(_))));
    assert_eq!(driver.scheduler.stats().outcomes.finished, 1);
}

fn with_previews(every: usize) -> SubmitOptions {
    SubmitOptions {
        preview_every: NonZeroUsize::new(every),
        ..SubmitOptions::default()
    }
}

#[test]
fn a_preview_follows_its_step_before_anything_else() {
    let mut driver = Driver::new(settings(8, 8));
    driver.submit_with(job(0, 8, 3), &with_previews(2));
    driver.cycle();
    driver.cycle();
    let Plan::Step(ids) = driver.plan() else {
        panic!("not a step");
    };
    // A small job that is submitted during the step waits for the preview too.
    driver.submit(job(0, 1, 1));
    driver.execute(Plan::Step(ids));
    let plans = [
        "preview 0",
        "start 1",
        "step [1]",
        "finish 1",
        "step [0]",
        "finish 0",
        "sleep",
    ];
    assert_eq!(driver.run(), plans);
    let timings = driver.end(0).unwrap().unwrap();
    assert_eq!(timings.previews, PREVIEW);
    assert_close(timings.paused, whole_cost(&job(0, 1, 1)));
    assert_eq!(driver.scheduler.stats().preview_time.count(), 1);
}

#[test]
fn a_job_that_has_ended_gets_no_preview() {
    let mut driver = Driver::new(settings(8, 8));
    driver.submit_with(job(0, 8, 3), &with_previews(1));
    driver.cycle();
    driver.cycle();
    driver.stop();
    assert_eq!(driver.run(), ["discard 0", "end"]);
}

/// Two started jobs: the second, smaller one was started before the first made a step.
fn two_started(options: &SubmitOptions) -> (Driver, [Job; 2]) {
    let mut driver = Driver::new(settings(8, 8));
    let jobs = [job(0, 8, 10), job(0, 4, 5)];
    driver.submit_with(jobs[0].clone(), options);
    driver.cycle();
    driver.submit_with(jobs[1].clone(), options);
    assert_eq!(driver.cycle(), "start 1");
    (driver, jobs)
}

#[test]
fn a_step_of_several_jobs_is_booked_for_each_by_its_work() {
    let (mut driver, jobs) = two_started(&SubmitOptions::default());
    let [first, second] = [0, 1].map(|index: usize| cost(&jobs[index], Stage::Step));
    for _ in 0..5 {
        assert_eq!(driver.execute(Plan::Step(vec![0, 1])), "step [0, 1]");
    }
    let stats = driver.scheduler.stats();
    assert_eq!((stats.steps, stats.step_time.count()), (10, 10));
    let sum = Duration::from_secs_f64(stats.step_time.sum);
    assert_close(sum, (first + second) * 5);
    assert_eq!(driver.steps(0).len(), 5);
    driver.run();

    let timings = [0, 1].map(|id| driver.end(id).unwrap().unwrap());
    assert_close(timings[0].denoise, first * 10);
    assert_close(timings[1].denoise, second * 5);
    // The other job's part of a shared step is time in which a job was paused.
    assert_close(timings[1].paused, first * 5);
    assert_close(timings[0].total(), driver.now - driver.start);
    // Both parts have the same speed, so that the estimates are those of single steps.
    let forecast = driver.forecast(&jobs[0]);
    assert_close(forecast.estimated_work.unwrap(), whole_cost(&jobs[0]));
}

#[test]
fn previews_of_a_step_of_several_jobs_follow_one_after_the_other() {
    let (mut driver, _) = two_started(&with_previews(1));
    driver.execute(Plan::Step(vec![0, 1]));
    let plans = [(); 3].map(|()| driver.cycle());
    assert_eq!(plans, ["preview 0", "preview 1", "step [1]"]);
}

#[test]
fn a_job_that_fails_in_a_step_of_several_ends_alone() {
    let (mut driver, jobs) = two_started(&SubmitOptions::default());
    let took = cost(&jobs[0], Stage::Step) + cost(&jobs[1], Stage::Step);
    let steps = vec![
        (0, Ok(stepped(0, &jobs[0], 9)), cost(&jobs[0], Stage::Step)),
        (1, Err(device_error()), cost(&jobs[1], Stage::Step)),
    ];
    // The step of both failed first.
    driver.book(Outcome::SteppedAlone(steps), took * 2);
    driver.started.remove(&1);
    driver.started.get_mut(&0).unwrap().1 = 9;
    assert!(matches!(driver.end(1), Some(Err(JobError::Pipeline(_)))));
    // The speed is that of the step that succeeded; decoding is assumed to be as fast.
    let rest = cost(&jobs[0], Stage::Step) * 9 + cost(&jobs[0], Stage::Decode);
    let [(1, Some(estimated))] = driver.steps(0)[..] else {
        panic!("{:?}", driver.steps(0));
    };
    assert_close(estimated, rest);
    let stats = driver.scheduler.stats();
    assert_eq!((stats.steps, stats.outcomes.failed), (1, 1));
    driver.run();
    let timings = driver.end(0).unwrap().unwrap();
    assert_close(timings.denoise, cost(&jobs[0], Stage::Step) * 10);
}

#[test]
fn a_lost_device_ends_every_job() {
    let (mut driver, _) = two_started(&SubmitOptions::default());
    let waiting = driver.submit(job(0, 8, 9));
    let failed = vec![(1, Err(JobError::Panicked("bad".into())))];
    driver.book_with(Outcome::Stepped(failed), ms(1), Some(device_error()));
    driver.started.remove(&1);
    assert!(matches!(driver.scheduler.state(), State::Failed(_)));
    assert!(matches!(driver.end(1), Some(Err(JobError::Panicked(_)))));
    assert!(matches!(
        driver.end(waiting),
        Some(Err(JobError::Lost { .. }))
    ));
    assert_eq!(driver.run(), ["discard 0", "end"]);
    assert!(matches!(driver.end(0), Some(Err(JobError::Lost { .. }))));
}

#[test]
fn abandoning_ends_started_and_waiting_jobs() {
    let (mut driver, _) = two_started(&SubmitOptions::default());
    driver.submit(job(0, 8, 9));
    let events = driver.scheduler.abandon(driver.now);
    driver.events.extend(events);
    for id in 0..3 {
        assert!(matches!(driver.end(id), Some(Err(JobError::Stopped))));
    }
}

#[test]
fn every_step_estimates_the_rest() {
    let mut driver = Driver::new(settings(8, 8));
    let asked = job(0, 8, 3);
    driver.submit(asked.clone());
    driver.submit(asked.clone());
    driver.run();
    let (step, decode) = (cost(&asked, Stage::Step), cost(&asked, Stage::Decode));
    // The first job's steps are made before a decoding has been measured.
    for id in [0, 1] {
        let steps = driver.steps(id);
        assert_eq!(steps.len(), 3);
        for (done, rest) in steps {
            assert_close(rest.unwrap(), step * (3 - done as u32) + decode);
        }
    }
}

/// Every second step is reused, and costs a millisecond.
fn every_second(step: usize) -> f64 {
    if step.is_multiple_of(2) { 1.0 } else { 0.0 }
}

/// A scheduler whose jobs are expected to run this part of their steps.
fn with_cached_steps(expected: fn(u64) -> u64, part: fn(usize) -> f64, tokens: usize) -> Driver {
    let pipeline = FakePipeline::new(model_info());
    let mut driver = Driver::with_pipeline(packing(100, 8, tokens), &pipeline, Instant::now());
    driver.scheduler.set_cost_model(CostModel::new(move |job| {
        let count = flops(job);
        FlopCount {
            denoise: expected(count.denoise),
            ..count
        }
    }));
    driver.part = part;
    driver.fixed = ms(1);
    driver
}

#[test]
fn steps_that_a_cache_reuses_do_not_change_the_speed_and_count_in_the_estimates() {
    for tokens in [0, 1000] {
        let mut driver = with_cached_steps(|denoise| denoise / 2, every_second, tokens);
        let jobs = [job(0, 8, 20), job(0, 9, 30)];
        let ids = jobs.clone().map(|job| driver.submit(job));
        driver.run();
        let step = cost(&jobs[0], Stage::Step);
        // The millisecond of every step is a part of the speed here: 1 of 65.
        let close = |actual: Duration, expected: Duration| {
            let slack = expected / 25 + step * 3 / 5;
            assert!(
                actual.abs_diff(expected) < slack,
                "{actual:?} for {expected:?}"
            );
        };
        for (done, rest) in driver.steps(ids[0]) {
            close(rest.unwrap(), step * (20 - done as u32) / 2);
        }
        let forecast = driver.forecast(&jobs[0]);
        let whole = step * 10 + cost(&jobs[0], Stage::Decode);
        close(forecast.estimated_work.unwrap(), whole);
        for id in ids {
            assert!(matches!(driver.end(id), Some(Ok(_))));
        }
    }
}

#[test]
fn what_a_cache_leaves_out_unforeseen_is_learned_from_the_steps_before() {
    let mut driver = with_cached_steps(|denoise| denoise, every_second, 0);
    let asked = job(0, 8, 20);
    let id = driver.submit(asked.clone());
    driver.run();
    let step = cost(&asked, Stage::Step);
    for (done, rest) in driver.steps(id).into_iter().filter(|(done, _)| *done > 3) {
        let expected = step * (20 - done as u32) / 2;
        let slack = expected / 3 + ms(30);
        let rest = rest.unwrap();
        assert!(
            rest.abs_diff(expected) < slack,
            "{done}: {rest:?} for {expected:?}"
        );
    }
}

#[test]
fn a_fixed_part_of_every_step_is_measured_at_the_warm_up() {
    let pipeline = FakePipeline::new(model_info());
    let settings = EngineSettings {
        max_step_tokens: None,
        warm_up: Some(job(0, 8, 1)),
        ..settings(100, 8)
    };
    let mut driver = Driver::with_pipeline(settings, &pipeline, Instant::now());
    driver.fixed = ms(50);
    driver.run();
    assert!(matches!(driver.scheduler.state(), State::Ready));
    // Four copies have 0.88 of the possible throughput, two 0.8.
    assert_eq!(driver.scheduler.stats().max_step_tokens, 4 * 64);
    let asked = job(0, 4, 20);
    driver.submit(asked.clone());
    driver.run();
    let forecast = driver.forecast(&asked);
    let expected = whole_cost(&asked) + ms(50) * 20;
    let estimated = forecast.estimated_work.unwrap();
    assert!(
        estimated.abs_diff(expected) < ms(25),
        "{estimated:?} for {expected:?}"
    );
}

#[test]
fn no_rider_is_started_while_a_job_waits_for_memory() {
    let pipeline =
        FakePipeline::new(model_info()).with_memory(MemoryModel::new(memory_plan), || room(700));
    let mut driver = Driver::with_pipeline(packing(8, 8, 1000), &pipeline, Instant::now());
    // It takes 100 MiB, and 400 while it is decoded.
    let first = driver.submit(job(1, 10, 4));
    while driver.started.is_empty() {
        driver.cycle();
    }
    driver.room = Some(room(600));
    // 5 * 121 MiB do not fit now, 64 and 256 would.
    let waiting = driver.submit(job(2, 11, 4));
    let small = driver.submit(job(3, 8, 4));
    while driver.end(first).is_none() {
        driver.cycle();
        assert!(!driver.started.contains_key(&waiting));
        assert!(!driver.started.contains_key(&small));
    }
    driver.room = Some(room(700));
    driver.run();
    for id in [waiting, small] {
        assert!(matches!(driver.end(id), Some(Ok(_))), "{id}");
    }
}

#[test]
fn a_common_step_takes_the_memory_that_there_is() {
    // A step takes 3 MiB a pixel, so that two jobs of 64 pixels take 2 * 64 + 384.
    let plan = |job: &Job| MemoryPlan {
        held: job.size.pixels() as u64 * MIB,
        step: 3 * job.size.pixels() as u64 * MIB,
        ..MemoryPlan::default()
    };
    for (mebibytes, together) in [(511, false), (512, true)] {
        let pipeline = FakePipeline::new(model_info())
            .with_memory(MemoryModel::new(plan), move || room(mebibytes));
        let mut driver = Driver::with_pipeline(packing(8, 8, 1000), &pipeline, Instant::now());
        driver.submit(job(1, 8, 4));
        driver.submit(job(2, 8, 4));
        let mut plans = Vec::new();
        let mut planned = 0;
        for _ in 0..30 {
            plans.push(driver.cycle());
            planned = planned.max(driver.scheduler.stats().planned_memory);
        }
        let shared = plans.iter().any(|plan| plan == "step [0, 1]");
        assert_eq!(shared, together, "{plans:?}");
        assert!(planned <= mebibytes * MIB, "{planned}");
        assert_eq!(driver.scheduler.stats().outcomes.finished, 2);
    }
}

#[test]
fn shares_are_in_proportion_and_add_up() {
    let took = Duration::from_nanos(1_000_003);
    assert_eq!(shares(took, &[5.0]), [took]);
    assert_eq!(shares(took, &[0.0]), [took]);
    assert_eq!(shares(took * 2, &[0.0, 0.0]), [took; 2]);
    assert!(shares(took, &[]).is_empty());
    let parts = shares(took, &[1.0, 2.0, 7.0]);
    assert_eq!(parts.iter().sum::<Duration>(), took);
    for (part, expected) in parts.iter().zip([100_000, 200_000, 700_000]) {
        assert!(part.abs_diff(Duration::from_nanos(expected)) < Duration::from_nanos(10));
    }
}

const MIB: u64 = 1 << 20;

/// A pixel takes 1 MiB from start to end, and 4 more to be decoded; 1 in tiles.
fn memory_plan(job: &Job) -> MemoryPlan {
    let pixels = job.size.pixels() as u64 * MIB;
    let images = job.num_images as u64;
    MemoryPlan {
        held: pixels * images,
        decode: match job.decoding {
            Decoding::AsSet => 4 * pixels * images,
            Decoding::Sliced => 4 * pixels,
            Decoding::Tiled(_) => pixels,
        },
        ..MemoryPlan::default()
    }
}

/// A device with this memory besides the margin.
fn room(mebibytes: u64) -> MemoryRoom {
    let bytes = (mebibytes + 32) * MIB;
    MemoryRoom {
        free: bytes,
        total: bytes,
    }
}

fn with_memory(mebibytes: u64) -> Driver {
    let pipeline = FakePipeline::new(model_info())
        .with_memory(MemoryModel::new(memory_plan), move || room(mebibytes));
    Driver::with_pipeline(settings(8, 8), &pipeline, Instant::now())
}

/// The plans without the measurements.
fn calls(driver: &mut Driver) -> Vec<String> {
    let plans = driver.run();
    let is_call = |plan: &String| !plan.starts_with("measure");
    plans.into_iter().filter(is_call).collect()
}

#[test]
fn a_job_is_decoded_whole_if_that_fits_and_else_one_at_a_time_or_in_tiles() {
    let three = Job {
        num_images: 3,
        ..job(1, 16, 1)
    };
    let px = 16 * 16;
    for (mebibytes, decoding) in [
        (15 * px, Decoding::AsSet),
        (15 * px - 1, Decoding::Sliced),
        (7 * px, Decoding::Sliced),
        (7 * px - 1, Decoding::Tiled(2048)),
        (4 * px, Decoding::Tiled(2048)),
    ] {
        let mut driver = with_memory(mebibytes);
        let id = driver.submit(three.clone());
        while driver.started.is_empty() {
            driver.cycle();
        }
        assert_eq!(driver.started[&id].0.decoding, decoding, "{mebibytes} MiB");
        driver.run();
        assert!(matches!(driver.end(id), Some(Ok(_))));
    }
}

#[test]
fn a_job_that_can_never_fit_is_refused_with_the_largest_size_that_does() {
    let mut driver = with_memory(2 * 64 * 32);
    let wide = Job {
        size: Size {
            width: 128,
            height: 64,
        },
        ..job(1, 64, 1)
    };
    let options = SubmitOptions::default();
    let error = driver.scheduler.submit(wide, &options, driver.now);
    let Err(SubmitError::TooLarge(error)) = error else {
        panic!("{error:?}");
    };
    // In tiles a pixel takes 2 MiB.
    let largest = Size {
        width: 64,
        height: 32,
    };
    assert_eq!(error.largest, Some(largest));
    assert_eq!(
        error.to_string(),
        "128x64 needs 16384 MiB of memory, and there are 4096 MiB: the largest size of this shape \
         that fits is 64x32"
    );
    assert_eq!(driver.scheduler.stats().outcomes.rejected, 1);
    let fitting = driver.submit(Job {
        size: largest,
        ..job(1, 64, 1)
    });
    driver.run();
    assert!(matches!(driver.end(fitting), Some(Ok(_))));
}

#[test]
fn a_job_that_does_not_fit_now_waits_and_is_not_starved_by_small_ones() {
    let mut driver = with_memory(700);
    let large = driver.submit(job(1, 10, 4));
    while driver.started.is_empty() {
        driver.cycle();
    }
    // What is free shrinks by what the started job holds.
    driver.room = Some(room(600));
    // It takes 5 * 121 MiB, so it does not fit beside the first job.
    let waiting = driver.submit(job(2, 11, 4));
    let small = driver.submit(job(3, 4, 1));
    let mut plans = Vec::new();
    while driver.end(large).is_none() {
        plans.push(driver.cycle());
        assert!(!driver.started.contains_key(&waiting));
    }
    assert!(plans.contains(&format!("finish {small}")), "{plans:?}");
    driver.room = Some(room(700));
    let more = driver.submit(job(4, 4, 1));
    driver.run();
    for id in [waiting, more] {
        assert!(matches!(driver.end(id), Some(Ok(_))), "{id}");
    }
}

#[test]
fn memory_that_other_programs_hold_makes_tiles_or_ends_one_job() {
    let mut driver = with_memory(1000);
    let id = driver.submit(job(1, 10, 1));
    driver.room = Some(room(499));
    let plans = driver.run();
    let expected = [
        "measure false",
        "measure true",
        "start 0",
        "step [0]",
        "measure false",
        "finish 0",
        "sleep",
    ];
    assert_eq!(plans, expected);
    assert!(matches!(driver.end(id), Some(Ok(_))));

    driver.room = Some(room(199));
    let id = driver.submit(job(2, 10, 1));
    assert_eq!(calls(&mut driver), ["sleep"]);
    let Some(Err(error)) = driver.end(id) else {
        panic!("the job was not ended");
    };
    assert_eq!(
        error.to_string(),
        "the image needs 200 MiB of memory, and 199 MiB are free: other programs hold the rest"
    );
    driver.room = Some(room(1000));
    let id = driver.submit(job(3, 10, 1));
    driver.run();
    assert!(matches!(driver.end(id), Some(Ok(_))));
}

#[test]
fn memory_that_is_gone_before_the_images_are_decoded_makes_tiles() {
    let mut driver = with_memory(1000);
    let id = driver.submit(job(1, 10, 1));
    while !driver.cycle().starts_with("step") {}
    driver.room = Some(room(100));
    let expected = [
        "measure false",
        "measure true",
        "decode 0 Tiled(2048)",
        "measure false",
        "finish 0",
        "sleep",
    ];
    assert_eq!(driver.run(), expected);
    assert!(matches!(driver.end(id), Some(Ok(_))));

    let id = driver.submit(job(2, 5, 1));
    while !driver.cycle().starts_with("step") {}
    driver.room = Some(room(10));
    assert_eq!(calls(&mut driver), ["discard 1", "sleep"]);
    let error = driver.end(id).unwrap().unwrap_err();
    assert!(matches!(error, JobError::NoMemory { .. }), "{error}");
}

#[test]
fn all_started_jobs_share_the_limit_that_the_user_sets() {
    let pipeline = FakePipeline::new(model_info())
        .with_memory(MemoryModel::new(memory_plan), || room(1_000_000));
    let limited = EngineSettings {
        max_memory: Some(520 * MIB),
        ..settings(8, 8)
    };
    let mut driver = Driver::with_pipeline(limited, &pipeline, Instant::now());
    driver.submit(job(1, 10, 4));
    while driver.started.is_empty() {
        driver.cycle();
    }
    let stats = driver.scheduler.stats();
    assert_eq!(stats.planned_memory, 500 * MIB);
    assert_eq!(stats.free_memory, Some(room(1_000_000).free));
    // It takes 25 MiB and 400 for the decoding of either, beside the 100 of the first.
    let second = driver.submit(job(2, 5, 1));
    let plans = calls(&mut driver);
    let finished = plans.iter().position(|plan| plan == "finish 0").unwrap();
    let started = plans
        .iter()
        .position(|plan| *plan == format!("start {second}"));
    assert!(finished < started.unwrap(), "{plans:?}");
}

#[test]
fn a_job_that_must_wait_for_memory_is_told_so() {
    for (mebibytes, position) in [(700, 1), (800, 0)] {
        let mut driver = with_memory(mebibytes);
        driver.submit(job(1, 10, 4));
        while driver.started.is_empty() {
            driver.cycle();
        }
        // By its work it would overtake. Beside the first job it takes 705 MiB.
        let small = job(2, 11, 1);
        assert_eq!(driver.forecast(&small).position, position);
        let id = driver.submit(small);
        let first = driver.of(id).next();
        let told = matches!(first, Some(Event::Queued { position: it, .. }) if *it == position);
        assert!(told, "{first:?}");
    }
}

#[test]
fn a_warm_up_that_does_not_fit_is_made_smaller() {
    let pipeline = FakePipeline::new(model_info())
        .with_memory(MemoryModel::new(memory_plan), || room(2 * 32 * 32));
    let with_warm_up = EngineSettings {
        warm_up: Some(job(0, 64, 1)),
        ..settings(8, 8)
    };
    let mut driver = Driver::with_pipeline(with_warm_up, &pipeline, Instant::now());
    while driver.started.is_empty() {
        driver.cycle();
    }
    assert_eq!(driver.started[&0].0.size, Size::square(32));
    driver.run();
    assert!(matches!(driver.scheduler.state(), State::Ready));
}

/// An adapter of 60 MiB and a job that holds 100.
#[test]
fn adapters_that_were_dropped_for_memory_are_uploaded_by_the_start() {
    let mut driver = with_memory(600);
    let adapted = Job {
        adapters: testing::uses([&testing::adapter("a", 60 << 18)]),
        ..job(1, 10, 1)
    };
    let id = driver.submit(adapted);
    assert_eq!(
        [driver.cycle(), driver.cycle()],
        ["measure false", "load 0"]
    );
    // It needs 560 MiB with its adapter, of which 60 are there. Other programs take some.
    driver.room = Some(room(499));
    assert_eq!(driver.cycle(), "measure false");
    driver.room = Some(room(560));
    assert_eq!(driver.cycle(), "measure true");
    assert_eq!(driver.cycle(), "start 0");
    driver.run();
    assert!(matches!(driver.end(id), Some(Ok(_))));

    let mut driver = with_memory(600);
    let adapted = Job {
        adapters: testing::uses([&testing::adapter("a", 60 << 18)]),
        ..job(1, 10, 1)
    };
    driver.submit(adapted);
    assert_eq!(
        [driver.cycle(), driver.cycle()],
        ["measure false", "load 0"]
    );
    // What was uploaded counts as there.
    driver.room = Some(room(500));
    assert_eq!(
        [driver.cycle(), driver.cycle()],
        ["measure false", "start 0"]
    );
}
