//! Whether there is memory for a job: pure decisions over plans and measurements.
//!
//! A job is compared with memory twice. When it is submitted, with what there is at most: a job that
//! does not fit whole is decoded image by image or in tiles, and one that does not fit even so is
//! refused. Before it is started and before it is decoded, with what is free now: see [`Turn`].

use kiln_models::job::{Decoding, Job, Size};
use kiln_models::memory::{MemoryModel, MemoryPlan};
use kiln_models::pipeline::{MemoryRoom, Pipeline};

use super::adapters::{Upload, in_use, missing, sum};
use super::entry::Entry;
use super::{JobError, TooLarge};

/// Memory that is left for what no plan covers: answers, connections, threads.
const MARGIN: u64 = 32 << 20;

/// What to do when the policy gives a job its turn.
#[derive(Debug)]
pub(super) enum Turn {
    /// There is memory for it.
    Take,
    /// What is free must be measured first, after the caches have been dropped if so.
    Measure { drop_caches: bool },
    /// Jobs that have been started hold the memory: they come first.
    Wait,
    /// It fits if it is decoded in this way.
    Decode(Decoding),
    /// Other programs hold the memory, and the job has the engine for itself.
    Refuse(JobError),
}

/// Ways to decode a job and what each takes, the one that takes the most first.
pub(super) type Plans = Vec<(Decoding, MemoryPlan)>;

/// The memory that jobs may take.
#[derive(Debug)]
pub(super) struct Memory {
    model: Option<MemoryModel>,
    /// Sides of images are multiples of this.
    multiple: usize,
    /// The user's limit of all jobs together.
    max: Option<u64>,
    /// What there is at most, the margin left out; `None` if it is not known.
    most: Option<u64>,
    /// The last measurement of what is free.
    free: Option<u64>,
    /// Bytes of the adapters on the device, whether a job uses them or not.
    adapters: u64,
    /// Whether nothing has happened since that measurement, and whether the caches are empty.
    is_measured: bool,
    has_no_caches: bool,
}

impl Memory {
    /// The memory of a pipeline that has no job yet. `max` is the most that all jobs may take.
    pub(super) fn of(pipeline: &dyn Pipeline, max: Option<u64>) -> Self {
        let room = pipeline.memory_room();
        let total = room.map(|room| room.total.saturating_sub(MARGIN));
        Self {
            model: pipeline.memory_model(),
            multiple: pipeline.info().sizes.multiple,
            max,
            most: [total, max].into_iter().flatten().min(),
            free: room.map(|room| room.free),
            adapters: 0,
            is_measured: false,
            has_no_caches: false,
        }
    }

    /// What is free, by the last measurement.
    pub(super) fn free(&self) -> Option<u64> {
        self.free
    }

    /// The job's ways to be decoded that fit at all; `Job::decoding` is the first that is allowed.
    /// `adapters` are the bytes of its adapters.
    ///
    /// # Errors
    ///
    /// If there is none.
    pub(super) fn plans(&self, job: &Job, adapters: u64) -> Result<Plans, TooLarge> {
        let mut plans = self.all_plans(job);
        let Some(all) = self.most else {
            return Ok(plans);
        };
        let most = all.saturating_sub(adapters);
        let least = plans.last().map(|(_, plan)| plan.peak());
        plans.retain(|(_, plan)| plan.peak() <= most);
        match least {
            Some(needed) if plans.is_empty() => Err(TooLarge {
                size: job.size,
                needed: needed.saturating_add(adapters),
                most: all,
                largest: self.largest(job, most),
            }),
            _ => Ok(plans),
        }
    }

    /// The job's ways to be decoded, whether they fit or not: the first that is allowed, and those
    /// that take less memory than the ones before them.
    pub(super) fn all_plans(&self, job: &Job) -> Plans {
        let plan = |decoding| {
            let job = Job {
                decoding,
                ..job.clone()
            };
            Some((decoding, self.model.as_ref()?.plan(&job)))
        };
        let mut plans: Plans = job.decoding.and_smaller().filter_map(plan).collect();
        plans.dedup_by(|(_, smaller), (_, larger)| smaller.decode >= larger.decode);
        plans
    }

    /// The largest size of the job's shape that fits.
    fn largest(&self, job: &Job, most: u64) -> Option<Size> {
        let multiple = self.multiple;
        let Size { width, height } = job.size;
        let longest = width.max(height);
        let sized = |steps: usize| {
            let side = |side: usize| {
                let scaled = side * steps * multiple / longest;
                (scaled / multiple * multiple).max(multiple)
            };
            Size {
                width: side(width),
                height: side(height),
            }
        };
        let fits = |steps: usize| {
            let job = Job {
                size: sized(steps),
                ..job.clone()
            };
            let plans = self.all_plans(&job);
            plans.last().is_none_or(|(_, plan)| plan.peak() <= most)
        };
        let (mut fitting, mut failing) = (0, longest / multiple);
        while failing > fitting + 1 {
            let middle = usize::midpoint(fitting, failing);
            if fits(middle) {
                fitting = middle;
            } else {
                failing = middle;
            }
        }
        (fitting > 0).then(|| sized(fitting))
    }

    /// Books a measurement.
    pub(super) fn measured(&mut self, room: Option<MemoryRoom>, dropped_caches: bool) {
        self.free = room.map(|room| room.free);
        self.is_measured = true;
        self.has_no_caches = dropped_caches;
    }

    /// What was measured may have changed.
    pub(super) fn changed(&mut self) {
        self.is_measured = false;
        self.has_no_caches = false;
    }

    /// Whether there is memory for the next call for a job.
    pub(super) fn turn(&self, entries: &[Entry], index: usize) -> Turn {
        let entry = &entries[index];
        let needs_memory = !entry.is_started() || entry.steps_left == 0;
        let Some((_, plan)) = entry.plans.first().filter(|_| needs_memory) else {
            return Turn::Take;
        };
        if self.most.is_none() {
            return Turn::Take;
        }
        if !self.is_measured {
            return Turn::Measure { drop_caches: false };
        }
        let started = Started::of(entries);
        let adapters = if entry.is_started() {
            0
        } else {
            missing(&entry.adapters, &in_use(entries))
        };
        // What was uploaded ahead is there for the job.
        let uploaded = if entry.upload == Upload::Done {
            adapters
        } else {
            0
        };
        let free = self.free.map(|free| free.saturating_sub(MARGIN));
        let free = free.map(|free| free.saturating_add(uploaded));
        let left = self.max.map(|max| max.saturating_sub(started.held));
        let Some(room) = [free, left].into_iter().flatten().min() else {
            return Turn::Take;
        };
        let need = |plan: &MemoryPlan| {
            if entry.is_started() {
                plan.decode
            } else {
                let held = plan.held.saturating_add(adapters);
                held.saturating_add(plan.stage().max(started.stage))
            }
        };
        if need(plan) <= room {
            return Turn::Take;
        }
        if !entry.is_started() && started.jobs > 0 {
            return Turn::Wait;
        }
        if !self.has_no_caches {
            return Turn::Measure { drop_caches: true };
        }
        let smaller = entry.plans[1..].iter().find(|(_, plan)| need(plan) <= room);
        smaller.map_or_else(
            || {
                let least = entry.plans.last().map_or(0, |(_, plan)| need(plan));
                Turn::Refuse(JobError::NoMemory {
                    needed: least,
                    free: room,
                })
            },
            |(decoding, _)| Turn::Decode(*decoding),
        )
    }

    /// Whether a waiting job must be started when no other is, because it does not fit beside the
    /// started ones, by plan. `adapters` are the bytes of the adapters that only this job uses.
    pub(super) fn is_alone(&self, plan: &MemoryPlan, adapters: u64, entries: &[Entry]) -> bool {
        let started = Started::of(entries);
        let held = started.held.saturating_add(plan.held);
        let needed = held
            .saturating_add(adapters)
            .saturating_add(plan.stage().max(started.stage));
        self.most.is_some_and(|most| needed > most)
    }

    /// Bytes of the adapters on the device, from its last report.
    pub(super) fn set_adapters(&mut self, bytes: u64) {
        self.adapters = bytes;
    }

    /// Whether there is memory, by plan, for what stays besides what the started jobs take.
    pub(super) fn fits_besides(&self, bytes: u64, entries: &[Entry]) -> bool {
        let started = Started::of(entries);
        let needed = self.held(&started).saturating_add(started.stage);
        let needed = needed.saturating_add(bytes);
        self.most.is_none_or(|most| needed <= most)
    }

    /// What the started jobs hold, and adapters that no started job uses.
    fn held(&self, started: &Started) -> u64 {
        let unused = self.adapters.saturating_sub(started.adapters);
        started.held.saturating_add(unused)
    }

    /// Whether there is memory, by plan, for a call that takes `together` bytes besides what the started
    /// jobs hold.
    pub(super) fn fits_together(&self, together: u64, entries: &[Entry]) -> bool {
        let started = Started::of(entries);
        let needed = self.held(&started).saturating_add(together);
        together <= started.stage || self.most.is_none_or(|most| needed <= most)
    }

    /// Whether there is memory, by plan, for a step of this many copies of a job and nothing else.
    pub(super) fn fits_copies(&self, job: &Job, copies: usize) -> bool {
        let one = self.all_plans(job).last().map_or(0, |(_, plan)| {
            plan.held.saturating_add(plan.start.max(plan.step))
        });
        let needed = one.saturating_mul(copies as u64);
        self.most.is_none_or(|most| needed <= most)
    }

    /// Bytes that the started jobs take at most. `together` is what their last step took, which may be
    /// one of several jobs.
    pub(super) fn planned(entries: &[Entry], together: u64) -> u64 {
        let started = Started::of(entries);
        if started.jobs == 0 {
            return 0;
        }
        started.held.saturating_add(started.stage.max(together))
    }
}

/// The plans of the started jobs together. Only one of them is started or decoded at a time, and jobs
/// are stepped together only if there is memory for it.
struct Started {
    jobs: usize,
    /// What they hold, their adapters included.
    held: u64,
    /// Bytes of their adapters.
    adapters: u64,
    /// The largest stage of any.
    stage: u64,
}

impl Started {
    fn of(entries: &[Entry]) -> Self {
        let plans = entries.iter().filter(|entry| entry.is_started());
        let adapters = sum(&in_use(entries));
        let nothing = Self {
            jobs: 0,
            held: adapters,
            adapters,
            stage: 0,
        };
        plans.map(Entry::plan).fold(nothing, |sum, plan| Self {
            jobs: sum.jobs + 1,
            held: sum.held.saturating_add(plan.held),
            stage: sum.stage.max(plan.stage()),
            ..sum
        })
    }
}
