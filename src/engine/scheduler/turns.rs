//! What the scheduler plans next: the ends that are due, previews, and the turn of a job.

use std::ops::ControlFlow;
use std::time::Instant;

use super::{End, Scheduler};
use crate::engine::entry::Entry;
use crate::engine::memory::Turn;
use crate::engine::plan::Plan;
use crate::engine::policy::{next_started, next_turn};
use crate::engine::{JobError, State};

impl Scheduler {
    pub(super) fn choose(&mut self, now: Instant) -> Plan {
        let is_draining = matches!(self.state, State::Draining);
        if is_draining && self.stop_at.is_some_and(|at| at <= now) {
            self.stop_now(now);
        }
        while let Some((index, end)) = self.first_to_end(now) {
            let (id, is_started) = (self.entries[index].id, self.entries[index].is_started());
            self.end(index, end, now);
            if is_started {
                return Plan::Discard(id);
            }
        }
        if let Some(entry) = self.entries.iter_mut().find(|entry| entry.is_preview_due) {
            entry.is_preview_due = false;
            return Plan::Preview(entry.id);
        }
        if let Some(plan) = self.calibrate() {
            return plan;
        }
        let next = match self.next(now) {
            ControlFlow::Continue(next) => next,
            ControlFlow::Break(plan) => return plan,
        };
        let next = next.filter(|index| *index < self.entries.len());
        let Some(index) = next else {
            return match self.state {
                State::Starting | State::Ready => Plan::Sleep,
                State::Draining => {
                    self.state = State::Stopped;
                    Plan::End
                }
                State::Stopped | State::Failed(_) => Plan::End,
            };
        };
        let entry = &self.entries[index];
        let has_step = entry.is_started() && entry.steps_left > 0;
        if has_step
            && !self.is_in_danger(now)
            && let Some(plan) = self.upload_ahead()
        {
            return plan;
        }
        let entry = &mut self.entries[index];
        if !entry.is_started() {
            let plan = self.start(index, now);
            self.entries[index].own_turns += usize::from(matches!(plan, Plan::Start(..)));
            return plan;
        }
        entry.own_turns += 1;
        if entry.steps_left > 0 {
            self.step(index, now)
        } else {
            Plan::Finish(entry.id)
        }
    }

    /// The first job that must not go on, and how it ends.
    fn first_to_end(&self, now: Instant) -> Option<(usize, End)> {
        // The error that ends every job.
        let (over, is_starting) = match &self.state {
            State::Stopped => (Some(JobError::Stopped), false),
            State::Failed(error) => (Some(error.of_others()), false),
            State::Starting => (None, true),
            State::Ready | State::Draining => (None, false),
        };
        let end = |entry: &Entry| {
            if entry.is_abandoned {
                Some(End::Cancelled)
            } else if let Some(error) = over.as_ref().filter(|_| entry.is_started()) {
                Some(End::Failed(error.clone()))
            } else if over.is_some() || (entry.is_warm_up && !is_starting) {
                Some(End::Failed(JobError::Stopped))
            } else if entry.deadline.is_some_and(|at| at <= now) {
                Some(End::Failed(JobError::DeadlinePassed))
            } else {
                let late = self.too_late(entry, now);
                late.map(|late| End::Failed(JobError::TooLate { late }))
            }
        };
        let mut entries = self.entries.iter().enumerate();
        entries.find_map(|(index, entry)| Some((index, end(entry)?)))
    }

    /// The job that has the next turn, for which there is memory; or what must be done first.
    fn next(&mut self, now: Instant) -> ControlFlow<Plan, Option<usize>> {
        let mut next = match self.state {
            // The warm-up comes before every other job.
            State::Starting => Some(0),
            _ => next_turn(&self.due_candidates(now), self.max_started),
        };
        while let Some(index) = next.filter(|index| *index < self.entries.len()) {
            let id = self.entries[index].id;
            let is_started = self.entries[index].is_started();
            match self.turn(index) {
                Turn::Take => break,
                Turn::Measure { drop_caches } => {
                    return ControlFlow::Break(Plan::Measure { drop_caches });
                }
                Turn::Wait => {
                    // Riders would take the memory, or the room for adapters, for which the job waits.
                    self.may_start_riders = false;
                    next = next_started(&self.due_candidates(now));
                }
                Turn::Decode(decoding) => {
                    self.entries[index].plans.retain(|(it, _)| *it >= decoding);
                    if is_started {
                        return ControlFlow::Break(Plan::Decode(id, decoding));
                    }
                }
                Turn::Refuse(error) => {
                    self.end(index, End::Failed(error), now);
                    return ControlFlow::Break(if is_started {
                        Plan::Discard(id)
                    } else {
                        self.choose(now)
                    });
                }
            }
        }
        ControlFlow::Continue(next)
    }
}
