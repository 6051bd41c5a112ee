//! One job, from its submission to its end.

use std::time::{Duration, Instant};

use kiln_models::job::{Job, JobId};
use tokio::sync::mpsc::UnboundedSender;

use super::policy::Candidate;
use super::work::{Speed, Work};
use super::{Event, SubmitOptions, Timings};

#[derive(Debug)]
pub(super) struct Entry {
    pub(super) id: JobId,
    /// Until the pipeline has it.
    pub(super) waiting: Option<Job>,
    pub(super) work: Work,
    pub(super) options: SubmitOptions,
    pub(super) submitted: Instant,
    pub(super) total_steps: usize,
    pub(super) steps_left: usize,
    pub(super) timings: Timings,
    pub(super) is_warm_up: bool,
    /// Nobody listens any more.
    pub(super) is_abandoned: bool,
    pub(super) events: UnboundedSender<Event>,
    /// The position that the handle has heard last.
    pub(super) told_position: Option<usize>,
    /// How long its last turn took; zero before the first.
    pub(super) last_turn: Duration,
    /// The queue's device time at the end of its last turn, or when it came.
    pub(super) last_turn_end: Duration,
}

impl Entry {
    pub(super) fn is_started(&self) -> bool {
        self.waiting.is_none()
    }

    /// Tells the handle. Nobody may be listening any more; then it is dropped soon.
    pub(super) fn tell(&self, event: Event) {
        drop(self.events.send(event));
    }

    pub(super) fn candidate(&self, device_time: Duration, speed: &Speed) -> Candidate {
        Candidate {
            size: self.work.total(),
            started: self.is_started(),
            idle: device_time.saturating_sub(self.last_turn_end),
            turn: speed
                .step(&self.work)
                .unwrap_or_default()
                .max(self.last_turn),
        }
    }

    /// How long the device will probably work on the rest of it.
    pub(super) fn expected_rest(&self, speed: &Speed) -> Option<Duration> {
        speed.rest(&self.work, self.is_started(), self.steps_left)
    }

    pub(super) fn wants_preview(&self) -> bool {
        let done = self.total_steps.saturating_sub(self.steps_left);
        let every = self.options.preview_every;
        !self.is_abandoned
            && self.steps_left > 0
            && every.is_some_and(|n| done.is_multiple_of(n.get()))
    }
}
