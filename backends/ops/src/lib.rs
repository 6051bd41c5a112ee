//! The fused ops that kiln's models use besides burn's own ops.
//!
//! Every op of [`FusedOps`] has a default body in plain burn ops, which defines it. A backend
//! overrides the body only with a kernel that is tested against it and measured faster, or where
//! burn's own ops compute wrong results on that backend.

mod cores;
#[cfg(feature = "cubecl")]
mod cubecl;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod defaults;
pub mod faults;
#[cfg(feature = "flex")]
mod flex;
pub mod host;
#[cfg(any(feature = "flex", feature = "ndarray"))]
mod host_room;
mod memory;
mod shapes;
mod upload;

use std::ops::Range;

use burn_tensor::backend::Backend;
use burn_tensor::{DType, Tensor};

pub use cores::Cores;
#[cfg(feature = "cubecl")]
pub use cubecl::{Gate, Kernel, KernelChoice, KernelRuntime, read_settings};
pub use faults::{DeviceCheck, FaultWatch};
pub use memory::{MemoryReport, MemoryRoom, MemoryUse};
pub use shapes::KernelShape;
pub use upload::Upload;

/// A run of consecutive packed tokens that share one row of a modulation table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TokenRun {
    /// Number of tokens; may be 0.
    pub tokens: usize,
    /// Index of the row.
    pub row: usize,
}

/// The low-rank update of some tokens: for each output of a group of linear layers with one input,
/// `scale · (x · downᵀ) · upᵀ`.
#[derive(Debug, Clone)]
pub struct LowRankRun<B: Backend> {
    /// The tokens that the update is for.
    pub tokens: Range<usize>,
    /// The `down` matrices of all outputs, one below the other: `[sum of ranks, in]`.
    pub down: Tensor<B, 2>,
    /// For each output; `None` if the output is not changed.
    pub ups: Vec<Option<LowRankUp<B>>>,
}

/// The part of a [`LowRankRun`] for one output.
#[derive(Debug, Clone)]
pub struct LowRankUp<B: Backend> {
    /// The output's rows of [`LowRankRun::down`].
    pub rank: Range<usize>,
    /// `[out, rank]`, in the dtype of `down`.
    pub up: Tensor<B, 2>,
    pub scale: f32,
}

/// Cosines and sines of the rotary position embedding, `[tokens, head_dim / 2]` each, f32.
#[derive(Debug, Clone)]
pub struct Rope<B: Backend> {
    pub cos: Tensor<B, 2>,
    pub sin: Tensor<B, 2>,
}

/// A backend with the fused ops of the models.
///
/// Norms, softmax and rotations are computed in f32 for every dtype of the activations, and the
/// result is cast back to that dtype.
pub trait FusedOps: MemoryReport + DeviceCheck + Upload {
    /// Compares the backend's kernels with the default bodies on a device, with activations of
    /// `dtype`, at the shapes of a model. A kernel that differs or fails is not used again in this
    /// process, and a warning with the reason is logged.
    fn check_kernels(device: &Self::Device, dtype: DType, shapes: &[KernelShape]) {
        let _ = (device, dtype, shapes);
    }

    /// The threads that compute the ops of device number `part` among `parts` devices that compute
    /// side by side: on CPU backends a share of the cores, with [`Cores::run`]. Ops compute the same
    /// values on any number of threads.
    fn cores(part: usize, parts: usize) -> Cores {
        let _ = (part, parts);
        Cores::default()
    }

    /// Computes `x · weightᵀ + bias` in the dtype of `x`.
    ///
    /// If the weight is bf16, `x` is rounded to bf16 first, as in a model that computes in bf16:
    /// CPUs multiply bf16 twice as fast as f32. Sums are always wider than bf16.
    ///
    /// # Shapes
    /// - x: `[tokens, in]`, weight: `[out, in]` as PyTorch stores it, of any float dtype, bias: `[out]`
    /// - output: `[tokens, out]`
    fn fused_linear(
        x: Tensor<Self, 2>,
        weight: Tensor<Self, 2>,
        bias: Option<Tensor<Self, 1>>,
    ) -> Tensor<Self, 2> {
        defaults::fused_linear(x, weight, bias)
    }

    /// Computes linear layers that have one input, as [`FusedOps::fused_linear`] does, with low-rank
    /// updates of their outputs, as [`FusedOps::add_low_rank`] adds them.
    ///
    /// # Shapes
    /// - x: `[tokens, in]`
    /// - layers: weights `[out, in]` and biases `[out]`; each run has one entry for each of them
    /// - outputs: `[tokens, out]` each
    fn fused_linears(
        x: Tensor<Self, 2>,
        layers: Vec<(Tensor<Self, 2>, Option<Tensor<Self, 1>>)>,
        runs: &[LowRankRun<Self>],
    ) -> Vec<Tensor<Self, 2>> {
        defaults::fused_linears(x, layers, runs, Self::fused_linear)
    }

    /// Adds low-rank updates to the outputs of linear layers that have one input, as LoRA does. Outputs
    /// share the product with `down`. Tokens that are in no run keep their bits; runs may overlap.
    ///
    /// Products round as those of [`FusedOps::fused_linear`]: if the matrices are bf16, `x` and the scaled
    /// product with `down` are rounded to bf16.
    ///
    /// # Shapes
    /// - x: `[tokens, in]`
    /// - outputs: `[tokens, out]` each, in the dtype of `x`; each run has one entry for each of them
    fn add_low_rank(
        outputs: Vec<Tensor<Self, 2>>,
        x: Tensor<Self, 2>,
        runs: &[LowRankRun<Self>],
    ) -> Vec<Tensor<Self, 2>> {
        defaults::add_low_rank(outputs, x, runs, Self::fused_linear)
    }

    /// Computes `x / sqrt(mean(x²) + eps) * weight` over the last dimension.
    ///
    /// # Shapes
    /// - x, output: `[tokens, dim]`, weight: `[dim]`
    fn rms_norm(x: Tensor<Self, 2>, weight: Tensor<Self, 1>, eps: f64) -> Tensor<Self, 2> {
        defaults::rms_norm(x, weight, eps)
    }

    /// Computes `layer_norm(x) * (1 + scale) + shift`; the layer norm has no weights of its own.
    ///
    /// # Shapes
    /// - x, output: `[tokens, dim]`, shift and scale: `[rows, dim]` f32; `runs` maps tokens to rows
    fn layer_norm_modulate(
        x: Tensor<Self, 2>,
        shift: Tensor<Self, 2>,
        scale: Tensor<Self, 2>,
        runs: &[TokenRun],
        eps: f64,
    ) -> Tensor<Self, 2> {
        defaults::layer_norm_modulate(x, shift, scale, runs, eps)
    }

    /// Computes `residual + gate * x`. In f16 the result saturates at ±65504, as in diffusers.
    ///
    /// # Shapes
    /// - residual, x, output: `[tokens, dim]`, gate: `[rows, dim]` f32; `runs` maps tokens to rows
    fn gated_residual(
        residual: Tensor<Self, 2>,
        gate: Tensor<Self, 2>,
        x: Tensor<Self, 2>,
        runs: &[TokenRun],
    ) -> Tensor<Self, 2> {
        defaults::gated_residual(residual, gate, x, runs)
    }

    /// Applies RMS norm over the head dimension, then rotates its consecutive pairs `(2i, 2i + 1)`
    /// by the angles of `rope`.
    ///
    /// # Shapes
    /// - x, output: `[tokens, heads, head_dim]`, weight: `[head_dim]`
    fn qk_norm_rope(
        x: Tensor<Self, 3>,
        weight: Tensor<Self, 1>,
        rope: &Rope<Self>,
        eps: f64,
    ) -> Tensor<Self, 3> {
        defaults::qk_norm_rope(x, weight, rope, eps)
    }

    /// Computes GELU by its tanh approximation, `0.5 x (1 + tanh(√(2/π) (x + 0.044715 x³)))`, of
    /// `[tokens, dim]`.
    fn gelu_tanh(x: Tensor<Self, 2>) -> Tensor<Self, 2> {
        defaults::gelu_tanh(x)
    }

    /// Computes `silu(gate) * up` of two `[tokens, dim]`.
    fn silu_mul(gate: Tensor<Self, 2>, up: Tensor<Self, 2>) -> Tensor<Self, 2> {
        defaults::silu_mul(gate, up)
    }

    /// Computes softmax attention within each packed sequence, with scores scaled by `1/√head_dim`.
    /// If `causal`, a query sees only the keys up to its own position.
    ///
    /// # Shapes
    /// - query: `[tokens, heads, head_dim]`, key and value: `[tokens, kv_heads, head_dim]`, where
    ///   each key/value head serves `heads / kv_heads` consecutive query heads
    /// - lengths: tokens of each sequence; their sum is `tokens`
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

    /// Computes a 2-D convolution of stride 1 with zero padding `kernel / 2`, which keeps height and
    /// width.
    ///
    /// # Shapes
    /// - x: `[images, in, height, width]`, weight: `[out, in, kernel, kernel]` with odd `kernel`,
    ///   bias: `[out]`
    /// - output: `[images, out, height, width]`
    fn conv2d_same(
        x: Tensor<Self, 4>,
        weight: Tensor<Self, 4>,
        bias: Tensor<Self, 1>,
    ) -> Tensor<Self, 4> {
        defaults::conv2d_same(x, weight, bias)
    }

    /// Computes `x / max(‖x‖₂, 1e-12) * √channels * gamma` over the channels.
    ///
    /// # Shapes
    /// - x, output: `[images, channels, height, width]`, gamma: `[channels]`
    fn channel_norm(x: Tensor<Self, 4>, gamma: Tensor<Self, 1>) -> Tensor<Self, 4> {
        defaults::channel_norm(x, gamma)
    }

    /// Applies `silu` to the result of [`FusedOps::channel_norm`].
    fn channel_norm_silu(x: Tensor<Self, 4>, gamma: Tensor<Self, 1>) -> Tensor<Self, 4> {
        defaults::channel_norm_silu(x, gamma)
    }

    /// Doubles height and width by nearest-neighbour interpolation: `[n, c, h, w]` to
    /// `[n, c, 2h, 2w]`.
    fn upsample_nearest(x: Tensor<Self, 4>) -> Tensor<Self, 4> {
        defaults::upsample_nearest(x)
    }

    /// Copies these rows and columns of every channel: `[n, c, h, w]` to
    /// `[n, c, rows, columns]`. Not empty.
    fn crop(x: Tensor<Self, 4>, rows: Range<usize>, columns: Range<usize>) -> Tensor<Self, 4> {
        defaults::crop(x, rows, columns)
    }
}

#[cfg(feature = "ndarray")]
impl FusedOps for burn_ndarray::NdArray {
    fn cores(part: usize, parts: usize) -> Cores {
        Cores::share(part, parts)
    }
}
