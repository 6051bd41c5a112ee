//! The shapes at which a model calls the ops, for [`FusedOps::check_kernels`](crate::FusedOps::check_kernels).

/// An op at the sizes of one of the model's layers. The check chooses the number of tokens or pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum KernelShape {
    Linear {
        d_in: usize,
        d_out: usize,
    },
    RmsNorm {
        dim: usize,
    },
    LayerNormModulate {
        dim: usize,
    },
    QkNormRope {
        heads: usize,
        head_dim: usize,
    },
    Attention {
        heads: usize,
        kv_heads: usize,
        head_dim: usize,
        causal: bool,
    },
    Convolution {
        channels_in: usize,
        channels_out: usize,
        kernel: usize,
    },
    ChannelNorm {
        channels: usize,
    },
    /// GELU, `silu(gate) * up` and gated residual, of `[tokens, dim]`.
    Elementwise {
        dim: usize,
    },
}
