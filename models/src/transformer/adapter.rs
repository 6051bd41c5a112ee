//! Adapters on a device, and how the transformer's linear layers apply them.
//!
//! Weights are never changed: a layer computes its output without adapters and adds what each adapter
//! changes, on the tokens that the adapter is for. Tokens of other jobs in the same packed forward keep
//! their values to the bit.

use std::ops::Range;
use std::sync::Arc;

use burn::tensor::{DType, Tensor};
use kiln_ops::{FusedOps, LowRankRun, LowRankUp};

use super::TransformerConfig;
use super::block::BlockChange;
use super::modulation::TIME_EMBEDDER;
use crate::adapter::{Adapter, AdapterId, Factors, HostMatrix};
use crate::layers::Linear;
use crate::weights::{StoredTensor, upload};

/// An adapter on a device, its matrices in the model's dtype.
#[derive(Debug)]
pub(crate) struct LoadedAdapter<B: FusedOps> {
    id: AdapterId,
    bytes: usize,
    pub(super) img_in: Option<LayerChange<B>>,
    pub(super) txt_in: Option<LayerChange<B>>,
    pub(super) proj_out: Option<LayerChange<B>>,
    pub(super) norm_out: Option<LayerChange<B>>,
    /// `linear_1` and `linear_2` of the timestep embedder.
    pub(super) time: [Option<LayerChange<B>>; 2],
    pub(super) blocks: Vec<BlockChange<B>>,
}

impl<B: FusedOps> LoadedAdapter<B> {
    /// Puts an adapter onto a device. Its changes must fit the configuration.
    pub(crate) fn load(
        adapter: &Adapter,
        config: &TransformerConfig,
        device: &B::Device,
        dtype: DType,
    ) -> Self {
        let from = &AdapterSource {
            adapter,
            device,
            dtype,
        };
        let block = |index| BlockChange::load(from, &format!("transformer_blocks.{index}"));
        Self {
            id: adapter.id(),
            bytes: adapter.device_bytes(dtype.size()),
            img_in: from.layers(&["img_in"]),
            txt_in: from.layers(&["txt_in"]),
            proj_out: from.layers(&["proj_out"]),
            norm_out: from.layers(&["norm_out.linear"]),
            time: ["linear_1", "linear_2"]
                .map(|linear| from.layers(&[&format!("{TIME_EMBEDDER}.{linear}")])),
            blocks: (0..config.num_layers).map(block).collect(),
        }
    }

    pub(crate) fn id(&self) -> AdapterId {
        self.id
    }

    /// Bytes of its matrices on the device.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Whether it changes the time embedding, which every modulation layer depends on.
    pub(super) fn changes_time(&self) -> bool {
        self.time.iter().any(Option::is_some)
    }

    /// Whether the modulation of any layer changes.
    pub(crate) fn changes_modulation(&self) -> bool {
        let of_block = |block: &BlockChange<B>| block.img_mod.is_some() || block.txt_mod.is_some();
        self.changes_time() || self.norm_out.is_some() || self.blocks.iter().any(of_block)
    }
}

/// An adapter that is being put onto a device.
pub(super) struct AdapterSource<'a, B: FusedOps> {
    adapter: &'a Adapter,
    device: &'a B::Device,
    dtype: DType,
}

impl<B: FusedOps> AdapterSource<'_, B> {
    /// The change of linear layers that have one input; `None` if none of them changes.
    pub(super) fn layers(&self, paths: &[&str]) -> Option<LayerChange<B>> {
        let mut downs = Vec::new();
        let mut rank = 0;
        let mut ups = vec![None; paths.len()];
        let mut full = Vec::new();
        for (output, path) in paths.iter().enumerate() {
            let Some(change) = self.adapter.changes().get(*path) else {
                continue;
            };
            let scale = change.scale;
            let matrix = match &change.factors {
                Factors::LowRank { down, up } => {
                    let rows = rank..rank + down.shape[0];
                    rank = rows.end;
                    downs.push(self.matrix(down));
                    ups[output] = Some(LowRankUp {
                        rank: rows,
                        up: self.matrix(up),
                        scale,
                    });
                    continue;
                }
                Factors::Kronecker { left, right } => FullMatrix::Kronecker {
                    left: self.matrix(left),
                    right: self.matrix(right),
                },
                Factors::Dense(matrix) => FullMatrix::Dense(self.matrix(matrix)),
            };
            full.push(FullChange {
                output,
                matrix,
                scale,
            });
        }
        let down = match downs.len() {
            0 if full.is_empty() => return None,
            0 => None,
            1 => Some(downs.remove(0)),
            _ => Some(Tensor::cat(downs, 0)),
        };
        let low_rank = down.map(|down| LowRankChange { down, ups });
        Some(LayerChange { low_rank, full })
    }

    fn matrix(&self, matrix: &HostMatrix) -> Tensor<B, 2> {
        let stored = StoredTensor {
            bytes: matrix.bytes.clone(),
            dtype: matrix.dtype.clone(),
        };
        upload::<B, 2>(stored, matrix.shape, self.device, self.dtype)
    }
}

/// The change of linear layers that have one input.
#[derive(Debug)]
pub(super) struct LayerChange<B: FusedOps> {
    low_rank: Option<LowRankChange<B>>,
    full: Vec<FullChange<B>>,
}

/// The low-rank part of a change: [`LowRankRun::down`] and [`LowRankRun::ups`].
#[derive(Debug)]
struct LowRankChange<B: FusedOps> {
    down: Tensor<B, 2>,
    ups: Vec<Option<LowRankUp<B>>>,
}

/// The change of one of the layers by a matrix that has no low rank.
#[derive(Debug)]
struct FullChange<B: FusedOps> {
    /// Index of the layer.
    output: usize,
    matrix: FullMatrix<B>,
    scale: f32,
}

#[derive(Debug)]
enum FullMatrix<B: FusedOps> {
    /// The Kronecker product of `[a, b]` and `[out / a, in / b]`.
    Kronecker {
        left: Tensor<B, 2>,
        right: Tensor<B, 2>,
    },
    /// `[out, in]`
    Dense(Tensor<B, 2>),
}

impl<B: FusedOps> FullMatrix<B> {
    /// # Shapes
    /// - x: `[tokens, in]`
    /// - output: `[tokens, out]`
    fn forward(&self, x: Tensor<B, 2>) -> Tensor<B, 2> {
        match self {
            Self::Dense(matrix) => B::fused_linear(x, matrix.clone(), None),
            Self::Kronecker { left, right } => {
                let tokens = x.dims()[0];
                let ([a, b], [c, d]) = (left.dims(), right.dims());
                let x = B::fused_linear(x.reshape([tokens * b, d]), right.clone(), None);
                let x = x.reshape([tokens, b, c]).swap_dims(1, 2);
                let x = B::fused_linear(x.reshape([tokens * c, b]), left.clone(), None);
                x.reshape([tokens, c, a])
                    .swap_dims(1, 2)
                    .reshape([tokens, a * c])
            }
        }
    }
}

/// An adapter on a device and its scale.
#[derive(Debug, Clone)]
pub struct AppliedAdapter<B: FusedOps> {
    pub(crate) adapter: Arc<LoadedAdapter<B>>,
    pub(crate) scale: f32,
}

impl<B: FusedOps> PartialEq for AppliedAdapter<B> {
    fn eq(&self, other: &Self) -> bool {
        self.adapter.id == other.adapter.id && self.scale.to_bits() == other.scale.to_bits()
    }
}

/// The tokens of one stream.
#[derive(Debug, Clone, Copy)]
pub(super) enum StreamKind {
    Image,
    Text,
}

/// The adapters of a packed forward, and the tokens that each is for.
#[derive(Debug)]
pub struct AdapterRuns<B: FusedOps> {
    runs: Vec<AdapterRun<B>>,
}

#[derive(Debug)]
struct AdapterRun<B: FusedOps> {
    applied: AppliedAdapter<B>,
    image: Range<usize>,
    text: Range<usize>,
}

impl<B: FusedOps> AdapterRuns<B> {
    /// No adapters.
    pub const fn none() -> Self {
        Self { runs: Vec::new() }
    }

    /// The runs of consecutive parts: for each its adapters, and its numbers of image and text tokens.
    /// Neighbours with the same adapters share their runs.
    pub fn of<'a>(parts: impl Iterator<Item = (&'a [AppliedAdapter<B>], (usize, usize))>) -> Self {
        let (mut image, mut text) = (0, 0);
        let mut last: &[AppliedAdapter<B>] = &[];
        let mut runs: Vec<AdapterRun<B>> = Vec::new();
        for (adapters, (image_tokens, text_tokens)) in parts {
            let (images, texts) = (image..image + image_tokens, text..text + text_tokens);
            (image, text) = (images.end, texts.end);
            if !adapters.is_empty() && adapters == last {
                let first = runs.len() - adapters.len();
                for run in &mut runs[first..] {
                    run.image.end = image;
                    run.text.end = text;
                }
                continue;
            }
            last = adapters;
            runs.extend(adapters.iter().map(|applied| AdapterRun {
                applied: applied.clone(),
                image: images.clone(),
                text: texts.clone(),
            }));
        }
        Self { runs }
    }

    /// Adapters for all rows of a tensor.
    pub(super) fn of_rows(adapters: &[AppliedAdapter<B>], rows: usize) -> Self {
        Self::of([(adapters, (rows, rows))].into_iter())
    }

    /// Computes linear layers with the input `x`, as the adapters change them. `change` picks the layers'
    /// change in an adapter.
    ///
    /// # Shapes
    /// - x: `[tokens, in]`
    /// - outputs: `[tokens, out]` each
    pub(super) fn forward<'a>(
        &'a self,
        layers: &[&Linear<B>],
        x: Tensor<B, 2>,
        stream: StreamKind,
        change: impl Fn(&'a LoadedAdapter<B>) -> Option<&'a LayerChange<B>>,
    ) -> Vec<Tensor<B, 2>> {
        let (low_rank, full) = self.changes(stream, change);
        let layers = layers.iter().map(|layer| layer.parameters()).collect();
        if full.is_empty() {
            return B::fused_linears(x, layers, &low_rank);
        }
        add_full(B::fused_linears(x.clone(), layers, &low_rank), &x, full)
    }

    /// As [`AdapterRuns::forward`], for one layer.
    pub(super) fn forward_one<'a>(
        &'a self,
        layer: &Linear<B>,
        x: Tensor<B, 2>,
        stream: StreamKind,
        change: impl Fn(&'a LoadedAdapter<B>) -> Option<&'a LayerChange<B>>,
    ) -> Tensor<B, 2> {
        self.forward(&[layer], x, stream, change).remove(0)
    }

    /// Adds to the output of a linear layer with the input `x` what the adapters change, for a layer
    /// whose output is computed elsewhere.
    ///
    /// # Shapes
    /// - x: `[tokens, in]`
    /// - output: `[tokens, out]`
    pub(super) fn add_one<'a>(
        &'a self,
        output: Tensor<B, 2>,
        x: Tensor<B, 2>,
        stream: StreamKind,
        change: impl Fn(&'a LoadedAdapter<B>) -> Option<&'a LayerChange<B>>,
    ) -> Tensor<B, 2> {
        let (low_rank, full) = self.changes(stream, change);
        let mut outputs = vec![output];
        if !low_rank.is_empty() {
            outputs = B::add_low_rank(outputs, x.clone(), &low_rank);
        }
        add_full(outputs, &x, full).remove(0)
    }

    /// The changes of linear layers, on the tokens of each run.
    fn changes<'a>(
        &'a self,
        stream: StreamKind,
        change: impl Fn(&'a LoadedAdapter<B>) -> Option<&'a LayerChange<B>>,
    ) -> (Vec<LowRankRun<B>>, Vec<FullRun<'a, B>>) {
        let mut low_rank = Vec::new();
        let mut full = Vec::new();
        for AdapterRun {
            applied,
            image,
            text,
        } in &self.runs
        {
            let tokens = match stream {
                StreamKind::Image => image,
                StreamKind::Text => text,
            };
            let Some(change) = change(&applied.adapter).filter(|_| !tokens.is_empty()) else {
                continue;
            };
            full.extend(change.full.iter().map(|change| FullRun {
                change,
                tokens,
                scale: applied.scale,
            }));
            if let Some(LowRankChange { down, ups }) = &change.low_rank {
                let up = |up: &LowRankUp<B>| LowRankUp {
                    scale: up.scale * applied.scale,
                    ..up.clone()
                };
                low_rank.push(LowRankRun {
                    tokens: tokens.clone(),
                    down: down.clone(),
                    ups: ups.iter().map(|it| it.as_ref().map(up)).collect(),
                });
            }
        }
        (low_rank, full)
    }
}

/// A [`FullChange`] on the tokens of a run.
struct FullRun<'a, B: FusedOps> {
    change: &'a FullChange<B>,
    tokens: &'a Range<usize>,
    scale: f32,
}

/// Adds full changes to the outputs of layers with the input `x`.
fn add_full<B: FusedOps>(
    mut outputs: Vec<Tensor<B, 2>>,
    x: &Tensor<B, 2>,
    full: Vec<FullRun<'_, B>>,
) -> Vec<Tensor<B, 2>> {
    for FullRun {
        change,
        tokens,
        scale,
    } in full
    {
        let rows = |of: &Tensor<B, 2>| of.clone().narrow(0, tokens.start, tokens.len());
        let changed = change.matrix.forward(rows(x)) * (change.scale * scale);
        // Taken out, so that no other handle makes the assignment copy the whole output.
        let output = outputs.remove(change.output);
        let columns = 0..output.dims()[1];
        let changed = rows(&output) + changed;
        let output = output.slice_assign([tokens.clone(), columns], changed);
        outputs.insert(change.output, output);
    }
    outputs
}
