//! Elementwise ops.
//!
//! burn's fusion could also run each as one launch, but it does not fuse between the custom ops that
//! surround them: GELU alone took twelve passes in f32.

use burn_cubecl::cubecl::cuda::CudaRuntime;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use burn_tensor::{DType, TensorMetadata};

use super::allocate;
use super::source::{CudaKernel, Launch, element};
use crate::TokenRun;

/// A compilation of `elementwise.cu`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Elementwise {
    pub element: &'static str,
    pub op: ElementwiseOp,
}

/// The op that the kernel computes; the discriminant is the kernel's macro `OP`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ElementwiseOp {
    GeluTanh,
    SiluMul,
    GatedResidual,
}

impl Elementwise {
    /// Largest number of token runs per launch.
    const RUNS: usize = 32;
    /// Largest number of blocks for GELU and `silu_mul`, which loop over the values.
    const BLOCKS: usize = 65_536;

    /// Launch of GELU or `silu_mul` over `count` values.
    pub fn launch(self, count: usize) -> Launch<Self> {
        let blocks = count.div_ceil(8 * self.threads() as usize);
        Launch {
            kernel: self,
            grid: [blocks.clamp(1, Self::BLOCKS) as u32, 1, 1],
            info: [count as u64, 0]
                .into_iter()
                .chain([0; 2 * Self::RUNS])
                .collect(),
        }
    }

    /// Launches of the gated residual over tokens of `dim` values, up to 32 runs each.
    pub fn launches(self, dim: usize, runs: &[TokenRun]) -> Vec<Launch<Self>> {
        let runs: Vec<TokenRun> = runs.iter().filter(|run| run.tokens > 0).copied().collect();
        let mut first = 0;
        let parts = runs.chunks(Self::RUNS).map(|runs| {
            let mut end = first;
            let mut ends = [u64::MAX; Self::RUNS];
            let mut rows = [0; Self::RUNS];
            for (index, run) in runs.iter().enumerate() {
                end += run.tokens;
                ends[index] = end as u64;
                rows[index] = run.row as u64;
            }
            let info = [dim as u64, first as u64]
                .into_iter()
                .chain(ends)
                .chain(rows);
            let launch = Launch {
                kernel: self,
                grid: [(end - first) as u32, 1, 1],
                info: info.collect(),
            };
            first = end;
            launch
        });
        parts.collect()
    }
}

impl CudaKernel for Elementwise {
    const NAME: &'static str = "elementwise";
    const TEXTS: &'static [&'static str] = &[include_str!("kernels/elementwise.cu")];

    fn defines(&self) -> Vec<(&'static str, String)> {
        let is_f16 = self.element == "__half";
        vec![
            ("T", self.element.to_owned()),
            ("OP", (self.op as u8).to_string()),
            ("IS_F16", u8::from(is_f16).to_string()),
        ]
    }

    fn threads(&self) -> u32 {
        256
    }

    fn shared_bytes(&self) -> usize {
        0
    }
}

/// Computes [`crate::FusedOps::gelu_tanh`] of `a`, or [`crate::FusedOps::silu_mul`] of `a` and `b`.
pub(super) fn activation(
    a: &CubeTensor<CudaRuntime>,
    b: Option<&CubeTensor<CudaRuntime>>,
) -> Option<CubeTensor<CudaRuntime>> {
    let op = if b.is_some() {
        ElementwiseOp::SiluMul
    } else {
        ElementwiseOp::GeluTanh
    };
    let tensors: Vec<_> = [a]
        .into_iter()
        .chain(b)
        .cloned()
        .map(into_contiguous)
        .collect();
    if !tensors.iter().all(|x| is_supported(x, a)) {
        return None;
    }
    let kernel = Elementwise {
        element: element(a.dtype)?,
        op,
    };
    let out = allocate(a, a.shape(), a.dtype);
    let count = a.shape().num_elements();
    if count > 0 {
        let buffers: Vec<_> = tensors.iter().chain([&out]).collect();
        kernel.launch(count).run(&buffers);
    }
    Some(out)
}

/// Computes [`crate::FusedOps::gated_residual`].
pub(super) fn gated_residual(
    residual: &CubeTensor<CudaRuntime>,
    gate: &CubeTensor<CudaRuntime>,
    x: &CubeTensor<CudaRuntime>,
    runs: &[TokenRun],
) -> Option<CubeTensor<CudaRuntime>> {
    let [residual, gate, x] = [residual, gate, x].map(|x| into_contiguous(x.clone()));
    let are_supported = is_supported(&residual, &residual) && is_supported(&x, &residual);
    if !are_supported || gate.dtype != DType::F32 {
        return None;
    }
    let kernel = Elementwise {
        element: element(x.dtype)?,
        op: ElementwiseOp::GatedResidual,
    };
    let out = allocate(&x, x.shape(), x.dtype);
    for launch in kernel.launches(x.shape()[1], runs) {
        launch.run(&[&residual, &x, &gate, &out]);
    }
    Some(out)
}

/// Whether a contiguous tensor has the dtype of `like` and starts at a multiple of 16 bytes.
fn is_supported(x: &CubeTensor<CudaRuntime>, like: &CubeTensor<CudaRuntime>) -> bool {
    x.dtype == like.dtype && x.handle.offset_start.unwrap_or(0).is_multiple_of(16)
}
