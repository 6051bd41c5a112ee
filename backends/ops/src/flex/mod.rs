//! Kernels for the CPU backend flex, for f32 activations. Other dtypes take the default body.
//!
//! Speedups are relative to the default body, on two cores of an AVX-512 machine, at the shapes of
//! `cargo bench -p kiln-ops --features flex` (measured on 2026-11-25).

mod attention;
#[cfg(target_arch = "x86_64")]
mod bf16;
mod conv;
mod direct;
mod elementwise;
mod grid;
mod linear;
mod low_rank;
mod matrix;
mod norm;
mod shared;
mod simd;
mod thin;
mod tile;
mod winograd;

use std::ops::Range;

use burn_flex::{Flex, FlexTensor};
use burn_tensor::{DType, Tensor, TensorData, TensorPrimitive};

use crate::{Cores, FusedOps, LowRankRun, Rope, TokenRun, defaults};

type Float<const D: usize> = Tensor<Flex, D>;

impl FusedOps for Flex {
    fn cores(part: usize, parts: usize) -> Cores {
        Cores::share(part, parts)
    }

    fn fused_linear(x: Float<2>, weight: Float<2>, bias: Option<Float<1>>) -> Float<2> {
        if !is_f32(&x) {
            return defaults::fused_linear(x, weight, bias);
        }
        linear::fused_linears(x, vec![(weight, bias)], &[]).remove(0)
    }

    fn fused_linears(
        x: Float<2>,
        layers: Vec<(Float<2>, Option<Float<1>>)>,
        runs: &[LowRankRun<Self>],
    ) -> Vec<Float<2>> {
        if !is_f32(&x) {
            return defaults::fused_linears(x, layers, runs, Self::fused_linear);
        }
        linear::fused_linears(x, layers, runs)
    }

    fn rms_norm(x: Float<2>, weight: Float<1>, eps: f64) -> Float<2> {
        if !is_f32(&x) {
            return defaults::rms_norm(x, weight, eps);
        }
        norm::rms_norm(x, weight, eps)
    }

    fn layer_norm_modulate(
        x: Float<2>,
        shift: Float<2>,
        scale: Float<2>,
        runs: &[TokenRun],
        eps: f64,
    ) -> Float<2> {
        if !is_f32(&x) {
            return defaults::layer_norm_modulate(x, shift, scale, runs, eps);
        }
        norm::layer_norm_modulate(x, shift, scale, runs, eps)
    }

    fn gated_residual(
        residual: Float<2>,
        gate: Float<2>,
        x: Float<2>,
        runs: &[TokenRun],
    ) -> Float<2> {
        if !is_f32(&residual) || !is_f32(&x) {
            return defaults::gated_residual(residual, gate, x, runs);
        }
        elementwise::gated_residual(residual, gate, x, runs)
    }

    fn qk_norm_rope(x: Float<3>, weight: Float<1>, rope: &Rope<Self>, eps: f64) -> Float<3> {
        if !is_f32(&x) {
            return defaults::qk_norm_rope(x, weight, rope, eps);
        }
        norm::qk_norm_rope(x, weight, rope, eps)
    }

    fn gelu_tanh(x: Float<2>) -> Float<2> {
        if !is_f32(&x) {
            return defaults::gelu_tanh(x);
        }
        elementwise::gelu_tanh(x)
    }

    fn silu_mul(gate: Float<2>, up: Float<2>) -> Float<2> {
        if !is_f32(&gate) || !is_f32(&up) {
            return defaults::silu_mul(gate, up);
        }
        elementwise::silu_mul(gate, up)
    }

    fn packed_attention(
        query: Float<3>,
        key: Float<3>,
        value: Float<3>,
        lengths: &[usize],
        causal: bool,
    ) -> Float<2> {
        if !is_f32(&query) || !is_f32(&key) || !is_f32(&value) {
            return defaults::packed_attention(query, key, value, lengths, causal);
        }
        attention::packed_attention(query, key, value, lengths, causal)
    }

    fn conv2d_same(x: Float<4>, weight: Float<4>, bias: Float<1>) -> Float<4> {
        if !is_f32(&x) {
            return defaults::conv2d_same(x, weight, bias);
        }
        conv::conv2d_same(x, weight.cast(DType::F32), bias.cast(DType::F32))
    }

    fn channel_norm(x: Float<4>, gamma: Float<1>) -> Float<4> {
        if !is_f32(&x) {
            return defaults::channel_norm(x, gamma);
        }
        norm::channel_norm(x, gamma, false)
    }

    fn channel_norm_silu(x: Float<4>, gamma: Float<1>) -> Float<4> {
        if !is_f32(&x) {
            return defaults::channel_norm_silu(x, gamma);
        }
        norm::channel_norm(x, gamma, true)
    }

    fn upsample_nearest(x: Float<4>) -> Float<4> {
        if !is_f32(&x) {
            return defaults::upsample_nearest(x);
        }
        elementwise::upsample_nearest(x)
    }

    fn crop(x: Float<4>, rows: Range<usize>, columns: Range<usize>) -> Float<4> {
        if !is_f32(&x) {
            return defaults::crop(x, rows, columns);
        }
        elementwise::crop(x, rows, columns)
    }
}

fn is_f32<const D: usize>(x: &Float<D>) -> bool {
    x.dtype() == DType::F32
}

/// Converts to the backend's tensor in contiguous layout; copies only if needed.
fn contiguous<const D: usize>(x: Float<D>) -> FlexTensor {
    x.into_primitive().tensor().to_contiguous()
}

fn from_values<const D: usize>(values: Vec<f32>, shape: [usize; D]) -> Float<D> {
    from_flex(FlexTensor::from_data(TensorData::new(values, shape)))
}

fn from_flex<const D: usize>(tensor: FlexTensor) -> Float<D> {
    Tensor::from_primitive(TensorPrimitive::Float(tensor))
}

/// Lists the modulation table row of each packed token.
fn token_rows(runs: &[TokenRun]) -> Vec<usize> {
    runs.iter()
        .flat_map(|run| std::iter::repeat_n(run.row, run.tokens))
        .collect()
}
