//! What a runtime of `CubeCL` adds to the kernels that run on all of them.

use burn_cubecl::CubeRuntime;
use burn_cubecl::tensor::CubeTensor;

use super::gate::Gate;
use crate::TokenRun;

/// A runtime of `CubeCL`, and the kernels that kiln has for it alone. A function returns `None` where
/// it has no kernel for tensors like these.
pub trait KernelRuntime: CubeRuntime {
    /// Whether [`KernelRuntime::linear`] and [`KernelRuntime::conv2d_same`] take all tensors. burn's
    /// fusion joins nothing to them then, so that the elementwise ops have kernels too.
    const HAS_PRODUCTS: bool = false;

    /// Whether burn's own products of f32 may round what they multiply to TF32.
    const ROUNDS_TO_TF32: bool = false;

    /// Which kernels are in use on this runtime's devices.
    fn gate() -> &'static Gate;

    /// [`crate::FusedOps::fused_linear`].
    fn linear(
        x: &CubeTensor<Self>,
        weight: &CubeTensor<Self>,
        bias: Option<&CubeTensor<Self>>,
    ) -> Option<CubeTensor<Self>> {
        let _ = (x, weight, bias);
        None
    }

    /// [`crate::FusedOps::conv2d_same`].
    fn conv2d_same(
        x: &CubeTensor<Self>,
        weight: &CubeTensor<Self>,
        bias: &CubeTensor<Self>,
    ) -> Option<CubeTensor<Self>> {
        let _ = (x, weight, bias);
        None
    }

    /// [`crate::FusedOps::gelu_tanh`].
    fn gelu_tanh(x: &CubeTensor<Self>) -> Option<CubeTensor<Self>> {
        let _ = x;
        None
    }

    /// [`crate::FusedOps::silu_mul`].
    fn silu_mul(gate: &CubeTensor<Self>, up: &CubeTensor<Self>) -> Option<CubeTensor<Self>> {
        let _ = (gate, up);
        None
    }

    /// [`crate::FusedOps::gated_residual`].
    fn gated_residual(
        residual: &CubeTensor<Self>,
        gate: &CubeTensor<Self>,
        x: &CubeTensor<Self>,
        runs: &[TokenRun],
    ) -> Option<CubeTensor<Self>> {
        let _ = (residual, gate, x, runs);
        None
    }

    /// [`crate::FusedOps::packed_attention`].
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
