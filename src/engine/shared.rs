//! What the handles and the pipeline's thread share: the scheduler behind a lock, the channels that
//! its events are sent on, and the condition variable that wakes the thread.
//!
//! The thread takes the lock once per cycle, to book the last outcome and to plan the next call.

use std::collections::HashMap;
use std::mem::discriminant;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kiln_models::job::{Job, JobId};
use kiln_models::pipeline::Pipeline;
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use tokio::sync::watch;
use tracing::Span;

use super::plan::{Booked, Holdings, Plan};
use super::scheduler::{Events, Facts, Scheduler};
use super::{
    EngineSettings, EngineStats, Event, Forecast, JobHandle, State, SubmitError, SubmitOptions,
    TooLarge,
};

/// The source of the current time; tests have a clock that they can set.
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
    locked: Mutex<Locked>,
    /// Notified when a job is submitted and when the engine is drained or stopped.
    wake: Condvar,
    pub(super) clock: Arc<dyn Clock>,
}

#[derive(Debug)]
struct Locked {
    scheduler: Scheduler,
    /// Who receives the events of the jobs that have not ended. The warm-up has no listener.
    listeners: HashMap<JobId, Listener>,
    /// A copy of the scheduler's state, for callers that wait for a change of it.
    state: watch::Sender<State>,
}

/// The sending half of a job's handle, and the span of the job's log lines.
#[derive(Debug)]
struct Listener {
    events: UnboundedSender<Event>,
    span: Span,
}

/// A plan, and the spans of its jobs.
#[derive(Debug)]
pub(super) struct Task {
    pub(super) plan: Plan,
    pub(super) spans: HashMap<JobId, Span>,
}

impl Shared {
    pub(super) fn new(
        settings: EngineSettings,
        pipeline: &dyn Pipeline,
        clock: Arc<dyn Clock>,
    ) -> Self {
        let holdings = Holdings::of(pipeline);
        let facts = Facts::of(pipeline, &settings);
        let scheduler = Scheduler::new(settings, facts, holdings, clock.now());
        Self {
            locked: Mutex::new(Locked {
                state: watch::Sender::new(scheduler.state().clone()),
                scheduler,
                listeners: HashMap::new(),
            }),
            wake: Condvar::new(),
            clock,
        }
    }

    /// No code that holds this lock can panic halfway, so a poisoned lock guards sound values.
    fn lock(&self) -> MutexGuard<'_, Locked> {
        self.locked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn submit(
        self: &Arc<Self>,
        job: Job,
        options: SubmitOptions,
    ) -> Result<JobHandle, SubmitError> {
        let (sender, receiver) = unbounded_channel();
        let mut locked = self.lock();
        let (id, events) = locked.scheduler.submit(job, &options, self.clock.now())?;
        let listener = Listener {
            events: sender,
            span: options.span,
        };
        locked.listeners.insert(id, listener);
        locked.publish(events);
        drop(locked);
        self.wake.notify_one();
        Ok(JobHandle {
            id,
            events: receiver,
            shared: Arc::clone(self),
        })
    }

    pub(super) fn fit(&self, job: Job) -> Result<Job, TooLarge> {
        let (job, _) = self.lock().scheduler.fit(job)?;
        Ok(job)
    }

    pub(super) fn forecast(&self, job: &Job, options: &SubmitOptions) -> Forecast {
        let now = self.clock.now();
        self.lock().scheduler.forecast(job, options, now)
    }

    /// The handle of a job has been dropped.
    pub(super) fn forget(&self, id: JobId) {
        let mut locked = self.lock();
        let Some(steps_left) = locked.scheduler.steps_left(id) else {
            return;
        };
        let span = locked.span(id);
        let events = locked.scheduler.forget(id, self.clock.now());
        if locked.scheduler.steps_left(id).is_none() {
            locked.listeners.remove(&id);
        }
        locked.publish(events);
        drop(locked);
        span.in_scope(|| tracing::info!(job = id, steps_left, "cancelled"));
    }

    pub(super) fn state(&self) -> watch::Receiver<State> {
        self.lock().state.subscribe()
    }

    pub(super) fn stats(&self) -> EngineStats {
        self.lock().scheduler.stats()
    }

    pub(super) fn drain(&self, timeout: Duration) {
        let stop_at = self.clock.now().checked_add(timeout);
        let mut locked = self.lock();
        locked.scheduler.drain(stop_at);
        locked.publish(Events::new());
        drop(locked);
        self.wake.notify_one();
    }

    pub(super) fn stop(&self) {
        let mut locked = self.lock();
        let events = locked.scheduler.stop(self.clock.now());
        locked.publish(events);
        drop(locked);
        self.wake.notify_one();
    }

    /// Ends all jobs, because the thread has ended.
    pub(super) fn abandon(&self) {
        let mut locked = self.lock();
        let events = locked.scheduler.abandon(self.clock.now());
        locked.publish(events);
    }

    /// Books the outcome of the last task, and plans the next one. Sleeps while there is nothing to
    /// do.
    pub(super) fn next(&self, booked: Option<Booked>) -> Task {
        let mut locked = self.lock();
        if let Some(booked) = booked {
            locked.book(booked, self.clock.now());
        }
        loop {
            let task = locked.plan(self.clock.now());
            if !matches!(task.plan, Plan::Sleep) {
                return task;
            }
            locked = self
                .wake
                .wait(locked)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// As [`Shared::next`], without sleeping.
    #[cfg(test)]
    pub(super) fn poll(&self) -> Task {
        self.lock().plan(self.clock.now())
    }

    #[cfg(test)]
    pub(super) fn book(&self, booked: Booked) {
        self.lock().book(booked, self.clock.now());
    }
}

impl Locked {
    fn book(&mut self, booked: Booked, now: Instant) {
        let events = self.scheduler.book(booked, now);
        self.publish(events);
    }

    fn plan(&mut self, now: Instant) -> Task {
        let (plan, events) = self.scheduler.plan(now);
        let spans = plan.jobs().iter().map(|&id| (id, self.span(id))).collect();
        self.publish(events);
        if let Plan::Discard(id) = plan {
            self.listeners.remove(&id);
        }
        Task { plan, spans }
    }

    fn span(&self, id: JobId) -> Span {
        let listener = self.listeners.get(&id);
        listener.map_or_else(Span::none, |listener| listener.span.clone())
    }

    /// Sends the events to the handles, and a changed state to the callers that wait for it.
    fn publish(&mut self, events: Events) {
        for (id, event) in events {
            let is_last = event.is_last();
            if let Some(listener) = self.listeners.get(&id) {
                // An error means that the handle has been dropped.
                drop(listener.events.send(event));
            }
            if is_last {
                self.listeners.remove(&id);
            }
        }
        let new = self.scheduler.state();
        self.state.send_if_modified(|state| {
            let is_new = discriminant(state) != discriminant(new);
            if is_new {
                *state = new.clone();
            }
            is_new
        });
    }
}
