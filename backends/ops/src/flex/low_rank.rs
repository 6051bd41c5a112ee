//! Low-rank updates of linear layers, to which the layers' own products are added. So a layer's outputs
//! are written once, and one read of the input serves the layers that share it.

use std::ops::Range;

use burn_flex::Flex;
use burn_tensor::DType;
use rayon::prelude::*;

#[cfg(target_arch = "x86_64")]
use super::bf16::Bf16Instructions;
use super::thin::{self, Input, Panel, Product, ROWS, Sums, Wide};
use super::{Float, contiguous};
use crate::LowRankRun;

/// Tokens of a block, whose input and products with `down` matrices stay in the cache.
const BLOCK: usize = 4 * ROWS;

/// An update of one layer's outputs.
pub(super) trait Update: Sync {
    /// Adds the update of these tokens and features to `sums`, whose rows are `stride` values apart.
    /// `features` begin at a multiple of 64.
    fn add(&self, sums: &mut [f32], stride: usize, tokens: Range<usize>, features: Range<usize>);
}

/// The updates of each of `layers` layers.
pub(super) fn updates(
    input: Input<'_>,
    layers: usize,
    runs: &[LowRankRun<Flex>],
) -> Vec<Vec<Box<dyn Update>>> {
    let mut updates: Vec<Vec<Box<dyn Update>>> = (0..layers).map(|_| Vec::new()).collect();
    let (narrow, wide): (Vec<_>, Vec<_>) = runs
        .iter()
        .filter(|run| !run.tokens.is_empty())
        .partition(|run| run.down.dtype() == DType::BF16);
    add_updates(Wide { rounds: false }, input, &wide, &mut updates);
    #[cfg(target_arch = "x86_64")]
    if let Some(instructions) = Bf16Instructions::detect() {
        add_updates(instructions, input, &narrow, &mut updates);
        return updates;
    }
    add_updates(Wide { rounds: true }, input, &narrow, &mut updates);
    updates
}

/// The update of one output by one run.
struct LowRank<P: Product> {
    product: P,
    /// The output, and its rows of the run's `down` matrix.
    output: usize,
    rank: Range<usize>,
    scale: f32,
    tokens: Range<usize>,
    /// Of the `up` matrix.
    panels: Vec<Panel<P::Term>>,
    /// Terms of a token.
    terms: usize,
    /// The scaled product of the input and `down`, `[tokens, terms]`; zeros where a token is not in
    /// the run.
    lowered: Vec<P::Term>,
}

/// The `down` matrix of a run.
struct Down<T> {
    panels: Vec<Panel<T>>,
    ranks: usize,
}

/// A run, and its updates.
struct RunUpdates<P: Product> {
    down: Down<P::Term>,
    ups: Vec<LowRank<P>>,
}

fn panels<P: Product>(matrix: &Float<2>) -> Vec<Panel<P::Term>> {
    let length = matrix.dims()[1];
    let matrix = contiguous(matrix.clone().cast(P::STORED));
    thin::panels::<P>(P::stored(&matrix), length)
}

/// Adds the updates of runs to those of each layer.
fn add_updates<P: Product + 'static>(
    product: P,
    input: Input<'_>,
    runs: &[&LowRankRun<Flex>],
    updates: &mut [Vec<Box<dyn Update>>],
) {
    if runs.is_empty() {
        return;
    }
    let tokens = input.tokens();
    let mut all: Vec<RunUpdates<P>> = runs
        .iter()
        .map(|run| {
            let ups = run.ups.iter().enumerate();
            let ups = ups.filter_map(|(output, up)| Some((output, up.as_ref()?)));
            let ups = ups.filter(|(_, up)| !up.rank.is_empty());
            let ups = ups.map(|(output, up)| {
                let terms = P::terms(up.rank.len());
                // Some rows past the last token are read.
                let rows = tokens.next_multiple_of(BLOCK) + ROWS;
                LowRank {
                    product,
                    output,
                    rank: up.rank.clone(),
                    scale: up.scale,
                    tokens: run.tokens.clone(),
                    panels: panels::<P>(&up.up),
                    terms,
                    lowered: vec![P::Term::default(); rows * terms],
                }
            });
            let down = Down {
                panels: panels::<P>(&run.down),
                ranks: run.down.dims()[0],
            };
            RunUpdates {
                down,
                ups: ups.collect(),
            }
        })
        .collect();

    // For each block its part of every run's products.
    let mut blocks: Vec<Vec<_>> = (0..tokens.div_ceil(BLOCK)).map(|_| Vec::new()).collect();
    for RunUpdates { down, ups } in &mut all {
        let run = ups.first().map_or(0..0, |up| up.tokens.clone());
        for (index, block) in blocks.iter_mut().enumerate() {
            let first = index * BLOCK;
            let start = run.start.max(first) - first;
            let end = run.end.min(first + BLOCK).saturating_sub(first);
            block.push((&*down, start..end.max(start), Vec::new()));
        }
        for up in ups {
            let LowRank {
                rank,
                scale,
                terms,
                lowered,
                ..
            } = up;
            let chunks = lowered.chunks_mut(BLOCK * *terms);
            for (block, lowered) in blocks.iter_mut().zip(chunks) {
                if let Some((_, _, parts)) = block.last_mut() {
                    parts.push((rank.clone(), *scale, *terms, lowered));
                }
            }
        }
    }
    let blocks = blocks.into_par_iter().enumerate();
    blocks.for_each_init(
        || (Vec::new(), Vec::new()),
        |(converted, products), (index, runs)| {
            if runs.iter().all(|(_, tokens, _)| tokens.is_empty()) {
                return;
            }
            let first = index * BLOCK;
            let tokens = BLOCK.min(tokens - first);
            let left = terms_of(product, input, first..first + tokens, converted);
            for (down, inside, parts) in runs {
                if inside.is_empty() {
                    continue;
                }
                products.clear();
                products.resize(tokens * down.ranks, 0.0);
                add_panels(product, left, &down.panels, (products, tokens, down.ranks));
                for (rank, scale, terms, lowered) in parts {
                    let products = products.chunks_exact(down.ranks);
                    let products = products.map(|row| &row[rank.clone()]);
                    let rows = products.zip(lowered.chunks_exact_mut(terms));
                    product.convert(rows.skip(inside.start).take(inside.len()), scale);
                }
            }
        },
    );
    for update in all.into_iter().flat_map(|run| run.ups) {
        updates[update.output].push(Box::new(update));
    }
}

/// Rows of the input as terms, with rows added up to a multiple of [`ROWS`].
fn terms_of<'a, P: Product>(
    product: P,
    input: Input<'a>,
    rows: Range<usize>,
    converted: &'a mut Vec<P::Term>,
) -> &'a [P::Term] {
    let (length, terms) = (input.length, P::terms(input.length));
    let padded = rows.len().next_multiple_of(ROWS);
    if let Some(rows) = product.rows(input, rows.start..rows.start + padded) {
        return rows;
    }
    converted.resize(padded * terms, P::Term::default());
    let values = &input.values[rows.start * length..rows.end * length];
    let rows = values.chunks_exact(length);
    product.convert(rows.zip(converted.chunks_exact_mut(terms)), 1.0);
    converted
}

/// Adds `left · matrixᵀ` to `sums`, rows that are `stride` values apart.
fn add_panels<P: Product>(
    product: P,
    left: &[P::Term],
    panels: &[Panel<P::Term>],
    (sums, rows, stride): (&mut [f32], usize, usize),
) {
    for (index, panel) in panels.iter().enumerate() {
        let sums = Sums {
            values: &mut *sums,
            rows,
            stride,
            first: index * P::COLUMNS,
        };
        product.add(left, panel, sums);
    }
}

impl<P: Product> Update for LowRank<P> {
    fn add(&self, sums: &mut [f32], stride: usize, tokens: Range<usize>, features: Range<usize>) {
        let first = tokens.start.max(self.tokens.start);
        let end = tokens.end.min(self.tokens.end);
        if first >= end || self.terms == 0 {
            return;
        }
        let left = &self.lowered[first * self.terms..];
        let sums = &mut sums[(first - tokens.start) * stride..];
        let panels = features.start / P::COLUMNS..features.end.div_ceil(P::COLUMNS);
        add_panels(
            self.product,
            left,
            &self.panels[panels],
            (sums, end - first, stride),
        );
    }
}

#[cfg(test)]
mod tests {
    use burn_flex::FlexDevice;
    use burn_tensor::{Tensor, TensorData};
    use rayon::ThreadPoolBuilder;

    use super::super::linear::fused_linears;
    use super::*;
    use crate::LowRankUp;

    /// Widths of the outputs.
    const WIDTHS: [usize; 2] = [130, 40];

    fn tensor(seed: usize, rows: usize, columns: usize) -> Float<2> {
        let value = |i: usize| (((i + seed) * 37 % 101) as f32 - 50.0) * 0.0301;
        let values: Vec<f32> = (0..rows * columns).map(value).collect();
        let data = TensorData::new(values, [rows, columns]);
        Tensor::from_data(data, (&FlexDevice, DType::F32))
    }

    fn values(x: Float<2>) -> Vec<f32> {
        x.into_data().into_vec().unwrap()
    }

    fn run(tokens: Range<usize>, d_in: usize, ranks: [usize; 2], dtype: DType) -> LowRankRun<Flex> {
        let up = |index: usize, rank: Range<usize>| {
            Some(LowRankUp {
                up: tensor(index, WIDTHS[index], rank.len()).cast(dtype),
                rank,
                scale: 0.3,
            })
        };
        let [first, second] = ranks;
        LowRankRun {
            tokens,
            down: tensor(7, first + second, d_in).cast(dtype),
            ups: vec![up(0, 0..first), up(1, first..first + second)],
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
        for (d_in, ranks) in [(64, [16, 16]), (67, [5, 70]), (1100, [33, 1])] {
            let x = tensor(1, MOST, d_in);
            for dtype in [DType::F32, DType::F16, DType::BF16] {
                let layers = || {
                    let weights = WIDTHS.map(|width| tensor(width, width, d_in).cast(dtype));
                    let biases = [Some(tensor(5, 1, WIDTHS[0]).reshape([WIDTHS[0]])), None];
                    weights.into_iter().zip(biases).collect()
                };
                let linears = |rows: Range<usize>, within: Option<Range<usize>>| {
                    let x = x.clone().narrow(0, rows.start, rows.len());
                    let run = within.map(|tokens| run(tokens, d_in, ranks, dtype));
                    let outputs = fused_linears(x, layers(), run.as_slice());
                    outputs.into_iter().map(values).collect::<Vec<_>>()
                };
                let (all, none) = (linears(0..MOST, Some(0..MOST)), linears(0..MOST, None));
                for (first, tokens) in [(0, 1), (3, 5), (7, 96), (1, 97), (100, 49), (0, 200)] {
                    for pool in &pools {
                        let rows = first..first + tokens;
                        let (alone, among) = pool.install(|| {
                            let alone = linears(rows.clone(), Some(0..tokens));
                            (alone, linears(0..MOST, Some(rows.clone())))
                        });
                        for (output, width) in WIDTHS.into_iter().enumerate() {
                            let of = |rows: Range<usize>| rows.start * width..rows.end * width;
                            let threads = pool.current_num_threads();
                            let case = format!(
                                "{rows:?}, {d_in} to {width}, {ranks:?}, {dtype:?}, {threads} threads"
                            );
                            let expected = &all[output][of(rows.clone())];
                            assert!(alone[output] == expected, "{case}");
                            let among = &among[output];
                            assert!(&among[of(rows.clone())] == expected, "{case}");
                            for others in [0..rows.start, rows.end..MOST] {
                                let others = of(others);
                                assert!(among[others.clone()] == none[output][others], "{case}");
                            }
                        }
                    }
                }
            }
        }
    }

    /// Machines with bf16 instructions never take the f32 path of bf16 matrices elsewhere. The inputs
    /// are small integers, so that sums are exact in any order.
    #[test]
    fn bf16_instructions_and_f32_give_the_same_sums() {
        let integers = |x: Float<2>| (x * 2.0).round();
        let mut run = run(3..93, 67, [21, 34], DType::BF16);
        run.down = integers(run.down);
        for up in run.ups.iter_mut().flatten() {
            up.up = integers(up.up.clone());
        }
        let x = values(integers(tensor(1, 101, 67)));
        let sums = |updates: &[Vec<Box<dyn Update>>]| {
            let mut sums = WIDTHS.map(|width| vec![0.0; 101 * width]);
            for ((sums, updates), width) in sums.iter_mut().zip(updates).zip(WIDTHS) {
                for update in updates {
                    update.add(sums, width, 0..101, 0..width);
                }
            }
            sums
        };
        let input = Input {
            values: &x,
            length: 67,
            pairs: &[],
        };
        let found = sums(&updates(input, 2, std::slice::from_ref(&run)));
        let mut wide = vec![Vec::new(), Vec::new()];
        add_updates(Wide { rounds: true }, input, &[&run], &mut wide);
        let wide = sums(&wide);
        for (found, wide) in found.iter().flatten().zip(wide.iter().flatten()) {
            assert!(
                (found - wide).abs() < 1e-5 * wide.abs().max(100.0),
                "{found} {wide}"
            );
        }
        assert!(wide.iter().flatten().any(|x| x.abs() > 100.0));
    }
}
