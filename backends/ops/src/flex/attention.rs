//! Attention over packed sequences.

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::shared::SharedMut;
use super::tile::{self, COLUMNS, ROWS, Tile};
use super::{Float, contiguous, from_values, simd};

/// Scores a task holds at once, so that they stay in the second-level cache.
const SCORES: usize = 1 << 16;
/// Queries a task has at most.
const QUERIES: usize = 8 * ROWS;
/// Keys whose values are summed at a time, so that those stay in the first-level cache.
const KEYS: usize = 128;

/// Keys and values of one head in one sequence, laid out for tiles.
struct Packed {
    /// `[length / COLUMNS, head_dim, COLUMNS]`, ended with zeros.
    keys: Vec<f32>,
    /// `[head_dim / COLUMNS, length, COLUMNS]`, ended with zeros.
    values: Vec<f32>,
}

/// Queries of one head that are worked out together.
#[derive(Clone, Copy)]
struct Task {
    sequence: usize,
    head: usize,
    /// First query, from the start of the sequence.
    first: usize,
    queries: usize,
}

/// Consecutive tokens.
#[derive(Clone, Copy)]
struct Sequence {
    start: usize,
    length: usize,
}

/// Twice as fast as products of whole heads.
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
    let row = heads * head_dim;
    let sequences = sequences(lengths);
    let packed: Vec<Packed> = (0..sequences.len() * kv_heads)
        .into_par_iter()
        .map(|index| {
            let (sequence, kv_head) = (sequences[index / kv_heads], index % kv_heads);
            pack([key, value], [kv_heads, head_dim], sequence, kv_head)
        })
        .collect();

    let mut output = vec![0.0_f32; tokens * row];
    let shared = SharedMut::new(&mut output);
    tasks(&sequences, heads).into_par_iter().for_each_init(
        || (Vec::new(), Vec::new()),
        |(scores, attended), task| {
            let Sequence { start, length } = sequences[task.sequence];
            let kv_head = task.head / (heads / kv_heads);
            let place = (start + task.first) * row + task.head * head_dim;
            let width = head_dim.next_multiple_of(COLUMNS);
            Arch::new().dispatch(Attend {
                query: &query[place..],
                row,
                head_dim,
                packed: &packed[task.sequence * kv_heads + kv_head],
                length,
                task,
                causal,
                scores,
                attended,
            });
            for (index, attended) in attended.chunks_exact(width).enumerate() {
                #[expect(unsafe_code, reason = "tasks write disjoint parts of the output")]
                // SAFETY: each task has queries and a head of its own.
                unsafe {
                    shared.write(place + index * row, &attended[..head_dim]);
                }
            }
        },
    );
    from_values(output, [tokens, row])
}

fn sequences(lengths: &[usize]) -> Vec<Sequence> {
    let mut start = 0;
    let sequence = |&length: &usize| {
        start += length;
        Sequence {
            start: start - length,
            length,
        }
    };
    let sequences = lengths.iter().map(sequence);
    sequences.filter(|sequence| sequence.length > 0).collect()
}

fn tasks(sequences: &[Sequence], heads: usize) -> Vec<Task> {
    let mut tasks = Vec::new();
    for (sequence, &Sequence { length, .. }) in sequences.iter().enumerate() {
        let block = (SCORES / length).clamp(2 * ROWS, QUERIES) / ROWS * ROWS;
        for head in 0..heads {
            tasks.extend((0..length).step_by(block).map(|first| Task {
                sequence,
                head,
                first,
                queries: block.min(length - first),
            }));
        }
    }
    tasks
}

/// One head of key and value, each `[tokens, kv_heads, head_dim]`.
fn pack(
    [key, value]: [&[f32]; 2],
    [kv_heads, head_dim]: [usize; 2],
    Sequence { start, length }: Sequence,
    kv_head: usize,
) -> Packed {
    let place = |token: usize| ((start + token) * kv_heads + kv_head) * head_dim;
    let mut keys = vec![0.0_f32; length.next_multiple_of(COLUMNS) * head_dim];
    for (panel, keys) in keys.chunks_exact_mut(head_dim * COLUMNS).enumerate() {
        let first = panel * COLUMNS;
        for column in 0..COLUMNS.min(length - first) {
            let key = &key[place(first + column)..][..head_dim];
            for (row, &x) in keys.chunks_exact_mut(COLUMNS).zip(key) {
                row[column] = x;
            }
        }
    }
    let mut values = vec![0.0_f32; length * head_dim.next_multiple_of(COLUMNS)];
    for (panel, values) in values.chunks_exact_mut(length * COLUMNS).enumerate() {
        let first = panel * COLUMNS;
        let count = COLUMNS.min(head_dim - first);
        for (token, row) in values.chunks_exact_mut(COLUMNS).enumerate() {
            row[..count].copy_from_slice(&value[place(token) + first..][..count]);
        }
    }
    Packed { keys, values }
}

/// The attention of a task's queries.
struct Attend<'a> {
    /// From the first query of the task and its head on.
    query: &'a [f32],
    /// From one query to the next.
    row: usize,
    head_dim: usize,
    packed: &'a Packed,
    /// Of the sequence.
    length: usize,
    task: Task,
    causal: bool,
    /// Scratch.
    scores: &'a mut Vec<f32>,
    /// The result: `[queries, head_dim]`, rows filled up to a multiple of `COLUMNS`.
    attended: &'a mut Vec<f32>,
}

impl WithSimd for Attend<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Task { first, queries, .. } = self.task;
        let (head_dim, length) = (self.head_dim, self.length);
        let keys = if self.causal { first + queries } else { length };
        let padded = keys.next_multiple_of(COLUMNS);
        let width = head_dim.next_multiple_of(COLUMNS);
        let scale = 1.0 / (head_dim as f32).sqrt();
        let (scores, attended) = (self.scores, self.attended);
        scores.resize(queries * padded, 0.0);
        attended.clear();
        attended.resize(queries * width, 0.0);

        let panels = self.packed.keys.chunks_exact(head_dim * COLUMNS);
        for (panel, keys) in panels.take(padded / COLUMNS).enumerate() {
            for top in (0..queries).step_by(ROWS) {
                let mut tile = Tile::default();
                let row = |i| &self.query[i * self.row..][..head_dim];
                tile::add(simd, &mut tile, rows(top, queries, row), keys, COLUMNS);
                for (query, tile) in (top..queries).zip(&tile) {
                    scores[query * padded + panel * COLUMNS..][..COLUMNS].copy_from_slice(tile);
                }
            }
        }
        let mut sums = [1.0_f32; QUERIES];
        let each = scores.chunks_exact_mut(padded).zip(&mut sums);
        for (index, (scores, sum)) in each.enumerate() {
            let seen = if self.causal {
                first + index + 1
            } else {
                length
            };
            let (seen, hidden) = scores.split_at_mut(seen);
            hidden.fill(0.0);
            *sum = exponentials(seen, scale);
        }
        for first in (0..keys).step_by(KEYS) {
            let count = KEYS.min(keys - first);
            let panels = self.packed.values.chunks_exact(length * COLUMNS);
            for (panel, values) in panels.enumerate() {
                let values = &values[first * COLUMNS..][..count * COLUMNS];
                for top in (0..queries).step_by(ROWS) {
                    let place = |query: usize| query * width + panel * COLUMNS;
                    let mut tile = Tile::default();
                    for (query, tile) in (top..queries).zip(&mut tile) {
                        tile.copy_from_slice(&attended[place(query)..][..COLUMNS]);
                    }
                    let row = |i| &scores[i * padded + first..][..count];
                    tile::add(simd, &mut tile, rows(top, queries, row), values, COLUMNS);
                    for (query, tile) in (top..queries).zip(&tile) {
                        attended[place(query)..][..COLUMNS].copy_from_slice(tile);
                    }
                }
            }
        }
        for (attended, sum) in attended.chunks_exact_mut(width).zip(sums) {
            attended.iter_mut().for_each(|x| *x /= sum);
        }
    }
}

/// The rows of a tile; one that is not full works out its last row several times.
#[inline(always)]
fn rows<'a>(top: usize, count: usize, row: impl Fn(usize) -> &'a [f32]) -> [&'a [f32]; ROWS] {
    std::array::from_fn(|i| row((top + i).min(count - 1)))
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
