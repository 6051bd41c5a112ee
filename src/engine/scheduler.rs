//! Decides what the pipeline does next, and books what it has done.
//!
//! The scheduler is a pure state machine: it has no lock, no clock, no channel and no thread. Its
//! owner asks for a [`Plan`], carries it out, and books the outcome before it asks for the next
//! plan. Every method that changes something returns the events that the owner must send.

mod adapters;
mod deadlines;
mod estimates;
mod steps;
mod turns;

use std::time::{Duration, Instant};

use kiln_models::flops::CostModel;
use kiln_models::job::{Job, JobId, Output, RgbImage};
use kiln_models::pipeline::Pipeline;

use super::adapters::{AdapterRoom, in_use, missing, sum};
use super::calibration::Calibration;
use super::cost::{Speed, Stage, Work};
use super::entry::Entry;
use super::memory::{Memory, Plans};
use super::plan::{Booked, Holdings, Outcome, Plan};
use super::policy::Candidate;
use super::riders::{Budget, DEFAULT_BUDGET};
use super::{
    EngineSettings, EngineStats, Event, Finished, JobError, State, SubmitError, SubmitOptions,
    TooLarge,
};

/// Events and the jobs that they belong to, in the order in which they must be sent.
pub(super) type Events = Vec<(JobId, Event)>;

/// How a job ended.
enum End {
    Finished(Output),
    Cancelled,
    Failed(JobError),
}

/// What the scheduler knows of the loaded model and its devices.
#[derive(Debug)]
pub(super) struct Facts {
    pub(super) cost_model: CostModel,
    pub(super) memory: Memory,
    pub(super) adapter_room: AdapterRoom,
    /// An image token is a square of this many pixels a side.
    pub(super) token_side: usize,
    /// Number of devices that a step is spread over.
    pub(super) devices: usize,
}

impl Facts {
    /// The facts of a pipeline that has no job yet, under these limits of its jobs.
    pub(super) fn of(pipeline: &dyn Pipeline, settings: &EngineSettings) -> Self {
        let info = pipeline.info();
        Self {
            cost_model: pipeline.cost_model(),
            memory: Memory::of(pipeline, settings.max_memory),
            adapter_room: AdapterRoom::of(info, settings.adapter_cache_bytes),
            token_side: info.sizes.multiple,
            devices: info.device_count(),
        }
    }
}

#[derive(Debug)]
pub(super) struct Scheduler {
    /// In the order of their submission.
    entries: Vec<Entry>,
    max_unfinished: usize,
    max_started: usize,
    cost_model: CostModel,
    memory: Memory,
    adapter_room: AdapterRoom,
    /// Device bytes of the largest adapter that a job has had.
    largest_adapter: u64,
    token_side: usize,
    /// Image tokens that the jobs of a step may have together.
    budget: Budget,
    /// How the budget is measured after the warm-up.
    calibration: Option<Calibration>,
    /// Whether waiting jobs may be started so that they can ride: not after one had to wait for memory,
    /// until a job ends.
    may_start_riders: bool,
    /// Bytes that the last step took, by plan.
    step_memory: u64,
    next_id: JobId,
    state: State,
    /// When the time to drain is over.
    stop_at: Option<Instant>,
    /// How long the device has worked so far.
    device_time: Duration,
    /// When the last plan was booked.
    worked: Option<Instant>,
    speed: Speed,
    stats: EngineStats,
    /// Events that the current method will return.
    events: Events,
}

impl Scheduler {
    pub(super) fn new(
        settings: EngineSettings,
        facts: Facts,
        holdings: Holdings,
        now: Instant,
    ) -> Self {
        let mut scheduler = Self {
            entries: Vec::new(),
            max_unfinished: settings.max_queue + 1,
            max_started: settings.max_started.max(1),
            cost_model: facts.cost_model,
            memory: facts.memory,
            adapter_room: facts.adapter_room,
            largest_adapter: 0,
            token_side: facts.token_side,
            budget: Budget::new(settings.max_step_tokens.unwrap_or(DEFAULT_BUDGET)),
            calibration: None,
            may_start_riders: true,
            step_memory: 0,
            next_id: 0,
            state: State::Ready,
            stop_at: None,
            device_time: Duration::ZERO,
            worked: None,
            speed: Speed::new(facts.devices),
            stats: EngineStats::default(),
            events: Events::new(),
        };
        scheduler.stats.set_holdings(holdings);
        if let Some(job) = settings.warm_up {
            let job = match scheduler.memory.plans(&job, 0) {
                Err(TooLarge {
                    largest: Some(size),
                    ..
                }) => Job { size, ..job },
                _ => job,
            };
            let fit = scheduler.fit(job.clone());
            let (job, plans) = fit.unwrap_or_else(|_| {
                let plans = scheduler.memory.all_plans(&job);
                (job, plans)
            });
            if settings.max_step_tokens.is_none() {
                scheduler.calibration = Some(Calibration::of(&job, facts.token_side));
            }
            scheduler.push((job, plans), &SubmitOptions::default(), now);
            scheduler.entries[0].is_warm_up = true;
            scheduler.state = State::Starting;
        }
        scheduler
    }

    pub(super) fn state(&self) -> &State {
        &self.state
    }

    pub(super) fn stats(&self) -> EngineStats {
        let jobs = || self.entries.iter().filter(|entry| !entry.is_warm_up);
        EngineStats {
            waiting: jobs().filter(|entry| !entry.is_started()).count(),
            running: jobs().filter(|entry| entry.is_started()).count(),
            max_unfinished: self.max_unfinished,
            planned_memory: Memory::planned(&self.entries, self.step_memory),
            free_memory: self.memory.free(),
            max_step_tokens: self.budget.tokens(),
            adapters: self.adapter_stats(),
            ..self.stats.clone()
        }
    }

    #[cfg(test)]
    pub(super) fn set_cost_model(&mut self, cost_model: CostModel) {
        self.cost_model = cost_model;
    }

    /// Steps that are left of a job that has not ended.
    pub(super) fn steps_left(&self, id: JobId) -> Option<usize> {
        self.position_of(id)
            .map(|index| self.entries[index].steps_left)
    }

    /// Accepts a job or refuses it.
    ///
    /// # Errors
    ///
    /// If the queue is full, the job or its adapters do not fit the memory, or it cannot be finished before
    /// it is due, or the engine is about to stop.
    pub(super) fn submit(
        &mut self,
        job: Job,
        options: &SubmitOptions,
        now: Instant,
    ) -> Result<(JobId, Events), SubmitError> {
        let adapters = self.adapter_room.adapters_of(&job);
        let admitted = self.admit(options);
        let admitted = admitted.and_then(|()| self.fit_due(job, options, now));
        if admitted.is_err() {
            self.stats
                .count(&adapters, |outcomes| outcomes.rejected += 1);
        }
        let (job, plans, cheaper) = admitted?;
        let id = self.push((job, plans), options, now);
        self.entries.last_mut().expect("the new entry").cheaper = cheaper;
        self.report_positions();
        Ok((id, self.take_events()))
    }

    /// Chooses how a job is decoded, so that it fits the memory.
    ///
    /// # Errors
    ///
    /// If it does not fit in any way.
    pub(super) fn fit(&self, job: Job) -> Result<(Job, Plans), TooLarge> {
        let adapters = self.adapter_room.adapters_of(&job);
        let bytes = sum(&adapters.iter().collect::<Vec<_>>());
        let plans = self.memory.plans(&job, bytes)?;
        let decoding = plans
            .first()
            .map_or(job.decoding, |(decoding, _)| *decoding);
        Ok((Job { decoding, ..job }, plans))
    }

    /// Cancels a job whose handle has been dropped. A job that has been started is discarded by a
    /// later plan.
    pub(super) fn forget(&mut self, id: JobId, now: Instant) -> Events {
        if let Some(index) = self.position_of(id) {
            if self.entries[index].is_started() {
                self.entries[index].is_abandoned = true;
            } else {
                self.end(index, End::Cancelled, now);
            }
        }
        self.take_events()
    }

    /// Accepts no more jobs, and stops at `stop_at` at the latest.
    pub(super) fn drain(&mut self, stop_at: Option<Instant>) {
        if matches!(self.state, State::Starting | State::Ready) {
            self.state = State::Draining;
        }
        self.stop_at = [self.stop_at, stop_at].into_iter().flatten().min();
    }

    /// Ends the waiting jobs now, and those that have been started by the next plans.
    pub(super) fn stop(&mut self, now: Instant) -> Events {
        self.stop_now(now);
        self.take_events()
    }

    /// Ends all jobs now, because no plan will be carried out any more.
    pub(super) fn abandon(&mut self, now: Instant) -> Events {
        self.stop_now(now);
        while !self.entries.is_empty() {
            self.end(0, End::Failed(JobError::Stopped), now);
        }
        self.take_events()
    }

    /// What to do next.
    pub(super) fn plan(&mut self, now: Instant) -> (Plan, Events) {
        let plan = self.choose(now);
        if matches!(plan, Plan::Sleep) {
            // What is free may have changed when the next job comes.
            self.memory.changed();
        }
        (plan, self.take_events())
    }

    /// Books the outcome of the last plan.
    pub(super) fn book(&mut self, booked: Booked, now: Instant) -> Events {
        let took = booked.took;
        self.memory
            .set_adapters(booked.holdings.caches.adapters.bytes as u64);
        self.stats.set_holdings(booked.holdings);
        self.device_time += took;
        self.worked = Some(now);
        if let Some(error) = booked.lost {
            self.lose(error, now);
        }
        self.memory.changed();
        match booked.outcome {
            Outcome::Started(id, Ok(())) => {
                self.book_turn(id, Stage::Encode, took);
            }
            Outcome::Encoded(ids, encoded) => self.book_encoding(&ids, encoded.is_ok(), took),
            Outcome::LoadedAdapters(id, loaded) => self.book_upload(id, loaded.is_ok(), took),
            Outcome::Stepped(jobs) => self.book_step(jobs, took, now),
            Outcome::SteppedAlone(jobs) => self.book_steps_alone(jobs, now),
            Outcome::Timed(copies, step) => self.book_timing(copies, step, took),
            Outcome::Previewed(id, image) => self.book_preview(id, image, took),
            Outcome::Finished(id, Ok(output)) => {
                if let Some(index) = self.book_turn(id, Stage::Decode, took) {
                    self.end(index, End::Finished(output), now);
                }
            }
            Outcome::Started(id, Err(error)) | Outcome::Finished(id, Err(error)) => {
                self.fail(id, error, now);
            }
            Outcome::Measured {
                room,
                dropped_caches,
            } => {
                self.memory.measured(room, dropped_caches);
                if dropped_caches {
                    self.forget_uploads();
                }
            }
            Outcome::DecodingChanged | Outcome::Discarded => {}
        }
        self.take_events()
    }

    /// Books a successful turn of one job, and measures the speed by it. Returns the job's index.
    fn book_turn(&mut self, id: JobId, stage: Stage, took: Duration) -> Option<usize> {
        let index = self.position_of(id)?;
        let entry = &mut self.entries[index];
        entry.book_turn(stage, took, self.device_time);
        let work = entry.work.of_stage(stage);
        // Prompts that were encoded together with others take no time here.
        if work > 0.0 {
            self.speed.add(stage, work, took);
        }
        if !entry.is_warm_up {
            self.stats.add_turn(stage, took, &entry.timings);
        }
        Some(index)
    }

    fn book_preview(&mut self, id: JobId, image: Option<RgbImage>, took: Duration) {
        self.stats.preview_time.add(took);
        let Some(index) = self.position_of(id) else {
            return;
        };
        let entry = &mut self.entries[index];
        entry.book_preview(took, self.device_time);
        let step = entry.steps_done();
        let preview = image.map(|image| (id, Event::Preview { step, image }));
        self.events.extend(preview);
    }

    fn fail(&mut self, id: JobId, error: JobError, now: Instant) {
        if let Some(index) = self.position_of(id) {
            self.end(index, End::Failed(error), now);
        }
    }

    fn stop_now(&mut self, now: Instant) {
        if !matches!(self.state, State::Stopped | State::Failed(_)) {
            self.state = State::Stopped;
        }
        self.end_waiting(&JobError::Stopped, now);
    }

    /// No job can be generated any more.
    fn lose(&mut self, error: JobError, now: Instant) {
        // A warm-up that failed sets the state by itself.
        if matches!(self.state, State::Ready | State::Draining) {
            self.end_waiting(&error.of_others(), now);
            self.state = State::Failed(error);
        }
    }

    fn end_waiting(&mut self, error: &JobError, now: Instant) {
        while let Some(index) = self.entries.iter().position(|entry| !entry.is_started()) {
            self.end(index, End::Failed(error.clone()), now);
        }
    }

    /// Removes a job, counts its end, and reports it.
    fn end(&mut self, index: usize, end: End, now: Instant) {
        let entry = self.entries.remove(index);
        self.may_start_riders = true;
        if !entry.is_warm_up {
            let event = self.counted(&entry, end, now);
            self.events.extend(event.map(|event| (entry.id, event)));
        } else if matches!(self.state, State::Starting) {
            self.state = match end {
                // The engine is ready when the budget has been measured.
                End::Finished(_) if self.calibration.is_some() => State::Starting,
                End::Finished(_) => State::Ready,
                End::Failed(error) => State::Failed(error),
                End::Cancelled => State::Stopped,
            };
        }
        self.report_positions();
    }

    /// Counts the end of a job. Returns the job's last event; a cancelled job has none.
    fn counted(&mut self, entry: &Entry, end: End, now: Instant) -> Option<Event> {
        match end {
            End::Finished(output) => {
                let mut timings = entry.timings;
                let since = now.saturating_duration_since(entry.submitted);
                timings.paused = since.saturating_sub(timings.total());
                self.stats
                    .count(&entry.adapters, |outcomes| outcomes.finished += 1);
                self.stats.add_finished(&output, &timings);
                Some(Event::Finished(Finished {
                    output,
                    timings,
                    made: entry.made.clone().map(Box::new),
                }))
            }
            End::Cancelled => {
                self.stats
                    .count(&entry.adapters, |outcomes| outcomes.cancelled += 1);
                None
            }
            End::Failed(error) => {
                self.stats
                    .count(&entry.adapters, |outcomes| outcomes.add_failed(&error));
                Some(Event::Failed(error))
            }
        }
    }

    /// Whether one more job is accepted.
    fn admit(&self, options: &SubmitOptions) -> Result<(), SubmitError> {
        match self.state {
            State::Starting | State::Ready if options.outside_queue => Ok(()),
            State::Starting | State::Ready => self.refuse_if_full(),
            State::Draining => Err(SubmitError::Draining),
            State::Stopped => Err(SubmitError::Stopped),
            State::Failed(ref error) => Err(SubmitError::Failed {
                reason: error.to_string(),
            }),
        }
    }

    fn push(&mut self, (job, plans): (Job, Plans), options: &SubmitOptions, now: Instant) -> JobId {
        let id = self.next_id;
        self.next_id += 1;
        let parts = (self.work(&job), plans, self.adapter_room.adapters_of(&job));
        let entry = Entry::new(id, job, parts, options, now, self.device_time);
        let sizes = entry.adapters.iter().map(|adapter| adapter.bytes);
        self.largest_adapter = sizes.fold(self.largest_adapter, u64::max);
        self.entries.push(entry);
        id
    }

    fn work(&self, job: &Job) -> Work {
        Work::new(self.cost_model.cost(job), job, self.token_side)
    }

    fn position_of(&self, id: JobId) -> Option<usize> {
        self.entries.iter().position(|entry| entry.id == id)
    }

    fn candidates(&self) -> Vec<Candidate> {
        let in_use = in_use(&self.entries);
        let is_alone = |entry: &Entry| {
            let adapters = missing(&entry.adapters, &in_use);
            self.memory.is_alone(&entry.plan(), adapters, &self.entries)
        };
        let candidate = |entry: &Entry| Candidate {
            alone: !entry.is_started() && is_alone(entry),
            adapters: self.adapter_need(entry, &in_use),
            ..entry.candidate(self.device_time, &self.speed)
        };
        self.entries.iter().map(candidate).collect()
    }

    fn take_events(&mut self) -> Events {
        std::mem::take(&mut self.events)
    }
}
