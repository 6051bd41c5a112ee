//! Compares [`FusedOps::add_low_rank`] and its default body with plain arithmetic in f64.
//!
//! All values are small multiples of 1/4, so that every sum is exact in f32 in any order: the results
//! have to be equal.

use std::ops::Range;

use burn_flex::{Flex, FlexDevice};
use burn_tensor::{DType, Tensor, TensorData, bf16};
use kiln_ops::{FusedOps, LowRankRun, LowRankUp, defaults};

type AddLowRank<B> = fn(Vec<Tensor<B, 2>>, Tensor<B, 2>, &[LowRankRun<B>]) -> Vec<Tensor<B, 2>>;

/// A matrix on the host, row-major.
#[derive(Debug, Clone)]
struct Matrix {
    columns: usize,
    values: Vec<f32>,
}

impl Matrix {
    /// Multiples of 1/4 from -1.5 to 1.5.
    fn new(seed: usize, rows: usize, columns: usize) -> Self {
        let value = |i: usize| ((i * 37 + seed * 11 + i * i % 17) % 13) as f32 / 4.0 - 1.5;
        Self {
            columns,
            values: (0..rows * columns).map(value).collect(),
        }
    }

    fn row(&self, row: usize) -> &[f32] {
        &self.values[row * self.columns..][..self.columns]
    }

    fn tensor<B: FusedOps>(&self, dtype: DType, device: &B::Device) -> Tensor<B, 2> {
        let shape = [self.values.len() / self.columns, self.columns];
        let data = TensorData::new(self.values.clone(), shape);
        Tensor::from_data(data.convert_dtype(dtype), (device, dtype))
    }
}

fn dot(a: impl IntoIterator<Item = f64>, b: &[f32]) -> f64 {
    a.into_iter().zip(b).map(|(a, b)| a * f64::from(*b)).sum()
}

struct Run {
    tokens: Range<usize>,
    down: Matrix,
    /// For each output: the rows of `down`, the matrix and the scale.
    ups: Vec<Option<(Range<usize>, Matrix, f32)>>,
}

/// A run with these ranks of the outputs, `None` for an output without a change.
fn run(
    seed: usize,
    tokens: Range<usize>,
    d_in: usize,
    widths: &[usize],
    ranks: &[Option<usize>],
) -> Run {
    let mut all = 0;
    let ups = ranks.iter().zip(widths).enumerate();
    let ups = ups.map(|(index, (rank, &width))| {
        let rank = all..all + (*rank)?;
        all = rank.end;
        let up = Matrix::new(seed + index, width, rank.len());
        let scale = [0.5, -2.0, 0.25][index % 3];
        Some((rank, up, scale))
    });
    let ups = ups.collect();
    Run {
        tokens,
        down: Matrix::new(seed + 7, all.max(1), d_in),
        ups,
    }
}

/// Adds the runs to the outputs in f64; `rounds` as the op rounds if its matrices are bf16.
fn expected(outputs: &[Matrix], x: &Matrix, runs: &[Run], rounds: bool) -> Vec<Matrix> {
    let mut outputs = outputs.to_vec();
    for run in runs {
        for (output, up) in outputs.iter_mut().zip(&run.ups) {
            let Some((rank, up, scale)) = up else {
                continue;
            };
            for token in run.tokens.clone() {
                let x = || x.row(token).iter().map(|&x| f64::from(x));
                let lowered: Vec<f64> = rank
                    .clone()
                    .map(|row| dot(x(), run.down.row(row)) * f64::from(*scale))
                    .map(|it| {
                        if rounds {
                            f64::from(bf16::from_f32(it as f32))
                        } else {
                            it
                        }
                    })
                    .collect();
                for column in 0..output.columns {
                    let change = dot(lowered.iter().copied(), up.row(column));
                    let value = &mut output.values[token * output.columns + column];
                    *value = (f64::from(*value) + change) as f32;
                }
            }
        }
    }
    outputs
}

/// Compares an implementation in every dtype of the matrices that the device has, for f32 activations.
fn equals_plain_arithmetic<B: FusedOps>(device: &B::Device, add: AddLowRank<B>) {
    const TOKENS: usize = 61;
    let one_of_each = |seed, tokens, d_in, widths: &[usize], rank| {
        run(seed, tokens, d_in, widths, &vec![Some(rank); widths.len()])
    };
    // Width of the input, widths of the outputs, and runs.
    let cases = [
        // All tokens; rank 1; several outputs of one width and of different ones.
        (32, vec![64], vec![one_of_each(1, 0..TOKENS, 32, &[64], 1)]),
        (
            67,
            vec![48, 48, 48],
            vec![one_of_each(2, 0..TOKENS, 67, &[48, 48, 48], 16)],
        ),
        (
            33,
            vec![5, 130, 64],
            vec![run(
                3,
                0..TOKENS,
                33,
                &[5, 130, 64],
                &[Some(3), Some(17), Some(1)],
            )],
        ),
        // A part of the tokens, an output without a change, and an empty run.
        (
            24,
            vec![40, 7],
            vec![
                run(4, 13..40, 24, &[40, 7], &[None, Some(5)]),
                one_of_each(5, 20..20, 24, &[40, 7], 4),
            ],
        ),
        (16, vec![8], vec![one_of_each(6, 60..61, 16, &[8], 2)]),
        // Two adapters of the same tokens, of a part, and one after the other; none at all.
        (
            40,
            vec![66, 20],
            vec![
                one_of_each(7, 0..TOKENS, 40, &[66, 20], 8),
                one_of_each(8, 0..30, 40, &[66, 20], 7),
                run(9, 25..TOKENS, 40, &[66, 20], &[Some(70), None]),
            ],
        ),
        (12, vec![10], vec![run(10, 0..TOKENS, 12, &[10], &[None])]),
        (12, vec![10], vec![]),
    ];
    for dtype in [DType::F32, DType::BF16, DType::F16] {
        if !B::supports_dtype(device, dtype) {
            continue;
        }
        for (number, (d_in, widths, runs)) in cases.iter().enumerate() {
            let x = Matrix::new(number, TOKENS, *d_in);
            let mut outputs: Vec<Matrix> = widths
                .iter()
                .map(|&width| Matrix::new(number + 3, TOKENS, width))
                .collect();
            // A token outside of all runs keeps even the sign of a zero.
            let is_outside =
                |token: usize| runs.iter().all(|run: &Run| !run.tokens.contains(&token));
            for output in &mut outputs {
                for token in (0..TOKENS).filter(|&token| is_outside(token)) {
                    output.values[token * output.columns] = -0.0;
                }
            }
            let tensor = |matrix: &Matrix| matrix.tensor::<B>(dtype, device);
            let low_rank: Vec<LowRankRun<B>> = runs
                .iter()
                .map(|run| LowRankRun {
                    tokens: run.tokens.clone(),
                    down: tensor(&run.down),
                    ups: run
                        .ups
                        .iter()
                        .map(|up| {
                            let (rank, up, scale) = up.as_ref()?;
                            Some(LowRankUp {
                                rank: rank.clone(),
                                up: tensor(up),
                                scale: *scale,
                            })
                        })
                        .collect(),
                })
                .collect();
            let wide = |matrix: &Matrix| matrix.tensor::<B>(DType::F32, device);
            let added = add(outputs.iter().map(wide).collect(), wide(&x), &low_rank);
            let expected = expected(&outputs, &x, runs, dtype == DType::BF16);
            assert_eq!(added.len(), expected.len());
            for (index, (added, expected)) in added.into_iter().zip(expected).enumerate() {
                assert_eq!(added.dims(), [TOKENS, expected.columns]);
                let added: Vec<f32> = added.into_data().into_vec().unwrap();
                let equal = added
                    .iter()
                    .zip(&expected.values)
                    .all(|(added, expected)| added.to_bits() == expected.to_bits());
                assert!(
                    equal,
                    "case {number}, output {index} in {dtype:?}: {added:?}, expected {:?}",
                    expected.values
                );
            }
        }
    }
}

#[test]
fn default_body_equals_plain_arithmetic() {
    equals_plain_arithmetic::<Flex>(&FlexDevice, defaults::add_low_rank);
    #[cfg(feature = "ndarray")]
    equals_plain_arithmetic::<burn_ndarray::NdArray>(
        &burn_ndarray::NdArrayDevice::Cpu,
        defaults::add_low_rank,
    );
}

#[test]
fn kernel_equals_plain_arithmetic() {
    equals_plain_arithmetic::<Flex>(&FlexDevice, Flex::add_low_rank);
}

/// The op works in place, but never on a tensor that the caller still holds.
#[test]
fn outputs_that_are_held_elsewhere_keep_their_values() {
    let device = FlexDevice;
    let wide = |matrix: Matrix| matrix.tensor::<Flex>(DType::F32, &device);
    let output = wide(Matrix::new(1, 20, 8));
    let values = || output.clone().into_data().into_vec::<f32>().unwrap();
    let before = values();
    let run = LowRankRun {
        tokens: 0..20,
        down: wide(Matrix::new(2, 3, 8)),
        ups: vec![Some(LowRankUp {
            rank: 0..3,
            up: wide(Matrix::new(3, 8, 3)),
            scale: 1.0,
        })],
    };
    let added = Flex::add_low_rank(vec![output.clone()], output.clone(), &[run]);
    let added: Vec<f32> = added[0].clone().into_data().into_vec().unwrap();
    assert!(added != before);
    assert!(values() == before);
}
