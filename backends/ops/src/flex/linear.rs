//! Linear layers with weights in f32, bf16 or f16.

use std::ops::Range;

use burn_flex::{Flex, FlexTensor};
use burn_tensor::{DType, bf16, f16};
use gemm::Parallelism;
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

#[cfg(target_arch = "x86_64")]
use super::bf16::{Bf16Instructions, Panel, add_product, pairs_of_rows};
use super::low_rank::{self, Update};
use super::matrix::{Matrix, Output, least_rows, parts, product};
use super::shared::SharedMut;
use super::thin::Input;
use super::tile::{self, COLUMNS, Lane, ROWS, Tile};
use super::{Float, contiguous, from_values, simd};
use crate::LowRankRun;

/// Output features per panel of weights: enough for the product to run at full speed, few enough for
/// the panel to stay in the L2 cache.
const PANEL: usize = 64;
/// Largest number of tokens for [`few_tokens`].
const FEW_TOKENS: usize = 96;
/// Values per task of an elementwise loop.
const CHUNK: usize = 1 << 14;
/// Tokens per task of [`Start::fill_all`].
const START_TOKENS: usize = 48;
/// Smallest number of tokens per task: with fewer, reading the panel's weights costs more than the
/// product.
const MIN_TOKENS: usize = 48;

/// Computes [`FusedOps::fused_linears`](crate::FusedOps::fused_linears). Weights in bf16 and f16 are
/// widened to f32 one panel at a time; bf16 weights not at all on CPUs with bf16 instructions, which
/// halves the time.
pub(super) fn fused_linears(
    x: Float<2>,
    layers: Vec<(Float<2>, Option<Float<1>>)>,
    runs: &[LowRankRun<Flex>],
) -> Vec<Float<2>> {
    let length = x.dims()[1];
    let x = contiguous(x);
    let values = x.storage::<f32>();
    let pairs = if layers.iter().any(|layer| layer.0.dtype() == DType::BF16) {
        pairs(values, length)
    } else {
        Vec::new()
    };
    let input = Input {
        values,
        length,
        pairs: &pairs,
    };
    let updates = low_rank::updates(input, layers.len(), runs);
    let layers = layers.into_iter().zip(updates);
    let linear = |((weight, bias), updates): (_, Vec<_>)| linear(input, weight, bias, &updates);
    layers.map(linear).collect()
}

/// The input rounded to pairs of bf16, if the CPU multiplies them; else nothing.
fn pairs(values: &[f32], length: usize) -> Vec<u32> {
    #[cfg(target_arch = "x86_64")]
    if Bf16Instructions::detect().is_some() {
        return pairs_of_rows(values, length);
    }
    let _ = (values, length);
    Vec::new()
}

/// What a layer's product is added to.
#[derive(Clone, Copy)]
struct Start<'a> {
    bias: Option<&'a [f32]>,
    updates: &'a [Box<dyn Update>],
}

impl Start<'_> {
    /// Writes the whole rows of these tokens.
    fn fill(self, rows: &mut [f32], d_out: usize, tokens: Range<usize>) {
        if let Some(bias) = self.bias {
            rows.chunks_exact_mut(d_out)
                .for_each(|row| row.copy_from_slice(bias));
        }
        for update in self.updates {
            update.add(rows, d_out, tokens.clone(), 0..d_out);
        }
    }

    /// Writes all rows; `output` is zeros.
    fn fill_all(self, output: &mut [f32], d_out: usize) {
        let blocks = output.par_chunks_mut(START_TOKENS * d_out).enumerate();
        blocks.for_each(|(index, rows)| {
            let (first, count) = (index * START_TOKENS, rows.len() / d_out);
            self.fill(rows, d_out, first..first + count);
        });
    }
}

fn linear(
    input: Input<'_>,
    weight: Float<2>,
    bias: Option<Float<1>>,
    updates: &[Box<dyn Update>],
) -> Float<2> {
    let (x, d_in, tokens) = (input.values, input.length, input.tokens());
    let [d_out, _] = weight.dims();
    let weight = contiguous(weight);
    let bias = bias.map(|bias| contiguous(bias.cast(DType::F32)));
    let bias = bias.as_ref().map(FlexTensor::storage::<f32>);
    let start = Start { bias, updates };

    let mut output = vec![0.0_f32; tokens * d_out];
    match weight.dtype() {
        DType::BF16 => bf16_linear(&mut output, input, weight.storage(), start),
        DType::F16 => {
            let widen = |weights: &[f16], wide: &mut [f32]| {
                wide.iter_mut()
                    .zip(weights)
                    .for_each(|(wide, narrow)| *wide = narrow.to_f32());
            };
            widening(&mut output, (x, d_in), weight.storage(), start, widen);
        }
        _ if tokens <= FEW_TOKENS => few_tokens(&mut output, (x, d_in), weight.storage(), start),
        _ => {
            let weight = Matrix::rows(weight.storage::<f32>(), d_out, d_in, d_in);
            let mode = if bias.is_none() && updates.is_empty() {
                Output::Overwrite
            } else {
                start.fill_all(&mut output, d_out);
                Output::Add
            };
            product(
                &mut output,
                Matrix::rows(x, tokens, d_in, d_in),
                weight.transposed(),
                mode,
                Parallelism::Rayon(0),
            );
        }
    }
    from_values(output, [tokens, d_out])
}

/// Computes a linear layer without repacking the weights: with few tokens, repacking takes longer
/// than the product. Halves the time for 64 tokens.
fn few_tokens(output: &mut [f32], (x, d_in): (&[f32], usize), weight: &[f32], start: Start<'_>) {
    let d_out = weight.len() / d_in;
    let tokens = output.len() / d_out;
    let mut started = Vec::new();
    if !start.updates.is_empty() {
        started.resize(output.len(), 0.0);
        start.fill_all(&mut started, d_out);
    }
    // [tokens / COLUMNS, d_in]
    let mut lanes = vec![Lane::default(); tokens.div_ceil(COLUMNS) * d_in];
    let blocks = lanes.par_chunks_mut(d_in).zip(x.par_chunks(COLUMNS * d_in));
    blocks.for_each(|(lanes, tokens)| {
        tile::interleave(lanes, tokens.chunks_exact(d_in));
    });
    let shared = SharedMut::new(output);
    (0..d_out.div_ceil(ROWS)).into_par_iter().for_each(|group| {
        let first = group * ROWS;
        let features = ROWS.min(d_out - first);
        let left = tile::rows(first, d_out, |feature| &weight[feature * d_in..][..d_in]);
        let feature = |i: usize| first + i.min(features - 1);
        for (block, lanes) in lanes.chunks_exact(d_in).enumerate() {
            let mut tile: Tile = std::array::from_fn(|i| {
                Lane([start.bias.map_or(0.0, |bias| bias[feature(i)]); COLUMNS])
            });
            let rows = started.chunks_exact(d_out).skip(block * COLUMNS);
            for (column, row) in rows.take(COLUMNS).enumerate() {
                for (i, lane) in tile.iter_mut().enumerate() {
                    lane[column] = row[feature(i)];
                }
            }
            let tile = Arch::new().dispatch(Rows { left, tile, lanes });
            for (token, i) in (block * COLUMNS..tokens).zip(0..COLUMNS) {
                let sums = tile.map(|row| row[i]);
                #[expect(unsafe_code, reason = "tasks write disjoint parts of the output")]
                // SAFETY: tasks have disjoint features.
                unsafe {
                    shared.write(token * d_out + first, &sums[..features]);
                }
            }
        }
    });
}

/// The products of six output features with up to 32 tokens.
struct Rows<'a> {
    left: [&'a [f32]; ROWS],
    /// What the products are added to.
    tile: Tile,
    lanes: &'a [Lane],
}

impl WithSimd for Rows<'_> {
    type Output = Tile;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> Tile {
        let mut tile = self.tile;
        // As gemm computes more tokens.
        for terms in parts(self.lanes.len()) {
            let left = self.left.map(|row| &row[terms.clone()]);
            let mut sums = Tile::default();
            tile::add(simd, &mut sums, left, &self.lanes[terms]);
            for (row, sums) in tile.iter_mut().zip(&sums) {
                for (value, sum) in row.iter_mut().zip(sums.iter()) {
                    *value += sum;
                }
            }
        }
        tile
    }
}

/// Computes a linear layer with bf16 weights: by bf16 instructions if the CPU has them, else in f32 of
/// the same rounded values.
fn bf16_linear(output: &mut [f32], input: Input<'_>, weight: &[bf16], start: Start<'_>) {
    let d_in = input.length;
    #[cfg(target_arch = "x86_64")]
    if let Some(instructions) = Bf16Instructions::detect() {
        let pairs = d_in.div_ceil(2);
        return by_panels(
            output,
            (weight, d_in),
            start,
            Panel::new,
            |panel, sums, tokens, weights| {
                let x = &input.pairs[tokens.start * pairs..tokens.end * pairs];
                add_product(instructions, sums, x, (weights, d_in), panel);
            },
        );
    }
    bf16_linear_in_f32(output, (input.values, d_in), weight, start);
}

fn bf16_linear_in_f32(
    output: &mut [f32],
    (x, d_in): (&[f32], usize),
    weight: &[bf16],
    start: Start<'_>,
) {
    let mut rounded = vec![0.0_f32; x.len()];
    rounded
        .par_chunks_mut(CHUNK)
        .zip(x.par_chunks(CHUNK))
        .for_each(|(rounded, x)| {
            simd::vectorised(|| {
                for (rounded, &x) in rounded.iter_mut().zip(x) {
                    *rounded = f32::from_bits(simd::bf16_bits(x) << 16);
                }
            });
        });
    let widen = |weights: &[bf16], wide: &mut [f32]| {
        simd::vectorised(|| {
            for (wide, narrow) in wide.iter_mut().zip(weights) {
                *wide = f32::from_bits(u32::from(narrow.to_bits()) << 16);
            }
        });
    };
    widening(output, (&rounded, d_in), weight, start, widen);
}

/// Computes a linear layer with weights that `widen` converts to f32, one panel at a time.
fn widening<T: Sync>(
    output: &mut [f32],
    (x, d_in): (&[f32], usize),
    weight: &[T],
    start: Start<'_>,
    widen: impl Fn(&[T], &mut [f32]) + Sync,
) {
    let panel = || vec![0.0_f32; PANEL * d_in];
    by_panels(
        output,
        (weight, d_in),
        start,
        panel,
        |wide, sums, tokens, weights| {
            let (used, unused) = wide.split_at_mut(weights.len());
            widen(weights, used);
            unused.fill(0.0);
            let x = &x[tokens.start * d_in..tokens.end * d_in];
            let weights = Matrix::rows(wide, PANEL, d_in, d_in).transposed();
            let add = |sums: &mut [f32], x: &[f32]| {
                let x = Matrix::rows(x, x.len() / d_in, d_in, d_in);
                product(sums, x, weights, Output::Add, Parallelism::None);
            };
            let least = least_rows(PANEL);
            if tokens.len() >= least {
                return add(sums.as_flattened_mut(), x);
            }
            // With rows of zeros, a token is the same beside any others.
            let mut padded = x.to_vec();
            padded.resize(least * d_in, 0.0);
            let mut padded_sums = sums.to_vec();
            padded_sums.resize(least, [0.0; PANEL]);
            add(padded_sums.as_flattened_mut(), &padded);
            sums.copy_from_slice(&padded_sums[..tokens.len()]);
        },
    );
}

/// Computes a linear layer with `weight` `[out, d_in]`, in tasks of one panel of output features and
/// one range of tokens.
///
/// `add` adds the panel's products to the sums. Its arguments are the thread's scratch, the sums
/// (`[tokens, PANEL]`, initialised with the bias and the updates), the range of tokens, and the panel's weights.
fn by_panels<T: Sync, S>(
    output: &mut [f32],
    (weight, d_in): (&[T], usize),
    start: Start<'_>,
    scratch: impl Fn() -> S + Sync + Send,
    add: impl Fn(&mut S, &mut [[f32; PANEL]], Range<usize>, &[T]) + Sync,
) {
    let d_out = weight.len() / d_in;
    let tokens = output.len() / d_out;
    let panels = d_out.div_ceil(PANEL);
    // A few tasks per thread, so that threads finish at about the same time.
    let runs = (4 * rayon::current_num_threads()).div_ceil(panels);
    let run = tokens.div_ceil(runs).max(MIN_TOKENS);
    let shared = SharedMut::new(output);
    (0..panels * tokens.div_ceil(run))
        .into_par_iter()
        .for_each_init(
            || (scratch(), Vec::new()),
            |(scratch, sums), task| {
                let (first, top) = (task % panels * PANEL, task / panels * run);
                let features = PANEL.min(d_out - first);
                let tokens = top..tokens.min(top + run);
                let mut row = [0.0_f32; PANEL];
                if let Some(bias) = start.bias {
                    row[..features].copy_from_slice(&bias[first..][..features]);
                }
                sums.clear();
                sums.resize(tokens.len(), row);
                for update in start.updates {
                    let features = first..first + features;
                    update.add(sums.as_flattened_mut(), PANEL, tokens.clone(), features);
                }
                let weights = &weight[first * d_in..][..features * d_in];
                add(scratch, sums, tokens.clone(), weights);
                for (token, sums) in tokens.zip(sums) {
                    #[expect(unsafe_code, reason = "tasks write disjoint parts of the output")]
                    // SAFETY: tasks have disjoint tokens or features.
                    unsafe {
                        shared.write(token * d_out + first, &sums[..features]);
                    }
                }
            },
        );
}

#[cfg(test)]
mod tests {
    use burn_flex::FlexDevice;
    use burn_tensor::{Tensor, TensorData};
    use rayon::ThreadPoolBuilder;

    use super::*;

    const NOTHING: Start<'_> = Start {
        bias: None,
        updates: &[],
    };

    fn tensor(rows: usize, columns: usize) -> Float<2> {
        let value = |i: usize| ((i * 37 % 101) as f32 - 50.0) * 0.0301;
        let values: Vec<f32> = (0..rows * columns).map(value).collect();
        let data = TensorData::new(values, [rows, columns]);
        Tensor::from_data(data, (&FlexDevice, DType::F32))
    }

    fn fused_linear(x: Float<2>, weight: Float<2>, bias: Option<Float<1>>) -> Float<2> {
        fused_linears(x, vec![(weight, bias)], &[]).remove(0)
    }

    fn values(x: Float<2>) -> Vec<f32> {
        x.into_data().into_vec().unwrap()
    }

    /// Tokens of several images, or of both halves of guidance, may share one call or not.
    #[test]
    fn a_token_does_not_depend_on_its_company_or_on_threads() {
        const MOST: usize = 231;
        let pools = [1, 2, 3].map(|threads| {
            let pool = ThreadPoolBuilder::new().num_threads(threads).build();
            pool.unwrap()
        });
        for (d_in, d_out) in [(64, 16), (67, 130), (1100, 72)] {
            let bias = tensor(1, d_out).reshape([d_out]);
            let x = tensor(MOST, d_in);
            for dtype in [DType::F32, DType::F16, DType::BF16] {
                for bias in [None, Some(bias.clone())] {
                    let weight = tensor(d_out, d_in).cast(dtype);
                    let linear = |first: usize, tokens: usize| {
                        let x = x.clone().narrow(0, first, tokens);
                        values(fused_linear(x, weight.clone(), bias.clone()))
                    };
                    let all = linear(0, MOST);
                    for (first, tokens) in [(0, 1), (3, 5), (7, 96), (1, 97), (100, 49), (0, 200)] {
                        let expected = &all[first * d_out..(first + tokens) * d_out];
                        for pool in &pools {
                            let found = pool.install(|| linear(first, tokens));
                            let threads = pool.current_num_threads();
                            assert!(
                                found == expected,
                                "{tokens} tokens, {d_in} to {d_out}, {dtype:?}, {threads} threads"
                            );
                        }
                    }
                }
            }
            // Machines with bf16 instructions never take this path elsewhere.
            let x = values(x);
            let weight: Vec<bf16> = values(tensor(d_out, d_in))
                .into_iter()
                .map(bf16::from_f32)
                .collect();
            let in_f32 = |x: &[f32]| {
                let mut output = vec![0.0; x.len() / d_in * d_out];
                bf16_linear_in_f32(&mut output, (x, d_in), &weight, NOTHING);
                output
            };
            let all = in_f32(&x);
            for tokens in [1, 2, 4, 5, 49, 97, 101] {
                let found = in_f32(&x[..tokens * d_in]);
                assert!(found == all[..tokens * d_out], "{tokens} tokens in f32");
            }
        }
    }

    /// Machines with bf16 instructions never take the f32 path elsewhere.
    #[test]
    fn bf16_instructions_and_f32_give_the_same_sums() {
        let (tokens, d_in, d_out) = (101, 67, 130);
        let value = |i: usize| ((i * 37 % 101) as f32 - 50.0) * 0.03;
        let x: Vec<f32> = (0..tokens * d_in).map(value).collect();
        let weight: Vec<bf16> = (0..d_out * d_in)
            .map(|i| bf16::from_f32(value(i)))
            .collect();
        let bias: Vec<f32> = (0..d_out).map(value).collect();
        let mut native = vec![0.0_f32; tokens * d_out];
        let mut wide = native.clone();
        let start = Start {
            bias: Some(&bias),
            updates: &[],
        };
        let input = Input {
            values: &x,
            length: d_in,
            pairs: &pairs(&x, d_in),
        };
        bf16_linear(&mut native, input, &weight, start);
        bf16_linear_in_f32(&mut wide, (&x, d_in), &weight, start);
        assert!(wide.iter().any(|x| x.abs() > 1.0));
        for (native, wide) in native.iter().zip(&wide) {
            assert!((native - wide).abs() < 1e-5, "{native} {wide}");
        }
    }
}
