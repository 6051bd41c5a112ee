//! What a model asks of the ops, for kernels to be checked at before they are used.

/// An op at the sizes of a model's layer. The number of tokens or pixels is the checker's to choose.
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
    /// GELU, `silu(gate) * up`, and a gated residual.
    Elementwise {
        dim: usize,
    },
}
