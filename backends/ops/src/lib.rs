//! The ops that kiln's models are written in, beyond burn's own.
//!
//! Every op of [`FusedOps`] has a default body in plain burn ops, which is its definition. A
//! backend overrides it only with a kernel that is tested against that body and measured faster, or
//! where burn's own ops give it wrong results.

#[cfg(feature = "cubecl")]
mod cubecl;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod defaults;
pub mod faults;
#[cfg(feature = "flex")]
mod flex;
pub mod host;
mod memory;
mod shapes;
mod upload;

use burn_tensor::backend::Backend;
use burn_tensor::{DType, Tensor};

#[cfg(feature = "cubecl")]
pub use cubecl::{Gate, Kernel, KernelChoice, KernelRuntime, read_settings};
pub use faults::{DeviceCheck, FaultWatch};
pub use memory::{MemoryReport, MemoryUse};
pub use shapes::KernelShape;
pub use upload::Upload;

/// A run of consecutive packed tokens that share one row of a modulation table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TokenRun {
    pub tokens: usize,
    pub row: usize,
}

/// Rotary position tables, `[tokens, head_dim / 2]` each, f32.
#[derive(Debug, Clone)]
pub struct Rope<B: Backend> {
    pub cos: Tensor<B, 2>,
    pub sin: Tensor<B, 2>,
}

/// A backend with the ops the models need.
///
/// Norms, softmax and rotations are computed in f32 whatever the type of the activations, and the
/// result has the activations' type again.
pub trait FusedOps: MemoryReport + DeviceCheck + Upload {
    /// Compares the backend's kernels with the default bodies on a device, with activations of a type,
    /// at the sizes of a model. A kernel that differs or fails is not used again in this process, and a
    /// warning says why.
    fn check_kernels(device: &Self::Device, dtype: DType, shapes: &[KernelShape]) {
        let _ = (device, dtype, shapes);
    }

    /// `x · weightᵀ + bias`, in the type of `x`.
    ///
    /// With a weight in bf16, `x` is rounded to bf16 first, as it is in a model that computes in
    /// bf16: processors multiply in it twice as fast as in f32. Sums are wider always.
    ///
    /// # Shapes
    /// - x: `[tokens, in]`, weight: `[out, in]` as PyTorch stores it, of any float type
    /// - output: `[tokens, out]`
    fn fused_linear(
        x: Tensor<Self, 2>,
        weight: Tensor<Self, 2>,
        bias: Option<Tensor<Self, 1>>,
    ) -> Tensor<Self, 2> {
        defaults::fused_linear(x, weight, bias)
    }

    /// `x / sqrt(mean(x²) + eps) * weight` over the last dimension of `[tokens, dim]`.
    fn rms_norm(x: Tensor<Self, 2>, weight: Tensor<Self, 1>, eps: f64) -> Tensor<Self, 2> {
        defaults::rms_norm(x, weight, eps)
    }

    /// `layer_norm(x) * (1 + scale) + shift`; the layer norm has no weights of its own.
    ///
    /// # Shapes
    /// - x: `[tokens, dim]`, shift and scale: `[rows, dim]` f32, `runs` says which row a token uses
    fn layer_norm_modulate(
        x: Tensor<Self, 2>,
        shift: Tensor<Self, 2>,
        scale: Tensor<Self, 2>,
        runs: &[TokenRun],
        eps: f64,
    ) -> Tensor<Self, 2> {
        defaults::layer_norm_modulate(x, shift, scale, runs, eps)
    }

    /// `residual + gate * x`, saturating instead of overflowing in f16 as the reference does.
    ///
    /// # Shapes
    /// - residual, x: `[tokens, dim]`, gate: `[rows, dim]` f32
    fn gated_residual(
        residual: Tensor<Self, 2>,
        gate: Tensor<Self, 2>,
        x: Tensor<Self, 2>,
        runs: &[TokenRun],
    ) -> Tensor<Self, 2> {
        defaults::gated_residual(residual, gate, x, runs)
    }

    /// RMS norm over the head dimension, then the rotation of its consecutive pairs
    /// `(2i, 2i + 1)` by the angles of `rope`.
    ///
    /// # Shapes
    /// - x: `[tokens, heads, head_dim]`, weight: `[head_dim]`
    fn qk_norm_rope(
        x: Tensor<Self, 3>,
        weight: Tensor<Self, 1>,
        rope: &Rope<Self>,
        eps: f64,
    ) -> Tensor<Self, 3> {
        defaults::qk_norm_rope(x, weight, rope, eps)
    }

    /// `0.5 x (1 + tanh(√(2/π) (x + 0.044715 x³)))`.
    fn gelu_tanh(x: Tensor<Self, 2>) -> Tensor<Self, 2> {
        defaults::gelu_tanh(x)
    }

    /// `silu(gate) * up`.
    fn silu_mul(gate: Tensor<Self, 2>, up: Tensor<Self, 2>) -> Tensor<Self, 2> {
        defaults::silu_mul(gate, up)
    }

    /// Softmax attention inside each of the packed sequences, scaled by `1/√head_dim`.
    ///
    /// # Shapes
    /// - query: `[tokens, heads, head_dim]`, key and value: `[tokens, kv_heads, head_dim]`, where
    ///   each key/value head serves `heads / kv_heads` consecutive query heads
    /// - lengths: tokens of each sequence, summing to `tokens`
    /// - output: `[tokens, heads * head_dim]`
    fn packed_attention(
        query: Tensor<Self, 3>,
        key: Tensor<Self, 3>,
        value: Tensor<Self, 3>,
        lengths: &[usize],
        causal: bool,
    ) -> Tensor<Self, 2> {
        defaults::packed_attention(query, key, value, lengths, causal)
    }

    /// Convolution of stride 1 with `kernel / 2` zeros around, so height and width stay.
    ///
    /// # Shapes
    /// - x: `[images, in, height, width]`, weight: `[out, in, kernel, kernel]`, kernel odd
    fn conv2d_same(
        x: Tensor<Self, 4>,
        weight: Tensor<Self, 4>,
        bias: Tensor<Self, 1>,
    ) -> Tensor<Self, 4> {
        defaults::conv2d_same(x, weight, bias)
    }

    /// `x / max(‖x‖₂, 1e-12) * √channels * gamma` over the channels of `[images, channels, h, w]`.
    fn channel_norm(x: Tensor<Self, 4>, gamma: Tensor<Self, 1>) -> Tensor<Self, 4> {
        defaults::channel_norm(x, gamma)
    }

    /// `silu` of [`FusedOps::channel_norm`].
    fn channel_norm_silu(x: Tensor<Self, 4>, gamma: Tensor<Self, 1>) -> Tensor<Self, 4> {
        defaults::channel_norm_silu(x, gamma)
    }

    /// Every pixel becomes a 2×2 square of itself: `[n, c, h, w]` to `[n, c, 2h, 2w]`.
    fn upsample_nearest(x: Tensor<Self, 4>) -> Tensor<Self, 4> {
        defaults::upsample_nearest(x)
    }
}

#[cfg(feature = "ndarray")]
impl FusedOps for burn_ndarray::NdArray {}
