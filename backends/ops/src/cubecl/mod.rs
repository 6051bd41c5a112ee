//! Kernels for burn's GPU backends, cuda and wgpu, of ops that burn's fusion computes in several
//! passes.
//!
//! Speedups are relative to the default bodies behind fusion, in f32 on Mesa's lavapipe, which
//! computes on the CPU, at the small shapes of `cargo bench -p kiln-wgpu` (measured on 2026-11-25).
//! Timings on an NVIDIA H200 are in `benches/results/2026-11-27-h200.md`.

#![expect(
    unsafe_code,
    reason = "launches without bounds checks: each kernel documents which units access which values"
)]

mod attention;
mod check;
mod exact;
mod fusion;
mod gate;
mod kernels;
mod runtime;
mod settings;
mod thin;
mod upload;

use burn_cubecl::cubecl::calculate_cube_count_elemwise;
use burn_cubecl::cubecl::prelude::*;
use burn_cubecl::element::BoolElement;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::ops::numeric::empty_device_contiguous_dtype;
use burn_cubecl::tensor::CubeTensor;
use burn_cubecl::{CubeBackend, CubeRuntime, FloatElement, IntElement};
use burn_tensor::{Tensor, TensorMetadata, TensorPrimitive};

pub use gate::{Gate, Kernel};
pub use runtime::KernelRuntime;
pub use settings::read_settings;

use crate::{FusedOps, Rope, TokenRun, defaults};

/// Units of a cube in the norms over a token.
const UNITS: u32 = 128;
/// Units per head in [`kernels::qk_norm_rope`].
const HEAD_UNITS: u32 = 32;
/// Heads that a cube of [`kernels::qk_norm_rope`] computes at a time.
const HEADS: u32 = 4;
/// Units of a cube in [`kernels::channel_norm`], each with pixels of its own.
const PIXELS: u32 = 128;

/// The kernels that a backend uses. Ops without a kernel in use take the default body ([`fusion`]).
pub trait KernelChoice {
    /// Whether burn's own f32 matrix products may round their operands to TF32.
    const ROUNDS_TO_TF32: bool;

    /// Whether the backend has the kernel and it is in use.
    fn uses(kernel: Kernel) -> bool;
    /// Disables the kernel for the rest of the process.
    fn close(kernel: Kernel);
    /// Switches whether small matrix products use the kernels of large ones.
    fn force_large_tiles(on: bool);
}

impl<R, F, I, BT> KernelChoice for CubeBackend<R, F, I, BT>
where
    R: KernelRuntime,
    F: FloatElement,
    I: IntElement,
    BT: BoolElement,
{
    const ROUNDS_TO_TF32: bool = R::ROUNDS_TO_TF32;

    fn uses(kernel: Kernel) -> bool {
        let has = match kernel {
            Kernel::Linear | Kernel::Convolution | Kernel::Elementwise => R::HAS_PRODUCTS,
            _ => true,
        };
        has && R::gate().uses(kernel)
    }

    fn close(kernel: Kernel) {
        R::gate().close(kernel);
    }

    fn force_large_tiles(on: bool) {
        R::gate().force_large_tiles(on);
    }
}

impl<R, F, I, BT> FusedOps for CubeBackend<R, F, I, BT>
where
    R: KernelRuntime,
    F: FloatElement,
    I: IntElement,
    BT: BoolElement,
{
    fn fused_linear(
        x: Tensor<Self, 2>,
        weight: Tensor<Self, 2>,
        bias: Option<Tensor<Self, 1>>,
    ) -> Tensor<Self, 2> {
        let (cube_x, cube_weight) = (to_cube(x.clone()), to_cube(weight.clone()));
        let cube_bias = bias.clone().map(to_cube);
        R::linear(&cube_x, &cube_weight, cube_bias.as_ref())
            .map_or_else(|| defaults::fused_linear(x, weight, bias), from_cube)
    }

    /// burn's own kernels hold keys, values and weights in f16, so that images of more than 4,096
    /// tokens come out wrong. The f32 kernel is 2.4 times as fast as the default body if causal, else
    /// equally fast.
    fn packed_attention(
        query: Tensor<Self, 3>,
        key: Tensor<Self, 3>,
        value: Tensor<Self, 3>,
        lengths: &[usize],
        causal: bool,
    ) -> Tensor<Self, 2> {
        let [query, key, value] = [query, key, value].map(to_cube);
        let output = R::packed_attention(&query, &key, &value, lengths, causal);
        from_cube(
            output
                .unwrap_or_else(|| attention::packed_attention(query, key, value, lengths, causal)),
        )
    }

    fn gelu_tanh(x: Tensor<Self, 2>) -> Tensor<Self, 2> {
        R::gelu_tanh(&to_cube(x.clone())).map_or_else(|| defaults::gelu_tanh(x), from_cube)
    }

    fn silu_mul(gate: Tensor<Self, 2>, up: Tensor<Self, 2>) -> Tensor<Self, 2> {
        R::silu_mul(&to_cube(gate.clone()), &to_cube(up.clone()))
            .map_or_else(|| defaults::silu_mul(gate, up), from_cube)
    }

    fn gated_residual(
        residual: Tensor<Self, 2>,
        gate: Tensor<Self, 2>,
        x: Tensor<Self, 2>,
        runs: &[TokenRun],
    ) -> Tensor<Self, 2> {
        let (cube_residual, cube_gate) = (to_cube(residual.clone()), to_cube(gate.clone()));
        R::gated_residual(&cube_residual, &cube_gate, &to_cube(x.clone()), runs).map_or_else(
            || defaults::gated_residual(residual, gate, x, runs),
            from_cube,
        )
    }

    fn conv2d_same(
        x: Tensor<Self, 4>,
        weight: Tensor<Self, 4>,
        bias: Tensor<Self, 1>,
    ) -> Tensor<Self, 4> {
        let (cube_x, cube_weight) = (to_cube(x.clone()), to_cube(weight.clone()));
        R::conv2d_same(&cube_x, &cube_weight, &to_cube(bias.clone()))
            .map_or_else(|| defaults::conv2d_same(x, weight, bias), from_cube)
    }

    /// 2.3 times as fast as the default body.
    fn rms_norm(x: Tensor<Self, 2>, weight: Tensor<Self, 1>, eps: f64) -> Tensor<Self, 2> {
        let (x, weight) = (contiguous(x), contiguous(weight));
        let [tokens, dim] = x.shape().dims();
        let output = like(&x);
        // SAFETY: a cube reads and writes the values of its token; surplus cubes return at once.
        unsafe {
            kernels::rms_norm::launch_unchecked::<R>(
                &output.client,
                cubes(&output, tokens),
                CubeDim::new_1d(UNITS),
                output.required_address_type(),
                lanes(&output, dim),
                x.into_tensor_arg(),
                weight.clone().into_tensor_arg(),
                output.clone().into_tensor_arg(),
                eps as f32,
                UNITS,
                [output.dtype.into(), weight.dtype.into()],
            );
        }
        from_cube(output)
    }

    /// Twice as fast as the default body.
    fn layer_norm_modulate(
        x: Tensor<Self, 2>,
        shift: Tensor<Self, 2>,
        scale: Tensor<Self, 2>,
        runs: &[TokenRun],
        eps: f64,
    ) -> Tensor<Self, 2> {
        let (x, shift, scale) = (contiguous(x), contiguous(shift), contiguous(scale));
        let dim = x.shape()[1];
        let output = like(&x);
        let mut first = 0;
        for run in runs.iter().filter(|run| run.tokens > 0) {
            // SAFETY: a cube reads and writes the values of its token; cubes past the last token of
            // the run return at once.
            unsafe {
                kernels::layer_norm_modulate::launch_unchecked::<R>(
                    &output.client,
                    cubes(&output, run.tokens),
                    CubeDim::new_1d(UNITS),
                    output.required_address_type(),
                    lanes(&output, dim),
                    x.clone().into_tensor_arg(),
                    shift.clone().into_tensor_arg(),
                    scale.clone().into_tensor_arg(),
                    output.clone().into_tensor_arg(),
                    first,
                    run.tokens,
                    run.row,
                    eps as f32,
                    UNITS,
                    output.dtype.into(),
                );
            }
            first += run.tokens;
        }
        from_cube(output)
    }

    /// 4.5 times as fast as the default body.
    fn qk_norm_rope(
        x: Tensor<Self, 3>,
        weight: Tensor<Self, 1>,
        rope: &Rope<Self>,
        eps: f64,
    ) -> Tensor<Self, 3> {
        let (x, weight) = (contiguous(x), contiguous(weight));
        let (cos, sin) = (contiguous(rope.cos.clone()), contiguous(rope.sin.clone()));
        let [tokens, _, head_dim] = x.shape().dims();
        let output = like(&x);
        // SAFETY: a cube reads and writes the values of its token; surplus cubes return at once.
        unsafe {
            kernels::qk_norm_rope::launch_unchecked::<R>(
                &output.client,
                cubes(&output, tokens),
                CubeDim::new_2d(HEAD_UNITS, HEADS),
                output.required_address_type(),
                lanes(&output, head_dim),
                x.into_tensor_arg(),
                weight.clone().into_tensor_arg(),
                cos.into_tensor_arg(),
                sin.into_tensor_arg(),
                output.clone().into_tensor_arg(),
                eps as f32,
                HEAD_UNITS,
                HEADS,
                [output.dtype.into(), weight.dtype.into()],
            );
        }
        from_cube(output)
    }

    /// 3 to 4.5 times as fast as the default body.
    fn channel_norm(x: Tensor<Self, 4>, gamma: Tensor<Self, 1>) -> Tensor<Self, 4> {
        channel_norm(x, gamma, false)
    }

    /// 3 to 4.5 times as fast as the default body.
    fn channel_norm_silu(x: Tensor<Self, 4>, gamma: Tensor<Self, 1>) -> Tensor<Self, 4> {
        channel_norm(x, gamma, true)
    }
}

fn channel_norm<R, F, I, BT>(
    x: Tensor<CubeBackend<R, F, I, BT>, 4>,
    gamma: Tensor<CubeBackend<R, F, I, BT>, 1>,
    activate: bool,
) -> Tensor<CubeBackend<R, F, I, BT>, 4>
where
    R: CubeRuntime,
    F: FloatElement,
    I: IntElement,
    BT: BoolElement,
{
    let (x, gamma) = (contiguous(x), contiguous(gamma));
    let [images, _, height, width] = x.shape().dims();
    let output = like(&x);
    let lanes = lanes(&output, height * width);
    let units = images * height * width / lanes;
    // SAFETY: a unit reads and writes the values of its pixels; units past the last pixel return at
    // once.
    unsafe {
        kernels::channel_norm::launch_unchecked::<R>(
            &output.client,
            cubes(&output, units.div_ceil(PIXELS as usize)),
            CubeDim::new_1d(PIXELS),
            output.required_address_type(),
            lanes,
            x.into_tensor_arg(),
            gamma.clone().into_tensor_arg(),
            output.clone().into_tensor_arg(),
            activate,
            [output.dtype.into(), gamma.dtype.into()],
        );
    }
    from_cube(output)
}

fn contiguous<R, F, I, BT, const D: usize>(x: Tensor<CubeBackend<R, F, I, BT>, D>) -> CubeTensor<R>
where
    R: CubeRuntime,
    F: FloatElement,
    I: IntElement,
    BT: BoolElement,
{
    into_contiguous(to_cube(x))
}

fn to_cube<R, F, I, BT, const D: usize>(x: Tensor<CubeBackend<R, F, I, BT>, D>) -> CubeTensor<R>
where
    R: CubeRuntime,
    F: FloatElement,
    I: IntElement,
    BT: BoolElement,
{
    x.into_primitive().tensor()
}

fn from_cube<R, F, I, BT, const D: usize>(x: CubeTensor<R>) -> Tensor<CubeBackend<R, F, I, BT>, D>
where
    R: CubeRuntime,
    F: FloatElement,
    I: IntElement,
    BT: BoolElement,
{
    Tensor::from_primitive(TensorPrimitive::Float(x))
}

/// Allocates an output of the same shape and dtype.
fn like<R: CubeRuntime>(x: &CubeTensor<R>) -> CubeTensor<R> {
    empty_device_contiguous_dtype(x.client.clone(), x.device.clone(), x.shape(), x.dtype)
}

/// A launch grid of at least `count` cubes; surplus cubes return at once.
fn cubes<R: CubeRuntime>(x: &CubeTensor<R>, count: usize) -> CubeCount {
    calculate_cube_count_elemwise(&x.client, count, CubeDim::new_single())
}

/// Vector width for a kernel whose tensors have `consecutive` contiguous values: the largest that
/// the device loads in f32, the widest dtype a kernel accesses, and that divides `consecutive`.
fn lanes<R: CubeRuntime>(x: &CubeTensor<R>, consecutive: usize) -> usize {
    let mut sizes = x.client.io_optimized_vector_sizes(size_of::<f32>());
    sizes
        .find(|size| consecutive.is_multiple_of(*size))
        .unwrap_or(1)
}
