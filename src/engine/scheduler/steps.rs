//! Steps of several jobs: who rides, what a step took, and the budget.

use std::time::{Duration, Instant};

use kiln_models::job::JobId;
use kiln_models::pipeline::StepOutcome;

use super::Scheduler;
use crate::engine::cost::{Stage, shares};
use crate::engine::entry::{Encoding, Entry};
use crate::engine::memory::Turn;
use crate::engine::plan::Plan;
use crate::engine::riders::{Budget, Rider, Room, riders};
use crate::engine::{Event, JobError, State};

/// Most jobs whose prompts are encoded together.
const MAX_ENCODED: usize = 4;

/// How a step of a job ended, and how long it took or which part of a shared step it had.
type Ended = (JobId, Result<StepOutcome, JobError>, Duration);

impl Scheduler {
    /// Starts a waiting job. Its adapters are uploaded first, and its prompts encoded together with those of
    /// other waiting jobs.
    pub(super) fn start(&mut self, index: usize, now: Instant) -> Plan {
        if let Some(plan) = self.upload(index).or_else(|| self.encode_together(index)) {
            return plan;
        }
        self.make_cheaper(index, now);
        let entry = &mut self.entries[index];
        let id = entry.id;
        let Some(mut job) = entry.waiting.take() else {
            // Only waiting jobs are started.
            return Plan::Discard(id);
        };
        if let Some((decoding, _)) = entry.plans.first() {
            job.decoding = *decoding;
        }
        let waited = now.saturating_duration_since(entry.submitted);
        entry.timings.queue = waited.saturating_sub(entry.timings.encode);
        self.events.push((id, Event::Started));
        self.report_positions();
        Plan::Start(id, job)
    }

    fn encode_together(&mut self, index: usize) -> Option<Plan> {
        let first = &self.entries[index];
        if !self.budget.packs() || first.is_warm_up || first.encoding == Encoding::Tried {
            return None;
        }
        let is_left = |entry: &Entry| !entry.is_started() && entry.encoding == Encoding::Due;
        let others = (0..self.entries.len()).filter(|&it| it != index);
        let others = others.filter(|&it| is_left(&self.entries[it]));
        let mut together = 0_u64;
        let mut chosen = Vec::new();
        for it in std::iter::once(index).chain(others).take(MAX_ENCODED) {
            together = together.saturating_add(self.entries[it].plan().start);
            if !self.memory.fits_together(together, &self.entries) {
                break;
            }
            chosen.push(it);
        }
        if chosen.len() < 2 {
            return None;
        }
        let mut ids = Vec::with_capacity(chosen.len());
        let mut prompts = Vec::new();
        for it in chosen {
            let entry = &mut self.entries[it];
            entry.encoding = Encoding::Tried;
            ids.push(entry.id);
            let job = entry.waiting.as_ref();
            prompts.extend(job.into_iter().flat_map(|job| job.branches().cloned()));
        }
        Some(Plan::Encode(ids, prompts))
    }

    pub(super) fn book_encoding(&mut self, ids: &[JobId], is_done: bool, took: Duration) {
        if !is_done {
            return;
        }
        let encoded = self.entries.iter_mut().filter(|it| ids.contains(&it.id));
        let mut encoded: Vec<&mut Entry> = encoded.collect();
        let works: Vec<f64> = encoded
            .iter_mut()
            .map(|entry| std::mem::take(&mut entry.work.encode))
            .collect();
        for (entry, share) in encoded.into_iter().zip(shares(took, &works)) {
            entry.timings.encode += share;
        }
        let work: f64 = works.iter().sum();
        if work > 0.0 {
            self.speed.add(Stage::Encode, work, took);
        }
    }

    /// A step of the job that has the turn, and of others that ride along; or what comes before it.
    pub(super) fn step(&mut self, index: usize, now: Instant) -> Plan {
        let mut pack = self.pack(index, now);
        while let Some(&rider) = pack.iter().find(|&&it| !self.entries[it].is_started()) {
            match self.turn(rider) {
                Turn::Take => return self.start(rider, now),
                Turn::Measure { drop_caches: false } => {
                    return Plan::Measure { drop_caches: false };
                }
                _ => {
                    self.may_start_riders = false;
                    pack = self.pack(index, now);
                }
            }
        }
        let memory = |it: usize| self.entries[it].plan().step;
        let mut step_memory = memory(index);
        let mut ids = vec![self.entries[index].id];
        for rider in pack {
            let together = step_memory.saturating_add(memory(rider));
            if self.memory.fits_together(together, &self.entries) {
                step_memory = together;
                ids.push(self.entries[rider].id);
            }
        }
        self.step_memory = step_memory;
        Plan::Step(ids)
    }

    /// The jobs that ride with the one that has the turn.
    fn pack(&self, index: usize, now: Instant) -> Vec<usize> {
        // The warm-up has the engine for itself.
        if matches!(self.state, State::Starting) {
            return Vec::new();
        }
        let candidates = self.candidates();
        let jobs: Vec<Rider<'_>> = self
            .entries
            .iter()
            .zip(&candidates)
            .map(|(entry, candidate)| Rider {
                work: &entry.work,
                started: candidate.started,
                alone: candidate.alone,
                adapters: candidate.adapters,
                has_steps: entry.steps_left > 0,
            })
            .collect();
        let mut room = self.room();
        if self.is_in_danger(now) {
            // Riders would delay the job that goes first, except on a device that has nothing to do.
            room.budget = Budget::new(0);
        }
        riders(&jobs, index, room)
    }

    /// What all choices of riders share now.
    pub(super) fn room(&self) -> Room {
        let started = self.entries.iter().filter(|it| it.is_started()).count();
        let devices = self.speed.devices();
        Room {
            budget: self.budget,
            devices,
            fixed: self.speed.fixed(),
            places: if self.may_start_riders {
                Room::places(self.max_started, started, devices)
            } else {
                0
            },
        }
    }

    /// Books one step of several jobs: each has the part of the time that its work is of theirs.
    pub(super) fn book_step(
        &mut self,
        jobs: Vec<(JobId, Result<StepOutcome, JobError>)>,
        took: Duration,
        now: Instant,
    ) {
        let all = self.units_of(&jobs);
        let units = all.concat();
        // The time of a failed call says nothing about the speed.
        if jobs.iter().all(|(_, step)| step.is_ok()) {
            self.measure_step(&jobs, &units, took);
            self.budget.succeed();
        }
        let works: Vec<f64> = all.iter().map(|units| units.iter().sum()).collect();
        let is_shared = jobs.len() > 1;
        let shares = shares(took, &works);
        let steps = jobs.into_iter().zip(shares);
        for ended in steps.map(|((id, step), share)| (id, step, share)) {
            self.book_step_of(ended, took, is_shared, now);
        }
    }

    /// Books the steps of jobs that were stepped one by one, because their common step failed. The
    /// failed step's time belongs to no job and says nothing about the speed.
    pub(super) fn book_steps_alone(&mut self, jobs: Vec<Ended>, now: Instant) {
        self.budget.fail();
        for (id, step, took) in jobs {
            let one = [(id, step)];
            if one[0].1.is_ok() {
                let units = self.units_of(&one).concat();
                self.measure_step(&one, &units, took);
            }
            let [(id, step)] = one;
            self.book_step_of((id, step, took), took, false, now);
        }
    }

    fn units_of(&self, jobs: &[(JobId, Result<StepOutcome, JobError>)]) -> Vec<Vec<f64>> {
        let units_of = |(id, step): &(JobId, Result<StepOutcome, JobError>)| {
            let Some(index) = self.position_of(*id) else {
                return Vec::new();
            };
            let entry = &self.entries[index];
            let step = step.as_ref();
            step.map_or_else(
                |_| entry.work.units(),
                |it| entry.work.units_of(it, entry.counts),
            )
        };
        jobs.iter().map(units_of).collect()
    }

    /// Measures the speed by a step, unless a cache left so little of it that its time says nothing
    /// about the work.
    fn measure_step(
        &mut self,
        jobs: &[(JobId, Result<StepOutcome, JobError>)],
        units: &[f64],
        took: Duration,
    ) {
        let entries = jobs.iter().filter_map(|(id, _)| self.position_of(*id));
        let full = entries.map(|index| self.entries[index].work.of_stage(Stage::Step));
        let smallest = full.fold(f64::INFINITY, f64::min);
        let ran: f64 = units.iter().sum();
        if ran >= 0.4 * smallest {
            self.speed.add_step(units, took);
        }
    }

    /// Books a job's part of a step, which took `whole` altogether.
    fn book_step_of(
        &mut self,
        (id, step, took): Ended,
        whole: Duration,
        is_shared: bool,
        now: Instant,
    ) {
        let step = match step {
            Ok(step) => step,
            Err(error) => return self.fail(id, error, now),
        };
        let Some(index) = self.position_of(id) else {
            return;
        };
        let entry = &mut self.entries[index];
        let units = entry.work.units_of(&step, entry.counts);
        entry.done += units.iter().sum::<f64>();
        let counts = std::mem::replace(&mut entry.counts, step.counts);
        // The parts of the others count as time in which this job was idle.
        let end = self.device_time.saturating_sub(whole.saturating_sub(took));
        entry.book_turn(Stage::Step, took, end);
        entry.steps_left = step.steps_left;
        entry.is_preview_due = entry.wants_preview();
        if !entry.is_warm_up {
            self.stats.add_turn(Stage::Step, took, &entry.timings);
            self.stats.shared_steps += u64::from(is_shared);
            self.stats.add_counts(counts, step.counts);
        }
        let event = Event::Step {
            done: entry.steps_done(),
            total: entry.total_steps,
            counts: step.counts,
            estimated_rest: self.speed.rest_after_step(&entry.work, entry.progress()),
        };
        self.events.push((id, event));
    }

    /// The next step that is timed to find the budget, after the warm-up image. `None` if the budget
    /// is known.
    pub(super) fn calibrate(&mut self) -> Option<Plan> {
        let is_warm = self.entries.iter().all(|entry| !entry.is_warm_up);
        if !is_warm || !matches!(self.state, State::Starting) {
            return None;
        }
        let mut calibration = self.calibration.take()?;
        let work = self.work(calibration.job());
        calibration.expect(self.speed.step(&work));
        let copies = calibration.next();
        let copies = copies.filter(|&it| self.memory.fits_copies(calibration.job(), it));
        if let Some(copies) = copies {
            let job = calibration.job().clone();
            self.calibration = Some(calibration);
            return Some(Plan::Time(job, copies));
        }
        let knee = calibration.knee(&work);
        self.budget = Budget::new(knee.tokens);
        let units = |copies: usize| vec![work.units(); copies].concat();
        if knee.steps.len() > 1 {
            let bare = |copies: usize| self.speed.step_work(&units(copies)) - self.speed.fixed();
            self.speed.set_fixed(knee.fixed(bare));
        }
        for &(copies, took) in &knee.steps {
            self.speed.add_step(&units(copies), took);
        }
        let steps = knee.steps.iter();
        let times =
            steps.map(|(copies, took)| format!("{copies}: {:.1} ms", took.as_secs_f64() * 1e3));
        tracing::info!(
            size = %calibration.job().size,
            steps = ?times.collect::<Vec<_>>(),
            "a step of several requests has up to {} image tokens",
            knee.tokens,
        );
        self.state = State::Ready;
        None
    }

    pub(super) fn book_timing(&mut self, copies: usize, step: Option<Duration>, took: Duration) {
        if let Some(calibration) = self.calibration.as_mut() {
            debug_assert_eq!(calibration.next(), Some(copies));
            calibration.book(step, took);
        }
    }
}
