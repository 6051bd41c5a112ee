//! What is known of jobs in memory alone: the order of the queue, leases, progress, and who watches.
//!
//! The database is the truth. Each change of it is applied here after its commit, in the same order.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use super::fault::Fault;
use super::tables::{Row, Tables};
use crate::jobs::{JobId, JobStatus, JobView, Progress, Revoked};

#[derive(Debug, Default)]
pub(super) struct Live {
    /// By model, in the order of their numbers.
    queues: HashMap<String, Vec<Waiting>>,
    running: HashMap<JobId, Running>,
    watched: HashMap<JobId, Watched>,
    webhooks: HashMap<JobId, Webhook>,
    /// Size of all files.
    pub(super) bytes: u64,
    /// Number of changes so far.
    pub(super) version: u64,
    tokens: u64,
}

/// A queued job.
#[derive(Debug)]
struct Waiting {
    sequence: u64,
    id: JobId,
    created_ms: u64,
    /// When it may be taken; `None` for at once.
    ready: Option<Instant>,
}

/// A lease.
#[derive(Debug)]
pub(super) struct Running {
    pub(super) token: u64,
    /// End of the lease, unless it is extended.
    deadline: Instant,
    /// Whether the attempt counts if the lease is lost.
    counts: bool,
    /// Wait before the next attempt if the lease is lost.
    delay: Duration,
    progress: Progress,
    revoke: watch::Sender<Option<Revoked>>,
}

#[derive(Debug)]
struct Watched {
    sequence: u64,
    sender: watch::Sender<JobView>,
}

/// A webhook that is not settled.
#[derive(Debug)]
struct Webhook {
    due_ms: u64,
    tries: u32,
    /// The lease of who sends it.
    token: Option<u64>,
    /// Earliest time of the next try after a lease that was dropped.
    not_before: Option<Instant>,
}

/// A committed change.
#[derive(Debug)]
pub(super) enum Change {
    Stored {
        row: Row,
        /// The lease of a job that was taken.
        lease: Option<Running>,
        /// When a queued job may be taken.
        ready: Option<Instant>,
    },
    /// A job whose record cannot be read is no longer queued.
    SetAside {
        id: JobId,
    },
    Removed {
        id: JobId,
        bytes: u64,
    },
    /// The next try of a webhook; `None` if there is none.
    Webhook {
        id: JobId,
        next: Option<(u64, u32)>,
    },
}

/// What there is to take.
#[derive(Debug)]
pub(super) enum Next<T> {
    Now(T),
    /// Nothing before this time, if nothing changes.
    At(Option<Instant>),
}

impl Live {
    /// Reads the state of a database that was just opened. Leases and watchers stay.
    pub(super) fn reload(&mut self, tables: &Tables<'_>) -> Result<(), Fault> {
        self.queues.clear();
        for queued in tables.queued()? {
            let queue = self.queues.entry(queued.model).or_default();
            queue.push(Waiting {
                sequence: queued.sequence,
                id: queued.id,
                created_ms: queued.created_ms,
                ready: None,
            });
        }
        self.webhooks.clear();
        for (id, due_ms, tries) in tables.webhooks()? {
            self.webhooks.insert(id, Webhook::new(due_ms, tries));
        }
        self.bytes = tables.bytes()?;
        self.version += 1;
        Ok(())
    }

    pub(super) fn apply(&mut self, changes: Vec<Change>) {
        for change in changes {
            match change {
                Change::Stored { row, lease, ready } => self.stored(&row, lease, ready),
                Change::SetAside { id } => {
                    for queue in self.queues.values_mut() {
                        queue.retain(|waiting| waiting.id != id);
                    }
                    self.running.remove(&id);
                    self.watched.remove(&id);
                }
                Change::Removed { id, bytes } => {
                    self.bytes = self.bytes.saturating_sub(bytes);
                    self.webhooks.remove(&id);
                    self.watched.remove(&id);
                }
                Change::Webhook { id, next: None } => {
                    self.webhooks.remove(&id);
                }
                Change::Webhook {
                    id,
                    next: Some((due_ms, tries)),
                } => {
                    self.webhooks.insert(id, Webhook::new(due_ms, tries));
                }
            }
        }
        self.version += 1;
        self.publish_positions();
    }

    fn stored(&mut self, row: &Row, lease: Option<Running>, ready: Option<Instant>) {
        let job = &row.job;
        let queue = self.queues.entry(job.model.clone()).or_default();
        let place = queue.binary_search_by_key(&row.sequence, |waiting| waiting.sequence);
        match place {
            Ok(at) if job.status == JobStatus::Queued => queue[at].ready = ready,
            Ok(at) => {
                queue.remove(at);
            }
            Err(at) if job.status == JobStatus::Queued => queue.insert(
                at,
                Waiting {
                    sequence: row.sequence,
                    id: job.id.clone(),
                    created_ms: job.created_ms,
                    ready,
                },
            ),
            Err(_) => {}
        }
        let old = match lease {
            Some(lease) => self.running.insert(job.id.clone(), lease),
            None => self.running.remove(&job.id),
        };
        if let Some(old) = old {
            let why = match job.status {
                JobStatus::Cancelled => Revoked::Cancelled,
                _ => Revoked::Lost,
            };
            old.revoke.send_replace(Some(why));
        }
        if job.status.is_ended() {
            self.bytes += row.bytes();
            if job.webhook.is_some() {
                let due_ms = job.ended_ms.unwrap_or_default();
                self.webhooks
                    .insert(job.id.clone(), Webhook::new(due_ms, 0));
            }
        }
        if let Some(watched) = self.watched.get(&job.id) {
            watched.sender.send_replace(self.view(row));
        }
        if job.status.is_ended() {
            self.watched.remove(&job.id);
        }
    }

    fn publish_positions(&mut self) {
        self.watched
            .retain(|_, watched| !watched.sender.is_closed());
        for watched in self.watched.values() {
            watched.sender.send_if_modified(|view| {
                let position = position(&self.queues, watched.sequence, view);
                std::mem::replace(&mut view.position, position) != position
            });
        }
    }

    pub(super) fn view(&self, row: &Row) -> JobView {
        let running = self.running.get(&row.job.id);
        let progress = running.filter(|_| row.job.status == JobStatus::InProgress);
        let mut view = JobView {
            job: Arc::clone(&row.job),
            progress: progress.map_or_else(Progress::default, |running| running.progress),
            position: None,
        };
        view.position = position(&self.queues, row.sequence, &view);
        view
    }

    /// Follows a job that somebody follows already.
    pub(super) fn subscribe(&self, id: &JobId) -> Option<watch::Receiver<JobView>> {
        Some(self.watched.get(id)?.sender.subscribe())
    }

    /// Follows a job. One that has ended does not change.
    pub(super) fn watch(&mut self, row: &Row) -> watch::Receiver<JobView> {
        // Another one may have begun while the record was read.
        if let Some(receiver) = self.subscribe(&row.job.id) {
            return receiver;
        }
        let (sender, receiver) = watch::channel(self.view(row));
        if !row.job.status.is_ended() {
            let sequence = row.sequence;
            let watched = Watched { sequence, sender };
            self.watched.insert(row.job.id.clone(), watched);
        }
        receiver
    }

    /// Jobs of a model that wait, and when the first of them was made.
    pub(super) fn queued(&self, model: &str) -> (usize, Option<u64>) {
        let queue = self.queues.get(model).map_or(&[][..], Vec::as_slice);
        (queue.len(), queue.first().map(|first| first.created_ms))
    }

    /// Models other than this one that jobs wait for, and the number of these jobs.
    pub(super) fn other_models(&self, model: &str) -> Vec<(String, usize)> {
        let others = self.queues.iter();
        let mut others: Vec<_> = others
            .filter(|(other, queue)| *other != model && !queue.is_empty())
            .map(|(other, queue)| (other.clone(), queue.len()))
            .collect();
        others.sort();
        others
    }

    pub(super) fn running(&self) -> usize {
        self.running.len()
    }

    /// The next job of a model to take: its number and its id.
    pub(super) fn next_job(&self, model: &str, now: Instant) -> Next<(u64, JobId)> {
        let queue = self.queues.get(model).map_or(&[][..], Vec::as_slice);
        let is_ready = |waiting: &&Waiting| waiting.ready.is_none_or(|ready| ready <= now);
        if let Some(first) = queue.iter().find(is_ready) {
            return Next::Now((first.sequence, first.id.clone()));
        }
        let ready = queue.iter().filter_map(|waiting| waiting.ready);
        let lost = self.running.values().map(|running| running.deadline);
        Next::At(ready.chain(lost).min())
    }

    /// Whether the attempt of a job in progress counts, and the wait before the next one, if its worker is
    /// gone; else `None`.
    pub(super) fn lost(&self, id: &JobId, now: Instant) -> Option<(bool, Duration)> {
        match self.running.get(id) {
            None => Some((true, Duration::ZERO)),
            Some(running) if running.deadline <= now => Some((running.counts, running.delay)),
            Some(_) => None,
        }
    }

    pub(super) fn any_lost(&self, now: Instant) -> bool {
        let mut running = self.running.values();
        running.any(|running| running.deadline <= now)
    }

    /// A lease that ends at `deadline`, and what tells its holder that it was revoked.
    pub(super) fn lease(
        &mut self,
        deadline: Instant,
    ) -> (Running, watch::Receiver<Option<Revoked>>) {
        let (revoke, revoked) = watch::channel(None);
        let running = Running {
            token: self.token(),
            deadline,
            counts: true,
            delay: Duration::ZERO,
            progress: Progress::default(),
            revoke,
        };
        (running, revoked)
    }

    fn token(&mut self) -> u64 {
        self.tokens += 1;
        self.tokens
    }

    pub(super) fn holds(&self, id: &JobId, token: u64) -> bool {
        let running = self.running.get(id);
        running.is_some_and(|running| running.token == token)
    }

    fn held(&mut self, id: &JobId, token: u64) -> Option<&mut Running> {
        let running = self.running.get_mut(id);
        running.filter(|running| running.token == token)
    }

    pub(super) fn extend(&mut self, id: &JobId, token: u64, deadline: Instant) {
        if let Some(running) = self.held(id, token) {
            running.deadline = deadline;
        }
    }

    /// Ends a lease whose holder is gone. `counts` says whether its attempt counts.
    pub(super) fn abandon(&mut self, id: &JobId, token: u64, counts: bool, delay: Duration) {
        if let Some(running) = self.held(id, token) {
            running.deadline = Instant::now();
            running.counts = counts;
            running.delay = delay;
        }
    }

    pub(super) fn report(&mut self, id: &JobId, token: u64, progress: Progress) {
        let Some(running) = self.held(id, token) else {
            return;
        };
        running.progress = progress;
        if let Some(watched) = self.watched.get(id) {
            watched.sender.send_modify(|view| view.progress = progress);
        }
    }

    /// Takes the webhook that is due first: its id, its lease and the number of tries before.
    pub(super) fn next_webhook(&mut self, now_ms: u64, now: Instant) -> Next<(JobId, u64, u32)> {
        let free = self
            .webhooks
            .iter()
            .filter(|(_, webhook)| webhook.token.is_none());
        // The time until which each one waits.
        let wait = |webhook: &Webhook| {
            let due = now + Duration::from_millis(webhook.due_ms.saturating_sub(now_ms));
            webhook
                .not_before
                .map_or(due, |not_before| due.max(not_before))
        };
        let first = free.min_by_key(|(_, webhook)| (wait(webhook), webhook.due_ms));
        let Some((id, webhook)) = first else {
            return Next::At(None);
        };
        let at = wait(webhook);
        if at > now {
            return Next::At(Some(at));
        }
        let (id, tries) = (id.clone(), webhook.tries);
        let token = self.token();
        if let Some(webhook) = self.webhooks.get_mut(&id) {
            webhook.token = Some(token);
        }
        Next::Now((id, token, tries))
    }

    pub(super) fn holds_webhook(&self, id: &JobId, token: u64) -> bool {
        let webhook = self.webhooks.get(id);
        webhook.is_some_and(|webhook| webhook.token == Some(token))
    }

    /// Makes a webhook available again whose sender is gone.
    pub(super) fn abandon_webhook(&mut self, id: &JobId, token: u64, not_before: Option<Instant>) {
        let webhook = self.webhooks.get_mut(id);
        if let Some(webhook) = webhook.filter(|webhook| webhook.token == Some(token)) {
            webhook.token = None;
            webhook.not_before = not_before;
        }
    }
}

impl Webhook {
    fn new(due_ms: u64, tries: u32) -> Self {
        Self {
            due_ms,
            tries,
            token: None,
            not_before: None,
        }
    }
}

/// Number of jobs before a queued one.
fn position(
    queues: &HashMap<String, Vec<Waiting>>,
    sequence: u64,
    view: &JobView,
) -> Option<usize> {
    if view.job.status != JobStatus::Queued {
        return None;
    }
    let queue = queues.get(&view.job.model)?;
    Some(queue.partition_point(|waiting| waiting.sequence < sequence))
}
