//! Property tests: compares every op of [`FusedOps`] with its default body in f32, on random shapes and
//! values.
//!
//! The default bodies run on flex in plain burn ops: flex's kernels override the ops of the trait, not
//! the bodies in [`defaults`]. Both sides get the same values, rounded to the dtype under test.

use burn_flex::{Flex, FlexDevice};
use burn_tensor::{DType, Tensor, TensorData, activation};
use kiln_ops::{FusedOps, LowRankRun, LowRankUp, Rope, TokenRun, defaults};
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::{Strategy, any};
use proptest::sample::{Index, select};
use proptest::test_runner::{Config, RngSeed, TestCaseError, TestRunner};

const EPS: f64 = 1e-6;
const F16_MAX: f32 = 65504.0;

/// Defines a test for every op, or for the listed ones, which runs it on each [`Suite`] of the
/// expression `$suites`.
macro_rules! test_every_op {
    ($suites:expr) => {
        $crate::suite::test_every_op! {
            $suites;
            fused_linear thin_products add_low_rank fused_linears rms_norm
            layer_norm_modulate gated_residual qk_norm_rope gelu_tanh silu_mul packed_attention attention_widths attention_lengths long_attention
            attention_of_large_values conv2d_same channel_norm channel_norm_silu upsample_nearest
            crop
        }
    };
    ($suites:expr; $($op:ident)*) => {
        $(
            #[test]
            fn $op() {
                for suite in $suites {
                    suite.$op();
                }
            }
        )*
    };
}
pub(crate) use test_every_op;

/// A device and dtype under test.
pub(crate) struct Suite<B: FusedOps> {
    device: B::Device,
    dtype: DType,
    extent: Extent,
}

/// Number of cases per op, and tolerances: the largest difference relative to the largest magnitude.
///
/// Linear layers, attention and convolutions have limits of their own (`product_*`), because some
/// devices multiply in less than f32, and autotune at each new shape.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Extent {
    pub(crate) cases: u32,
    pub(crate) tolerance: f32,
    pub(crate) product_cases: u32,
    pub(crate) product_tolerance: f32,
    /// Product tolerance in f16: some devices accumulate f16 products in f16.
    pub(crate) f16_product_tolerance: f32,
}

/// Creates the suites of a device, in those of f32, bf16 and f16 that it supports.
///
/// `extent` has the tolerances in f32, where sums of up to a few thousand values differ in the order of
/// additions. The narrow dtypes round each result, and some intermediate values, to 8 or 11 bits.
pub(crate) fn suites<B: FusedOps>(device: &B::Device, extent: Extent) -> Vec<Suite<B>> {
    let within = |tolerance, product_tolerance| Extent {
        tolerance,
        product_tolerance,
        ..extent
    };
    [
        (DType::F32, extent),
        (DType::BF16, within(1.6e-2, 1.6e-2)),
        (DType::F16, within(2e-3, extent.f16_product_tolerance)),
    ]
    .into_iter()
    .filter(|(dtype, _)| B::supports_dtype(device, *dtype))
    .map(|(dtype, extent)| Suite {
        device: device.clone(),
        dtype,
        extent,
    })
    .collect()
}

/// The same values on the tested backend and on flex.
struct Input<B: FusedOps, const D: usize> {
    tested: Tensor<B, D>,
    /// The values in f32, after rounding to the tested dtype.
    reference: Tensor<Flex, D>,
}

/// Sizes smaller than a vector register, and multiples of it with and without a remainder.
fn size() -> impl Strategy<Value = usize> {
    select(vec![1, 2, 3, 5, 7, 13, 16, 17, 31, 33, 64, 67, 97, 130])
}

/// Runs of packed tokens on the four rows of a modulation table, in any order; some are empty.
fn row_runs() -> impl Strategy<Value = Vec<TokenRun>> {
    let run = (0..40_usize, 0..4_usize).prop_map(|(tokens, row)| TokenRun { tokens, row });
    vec(run, 1..5).prop_filter("no tokens", |runs| token_count(runs) > 0)
}

fn token_count(runs: &[TokenRun]) -> usize {
    runs.iter().map(|run| run.tokens).sum()
}

impl<B: FusedOps> Suite<B> {
    pub(crate) fn fused_linear(&self) {
        let weights: Vec<DType> = [DType::F32, DType::BF16, DType::F16]
            .into_iter()
            .filter(|dtype| B::supports_dtype(&self.device, *dtype))
            .collect();
        let case = (
            size(),
            size(),
            size(),
            any::<bool>(),
            select(weights),
            any::<u32>(),
        );
        self.check_products(
            case,
            |(tokens, d_in, d_out, has_bias, weight_dtype, seed)| {
                let x = self.input(seed, [tokens, d_in]);
                let weight = self.input_of(weight_dtype, seed ^ 1, [d_out, d_in]);
                let bias = has_bias.then(|| self.input_of(weight_dtype, seed ^ 2, [d_out]));
                let (bias, reference_bias) = bias.map(|b| (b.tested, b.reference)).unzip();
                let reference_weight = weight.reference.cast(weight_dtype);
                self.compare_products(
                    B::fused_linear(x.tested, weight.tested, bias),
                    defaults::fused_linear(x.reference, reference_weight, reference_bias),
                    // Typical magnitude of a dot product of these values; random terms may cancel.
                    (4.0 * d_in as f32).sqrt(),
                )
            },
        );
    }

    /// Linear layers of one row or one column with an op after them, for which fusing backends have
    /// separate kernels.
    pub(crate) fn thin_products(&self) {
        for (tokens, d_in, d_out) in [(1, 64, 36), (67, 33, 1)] {
            // These seeds create no views, so that weights have the memory layout of checkpoints.
            let x = self.input(3, [tokens, d_in]);
            let weight = self.input(5, [d_out, d_in]);
            let bias = self.input(6, [d_out]);
            let tested = B::fused_linear(x.tested, weight.tested, Some(bias.tested));
            let reference =
                defaults::fused_linear(x.reference, weight.reference, Some(bias.reference));
            self.compare_products(
                activation::silu(tested),
                activation::silu(reference),
                (4.0 * d_in as f32).sqrt(),
            )
            .unwrap_or_else(|error| panic!("{tokens}x{d_in}x{d_out}: {error}"));
        }
    }

    pub(crate) fn add_low_rank(&self) {
        self.check_products(low_rank(), |case| {
            let x = self.input(case.seed, [case.tokens, case.d_in]);
            let outputs = (1..).zip(&case.widths);
            let outputs =
                outputs.map(|(index, &width)| self.input(case.seed ^ index, [case.tokens, width]));
            let (tested, reference): (Vec<_>, Vec<_>) =
                outputs.map(|it| (it.tested, it.reference)).unzip();
            let runs = self.low_rank_runs(&case);
            self.compare_low_rank(
                &case,
                B::add_low_rank(tested, x.tested, &runs.tested),
                defaults::add_low_rank(
                    reference,
                    x.reference,
                    &runs.reference,
                    defaults::fused_linear,
                ),
            )
        });
    }

    pub(crate) fn fused_linears(&self) {
        self.check_products(low_rank(), |case| {
            let dtype = self.matrix_dtype(&case);
            let x = self.input(case.seed, [case.tokens, case.d_in]);
            let layers = (1..).zip(&case.widths).map(|(index, &width)| {
                let weight = self.input_of(dtype, case.seed ^ index, [width, case.d_in]);
                let bias = (index % 2 == 1)
                    .then(|| self.input_of(dtype, case.seed ^ index, [width]))
                    .map(|bias| (bias.tested, bias.reference))
                    .unzip();
                (
                    (weight.tested, bias.0),
                    (weight.reference.cast(dtype), bias.1),
                )
            });
            let (tested, reference): (Vec<_>, Vec<_>) = layers.unzip();
            let runs = self.low_rank_runs(&case);
            self.compare_low_rank(
                &case,
                B::fused_linears(x.tested, tested, &runs.tested),
                defaults::fused_linears(
                    x.reference,
                    reference,
                    &runs.reference,
                    defaults::fused_linear,
                ),
            )
        });
    }

    /// The dtype of a case's matrices: the case's if the device has it, else f32.
    fn matrix_dtype(&self, case: &LowRank) -> DType {
        if B::supports_dtype(&self.device, case.matrices) {
            case.matrices
        } else {
            DType::F32
        }
    }

    fn low_rank_runs(&self, case: &LowRank) -> LowRankRuns<B> {
        let dtype = self.matrix_dtype(case);
        let mut runs = LowRankRuns {
            tested: Vec::new(),
            reference: Vec::new(),
        };
        for (index, run) in (1_u32..).zip(&case.runs) {
            let mut ends = run.ends.map(|end| end.index(case.tokens + 1));
            ends.sort_unstable();
            let (seed, mut rank) = (case.seed ^ (index << 8), 0);
            let ups = (1..).zip(case.widths.iter().zip(&run.ranks));
            let (ups, reference_ups) = ups
                .map(|(index, (&width, own))| {
                    let own = rank..rank + (*own)?;
                    rank = own.end;
                    let up = self.input_of(dtype, seed ^ index, [width, own.len()]);
                    let tested = LowRankUp {
                        rank: own.clone(),
                        up: up.tested,
                        scale: run.scale,
                    };
                    let reference = LowRankUp {
                        rank: own,
                        up: up.reference.cast(dtype),
                        scale: run.scale,
                    };
                    Some((tested, reference))
                })
                .map(Option::unzip)
                .unzip();
            // One row is for no output.
            let down = self.input_of(dtype, seed, [rank + 1, case.d_in]);
            runs.tested.push(LowRankRun {
                tokens: ends[0]..ends[1],
                down: down.tested,
                ups,
            });
            runs.reference.push(LowRankRun {
                tokens: ends[0]..ends[1],
                down: down.reference.cast(dtype),
                ups: reference_ups,
            });
        }
        runs
    }

    fn compare_low_rank(
        &self,
        case: &LowRank,
        tested: Vec<Tensor<B, 2>>,
        reference: Vec<Tensor<Flex, 2>>,
    ) -> Result<(), TestCaseError> {
        // Typical magnitude of two products after each other.
        let ranks = case.runs.iter().flat_map(|run| run.ranks.iter().flatten());
        let most = ranks.max().copied().unwrap_or(1);
        let scale = (16.0 * (case.d_in * most) as f32).sqrt();
        // A sum near the middle between two bf16 may be rounded to either.
        let rounds = case.matrices == DType::BF16;
        let tolerance = if rounds { 4e-3 } else { 0.0 };
        let tolerance = self.extent.product_tolerance.max(tolerance);
        for (tested, reference) in tested.into_iter().zip(reference) {
            self.compare_within(tolerance, tested, reference, scale)?;
        }
        Ok(())
    }

    pub(crate) fn rms_norm(&self) {
        self.check((size(), size(), any::<u32>()), |(tokens, dim, seed)| {
            let x = self.input(seed, [tokens, dim]);
            let weight = self.input(seed ^ 1, [dim]);
            self.compare(
                B::rms_norm(x.tested, weight.tested, EPS),
                defaults::rms_norm(x.reference, weight.reference, EPS),
                0.0,
            )
        });
    }

    /// Tests a single feature, whose result is the shift, or at least 31: normalising a few features that
    /// happen to be nearly equal magnifies the rounding error of their mean.
    pub(crate) fn layer_norm_modulate(&self) {
        let dim = select(vec![1, 31, 33, 64, 96, 129]);
        self.check((row_runs(), dim, any::<u32>()), |(runs, dim, seed)| {
            let x = self.input(seed, [token_count(&runs), dim]);
            let shift = self.input_of(DType::F32, seed ^ 1, [4, dim]);
            let scale = self.input_of(DType::F32, seed ^ 2, [4, dim]);
            self.compare(
                B::layer_norm_modulate(x.tested, shift.tested, scale.tested, &runs, EPS),
                defaults::layer_norm_modulate(
                    x.reference,
                    shift.reference,
                    scale.reference,
                    &runs,
                    EPS,
                ),
                0.0,
            )
        });
    }

    /// Includes values near the largest f16, where the sum saturates.
    pub(crate) fn gated_residual(&self) {
        let magnitude = select(vec![1.0, 16384.0]);
        let case = (row_runs(), size(), magnitude, any::<u32>());
        self.check(case, |(runs, dim, magnitude, seed)| {
            let shape = [token_count(&runs), dim];
            let residual = self.scaled(self.dtype, magnitude, seed, shape);
            let x = self.scaled(self.dtype, magnitude, seed ^ 1, shape);
            let gate = self.input_of(DType::F32, seed ^ 2, [4, dim]);
            let sum =
                defaults::gated_residual(residual.reference, gate.reference, x.reference, &runs);
            let sum = if self.dtype == DType::F16 {
                sum.clamp(-F16_MAX, F16_MAX)
            } else {
                sum
            };
            self.compare(
                B::gated_residual(residual.tested, gate.tested, x.tested, &runs),
                sum,
                0.0,
            )
        });
    }

    pub(crate) fn qk_norm_rope(&self) {
        let case = (size(), 1..6_usize, size(), any::<u32>());
        self.check(case, |(tokens, heads, half, seed)| {
            let x = self.input(seed, [tokens, heads, 2 * half]);
            let weight = self.input(seed ^ 1, [2 * half]);
            let cos = self.input_of(DType::F32, seed ^ 2, [tokens, half]);
            let sin = self.input_of(DType::F32, seed ^ 3, [tokens, half]);
            let tested = Rope {
                cos: cos.tested,
                sin: sin.tested,
            };
            let reference = Rope {
                cos: cos.reference,
                sin: sin.reference,
            };
            self.compare(
                B::qk_norm_rope(x.tested, weight.tested, &tested, EPS),
                defaults::qk_norm_rope(x.reference, weight.reference, &reference, EPS),
                0.0,
            )
        });
    }

    pub(crate) fn gelu_tanh(&self) {
        self.check((size(), size(), any::<u32>()), |(tokens, dim, seed)| {
            let x = self.scaled(self.dtype, 4.0, seed, [tokens, dim]);
            self.compare(
                B::gelu_tanh(x.tested),
                defaults::gelu_tanh(x.reference),
                1.0,
            )
        });
    }

    pub(crate) fn silu_mul(&self) {
        self.check((size(), size(), any::<u32>()), |(tokens, dim, seed)| {
            let gate = self.scaled(self.dtype, 4.0, seed, [tokens, dim]);
            let up = self.input(seed ^ 1, [tokens, dim]);
            self.compare(
                B::silu_mul(gate.tested, up.tested),
                defaults::silu_mul(gate.reference, up.reference),
                1.0,
            )
        });
    }

    pub(crate) fn packed_attention(&self) {
        self.check_products(packed_sequences(), |case| {
            self.compare_attention(&case, 1.0, B::packed_attention, 1.0)
        });
    }

    /// Head dimensions of models, and those that are not a multiple of a tile.
    pub(crate) fn attention_widths(&self) {
        for (kv_heads, group, head_dim) in [(1, 3, 32), (3, 1, 80), (4, 6, 128), (1, 1, 384)] {
            let case = PackedSequences {
                lengths: vec![40, 130],
                kv_heads,
                group,
                head_dim,
                causal: kv_heads > 1,
                seed: 0,
            };
            self.compare_attention(&case, 1.0, B::packed_attention, 0.0)
                .unwrap_or_else(|error| panic!("{case:?} in {:?}: {error}", self.dtype));
        }
    }

    /// Sequence lengths around the sizes of tiles, and several sequences, some of them empty.
    pub(crate) fn attention_lengths(&self) {
        let lone = [1, 15, 16, 17, 64, 100, 1030].map(|length| vec![length]);
        let several = [vec![0, 33, 1, 0, 100], vec![64, 64], vec![17, 0]];
        for lengths in lone.into_iter().chain(several) {
            for causal in [false, true] {
                let case = PackedSequences {
                    lengths: lengths.clone(),
                    kv_heads: 1,
                    group: 2,
                    head_dim: 64,
                    causal,
                    seed: 0,
                };
                self.compare_attention(&case, 1.0, B::packed_attention, 0.0)
                    .unwrap_or_else(|error| panic!("{case:?} in {:?}: {error}", self.dtype));
            }
        }
    }

    /// The number of tokens of a 1024² image and a prompt.
    pub(crate) fn long_attention(&self) {
        let case = PackedSequences {
            lengths: vec![4160],
            kv_heads: 1,
            group: 1,
            head_dim: 32,
            causal: false,
            seed: 0,
        };
        self.compare_attention(&case, 1.0, B::packed_attention, 0.0)
            .unwrap_or_else(|error| panic!("{:?}: {error}", self.dtype));
    }

    /// Values beyond the range of f16, where the dtype can represent them. Softmax then selects a single
    /// key for each query.
    pub(crate) fn attention_of_large_values(&self) {
        let magnitude = if self.dtype == DType::F16 { 3e4 } else { 5e4 };
        for causal in [false, true] {
            let case = PackedSequences {
                lengths: vec![100, 33],
                kv_heads: 1,
                group: 2,
                head_dim: 128,
                causal,
                seed: 0,
            };
            self.compare_attention(&case, magnitude, B::packed_attention, 0.0)
                .unwrap_or_else(|error| panic!("{case:?} in {:?}: {error}", self.dtype));
        }
    }

    /// The fallback of GPU backends without an attention kernel in use, with more scores than it
    /// computes at a time.
    pub(crate) fn attention_by_ops(&self) {
        for causal in [false, true] {
            let case = PackedSequences {
                lengths: vec![0, 1030],
                kv_heads: 2,
                group: 8,
                head_dim: 20,
                causal,
                seed: 0,
            };
            let (tested, reference) = self.attention(&case, 1.0, defaults::attention_by_ops::<B>);
            self.compare_products(tested, reference, 1.0)
                .unwrap_or_else(|error| panic!("{case:?} in {:?}: {error}", self.dtype));
        }
    }

    pub(crate) fn conv2d_same(&self) {
        let side = || select(vec![1, 2, 3, 7, 16, 33]);
        let channels = || select(vec![1, 2, 3, 5, 17, 33]);
        let kernel = select(vec![1, 3, 5]);
        let case = (
            1..3_usize,
            (channels(), channels()),
            (side(), side()),
            kernel,
            any::<u32>(),
        );
        self.check_products(
            case,
            |(images, (d_in, d_out), (height, width), kernel, seed)| {
                let x = self.input(seed, [images, d_in, height, width]);
                let weight = self.input(seed ^ 1, [d_out, d_in, kernel, kernel]);
                let bias = self.input(seed ^ 2, [d_out]);
                self.compare_products(
                    B::conv2d_same(x.tested, weight.tested, bias.tested),
                    defaults::conv2d_same(x.reference, weight.reference, bias.reference),
                    (4.0 * (d_in * kernel * kernel) as f32).sqrt(),
                )
            },
        );
    }

    pub(crate) fn channel_norm(&self) {
        self.check(image(), |(images, channels, (height, width), seed)| {
            // One image in eight is black.
            let magnitude = if seed % 8 == 0 { 0.0 } else { 1.0 };
            let shape = [images, channels, height, width];
            let x = self.scaled(self.dtype, magnitude, seed, shape);
            let gamma = self.input(seed ^ 1, [channels]);
            self.compare(
                B::channel_norm(x.tested, gamma.tested),
                defaults::channel_norm(x.reference, gamma.reference),
                0.0,
            )
        });
    }

    pub(crate) fn channel_norm_silu(&self) {
        self.check(image(), |(images, channels, (height, width), seed)| {
            // One image in eight is black.
            let magnitude = if seed % 8 == 0 { 0.0 } else { 1.0 };
            let shape = [images, channels, height, width];
            let x = self.scaled(self.dtype, magnitude, seed, shape);
            let gamma = self.input(seed ^ 1, [channels]);
            self.compare(
                B::channel_norm_silu(x.tested, gamma.tested),
                defaults::channel_norm_silu(x.reference, gamma.reference),
                1.0,
            )
        });
    }

    pub(crate) fn upsample_nearest(&self) {
        self.check(image(), |(images, channels, (height, width), seed)| {
            let x = self.input(seed, [images, channels, height, width]);
            self.compare(
                B::upsample_nearest(x.tested),
                defaults::upsample_nearest(x.reference),
                0.0,
            )
        });
    }

    pub(crate) fn crop(&self) {
        let part = || (any::<Index>(), any::<Index>());
        let case = (image(), part(), part());
        self.check(
            case,
            |((images, channels, (height, width), seed), rows, columns)| {
                let x = self.input(seed, [images, channels, height, width]);
                let range = |side: usize, (start, end): (Index, Index)| {
                    let start = start.index(side);
                    start..start + 1 + end.index(side - start)
                };
                let (rows, columns) = (range(height, rows), range(width, columns));
                self.compare(
                    B::crop(x.tested, rows.clone(), columns.clone()),
                    defaults::crop(x.reference, rows, columns),
                    0.0,
                )
            },
        );
    }

    fn compare_attention(
        &self,
        case: &PackedSequences,
        magnitude: f32,
        attention: Attention<B>,
        scale: f32,
    ) -> Result<(), TestCaseError> {
        let (tested, reference) = self.attention(case, magnitude, attention);
        self.compare(tested, reference, scale)
    }

    /// Computes the tested attention and the default body, of values up to twice `magnitude`.
    fn attention(
        &self,
        case: &PackedSequences,
        magnitude: f32,
        attention: Attention<B>,
    ) -> (Tensor<B, 2>, Tensor<Flex, 2>) {
        let tokens = case.lengths.iter().sum();
        let input =
            |seed, heads| self.scaled(self.dtype, magnitude, seed, [tokens, heads, case.head_dim]);
        let query = input(case.seed, case.kv_heads * case.group);
        let key = input(case.seed ^ 1, case.kv_heads);
        let value = input(case.seed ^ 2, case.kv_heads);
        let (lengths, causal) = (&case.lengths, case.causal);
        (
            attention(query.tested, key.tested, value.tested, lengths, causal),
            defaults::packed_attention(
                query.reference,
                key.reference,
                value.reference,
                lengths,
                causal,
            ),
        )
    }

    /// Tests a property of an op without matrix products.
    fn check<S: Strategy>(
        &self,
        cases: S,
        property: impl Fn(S::Value) -> Result<(), TestCaseError>,
    ) {
        self.check_cases(self.extent.cases, cases, property);
    }

    /// Tests a property of an op with matrix products.
    fn check_products<S: Strategy>(
        &self,
        cases: S,
        property: impl Fn(S::Value) -> Result<(), TestCaseError>,
    ) {
        self.check_cases(self.extent.product_cases, cases, property);
    }

    /// Tests a property on `count` random cases, the same in every run, and shrinks a failing case.
    fn check_cases<S: Strategy>(
        &self,
        count: u32,
        cases: S,
        property: impl Fn(S::Value) -> Result<(), TestCaseError>,
    ) {
        let config = Config {
            cases: count,
            rng_seed: RngSeed::Fixed(0),
            failure_persistence: None,
            ..Config::default()
        };
        if let Err(error) = TestRunner::new(config).run(&cases, property) {
            panic!("{} in {:?}: {error}", B::name(&self.device), self.dtype);
        }
    }

    /// Creates an input of values from -2 to 2 in the dtype of the activations.
    fn input<const D: usize>(&self, seed: u32, shape: [usize; D]) -> Input<B, D> {
        self.input_of(self.dtype, seed, shape)
    }

    fn input_of<const D: usize>(&self, dtype: DType, seed: u32, shape: [usize; D]) -> Input<B, D> {
        self.scaled(dtype, 1.0, seed, shape)
    }

    /// Creates an input of values from `-2 magnitude` to `2 magnitude`. Half of the inputs of two and
    /// more dimensions are transposed views.
    fn scaled<const D: usize>(
        &self,
        dtype: DType,
        magnitude: f32,
        seed: u32,
        mut shape: [usize; D],
    ) -> Input<B, D> {
        let swapped = D > 1 && seed.count_ones() % 2 == 1;
        if swapped {
            shape.swap(0, 1);
        }
        let data = TensorData::new(noise(magnitude, seed, shape.iter().product()), shape);
        let tested = Tensor::<B, D>::from_data(data.clone(), (&self.device, DType::F32));
        let tested = tested.cast(dtype);
        let reference = Tensor::<Flex, D>::from_data(data, (&FlexDevice, DType::F32));
        let reference = reference.cast(dtype).cast(DType::F32);
        if swapped {
            Input {
                tested: tested.swap_dims(0, 1),
                reference: reference.swap_dims(0, 1),
            }
        } else {
            Input { tested, reference }
        }
    }

    fn compare<const D: usize>(
        &self,
        tested: Tensor<B, D>,
        reference: Tensor<Flex, D>,
        scale: f32,
    ) -> Result<(), TestCaseError> {
        self.compare_within(self.extent.tolerance, tested, reference, scale)
    }

    fn compare_products<const D: usize>(
        &self,
        tested: Tensor<B, D>,
        reference: Tensor<Flex, D>,
        scale: f32,
    ) -> Result<(), TestCaseError> {
        self.compare_within(self.extent.product_tolerance, tested, reference, scale)
    }

    /// Fails if the largest difference exceeds `tolerance` times the largest magnitude, or times
    /// `scale` if that is larger.
    fn compare_within<const D: usize>(
        &self,
        tolerance: f32,
        tested: Tensor<B, D>,
        reference: Tensor<Flex, D>,
        scale: f32,
    ) -> Result<(), TestCaseError> {
        let fail = |message: String| Err(TestCaseError::fail(message));
        if tested.dims() != reference.dims() || tested.dtype() != self.dtype {
            let (dims, dtype) = (tested.dims(), tested.dtype());
            return fail(format!(
                "the output is {dims:?} in {dtype:?}, expected {:?} in {:?}",
                reference.dims(),
                self.dtype
            ));
        }
        let tested: Vec<f32> = tested.cast(DType::F32).into_data().into_vec().unwrap();
        let reference: Vec<f32> = reference.into_data().into_vec().unwrap();
        let largest = reference.iter().fold(scale, |a, x| a.max(x.abs()));
        for (index, (tested, reference)) in tested.iter().zip(&reference).enumerate() {
            let difference = (tested - reference).abs();
            // False for NaN.
            let close = difference <= tolerance * largest;
            if !close {
                return fail(format!(
                    "value {index} is {tested:e}, expected {reference:e}: off by {:.1e} of {largest:e}",
                    difference / largest
                ));
            }
        }
        Ok(())
    }
}

type Attention<B> = fn(Tensor<B, 3>, Tensor<B, 3>, Tensor<B, 3>, &[usize], bool) -> Tensor<B, 2>;

/// A case of attention.
#[derive(Debug, Clone)]
struct PackedSequences {
    lengths: Vec<usize>,
    kv_heads: usize,
    /// Query heads per key/value head.
    group: usize,
    head_dim: usize,
    causal: bool,
    seed: u32,
}

fn packed_sequences() -> impl Strategy<Value = PackedSequences> {
    let lengths = vec(select(vec![1, 2, 3, 17, 40, 67, 130]), 1..4);
    let heads = select(vec![
        (1, 1),
        (1, 3),
        (3, 1),
        (2, 2),
        (3, 2),
        (24, 1),
        (4, 6),
    ]);
    let head_dim = select(vec![1, 2, 10, 16, 20, 32, 34, 64, 80, 128, 384]);
    (lengths, heads, head_dim, any::<bool>(), any::<u32>()).prop_map(
        |(lengths, (kv_heads, group), head_dim, causal, seed)| PackedSequences {
            lengths,
            kv_heads,
            group,
            head_dim,
            causal,
            seed,
        },
    )
}

/// Low-rank updates of up to three outputs.
#[derive(Debug, Clone)]
struct LowRank {
    tokens: usize,
    d_in: usize,
    widths: Vec<usize>,
    matrices: DType,
    runs: Vec<LowRankPart>,
    seed: u32,
}

#[derive(Debug, Clone)]
struct LowRankPart {
    /// The first token and the end, in any order.
    ends: [Index; 2],
    /// For each output; `None` if it is not changed.
    ranks: Vec<Option<usize>>,
    scale: f32,
}

struct LowRankRuns<B: FusedOps> {
    tested: Vec<LowRankRun<B>>,
    reference: Vec<LowRankRun<Flex>>,
}

/// Up to three runs, which may overlap or be empty.
fn low_rank() -> impl Strategy<Value = LowRank> {
    let rank = option::of(select(vec![1, 2, 3, 7, 16, 33, 65, 70]));
    let run = (any::<[Index; 2]>(), vec(rank, 3), select(vec![0.5, -1.5]));
    let run = run.prop_map(|(ends, ranks, scale)| LowRankPart { ends, ranks, scale });
    let matrices = select(vec![DType::F32, DType::BF16, DType::F16]);
    let sizes = (size(), size(), vec(size(), 1..4));
    (sizes, matrices, vec(run, 0..4), any::<u32>()).prop_map(
        |((tokens, d_in, widths), matrices, runs, seed)| LowRank {
            tokens,
            d_in,
            widths,
            matrices,
            runs,
            seed,
        },
    )
}

fn image() -> impl Strategy<Value = (usize, usize, (usize, usize), u32)> {
    let side = || select(vec![1, 2, 3, 7, 16, 27, 33]);
    (1..4_usize, size(), (side(), side()), any::<u32>())
}

/// Pseudo-random values from `-2 magnitude` to `2 magnitude`. They have 17 significant bits, because
/// burn's cast to bf16 on flex drops the last three bits of f32 before it rounds.
fn noise(magnitude: f32, seed: u32, count: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(12345);
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        magnitude * ((state >> 16) as f32 / (1 << 14) as f32 - 2.0)
    };
    (0..count).map(|_| next()).collect()
}
