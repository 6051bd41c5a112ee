//! The default body of every op in plain burn ops, which defines what the op computes.

use std::ops::Range;

use burn_tensor::backend::Backend;
use burn_tensor::module;
use burn_tensor::ops::{AttentionModuleOptions, ConvOptions};
use burn_tensor::{Bool, DType, Tensor, activation};

use crate::{LowRankRun, Rope, TokenRun};

/// Expands a modulation table `[rows, dim]` to the row of each token: `[1, dim]` if all tokens use
/// the same row, else `[tokens, dim]`.
pub fn per_token<B: Backend>(table: Tensor<B, 2>, runs: &[TokenRun]) -> Tensor<B, 2> {
    let [rows, dim] = table.dims();
    let runs = || runs.iter().filter(|run| run.tokens > 0);
    let first = runs().next().map_or(0, |run| run.row);
    if runs().all(|run| run.row == first) {
        return if rows == 1 {
            table
        } else {
            table.slice([first..first + 1, 0..dim])
        };
    }
    let parts = runs()
        .map(|run| {
            table
                .clone()
                .slice([run.row..run.row + 1, 0..dim])
                .expand([run.tokens, dim])
        })
        .collect();
    Tensor::cat(parts, 0)
}

/// Computes [`FusedOps::fused_linear`](crate::FusedOps::fused_linear).
pub fn fused_linear<B: Backend>(
    x: Tensor<B, 2>,
    weight: Tensor<B, 2>,
    bias: Option<Tensor<B, 1>>,
) -> Tensor<B, 2> {
    let dtype = x.dtype();
    let x = if weight.dtype() == DType::BF16 {
        x.cast(DType::BF16).cast(dtype)
    } else {
        x
    };
    let out = x.matmul(weight.cast(dtype).transpose());
    match bias {
        Some(bias) => out + bias.cast(dtype).unsqueeze(),
        None => out,
    }
}

/// Computes [`FusedOps::fused_linears`](crate::FusedOps::fused_linears). `linear` computes the products:
/// [`fused_linear`], or the backend's kernel for it.
pub fn fused_linears<B: Backend>(
    x: Tensor<B, 2>,
    layers: Vec<(Tensor<B, 2>, Option<Tensor<B, 1>>)>,
    runs: &[LowRankRun<B>],
    linear: impl Fn(Tensor<B, 2>, Tensor<B, 2>, Option<Tensor<B, 1>>) -> Tensor<B, 2>,
) -> Vec<Tensor<B, 2>> {
    let layer = |(weight, bias)| linear(x.clone(), weight, bias);
    let outputs = layers.into_iter().map(layer).collect();
    if runs.is_empty() {
        return outputs;
    }
    add_low_rank(outputs, x, runs, linear)
}

/// Computes [`FusedOps::add_low_rank`](crate::FusedOps::add_low_rank). `linear` computes the products:
/// [`fused_linear`], or the backend's kernel for it.
pub fn add_low_rank<B: Backend>(
    outputs: Vec<Tensor<B, 2>>,
    x: Tensor<B, 2>,
    runs: &[LowRankRun<B>],
    linear: impl Fn(Tensor<B, 2>, Tensor<B, 2>, Option<Tensor<B, 1>>) -> Tensor<B, 2>,
) -> Vec<Tensor<B, 2>> {
    let tokens = x.dims()[0];
    let rows = |of: &Tensor<B, 2>, rows: &Range<usize>| {
        if *rows == (0..tokens) {
            return of.clone();
        }
        of.clone().narrow(0, rows.start, rows.len())
    };
    let lowered: Vec<_> = runs
        .iter()
        .filter(|run| !run.tokens.is_empty() && run.ups.iter().any(Option::is_some))
        .map(|run| {
            let x = rows(&x, &run.tokens);
            (run, linear(x, run.down.clone(), None))
        })
        .collect();
    let add = |(index, output): (usize, Tensor<B, 2>)| {
        lowered.iter().fold(output, |output, (run, lowered)| {
            let Some(up) = &run.ups[index] else {
                return output;
            };
            let lowered = lowered.clone().narrow(1, up.rank.start, up.rank.len());
            let change = linear(lowered * up.scale, up.up.clone(), None);
            let changed = rows(&output, &run.tokens) + change;
            if run.tokens == (0..tokens) {
                return changed;
            }
            let columns = 0..output.dims()[1];
            output.slice_assign([run.tokens.clone(), columns], changed)
        })
    };
    outputs.into_iter().enumerate().map(add).collect()
}

/// Computes [`FusedOps::rms_norm`](crate::FusedOps::rms_norm).
pub fn rms_norm<B: Backend>(x: Tensor<B, 2>, weight: Tensor<B, 1>, eps: f64) -> Tensor<B, 2> {
    let dtype = x.dtype();
    let x = x.cast(DType::F32);
    let mean_square = x.clone().square().mean_dim(1);
    let normalised = x / (mean_square + eps).sqrt();
    (normalised * weight.cast(DType::F32).unsqueeze()).cast(dtype)
}

/// Computes [`FusedOps::layer_norm_modulate`](crate::FusedOps::layer_norm_modulate).
pub fn layer_norm_modulate<B: Backend>(
    x: Tensor<B, 2>,
    shift: Tensor<B, 2>,
    scale: Tensor<B, 2>,
    runs: &[TokenRun],
    eps: f64,
) -> Tensor<B, 2> {
    let dtype = x.dtype();
    let x = x.cast(DType::F32);
    let centred = x.clone() - x.mean_dim(1);
    let variance = centred.clone().square().mean_dim(1);
    let normalised = centred / (variance + eps).sqrt();
    let modulated = normalised * (per_token(scale, runs) + 1.0) + per_token(shift, runs);
    modulated.cast(dtype)
}

/// Computes [`FusedOps::gated_residual`](crate::FusedOps::gated_residual).
pub fn gated_residual<B: Backend>(
    residual: Tensor<B, 2>,
    gate: Tensor<B, 2>,
    x: Tensor<B, 2>,
    runs: &[TokenRun],
) -> Tensor<B, 2> {
    let dtype = residual.dtype();
    let sum = residual.cast(DType::F32) + per_token(gate, runs) * x.cast(DType::F32);
    let sum = if dtype == DType::F16 {
        sum.clamp(-65504.0, 65504.0)
    } else {
        sum
    };
    sum.cast(dtype)
}

/// Computes [`FusedOps::qk_norm_rope`](crate::FusedOps::qk_norm_rope).
pub fn qk_norm_rope<B: Backend>(
    x: Tensor<B, 3>,
    weight: Tensor<B, 1>,
    rope: &Rope<B>,
    eps: f64,
) -> Tensor<B, 3> {
    let dtype = x.dtype();
    let [tokens, heads, head_dim] = x.dims();
    let half = head_dim / 2;
    let x = x.cast(DType::F32);
    let mean_square = x.clone().square().mean_dim(2);
    let x = x / (mean_square + eps).sqrt() * weight.cast(DType::F32).unsqueeze();

    let pairs = x.reshape([tokens, heads, half, 2]);
    let real = pairs.clone().slice([0..tokens, 0..heads, 0..half, 0..1]);
    let imaginary = pairs.slice([0..tokens, 0..heads, 0..half, 1..2]);
    let cos = rope.cos.clone().reshape([tokens, 1, half, 1]);
    let sin = rope.sin.clone().reshape([tokens, 1, half, 1]);
    let rotated = Tensor::cat(
        vec![
            real.clone() * cos.clone() - imaginary.clone() * sin.clone(),
            real * sin + imaginary * cos,
        ],
        3,
    );
    rotated.reshape([tokens, heads, head_dim]).cast(dtype)
}

/// Computes [`FusedOps::gelu_tanh`](crate::FusedOps::gelu_tanh).
pub fn gelu_tanh<B: Backend>(x: Tensor<B, 2>) -> Tensor<B, 2> {
    let dtype = x.dtype();
    let x = x.cast(DType::F32);
    let cubed = x.clone() * x.clone() * x.clone();
    let inner = (x.clone() + cubed * 0.044_715) * (2.0 / std::f64::consts::PI).sqrt();
    (x * (inner.tanh() + 1.0) * 0.5).cast(dtype)
}

/// Computes [`FusedOps::silu_mul`](crate::FusedOps::silu_mul).
pub fn silu_mul<B: Backend>(gate: Tensor<B, 2>, up: Tensor<B, 2>) -> Tensor<B, 2> {
    activation::silu(gate) * up
}

/// Computes [`FusedOps::packed_attention`](crate::FusedOps::packed_attention), with burn's
/// `module::attention` for each sequence. burn's may hold the scores of all queries at once: where
/// they are many, [`attention_by_ops`] computes them.
pub fn packed_attention<B: Backend>(
    query: Tensor<B, 3>,
    key: Tensor<B, 3>,
    value: Tensor<B, 3>,
    lengths: &[usize],
    causal: bool,
) -> Tensor<B, 2> {
    let [_, heads, head_dim] = query.dims();
    let [_, kv_heads, _] = key.dims();
    let longest = lengths.iter().max().copied().unwrap_or(0);
    if heads * longest * longest > MAX_SCORES {
        return attention_by_ops(query, key, value, lengths, causal);
    }
    let options = AttentionModuleOptions {
        is_causal: causal,
        ..Default::default()
    };
    let mut start = 0;
    let mut outputs = Vec::with_capacity(lengths.len());
    for &length in lengths.iter().filter(|length| **length > 0) {
        let range = start..start + length;
        // [tokens, heads, head_dim] -> [1, heads, tokens, head_dim]
        let head_major = |x: &Tensor<B, 3>| {
            x.clone()
                .slice([range.clone()])
                .swap_dims(0, 1)
                .unsqueeze::<4>()
        };
        let per_query_head = |x: Tensor<B, 4>| -> Tensor<B, 4> {
            if kv_heads == heads {
                return x;
            }
            x.reshape([kv_heads, 1, length, head_dim])
                .repeat_dim(1, heads / kv_heads)
                .reshape([1, heads, length, head_dim])
        };
        let output = module::attention(
            head_major(&query),
            per_query_head(head_major(&key)),
            per_query_head(head_major(&value)),
            None,
            None,
            options,
        );
        outputs.push(output.swap_dims(1, 2).reshape([length, heads * head_dim]));
        start += length;
    }
    if outputs.len() == 1 {
        outputs.remove(0)
    } else {
        Tensor::cat(outputs, 0)
    }
}

/// Largest number of attention scores that [`attention_by_ops`] holds at once: 64 MiB of f32.
const MAX_SCORES: usize = 1 << 24;

/// Computes [`packed_attention`] without burn's `module::attention`, whose GPU kernels hold keys,
/// values and weights in f16: matrix products and softmax are separate ops in f32, over blocks of
/// query rows.
pub fn attention_by_ops<B: Backend>(
    query: Tensor<B, 3>,
    key: Tensor<B, 3>,
    value: Tensor<B, 3>,
    lengths: &[usize],
    causal: bool,
) -> Tensor<B, 2> {
    attention_by_products(query, key, value, lengths, causal, Tensor::matmul)
}

/// Computes [`attention_by_ops`] with the given matrix product of `[heads, m, k]` and
/// `[heads, k, n]` instead of burn's.
pub(crate) fn attention_by_products<B: Backend>(
    query: Tensor<B, 3>,
    key: Tensor<B, 3>,
    value: Tensor<B, 3>,
    lengths: &[usize],
    causal: bool,
    product: impl Fn(Tensor<B, 3>, Tensor<B, 3>) -> Tensor<B, 3>,
) -> Tensor<B, 2> {
    let (device, dtype) = (query.device(), query.dtype());
    let [_, heads, head_dim] = query.dims();
    let [_, kv_heads, _] = key.dims();
    let scale = 1.0 / (head_dim as f64).sqrt();
    let mut start = 0;
    let mut outputs = Vec::new();
    for &length in lengths.iter().filter(|length| **length > 0) {
        // [tokens, heads, head_dim] -> [heads, tokens, head_dim]
        let head_major = |x: &Tensor<B, 3>| {
            x.clone()
                .slice([start..start + length])
                .cast(DType::F32)
                .swap_dims(0, 1)
        };
        let per_query_head = |x: Tensor<B, 3>| -> Tensor<B, 3> {
            x.reshape([kv_heads, 1, length, head_dim])
                .repeat_dim(1, heads / kv_heads)
                .reshape([heads, length, head_dim])
        };
        let query = head_major(&query) * scale;
        let key = per_query_head(head_major(&key)).swap_dims(1, 2);
        let value = per_query_head(head_major(&value));
        // The blocks are of nearly equal size, so that the last one is not a single row.
        let blocks = (heads * length * length).div_ceil(MAX_SCORES).min(length);
        for block in 0..blocks {
            let (first, end) = (block * length / blocks, (block + 1) * length / blocks);
            let seen = if causal { end } else { length };
            let key = key.clone().slice([0..heads, 0..head_dim, 0..seen]);
            let value = value.clone().slice([0..heads, 0..seen]);
            let mut scores = product(query.clone().slice([0..heads, first..end]), key);
            if causal {
                let shape = [end - first, seen];
                let unseen = Tensor::<B, 2, Bool>::tril_mask(shape, first as i64, &device);
                scores = scores.mask_fill(
                    unseen.unsqueeze::<3>().expand([heads, shape[0], seen]),
                    -1e30,
                );
            }
            let output = product(activation::softmax(scores, 2), value);
            let output = output
                .swap_dims(0, 1)
                .reshape([end - first, heads * head_dim]);
            outputs.push(output.cast(dtype));
        }
        start += length;
    }
    if outputs.len() == 1 {
        outputs.remove(0)
    } else {
        Tensor::cat(outputs, 0)
    }
}

/// Computes [`FusedOps::conv2d_same`](crate::FusedOps::conv2d_same).
pub fn conv2d_same<B: Backend>(
    x: Tensor<B, 4>,
    weight: Tensor<B, 4>,
    bias: Tensor<B, 1>,
) -> Tensor<B, 4> {
    let dtype = x.dtype();
    let [_, _, kernel_height, kernel_width] = weight.dims();
    let padding = [kernel_height / 2, kernel_width / 2];
    let options = ConvOptions::new([1, 1], padding, [1, 1], 1);
    module::conv2d(x, weight.cast(dtype), Some(bias.cast(dtype)), options)
}

/// Computes [`FusedOps::channel_norm`](crate::FusedOps::channel_norm).
pub fn channel_norm<B: Backend>(x: Tensor<B, 4>, gamma: Tensor<B, 1>) -> Tensor<B, 4> {
    let dtype = x.dtype();
    let channels = x.dims()[1];
    let x = x.cast(DType::F32);
    let norm = x.clone().square().sum_dim(1).sqrt().clamp_min(1e-12);
    let gamma = gamma.cast(DType::F32).reshape([1, channels, 1, 1]);
    (x / norm * (channels as f64).sqrt() * gamma).cast(dtype)
}

/// Computes [`FusedOps::channel_norm_silu`](crate::FusedOps::channel_norm_silu).
pub fn channel_norm_silu<B: Backend>(x: Tensor<B, 4>, gamma: Tensor<B, 1>) -> Tensor<B, 4> {
    activation::silu(channel_norm(x, gamma))
}

/// Computes [`FusedOps::upsample_nearest`](crate::FusedOps::upsample_nearest).
pub fn upsample_nearest<B: Backend>(x: Tensor<B, 4>) -> Tensor<B, 4> {
    let [images, channels, height, width] = x.dims();
    x.reshape([images, channels, height, 1, width, 1])
        .expand([images, channels, height, 2, width, 2])
        .reshape([images, channels, 2 * height, 2 * width])
}

/// Computes [`FusedOps::crop`](crate::FusedOps::crop).
pub fn crop<B: Backend>(
    x: Tensor<B, 4>,
    rows: Range<usize>,
    columns: Range<usize>,
) -> Tensor<B, 4> {
    let [images, channels, _, _] = x.dims();
    x.slice([0..images, 0..channels, rows, columns])
}
