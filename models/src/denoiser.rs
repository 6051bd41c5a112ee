//! The denoiser: branches in, velocities out, in one packed forward of the transformer.

use std::thread;

use burn::tensor::{DType, Tensor};
use cubecl_common::stream_id::StreamId;
use kiln_ops::FusedOps;

use crate::cache::Cache;
use crate::pipeline::CacheUse;
use crate::sampling::Schedule;
use crate::transformer::{ModulationTable, Packing, Segment, StepModulation, Transformer};

/// Bytes of position tables that are kept, so that jobs that take turns do not rebuild them. The
/// tables of a guided image of 1024x1024 take 4 MB.
const KEPT_PACKING_BYTES: usize = 64 << 20;

/// The conditional or the unconditional half of one job in one step.
#[derive(Debug)]
pub(crate) struct Branch<'a, B: FusedOps> {
    /// `[images · tokens, channels]`, f32.
    pub(crate) latents: Tensor<B, 2>,
    /// `[text tokens of all segments, dim]`.
    pub(crate) text: Tensor<B, 2>,
    /// One sequence for each image; [`Segment::row`] is not used.
    pub(crate) segments: &'a [Segment],
    /// Index into the modulations that are given to [`Denoiser::predict`].
    pub(crate) row: usize,
}

/// The transformer on one device, and the stream of work there.
#[derive(Debug)]
pub(crate) struct Lane<B: FusedOps> {
    pub(crate) transformer: Transformer<B>,
    pub(crate) device: B::Device,
    /// The device as messages show it: `cuda:0 (NVIDIA H200)`.
    #[expect(dead_code, reason = "a step runs on the first device only")]
    pub(crate) label: String,
    /// The stream that the weights were uploaded on, and that must run the forward passes: GPU
    /// backends have memory for each stream.
    #[expect(dead_code, reason = "a step runs on the first device only")]
    pub(crate) stream: StreamId,
}

/// A stream that no thread uses.
pub(crate) fn new_stream() -> StreamId {
    let stream = thread::spawn(StreamId::current).join();
    stream.unwrap_or_else(|_| StreamId::current())
}

/// The transformer on one device.
#[derive(Debug)]
pub(crate) struct Denoiser<B: FusedOps> {
    transformer: Transformer<B>,
    /// Type of the activations.
    activations: DType,
    packings: Cache<Vec<Segment>, Packing<B>>,
}

impl<B: FusedOps> Denoiser<B> {
    /// # Panics
    ///
    /// If there is no lane.
    pub(crate) fn new(
        mut lanes: Vec<Lane<B>>,
        activations: DType,
        split_guidance: Option<bool>,
    ) -> Self {
        let _ = split_guidance;
        Self {
            transformer: lanes.remove(0).transformer,
            activations,
            packings: Cache::new(KEPT_PACKING_BYTES),
        }
    }

    /// The modulation of every block and step of a schedule, for timesteps that are rounded to the
    /// model's type.
    pub(crate) fn modulation(&self, schedule: &Schedule, model: DType) -> ModulationTable<B> {
        self.transformer
            .modulation_table(&schedule.model_timesteps(model))
    }

    /// Predicts the velocity of every branch, each `[images · tokens, channels]`, f32.
    pub(crate) fn predict(
        &mut self,
        modulation: Vec<StepModulation<B>>,
        branches: &[Branch<'_, B>],
    ) -> Vec<Tensor<B, 2>> {
        let segments: Vec<Segment> = branches
            .iter()
            .flat_map(|branch| {
                let row = branch.row;
                let segments = branch.segments.iter();
                segments.map(move |segment| Segment { row, ..*segment })
            })
            .collect();
        let transformer = &self.transformer;
        let packing =
            self.packings
                .get_or_make(&segments, || transformer.pack(&segments), Packing::bytes);
        let modulation = StepModulation::cat(modulation);
        let image = branches
            .iter()
            .map(|branch| branch.latents.clone().cast(self.activations));
        let image = Tensor::cat(image.collect(), 0);
        let text = branches.iter().map(|branch| branch.text.clone());
        let text = Tensor::cat(text.collect(), 0);
        let predicted = transformer.forward(image, text, &modulation, &packing);
        let predicted = predicted.cast(DType::F32);

        let mut first = 0;
        let mut velocities = Vec::with_capacity(branches.len());
        for branch in branches {
            let tokens = branch.latents.dims()[0];
            velocities.push(predicted.clone().narrow(0, first, tokens));
            first += tokens;
        }
        velocities
    }

    /// Use of the cache of position tables.
    pub(crate) fn position_cache(&self) -> CacheUse {
        self.packings.counts()
    }

    /// Drops what can be computed again.
    pub(crate) fn drop_caches(&mut self) {
        self.packings.clear();
    }
}
