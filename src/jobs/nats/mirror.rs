//! What a server knows of all jobs without asking: their metadata, from a consumer of the bucket that
//! sends headers only, and the progress of running ones. Lists, positions and counts come from here;
//! records do not.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_nats::jetstream::consumer::{DeliverPolicy, ReplayPolicy, push};
use async_nats::jetstream::stream::Stream;
use futures_util::StreamExt as _;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio::time::Instant;

use super::link::Link;
use super::names;
use super::records::{Meta, Record, read_meta};
use crate::jobs::{JobCounts, JobId, JobStatus, JobView, Owner, Progress, StoreError, StoredJob};

/// The mirror of one server.
#[derive(Debug, Default)]
pub(super) struct Mirror {
    state: Mutex<State>,
    /// Whether all jobs are known, and changes arrive.
    live: watch::Sender<bool>,
}

#[derive(Debug, Default)]
struct State {
    /// Counts the times that all jobs were read.
    generation: u64,
    jobs: HashMap<JobId, Entry>,
    /// Markers of deleted records: their subject, and when this server saw them.
    markers: HashMap<String, (u64, Instant)>,
    followers: HashMap<JobId, watch::Sender<u64>>,
}

#[derive(Debug, Clone)]
struct Entry {
    meta: Meta,
    revision: u64,
    generation: u64,
    progress: Option<Report>,
}

/// The progress of one attempt, as sent to all servers.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(super) struct Report {
    pub(super) attempt: u32,
    pub(super) progress: Progress,
}

/// A job as lists need it.
#[derive(Debug, Clone)]
pub(super) struct Listed {
    pub(super) id: JobId,
    pub(super) meta: Meta,
}

impl Mirror {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether all jobs are known, and changes arrive.
    pub(super) fn live(&self) -> watch::Receiver<bool> {
        self.live.subscribe()
    }

    /// Changes whenever a job does.
    pub(super) fn follow(&self, id: &JobId) -> watch::Receiver<u64> {
        let mut state = self.lock();
        let sender = state.followers.entry(id.clone());
        sender.or_insert_with(|| watch::channel(0).0).subscribe()
    }

    /// Takes over a record that this server has read or written.
    pub(super) fn apply(&self, record: &Record) {
        let subject = names::record_subject(&record.job.id, &record.job.owner);
        self.update(&subject, record.revision, Some(record.meta()));
    }

    /// Takes over the marker of a deleted record.
    pub(super) fn apply_deleted(&self, record: &Record, revision: u64) {
        let subject = names::record_subject(&record.job.id, &record.job.owner);
        self.update(&subject, revision, None);
    }

    fn update(&self, subject: &str, revision: u64, meta: Option<Meta>) {
        let Some(id) = names::record_id(subject) else {
            return;
        };
        let mut state = self.lock();
        let generation = state.generation;
        let known = state.jobs.get_mut(&id);
        let newest = known.as_ref().map_or(0, |entry| entry.revision);
        if let Some(entry) = known {
            entry.generation = generation;
        }
        if revision <= newest {
            return;
        }
        if let Some(meta) = meta {
            state.markers.remove(subject);
            let progress = state.jobs.get(&id).and_then(|entry| entry.progress);
            let entry = Entry {
                meta,
                revision,
                generation,
                progress,
            };
            state.jobs.insert(id.clone(), entry);
        } else {
            state.jobs.remove(&id);
            let marker = (revision, Instant::now());
            state.markers.insert(subject.to_owned(), marker);
        }
        state.notify(&id);
    }

    fn report(&self, id: &JobId, report: Report) {
        let mut state = self.lock();
        if let Some(entry) = state.jobs.get_mut(id) {
            entry.progress = Some(report);
            state.notify(id);
        }
    }

    /// The revision of a job's newest known record.
    pub(super) fn revision(&self, id: &JobId) -> Option<u64> {
        self.lock().jobs.get(id).map(|entry| entry.revision)
    }

    /// A job with its progress and its position.
    pub(super) fn view(&self, job: Arc<StoredJob>) -> JobView {
        let state = self.lock();
        let progress = match state.jobs.get(&job.id).and_then(|entry| entry.progress) {
            Some(report) if report.attempt == job.attempt && !is_queued(job.status) => {
                report.progress
            }
            _ => Progress::default(),
        };
        let position = state.position(&job);
        JobView {
            job,
            progress,
            position,
        }
    }

    /// The jobs of an owner, or of all, in no order.
    pub(super) fn listed(&self, owner: Option<&Owner>) -> Vec<Listed> {
        let state = self.lock();
        let of_owner = state
            .jobs
            .iter()
            .filter(|(_, entry)| owner.is_none_or(|owner| owner.as_str() == entry.meta.owner));
        let listed = of_owner.map(|(id, entry)| Listed {
            id: id.clone(),
            meta: entry.meta.clone(),
        });
        listed.collect()
    }

    /// Forgets a job that has no record.
    pub(super) fn forget(&self, id: &JobId) {
        self.lock().jobs.remove(id);
    }

    /// The number of waiting jobs of a model.
    pub(super) fn queued(&self, model: &str) -> usize {
        let state = self.lock();
        state.queued(model).count()
    }

    /// The numbers of a model's jobs, and the size of all files.
    pub(super) fn counts(&self, model: &str) -> JobCounts {
        let state = self.lock();
        let of_model = || {
            state
                .jobs
                .values()
                .filter(|entry| entry.meta.model == model)
        };
        let in_progress = of_model().filter(|entry| entry.meta.status == JobStatus::InProgress);
        JobCounts {
            queued: state.queued(model).count() as u64,
            in_progress: in_progress.count() as u64,
            oldest_queued_ms: state.queued(model).map(|(_, meta)| meta.created_ms).min(),
            bytes: Some(state.jobs.values().map(|entry| entry.meta.bytes).sum()),
        }
    }

    /// Markers of deleted records that are at least this old. They are not returned again.
    pub(super) fn take_markers(&self, age: Duration) -> Vec<(String, u64)> {
        let mut state = self.lock();
        let mut old = Vec::new();
        state.markers.retain(|subject, (revision, since)| {
            let is_old = since.elapsed() >= age;
            if is_old {
                old.push((subject.clone(), *revision));
            }
            !is_old
        });
        old
    }

    /// Reads all jobs, then their changes, until the connection is lost or made again.
    pub(super) async fn run(&self, link: &Link, records: &Stream<()>) {
        let mut connections = link.connections();
        connections.mark_unchanged();
        let ended = tokio::select! {
            ended = self.follow_all(link, records) => ended,
            _ = connections.changed() => link.unavailable("the connection has changed"),
        };
        self.live.send_replace(false);
        tracing::debug!("{ended}");
    }

    async fn follow_all(&self, link: &Link, records: &Stream<()>) -> StoreError {
        let mut progress = match link.client.subscribe(names::ALL_PROGRESS).await {
            Ok(progress) => progress,
            Err(error) => return link.unavailable(error),
        };
        let config = push::OrderedConfig {
            deliver_subject: link.client.new_inbox(),
            description: Some("kiln: metadata of all jobs".to_owned()),
            filter_subject: names::ALL_RECORDS.to_owned(),
            headers_only: true,
            replay_policy: ReplayPolicy::Instant,
            deliver_policy: DeliverPolicy::LastPerSubject,
            ..Default::default()
        };
        let consumer = match records.create_consumer(config).await {
            Ok(consumer) => consumer,
            Err(error) => return link.unavailable(error),
        };
        let mut pending = consumer.cached_info().num_pending;
        let mut messages = match consumer.messages().await {
            Ok(messages) => messages,
            Err(error) => return link.unavailable(error),
        };
        self.lock().generation += 1;
        let mut complete = false;
        loop {
            if pending == 0 && !complete {
                complete = true;
                self.complete();
            }
            tokio::select! {
                Some(message) = progress.next() => {
                    let report = serde_json::from_slice(&message.payload).ok();
                    if let (Some(id), Some(report)) = (names::id_of(&message.subject), report) {
                        self.report(&id, report);
                    }
                }
                message = messages.next() => {
                    let message = match message {
                        Some(Ok(message)) => message,
                        Some(Err(error)) => return link.unavailable(error),
                        None => return link.unavailable("the watch of all jobs ended"),
                    };
                    let Ok(info) = message.info() else {
                        return link.unavailable("a message without a sequence");
                    };
                    pending = info.pending;
                    let meta = read_meta(message.headers.as_ref());
                    self.update(&message.subject, info.stream_sequence, meta);
                }
            }
        }
    }

    /// All jobs were read: those that were not among them are gone.
    fn complete(&self) {
        let mut state = self.lock();
        let generation = state.generation;
        state.jobs.retain(|_, entry| entry.generation == generation);
        state
            .followers
            .retain(|_, sender| sender.receiver_count() > 0);
        for sender in state.followers.values() {
            sender.send_modify(|count| *count += 1);
        }
        drop(state);
        self.live.send_replace(true);
    }
}

impl State {
    fn notify(&mut self, id: &JobId) {
        if let Some(sender) = self.followers.get(id) {
            if sender.receiver_count() == 0 {
                self.followers.remove(id);
            } else {
                sender.send_modify(|count| *count += 1);
            }
        }
    }

    fn queued<'a>(&'a self, model: &'a str) -> impl Iterator<Item = (&'a JobId, &'a Meta)> {
        let of_model = self.jobs.iter().map(|(id, entry)| (id, &entry.meta));
        of_model.filter(move |(_, meta)| is_queued(meta.status) && meta.model == model)
    }

    /// Number of jobs of the same model that were made before a waiting one.
    fn position(&self, job: &StoredJob) -> Option<usize> {
        let own = &self.jobs.get(&job.id)?.meta;
        if !is_queued(job.status) || !is_queued(own.status) {
            return None;
        }
        let before = self.queued(&own.model);
        let before =
            before.filter(|(other, meta)| (meta.created_ms, *other) < (own.created_ms, &job.id));
        Some(before.count())
    }
}

const fn is_queued(status: JobStatus) -> bool {
    matches!(status, JobStatus::Queued)
}
