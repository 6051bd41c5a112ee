//! Kernels in CUDA C++ for NVIDIA's GPUs: products of matrices, convolutions, attention, elementwise ops.
//!
//! The texts lie in `kernels/`; NVRTC compiles them at run time for the GPU at hand. Products in bf16
//! and f16 run on tensor cores where there are any (compute capability 8.0 and above), with f32 sums;
//! all others in f32 arithmetic, never in TF32.

mod attention;
mod elementwise;
mod product;
mod source;

use burn_cubecl::cubecl::cuda::CudaRuntime;
use burn_cubecl::cubecl::ir::features::Tma;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::ops::numeric::empty_device_contiguous_dtype;
use burn_cubecl::tensor::CubeTensor;
use burn_tensor::{DType, Shape};

pub use attention::{Attention, AttentionMma, AttentionWgmma};
pub use elementwise::{Elementwise, ElementwiseOp};
pub use product::{ChannelsLast, Elements, Image, Product, ProductFma, ProductMma, ProductWgmma};
pub use source::{CudaKernel, Launch};

use crate::TokenRun;
use crate::cubecl::{Gate, KernelRuntime};

impl KernelRuntime for CudaRuntime {
    const HAS_PRODUCTS: bool = true;
    const ROUNDS_TO_TF32: bool = true;

    fn gate() -> &'static Gate {
        static GATE: Gate = Gate::open();
        &GATE
    }

    fn linear(
        x: &CubeTensor<Self>,
        weight: &CubeTensor<Self>,
        bias: Option<&CubeTensor<Self>>,
    ) -> Option<CubeTensor<Self>> {
        Some(product::linear(x, weight, bias))
    }

    fn conv2d_same(
        x: &CubeTensor<Self>,
        weight: &CubeTensor<Self>,
        bias: &CubeTensor<Self>,
    ) -> Option<CubeTensor<Self>> {
        Some(product::conv2d_same(x, weight, bias))
    }

    fn gelu_tanh(x: &CubeTensor<Self>) -> Option<CubeTensor<Self>> {
        elementwise::activation(x, None)
    }

    fn silu_mul(gate: &CubeTensor<Self>, up: &CubeTensor<Self>) -> Option<CubeTensor<Self>> {
        elementwise::activation(gate, Some(up))
    }

    fn gated_residual(
        residual: &CubeTensor<Self>,
        gate: &CubeTensor<Self>,
        x: &CubeTensor<Self>,
        runs: &[TokenRun],
    ) -> Option<CubeTensor<Self>> {
        elementwise::gated_residual(residual, gate, x, runs)
    }

    fn packed_attention(
        query: &CubeTensor<Self>,
        key: &CubeTensor<Self>,
        value: &CubeTensor<Self>,
        lengths: &[usize],
        causal: bool,
    ) -> Option<CubeTensor<Self>> {
        attention::packed_attention(query, key, value, lengths, causal)
    }
}

/// Whether the GPU has what `*_mma.cu` are written with: `cp.async` came with the instructions for
/// bf16, in compute capability 8.0.
fn has_tensor_cores(x: &CubeTensor<CudaRuntime>) -> bool {
    x.client.properties().features.copy_async
}

/// Whether the GPU has what `*_wgmma.cu` are written with: compute capability 9.0 and no other, which is
/// told by the copies of tensors that came with it, and those that came with the next.
fn has_wgmma(x: &CubeTensor<CudaRuntime>) -> bool {
    let tma = x.client.properties().features.tma;
    tma.contains(Tma::Base) && !tma.contains(Tma::Im2colWide)
}

/// Values of the last dimension beside each other, whatever the other strides.
fn rows(x: &CubeTensor<CudaRuntime>) -> CubeTensor<CudaRuntime> {
    if x.meta.strides().last() == Some(&1) {
        x.clone()
    } else {
        into_contiguous(x.clone())
    }
}

/// Whether every row of a tensor of a 16-bit type begins at a multiple of 16 bytes.
fn is_aligned(x: &CubeTensor<CudaRuntime>) -> bool {
    let (_, outer) = x
        .meta
        .strides()
        .split_last()
        .expect("tensors have dimensions");
    x.handle.offset_start.unwrap_or(0).is_multiple_of(16)
        && outer.iter().all(|stride| stride.is_multiple_of(8))
}

fn allocate(like: &CubeTensor<CudaRuntime>, shape: Shape, dtype: DType) -> CubeTensor<CudaRuntime> {
    empty_device_contiguous_dtype(like.client.clone(), like.device.clone(), shape, dtype)
}
