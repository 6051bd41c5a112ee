//! Kernels that exist for one `CubeCL` runtime only.

use burn_cubecl::CubeRuntime;
use burn_cubecl::tensor::CubeTensor;

use super::gate::Gate;
use crate::TokenRun;

/// A `CubeCL` runtime with the kernels that kiln has for it alone. Each function implements an op of
/// [`crate::FusedOps`], and returns `None` if it has no kernel for these tensors.
pub trait KernelRuntime: CubeRuntime {
    /// Whether [`KernelRuntime::linear`] and [`KernelRuntime::conv2d_same`] support all tensors. burn
    /// cannot fuse elementwise ops with these kernels, so the runtime then has kernels for those too.
    const HAS_PRODUCTS: bool = false;

    /// Whether burn's own f32 matrix products may round their operands to TF32.
    const ROUNDS_TO_TF32: bool = false;

    /// The kernels in use on this runtime's devices.
    fn gate() -> &'static Gate;

    /// Computes [`crate::FusedOps::fused_linear`].
    fn linear(
        x: &CubeTensor<Self>,
        weight: &CubeTensor<Self>,
        bias: Option<&CubeTensor<Self>>,
    ) -> Option<CubeTensor<Self>> {
        let _ = (x, weight, bias);
        None
    }

    /// Computes [`crate::FusedOps::conv2d_same`].
    fn conv2d_same(
        x: &CubeTensor<Self>,
        weight: &CubeTensor<Self>,
        bias: &CubeTensor<Self>,
    ) -> Option<CubeTensor<Self>> {
        let _ = (x, weight, bias);
        None
    }

    /// Computes [`crate::FusedOps::gelu_tanh`].
    fn gelu_tanh(x: &CubeTensor<Self>) -> Option<CubeTensor<Self>> {
        let _ = x;
        None
    }

    /// Computes [`crate::FusedOps::silu_mul`].
    fn silu_mul(gate: &CubeTensor<Self>, up: &CubeTensor<Self>) -> Option<CubeTensor<Self>> {
        let _ = (gate, up);
        None
    }

    /// Computes [`crate::FusedOps::gated_residual`].
    fn gated_residual(
        residual: &CubeTensor<Self>,
        gate: &CubeTensor<Self>,
        x: &CubeTensor<Self>,
        runs: &[TokenRun],
    ) -> Option<CubeTensor<Self>> {
        let _ = (residual, gate, x, runs);
        None
    }

    /// Computes [`crate::FusedOps::packed_attention`].
    fn packed_attention(
        query: &CubeTensor<Self>,
        key: &CubeTensor<Self>,
        value: &CubeTensor<Self>,
        lengths: &[usize],
        causal: bool,
    ) -> Option<CubeTensor<Self>> {
        let _ = (query, key, value, lengths, causal);
        None
    }
}

#[cfg(feature = "wgpu")]
impl KernelRuntime for burn_cubecl::cubecl::wgpu::WgpuRuntime {
    fn gate() -> &'static Gate {
        static GATE: Gate = Gate::open();
        &GATE
    }
}
