//! What callers are told about the queue: positions, waiting times, and whether one more job is taken.

use std::time::{Duration, Instant};

use kiln_models::job::Job;

use super::Scheduler;
use crate::engine::cost::Progress;
use crate::engine::entry::Entry;
use crate::engine::forecast::{Course, Queued, courses};
use crate::engine::riders::Room;
use crate::engine::{Event, Forecast, SubmitError, SubmitOptions};

/// When to try again before anything has been measured.
const UNMEASURED_RETRY: Duration = Duration::from_secs(10);

impl Scheduler {
    pub(in crate::engine) fn forecast(
        &self,
        job: &Job,
        options: &SubmitOptions,
        now: Instant,
    ) -> Forecast {
        let work = self.work(job);
        let progress = Progress::none(job.sampling.steps);
        let asked = Queued {
            candidate: self.newcomer(job, &self.memory.all_plans(job), &work),
            work: &work,
            progress,
        };
        let courses = self.courses(Some(asked));
        let course = courses.last().copied().unwrap_or_default();
        Forecast {
            is_accepted: self.admit(options).is_ok()
                && self.fit_due(job.clone(), options, now).is_ok(),
            position: course.position,
            estimated_wait: course.wait,
            estimated_work: self.speed.rest(&work, progress),
        }
    }

    pub(super) fn refuse_if_full(&self) -> Result<(), SubmitError> {
        let counts = |entry: &&Entry| !entry.is_warm_up && !entry.outside_queue;
        let unfinished = self.entries.iter().filter(counts).count();
        if unfinished < self.max_unfinished {
            return Ok(());
        }
        let courses = self.courses(None);
        let ends: Option<Vec<Duration>> = courses.iter().map(|course| course.end).collect();
        let first = ends.and_then(|ends| ends.into_iter().min());
        Err(SubmitError::QueueFull {
            waiting: unfinished - 1,
            retry_after: first.unwrap_or(UNMEASURED_RETRY),
        })
    }

    /// Reports the positions of waiting jobs that have changed.
    pub(super) fn report_positions(&mut self) {
        let courses = self.courses(None);
        for (entry, course) in self.entries.iter_mut().zip(courses) {
            if !entry.is_started() && entry.reported_position != Some(course.position) {
                entry.reported_position = Some(course.position);
                let queued = Event::Queued {
                    position: course.position,
                    estimated_wait: course.wait,
                };
                self.events.push((entry.id, queued));
            }
        }
    }

    /// The expected course of every job, and of one that is not in the queue.
    fn courses(&self, asked: Option<Queued<'_>>) -> Vec<Course> {
        let entries = self.entries.iter().zip(self.candidates());
        let mut jobs: Vec<Queued<'_>> = entries
            .map(|(entry, candidate)| Queued {
                candidate,
                work: &entry.work,
                progress: entry.progress(),
            })
            .collect();
        jobs.extend(asked);
        let room = Room {
            places: if self.may_start_riders { usize::MAX } else { 0 },
            ..self.room()
        };
        courses(&jobs, &self.speed, room, self.max_started)
    }
}
