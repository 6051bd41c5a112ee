//! Attention over packed sequences.

use gemm::Parallelism;
use rayon::prelude::*;

use super::matrix::{Matrix, Output, product};
use super::shared::SharedMut;
use super::{Float, contiguous, from_values, simd};

/// Scores a task holds at once, so that they stay in the second-level cache.
const SCORES: usize = 1 << 17;

/// Queries of one head that are worked out together.
#[derive(Clone, Copy)]
struct Task {
    /// First token of the sequence.
    start: usize,
    /// Keys the queries see.
    keys: usize,
    head: usize,
    /// First query, from the start of the sequence.
    first: usize,
    queries: usize,
}

/// 3.5 times as fast as the default body, 3.1 times if causal.
pub(super) fn packed_attention(
    query: Float<3>,
    key: Float<3>,
    value: Float<3>,
    lengths: &[usize],
    causal: bool,
) -> Float<2> {
    let [tokens, heads, head_dim] = query.dims();
    let kv_heads = key.dims()[1];
    let (query, key, value) = (contiguous(query), contiguous(key), contiguous(value));
    let (query, key, value) = (
        query.storage::<f32>(),
        key.storage::<f32>(),
        value.storage::<f32>(),
    );
    let (row, kv_row) = (heads * head_dim, kv_heads * head_dim);
    let scale = 1.0 / (head_dim as f32).sqrt();

    let mut output = vec![0.0_f32; tokens * row];
    let shared = SharedMut::new(&mut output);
    tasks(lengths, heads, causal).into_par_iter().for_each_init(
        || (Vec::new(), Vec::new()),
        |(scores, attended), task| {
            let Task {
                start,
                keys,
                head,
                first,
                queries,
            } = task;
            let kv_head = head / (heads / kv_heads);
            let query_place = (start + first) * row + head * head_dim;
            let kv_place = start * kv_row + kv_head * head_dim;
            let queries_of_head = Matrix::rows(&query[query_place..], queries, head_dim, row);
            let keys_of_head = Matrix::rows(&key[kv_place..], keys, head_dim, kv_row);
            let values_of_head = Matrix::rows(&value[kv_place..], keys, head_dim, kv_row);

            scores.resize(queries * keys, 0.0_f32);
            attended.resize(queries * head_dim, 0.0_f32);
            let threads = Parallelism::None;
            product(
                scores,
                queries_of_head,
                keys_of_head.transposed(),
                Output::Overwrite,
                threads,
            );
            let mut sums = Vec::with_capacity(queries);
            for (index, scores) in scores.chunks_exact_mut(keys).enumerate() {
                let seen = if causal { first + index + 1 } else { keys };
                let (seen, hidden) = scores.split_at_mut(seen);
                hidden.fill(0.0);
                sums.push(simd::vectorised(|| exponentials(seen, scale)));
            }
            let weights = Matrix::rows(scores, queries, keys, keys);
            product(
                attended,
                weights,
                values_of_head,
                Output::Overwrite,
                threads,
            );
            for (index, (attended, sum)) in
                attended.chunks_exact_mut(head_dim).zip(sums).enumerate()
            {
                attended.iter_mut().for_each(|x| *x /= sum);
                #[expect(unsafe_code, reason = "tasks write disjoint parts of the output")]
                // SAFETY: each task has queries and a head of its own.
                unsafe {
                    shared.write(query_place + index * row, attended);
                }
            }
        },
    );
    from_values(output, [tokens, row])
}

/// Replaces scores by `e^(scale · (score - largest))` and returns their sum.
#[inline(always)]
fn exponentials(scores: &mut [f32], scale: f32) -> f32 {
    let largest = simd::max(scores);
    for score in scores.iter_mut() {
        *score = simd::exp(scale * (*score - largest));
    }
    simd::sum(scores, |x| x)
}

fn tasks(lengths: &[usize], heads: usize, causal: bool) -> Vec<Task> {
    let mut tasks = Vec::new();
    let mut start = 0;
    for &length in lengths {
        let block = (SCORES / length.max(1)).clamp(16, 256);
        for head in 0..heads {
            for first in (0..length).step_by(block) {
                let queries = block.min(length - first);
                let keys = if causal { first + queries } else { length };
                tasks.push(Task {
                    start,
                    keys,
                    head,
                    first,
                    queries,
                });
            }
        }
        start += length;
    }
    tasks
}
