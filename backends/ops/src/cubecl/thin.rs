//! Linear layers of one row or one column, which burn's GPU backends must not be asked for.

use burn_tensor::Tensor;
use burn_tensor::backend::Backend;

use crate::defaults;

/// burn 0.21 fuses a product with the ops after it, and for products of one row or one column it
/// then tries kernels that take the other matrix to lie row by row, without looking. So every
/// product has two of each. (burn issue 5122, cubek pull request 262.)
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
