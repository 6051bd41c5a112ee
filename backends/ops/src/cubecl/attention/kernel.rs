//! The kernel of attention.
//!
//! A cube has a tile of consecutive query rows of one head, and goes through the keys tile by tile.
//! It makes the scores of a tile from slices of the head dimension in shared memory, turns them
//! into weights that are relative to the largest score so far, and adds the weighted values to its
//! sums, which lie in registers. Everything is computed in f32.

#![expect(
    clippy::trivially_copy_pass_by_ref,
    clippy::used_underscore_binding,
    reason = "as the macro that makes kernels wants its arguments"
)]

use burn_cubecl::cubecl::{self, prelude::*};

type Four = Vector<f32, Const<4>>;

/// Score of a key that a query does not see. It is finite, as WGSL has no infinity, and lower than
/// any score of values that a half or bf16 model has.
const MASKED: f32 = -1e30;

/// Fours of the head dimension that a cube has in shared memory at a time.
pub(super) const SLICE: usize = 4;

/// Fours between two rows of a slice: an odd number, so that rows start in different banks.
pub(super) const SLICE_STRIDE: usize = SLICE + 1;

/// Keys of a unit, and what else is a four.
pub(super) const FOUR: usize = 4;

/// How a cube is laid over queries, keys and the head dimension.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Tiling {
    pub(super) head_dim: usize,
    /// Units side by side: each has four keys of a tile, and every `units_x`-th four of the output's
    /// columns.
    pub(super) units_x: usize,
    /// Units above one another: each has every `units_y`-th query row.
    pub(super) units_y: usize,
    /// Query rows of a unit, a multiple of four.
    pub(super) rows: usize,
    /// Fours between two rows of weights.
    pub(super) weight_stride: usize,
    /// Fours of shared memory for what is read from tensors.
    pub(super) stage: usize,
    /// Keys whose values are in shared memory at a time, a multiple of four.
    pub(super) value_keys: usize,
    /// Whether a query sees the keys up to its own only.
    pub(super) causal: bool,
}

impl Tiling {
    pub(super) fn queries(&self) -> usize {
        self.rows * self.units_y
    }

    pub(super) fn keys(&self) -> usize {
        FOUR * self.units_x
    }

    /// Fours of a head's row.
    pub(super) fn fours(&self) -> usize {
        self.head_dim.div_ceil(FOUR)
    }

    /// Fours of an output row that a unit has.
    pub(super) fn columns(&self) -> usize {
        self.fours().div_ceil(self.units_x)
    }
}

/// One cube for each tile of queries (x) and each head (y), of `units_x` times `units_y` units.
///
/// The sequence has the `tokens` tokens from `first` on.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(super) fn attention<F: Float, N: Size>(
    query: &Tensor<Vector<F, N>>,
    key: &Tensor<Vector<F, N>>,
    value: &Tensor<Vector<F, N>>,
    output: &mut Tensor<Vector<F, N>>,
    first: usize,
    tokens: usize,
    scale: f32,
    #[comptime] tiling: Tiling,
    #[define(F)] _dtype: StorageType,
) {
    let units_x = comptime!(tiling.units_x);
    let units_y = comptime!(tiling.units_y);
    let units = comptime!(units_x * units_y);
    let rows = comptime!(tiling.rows);
    let row_fours = comptime!(rows / FOUR);
    let queries = comptime!(tiling.queries());
    let keys = comptime!(tiling.keys());
    let fours = comptime!(tiling.fours());
    let columns = comptime!(tiling.columns());
    let head_dim = comptime!(tiling.head_dim);
    let value_keys = comptime!(tiling.value_keys);
    let weight_stride = comptime!(tiling.weight_stride);

    let (heads, kv_heads) = (query.shape(1), key.shape(1));
    let head = CUBE_POS_Y as usize;
    let kv_head = head / (heads / kv_heads);
    let unit = UNIT_POS as usize;
    let (x, y) = (UNIT_POS_X as usize, UNIT_POS_Y as usize);
    let first_query = CUBE_POS_X as usize * queries;
    let mut end = tokens;
    if comptime!(tiling.causal) {
        end = min(tokens, first_query + queries);
    }

    // Slices of queries and of keys, or values, or what units tell each other.
    let mut stage = SharedMemory::<Four>::new(comptime!(tiling.stage));
    let mut weights = SharedMemory::<Four>::new(comptime!(queries * weight_stride));

    let mut sums = Array::<Four>::new(comptime!(rows * columns));
    #[unroll]
    for place in 0..comptime!(rows * columns) {
        sums[place] = Four::new(0.0);
    }
    // Of every row, the largest score so far and this unit's part of the sum of weights.
    let mut largest = Array::<Four>::new(row_fours);
    let mut totals = Array::<Four>::new(row_fours);
    #[unroll]
    for part in 0..row_fours {
        largest[part] = Four::new(MASKED);
        totals[part] = Four::new(0.0);
    }

    let mut start = 0;
    while start < end {
        let mut scores = Array::<Four>::new(rows);
        #[unroll]
        for row in 0..rows {
            scores[row] = Four::new(0.0);
        }
        for slice in 0..comptime!(fours.div_ceil(SLICE)) {
            // All have read what was there.
            sync_cube();
            #[unroll]
            for turn in 0..comptime!((queries * SLICE).div_ceil(units)) {
                let place = turn * units + unit;
                let (row, four) = (place / SLICE, place % SLICE);
                if row < queries {
                    let token = first_query + row;
                    stage[row * SLICE_STRIDE + four] = read::<F, N>(
                        query,
                        (first + token) * heads + head,
                        slice * SLICE + four,
                        token < tokens,
                        head_dim,
                    );
                }
            }
            #[unroll]
            for turn in 0..comptime!((keys * SLICE).div_ceil(units)) {
                let place = turn * units + unit;
                let (row, four) = (place / SLICE, place % SLICE);
                if row < keys {
                    let token = start + row;
                    // The first keys of all units, then the second keys of all units.
                    let row = row % FOUR * units_x + row / FOUR;
                    stage[(queries + row) * SLICE_STRIDE + four] = read::<F, N>(
                        key,
                        (first + token) * kv_heads + kv_head,
                        slice * SLICE + four,
                        token < end,
                        head_dim,
                    );
                }
            }
            sync_cube();
            #[unroll]
            for four in 0..SLICE {
                let start = queries * SLICE_STRIDE + x * SLICE_STRIDE + four;
                let step = units_x * SLICE_STRIDE;
                let key_0 = stage[start];
                let key_1 = stage[start + step];
                let key_2 = stage[start + 2 * step];
                let key_3 = stage[start + 3 * step];
                #[unroll]
                for row in 0..rows {
                    let query = stage[(row * units_y + y) * SLICE_STRIDE + four];
                    let mut sum = scores[row];
                    sum[0] += dot(query, key_0);
                    sum[1] += dot(query, key_1);
                    sum[2] += dot(query, key_2);
                    sum[3] += dot(query, key_3);
                    scores[row] = sum;
                }
            }
        }

        // The largest score of each row among this unit's keys, then among all of the tile.
        sync_cube();
        #[unroll]
        for part in 0..row_fours {
            let mut best = Four::new(MASKED);
            #[unroll]
            for lane in 0..FOUR {
                let row = comptime!(part * FOUR + lane);
                let mut score = scores[row] * Four::new(scale);
                #[unroll]
                for other in 0..FOUR {
                    let token = start + x * FOUR + other;
                    let mut seen = token < end;
                    if comptime!(tiling.causal) {
                        seen = seen && token <= first_query + row * units_y + y;
                    }
                    score[other] = select(seen, score[other], MASKED);
                }
                scores[row] = score;
                best[lane] = max(max(score[0], score[1]), max(score[2], score[3]));
            }
            stage[(part * units_y + y) * units_x + x] = best;
        }
        sync_cube();
        #[unroll]
        for part in 0..row_fours {
            let mut best = largest[part];
            #[unroll]
            for other in 0..units_x {
                best = max(best, stage[(part * units_y + y) * units_x + other]);
            }
            let fading = (largest[part] - best).exp();
            largest[part] = best;
            let mut total = totals[part] * fading;
            #[unroll]
            for lane in 0..FOUR {
                let row = comptime!(part * FOUR + lane);
                let weight = (scores[row] - Four::new(best[lane])).exp();
                weights[(row * units_y + y) * weight_stride + x] = weight;
                total[lane] += weight[0] + weight[1] + weight[2] + weight[3];
                #[unroll]
                for column in 0..columns {
                    let place = comptime!(row * columns + column);
                    sums[place] = sums[place] * Four::new(fading[lane]);
                }
            }
            totals[part] = total;
        }

        let groups = min(keys, end - start).div_ceil(value_keys);
        for group in 0..groups {
            sync_cube();
            #[unroll]
            for turn in 0..comptime!((value_keys * fours).div_ceil(units)) {
                let place = turn * units + unit;
                let (row, four) = (place / fours, place % fours);
                if row < value_keys {
                    let token = start + group * value_keys + row;
                    stage[place] = read::<F, N>(
                        value,
                        (first + token) * kv_heads + kv_head,
                        four,
                        token < end,
                        head_dim,
                    );
                }
            }
            sync_cube();
            for four in 0..comptime!(value_keys / FOUR) {
                let mut weight = Array::<Four>::new(rows);
                #[unroll]
                for row in 0..rows {
                    weight[row] = weights
                        [(row * units_y + y) * weight_stride + group * (value_keys / FOUR) + four];
                }
                #[unroll]
                for column in 0..columns {
                    // Of no consequence where a row has no such column.
                    let column_four = min(column * units_x + x, fours - 1);
                    let start = four * FOUR * fours + column_four;
                    let value_0 = stage[start];
                    let value_1 = stage[start + fours];
                    let value_2 = stage[start + 2 * fours];
                    let value_3 = stage[start + 3 * fours];
                    #[unroll]
                    for row in 0..rows {
                        let place = comptime!(row * columns + column);
                        let weight = weight[row];
                        sums[place] = sums[place]
                            + value_0 * Four::new(weight[0])
                            + value_1 * Four::new(weight[1])
                            + value_2 * Four::new(weight[2])
                            + value_3 * Four::new(weight[3]);
                    }
                }
            }
        }
        start += keys;
    }

    // The sum of weights of each row.
    sync_cube();
    #[unroll]
    for part in 0..row_fours {
        stage[(part * units_y + y) * units_x + x] = totals[part];
    }
    sync_cube();
    #[unroll]
    for part in 0..row_fours {
        let mut total = Four::new(0.0);
        #[unroll]
        for other in 0..units_x {
            total += stage[(part * units_y + y) * units_x + other];
        }
        #[unroll]
        for lane in 0..FOUR {
            let row = comptime!(part * FOUR + lane);
            let token = first_query + row * units_y + y;
            #[unroll]
            for column in 0..columns {
                let four = column * units_x + x;
                let sum = sums[comptime!(row * columns + column)] / Four::new(total[lane]);
                if token < tokens && four < fours {
                    write::<F, N>(output, (first + token) * heads + head, four, sum, head_dim);
                }
            }
        }
    }
}

#[cube]
fn dot(a: Four, b: Four) -> f32 {
    a[0] * b[0] + a[1] * b[1] + a[2] * b[2] + a[3] * b[3]
}

/// A four of a row; zeros past its end, and if the row does not exist.
#[cube]
fn read<F: Float, N: Size>(
    x: &Tensor<Vector<F, N>>,
    row: usize,
    four: usize,
    exists: bool,
    #[comptime] head_dim: usize,
) -> Four {
    let size = N::value().comptime();
    let mut values = Four::new(0.0);
    #[unroll]
    for part in 0..comptime!(FOUR / size) {
        let column = four * FOUR + part * size;
        if exists && column < head_dim {
            let vector = Vector::<f32, N>::cast_from(x[(row * head_dim + column) / size]);
            #[unroll]
            for lane in 0..size {
                values[part * size + lane] = vector[lane];
            }
        }
    }
    values
}

/// Writes a four of a row, as far as the row goes.
#[cube]
fn write<F: Float, N: Size>(
    x: &mut Tensor<Vector<F, N>>,
    row: usize,
    four: usize,
    values: Four,
    #[comptime] head_dim: usize,
) {
    let size = N::value().comptime();
    #[unroll]
    for part in 0..comptime!(FOUR / size) {
        let column = four * FOUR + part * size;
        if column < head_dim {
            let mut vector = Vector::<f32, N>::new(0.0);
            #[unroll]
            for lane in 0..size {
                vector[lane] = values[part * size + lane];
            }
            x[(row * head_dim + column) / size] = Vector::cast_from(vector);
        }
    }
}
