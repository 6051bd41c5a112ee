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

    /// Fours that have a value for each query row of a unit.
    pub(super) fn row_fours(&self) -> usize {
        self.rows / FOUR
    }

    /// Fours of an output row that a unit has.
    pub(super) fn columns(&self) -> usize {
        self.fours().div_ceil(self.units_x)
    }
}

/// Where a cube's queries, keys and values are.
#[derive(CubeType, Clone, Copy)]
struct Place {
    heads: usize,
    head: usize,
    kv_heads: usize,
    kv_head: usize,
    /// Of the sequence, among all tokens.
    first: usize,
    /// Of the sequence.
    tokens: usize,
    /// Of the tile, in the sequence.
    first_query: usize,
    /// Past the last key that a query of the tile sees.
    end: usize,
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
    let (heads, kv_heads) = (query.shape(1), key.shape(1));
    let head = CUBE_POS_Y as usize;
    let first_query = CUBE_POS_X as usize * comptime!(tiling.queries());
    let mut end = tokens;
    if comptime!(tiling.causal) {
        end = min(tokens, first_query + comptime!(tiling.queries()));
    }
    let place = Place {
        heads,
        head,
        kv_heads,
        kv_head: head / (heads / kv_heads),
        first,
        tokens,
        first_query,
        end,
    };

    // Slices of queries and of keys, or values, or what units tell each other.
    let mut stage = SharedMemory::<Four>::new(comptime!(tiling.stage));
    let mut weights = SharedMemory::<Four>::new(comptime!(tiling.queries() * tiling.weight_stride));

    let mut sums = zeros(comptime!(tiling.rows * tiling.columns()));
    // Of every row, this unit's part of the sum of weights, and the largest score so far.
    let mut totals = zeros(comptime!(tiling.row_fours()));
    let mut largest = Array::<Four>::new(comptime!(tiling.row_fours()));
    #[unroll]
    for part in 0..comptime!(tiling.row_fours()) {
        largest[part] = Four::new(MASKED);
    }

    let mut start = 0;
    while start < end {
        let mut scores = zeros(tiling.rows);
        for slice in 0..comptime!(tiling.fours().div_ceil(SLICE)) {
            // All have read what was there.
            sync_cube();
            read_slices::<F, N>(query, key, &mut stage, &place, start, slice, tiling);
            sync_cube();
            add_products(&stage, &mut scores, tiling);
        }

        sync_cube();
        mask(&mut scores, &place, start, scale, tiling);
        tell_largest(&mut stage, &scores, tiling);
        sync_cube();
        #[unroll]
        for part in 0..comptime!(tiling.row_fours()) {
            let mut best = largest[part];
            #[unroll]
            for other in 0..tiling.units_x {
                best = max(best, stage[told(part, other, tiling)]);
            }
            let fading = (largest[part] - best).exp();
            largest[part] = best;
            let mut total = totals[part] * fading;
            #[unroll]
            for lane in 0..FOUR {
                let row = comptime!(part * FOUR + lane);
                let weight = (scores[row] - Four::new(best[lane])).exp();
                weights[row_of(row, tiling) * tiling.weight_stride + UNIT_POS_X as usize] = weight;
                total[lane] += weight[0] + weight[1] + weight[2] + weight[3];
                #[unroll]
                for column in 0..comptime!(tiling.columns()) {
                    let sum = comptime!(row * tiling.columns() + column);
                    sums[sum] = sums[sum] * Four::new(fading[lane]);
                }
            }
            totals[part] = total;
        }

        let groups = min(comptime!(tiling.keys()), end - start).div_ceil(tiling.value_keys);
        for group in 0..groups {
            sync_cube();
            let first_key = start + group * tiling.value_keys;
            read_values::<F, N>(value, &mut stage, &place, first_key, tiling);
            sync_cube();
            for four in 0..comptime!(tiling.value_keys / FOUR) {
                let weight = group * comptime!(tiling.value_keys / FOUR) + four;
                add_values(&stage, &weights, &mut sums, four, weight, tiling);
            }
        }
        start += comptime!(tiling.keys());
    }
    write_means::<F, N>(output, &mut stage, &sums, &totals, &place, tiling);
}

#[cube]
fn zeros(#[comptime] count: usize) -> Array<Four> {
    let mut values = Array::<Four>::new(count);
    #[unroll]
    for place in 0..count {
        values[place] = Four::new(0.0);
    }
    values
}

/// This unit's `row`-th row, in the tile.
#[cube]
fn row_of(row: usize, #[comptime] tiling: Tiling) -> usize {
    row * tiling.units_y + UNIT_POS_Y as usize
}

/// Where a unit of this row tells something about its `part`-th four rows.
#[cube]
fn told(part: usize, unit: usize, #[comptime] tiling: Tiling) -> usize {
    row_of(part, tiling) * tiling.units_x + unit
}

/// Reads a slice of the tile's queries, and behind it one of the keys from `start` on.
#[cube]
fn read_slices<F: Float, N: Size>(
    query: &Tensor<Vector<F, N>>,
    key: &Tensor<Vector<F, N>>,
    stage: &mut SharedMemory<Four>,
    place: &Place,
    start: usize,
    slice: usize,
    #[comptime] tiling: Tiling,
) {
    let units = comptime!(tiling.units_x * tiling.units_y);
    let queries = comptime!(tiling.queries());
    #[unroll]
    for turn in 0..comptime!((queries * SLICE).div_ceil(units)) {
        let index = turn * units + UNIT_POS as usize;
        let (row, four) = (index / SLICE, index % SLICE);
        if row < queries {
            let token = place.first_query + row;
            stage[row * SLICE_STRIDE + four] = read::<F, N>(
                query,
                (place.first + token) * place.heads + place.head,
                slice * SLICE + four,
                token < place.tokens,
                tiling.head_dim,
            );
        }
    }
    #[unroll]
    for turn in 0..comptime!((tiling.keys() * SLICE).div_ceil(units)) {
        let index = turn * units + UNIT_POS as usize;
        let (row, four) = (index / SLICE, index % SLICE);
        if row < comptime!(tiling.keys()) {
            let token = start + row;
            // The first keys of all units, then the second keys of all units, and so on.
            let row = queries + row % FOUR * tiling.units_x + row / FOUR;
            stage[row * SLICE_STRIDE + four] = read::<F, N>(
                key,
                (place.first + token) * place.kv_heads + place.kv_head,
                slice * SLICE + four,
                token < place.end,
                tiling.head_dim,
            );
        }
    }
}

/// Adds a slice's part to the scores of this unit's rows and keys.
#[cube]
fn add_products(stage: &SharedMemory<Four>, scores: &mut Array<Four>, #[comptime] tiling: Tiling) {
    let first_key = (comptime!(tiling.queries()) + UNIT_POS_X as usize) * SLICE_STRIDE;
    let step = comptime!(tiling.units_x * SLICE_STRIDE);
    #[unroll]
    for four in 0..SLICE {
        let key_0 = stage[first_key + four];
        let key_1 = stage[first_key + four + step];
        let key_2 = stage[first_key + four + 2 * step];
        let key_3 = stage[first_key + four + 3 * step];
        #[unroll]
        for row in 0..tiling.rows {
            let query = stage[row_of(row, tiling) * SLICE_STRIDE + four];
            let mut score = scores[row];
            score[0] += dot(query, key_0);
            score[1] += dot(query, key_1);
            score[2] += dot(query, key_2);
            score[3] += dot(query, key_3);
            scores[row] = score;
        }
    }
}

/// Scales the scores, except those of keys that a query does not see.
#[cube]
fn mask(
    scores: &mut Array<Four>,
    place: &Place,
    start: usize,
    scale: f32,
    #[comptime] tiling: Tiling,
) {
    #[unroll]
    for row in 0..tiling.rows {
        let mut score = scores[row] * Four::new(scale);
        #[unroll]
        for key in 0..FOUR {
            let token = start + UNIT_POS_X as usize * FOUR + key;
            let mut seen = token < place.end;
            if comptime!(tiling.causal) {
                seen = seen && token <= place.first_query + row_of(row, tiling);
            }
            score[key] = select(seen, score[key], MASKED);
        }
        scores[row] = score;
    }
}

/// Writes the largest score of each row among this unit's keys.
#[cube]
fn tell_largest(stage: &mut SharedMemory<Four>, scores: &Array<Four>, #[comptime] tiling: Tiling) {
    #[unroll]
    for part in 0..comptime!(tiling.row_fours()) {
        let mut best = Four::new(MASKED);
        #[unroll]
        for lane in 0..FOUR {
            let score = scores[comptime!(part * FOUR + lane)];
            best[lane] = max(max(score[0], score[1]), max(score[2], score[3]));
        }
        stage[told(part, UNIT_POS_X as usize, tiling)] = best;
    }
}

/// Reads the values of `value_keys` keys from `first_key` on.
#[cube]
fn read_values<F: Float, N: Size>(
    value: &Tensor<Vector<F, N>>,
    stage: &mut SharedMemory<Four>,
    place: &Place,
    first_key: usize,
    #[comptime] tiling: Tiling,
) {
    let units = comptime!(tiling.units_x * tiling.units_y);
    let fours = comptime!(tiling.fours());
    #[unroll]
    for turn in 0..comptime!((tiling.value_keys * fours).div_ceil(units)) {
        let index = turn * units + UNIT_POS as usize;
        let (row, four) = (index / fours, index % fours);
        if row < tiling.value_keys {
            let token = first_key + row;
            stage[index] = read::<F, N>(
                value,
                (place.first + token) * place.kv_heads + place.kv_head,
                four,
                token < place.end,
                tiling.head_dim,
            );
        }
    }
}

/// Adds the values of four keys, the `four`-th that were read, by the `weight`-th four of weights.
#[cube]
fn add_values(
    stage: &SharedMemory<Four>,
    weights: &SharedMemory<Four>,
    sums: &mut Array<Four>,
    four: usize,
    weight: usize,
    #[comptime] tiling: Tiling,
) {
    let fours = comptime!(tiling.fours());
    let mut row_weights = Array::<Four>::new(tiling.rows);
    #[unroll]
    for row in 0..tiling.rows {
        row_weights[row] = weights[row_of(row, tiling) * tiling.weight_stride + weight];
    }
    #[unroll]
    for column in 0..comptime!(tiling.columns()) {
        // A unit that has no such column takes the last: nobody reads its sum.
        let column_four = min(column * tiling.units_x + UNIT_POS_X as usize, fours - 1);
        let first = four * FOUR * fours + column_four;
        let value_0 = stage[first];
        let value_1 = stage[first + fours];
        let value_2 = stage[first + 2 * fours];
        let value_3 = stage[first + 3 * fours];
        #[unroll]
        for row in 0..tiling.rows {
            let place = comptime!(row * tiling.columns() + column);
            let weight = row_weights[row];
            sums[place] = sums[place]
                + value_0 * Four::new(weight[0])
                + value_1 * Four::new(weight[1])
                + value_2 * Four::new(weight[2])
                + value_3 * Four::new(weight[3]);
        }
    }
}

/// Divides the sums by the sum of weights of all units.
#[cube]
fn write_means<F: Float, N: Size>(
    output: &mut Tensor<Vector<F, N>>,
    stage: &mut SharedMemory<Four>,
    sums: &Array<Four>,
    totals: &Array<Four>,
    place: &Place,
    #[comptime] tiling: Tiling,
) {
    sync_cube();
    #[unroll]
    for part in 0..comptime!(tiling.row_fours()) {
        stage[told(part, UNIT_POS_X as usize, tiling)] = totals[part];
    }
    sync_cube();
    #[unroll]
    for part in 0..comptime!(tiling.row_fours()) {
        let mut total = Four::new(0.0);
        #[unroll]
        for other in 0..tiling.units_x {
            total += stage[told(part, other, tiling)];
        }
        #[unroll]
        for lane in 0..FOUR {
            let row = comptime!(part * FOUR + lane);
            let token = place.first_query + row_of(row, tiling);
            #[unroll]
            for column in 0..comptime!(tiling.columns()) {
                let four = column * tiling.units_x + UNIT_POS_X as usize;
                let sum = sums[comptime!(row * tiling.columns() + column)];
                if token < place.tokens && four < comptime!(tiling.fours()) {
                    let row = (place.first + token) * place.heads + place.head;
                    let mean = sum / Four::new(total[lane]);
                    write::<F, N>(output, row, four, mean, tiling.head_dim);
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
