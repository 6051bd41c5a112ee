//! The layers that the networks are built of, as burn modules.
//!
//! They differ from burn-nn's in that they call the fused ops of [`FusedOps`], keep a linear weight
//! as `[out, in]` as PyTorch stores it (burn-nn transposes it, which copies it), and load through
//! the strict loader of [`crate::weights`]. Weights are read once; a call clones a handle.

use std::fmt;

use burn::module::{Module, Param, ParamId};
use burn::tensor::{DType, Int, Tensor};
use kiln_ops::{FusedOps, Rope};

use crate::weights::{LoadError, Scope, StoredTensor};

/// Makes a parameter of a loaded tensor. `Param::from_tensor` would mark it for gradients.
fn param<B: FusedOps, const D: usize>(tensor: Tensor<B, D>) -> Param<Tensor<B, D>> {
    Param::initialized(ParamId::new(), tensor)
}

/// A linear layer, `x · weightᵀ + bias`.
#[derive(Module, Debug)]
pub(crate) struct Linear<B: FusedOps> {
    /// `[out, in]`, in the model's dtype.
    weight: Param<Tensor<B, 2>>,
    /// `[out]`, in the dtype of the activations.
    bias: Option<Param<Tensor<B, 1>>>,
}

impl<B: FusedOps> Linear<B> {
    /// Loads `weight` `[d_out, d_in]` and `bias` `[d_out]`.
    ///
    /// # Errors
    /// If a tensor is missing or has another shape.
    pub(crate) fn load(
        at: &Scope<B::Device>,
        d_in: usize,
        d_out: usize,
    ) -> Result<Self, LoadError> {
        Ok(Self {
            bias: Some(bias(at, d_out)?),
            ..Self::load_without_bias(at, d_in, d_out)?
        })
    }

    /// Loads `weight` `[d_out, d_in]` of a layer that has no bias.
    ///
    /// # Errors
    /// If the tensor is missing or has another shape.
    pub(crate) fn load_without_bias(
        at: &Scope<B::Device>,
        d_in: usize,
        d_out: usize,
    ) -> Result<Self, LoadError> {
        let weight = at.tensor("weight", [d_out, d_in], at.precision().model)?;
        Ok(Self {
            weight: param(weight),
            bias: None,
        })
    }

    /// # Shapes
    /// - x: `[tokens, in]`
    /// - output: `[tokens, out]`, in the dtype of `x`
    pub(crate) fn forward(&self, x: Tensor<B, 2>) -> Tensor<B, 2> {
        let (weight, bias) = self.parameters();
        B::fused_linear(x, weight, bias)
    }

    /// The weight and the bias, as [`FusedOps::fused_linears`] takes them.
    pub(crate) fn parameters(&self) -> (Tensor<B, 2>, Option<Tensor<B, 1>>) {
        (self.weight.val(), self.bias.as_ref().map(Param::val))
    }

    pub(crate) fn device(&self) -> B::Device {
        self.weight.device()
    }
}

/// A [`Linear`] that reads its weights for each call and drops them afterwards: for layers that run
/// once per schedule and would otherwise fill a third of the device's memory.
///
/// `D` is the device type of the backend. The layer is no burn module, as it has no parameters on a
/// device: a network that holds one skips the field.
#[derive(Clone)]
pub(crate) struct DeferredLinear<D> {
    at: Scope<D>,
    d_in: usize,
    d_out: usize,
}

impl<D: Clone> DeferredLinear<D> {
    /// Checks `weight` `[d_out, d_in]` and `bias` `[d_out]` without reading them.
    ///
    /// # Errors
    /// If a tensor is missing or has another shape.
    pub(crate) fn load(at: &Scope<D>, d_in: usize, d_out: usize) -> Result<Self, LoadError> {
        at.check("weight", &[d_out, d_in])?;
        at.check("bias", &[d_out])?;
        Ok(Self {
            at: at.clone(),
            d_in,
            d_out,
        })
    }

    /// # Shapes
    /// - x: `[tokens, in]`
    /// - output: `[tokens, out]`, in the dtype of `x`
    pub(crate) fn forward<B: FusedOps<Device = D>>(&self, x: Tensor<B, 2>) -> Tensor<B, 2> {
        Linear::load(&self.at, self.d_in, self.d_out)
            .expect("its names and shapes were checked at load")
            .forward(x)
    }
}

impl<D: Clone> fmt::Debug for DeferredLinear<D> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { at, d_in, d_out } = self;
        write!(
            formatter,
            "DeferredLinear {{{}: {d_in} -> {d_out}}}",
            at.path()
        )
    }
}

/// A table of one embedding per token id.
#[derive(Module, Debug)]
pub(crate) struct Embedding<B: FusedOps> {
    /// `[ids, dim]`, in the model's dtype.
    weight: Param<Tensor<B, 2>>,
}

impl<B: FusedOps> Embedding<B> {
    /// Loads `weight` `[ids, dim]`.
    ///
    /// # Errors
    /// If the tensor is missing or has another shape.
    pub(crate) fn load(at: &Scope<B::Device>, ids: usize, dim: usize) -> Result<Self, LoadError> {
        let weight = at.tensor("weight", [ids, dim], at.precision().model)?;
        Ok(Self {
            weight: param(weight),
        })
    }

    /// # Shapes
    /// - ids: `[tokens]`, each below the table's number of ids
    /// - output: `[tokens, dim]`, in the model's dtype
    pub(crate) fn forward(&self, ids: Tensor<B, 1, Int>) -> Tensor<B, 2> {
        self.weight.val().select(0, ids)
    }

    pub(crate) fn device(&self) -> B::Device {
        self.weight.device()
    }
}

/// RMS norm over the last dimension, `x / sqrt(mean(x²) + eps) * weight`, computed in f32.
#[derive(Module, Debug)]
pub(crate) struct RmsNorm<B: FusedOps> {
    /// `[dim]`, f32.
    weight: Param<Tensor<B, 1>>,
    eps: f64,
}

impl<B: FusedOps> RmsNorm<B> {
    /// Loads `weight` `[dim]`.
    ///
    /// # Errors
    /// If the tensor is missing or has another shape.
    pub(crate) fn load(at: &Scope<B::Device>, dim: usize, eps: f64) -> Result<Self, LoadError> {
        let weight = param(at.tensor("weight", [dim], DType::F32)?);
        Ok(Self { weight, eps })
    }

    /// # Shapes
    /// - x and output: `[tokens, dim]`
    pub(crate) fn forward(&self, x: Tensor<B, 2>) -> Tensor<B, 2> {
        B::rms_norm(x, self.weight.val(), self.eps)
    }

    /// Norms each head, then rotates it by the positions of `rope`.
    ///
    /// # Shapes
    /// - x and output: `[tokens, heads, dim]`
    pub(crate) fn forward_rope(&self, x: Tensor<B, 3>, rope: &Rope<B>) -> Tensor<B, 3> {
        B::qk_norm_rope(x, self.weight.val(), rope, self.eps)
    }
}

/// The VAE's norm over channels, `x / max(‖x‖₂, 1e-12) * √channels * gamma`, computed in f32:
/// `QwenImageRMS_norm` of diffusers.
#[derive(Module, Debug)]
pub(crate) struct ChannelNorm<B: FusedOps> {
    /// `[channels]`, f32.
    gamma: Param<Tensor<B, 1>>,
}

impl<B: FusedOps> ChannelNorm<B> {
    /// Loads `gamma`, which is stored as `[channels, 1, …]` with `trailing` ones.
    ///
    /// # Errors
    /// If the tensor is missing or has another shape.
    pub(crate) fn load(
        at: &Scope<B::Device>,
        channels: usize,
        trailing: usize,
    ) -> Result<Self, LoadError> {
        let mut shape = vec![1; trailing + 1];
        shape[0] = channels;
        let gamma = at.upload(at.read("gamma", &shape)?, [channels], DType::F32);
        Ok(Self {
            gamma: param(gamma),
        })
    }

    /// # Shapes
    /// - x and output: `[images, channels, height, width]`
    pub(crate) fn forward(&self, x: Tensor<B, 4>) -> Tensor<B, 4> {
        B::channel_norm(x, self.gamma.val())
    }

    /// `silu` of [`ChannelNorm::forward`].
    pub(crate) fn forward_silu(&self, x: Tensor<B, 4>) -> Tensor<B, 4> {
        B::channel_norm_silu(x, self.gamma.val())
    }
}

/// A 2-D convolution of stride 1, zero-padded so that height and width stay.
#[derive(Module, Debug)]
pub(crate) struct Conv2d<B: FusedOps> {
    /// `[out, in, kernel, kernel]`, in the dtype of the activations.
    weight: Param<Tensor<B, 4>>,
    /// `[out]`, in the dtype of the activations.
    bias: Param<Tensor<B, 1>>,
}

impl<B: FusedOps> Conv2d<B> {
    /// Loads `weight` `[channels_out, channels_in, kernel, kernel]` and `bias` `[channels_out]`.
    ///
    /// # Errors
    /// If a tensor is missing or has another shape.
    pub(crate) fn load(
        at: &Scope<B::Device>,
        [channels_in, channels_out]: [usize; 2],
        kernel: usize,
    ) -> Result<Self, LoadError> {
        let shape = [channels_out, channels_in, kernel, kernel];
        let weight = at.tensor("weight", shape, at.precision().activations)?;
        Ok(Self {
            weight: param(weight),
            bias: bias(at, channels_out)?,
        })
    }

    /// Loads a causal 3-D convolution as the 2-D one that it is on a single frame: only the last
    /// temporal slice of `weight` `[channels_out, channels_in, kernel, kernel, kernel]`, since all
    /// earlier frames are zero padding.
    ///
    /// # Errors
    /// If a tensor is missing or has another shape.
    pub(crate) fn load_causal_3d(
        at: &Scope<B::Device>,
        [channels_in, channels_out]: [usize; 2],
        kernel: usize,
    ) -> Result<Self, LoadError> {
        let shape = [channels_out, channels_in, kernel, kernel, kernel];
        let stored = at.read("weight", &shape)?;
        let slice = kernel * kernel * stored.element_size();
        let last: Vec<u8> = stored
            .bytes
            .chunks_exact(slice * kernel)
            .flat_map(|kernel_3d| kernel_3d[slice * (kernel - 1)..].iter().copied())
            .collect();
        let last = StoredTensor {
            bytes: last.into(),
            ..stored
        };
        let shape = [channels_out, channels_in, kernel, kernel];
        let weight = at.upload(last, shape, at.precision().activations);
        Ok(Self {
            weight: param(weight),
            bias: bias(at, channels_out)?,
        })
    }

    /// # Shapes
    /// - x: `[images, in, height, width]`
    /// - output: `[images, out, height, width]`
    pub(crate) fn forward(&self, x: Tensor<B, 4>) -> Tensor<B, 4> {
        B::conv2d_same(x, self.weight.val(), self.bias.val())
    }

    /// Computes `count` output channels from `first` on.
    ///
    /// # Shapes
    /// - x: `[images, in, height, width]`
    /// - output: `[images, count, height, width]`
    pub(crate) fn forward_channels(
        &self,
        x: Tensor<B, 4>,
        first: usize,
        count: usize,
    ) -> Tensor<B, 4> {
        let weight = self.weight.val().narrow(0, first, count);
        let bias = self.bias.val().narrow(0, first, count);
        B::conv2d_same(x, weight, bias)
    }
}

/// Loads `bias` `[len]` in the dtype of the activations.
fn bias<B: FusedOps>(at: &Scope<B::Device>, len: usize) -> Result<Param<Tensor<B, 1>>, LoadError> {
    let bias = at.tensor("bias", [len], at.precision().activations)?;
    Ok(param(bias))
}
