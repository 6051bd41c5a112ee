//! The jobs that handles and the pipeline's thread share, and the bell that wakes the thread.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kiln_models::flops::CostModel;
use kiln_models::job::{Job, JobId, Output, RgbImage};
use kiln_models::pipeline::{CacheUses, MemoryUse};
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use tokio::sync::watch;

use super::entry::Entry;
use super::policy::{Candidate, expected_order, next_turn};
use super::work::{Speed, Stage, Work};
use super::{
    EngineSettings, EngineStats, Event, Finished, Forecast, JobError, JobHandle, State,
    SubmitError, SubmitOptions, Timings,
};

/// When to try again before anything has been measured.
const UNMEASURED_RETRY: Duration = Duration::from_secs(10);

/// Tells the time; tests have one that they can set.
pub(super) trait Clock: std::fmt::Debug + Send + Sync {
    fn now(&self) -> Instant;
}

#[derive(Debug)]
pub(super) struct SystemClock;

impl Clock for SystemClock {
    fn now(&self) -> Instant {
        Instant::now()
    }
}

#[derive(Debug)]
pub(super) struct Shared {
    queue: Mutex<Queue>,
    /// Rung when a job comes and when the engine is drained or stopped.
    wake: Condvar,
    pub(super) clock: Arc<dyn Clock>,
}

#[derive(Debug)]
struct Queue {
    /// In the order in which they came.
    entries: Vec<Entry>,
    max_unfinished: usize,
    max_started: usize,
    cost_model: CostModel,
    next_id: JobId,
    state: watch::Sender<State>,
    /// When draining is over.
    stop_at: Option<Instant>,
    /// How long the device has worked so far.
    device_time: Duration,
    speed: Speed,
    stats: EngineStats,
}

/// What the thread should do.
#[derive(Debug)]
pub(super) enum Next {
    Start(JobId, Job),
    Step(JobId),
    Finish(JobId),
    /// The job has ended, and the pipeline still has it.
    Discard(JobId),
    /// There is nothing to do until the bell rings.
    Sleep,
    End,
}

/// How a job ended.
enum Outcome {
    Finished(Output),
    Cancelled,
    Failed(JobError),
}

impl Shared {
    pub(super) fn new(
        settings: EngineSettings,
        cost_model: CostModel,
        clock: Arc<dyn Clock>,
    ) -> Self {
        let mut queue = Queue {
            entries: Vec::new(),
            max_unfinished: settings.max_queue + 1,
            max_started: settings.max_started.max(1),
            cost_model,
            next_id: 0,
            state: watch::Sender::new(State::Ready),
            stop_at: None,
            device_time: Duration::ZERO,
            speed: Speed::default(),
            stats: EngineStats::default(),
        };
        if let Some(job) = settings.warm_up {
            let (events, _) = unbounded_channel();
            queue.push(job, SubmitOptions::default(), events, clock.now());
            queue.entries[0].is_warm_up = true;
            queue.state.send_replace(State::Starting);
        }
        Self {
            queue: Mutex::new(queue),
            wake: Condvar::new(),
            clock,
        }
    }

    /// No code that holds this lock can panic halfway, so a poisoned queue is a sound one.
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn submit(
        self: &Arc<Self>,
        job: Job,
        options: SubmitOptions,
    ) -> Result<JobHandle, SubmitError> {
        let (events, receiver) = unbounded_channel();
        let id = self.lock().submit(job, options, events, self.clock.now())?;
        self.wake.notify_one();
        Ok(JobHandle {
            id,
            events: receiver,
            shared: Arc::clone(self),
        })
    }

    pub(super) fn forecast(&self, job: &Job) -> Forecast {
        self.lock().forecast(job)
    }

    /// The handle has gone. A job that the pipeline has is discarded at the thread's next turn.
    pub(super) fn forget(&self, id: JobId) {
        let mut queue = self.lock();
        let Some(index) = queue.position_of(id) else {
            return;
        };
        if queue.entries[index].is_started() {
            queue.entries[index].is_abandoned = true;
        } else {
            queue.end(index, Outcome::Cancelled, self.clock.now());
        }
    }

    pub(super) fn state(&self) -> watch::Receiver<State> {
        self.lock().state.subscribe()
    }

    pub(super) fn stats(&self) -> EngineStats {
        let queue = self.lock();
        let jobs = || queue.entries.iter().filter(|entry| !entry.is_warm_up);
        EngineStats {
            waiting: jobs().filter(|entry| !entry.is_started()).count(),
            running: jobs().filter(|entry| entry.is_started()).count(),
            ..queue.stats.clone()
        }
    }

    pub(super) fn drain(&self, timeout: Duration) {
        let stop_at = self.clock.now().checked_add(timeout);
        self.lock().drain(stop_at);
        self.wake.notify_one();
    }

    pub(super) fn stop(&self) {
        self.lock().stop(self.clock.now());
        self.wake.notify_one();
    }

    /// The thread is gone: nobody waits for ever.
    pub(super) fn abandon(&self) {
        let now = self.clock.now();
        let mut queue = self.lock();
        queue.stop(now);
        while !queue.entries.is_empty() {
            queue.end(0, Outcome::Failed(JobError::Stopped), now);
        }
    }

    /// As [`Shared::next`], without sleeping.
    #[cfg(test)]
    pub(super) fn poll(&self) -> Next {
        self.lock().next(self.clock.now())
    }

    /// What to do next. Sleeps while there is nothing to do.
    pub(super) fn next(&self) -> Next {
        let mut queue = self.lock();
        loop {
            match queue.next(self.clock.now()) {
                Next::Sleep => {
                    queue = self
                        .wake
                        .wait(queue)
                        .unwrap_or_else(PoisonError::into_inner);
                }
                next => return next,
            }
        }
    }

    pub(super) fn started(&self, id: JobId, took: Duration) {
        self.lock().took_turn(id, took, |entry, stats| {
            entry.timings.encode = took;
            if !entry.is_warm_up {
                stats.waiting_time.add(entry.timings.queue);
                stats.encode_time.add(took);
            }
            Stage::Encode
        });
    }

    /// Whether a preview should be made now.
    pub(super) fn stepped(&self, id: JobId, steps_left: usize, took: Duration) -> bool {
        let mut wants_preview = false;
        self.lock().took_turn(id, took, |entry, stats| {
            entry.timings.denoise += took;
            entry.steps_left = steps_left;
            if !entry.is_warm_up {
                stats.steps += 1;
                stats.step_time.add(took);
            }
            let total = entry.total_steps;
            let done = total.saturating_sub(steps_left);
            entry.tell(Event::Step { done, total });
            wants_preview = entry.wants_preview();
            Stage::Step
        });
        wants_preview
    }

    /// The preview is part of the turn of the step before it.
    pub(super) fn previewed(&self, id: JobId, image: Option<RgbImage>, took: Duration) {
        let mut queue = self.lock();
        queue.device_time += took;
        queue.stats.preview_time.add(took);
        let device_time = queue.device_time;
        let Some(index) = queue.position_of(id) else {
            return;
        };
        let entry = &mut queue.entries[index];
        entry.last_turn += took;
        entry.last_turn_end = device_time;
        entry.timings.previews += took;
        if let Some(image) = image {
            let step = entry.total_steps.saturating_sub(entry.steps_left);
            entry.tell(Event::Preview { step, image });
        }
    }

    pub(super) fn finished(&self, id: JobId, output: Output, took: Duration) {
        let mut queue = self.lock();
        queue.took_turn(id, took, |entry, stats| {
            entry.timings.decode = took;
            if !entry.is_warm_up {
                stats.decode_time.add(took);
            }
            Stage::Decode
        });
        if let Some(index) = queue.position_of(id) {
            queue.end(index, Outcome::Finished(output), self.clock.now());
        }
    }

    pub(super) fn failed(&self, id: JobId, error: JobError, took: Duration) {
        let mut queue = self.lock();
        queue.device_time += took;
        if let Some(index) = queue.position_of(id) {
            queue.end(index, Outcome::Failed(error), self.clock.now());
        }
    }

    /// The device is gone: no job can be generated any more. All that there are end with `error`,
    /// those that the pipeline has at the thread's next turn.
    pub(super) fn lost(&self, error: JobError) {
        self.lock().lose(error, self.clock.now());
    }

    pub(super) fn set_holdings(&self, memory: MemoryUse, caches: CacheUses) {
        let mut queue = self.lock();
        queue.stats.memory = memory;
        queue.stats.embedding_cache = caches.embeddings;
        queue.stats.modulation_cache = caches.modulation;
    }
}

impl Queue {
    /// A copy: nothing can be sent while a borrow is held.
    fn state(&self) -> State {
        self.state.borrow().clone()
    }

    fn position_of(&self, id: JobId) -> Option<usize> {
        self.entries.iter().position(|entry| entry.id == id)
    }

    fn submit(
        &mut self,
        job: Job,
        options: SubmitOptions,
        events: UnboundedSender<Event>,
        now: Instant,
    ) -> Result<JobId, SubmitError> {
        let admitted = self.admit();
        self.stats.outcomes.rejected += u64::from(admitted.is_err());
        admitted?;
        let id = self.push(job, options, events, now);
        self.tell_positions();
        Ok(id)
    }

    /// Whether one more job is taken.
    fn admit(&self) -> Result<(), SubmitError> {
        match self.state() {
            State::Starting | State::Ready => self.refuse_if_full(),
            State::Draining => Err(SubmitError::Draining),
            State::Stopped | State::Failed(_) => Err(SubmitError::Stopped),
        }
    }

    fn refuse_if_full(&self) -> Result<(), SubmitError> {
        // The warm-up takes nobody's place.
        let unfinished = self.entries.iter().filter(|e| !e.is_warm_up).count();
        if unfinished < self.max_unfinished {
            return Ok(());
        }
        let order = expected_order(&self.candidates(), self.max_started);
        let next = order.first().map(|&index| &self.entries[index]);
        let rest = next.and_then(|entry| entry.expected_rest(&self.speed));
        Err(SubmitError::QueueFull {
            waiting: unfinished - 1,
            retry_after: rest.unwrap_or(UNMEASURED_RETRY),
        })
    }

    fn forecast(&self, job: &Job) -> Forecast {
        let work = self.work(job);
        let mut candidates = self.candidates();
        candidates.push(Candidate {
            size: work.total(),
            started: false,
            idle: Duration::ZERO,
            turn: Duration::ZERO,
        });
        let order = expected_order(&candidates, self.max_started);
        // The job itself is the one that has no entry yet.
        let before: Vec<&Entry> = order
            .iter()
            .map_while(|&index| self.entries.get(index))
            .collect();
        Forecast {
            is_accepted: self.admit().is_ok(),
            position: before.len(),
            estimated_wait: before
                .iter()
                .map(|entry| entry.expected_rest(&self.speed))
                .try_fold(Duration::ZERO, |wait, rest| {
                    Some(wait.saturating_add(rest?))
                }),
            estimated_work: self.speed.rest(&work, false, job.sampling.steps),
        }
    }

    fn work(&self, job: &Job) -> Work {
        Work::new(self.cost_model.cost(job), job.sampling.steps)
    }

    fn push(
        &mut self,
        job: Job,
        options: SubmitOptions,
        events: UnboundedSender<Event>,
        now: Instant,
    ) -> JobId {
        let id = self.next_id;
        self.next_id += 1;
        self.entries.push(Entry {
            id,
            work: self.work(&job),
            options,
            submitted: now,
            total_steps: job.sampling.steps,
            steps_left: job.sampling.steps,
            waiting: Some(job),
            timings: Timings::default(),
            is_warm_up: false,
            is_abandoned: false,
            events,
            told_position: None,
            last_turn: Duration::ZERO,
            last_turn_end: self.device_time,
        });
        id
    }

    fn candidates(&self) -> Vec<Candidate> {
        let candidate = |entry: &Entry| entry.candidate(self.device_time, &self.speed);
        self.entries.iter().map(candidate).collect()
    }

    fn next(&mut self, now: Instant) -> Next {
        let is_draining = matches!(self.state(), State::Draining);
        if is_draining && self.stop_at.is_some_and(|at| at <= now) {
            self.stop(now);
        }
        while let Some((index, outcome)) = self.first_to_end(now) {
            let (id, started) = (self.entries[index].id, self.entries[index].is_started());
            self.end(index, outcome, now);
            if started {
                return Next::Discard(id);
            }
        }
        let candidates = self.candidates();
        let next = match self.state() {
            // Nothing comes between the warm-up and the device.
            State::Starting => Some(0),
            _ => next_turn(&candidates, self.max_started),
        };
        let Some(entry) = next.and_then(|index| self.entries.get_mut(index)) else {
            return match self.state() {
                State::Starting | State::Ready => Next::Sleep,
                State::Draining => {
                    self.state.send_replace(State::Stopped);
                    Next::End
                }
                State::Stopped | State::Failed(_) => Next::End,
            };
        };
        let id = entry.id;
        if let Some(job) = entry.waiting.take() {
            entry.timings.queue = now.saturating_duration_since(entry.submitted);
            entry.tell(Event::Started);
            self.tell_positions();
            return Next::Start(id, job);
        }
        if entry.steps_left > 0 {
            Next::Step(id)
        } else {
            Next::Finish(id)
        }
    }

    /// A job that nothing more should be done for, and why.
    fn first_to_end(&self, now: Instant) -> Option<(usize, Outcome)> {
        // What ends all jobs.
        let (over, starting) = match self.state() {
            State::Stopped => (Some(JobError::Stopped), false),
            State::Failed(error) => (Some(error), false),
            State::Starting => (None, true),
            State::Ready | State::Draining => (None, false),
        };
        let outcome = |entry: &Entry| {
            if entry.is_abandoned {
                Some(Outcome::Cancelled)
            } else if let Some(error) = over.as_ref().filter(|_| entry.is_started()) {
                Some(Outcome::Failed(error.clone()))
            } else if over.is_some() || (entry.is_warm_up && !starting) {
                Some(Outcome::Failed(JobError::Stopped))
            } else if entry.options.deadline.is_some_and(|at| at <= now) {
                Some(Outcome::Failed(JobError::DeadlinePassed))
            } else {
                None
            }
        };
        let mut jobs = self.entries.iter().enumerate();
        jobs.find_map(|(index, entry)| Some((index, outcome(entry)?)))
    }

    /// Books a turn of the device and the stage it was, which `book` names.
    fn took_turn(
        &mut self,
        id: JobId,
        took: Duration,
        book: impl FnOnce(&mut Entry, &mut EngineStats) -> Stage,
    ) {
        self.device_time += took;
        let Some(index) = self.position_of(id) else {
            return;
        };
        let entry = &mut self.entries[index];
        entry.last_turn = took;
        entry.last_turn_end = self.device_time;
        let stage = book(entry, &mut self.stats);
        self.speed.measured(stage, &entry.work, took);
    }

    /// Takes the job out, counts it and tells its handle.
    fn end(&mut self, index: usize, outcome: Outcome, now: Instant) {
        let entry = self.entries.remove(index);
        if entry.is_warm_up {
            self.warm_up_ended(outcome);
        } else {
            self.count_and_tell(entry, outcome, now);
        }
        self.tell_positions();
    }

    fn warm_up_ended(&self, outcome: Outcome) {
        self.state.send_if_modified(|state| {
            let is_starting = matches!(state, State::Starting);
            if is_starting {
                *state = match outcome {
                    Outcome::Finished(_) => State::Ready,
                    Outcome::Failed(error) => State::Failed(error),
                    Outcome::Cancelled => State::Stopped,
                };
            }
            is_starting
        });
    }

    fn count_and_tell(&mut self, entry: Entry, outcome: Outcome, now: Instant) {
        let outcomes = &mut self.stats.outcomes;
        let (id, steps_left) = (entry.id, entry.steps_left);
        match outcome {
            Outcome::Finished(output) => {
                let mut timings = entry.timings;
                let since = now.saturating_duration_since(entry.submitted);
                timings.paused = since.saturating_sub(timings.total());
                self.stats.add_finished(&output, &timings);
                entry.tell(Event::Finished(Finished { output, timings }));
            }
            Outcome::Cancelled => {
                tracing::info!(job = id, steps_left, "cancelled");
                outcomes.cancelled += 1;
            }
            Outcome::Failed(error) => {
                match error {
                    JobError::Pipeline(_) | JobError::Panicked(_) => outcomes.failed += 1,
                    JobError::DeadlinePassed => outcomes.deadline_passed += 1,
                    JobError::Stopped => outcomes.stopped += 1,
                }
                entry.tell(Event::Failed(error));
            }
        }
    }

    fn drain(&mut self, stop_at: Option<Instant>) {
        let stop_at = [self.stop_at, stop_at].into_iter().flatten().min();
        let accepts = matches!(self.state(), State::Starting | State::Ready);
        if accepts {
            self.state.send_replace(State::Draining);
        }
        self.stop_at = stop_at;
    }

    /// Ends all jobs, but those that the pipeline has at the thread's next turn.
    fn stop(&mut self, now: Instant) {
        self.state.send_if_modified(|state| {
            let is_running = !matches!(state, State::Stopped | State::Failed(_));
            if is_running {
                *state = State::Stopped;
            }
            is_running
        });
        while let Some(index) = self.entries.iter().position(|entry| !entry.is_started()) {
            self.end(index, Outcome::Failed(JobError::Stopped), now);
        }
    }

    fn lose(&mut self, error: JobError, now: Instant) {
        // A warm-up that failed says so by itself.
        if matches!(self.state(), State::Ready | State::Draining) {
            self.state.send_replace(State::Failed(error.clone()));
            while let Some(index) = self.entries.iter().position(|entry| !entry.is_started()) {
                self.end(index, Outcome::Failed(error.clone()), now);
            }
        }
    }

    /// Tells the waiting jobs whose position is not what they have heard.
    fn tell_positions(&mut self) {
        let order = expected_order(&self.candidates(), self.max_started);
        let mut estimated_wait = Some(Duration::ZERO);
        for (position, index) in order.into_iter().enumerate() {
            let entry = &mut self.entries[index];
            if !entry.is_started() && entry.told_position != Some(position) {
                entry.told_position = Some(position);
                entry.tell(Event::Queued {
                    position,
                    estimated_wait,
                });
            }
            let rest = entry.expected_rest(&self.speed);
            estimated_wait = estimated_wait
                .zip(rest)
                .map(|(wait, rest)| wait.saturating_add(rest));
        }
    }
}
