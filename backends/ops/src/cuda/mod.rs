//! Kernels in CUDA C++ for NVIDIA GPUs: matrix products, convolutions, attention, elementwise ops.
//!
//! The sources are in `kernels/`; NVRTC compiles them at run time for the GPU in use. Products in bf16
//! and f16 run on tensor cores with f32 accumulation on compute capability 8.0 and above; all others
//! run in f32 arithmetic, never in TF32.

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

/// Whether the GPU has the instructions of `*_mma.cu` (compute capability 8.0 and above). `cp.async`
/// was introduced together with bf16 products.
fn has_tensor_cores(x: &CubeTensor<CudaRuntime>) -> bool {
    x.client.properties().features.copy_async
}

/// Whether the GPU has the instructions of `*_wgmma.cu`: compute capability 9.0 only, which has TMA
/// but not the wide im2col mode of later GPUs.
fn has_wgmma(x: &CubeTensor<CudaRuntime>) -> bool {
    let tma = x.client.properties().features.tma;
    tma.contains(Tma::Base) && !tma.contains(Tma::Im2colWide)
}

/// Makes the last dimension contiguous, with any other strides; copies only if needed.
fn with_contiguous_rows(x: &CubeTensor<CudaRuntime>) -> CubeTensor<CudaRuntime> {
    if x.meta.strides().last() == Some(&1) {
        x.clone()
    } else {
        into_contiguous(x.clone())
    }
}

/// Whether every row of a tensor of a 16-bit dtype starts at a multiple of 16 bytes.
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
