//! Compares [`FusedOps::add_low_rank`] and [`FusedOps::fused_linears`] with plain arithmetic in f64.
//!
//! All values are small multiples of 1/4, so that every sum is exact in f32 in any order: the results
//! have to be equal.

use std::ops::Range;

use burn_flex::{Flex, FlexDevice};
use burn_tensor::{DType, Tensor, TensorData, bf16};
use kiln_ops::{FusedOps, LowRankRun, LowRankUp};

const TOKENS: usize = 61;

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

/// A width of the input, widths of the outputs, and runs.
struct Case {
    d_in: usize,
    widths: Vec<usize>,
    runs: Vec<Run>,
}

impl Case {
    /// Runs that are given by their tokens and ranks.
    fn new(d_in: usize, widths: &[usize], runs: &[(Range<usize>, &[Option<usize>])]) -> Self {
        let runs = (0..).step_by(5).zip(runs);
        Self {
            d_in,
            widths: widths.into(),
            runs: runs
                .map(|(seed, (tokens, ranks))| run(seed, tokens.clone(), d_in, widths, ranks))
                .collect(),
        }
    }

    fn x(&self) -> Matrix {
        Matrix::new(self.d_in, TOKENS, self.d_in)
    }

    /// The runs with matrices of this dtype.
    fn runs<B: FusedOps>(&self, dtype: DType, device: &B::Device) -> Vec<LowRankRun<B>> {
        let run = |run: &Run| LowRankRun {
            tokens: run.tokens.clone(),
            down: run.down.tensor(dtype, device),
            ups: run
                .ups
                .iter()
                .map(|up| {
                    let (rank, up, scale) = up.as_ref()?;
                    Some(LowRankUp {
                        rank: rank.clone(),
                        up: up.tensor(dtype, device),
                        scale: *scale,
                    })
                })
                .collect(),
        };
        self.runs.iter().map(run).collect()
    }

    /// Fails if the outputs differ from the given ones with the updates, in any bit.
    fn compare<B: FusedOps>(&self, dtype: DType, before: &[Matrix], found: Vec<Tensor<B, 2>>) {
        let expected = expected(before, &self.x(), &self.runs, dtype == DType::BF16);
        assert_eq!(found.len(), expected.len());
        for (index, (found, expected)) in found.into_iter().zip(expected).enumerate() {
            assert_eq!(found.dims(), [TOKENS, expected.columns]);
            let found: Vec<f32> = found.into_data().into_vec().unwrap();
            let bits = |values: &[f32]| values.iter().map(|it| it.to_bits()).collect::<Vec<_>>();
            assert!(
                bits(&found) == bits(&expected.values),
                "output {index} of {:?} from {} in {dtype:?}: {found:?}, expected {:?}",
                self.widths,
                self.d_in,
                expected.values
            );
        }
    }
}

fn cases() -> Vec<Case> {
    let all = 0..TOKENS;
    let one = |rank| [Some(rank)];
    vec![
        // All tokens; rank 1; several outputs of one width and of different ones.
        Case::new(32, &[64], &[(all.clone(), &one(1))]),
        Case::new(67, &[48, 48, 48], &[(all.clone(), &[Some(16); 3])]),
        Case::new(
            33,
            &[5, 130, 64],
            &[(all.clone(), &[Some(3), Some(17), Some(1)])],
        ),
        // A part of the tokens, an output without a change, an empty run, and one token.
        Case::new(
            24,
            &[40, 7],
            &[(13..40, &[None, Some(5)]), (20..20, &[Some(4), Some(4)])],
        ),
        Case::new(16, &[8], &[(60..61, &one(2))]),
        // Two adapters of the same tokens, of a part, and one after the other.
        Case::new(
            40,
            &[66, 20],
            &[
                (all.clone(), &[Some(8), Some(8)]),
                (0..30, &[Some(7), Some(7)]),
                (25..TOKENS, &[Some(70), None]),
                (0..25, &[None, Some(3)]),
            ],
        ),
        // Nothing at all.
        Case::new(12, &[10], &[(all, &[None])]),
        Case::new(12, &[10], &[]),
    ]
}

fn dtypes<B: FusedOps>(device: &B::Device) -> impl Iterator<Item = DType> {
    let all = [DType::F32, DType::BF16, DType::F16];
    all.into_iter()
        .filter(|dtype| B::supports_dtype(device, *dtype))
}

/// In every dtype of the matrices that the device has, for f32 activations.
fn add_low_rank_equals_plain_arithmetic<B: FusedOps>(device: &B::Device) {
    for dtype in dtypes::<B>(device) {
        for case in cases() {
            let widths = case.widths.iter();
            let mut outputs: Vec<Matrix> = widths
                .map(|&width| Matrix::new(width, TOKENS, width))
                .collect();
            // A token outside of all runs keeps even the sign of a zero.
            let is_inside = |token| case.runs.iter().any(|run| run.tokens.contains(&token));
            for token in (0..TOKENS).filter(|&token| !is_inside(token)) {
                for output in &mut outputs {
                    output.values[token * output.columns] = -0.0;
                }
            }
            let wide = |matrix: &Matrix| matrix.tensor::<B>(DType::F32, device);
            let tensors = outputs.iter().map(wide).collect();
            let added = B::add_low_rank(tensors, wide(&case.x()), &case.runs(dtype, device));
            case.compare(dtype, &outputs, added);
        }
    }
}

fn fused_linears_equal_plain_arithmetic<B: FusedOps>(device: &B::Device) {
    for dtype in dtypes::<B>(device) {
        for case in cases() {
            let x = case.x();
            let layers: Vec<(Matrix, Matrix)> = case
                .widths
                .iter()
                .map(|&width| {
                    (
                        Matrix::new(width, width, case.d_in),
                        Matrix::new(9, 1, width),
                    )
                })
                .collect();
            let outputs: Vec<Matrix> = layers
                .iter()
                .map(|(weight, bias)| {
                    let output = |index| {
                        let (token, column) = (index / bias.columns, index % bias.columns);
                        let x = x.row(token).iter().map(|&x| f64::from(x));
                        let sum = dot(x, weight.row(column)) + f64::from(bias.values[column]);
                        sum as f32
                    };
                    Matrix {
                        columns: bias.columns,
                        values: (0..TOKENS * bias.columns).map(output).collect(),
                    }
                })
                .collect();
            let layers = layers.iter().map(|(weight, bias)| {
                let bias = bias.tensor::<B>(dtype, device).reshape([bias.columns]);
                (weight.tensor::<B>(dtype, device), Some(bias))
            });
            let found = B::fused_linears(
                x.tensor(DType::F32, device),
                layers.collect(),
                &case.runs(dtype, device),
            );
            case.compare(dtype, &outputs, found);
        }
    }
}

#[test]
fn low_rank_updates_equal_plain_arithmetic() {
    add_low_rank_equals_plain_arithmetic::<Flex>(&FlexDevice);
    #[cfg(feature = "ndarray")]
    add_low_rank_equals_plain_arithmetic::<burn_ndarray::NdArray>(
        &burn_ndarray::NdArrayDevice::Cpu,
    );
}

#[test]
fn linear_layers_with_updates_equal_plain_arithmetic() {
    fused_linears_equal_plain_arithmetic::<Flex>(&FlexDevice);
    #[cfg(feature = "ndarray")]
    fused_linears_equal_plain_arithmetic::<burn_ndarray::NdArray>(
        &burn_ndarray::NdArrayDevice::Cpu,
    );
}

/// A tensor that the caller still holds is never changed.
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
