//! Elementwise ops, nearest-neighbour upsampling and crops.

use std::ops::Range;

use burn_flex::FlexTensor;
use burn_tensor::TensorData;
use rayon::prelude::*;

use super::{Float, contiguous, from_flex, from_values, simd, token_rows};
use crate::TokenRun;

/// Values per task: enough to amortise the task, few enough to stay in cache.
const CHUNK: usize = 1 << 14;

/// 60 times as fast as the default body.
pub(super) fn gelu_tanh(x: Float<2>) -> Float<2> {
    from_flex(map_chunks(contiguous(x), |_, values| {
        simd::vectorised(|| values.iter_mut().for_each(|x| *x = simd::gelu_tanh(*x)));
    }))
}

/// 14 times as fast as the default body.
pub(super) fn silu_mul(gate: Float<2>, up: Float<2>) -> Float<2> {
    let up = contiguous(up);
    let ups = up.storage::<f32>();
    from_flex(map_chunks(contiguous(gate), |first, gates| {
        let ups = &ups[first..first + gates.len()];
        simd::vectorised(|| {
            gates
                .iter_mut()
                .zip(ups)
                .for_each(|(gate, up)| *gate = simd::silu(*gate) * up);
        });
    }))
}

/// Calls `body` with each chunk of a tensor's values and the index of the chunk's first value. Works
/// in place if the tensor's storage is not shared, else on a copy.
fn map_chunks(mut x: FlexTensor, body: impl Fn(usize, &mut [f32]) + Sync) -> FlexTensor {
    if let Some(values) = x.try_storage_mut::<f32>() {
        let chunks = values.par_chunks_mut(CHUNK).enumerate();
        chunks.for_each(|(index, chunk)| body(index * CHUNK, chunk));
        return x;
    }
    let values = x.storage::<f32>();
    // Not zeroed first, which would be another pass over memory.
    let mut mapped = Vec::with_capacity(values.len());
    let chunks = mapped.spare_capacity_mut()[..values.len()].par_chunks_mut(CHUNK);
    let chunks = chunks.zip(values.par_chunks(CHUNK)).enumerate();
    chunks.for_each(|(index, (chunk, values))| {
        body(index * CHUNK, chunk.write_copy_of_slice(values));
    });
    #[expect(
        unsafe_code,
        reason = "sets the length of a vector that was filled in place"
    )]
    // SAFETY: the chunks cover the length of `values`, and each was written completely.
    unsafe {
        mapped.set_len(values.len());
    }
    FlexTensor::from_data(TensorData::new(mapped, x.layout().shape().clone()))
}

/// 11 times as fast as the default body.
pub(super) fn gated_residual(
    residual: Float<2>,
    gate: Float<2>,
    x: Float<2>,
    runs: &[TokenRun],
) -> Float<2> {
    let dim = x.dims()[1];
    let (residual, gate, mut x) = (contiguous(residual), contiguous(gate), contiguous(x));
    let (residual, gate) = (residual.storage::<f32>(), gate.storage::<f32>());
    let rows = token_rows(runs);
    let tokens = x
        .storage_mut::<f32>()
        .par_chunks_mut(dim)
        .zip(residual.par_chunks(dim));
    tokens
        .zip(&rows)
        .with_min_len(CHUNK.div_ceil(dim))
        .for_each(|((x, residual), &row)| {
            let gate = &gate[row * dim..(row + 1) * dim];
            simd::vectorised(|| {
                for ((x, residual), gate) in x.iter_mut().zip(residual).zip(gate) {
                    *x = residual + gate * *x;
                }
            });
        });
    from_flex(x)
}

/// 7 times as fast as the default body.
pub(super) fn upsample_nearest(x: Float<4>) -> Float<4> {
    let [images, channels, height, width] = x.dims();
    let x = contiguous(x);
    let mut output = vec![0.0_f32; images * channels * 4 * height * width];
    let rows = output
        .par_chunks_mut(4 * width)
        .zip(x.storage::<f32>().par_chunks(width));
    rows.with_min_len(CHUNK.div_ceil(4 * width))
        .for_each(|(doubled, row)| {
            let (upper, lower) = doubled.split_at_mut(2 * width);
            simd::vectorised(|| {
                let pairs = upper.as_chunks_mut::<2>().0;
                for (pair, &value) in pairs.iter_mut().zip(row) {
                    *pair = [value; 2];
                }
            });
            lower.copy_from_slice(upper);
        });
    from_values(output, [images, channels, 2 * height, 2 * width])
}

/// Copies on all cores what the default body leaves to later ops as a view, which keeps the whole
/// tensor alive and which they read value by value.
pub(super) fn crop(x: Float<4>, rows: Range<usize>, columns: Range<usize>) -> Float<4> {
    let [images, channels, height, width] = x.dims();
    let x = contiguous(x);
    let values = x.storage::<f32>();
    let shape = [images, channels, rows.len(), columns.len()];
    let mut output = vec![0.0_f32; shape.iter().product()];
    let lines = output.par_chunks_mut(columns.len());
    lines
        .with_min_len(CHUNK.div_ceil(columns.len()))
        .enumerate()
        .for_each(|(index, line)| {
            let (plane, row) = (index / rows.len(), rows.start + index % rows.len());
            let start = (plane * height + row) * width + columns.start;
            line.copy_from_slice(&values[start..][..line.len()]);
        });
    from_values(output, shape)
}
