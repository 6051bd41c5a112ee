//! Jobs that wait, and the bell that wakes the painter's thread.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kiln_models::painter::{Job, JobId};
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};

use super::{Event, JobError, JobHandle, SubmitError};

/// Jobs that are advanced together.
const MAX_ACTIVE: usize = 1;
/// How long a job is thought to take before one has been seen.
const FIRST_GUESS: Duration = Duration::from_secs(10);

/// What the handles and the thread share.
#[derive(Debug)]
pub(super) struct Shared {
    queue: Mutex<Queue>,
    /// Rung when a job is submitted and when the engine is stopped.
    wake: Condvar,
}

#[derive(Debug)]
struct Queue {
    waiting: VecDeque<Waiting>,
    max_waiting: usize,
    /// Jobs the thread has taken from the queue and not yet ended.
    active: usize,
    next_id: JobId,
    stopped: bool,
    /// How long the last finished job ran.
    last_run: Duration,
}

#[derive(Debug)]
pub(super) struct Waiting {
    pub(super) id: JobId,
    pub(super) job: Job,
    pub(super) events: UnboundedSender<Event>,
    pub(super) submitted: Instant,
    position: usize,
}

/// What the thread should do next.
pub(super) enum Next {
    Start(Waiting),
    Advance,
    Stop,
}

impl Shared {
    pub(super) fn new(max_waiting: usize) -> Self {
        let queue = Queue {
            waiting: VecDeque::new(),
            max_waiting,
            active: 0,
            next_id: 0,
            stopped: false,
            last_run: FIRST_GUESS,
        };
        Self {
            queue: Mutex::new(queue),
            wake: Condvar::new(),
        }
    }

    /// No code that holds this lock can panic halfway, so a poisoned queue is a sound one.
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn submit(self: &Arc<Self>, job: Job) -> Result<JobHandle, SubmitError> {
        let (events, receiver) = unbounded_channel();
        let id = self.lock().push(job, events)?;
        self.wake.notify_one();
        Ok(JobHandle {
            id,
            events: receiver,
            shared: Arc::clone(self),
        })
    }

    /// Takes a job that waits out of the queue.
    pub(super) fn forget(&self, id: JobId) {
        let mut queue = self.lock();
        queue.waiting.retain(|waiting| waiting.id != id);
        queue.announce_positions();
    }

    pub(super) fn is_running(&self) -> bool {
        !self.lock().stopped
    }

    pub(super) fn stop(&self) {
        let waiting = {
            let mut queue = self.lock();
            queue.stopped = true;
            std::mem::take(&mut queue.waiting)
        };
        self.wake.notify_one();
        for waiting in waiting {
            tell(&waiting.events, Event::Failed(JobError::Stopped));
        }
    }

    /// A job has ended: `active` are left, and the ended one ran for `run` if it ran to its end.
    pub(super) fn ended(&self, active: usize, run: Option<Duration>) {
        let mut queue = self.lock();
        queue.active = active;
        queue.last_run = run.unwrap_or(queue.last_run);
    }

    /// Sleeps while there is nothing to do. `active` is how many jobs the thread has.
    pub(super) fn next(&self, active: usize) -> Next {
        let mut queue = self.lock();
        queue.active = active;
        loop {
            if queue.stopped {
                return Next::Stop;
            }
            if active < MAX_ACTIVE
                && let Some(waiting) = queue.waiting.pop_front()
            {
                queue.active += 1;
                queue.announce_positions();
                return Next::Start(waiting);
            }
            if active > 0 {
                return Next::Advance;
            }
            queue = self
                .wake
                .wait(queue)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Queue {
    fn push(&mut self, job: Job, events: UnboundedSender<Event>) -> Result<JobId, SubmitError> {
        if self.stopped {
            return Err(SubmitError::Stopped);
        }
        let position = self.waiting.len() + self.active;
        if position >= MAX_ACTIVE + self.max_waiting {
            let (waiting, retry_after) = (self.waiting.len(), self.last_run);
            return Err(SubmitError::QueueFull {
                waiting,
                retry_after,
            });
        }
        let id = self.next_id;
        self.next_id += 1;
        tell(&events, Event::Queued { position });
        self.waiting.push_back(Waiting {
            id,
            job,
            events,
            submitted: Instant::now(),
            position,
        });
        Ok(id)
    }

    fn announce_positions(&mut self) {
        for (index, waiting) in self.waiting.iter_mut().enumerate() {
            let position = self.active + index;
            if waiting.position != position {
                waiting.position = position;
                tell(&waiting.events, Event::Queued { position });
            }
        }
    }
}

/// Nobody may be listening any more; the thread notices that by itself.
pub(super) fn tell(events: &UnboundedSender<Event>, event: Event) {
    drop(events.send(event));
}
