//! Matrix products to f32 precision by burn's own kernels, which may round their operands to TF32
//! (11 significant bits) and have no option against it.

use burn_tensor::backend::Backend;
use burn_tensor::{DType, Tensor};

/// Computes a product of two f32 tensors to f32 precision with a `product` that rounds to TF32:
/// splits each operand into three tensors that bf16, and so TF32, represents exactly, and adds their
/// products. `product` has to be linear in both operands.
pub(super) fn product<B: Backend, const D: usize>(
    a: Tensor<B, D>,
    b: Tensor<B, D>,
    product: impl Fn(Tensor<B, D>, Tensor<B, D>) -> Tensor<B, D>,
) -> Tensor<B, D> {
    let (a, b) = (split(a), split(b));
    // The smallest products first. Those left out are below the last bit of f32.
    let pairs = [(2, 0), (1, 1), (0, 2), (1, 0), (0, 1), (0, 0)];
    let products = pairs.map(|(i, j)| product(a[i].clone(), b[j].clone()));
    let sum = products.into_iter().reduce(|sum, product| sum + product);
    sum.expect("there are six products")
}

/// Splits `x` into three tensors of 8 significant bits each, whose sum is `x`.
fn split<B: Backend, const D: usize>(x: Tensor<B, D>) -> [Tensor<B, D>; 3] {
    let round = |x: &Tensor<B, D>| x.clone().cast(DType::BF16).cast(DType::F32);
    let high = round(&x);
    let rest = x - high.clone();
    let middle = round(&rest);
    let low = rest - middle.clone();
    [high, middle, low]
}
