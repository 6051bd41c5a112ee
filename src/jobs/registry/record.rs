//! One job as the registry keeps it.

use std::time::{Duration, Instant};

use bytes::Bytes;

use crate::jobs::Caller;

/// A job as it was when it was looked up.
#[derive(Debug, Clone)]
pub struct JobRecord<R> {
    pub id: String,
    pub owner: Caller,
    pub state: JobState,
    /// Denoising steps of the whole job.
    pub steps: usize,
    /// When the job was added to the registry.
    pub created: Instant,
    /// The newest preview as a PNG file. It is dropped when the job ends.
    pub preview: Option<Bytes>,
    /// The result that [`JobGuard::done`](super::JobGuard::done) or
    /// [`JobGuard::failed`](super::JobGuard::failed) left.
    pub result: Option<R>,
    pub(super) progress: Progress,
    /// When the job ended; `None` while it is unfinished.
    pub(super) ended: Option<Instant>,
}

/// How far a job is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum JobState {
    /// The first denoising step is not over.
    Queued,
    /// `step` of `total` denoising steps are over; `step` is at least 1.
    Running {
        step: usize,
        total: usize,
    },
    Done,
    Failed,
    /// Ended without a result: the owner cancelled the job, or the task that ran it was dropped.
    Cancelled,
}

/// Times from which the remaining time is estimated.
#[derive(Debug, Clone, Copy)]
pub(super) struct Progress {
    /// Time of the last update of the queue position, and the wait that was estimated then.
    pub(super) queued: (Instant, Option<Duration>),
    /// Ends of the first and of the latest step.
    pub(super) stepped: Option<(Instant, Instant)>,
}

impl JobState {
    pub fn is_ended(self) -> bool {
        matches!(self, Self::Done | Self::Failed | Self::Cancelled)
    }
}

impl<R> JobRecord<R> {
    pub(super) fn new(id: &str, owner: Caller, steps: usize, now: Instant) -> Self {
        Self {
            id: id.to_owned(),
            owner,
            state: JobState::Queued,
            steps,
            created: now,
            preview: None,
            result: None,
            progress: Progress {
                queued: (now, None),
                stepped: None,
            },
            ended: None,
        }
    }

    /// Denoising steps that are over: all of them once the job is done, 0 if it failed or was
    /// cancelled.
    pub fn steps_done(&self) -> usize {
        match self.state {
            JobState::Running { step, .. } => step,
            JobState::Done => self.steps,
            JobState::Queued | JobState::Failed | JobState::Cancelled => 0,
        }
    }

    /// Estimates the time until the last step is over, from the mean time of the steps so far.
    /// While the job waits, it is the time until its first step; zero if that is unknown.
    pub fn remaining(&self, now: Instant) -> Duration {
        if self.state.is_ended() {
            return Duration::ZERO;
        }
        let done = self.steps_done();
        let left = self.steps.saturating_sub(done) as u32;
        let (queued, wait) = self.progress.queued;
        match self.progress.stepped {
            None => wait
                .unwrap_or_default()
                .saturating_sub(now.saturating_duration_since(queued)),
            Some((first, last)) if done > 1 => {
                last.saturating_duration_since(first) / (done as u32 - 1) * left
            }
            Some((first, _)) => first.saturating_duration_since(queued) * left,
        }
    }
}
