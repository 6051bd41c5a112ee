//! The attention kernel: attention with online softmax, in f32.
//!
//! A cube computes a tile of consecutive query rows of one head, over the keys tile by tile. It
//! computes the scores of a tile of keys from slices of the head dimension in shared memory, turns
//! them into softmax weights relative to the largest score so far, and adds the weighted values to
//! its sums in registers.

#![expect(
    clippy::trivially_copy_pass_by_ref,
    clippy::used_underscore_binding,
    reason = "the `cube` macro requires these forms of arguments"
)]

use burn_cubecl::cubecl::{self, prelude::*};

type Vec4 = Vector<f32, Const<4>>;

/// Score of a masked key. It is finite, because WGSL has no infinity, and lower than any score of
/// an f16 or bf16 model.
const MASKED: f32 = -1e30;

/// `Vec4`s of the head dimension that a cube holds in shared memory at a time.
pub(super) const SLICE: usize = 4;

/// Stride between two rows of a slice, in `Vec4`s: odd, so that rows start in different banks.
pub(super) const SLICE_STRIDE: usize = SLICE + 1;

/// Values of a `Vec4`; also the keys per unit.
pub(super) const VEC4: usize = 4;

/// The tile sizes of a cube, and how its units share a tile.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Tiling {
    pub(super) head_dim: usize,
    /// Units along the keys: each has four keys of a tile, and every `units_x`-th `Vec4` of the
    /// output's columns.
    pub(super) units_x: usize,
    /// Units along the queries: each has every `units_y`-th query row.
    pub(super) units_y: usize,
    /// Query rows per unit, a multiple of four.
    pub(super) rows: usize,
    /// Stride between two rows of weights, in `Vec4`s.
    pub(super) weight_stride: usize,
    /// Size of the shared memory for data from tensors, in `Vec4`s.
    pub(super) stage: usize,
    /// Keys whose values are in shared memory at a time, a multiple of four.
    pub(super) value_keys: usize,
    /// Whether a query sees only the keys up to its own position.
    pub(super) causal: bool,
}

impl Tiling {
    /// Query rows of a tile.
    pub(super) fn queries(&self) -> usize {
        self.rows * self.units_y
    }

    /// Keys of a tile.
    pub(super) fn keys(&self) -> usize {
        VEC4 * self.units_x
    }

    /// `Vec4`s of one row of a head.
    pub(super) fn vec4s(&self) -> usize {
        self.head_dim.div_ceil(VEC4)
    }

    /// `Vec4`s that hold one value for each query row of a unit.
    pub(super) fn row_vec4s(&self) -> usize {
        self.rows / VEC4
    }

    /// `Vec4`s of an output row per unit.
    pub(super) fn columns(&self) -> usize {
        self.vec4s().div_ceil(self.units_x)
    }
}

/// The head and tokens that a cube works on.
#[derive(CubeType, Clone, Copy)]
struct Place {
    heads: usize,
    head: usize,
    kv_heads: usize,
    kv_head: usize,
    /// First token of the sequence, among all packed tokens.
    first: usize,
    /// Number of tokens of the sequence.
    tokens: usize,
    /// First query of the tile, within the sequence.
    first_query: usize,
    /// End of the keys that the tile's queries see, within the sequence.
    end: usize,
}

/// Attention within the sequence of `tokens` tokens that starts at token `first`. One cube of
/// `units_x` × `units_y` units per tile of queries (x) and head (y).
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

    // Holds slices of queries and keys, or values, or partial results of the units.
    let mut stage = SharedMemory::<Vec4>::new(comptime!(tiling.stage));
    let mut weights = SharedMemory::<Vec4>::new(comptime!(tiling.queries() * tiling.weight_stride));

    let mut sums = zeros(comptime!(tiling.rows * tiling.columns()));
    // For every row: this unit's part of the sum of weights, and the largest score so far.
    let mut totals = zeros(comptime!(tiling.row_vec4s()));
    let mut largest = Array::<Vec4>::new(comptime!(tiling.row_vec4s()));
    #[unroll]
    for part in 0..comptime!(tiling.row_vec4s()) {
        largest[part] = Vec4::new(MASKED);
    }

    let mut start = 0;
    while start < end {
        let mut scores = zeros(tiling.rows);
        for slice in 0..comptime!(tiling.vec4s().div_ceil(SLICE)) {
            // All units have read the previous contents of `stage`.
            sync_cube();
            read_slices::<F, N>(query, key, &mut stage, &place, start, slice, tiling);
            sync_cube();
            add_products(&stage, &mut scores, tiling);
        }

        sync_cube();
        mask(&mut scores, &place, start, scale, tiling);
        write_largest(&mut stage, &scores, tiling);
        sync_cube();
        #[unroll]
        for part in 0..comptime!(tiling.row_vec4s()) {
            let mut maximum = largest[part];
            #[unroll]
            for other in 0..tiling.units_x {
                maximum = max(maximum, stage[partial_index(part, other, tiling)]);
            }
            let rescale = (largest[part] - maximum).exp();
            largest[part] = maximum;
            let mut total = totals[part] * rescale;
            #[unroll]
            for lane in 0..VEC4 {
                let row = comptime!(part * VEC4 + lane);
                let weight = (scores[row] - Vec4::new(maximum[lane])).exp();
                weights[row_of(row, tiling) * tiling.weight_stride + UNIT_POS_X as usize] = weight;
                total[lane] += weight[0] + weight[1] + weight[2] + weight[3];
                #[unroll]
                for column in 0..comptime!(tiling.columns()) {
                    let sum = comptime!(row * tiling.columns() + column);
                    sums[sum] = sums[sum] * Vec4::new(rescale[lane]);
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
            for vec4 in 0..comptime!(tiling.value_keys / VEC4) {
                let weight = group * comptime!(tiling.value_keys / VEC4) + vec4;
                add_values(&stage, &weights, &mut sums, vec4, weight, tiling);
            }
        }
        start += comptime!(tiling.keys());
    }
    write_means::<F, N>(output, &mut stage, &sums, &totals, &place, tiling);
}

#[cube]
fn zeros(#[comptime] count: usize) -> Array<Vec4> {
    let mut values = Array::<Vec4>::new(count);
    #[unroll]
    for place in 0..count {
        values[place] = Vec4::new(0.0);
    }
    values
}

/// Position in the tile of this unit's `row`-th query row.
#[cube]
fn row_of(row: usize, #[comptime] tiling: Tiling) -> usize {
    row * tiling.units_y + UNIT_POS_Y as usize
}

/// Position in `stage` of unit `unit`'s partial result for the `part`-th four rows.
#[cube]
fn partial_index(part: usize, unit: usize, #[comptime] tiling: Tiling) -> usize {
    row_of(part, tiling) * tiling.units_x + unit
}

/// Loads a slice of the tile's queries, followed by a slice of the keys from `start` on.
#[cube]
fn read_slices<F: Float, N: Size>(
    query: &Tensor<Vector<F, N>>,
    key: &Tensor<Vector<F, N>>,
    stage: &mut SharedMemory<Vec4>,
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
        let (row, vec4) = (index / SLICE, index % SLICE);
        if row < queries {
            let token = place.first_query + row;
            stage[row * SLICE_STRIDE + vec4] = read::<F, N>(
                query,
                (place.first + token) * place.heads + place.head,
                slice * SLICE + vec4,
                token < place.tokens,
                tiling.head_dim,
            );
        }
    }
    #[unroll]
    for turn in 0..comptime!((tiling.keys() * SLICE).div_ceil(units)) {
        let index = turn * units + UNIT_POS as usize;
        let (row, vec4) = (index / SLICE, index % SLICE);
        if row < comptime!(tiling.keys()) {
            let token = start + row;
            // Order: the first keys of all units, then the second keys of all units, and so on.
            let row = queries + row % VEC4 * tiling.units_x + row / VEC4;
            stage[row * SLICE_STRIDE + vec4] = read::<F, N>(
                key,
                (place.first + token) * place.kv_heads + place.kv_head,
                slice * SLICE + vec4,
                token < place.end,
                tiling.head_dim,
            );
        }
    }
}

/// Adds a slice's products to the scores of this unit's rows and keys.
#[cube]
fn add_products(stage: &SharedMemory<Vec4>, scores: &mut Array<Vec4>, #[comptime] tiling: Tiling) {
    let first_key = (comptime!(tiling.queries()) + UNIT_POS_X as usize) * SLICE_STRIDE;
    let step = comptime!(tiling.units_x * SLICE_STRIDE);
    #[unroll]
    for vec4 in 0..SLICE {
        let key_0 = stage[first_key + vec4];
        let key_1 = stage[first_key + vec4 + step];
        let key_2 = stage[first_key + vec4 + 2 * step];
        let key_3 = stage[first_key + vec4 + 3 * step];
        #[unroll]
        for row in 0..tiling.rows {
            let query = stage[row_of(row, tiling) * SLICE_STRIDE + vec4];
            let mut score = scores[row];
            score[0] += dot(query, key_0);
            score[1] += dot(query, key_1);
            score[2] += dot(query, key_2);
            score[3] += dot(query, key_3);
            scores[row] = score;
        }
    }
}

/// Scales the scores, and masks those of keys that the query does not see.
#[cube]
fn mask(
    scores: &mut Array<Vec4>,
    place: &Place,
    start: usize,
    scale: f32,
    #[comptime] tiling: Tiling,
) {
    #[unroll]
    for row in 0..tiling.rows {
        let mut score = scores[row] * Vec4::new(scale);
        #[unroll]
        for key in 0..VEC4 {
            let token = start + UNIT_POS_X as usize * VEC4 + key;
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
fn write_largest(stage: &mut SharedMemory<Vec4>, scores: &Array<Vec4>, #[comptime] tiling: Tiling) {
    #[unroll]
    for part in 0..comptime!(tiling.row_vec4s()) {
        let mut maximum = Vec4::new(MASKED);
        #[unroll]
        for lane in 0..VEC4 {
            let score = scores[comptime!(part * VEC4 + lane)];
            maximum[lane] = max(max(score[0], score[1]), max(score[2], score[3]));
        }
        stage[partial_index(part, UNIT_POS_X as usize, tiling)] = maximum;
    }
}

/// Loads the values of `value_keys` keys from `first_key` on.
#[cube]
fn read_values<F: Float, N: Size>(
    value: &Tensor<Vector<F, N>>,
    stage: &mut SharedMemory<Vec4>,
    place: &Place,
    first_key: usize,
    #[comptime] tiling: Tiling,
) {
    let units = comptime!(tiling.units_x * tiling.units_y);
    let vec4s = comptime!(tiling.vec4s());
    #[unroll]
    for turn in 0..comptime!((tiling.value_keys * vec4s).div_ceil(units)) {
        let index = turn * units + UNIT_POS as usize;
        let (row, vec4) = (index / vec4s, index % vec4s);
        if row < tiling.value_keys {
            let token = first_key + row;
            stage[index] = read::<F, N>(
                value,
                (place.first + token) * place.kv_heads + place.kv_head,
                vec4,
                token < place.end,
                tiling.head_dim,
            );
        }
    }
}

/// Adds the weighted values of the `vec4`-th four keys of `stage`. Their weights are the `weight`-th
/// `Vec4` of each row.
#[cube]
fn add_values(
    stage: &SharedMemory<Vec4>,
    weights: &SharedMemory<Vec4>,
    sums: &mut Array<Vec4>,
    vec4: usize,
    weight: usize,
    #[comptime] tiling: Tiling,
) {
    let vec4s = comptime!(tiling.vec4s());
    let mut row_weights = Array::<Vec4>::new(tiling.rows);
    #[unroll]
    for row in 0..tiling.rows {
        row_weights[row] = weights[row_of(row, tiling) * tiling.weight_stride + weight];
    }
    #[unroll]
    for column in 0..comptime!(tiling.columns()) {
        // A unit without this column reads the last one instead; its sum is not written.
        let column_vec4 = min(column * tiling.units_x + UNIT_POS_X as usize, vec4s - 1);
        let first = vec4 * VEC4 * vec4s + column_vec4;
        let value_0 = stage[first];
        let value_1 = stage[first + vec4s];
        let value_2 = stage[first + 2 * vec4s];
        let value_3 = stage[first + 3 * vec4s];
        #[unroll]
        for row in 0..tiling.rows {
            let place = comptime!(row * tiling.columns() + column);
            let weight = row_weights[row];
            sums[place] = sums[place]
                + value_0 * Vec4::new(weight[0])
                + value_1 * Vec4::new(weight[1])
                + value_2 * Vec4::new(weight[2])
                + value_3 * Vec4::new(weight[3]);
        }
    }
}

/// Divides the sums by the total weight over all units, and writes the output.
#[cube]
fn write_means<F: Float, N: Size>(
    output: &mut Tensor<Vector<F, N>>,
    stage: &mut SharedMemory<Vec4>,
    sums: &Array<Vec4>,
    totals: &Array<Vec4>,
    place: &Place,
    #[comptime] tiling: Tiling,
) {
    sync_cube();
    #[unroll]
    for part in 0..comptime!(tiling.row_vec4s()) {
        stage[partial_index(part, UNIT_POS_X as usize, tiling)] = totals[part];
    }
    sync_cube();
    #[unroll]
    for part in 0..comptime!(tiling.row_vec4s()) {
        let mut total = Vec4::new(0.0);
        #[unroll]
        for other in 0..tiling.units_x {
            total += stage[partial_index(part, other, tiling)];
        }
        #[unroll]
        for lane in 0..VEC4 {
            let row = comptime!(part * VEC4 + lane);
            let token = place.first_query + row_of(row, tiling);
            #[unroll]
            for column in 0..comptime!(tiling.columns()) {
                let vec4 = column * tiling.units_x + UNIT_POS_X as usize;
                let sum = sums[comptime!(row * tiling.columns() + column)];
                if token < place.tokens && vec4 < comptime!(tiling.vec4s()) {
                    let row = (place.first + token) * place.heads + place.head;
                    let mean = sum / Vec4::new(total[lane]);
                    write::<F, N>(output, row, vec4, mean, tiling.head_dim);
                }
            }
        }
    }
}

#[cube]
fn dot(a: Vec4, b: Vec4) -> f32 {
    a[0] * b[0] + a[1] * b[1] + a[2] * b[2] + a[3] * b[3]
}

/// Reads the `vec4`-th `Vec4` of a row; zeros past the row's end, or if the row does not exist.
#[cube]
fn read<F: Float, N: Size>(
    x: &Tensor<Vector<F, N>>,
    row: usize,
    vec4: usize,
    exists: bool,
    #[comptime] head_dim: usize,
) -> Vec4 {
    let size = N::value().comptime();
    let mut values = Vec4::new(0.0);
    #[unroll]
    for part in 0..comptime!(VEC4 / size) {
        let column = vec4 * VEC4 + part * size;
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

/// Writes the `vec4`-th `Vec4` of a row, up to the row's end.
#[cube]
fn write<F: Float, N: Size>(
    x: &mut Tensor<Vector<F, N>>,
    row: usize,
    vec4: usize,
    values: Vec4,
    #[comptime] head_dim: usize,
) {
    let size = N::value().comptime();
    #[unroll]
    for part in 0..comptime!(VEC4 / size) {
        let column = vec4 * VEC4 + part * size;
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
