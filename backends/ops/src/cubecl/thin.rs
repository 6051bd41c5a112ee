//! Linear layers with one row or one column, which burn 0.21's fused GPU kernels compute wrong.

use burn_tensor::Tensor;
use burn_tensor::backend::Backend;

use crate::defaults;

/// Computes [`defaults::fused_linear`] with at least two rows and two columns, by repeating a single
/// one.
///
/// burn 0.21 fuses a matrix product with the ops after it. For products of one row or one column it
/// then selects kernels that assume the other matrix is row-major, without checking its strides.
/// (burn issue 5122, cubek pull request 262.)
pub(super) fn fused_linear<B: Backend>(
    x: Tensor<B, 2>,
    weight: Tensor<B, 2>,
    bias: Option<Tensor<B, 1>>,
) -> Tensor<B, 2> {
    let ([tokens, _], [d_out, _]) = (x.dims(), weight.dims());
    let x = if tokens == 1 { x.repeat_dim(0, 2) } else { x };
    let (weight, bias) = if d_out == 1 {
        (
            weight.repeat_dim(0, 2),
            bias.map(|bias| bias.repeat_dim(0, 2)),
        )
    } else {
        (weight, bias)
    };
    let product = defaults::fused_linear(x, weight, bias);
    if product.dims() == [tokens, d_out] {
        product
    } else {
        product.narrow(0, 0, tokens).narrow(1, 0, d_out)
    }
}
