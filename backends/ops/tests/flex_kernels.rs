//! Every flex kernel against the default body that defines it, with odd sizes.

#![cfg(feature = "flex")]
#![expect(clippy::unwrap_used, reason = "a test that cannot go on should stop")]

use burn_flex::{Flex, FlexDevice};
use burn_tensor::{DType, Tensor, TensorData};
use kiln_ops::{FusedOps, Rope, RowRun, defaults};

/// Largest difference relative to the largest magnitude: both sides round f32 sums of up to a few
/// thousand values, in different orders.
const TOLERANCE: f32 = 3e-6;

/// Values from -2 to 2, different for every seed.
fn noise<const D: usize>(seed: u32, shape: [usize; D]) -> Tensor<Flex, D> {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(12345);
    let values: Vec<f32> = (0..shape.iter().product())
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 22) as f32 - 2.0
        })
        .collect();
    Tensor::from_data(TensorData::new(values, shape), (&FlexDevice, DType::F32))
}

fn assert_same<const D: usize>(name: &str, kernel: Tensor<Flex, D>, default: Tensor<Flex, D>) {
    assert_eq!(kernel.dims(), default.dims(), "{name}");
    let values = |x: Tensor<Flex, D>| x.into_data().into_vec::<f32>().unwrap();
    let (kernel, default) = (values(kernel), values(default));
    let magnitude = default
        .iter()
        .fold(0.0_f32, |largest, x| largest.max(x.abs()));
    let difference = kernel
        .iter()
        .zip(&default)
        .fold(0.0_f32, |largest, (a, b)| largest.max((a - b).abs()));
    assert!(magnitude > 0.0 && difference.is_finite(), "{name}");
    assert!(
        difference <= TOLERANCE * magnitude,
        "{name}: {difference:e} of {magnitude:e}"
    );
}

#[test]
fn torch_linear() {
    for (tokens, d_in, d_out) in [(1, 1, 1), (3, 17, 5), (70, 130, 131), (129, 64, 257)] {
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            let x = noise(1, [tokens, d_in]);
            let weight = noise(2, [d_out, d_in]).cast(dtype);
            for bias in [None, Some(noise(3, [d_out]))] {
                let name = format!("{tokens} {d_in} {d_out} {dtype:?} {}", bias.is_some());
                let default = defaults::torch_linear(x.clone(), weight.clone(), bias.clone());
                assert_same(
                    &name,
                    Flex::torch_linear(x.clone(), weight.clone(), bias),
                    default,
                );
            }
        }
    }
}

/// Tokens split into runs that use rows of a table out of order.
fn runs(tokens: usize) -> [RowRun; 3] {
    let first = tokens / 3;
    let second = (tokens - first) / 2;
    [(first, 1), (second, 0), (tokens - first - second, 1)]
        .map(|(tokens, row)| RowRun { tokens, row })
}

#[test]
fn layer_norm_modulate_and_gated_residual() {
    for (tokens, dim) in [(1, 1), (5, 31), (33, 96), (200, 129)] {
        let (x, y) = (noise(1, [tokens, dim]), noise(2, [tokens, dim]));
        let (shift, scale) = (noise(3, [2, dim]), noise(4, [2, dim]));
        let all = [RowRun { tokens, row: 1 }];
        for runs in [&runs(tokens)[..], &all] {
            let (a, b) = (shift.clone(), scale.clone());
            // A single feature normalises to 0: only the shift is left.
            assert_same(
                &format!("layer norm {tokens} {dim}"),
                Flex::layer_norm_modulate(x.clone(), a.clone(), b.clone(), runs, 1e-6),
                defaults::layer_norm_modulate(x.clone(), a.clone(), b, runs, 1e-6),
            );
            assert_same(
                &format!("gated residual {tokens} {dim}"),
                Flex::gated_residual(x.clone(), a.clone(), y.clone(), runs),
                defaults::gated_residual(x.clone(), a, y.clone(), runs),
            );
        }
    }
}

#[test]
fn qk_norm_rope() {
    for (tokens, heads, head_dim) in [(1, 1, 2), (7, 3, 20), (65, 5, 34)] {
        let x = noise(1, [tokens, heads, head_dim]);
        let angles = noise(2, [tokens, head_dim / 2]);
        let rope = Rope {
            cos: angles.clone().cos(),
            sin: angles.sin(),
        };
        let weight = noise(3, [head_dim]);
        assert_same(
            &format!("{tokens} {heads} {head_dim}"),
            Flex::qk_norm_rope(x.clone(), weight.clone(), &rope, 1e-6),
            defaults::qk_norm_rope(x, weight, &rope, 1e-6),
        );
    }
}

#[test]
fn activations() {
    for (tokens, dim) in [(1, 3), (3, 7), (130, 257)] {
        let (x, y) = (noise(1, [tokens, dim]) * 5.0, noise(2, [tokens, dim]));
        assert_same(
            "gelu",
            Flex::gelu_tanh(x.clone()),
            defaults::gelu_tanh(x.clone()),
        );
        assert_same(
            "silu",
            Flex::silu_mul(x.clone(), y.clone()),
            defaults::silu_mul(x, y),
        );
    }
}

#[test]
fn packed_attention() {
    for (lengths, heads, kv_heads, head_dim) in [
        (&[1][..], 1, 1, 1),
        (&[5, 1, 33], 3, 3, 20),
        (&[300], 2, 1, 16),
        (&[2, 260], 6, 2, 10),
    ] {
        let tokens = lengths.iter().sum();
        let query = noise(1, [tokens, heads, head_dim]);
        let key = noise(2, [tokens, kv_heads, head_dim]);
        let value = noise(3, [tokens, kv_heads, head_dim]);
        for causal in [false, true] {
            let inputs = || (query.clone(), key.clone(), value.clone());
            let (q, k, v) = inputs();
            let kernel = Flex::packed_attention(q, k, v, lengths, causal);
            let (q, k, v) = inputs();
            let default = defaults::packed_attention(q, k, v, lengths, causal);
            assert_same(&format!("{lengths:?} {heads} {causal}"), kernel, default);
        }
    }
}

#[test]
fn same_conv2d() {
    for (images, channels, out, height, width, kernel) in [
        (1, 1, 1, 1, 1, 3),
        (2, 3, 5, 7, 4, 3),
        (1, 17, 3, 1, 9, 3),
        (2, 6, 4, 5, 6, 1),
        (1, 4, 33, 70, 65, 3),
        (1, 2, 2, 6, 3, 5),
    ] {
        let x = noise(1, [images, channels, height, width]);
        let weight = noise(2, [out, channels, kernel, kernel]);
        let bias = noise(3, [out]);
        assert_same(
            &format!("{images} {channels} {out} {height} {width} {kernel}"),
            Flex::same_conv2d(x.clone(), weight.clone(), bias.clone()),
            defaults::same_conv2d(x, weight, bias),
        );
    }
}

#[test]
fn channel_norms_and_upsampling() {
    for (images, channels, height, width) in [(1, 1, 1, 1), (2, 5, 3, 7), (3, 33, 27, 25)] {
        let x = noise(1, [images, channels, height, width]);
        let gamma = noise(2, [channels]);
        let name = format!("{images} {channels} {height} {width}");
        let default = defaults::channel_norm(x.clone(), gamma.clone());
        assert_same(&name, Flex::channel_norm(x.clone(), gamma.clone()), default);
        let default = defaults::channel_norm_silu(x.clone(), gamma.clone());
        assert_same(&name, Flex::channel_norm_silu(x.clone(), gamma), default);
        assert_same(
            &name,
            Flex::upsample_nearest(x.clone()),
            defaults::upsample_nearest(x),
        );
    }
}

/// Views with other strides, and values that are all zero.
#[test]
fn unusual_inputs() {
    let x = noise(1, [6, 40]).swap_dims(0, 1).narrow(0, 3, 30);
    let weight = noise(2, [4, 6]);
    assert_same(
        "strided",
        Flex::torch_linear(x.clone(), weight.clone(), None),
        defaults::torch_linear(x, weight, None),
    );
    let zeros = Tensor::<Flex, 4>::zeros([1, 2, 3, 3], (&FlexDevice, DType::F32));
    let normed = Flex::channel_norm(zeros, noise(1, [2]))
        .into_data()
        .into_vec::<f32>()
        .unwrap();
    assert!(normed.iter().all(|&x| x == 0.0));
}
