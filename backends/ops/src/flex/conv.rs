//! The convolution, by Winograd's algorithm for 3×3 kernels and directly for others.

use super::{Float, contiguous, direct, from_values, winograd};

/// 2.3 to 2.7 times as fast as the default body.
pub(super) fn conv2d_same(x: Float<4>, weight: Float<4>, bias: Float<1>) -> Float<4> {
    let [images, channels_in, height, width] = x.dims();
    let [channels, _, kernel, _] = weight.dims();
    let (x, weight, bias) = (contiguous(x), contiguous(weight), contiguous(bias));
    let (x, weight, bias) = (
        x.storage::<f32>(),
        weight.storage::<f32>(),
        bias.storage::<f32>(),
    );
    let shape = [images, channels, height, width];
    let values = if kernel == 3 {
        winograd::convolve(x, channels_in, weight, bias, shape)
    } else {
        direct::convolve(x, (channels_in, kernel), weight, bias, shape)
    };
    from_values(values, shape)
}
