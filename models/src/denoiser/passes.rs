//! One packed forward in which each half computes all blocks, reuses an earlier step, or decides
//! between the two after its first blocks.
//!
//! Rows of different halves see each other nowhere, so that a half computes the same in any company,
//! within rounding. Halves that reuse leave the packed tensors and come back for the blocks that they
//! do run, so that a block runs on the tokens that need it alone.

use std::collections::BTreeSet;
use std::sync::Arc;

use burn::tensor::{DType, Tensor};
use kiln_ops::FusedOps;

use super::carried::Carried;
use super::decision::Decision;
use super::kept::{Kept, Residual, relative_change};
use crate::finite::read;
use crate::pipeline::PipelineError;
use crate::step_cache::{Decide, Next};
use crate::transformer::{
    AdapterRuns, AppliedAdapter, Packing, Segment, StepModulation, Transformer,
};

/// What one half does in a step.
#[derive(Debug)]
pub(super) struct Pass<B: FusedOps> {
    pub(super) next: Next,
    /// What the last computed step left.
    pub(super) before: Option<Kept<Tensor<B, 2>>>,
    /// Order of the Taylor series that residuals are continued by, 0 or 1.
    pub(super) order: usize,
    /// Whether the change of the residual since the last step is measured.
    pub(super) measure: bool,
    pub(super) decision: Arc<Decision>,
    /// Whether this half makes the decision.
    pub(super) decides: bool,
}

/// The input of one half, on the device.
#[derive(Debug)]
pub(super) struct Tokens<'a, B: FusedOps> {
    /// `[image tokens, channels]`, in the type of the activations.
    pub(super) latents: Tensor<B, 2>,
    /// `[text tokens, dim]`.
    pub(super) text: Tensor<B, 2>,
    /// The adapters of the half's job.
    pub(super) adapters: &'a [AppliedAdapter<B>],
    /// The half's sequences, with their row in the step's modulation.
    pub(super) segments: &'a [Segment],
    /// Index of the step in the half's schedule.
    pub(super) step: usize,
    pub(super) pass: &'a Pass<B>,
}

/// What a half computed.
#[derive(Debug)]
pub(super) struct Computed<B: FusedOps> {
    /// `[image tokens, channels]`, f32.
    pub(super) velocity: Carried<B>,
    /// What the half has to reuse now.
    pub(super) kept: Option<Kept<Tensor<B, 2>>>,
    pub(super) reused: bool,
    /// The blocks that ran, as a part of all.
    pub(super) work: f64,
    /// [`Residual::ratio_to`] the last step, if it was to be measured.
    pub(super) ratio: Option<f32>,
}

/// The blocks of one half.
#[derive(Debug, Clone, Copy)]
enum Course {
    All {
        keep: bool,
    },
    None,
    Probe {
        head: usize,
        /// The first of the last blocks, which a reused step runs.
        tail: usize,
        decide: Decide,
    },
}

impl Course {
    /// What a half can do in a transformer with this number of blocks.
    fn of<B: FusedOps>(pass: &Pass<B>, blocks: usize) -> Self {
        match pass.next {
            Next::Compute { keep } => Self::All { keep },
            Next::Reuse if pass.before.is_some() => Self::None,
            Next::Reuse => Self::All { keep: true },
            Next::Probe { head, tail, decide } if head + tail < blocks => Self::Probe {
                head,
                tail: blocks - tail,
                decide: match &pass.before {
                    Some(Kept { head: Some(_), .. }) => decide,
                    _ => Decide::Compute,
                },
            },
            // Every step would run all blocks.
            Next::Probe { .. } => Self::All { keep: false },
        }
    }
}

/// The tokens of one half between two blocks, `[tokens, dim]` each.
type Streams<B> = (Tensor<B, 2>, Tensor<B, 2>);

/// The halves whose tokens are packed, in their order.
struct Packed<B: FusedOps> {
    halves: Vec<usize>,
    streams: Option<Streams<B>>,
}

/// What is remembered of one half on its way through the blocks.
struct Way<B: FusedOps> {
    course: Course,
    /// The image tokens before the first block.
    embedded: Tensor<B, 2>,
    /// After the first blocks, and before the last ones.
    after_head: Option<Streams<B>>,
    before_tail: Option<Streams<B>>,
    /// Outside the packed tensors: a half that reuses.
    apart: Option<Streams<B>>,
    reused: bool,
}

/// Predicts the velocity of every half. `pack` computes the positions of segments.
///
/// # Errors
/// If a value cannot be read from the device, or the half on another device that decides has failed.
pub(super) fn forward<B: FusedOps>(
    transformer: &Transformer<B>,
    halves: &[Tokens<'_, B>],
    modulation: &StepModulation<B>,
    pack: &mut dyn FnMut(&[Segment]) -> Packing<B>,
) -> Result<Vec<Computed<B>>, PipelineError> {
    let blocks = transformer.num_blocks();
    let all = pack(&segments_of(halves, &mut (0..halves.len())));
    let all_adapters = adapters_of(halves, 0..halves.len());
    let rows: Vec<usize> = halves.iter().map(|half| half.latents.dims()[0]).collect();
    let latents = halves.iter().map(|half| half.latents.clone());
    let embedded = transformer.embed_image(cat(latents.collect()), &all_adapters);
    let mut parts = embedded
        .clone()
        .split_with_sizes(rows.clone(), 0)
        .into_iter();
    let mut ways = Vec::with_capacity(halves.len());
    for half in halves {
        ways.push(Way {
            course: Course::of(half.pass, blocks),
            embedded: parts.next().expect("one part for each half"),
            after_head: None,
            before_tail: None,
            apart: None,
            reused: false,
        });
    }

    let mut packed = first(transformer, halves, &ways, embedded);
    let mut from = 0;
    for stop in stops(&ways, blocks) {
        if let Some(streams) = packed.streams.take() {
            let some;
            let (packing, adapters) = if packed.halves.len() == halves.len() {
                (&all, &all_adapters)
            } else {
                let indices = || packed.halves.iter().copied();
                let packing = pack(&segments_of(halves, &mut indices()));
                some = (packing, adapters_of(halves, indices()));
                (&some.0, &some.1)
            };
            let range = from..stop;
            let streams = transformer.run_blocks(range, streams, modulation, packing, adapters);
            packed.streams = Some(streams);
        }
        from = stop;
        if stop < blocks {
            packed = packed.at(stop, halves, &mut ways)?;
        }
    }

    let image = last(halves, &mut ways, packed);
    let velocity = transformer.project(image.clone(), modulation, &all, &all_adapters);
    let mut images = image.split_with_sizes(rows.clone(), 0).into_iter();
    let mut velocities = velocity.split_with_sizes(rows, 0).into_iter();
    let mut computed = Vec::with_capacity(halves.len());
    for (half, way) in halves.iter().zip(ways) {
        let image = images.next().expect("one part for each half");
        let velocity = velocities.next().expect("one part for each half");
        computed.push(way.end(half, image, velocity, blocks)?);
    }
    Ok(computed)
}

/// One tensor is not copied.
fn cat<B: FusedOps>(mut tensors: Vec<Tensor<B, 2>>) -> Tensor<B, 2> {
    if tensors.len() == 1 {
        return tensors.remove(0);
    }
    Tensor::cat(tensors, 0)
}

fn segments_of<B: FusedOps>(
    halves: &[Tokens<'_, B>],
    indices: &mut dyn Iterator<Item = usize>,
) -> Vec<Segment> {
    indices
        .flat_map(|index| halves[index].segments.iter().copied())
        .collect()
}

fn adapters_of<B: FusedOps>(
    halves: &[Tokens<'_, B>],
    indices: impl Iterator<Item = usize>,
) -> AdapterRuns<B> {
    let tokens = |half: &Tokens<'_, B>| (half.latents.dims()[0], half.text.dims()[0]);
    AdapterRuns::of(indices.map(|index| (halves[index].adapters, tokens(&halves[index]))))
}

/// Numbers of blocks after which some half is looked at, the last block included.
fn stops<B: FusedOps>(ways: &[Way<B>], blocks: usize) -> BTreeSet<usize> {
    let of_way = |way: &Way<B>| match way.course {
        Course::Probe { head, tail, .. } => vec![head, tail],
        Course::All { .. } | Course::None => Vec::new(),
    };
    ways.iter().flat_map(of_way).chain([blocks]).collect()
}

/// The halves that run the first block.
fn first<B: FusedOps>(
    transformer: &Transformer<B>,
    halves: &[Tokens<'_, B>],
    ways: &[Way<B>],
    embedded: Tensor<B, 2>,
) -> Packed<B> {
    let runs = |&index: &usize| !matches!(ways[index].course, Course::None);
    let running: Vec<usize> = (0..halves.len()).filter(runs).collect();
    if running.is_empty() {
        return Packed {
            halves: running,
            streams: None,
        };
    }
    let image = if running.len() == halves.len() {
        embedded
    } else {
        cat(running
            .iter()
            .map(|&index| ways[index].embedded.clone())
            .collect())
    };
    let text = running.iter().map(|&index| halves[index].text.clone());
    let adapters = adapters_of(halves, running.iter().copied());
    let text = transformer.embed_text(cat(text.collect()), &adapters);
    Packed {
        halves: running,
        streams: Some((image, text)),
    }
}

/// The image tokens of all halves after the last block.
fn last<B: FusedOps>(
    halves: &[Tokens<'_, B>],
    ways: &mut [Way<B>],
    packed: Packed<B>,
) -> Tensor<B, 2> {
    for (way, half) in ways.iter_mut().zip(halves) {
        if let (Course::None, Some(before)) = (way.course, &half.pass.before) {
            way.reused = true;
            let change = before.image.after(half.step - before.step);
            // No block runs, so that the text does not matter.
            way.apart = Some((way.embedded.clone() + change, half.text.clone()));
        }
    }
    let is_whole = packed.halves.len() == halves.len();
    match &packed.streams {
        Some((image, _)) if is_whole => image.clone(),
        _ => {
            for (index, streams) in packed.split(halves) {
                ways[index].apart = Some(streams);
            }
            let image = |way: &mut Way<B>| way.apart.take().map(|(image, _)| image);
            cat(ways.iter_mut().filter_map(image).collect())
        }
    }
}

impl<B: FusedOps> Packed<B> {
    /// The tokens of each half.
    fn split(&self, halves: &[Tokens<'_, B>]) -> Vec<(usize, Streams<B>)> {
        let Some((image, text)) = &self.streams else {
            return Vec::new();
        };
        let rows = |of: &dyn Fn(&Tokens<'_, B>) -> usize| -> Vec<usize> {
            self.halves
                .iter()
                .map(|&index| of(&halves[index]))
                .collect()
        };
        let images = image
            .clone()
            .split_with_sizes(rows(&|half| half.latents.dims()[0]), 0);
        let texts = text
            .clone()
            .split_with_sizes(rows(&|half| half.text.dims()[0]), 0);
        let streams = images.into_iter().zip(texts);
        self.halves.iter().copied().zip(streams).collect()
    }

    /// Does what is due after block `stop`: halves decide and leave, or come back.
    fn at(
        self,
        stop: usize,
        halves: &[Tokens<'_, B>],
        ways: &mut [Way<B>],
    ) -> Result<Self, PipelineError> {
        let mut split = self.split(halves);
        for (index, streams) in &split {
            let way = &mut ways[*index];
            let Course::Probe { head, tail, .. } = way.course else {
                continue;
            };
            if stop == head {
                way.after_head = Some(streams.clone());
            }
            if stop == tail {
                way.before_tail = Some(streams.clone());
            }
        }
        decide(stop, halves, ways)?;
        let before = self.halves.len();
        let mut kept = Vec::with_capacity(before);
        for (index, streams) in split.drain(..) {
            let (way, half) = (&mut ways[index], &halves[index]);
            if way.reuses_from(stop, half)? {
                continue;
            }
            kept.push((index, streams));
        }
        let left = kept.len() < before;
        let came: Vec<(usize, Streams<B>)> = ways
            .iter_mut()
            .enumerate()
            .filter_map(|(index, way)| Some((index, way.comes_back(stop)?)))
            .collect();
        if !left && came.is_empty() {
            return Ok(self);
        }
        kept.extend(came);
        kept.sort_by_key(|(index, _)| *index);
        let indices = kept.iter().map(|(index, _)| *index).collect();
        let (images, texts): (Vec<_>, Vec<_>) =
            kept.into_iter().map(|(_, streams)| streams).unzip();
        Ok(Self {
            halves: indices,
            streams: (!images.is_empty()).then(|| (cat(images), cat(texts))),
        })
    }
}

/// Makes the decisions of the halves that make them after block `stop`, with one read for all.
fn decide<B: FusedOps>(
    stop: usize,
    halves: &[Tokens<'_, B>],
    ways: &[Way<B>],
) -> Result<(), PipelineError> {
    let mut compared = Vec::new();
    let mut changes = Vec::new();
    for (half, way) in halves.iter().zip(ways) {
        let decision = &half.pass.decision;
        let Course::Probe { head, decide, .. } = way.course else {
            continue;
        };
        if head != stop || !half.pass.decides || decision.is_made() {
            continue;
        }
        let earlier = half.pass.before.as_ref().and_then(|kept| kept.head.clone());
        match (decide, way.head_change(), earlier) {
            (Decide::Compare(threshold), Some(now), Some(earlier)) => {
                compared.push((decision, threshold));
                changes.push(relative_change(now, earlier));
            }
            (Decide::Reuse, ..) => decision.make(true),
            (Decide::Compute | Decide::Compare(_), ..) => decision.make(false),
        }
    }
    if changes.is_empty() {
        return Ok(());
    }
    let changes = read(cat(changes))?;
    for ((decision, threshold), change) in compared.into_iter().zip(changes) {
        decision.make(f64::from(change) < threshold);
    }
    Ok(())
}

impl<B: FusedOps> Way<B> {
    /// The change of the image tokens by the first blocks.
    fn head_change(&self) -> Option<Tensor<B, 2>> {
        let (image, _) = self.after_head.as_ref()?;
        Some(image.clone() - self.embedded.clone())
    }

    /// Whether the half leaves the packed tensors after block `stop`, because it reuses.
    fn reuses_from(&mut self, stop: usize, half: &Tokens<'_, B>) -> Result<bool, PipelineError> {
        let Course::Probe { head, .. } = self.course else {
            return Ok(false);
        };
        if head != stop || !half.pass.decision.wait()? {
            return Ok(false);
        }
        let (Some(before), Some((image, text))) = (&half.pass.before, self.after_head.take())
        else {
            return Ok(false);
        };
        let ahead = half.step - before.step;
        let text = match &before.text {
            Some(change) => text + change.after(ahead),
            None => text,
        };
        self.apart = Some((image + before.image.after(ahead), text));
        self.reused = true;
        Ok(true)
    }

    /// The tokens of a half that reuses, if the last blocks begin after block `stop`.
    fn comes_back(&mut self, stop: usize) -> Option<Streams<B>> {
        match self.course {
            Course::Probe { tail, .. } if tail == stop => self.apart.take(),
            _ => None,
        }
    }

    /// What the half computed, with its image tokens after the last block.
    fn end(
        self,
        half: &Tokens<'_, B>,
        image: Tensor<B, 2>,
        velocity: Tensor<B, 2>,
        blocks: usize,
    ) -> Result<Computed<B>, PipelineError> {
        let pass = half.pass;
        let before = pass.before.as_ref().filter(|_| pass.order > 0);
        let of_image = |value| {
            let before = before.map(|kept| (&kept.image, kept.step));
            Residual::new(value, half.step, before)
        };
        let of_text = |value| {
            let earlier = before.and_then(|kept| Some((kept.text.as_ref()?, kept.step)));
            Residual::new(value, half.step, earlier)
        };
        let (kept, work) = match self.course {
            Course::All { keep } => {
                let kept = keep.then(|| Kept {
                    step: half.step,
                    head: None,
                    image: of_image(image - self.embedded.clone()),
                    text: None,
                });
                (kept, 1.0)
            }
            Course::None => (pass.before.clone(), 0.0),
            Course::Probe { head, tail, .. } if self.reused => {
                let run = head + blocks - tail;
                (pass.before.clone(), run as f64 / blocks as f64)
            }
            Course::Probe { tail, .. } => {
                let head = self.head_change();
                let after_head = self.after_head.expect("the half ran its first blocks");
                let (image, text) = match self.before_tail {
                    Some((image, text)) => (image, Some(text)),
                    // There are no last blocks.
                    None => (image, None),
                };
                let text = text.filter(|_| tail < blocks);
                let kept = Kept {
                    step: half.step,
                    head,
                    image: of_image(image - after_head.0),
                    text: text.map(|text| of_text(text - after_head.1)),
                };
                (Some(kept), 1.0)
            }
        };
        let ratio = match (&kept, &pass.before) {
            (Some(now), Some(before)) if pass.measure => {
                read(now.image.ratio_to(&before.image))?.first().copied()
            }
            _ => None,
        };
        Ok(Computed {
            velocity: Carried::Here(velocity.cast(DType::F32)),
            kept,
            reused: self.reused,
            work,
            ratio,
        })
    }
}
