//! Compares kernels with the default bodies of their ops before a model uses them.
//!
//! The default bodies run on the CPU in f32. On the GPU they would be untested kernels themselves, and
//! each would have to be compiled.

use std::fmt::Display;

use burn_flex::{Flex, FlexDevice};
use burn_tensor::{DType, Tensor, TensorData};

use super::{Kernel, KernelChoice};
use crate::{FusedOps, KernelShape, Rope, TokenRun, defaults};

/// Tokens of the two test sequences: neither is a multiple of any kernel's tile.
const LENGTHS: [usize; 2] = [130, 67];
const TOKENS: usize = LENGTHS[0] + LENGTHS[1];
/// Modulation table rows of the two sequences, in reverse order.
const RUNS: [TokenRun; 2] = [
    TokenRun {
        tokens: LENGTHS[0],
        row: 1,
    },
    TokenRun {
        tokens: LENGTHS[1],
        row: 0,
    },
];
/// Height and width of the test image.
const SIDES: [usize; 2] = [19, 27];
/// Wider layers are tested at this width plus their remainder modulo the tile, so that a check takes
/// milliseconds.
const MAX_WIDTH: usize = 2048;
const EPS: f64 = 1e-6;

/// Compares the kernels in use with the default bodies at `shapes`. Returns the kernels that differ
/// or fail, each with the reason.
pub(super) fn faults<B, C>(
    device: &B::Device,
    dtype: DType,
    shapes: &[KernelShape],
) -> Vec<(Kernel, String)>
where
    B: FusedOps,
    C: KernelChoice,
{
    let check = Check::<B> { device, dtype };
    let mut faults: Vec<(Kernel, String)> = Vec::new();
    for shape in shapes {
        let kernel = Kernel::of(shape);
        if !C::uses(kernel) || faults.iter().any(|(faulty, _)| *faulty == kernel) {
            continue;
        }
        let mut outcome = check.run(*shape);
        // Large matrix products use kernels with larger tiles.
        if outcome.is_ok() && matches!(kernel, Kernel::Linear | Kernel::Convolution) {
            C::force_large_tiles(true);
            outcome = check.run(*shape);
            C::force_large_tiles(false);
        }
        if let Err(reason) = outcome {
            faults.push((kernel, format!("{shape:?} in {dtype:?}: {reason}")));
        }
    }
    faults
}

struct Check<'a, B: FusedOps> {
    device: &'a B::Device,
    dtype: DType,
}

/// The same values on the tested backend and on flex.
struct Input<B: FusedOps, const D: usize> {
    tested: Tensor<B, D>,
    reference: Tensor<Flex, D>,
}

impl<B: FusedOps> Check<'_, B> {
    fn run(&self, shape: KernelShape) -> Result<(), String> {
        match shape {
            KernelShape::Linear { d_in, d_out } => {
                let (d_in, d_out) = (shortened(d_in), shortened(d_out));
                let x = self.input(1, [TOKENS, d_in]);
                let weight = self.input(2, [d_out, d_in]);
                let bias = self.input(3, [d_out]);
                self.compare(
                    B::fused_linear(x.tested, weight.tested, Some(bias.tested)),
                    defaults::fused_linear(x.reference, weight.reference, Some(bias.reference)),
                )
            }
            KernelShape::RmsNorm { dim } => {
                let x = self.input(1, [TOKENS, dim]);
                let weight = self.input_of(DType::F32, 2, [dim]);
                self.compare(
                    B::rms_norm(x.tested, weight.tested, EPS),
                    defaults::rms_norm(x.reference, weight.reference, EPS),
                )
            }
            KernelShape::LayerNormModulate { dim } => {
                let x = self.input(1, [TOKENS, dim]);
                let shift = self.input_of(DType::F32, 2, [2, dim]);
                let scale = self.input_of(DType::F32, 3, [2, dim]);
                self.compare(
                    B::layer_norm_modulate(x.tested, shift.tested, scale.tested, &RUNS, EPS),
                    defaults::layer_norm_modulate(
                        x.reference,
                        shift.reference,
                        scale.reference,
                        &RUNS,
                        EPS,
                    ),
                )
            }
            KernelShape::QkNormRope { heads, head_dim } => {
                let x = self.input(1, [TOKENS, heads, head_dim]);
                let weight = self.input_of(DType::F32, 2, [head_dim]);
                let cos = self.input_of(DType::F32, 3, [TOKENS, head_dim / 2]);
                let sin = self.input_of(DType::F32, 4, [TOKENS, head_dim / 2]);
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
                )
            }
            KernelShape::Attention {
                heads,
                kv_heads,
                head_dim,
                causal,
            } => {
                let query = self.input(1, [TOKENS, heads, head_dim]);
                let key = self.input(2, [TOKENS, kv_heads, head_dim]);
                let value = self.input(3, [TOKENS, kv_heads, head_dim]);
                self.compare(
                    B::packed_attention(query.tested, key.tested, value.tested, &LENGTHS, causal),
                    defaults::packed_attention(
                        query.reference,
                        key.reference,
                        value.reference,
                        &LENGTHS,
                        causal,
                    ),
                )
            }
            KernelShape::Convolution {
                channels_in,
                channels_out,
                kernel,
            } => {
                let x = self.input(1, [1, channels_in, SIDES[0], SIDES[1]]);
                let weight = self.input(2, [channels_out, channels_in, kernel, kernel]);
                let bias = self.input(3, [channels_out]);
                self.compare(
                    B::conv2d_same(x.tested, weight.tested, bias.tested),
                    defaults::conv2d_same(x.reference, weight.reference, bias.reference),
                )
            }
            KernelShape::Elementwise { dim } => self.run_elementwise(dim),
            KernelShape::ChannelNorm { channels } => {
                let x = self.input(1, [1, channels, SIDES[0], SIDES[1]]);
                let gamma = self.input_of(DType::F32, 2, [channels]);
                self.compare(
                    B::channel_norm_silu(x.tested, gamma.tested),
                    defaults::channel_norm_silu(x.reference, gamma.reference),
                )
            }
        }
    }

    fn run_elementwise(&self, dim: usize) -> Result<(), String> {
        let (a, b) = (self.input(1, [TOKENS, dim]), self.input(2, [TOKENS, dim]));
        self.compare(
            B::gelu_tanh(a.tested.clone()),
            defaults::gelu_tanh(a.reference.clone()),
        )?;
        self.compare(
            B::silu_mul(a.tested.clone(), b.tested.clone()),
            defaults::silu_mul(a.reference.clone(), b.reference.clone()),
        )?;
        let gate = self.input_of(DType::F32, 3, [2, dim]);
        self.compare(
            B::gated_residual(a.tested, gate.tested, b.tested, &RUNS),
            defaults::gated_residual(a.reference, gate.reference, b.reference, &RUNS),
        )
    }

    fn input<const D: usize>(&self, seed: u32, shape: [usize; D]) -> Input<B, D> {
        self.input_of(self.dtype, seed, shape)
    }

    /// Pseudo-random values from -1 to 1 that every dtype represents exactly.
    fn input_of<const D: usize>(&self, dtype: DType, seed: u32, shape: [usize; D]) -> Input<B, D> {
        let mut state = seed.wrapping_mul(2_654_435_761);
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 25) as f32 / 64.0 - 1.0
        };
        let values: Vec<f32> = (0..shape.iter().product()).map(|_| next()).collect();
        let data = TensorData::new(values, shape);
        Input {
            tested: Tensor::from_data(data.clone().convert_dtype(dtype), (self.device, dtype)),
            reference: Tensor::from_data(data, (&FlexDevice, DType::F32)),
        }
    }

    /// Fails if the largest difference, relative to the largest magnitude, exceeds the rounding error
    /// of the dtype.
    fn compare<const D: usize>(
        &self,
        tested: Tensor<B, D>,
        reference: Tensor<Flex, D>,
    ) -> Result<(), String> {
        let tolerance = match self.dtype {
            DType::F32 => 1e-4,
            DType::F16 => 4e-3,
            _ => 2e-2,
        };
        let tested = tested.try_into_data().map_err(|error| one_line(&error))?;
        let reference = reference
            .try_into_data()
            .map_err(|error| one_line(&error))?;
        let largest = reference.iter::<f32>().fold(0.0_f32, |a, x| a.max(x.abs()));
        let mut worst = 0.0_f32;
        for (x, y) in tested.iter::<f32>().zip(reference.iter::<f32>()) {
            let difference = (x - y).abs() / largest;
            if !difference.is_finite() {
                return Err(format!("got {x}, expected {y}"));
            }
            worst = worst.max(difference);
        }
        if worst <= tolerance {
            Ok(())
        } else {
            Err(format!("off by {worst:.1e} of the largest value"))
        }
    }
}

/// Limits a width, and keeps its remainder modulo 128, the largest tile.
fn shortened(width: usize) -> usize {
    if width <= MAX_WIDTH + 128 {
        width
    } else {
        MAX_WIDTH + width % 128
    }
}

/// The first line of a device's report that names an error, else the first line; at most 200
/// characters.
fn one_line(report: &impl Display) -> String {
    let text = report.to_string();
    let names_error = |line: &&str| line.contains("error:") || line.contains("CUDA_ERROR");
    let line = text
        .lines()
        .find(names_error)
        .or_else(|| text.lines().next());
    line.unwrap_or_default().trim().chars().take(200).collect()
}
