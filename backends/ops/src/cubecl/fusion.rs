//! The fused ops on burn's fusion backend: ops with a kernel in use run unfused on the inner backend,
//! the others take the default body, whose plain burn ops are fused.

use std::fmt;
use std::marker::PhantomData;

use burn_fusion::stream::{Operation, OperationStreams};
use burn_fusion::{Fusion, FusionBackend, FusionHandle, FusionTensor};
use burn_ir::{CustomOpIr, HandleContainer, OperationIr, TensorIr};
use burn_tensor::ops::FloatTensor;
use burn_tensor::{DType, Shape, Tensor, TensorPrimitive};
use tracing::warn;

use super::gate::{Switch, switch};
use super::{Kernel, KernelChoice, check, exact, thin};
use crate::{FusedOps, KernelShape, Rope, TokenRun, defaults};

impl<B: FusionBackend + FusedOps + KernelChoice> FusedOps for Fusion<B> {
    fn check_kernels(device: &Self::Device, dtype: DType, shapes: &[KernelShape]) {
        if switch() == Ok(Switch::Unchecked) {
            return;
        }
        for (kernel, reason) in check::faults::<Self, B>(device, dtype, shapes) {
            B::close(kernel);
            warn!("a kernel of kiln's does not work on this device and is not used: {reason}");
        }
    }

    fn fused_linear(
        x: Tensor<Self, 2>,
        weight: Tensor<Self, 2>,
        bias: Option<Tensor<Self, 1>>,
    ) -> Tensor<Self, 2> {
        if !B::uses(Kernel::Linear) {
            if !B::ROUNDS_TO_TF32 || x.dtype() != DType::F32 {
                return thin::fused_linear(x, weight, bias);
            }
            // The default body rounds `x` if the weight is bf16.
            let x = if weight.dtype() == DType::BF16 {
                x.cast(DType::BF16).cast(DType::F32)
            } else {
                x
            };
            let out = exact::product(x, weight.cast(DType::F32), |x, weight| {
                thin::fused_linear(x, weight, None)
            });
            return match bias {
                Some(bias) => out + bias.cast(DType::F32).unsqueeze(),
                None => out,
            };
        }
        let shape = [x.dims()[0], weight.dims()[0]];
        let (x, weight) = (float(x), float(weight));
        match bias.map(float) {
            Some(bias) => unfused("fused_linear", shape, [x, weight, bias], |inputs| {
                let [x, weight, bias] = inputs;
                float(B::fused_linear(
                    tensor(x),
                    tensor(weight),
                    Some(tensor(bias)),
                ))
            }),
            None => unfused("fused_linear", shape, [x, weight], |[x, weight]| {
                float(B::fused_linear(tensor(x), tensor(weight), None))
            }),
        }
    }

    fn rms_norm(x: Tensor<Self, 2>, weight: Tensor<Self, 1>, eps: f64) -> Tensor<Self, 2> {
        if !B::uses(Kernel::RmsNorm) {
            return defaults::rms_norm(x, weight, eps);
        }
        let shape = x.dims();
        unfused(
            "rms_norm",
            shape,
            [float(x), float(weight)],
            move |[x, weight]| float(B::rms_norm(tensor(x), tensor(weight), eps)),
        )
    }

    fn layer_norm_modulate(
        x: Tensor<Self, 2>,
        shift: Tensor<Self, 2>,
        scale: Tensor<Self, 2>,
        runs: &[TokenRun],
        eps: f64,
    ) -> Tensor<Self, 2> {
        if !B::uses(Kernel::LayerNormModulate) {
            return defaults::layer_norm_modulate(x, shift, scale, runs, eps);
        }
        let runs = runs.to_vec();
        let shape = x.dims();
        let inputs = [float(x), float(shift), float(scale)];
        unfused(
            "layer_norm_modulate",
            shape,
            inputs,
            move |[x, shift, scale]| {
                let (x, shift, scale) = (tensor(x), tensor(shift), tensor(scale));
                float(B::layer_norm_modulate(x, shift, scale, &runs, eps))
            },
        )
    }

    fn qk_norm_rope(
        x: Tensor<Self, 3>,
        weight: Tensor<Self, 1>,
        rope: &Rope<Self>,
        eps: f64,
    ) -> Tensor<Self, 3> {
        if !B::uses(Kernel::QkNormRope) {
            return defaults::qk_norm_rope(x, weight, rope, eps);
        }
        let (cos, sin) = (rope.cos.clone(), rope.sin.clone());
        let shape = x.dims();
        let inputs = [float(x), float(weight), float(cos), float(sin)];
        unfused(
            "qk_norm_rope",
            shape,
            inputs,
            move |[x, weight, cos, sin]| {
                let rope = Rope {
                    cos: tensor(cos),
                    sin: tensor(sin),
                };
                float(B::qk_norm_rope(tensor(x), tensor(weight), &rope, eps))
            },
        )
    }

    fn gelu_tanh(x: Tensor<Self, 2>) -> Tensor<Self, 2> {
        if !B::uses(Kernel::Elementwise) {
            return defaults::gelu_tanh(x);
        }
        let shape = x.dims();
        unfused("gelu_tanh", shape, [float(x)], |[x]| {
            float(B::gelu_tanh(tensor(x)))
        })
    }

    fn silu_mul(gate: Tensor<Self, 2>, up: Tensor<Self, 2>) -> Tensor<Self, 2> {
        if !B::uses(Kernel::Elementwise) {
            return defaults::silu_mul(gate, up);
        }
        let shape = gate.dims();
        unfused("silu_mul", shape, [float(gate), float(up)], |[gate, up]| {
            float(B::silu_mul(tensor(gate), tensor(up)))
        })
    }

    fn gated_residual(
        residual: Tensor<Self, 2>,
        gate: Tensor<Self, 2>,
        x: Tensor<Self, 2>,
        runs: &[TokenRun],
    ) -> Tensor<Self, 2> {
        if !B::uses(Kernel::Elementwise) {
            return defaults::gated_residual(residual, gate, x, runs);
        }
        let shape = residual.dims();
        let runs = runs.to_vec();
        let inputs = [float(residual), float(gate), float(x)];
        unfused(
            "gated_residual",
            shape,
            inputs,
            move |[residual, gate, x]| {
                let (residual, gate, x) = (tensor(residual), tensor(gate), tensor(x));
                float(B::gated_residual(residual, gate, x, &runs))
            },
        )
    }

    fn packed_attention(
        query: Tensor<Self, 3>,
        key: Tensor<Self, 3>,
        value: Tensor<Self, 3>,
        lengths: &[usize],
        causal: bool,
    ) -> Tensor<Self, 2> {
        if !B::uses(Kernel::Attention) {
            return if B::ROUNDS_TO_TF32 {
                let product = |a, b| exact::product(a, b, Tensor::matmul);
                defaults::attention_by_products(query, key, value, lengths, causal, product)
            } else {
                defaults::attention_by_ops(query, key, value, lengths, causal)
            };
        }
        let [tokens, heads, head_dim] = query.dims();
        let shape = [tokens, heads * head_dim];
        let inputs = [float(query), float(key), float(value)];
        let lengths = lengths.to_vec();
        unfused(
            "packed_attention",
            shape,
            inputs,
            move |[query, key, value]| {
                let (query, key, value) = (tensor(query), tensor(key), tensor(value));
                float(B::packed_attention(query, key, value, &lengths, causal))
            },
        )
    }

    fn conv2d_same(
        x: Tensor<Self, 4>,
        weight: Tensor<Self, 4>,
        bias: Tensor<Self, 1>,
    ) -> Tensor<Self, 4> {
        if !B::uses(Kernel::Convolution) {
            if !B::ROUNDS_TO_TF32 || x.dtype() != DType::F32 {
                return defaults::conv2d_same(x, weight, bias);
            }
            let channels = bias.dims()[0];
            let none = Tensor::zeros([channels], (&bias.device(), DType::F32));
            let out = exact::product(x, weight.cast(DType::F32), |x, weight| {
                defaults::conv2d_same(x, weight, none.clone())
            });
            return out + bias.cast(DType::F32).reshape([1, channels, 1, 1]);
        }
        let ([images, _, height, width], [channels, ..]) = (x.dims(), weight.dims());
        let shape = [images, channels, height, width];
        let inputs = [float(x), float(weight), float(bias)];
        unfused("conv2d_same", shape, inputs, |[x, weight, bias]| {
            float(B::conv2d_same(tensor(x), tensor(weight), tensor(bias)))
        })
    }

    fn channel_norm(x: Tensor<Self, 4>, gamma: Tensor<Self, 1>) -> Tensor<Self, 4> {
        if !B::uses(Kernel::ChannelNorm) {
            return defaults::channel_norm(x, gamma);
        }
        let shape = x.dims();
        let inputs = [float(x), float(gamma)];
        unfused("channel_norm", shape, inputs, |[x, gamma]| {
            float(B::channel_norm(tensor(x), tensor(gamma)))
        })
    }

    fn channel_norm_silu(x: Tensor<Self, 4>, gamma: Tensor<Self, 1>) -> Tensor<Self, 4> {
        if !B::uses(Kernel::ChannelNorm) {
            return defaults::channel_norm_silu(x, gamma);
        }
        let shape = x.dims();
        let inputs = [float(x), float(gamma)];
        unfused("channel_norm_silu", shape, inputs, |[x, gamma]| {
            float(B::channel_norm_silu(tensor(x), tensor(gamma)))
        })
    }
}

fn float<B: FusedOps, const D: usize>(x: Tensor<B, D>) -> FloatTensor<B> {
    x.into_primitive().tensor()
}

fn tensor<B: FusedOps, const D: usize>(x: FloatTensor<B>) -> Tensor<B, D> {
    Tensor::from_primitive(TensorPrimitive::Float(x))
}

/// Registers an op that fusion runs on its own, in order with all other ops, by calling `run` with
/// the inner backend's tensors. The output has `shape` and the dtype of the first input.
fn unfused<B, const INPUTS: usize, const D: usize>(
    name: &'static str,
    shape: [usize; D],
    inputs: [FusionTensor<B::FusionRuntime>; INPUTS],
    run: impl Fn([FloatTensor<B>; INPUTS]) -> FloatTensor<B> + Send + Sync + 'static,
) -> Tensor<Fusion<B>, D>
where
    B: FusionBackend + FusedOps + KernelChoice,
{
    let client = inputs[0].client.clone();
    let streams = OperationStreams::with_inputs(&inputs);
    let output = TensorIr::uninit(
        client.create_empty_handle(),
        Shape::from(shape),
        inputs[0].dtype,
    );
    let inputs = inputs.map(FusionTensor::into_ir);
    let ir = CustomOpIr::new(name, &inputs, &[output]);
    let operation = Unfused::<B, _, INPUTS> {
        ir: ir.clone(),
        run,
        backend: PhantomData,
    };
    let mut outputs = client.register(streams, OperationIr::Custom(ir), operation);
    tensor(outputs.remove(0))
}

/// The operation that fusion executes for [`unfused`].
struct Unfused<B, F, const INPUTS: usize> {
    ir: CustomOpIr,
    run: F,
    backend: PhantomData<fn() -> B>,
}

impl<B, F, const INPUTS: usize> Operation<B::FusionRuntime> for Unfused<B, F, INPUTS>
where
    B: FusionBackend,
    F: Fn([FloatTensor<B>; INPUTS]) -> FloatTensor<B> + Send + Sync,
{
    fn execute(&self, handles: &mut HandleContainer<FusionHandle<B::FusionRuntime>>) {
        let (inputs, [output]) = self.ir.as_fixed::<INPUTS, 1>();
        let inputs = inputs
            .each_ref()
            .map(|input| handles.get_float_tensor::<B>(input));
        handles.register_float_tensor::<B>(&output.id, (self.run)(inputs));
    }
}

impl<B, F, const INPUTS: usize> fmt::Debug for Unfused<B, F, INPUTS> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{:?}", self.ir)
    }
}
