//! Products in f32 by burn's own kernels, which may round what they multiply to TF32, 11 significant
//! bits, without a way to forbid it.

use burn_tensor::backend::Backend;
use burn_tensor::{DType, Tensor};

/// A product of two f32 tensors to f32's precision, from one that rounds them to TF32: each is a sum
/// of three that bf16 holds, and so does TF32. `product` is linear in both.
pub(super) fn product<B: Backend, const D: usize>(
    a: Tensor<B, D>,
    b: Tensor<B, D>,
    product: impl Fn(Tensor<B, D>, Tensor<B, D>) -> Tensor<B, D>,
) -> Tensor<B, D> {
    let (a, b) = (parts(a), parts(b));
    // The smallest first. What is left out is below the last bit of f32.
    let pairs = [(2, 0), (1, 1), (0, 2), (1, 0), (0, 1), (0, 0)];
    let products = pairs.map(|(i, j)| product(a[i].clone(), b[j].clone()));
    let sum = products.into_iter().reduce(|sum, product| sum + product);
    sum.expect("there are six products")
}

/// Three tensors of 8 significant bits each, which sum to `x`.
fn parts<B: Backend, const D: usize>(x: Tensor<B, D>) -> [Tensor<B, D>; 3] {
    let round = |x: &Tensor<B, D>| x.clone().cast(DType::BF16).cast(DType::F32);
    let high = round(&x);
    let rest = x - high.clone();
    let middle = round(&rest);
    let low = rest - middle.clone();
    [high, middle, low]
}
