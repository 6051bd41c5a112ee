//! The denoiser: halves of jobs in, velocities out, on one device or several.
//!
//! A [`Lane`](lane::Lane) is the transformer on one device. The first lane runs on the thread that
//! calls, the others on threads of their own. Each step spreads its halves over the lanes by cost, and
//! each lane runs its halves in one packed forward; latents, embeddings and velocities cross through
//! the host's memory. A half keeps its place while it has residuals of earlier steps there, unless
//! another lane has less to do.

mod adapters;
mod carried;
mod decision;
mod kept;
mod lane;
mod passes;
mod spread;
mod step;
mod thread;

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::time::Duration;

use burn::tensor::{Tensor, TensorData};
use kiln_ops::{FusedOps, MemoryRoom};

use self::carried::Carried;
use self::decision::{Decides, Decision};
use self::kept::Kept;
use self::lane::{LaneAnswer, LaneHalf, LaneJob};
use self::passes::Pass;
use self::spread::{Load, spread};
use self::thread::{LaneThread, Pending};
use crate::adapter::{AdapterUse, Totals};
use crate::flops;
use crate::pipeline::{CacheUse, DeviceUse, PipelineError};
use crate::sampling::Schedule;
use crate::step_cache::Next;
use crate::transformer::Transformer;

pub use self::lane::BeforeForward;
pub(crate) use self::lane::{Lane, LaneSettings};
pub(crate) use self::step::{Half, HalfPrediction, JobStep, Lanes, Placed, Prediction, Prepared};

/// Work of a half that runs no block, as a part of its whole work.
const REUSE_COST: f64 = 0.01;

/// The halves of a step that one lane runs: the jobs' indices, and for each the indices of its halves.
type Share = Vec<(usize, Vec<usize>)>;

/// The transformer on one device or several.
#[derive(Debug)]
pub(crate) struct Denoiser<B: FusedOps> {
    first: Lane<B>,
    others: Vec<LaneThread<B>>,
    /// The other devices as messages show them.
    labels: Vec<String>,
    /// Whether the halves of one job may run on two devices.
    split_guidance: bool,
}

impl<B: FusedOps> Denoiser<B> {
    pub(crate) fn new(first: Lane<B>) -> Self {
        Self {
            first,
            others: Vec::new(),
            labels: Vec::new(),
            split_guidance: true,
        }
    }

    /// Adds a lane, which `make` makes on a thread of its own.
    ///
    /// # Errors
    /// Those of `make`.
    pub(crate) fn add<E: Send + 'static>(
        &mut self,
        label: String,
        make: impl FnOnce() -> Result<Lane<B>, E> + Send + 'static,
    ) -> Result<(), E> {
        let name = format!("device {}", self.others.len() + 1);
        self.others.push(LaneThread::start(name, make)?);
        self.labels.push(label);
        Ok(())
    }

    /// Whether the halves of one job may run on two devices. True by default.
    pub(crate) fn set_split_guidance(&mut self, split: bool) {
        self.split_guidance = split;
    }

    /// The transformer of the lanes that are on this device, if there are any.
    pub(crate) fn transformer_on(&self, device: &B::Device) -> Option<Transformer<B>> {
        if self.first.device() == device {
            return Some(self.first.transformer().clone());
        }
        self.others.iter().find_map(|lane| {
            let device = device.clone();
            let found = lane
                .call(move |lane| (*lane.device() == device).then(|| lane.transformer().clone()));
            found.wait().ok().flatten()
        })
    }

    /// A report that begins with the name of a device: that of the first, unless it has one.
    pub(crate) fn labelled(&self, report: String) -> String {
        let has_label = |label: &String| report.starts_with(label.as_str());
        if self.labels.iter().any(has_label) {
            return report;
        }
        format!("{}: {report}", self.first.label())
    }

    fn lanes(&self) -> usize {
        1 + self.others.len()
    }

    /// Prepares a job on every lane: uploads its adapters and computes the modulation of its schedule.
    ///
    /// # Errors
    /// If a device fails.
    pub(crate) fn prepare(
        &mut self,
        schedule: &Arc<Schedule>,
        adapters: &[AdapterUse],
    ) -> Result<Lanes<B>, PipelineError> {
        let (of_lane, for_lane) = (Arc::clone(schedule), adapters.to_vec());
        let lanes = self.on_all(
            move |lane| lane.reliably(|lane| Ok(lane.prepare(&of_lane, &for_lane))),
            |first| Ok(first.prepare(schedule, adapters)),
        )?;
        Ok(lanes.into_iter().map(Some).collect())
    }

    /// Uploads adapters to every lane, as far as they fit there beside those in use.
    ///
    /// # Errors
    /// If a device fails.
    pub(crate) fn load_adapters(&mut self, adapters: &[AdapterUse]) -> Result<(), PipelineError> {
        let for_lane = adapters.to_vec();
        let load = |lane: &mut Lane<B>, adapters: &[AdapterUse]| {
            lane.load_adapters(adapters);
            Ok(())
        };
        let loaded = self.on_all(
            move |lane| lane.reliably(|lane| load(lane, &for_lane)),
            |first| load(first, adapters),
        );
        loaded.map(drop)
    }

    /// Calls a function on every lane but the first, on its thread, and another on the first meanwhile.
    fn on_all<T: Send + 'static>(
        &mut self,
        of_others: impl Fn(&mut Lane<B>) -> Result<T, PipelineError> + Clone + Send + 'static,
        of_first: impl FnOnce(&mut Lane<B>) -> Result<T, PipelineError>,
    ) -> Result<Vec<T>, PipelineError> {
        let pending = self.on_others(of_others);
        let first = &mut self.first;
        let own = catch_unwind(AssertUnwindSafe(|| of_first(first)));
        let others = pending.into_iter().map(Pending::wait);
        all([own].into_iter().chain(others).collect())
    }

    /// Predicts the velocities of every job's halves. The caller waits for the first device; the others
    /// have ended when this returns.
    ///
    /// # Errors
    /// If any device fails.
    ///
    /// # Panics
    /// If a lane panics, after all have ended.
    pub(crate) fn predict(
        &mut self,
        steps: &[JobStep<'_, B>],
    ) -> Result<Vec<Prediction<B>>, PipelineError> {
        let shares = self.shares(steps);
        let decisions: Vec<Arc<Decision>> = steps.iter().map(|_| Arc::default()).collect();
        let mut work = Vec::with_capacity(shares.len());
        for (lane, share) in shares.iter().enumerate() {
            work.push(self.work_of(lane, share, steps, &decisions)?);
        }
        let is_alone = work.iter().filter(|jobs| !jobs.is_empty()).count() < 2;
        let mut work = work.into_iter();
        let own = work.next().unwrap_or_default();
        let pending: Vec<_> = self
            .others
            .iter()
            .zip(work)
            .map(|(lane, jobs)| {
                (!jobs.is_empty()).then(|| lane.call(move |lane| lane.answer(jobs, is_alone)))
            })
            .collect();
        let first = &mut self.first;
        let own = catch_unwind(AssertUnwindSafe(|| {
            let _decides = Decides::of(&own);
            if own.is_empty() {
                return Ok(Vec::new());
            }
            if is_alone {
                return first.predict(&own);
            }
            first.predict_beside(&own)
        }));
        let others = pending
            .into_iter()
            .map(|answer| answer.map_or_else(|| Ok(Ok(Vec::new())), Pending::wait));
        let answers = all([own].into_iter().chain(others).collect())?;
        Ok(self.predictions(steps, &shares, answers))
    }

    /// What each lane runs.
    fn shares(&self, steps: &[JobStep<'_, B>]) -> Vec<Share> {
        let config = self.first.transformer().config();
        let loads: Vec<Vec<Load>> = steps
            .iter()
            .map(|step| {
                let halves = step.halves.iter();
                let adapters = Totals::of_job(step.adapters).work;
                let load = halves.map(|half| {
                    let whole = flops::step(config, &half.segments, adapters) as f64;
                    let reuses = matches!(step.next, Next::Reuse);
                    Load {
                        cost: if reuses { REUSE_COST * whole } else { whole },
                        at: half.kept.as_ref().map(|placed| placed.lane),
                    }
                });
                load.collect()
            })
            .collect();
        let places = spread(&loads, self.lanes(), self.split_guidance);
        let share = |lane: usize| {
            let of_job = |(job, halves): (usize, &Vec<usize>)| {
                let here = |&half: &usize| halves[half] == lane;
                let halves: Vec<usize> = (0..halves.len()).filter(here).collect();
                (!halves.is_empty()).then_some((job, halves))
            };
            places.iter().enumerate().filter_map(of_job).collect()
        };
        (0..self.lanes()).map(share).collect()
    }

    /// The input of one lane.
    fn work_of(
        &self,
        lane: usize,
        share: &Share,
        steps: &[JobStep<'_, B>],
        decisions: &[Arc<Decision>],
    ) -> Result<Vec<LaneJob<B>>, PipelineError> {
        let mut jobs = Vec::with_capacity(share.len());
        for (job, indices) in share {
            let step = &steps[*job];
            let mut halves = Vec::with_capacity(indices.len());
            for &index in indices {
                let half = &step.halves[index];
                let (before, brought) = self.kept_for(lane, half)?;
                halves.push(LaneHalf {
                    text: match lane {
                        0 => Carried::Here(half.text.clone()),
                        _ => Carried::Values(half.text_values()?),
                    },
                    segments: half.segments.clone(),
                    brought,
                    pass: Pass {
                        next: step.next,
                        before,
                        order: step.order,
                        measure: step.measure,
                        decision: Arc::clone(&decisions[*job]),
                        decides: index == 0,
                    },
                });
            }
            let mut latents = Carried::Here(step.latents.clone());
            if lane > 0 {
                latents.read()?;
            }
            jobs.push(LaneJob {
                schedule: Arc::clone(step.schedule),
                adapters: step.adapters.to_vec(),
                step: step.step,
                prepared: step.lanes.get(lane).cloned().flatten(),
                latents,
                halves,
            });
        }
        Ok(jobs)
    }

    /// What a half has kept: on this lane, or its values if it must be brought there.
    #[expect(clippy::type_complexity, reason = "one of the two")]
    fn kept_for(
        &self,
        lane: usize,
        half: &Half<B>,
    ) -> Result<(Option<Kept<Tensor<B, 2>>>, Option<Kept<TensorData>>), PipelineError> {
        let Some(placed) = &half.kept else {
            return Ok((None, None));
        };
        let kept = placed.kept.clone();
        if placed.lane == lane {
            return Ok((Some(kept), None));
        }
        let values = match placed.lane.checked_sub(1) {
            None => kept.into_values()?,
            Some(index) => {
                let read = self.others[index].call(move |_| kept.into_values());
                read.wait().unwrap_or_else(|panic| resume_unwind(panic))?
            }
        };
        if lane == 0 {
            return Ok((Some(values.onto(self.first.device())), None));
        }
        Ok((None, Some(values)))
    }

    /// Sorts the lanes' answers by job and half.
    fn predictions(
        &self,
        steps: &[JobStep<'_, B>],
        shares: &[Share],
        answers: Vec<Vec<LaneAnswer<B>>>,
    ) -> Vec<Prediction<B>> {
        let mut lanes: Vec<Vec<_>> = steps.iter().map(|_| Vec::new()).collect();
        let mut halves: Vec<Vec<Option<HalfPrediction<B>>>> = steps
            .iter()
            .map(|step| step.halves.iter().map(|_| None).collect())
            .collect();
        for (lane, (share, answers)) in shares.iter().zip(answers).enumerate() {
            for ((job, indices), answer) in share.iter().zip(answers) {
                lanes[*job].push((lane, answer.prepared));
                for (index, computed) in indices.iter().zip(answer.halves) {
                    halves[*job][*index] = Some(HalfPrediction {
                        velocity: computed.velocity.onto(self.first.device()),
                        kept: computed.kept.map(|kept| Placed { lane, kept }),
                        reused: computed.reused,
                        work: computed.work,
                        ratio: computed.ratio,
                    });
                }
            }
        }
        let jobs = lanes.into_iter().zip(halves);
        jobs.map(|(lanes, halves)| Prediction {
            lanes,
            halves: halves.into_iter().flatten().collect(),
        })
        .collect()
    }

    /// Counts the time of a step that has ended.
    pub(crate) fn count(&mut self, took: Duration) {
        self.first.count(took);
    }

    /// Runs a small sum on the first device.
    ///
    /// # Errors
    /// If it does not compute.
    pub(crate) fn probe_first(&self) -> Result<(), PipelineError> {
        self.first.probe()
    }

    /// Runs a small sum on every device but the first.
    ///
    /// # Errors
    /// If one does not compute; the error names it.
    pub(crate) fn probe_others(&self) -> Result<(), PipelineError> {
        let pending = self.on_others(|lane| lane.reliably(|lane| lane.probe()));
        all(pending.into_iter().map(Pending::wait).collect()).map(drop)
    }

    /// Queues a call on every lane but the first.
    fn on_others<T: Send + 'static>(
        &self,
        call: impl Fn(&mut Lane<B>) -> T + Clone + Send + 'static,
    ) -> Vec<Pending<T>> {
        let queue = |lane: &LaneThread<B>| lane.call(call.clone());
        self.others.iter().map(queue).collect()
    }

    /// Calls a function on every lane, on its thread.
    fn each<T: Send + 'static>(&self, call: fn(&Lane<B>) -> T) -> Vec<T> {
        let pending = self.on_others(move |lane| call(lane));
        let own = call(&self.first);
        let others = pending.into_iter().filter_map(|answer| answer.wait().ok());
        [own].into_iter().chain(others).collect()
    }

    /// Waits for every device but the first, so that it does not use what is dropped.
    pub(crate) fn idle_others(&self) {
        for answer in self.on_others(|lane| lane.idle()) {
            answer.wait().ok();
        }
    }

    /// Memory that can still be allocated on every device but the first; `None` where it is not known.
    pub(crate) fn rooms_of_others(&self) -> Vec<Option<MemoryRoom>> {
        let rooms = self.on_others(|lane| lane.memory_room()).into_iter();
        rooms.map(|room| room.wait().ok().flatten()).collect()
    }

    /// Use of every device.
    pub(crate) fn device_use(&self) -> Vec<DeviceUse> {
        self.each(Lane::device_use)
    }

    /// Use of the caches of modulation tables and of position tables, on all lanes together, and of the
    /// adapters on the lane that holds the most bytes of them.
    pub(crate) fn caches(&self) -> [CacheUse; 3] {
        let lanes = self.each(Lane::caches);
        let adapters = lanes.iter().map(|[.., adapters]| *adapters);
        let adapters = adapters.max_by_key(|use_of| use_of.bytes);
        let sum = |mut all: [CacheUse; 2], [tables, packings, _]: [CacheUse; 3]| {
            for (all, lane) in all.iter_mut().zip([tables, packings]) {
                all.entries += lane.entries;
                all.bytes += lane.bytes;
                all.max_bytes += lane.max_bytes;
                all.hits += lane.hits;
                all.misses += lane.misses;
                all.evictions += lane.evictions;
            }
            all
        };
        let [tables, packings] = lanes.into_iter().fold(Default::default(), sum);
        [tables, packings, adapters.unwrap_or_default()]
    }

    /// Drops what can be computed again.
    pub(crate) fn drop_caches(&mut self) {
        let pending = self.on_others(Lane::drop_caches);
        self.first.drop_caches();
        for answer in pending {
            answer.wait().ok();
        }
    }
}

/// The values of all calls. A panic is raised again; of several errors, the one that caused the
/// others is returned.
fn all<T>(
    answers: Vec<std::thread::Result<Result<T, PipelineError>>>,
) -> Result<Vec<T>, PipelineError> {
    let mut values = Vec::with_capacity(answers.len());
    let mut failure: Option<PipelineError> = None;
    let mut panicked = None;
    for answer in answers {
        match answer {
            Ok(Ok(value)) => values.push(value),
            Ok(Err(error)) => {
                if matches!(failure, None | Some(PipelineError::OtherHalf)) {
                    failure = Some(error);
                }
            }
            Err(panic) => panicked = panicked.or(Some(panic)),
        }
    }
    if let Some(panic) = panicked {
        resume_unwind(panic);
    }
    failure.map_or(Ok(values), Err)
}
