//! Low-rank updates of the outputs of linear layers, in one pass over blocks of tokens: a block's
//! input, its products with the `down` matrix and its outputs stay in the cache.

use burn_flex::{Flex, FlexTensor};
use burn_tensor::DType;
use rayon::prelude::*;

#[cfg(target_arch = "x86_64")]
use super::bf16::Bf16Instructions;
use super::thin::{self, Panel, Product, ROWS, Wide};
use super::{Float, contiguous, from_flex};
use crate::LowRankRun;

/// Largest number of tokens of a block.
const BLOCK: usize = 4 * ROWS;

/// Computes [`FusedOps::add_low_rank`](crate::FusedOps::add_low_rank), in place if nothing else holds
/// the outputs.
pub(super) fn add_low_rank(
    outputs: Vec<Float<2>>,
    x: Float<2>,
    runs: &[LowRankRun<Flex>],
) -> Vec<Float<2>> {
    let x = contiguous(x);
    let mut outputs: Vec<FlexTensor> = outputs.into_iter().map(contiguous).collect();
    for run in runs {
        add_run(&mut outputs, &x, run);
    }
    outputs.into_iter().map(from_flex).collect()
}

fn add_run(outputs: &mut [FlexTensor], x: &FlexTensor, run: &LowRankRun<Flex>) {
    let narrow = run.down.dtype() == DType::BF16;
    #[cfg(target_arch = "x86_64")]
    if narrow && let Some(instructions) = Bf16Instructions::detect() {
        return add(instructions, outputs, x, run);
    }
    add(Wide { rounds: narrow }, outputs, x, run);
}

/// The part of a run for one output.
struct Update<T> {
    /// First of its rows of `down`.
    first: usize,
    rank: usize,
    scale: f32,
    panels: Vec<Panel<T>>,
    width: usize,
}

fn add<P: Product>(product: P, outputs: &mut [FlexTensor], x: &FlexTensor, run: &LowRankRun<Flex>) {
    let panels = |matrix: &Float<2>| {
        let length = matrix.dims()[1];
        let matrix = contiguous(matrix.clone().cast(P::STORED));
        thin::panels::<P>(P::stored(&matrix), length)
    };
    let [ranks, d_in] = run.down.dims();
    let tokens = run.tokens.len();
    if tokens == 0 || ranks == 0 {
        return;
    }
    let down = panels(&run.down);
    let threads = rayon::current_num_threads();
    let block = tokens
        .div_ceil(2 * threads)
        .next_multiple_of(ROWS)
        .min(BLOCK);
    // The outputs of each block.
    let mut blocks: Vec<Vec<_>> = (0..tokens.div_ceil(block)).map(|_| Vec::new()).collect();
    let updates: Vec<_> = run
        .ups
        .iter()
        .map(|up| {
            let up = up.as_ref().filter(|up| !up.rank.is_empty())?;
            Some(Update {
                first: up.rank.start,
                rank: up.rank.len(),
                scale: up.scale,
                panels: panels(&up.up),
                width: up.up.dims()[0],
            })
        })
        .collect();
    for (output, update) in outputs.iter_mut().zip(&updates) {
        let Some(update) = update else { continue };
        let rows = output.storage_mut::<f32>();
        let rows = &mut rows[run.tokens.start * update.width..run.tokens.end * update.width];
        for (block, rows) in blocks.iter_mut().zip(rows.chunks_mut(block * update.width)) {
            block.push((update, rows));
        }
    }
    let x = &x.storage::<f32>()[run.tokens.start * d_in..run.tokens.end * d_in];
    let blocks = blocks.into_par_iter().zip(x.par_chunks(block * d_in));
    blocks.for_each_init(
        || (Vec::new(), Vec::new(), Vec::new()),
        |(scratch, lowered, part), (outputs, x)| {
            let tokens = x.len() / d_in;
            lowered.clear();
            lowered.resize(tokens * ranks, 0.0);
            let left = product.left(x, d_in, 1.0, scratch);
            thin::add_panels(product, left, &down, (lowered, tokens, ranks));
            for (update, rows) in outputs {
                part.clear();
                for lowered in lowered.chunks_exact(ranks) {
                    part.extend_from_slice(&lowered[update.first..][..update.rank]);
                }
                let left = product.left(part, update.rank, update.scale, scratch);
                thin::add_panels(product, left, &update.panels, (rows, tokens, update.width));
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
    use crate::LowRankUp;

    fn tensor(seed: usize, rows: usize, columns: usize) -> Float<2> {
        let value = |i: usize| (((i + seed) * 37 % 101) as f32 - 50.0) * 0.0301;
        let values: Vec<f32> = (0..rows * columns).map(value).collect();
        let data = TensorData::new(values, [rows, columns]);
        Tensor::from_data(data, (&FlexDevice, DType::F32))
    }

    fn values(x: Float<2>) -> Vec<f32> {
        x.into_data().into_vec().unwrap()
    }

    /// Two outputs; the second is `rank` wide less than the first.
    fn run(
        first: usize,
        tokens: usize,
        d_in: usize,
        rank: usize,
        dtype: DType,
    ) -> LowRankRun<Flex> {
        let up = |index: usize, width| {
            Some(LowRankUp {
                rank: index * rank..(index + 1) * rank,
                up: tensor(index, width, rank).cast(dtype),
                scale: 0.3,
            })
        };
        LowRankRun {
            tokens: first..first + tokens,
            down: tensor(7, 2 * rank, d_in).cast(dtype),
            ups: vec![up(0, 130), up(1, 40)],
        }
    }

    /// Tokens of several images, or of both halves of guidance, may share one call or not.
    #[test]
    fn a_token_does_not_depend_on_its_company_or_on_threads() {
        const MOST: usize = 231;
        let pools = [1, 2, 3].map(|threads| {
            let pool = ThreadPoolBuilder::new().num_threads(threads).build();
            pool.unwrap()
        });
        for (d_in, rank) in [(64, 16), (67, 5), (1100, 72)] {
            for dtype in [DType::F32, DType::F16, DType::BF16] {
                let (x, outputs) = (
                    tensor(1, MOST, d_in),
                    [130, 40].map(|it| tensor(3, MOST, it)),
                );
                let add = |first: usize, tokens: usize, run: LowRankRun<Flex>| {
                    let rows = |of: &Float<2>| of.clone().narrow(0, first, tokens);
                    let outputs = outputs.iter().map(rows).collect();
                    let added = add_low_rank(outputs, rows(&x), &[run]);
                    added.into_iter().map(values).collect::<Vec<_>>()
                };
                let all = add(0, MOST, run(0, MOST, d_in, rank, dtype));
                for (first, tokens) in [(0, 1), (3, 5), (7, 96), (1, 97), (100, 49), (0, 200)] {
                    for pool in &pools {
                        let part = add(first, tokens, run(0, tokens, d_in, rank, dtype));
                        let inside =
                            pool.install(|| add(0, MOST, run(first, tokens, d_in, rank, dtype)));
                        let threads = pool.current_num_threads();
                        let equal =
                            all.iter()
                                .zip(part)
                                .zip(inside)
                                .all(|((all, part), inside)| {
                                    let width = all.len() / MOST;
                                    let tokens = first * width..(first + tokens) * width;
                                    all[tokens.clone()] == part
                                        && all[tokens.clone()] == inside[tokens]
                                });
                        assert!(
                            equal,
                            "{tokens} tokens, {d_in} wide, rank {rank}, {dtype:?}, {threads} threads"
                        );
                    }
                }
            }
        }
    }

    /// Machines with bf16 instructions never take the f32 path of bf16 matrices elsewhere. With small
    /// integers sums are exact in any order.
    #[test]
    fn bf16_instructions_and_f32_give_the_same_sums() {
        let integers = |x: Float<2>| (x * 2.0).round();
        let x = contiguous(integers(tensor(1, 101, 67)));
        let mut run = run(3, 90, 67, 21, DType::BF16);
        run.down = integers(run.down);
        for up in run.ups.iter_mut().flatten() {
            up.up = integers(up.up.clone());
        }
        let outputs = || [130, 40].map(|it| contiguous(tensor(3, 101, it))).to_vec();
        let (mut found, mut wide) = (outputs(), outputs());
        add_run(&mut found, &x, &run);
        add(Wide { rounds: true }, &mut wide, &x, &run);
        for ((found, wide), before) in found.iter().zip(&wide).zip(outputs()) {
            let [found, wide, before] = [found, wide, &before].map(FlexTensor::storage::<f32>);
            assert!(found != before);
            for (found, wide) in found.iter().zip(wide) {
                assert!(
                    (found - wide).abs() < 1e-5 * wide.abs().max(100.0),
                    "{found} {wide}"
                );
            }
        }
    }
}
