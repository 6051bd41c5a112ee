//! Adapters: uploads before a job is started, and what is counted by adapter.

use std::collections::BTreeSet;
use std::time::Duration;

use kiln_models::job::{Job, JobId};

use super::Scheduler;
use crate::engine::adapters::{AdapterNeed, JobAdapter, Upload, distinct, in_use, missing};
use crate::engine::cost::Work;
use crate::engine::entry::Entry;
use crate::engine::memory::{Plans, Turn};
use crate::engine::plan::Plan;
use crate::engine::policy::Candidate;
use crate::engine::stats::AdapterStats;

/// For this many waiting jobs adapters are uploaded ahead.
const MAX_AHEAD: usize = 4;

impl Scheduler {
    /// Whether there is memory for the next call for a job, and room for its adapters.
    pub(super) fn turn(&self, index: usize) -> Turn {
        let entry = &self.entries[index];
        let need = self.adapter_need(entry, &in_use(&self.entries));
        if need == AdapterNeed::Waits {
            return Turn::Wait;
        }
        self.memory.turn(&self.entries, index)
    }

    pub(super) fn adapter_need(&self, entry: &Entry, in_use: &[&JobAdapter]) -> AdapterNeed {
        if entry.is_started() && !entry.adapters.is_empty() {
            return AdapterNeed::Fits;
        }
        self.adapter_room.need(&entry.adapters, in_use)
    }

    /// Uploads the adapters of a job that is about to be started. `None` if that was tried before, or if
    /// the started jobs have them all.
    pub(super) fn upload(&mut self, index: usize) -> Option<Plan> {
        let entry = &self.entries[index];
        let is_missing = missing(&entry.adapters, &in_use(&self.entries)) > 0;
        if entry.upload != Upload::Due || !is_missing {
            return None;
        }
        Some(self.uploading(index))
    }

    /// Uploads the adapters of the next waiting job whose adapters fit beside those of the started jobs
    /// and of the waiting ones before it.
    pub(super) fn upload_ahead(&mut self) -> Option<Plan> {
        let waiting = self.entries.iter().enumerate();
        let mut waiting = waiting
            .filter(|(_, entry)| !entry.is_started() && !entry.adapters.is_empty())
            .take(MAX_AHEAD);
        let (index, next) = waiting.find(|(_, entry)| entry.upload == Upload::Due)?;
        let is_held = |entry: &&Entry| entry.is_started() || entry.upload == Upload::Done;
        let held = self.entries.iter().filter(is_held);
        let held = distinct(held.flat_map(|entry| &entry.adapters));
        let bytes = missing(&next.adapters, &held);
        let fits = self.adapter_room.fits_beside(&next.adapters, &held)
            && self.memory.fits_besides(bytes, &self.entries);
        if bytes == 0 || !fits {
            return None;
        }
        Some(self.uploading(index))
    }

    fn uploading(&mut self, index: usize) -> Plan {
        let entry = &mut self.entries[index];
        entry.upload = Upload::Tried;
        let adapters = entry.adapters.iter();
        Plan::LoadAdapters(entry.id, adapters.map(|it| it.used.clone()).collect())
    }

    /// Books an upload. Its time counts as the job's encoding, and says nothing about the speed.
    pub(super) fn book_upload(&mut self, id: JobId, is_done: bool, took: Duration) {
        let Some(index) = self.position_of(id) else {
            return;
        };
        let entry = &mut self.entries[index];
        entry.timings.encode += took;
        if is_done {
            entry.upload = Upload::Done;
        }
    }

    /// A job that has not been submitted, as the policy sees it.
    pub(super) fn newcomer(&self, job: &Job, plans: &Plans, work: &Work) -> Candidate {
        let adapters = self.adapter_room.adapters_of(job);
        let in_use = in_use(&self.entries);
        let more = missing(&adapters, &in_use);
        let is_alone = |plan| self.memory.is_alone(plan, more, &self.entries);
        Candidate {
            alone: plans.first().is_some_and(|(_, plan)| is_alone(plan)),
            adapters: self.adapter_room.need(&adapters, &in_use),
            ..Candidate::newcomer(work, job.sampling.steps)
        }
    }

    /// The pipeline has dropped what no started job uses.
    pub(super) fn forget_uploads(&mut self) {
        for entry in &mut self.entries {
            if entry.upload == Upload::Done {
                entry.upload = Upload::Tried;
            }
        }
    }

    /// What is known of adapters now.
    pub(super) fn adapter_stats(&self) -> AdapterStats {
        let names = |started: bool| -> BTreeSet<String> {
            let jobs = self.entries.iter().filter(|it| it.is_started() == started);
            jobs.flat_map(|entry| names(&entry.adapters)).collect()
        };
        let max_running = self.adapter_room.count_of(self.largest_adapter);
        AdapterStats {
            waiting: names(false),
            running: names(true),
            max_running: max_running.clamp(1, self.max_started),
            ..self.stats.adapters.clone()
        }
    }
}

/// Names of adapters.
pub(super) fn names(adapters: &[JobAdapter]) -> impl Iterator<Item = String> {
    let names = adapters.iter().map(|it| it.used.adapter.name());
    names.map(str::to_owned)
}
