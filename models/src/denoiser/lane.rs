//! The transformer on one device.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use burn::tensor::{DType, Tensor, TensorData};
use kiln_ops::{Cores, FusedOps, MemoryRoom};

use super::adapters::AdapterCache;
use super::carried::Carried;
use super::decision::Decides;
use super::kept::Kept;
use super::passes::{Computed, Pass, Tokens, forward};
use super::step::Prepared;
use crate::adapter::{Adapter, AdapterId, AdapterUse};
use crate::cache::Cache;
use crate::device::{DeviceMemory, idle, reliably};
use crate::finite::read;
use crate::pipeline::{CacheUse, DeviceUse, PipelineError};
use crate::sampling::Schedule;
use crate::transformer::{
    AppliedAdapter, LoadedAdapter, ModulationTable, Packing, Segment, StepModulation, Transformer,
};
use crate::weights::Precision;

/// Bytes of position tables that are kept, so that jobs that take turns do not rebuild them. The
/// tables of a guided image of 1024x1024 take 4 MB.
const KEPT_PACKING_BYTES: usize = 64 << 20;

/// Bytes of modulation tables that are kept for schedules that may come again. The table of 50
/// steps takes 0.44 GB for Qwen-Image.
const KEPT_TABLE_BYTES: usize = 1 << 30;

/// Called on the thread of a device, before each forward pass, with the number of the device among the
/// pipeline's: for tests of failures.
#[derive(Clone)]
pub struct BeforeForward(pub Arc<dyn Fn(usize) -> Result<(), PipelineError> + Send + Sync>);

impl std::fmt::Debug for BeforeForward {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("BeforeForward")
    }
}

/// What a modulation table depends on: the bits of a schedule's timesteps, and the adapters that change
/// the modulation with the bits of their scales.
type TableKey = (Vec<u32>, Vec<(AdapterId, u32)>);

/// The halves of one job that a lane runs in a step.
#[derive(Debug)]
pub(super) struct LaneJob<B: FusedOps> {
    pub(super) schedule: Arc<Schedule>,
    pub(super) adapters: Vec<AdapterUse>,
    pub(super) step: usize,
    /// What this lane has for the job, if it has prepared it.
    pub(super) prepared: Option<Prepared<B>>,
    /// `[images · tokens, channels]`, f32.
    pub(super) latents: Carried<B>,
    pub(super) halves: Vec<LaneHalf<B>>,
}

#[derive(Debug)]
pub(super) struct LaneHalf<B: FusedOps> {
    /// `[text tokens of all segments, dim]`.
    pub(super) text: Carried<B>,
    /// One sequence for each image; [`Segment::row`] is not used.
    pub(super) segments: Vec<Segment>,
    /// What another lane has kept for the half: becomes [`Pass::before`].
    pub(super) brought: Option<Kept<TensorData>>,
    pub(super) pass: Pass<B>,
}

/// What a lane computed for one job.
#[derive(Debug)]
pub(super) struct LaneAnswer<B: FusedOps> {
    pub(super) prepared: Prepared<B>,
    /// In the order of the job's halves on this lane.
    pub(super) halves: Vec<Computed<B>>,
}

/// What is chosen for every lane when a model is loaded.
#[derive(Debug, Clone)]
pub(crate) struct LaneSettings {
    pub(crate) precision: Precision,
    /// Bound of the adapters on the device, in bytes.
    pub(crate) adapter_cache_bytes: usize,
    pub(crate) before_forward: Option<BeforeForward>,
}

/// The transformer on one device, and what it can compute again.
#[derive(Debug)]
pub(crate) struct Lane<B: FusedOps> {
    index: usize,
    is_one_of_several: bool,
    transformer: Transformer<B>,
    device: B::Device,
    /// The device as messages show it.
    label: String,
    precision: Precision,
    packings: Cache<Vec<Segment>, Packing<B>>,
    tables: Cache<TableKey, Arc<ModulationTable<B>>>,
    adapters: AdapterCache<B>,
    before_forward: Option<BeforeForward>,
    /// The lane's share of a CPU.
    cores: Cores,
    /// Time in forward passes.
    busy: Duration,
    /// Number of forward passes.
    forwards: u64,
    /// Dropped last, as fields are dropped in their order.
    _memory: DeviceMemory<B>,
}

impl<B: FusedOps> Lane<B> {
    /// The lane of the device with this number among this many of the pipeline. Memory is returned to
    /// the stream of the thread that calls.
    pub(crate) fn new(
        (index, devices): (usize, usize),
        transformer: Transformer<B>,
        device: B::Device,
        label: String,
        settings: LaneSettings,
    ) -> Self {
        let LaneSettings {
            precision,
            adapter_cache_bytes,
            before_forward,
        } = settings;
        Self {
            index,
            is_one_of_several: devices > 1,
            transformer,
            label,
            precision,
            packings: Cache::new(KEPT_PACKING_BYTES),
            tables: Cache::new(KEPT_TABLE_BYTES),
            adapters: AdapterCache::new(adapter_cache_bytes),
            before_forward,
            cores: B::cores(index, devices),
            busy: Duration::ZERO,
            forwards: 0,
            _memory: DeviceMemory::new(&device),
            device,
        }
    }

    pub(super) fn device(&self) -> &B::Device {
        &self.device
    }

    pub(super) fn label(&self) -> &str {
        &self.label
    }

    pub(super) fn transformer(&self) -> &Transformer<B> {
        &self.transformer
    }

    /// Uploads the adapters of a job and computes the modulation of its steps.
    pub(super) fn prepare(&mut self, schedule: &Schedule, adapters: &[AdapterUse]) -> Prepared<B> {
        let adapters = adapters.iter().map(|it| AppliedAdapter {
            adapter: self.adapter(&it.adapter),
            scale: it.scale,
        });
        let adapters: Vec<_> = adapters.collect();
        Prepared {
            table: self.table(schedule, &adapters),
            adapters,
        }
    }

    /// The adapter on this device.
    fn adapter(&mut self, adapter: &Adapter) -> Arc<LoadedAdapter<B>> {
        let (device, dtype) = (&self.device, self.precision.model);
        let config = self.transformer.config();
        let load = || LoadedAdapter::load(adapter, config, device, dtype);
        let bytes = adapter.device_bytes(dtype.size());
        let is_new = !self.adapters.holds(adapter.id());
        let loaded = self.adapters.get_or_load(adapter.id(), bytes, load);
        if is_new {
            // Tables go with their adapters.
            let adapters = &self.adapters;
            self.tables
                .retain(|(_, applied)| applied.iter().all(|(id, _)| adapters.holds(*id)));
        }
        loaded
    }

    /// Uploads the adapters that are not on the device, as far as they fit beside those in use.
    pub(super) fn load_adapters(&mut self, adapters: &[AdapterUse]) {
        for AdapterUse { adapter, .. } in adapters {
            let bytes = adapter.device_bytes(self.precision.model.size());
            if !self.adapters.holds(adapter.id()) && self.adapters.has_room(bytes) {
                self.adapter(adapter);
            }
        }
    }

    /// The modulation of every block and step of a schedule, for timesteps that are rounded to the
    /// model's type.
    fn table(
        &mut self,
        schedule: &Schedule,
        adapters: &[AppliedAdapter<B>],
    ) -> Arc<ModulationTable<B>> {
        let timesteps = schedule.model_timesteps(self.precision.model);
        let bits: Vec<u32> = timesteps.iter().map(|t| t.to_bits()).collect();
        let transformer = &self.transformer;
        let make = || Arc::new(transformer.modulation_table(&timesteps));
        let key = (bits.clone(), Vec::new());
        let base = self.tables.get_or_make(&key, make, |table| table.bytes());
        let of_modulation = adapters.iter().filter(|it| it.adapter.changes_modulation());
        let adapters: Vec<AppliedAdapter<B>> = of_modulation.cloned().collect();
        if adapters.is_empty() {
            return base;
        }
        let ids = adapters
            .iter()
            .map(|it| (it.adapter.id(), it.scale.to_bits()));
        let key = (bits, ids.collect());
        let make = || Arc::new(transformer.adapted_table(&base, &timesteps, &adapters));
        self.tables.get_or_make(&key, make, |table| table.bytes())
    }

    /// As [`Lane::predict`], while other lanes run as well: on a CPU, with a share of its cores.
    ///
    /// # Errors
    /// As [`Lane::predict`].
    pub(super) fn predict_beside(
        &mut self,
        jobs: &[LaneJob<B>],
    ) -> Result<Vec<LaneAnswer<B>>, PipelineError> {
        let cores = std::mem::take(&mut self.cores);
        let lane = &mut *self;
        let answers = catch_unwind(AssertUnwindSafe(|| cores.run(|| lane.predict(jobs))));
        self.cores = cores;
        answers.unwrap_or_else(|panic| resume_unwind(panic))
    }

    /// Runs one packed forward of all these halves.
    ///
    /// # Errors
    /// If the device fails, or the half on another device that decides for one of these.
    pub(super) fn predict(
        &mut self,
        jobs: &[LaneJob<B>],
    ) -> Result<Vec<LaneAnswer<B>>, PipelineError> {
        if let Some(BeforeForward(call)) = &self.before_forward {
            call(self.index)?;
        }
        let started = Instant::now();
        let mut prepared = Vec::with_capacity(jobs.len());
        for job in jobs {
            let known = job.prepared.clone();
            prepared.push(known.unwrap_or_else(|| self.prepare(&job.schedule, &job.adapters)));
        }
        let rows = jobs.iter().zip(&prepared);
        let modulation = rows.map(|(job, prepared)| prepared.table.step(job.step));
        let modulation = modulation.collect();
        let modulation = StepModulation::cat(modulation);

        let mut segments = Vec::new();
        for (row, job) in jobs.iter().enumerate() {
            for half in &job.halves {
                let of_row = half.segments.iter();
                segments.push(of_row.map(|it| Segment { row, ..*it }).collect::<Vec<_>>());
            }
        }
        let mut tokens = Vec::with_capacity(segments.len());
        let halves = jobs.iter().zip(&prepared).flat_map(|(job, prepared)| {
            let halves = job.halves.iter();
            halves.map(move |half| (job, prepared, half))
        });
        for ((job, prepared, half), segments) in halves.zip(&segments) {
            tokens.push(Tokens {
                latents: job
                    .latents
                    .onto(&self.device)
                    .cast(self.precision.activations),
                text: half.text.onto(&self.device),
                adapters: &prepared.adapters,
                segments,
                step: job.step,
                pass: &half.pass,
            });
        }
        let (transformer, packings) = (&self.transformer, &mut self.packings);
        let mut pack = |segments: &[Segment]| {
            let make = || transformer.pack(segments);
            packings.get_or_make(&segments.to_vec(), make, Packing::bytes)
        };
        let computed = forward(transformer, &tokens, &modulation, &mut pack)?;
        self.forwards += 1;
        if self.is_one_of_several {
            // Until then the device works; a failure is reported by the caller's own wait.
            B::sync(&self.device).ok();
            self.busy += started.elapsed();
        }

        let mut computed = computed.into_iter();
        let answers = jobs.iter().zip(prepared).map(|(job, prepared)| LaneAnswer {
            prepared,
            halves: computed.by_ref().take(job.halves.len()).collect(),
        });
        Ok(answers.collect())
    }

    /// As [`Lane::predict`], on the thread of a device besides the first: waits for the device, and
    /// reads the velocities. `is_alone` says that no other lane runs.
    ///
    /// # Errors
    /// As [`Lane::predict`].
    pub(super) fn answer(
        &mut self,
        mut jobs: Vec<LaneJob<B>>,
        is_alone: bool,
    ) -> Result<Vec<LaneAnswer<B>>, PipelineError> {
        let _decides = Decides::of(&jobs);
        let device = self.device.clone();
        for half in jobs.iter_mut().flat_map(|job| &mut job.halves) {
            if let Some(brought) = half.brought.take() {
                half.pass.before = Some(brought.onto(&device));
            }
        }
        self.reliably(|lane| {
            let mut answers = if is_alone {
                lane.predict(&jobs)?
            } else {
                lane.predict_beside(&jobs)?
            };
            for half in answers.iter_mut().flat_map(|answer| &mut answer.halves) {
                half.velocity.read()?;
            }
            Ok(answers)
        })
    }

    /// Runs `work` and waits for the device: see [`reliably`]. If it fails, the caches may hold wrong
    /// values.
    pub(super) fn reliably<T>(
        &mut self,
        mut work: impl FnMut(&mut Self) -> Result<T, PipelineError>,
    ) -> Result<T, PipelineError> {
        let device = self.device.clone();
        let done = reliably::<B, T>(&device, |run| {
            if run > 0 {
                self.drop_caches();
            }
            work(self)
        });
        done.map_err(|error| {
            self.drop_caches();
            match error {
                PipelineError::Device(report) => {
                    PipelineError::Device(format!("{}: {report}", self.label))
                }
                other => other,
            }
        })
    }

    /// Counts the time of a step of a lane that is the only one: its caller waits for the device.
    pub(super) fn count(&mut self, took: Duration) {
        if !self.is_one_of_several {
            self.busy += took;
        }
    }

    /// Runs a small sum on the device.
    ///
    /// # Errors
    /// If the device does not compute.
    pub(super) fn probe(&self) -> Result<(), PipelineError> {
        if let Some(BeforeForward(call)) = &self.before_forward {
            call(self.index)?;
        }
        let ones = Tensor::<B, 1>::ones([2], (&self.device, DType::F32));
        read(ones.clone() + ones).map(|_| ())
    }

    /// Waits for the device, so that it does not use what is dropped.
    pub(super) fn idle(&self) {
        idle::<B>(&self.device).ok();
    }

    pub(super) fn memory_room(&self) -> Option<MemoryRoom> {
        B::memory_room(&self.device)
    }

    /// Use of the device, without its name.
    pub(super) fn device_use(&self) -> DeviceUse {
        DeviceUse {
            memory: B::memory_use(&self.device),
            busy_seconds: self.busy.as_secs_f64(),
            forwards: self.forwards,
            ..DeviceUse::default()
        }
    }

    /// Use of the caches of modulation tables, of position tables and of adapters.
    pub(super) fn caches(&self) -> [CacheUse; 3] {
        let (tables, packings) = (self.tables.counts(), self.packings.counts());
        [tables, packings, self.adapters.counts()]
    }

    /// Drops what can be computed again.
    pub(super) fn drop_caches(&mut self) {
        self.tables.clear();
        self.packings.clear();
        self.adapters.clear();
    }
}
