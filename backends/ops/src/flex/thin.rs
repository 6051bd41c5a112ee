//! Matrix products with few columns or few terms, `sums += left · rightᵀ`, as low-rank updates have.
//!
//! A row's sums are added in the same order whatever the number of rows is.

use std::ops::Range;

use burn_flex::FlexTensor;
use burn_tensor::DType;
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::matrix::parts;
use super::simd;

/// Rows of the left matrix that are read at a time are a multiple of it.
pub(super) const ROWS: usize = 12;
/// Columns of a panel are padded to a multiple of it: f32 values of the widest vector register.
pub(super) const LANE: usize = 16;

/// The input of linear layers.
#[derive(Clone, Copy)]
pub(super) struct Input<'a> {
    /// `[tokens, length]`
    pub(super) values: &'a [f32],
    pub(super) length: usize,
    /// The rows rounded to pairs of bf16; empty if no layer needs them.
    pub(super) pairs: &'a [u32],
}

impl Input<'_> {
    pub(super) fn tokens(self) -> usize {
        self.values.len() / self.length
    }
}

/// A way to multiply rows.
pub(super) trait Product: Copy + Send + Sync {
    /// What is multiplied at once: an f32, or a pair of bf16.
    type Term: Copy + Default + Send + Sync + 'static;
    /// What matrices are stored in.
    type Stored: Sync;

    /// The dtype of stored matrices.
    const STORED: DType;
    /// Columns of a panel that is not the last one.
    const COLUMNS: usize;

    /// The values of a contiguous matrix of [`Self::STORED`].
    fn stored(matrix: &FlexTensor) -> &[Self::Stored];

    /// Terms of a row of `length` values.
    fn terms(length: usize) -> usize;

    /// Rows of the input as terms, if they need no conversion.
    fn rows(self, input: Input<'_>, rows: Range<usize>) -> Option<&[Self::Term]>;

    /// Scales rows of values and converts them to terms.
    fn convert<'a>(self, rows: impl Iterator<Item = (&'a [f32], &'a mut [Self::Term])>, scale: f32);

    /// Writes a row of a stored matrix to a column of the panel, from term `first` on.
    fn column(row: &[Self::Stored], first: usize, places: &mut [Self::Term], width: usize);

    /// Adds `left · panelᵀ` to `sums`.
    fn add(self, left: &[Self::Term], panel: &Panel<Self::Term>, sums: Sums<'_>);
}

/// Up to [`Product::COLUMNS`] rows of a matrix, transposed: `[terms, width]`.
pub(super) struct Panel<T> {
    /// The columns in use; the others of `width` are zeros.
    pub(super) columns: usize,
    pub(super) width: usize,
    pub(super) terms: usize,
    values: Vec<T>,
    /// Where the values begin: on a cache line, because a load across two of them takes twice the
    /// time.
    start: usize,
}

impl<T: Copy + Default> Panel<T> {
    fn new<P: Product<Term = T>>(rows: &[P::Stored], length: usize) -> Self {
        /// Terms that are written for all columns before the next ones: they stay in the L1 cache.
        const PLACES: usize = 32;
        let columns = rows.len() / length;
        let width = columns.next_multiple_of(LANE);
        let terms = P::terms(length);
        let mut values = vec![T::default(); terms * width + LANE];
        let start = values.as_ptr().align_offset(64).min(LANE);
        let places = values[start..][..terms * width].chunks_mut(PLACES * width);
        for (index, places) in places.enumerate() {
            for (column, row) in rows.chunks_exact(length).enumerate() {
                P::column(row, index * PLACES, &mut places[column..], width);
            }
        }
        Self {
            columns,
            width,
            terms,
            values,
            start,
        }
    }

    pub(super) fn values(&self) -> &[T] {
        &self.values[self.start..][..self.terms * self.width]
    }
}

/// The panels of a matrix of rows of `length` values.
pub(super) fn panels<P: Product>(matrix: &[P::Stored], length: usize) -> Vec<Panel<P::Term>> {
    matrix
        .par_chunks(P::COLUMNS * length)
        .map(|rows| Panel::new::<P>(rows, length))
        .collect()
}

/// Rows of sums: `rows` rows that are `stride` values apart, from column `first` on.
pub(super) struct Sums<'a> {
    pub(super) values: &'a mut [f32],
    pub(super) rows: usize,
    pub(super) stride: usize,
    pub(super) first: usize,
}

impl Sums<'_> {
    pub(super) fn check<T>(&self, left: &[T], panel: &Panel<T>) {
        assert!(self.rows > 0, "no rows of sums");
        assert!(
            (self.rows - 1) * self.stride + self.first + panel.columns <= self.values.len(),
            "the sums reach outside their slice"
        );
        let rows = self.rows.next_multiple_of(ROWS);
        assert!(left.len() >= rows * panel.terms, "rows of the left matrix");
    }
}

/// Products of f32 values.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wide {
    /// Whether rows are rounded to bf16 first.
    pub(super) rounds: bool,
}

impl Product for Wide {
    type Term = f32;
    type Stored = f32;
    const STORED: DType = DType::F32;
    const COLUMNS: usize = 2 * LANE;

    fn stored(matrix: &FlexTensor) -> &[f32] {
        matrix.storage()
    }

    fn terms(length: usize) -> usize {
        length
    }

    fn rows(self, input: Input<'_>, rows: Range<usize>) -> Option<&[f32]> {
        let terms = rows.start * input.length..rows.end * input.length;
        input.values.get(terms).filter(|_| !self.rounds)
    }

    fn convert<'a>(self, rows: impl Iterator<Item = (&'a [f32], &'a mut [f32])>, scale: f32) {
        simd::vectorised(|| {
            for (values, terms) in rows {
                for (term, &value) in terms.iter_mut().zip(values) {
                    let scaled = scale * value;
                    *term = if self.rounds {
                        f32::from_bits(simd::bf16_bits(scaled) << 16)
                    } else {
                        scaled
                    };
                }
            }
        });
    }

    fn column(row: &[f32], first: usize, places: &mut [f32], width: usize) {
        let places = places.iter_mut().step_by(width);
        for (place, value) in places.zip(&row[first..]) {
            *place = *value;
        }
    }

    fn add(self, left: &[f32], panel: &Panel<f32>, sums: Sums<'_>) {
        Arch::new().dispatch(WideSums { left, panel, sums });
    }
}

struct WideSums<'a> {
    left: &'a [f32],
    panel: &'a Panel<f32>,
    sums: Sums<'a>,
}

impl WithSimd for WideSums<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        if self.panel.width == LANE {
            self.add::<S, 12, 1>(simd);
        } else {
            self.add::<S, 6, 2>(simd);
        }
    }
}

impl WideSums<'_> {
    /// Adds the products, in tiles of `HEIGHT` rows and `VECTORS` vectors.
    #[inline(always)]
    fn add<S: Simd, const HEIGHT: usize, const VECTORS: usize>(self, simd: S) {
        let Self { left, panel, sums } = self;
        sums.check(left, panel);
        let Sums {
            values,
            rows,
            stride,
            first,
        } = sums;
        let width = VECTORS * S::F32_LANES;
        let right = panel.values();
        for terms in parts(panel.terms) {
            let right = &right[terms.start * panel.width..terms.end * panel.width];
            for top in (0..rows).step_by(HEIGHT) {
                let left = &left[top * panel.terms..][..HEIGHT * panel.terms];
                for column in (0..panel.columns).step_by(width) {
                    let mut tile = [[simd.splat_f32s(0.0); VECTORS]; HEIGHT];
                    for (place, right) in terms.clone().zip(right.chunks_exact(panel.width)) {
                        let right = S::as_simd_f32s(&right[column..][..width]).0;
                        for (row, tile) in tile.iter_mut().enumerate() {
                            #[expect(unsafe_code, reason = "the loop has no bounds checks")]
                            // SAFETY: `left` has a row of `panel.terms` values for each row of the
                            // tile, and `place` is less than that.
                            let value = unsafe { *left.get_unchecked(row * panel.terms + place) };
                            let value = simd.splat_f32s(value);
                            for (sum, right) in tile.iter_mut().zip(right) {
                                *sum = simd.mul_add_e_f32s(value, *right, *sum);
                            }
                        }
                    }
                    let columns = width.min(panel.columns - column);
                    for (row, tile) in (top..rows).zip(&tile) {
                        let sums = &mut values[row * stride + first + column..][..columns];
                        for (sums, added) in sums.chunks_mut(S::F32_LANES).zip(tile) {
                            let sum = simd.add_f32s(simd.partial_load_f32s(sums), *added);
                            simd.partial_store_f32s(sums, sum);
                        }
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use pulp::Scalar;

    use super::*;

    /// The inputs are small integers, so that sums are exact in any order, on every instruction set
    /// that this machine supports.
    #[test]
    fn every_instruction_set_gives_the_exact_sums() {
        for (rows, columns, depth) in [(1, 1, 1), (12, 16, 7), (13, 31, 513), (25, 32, 2051)] {
            let mut left: Vec<f32> = (0..rows * depth).map(|i| (i % 7) as f32 - 3.0).collect();
            let right: Vec<f32> = (0..columns * depth).map(|i| (i % 5) as f32 - 2.0).collect();
            let panels = panels::<Wide>(&right, depth);
            let [panel] = &panels[..] else {
                panic!("{} panels", panels.len())
            };
            let stride = columns + 3;
            left.resize(rows.next_multiple_of(ROWS) * depth, 0.0);
            let sums = |add: &dyn Fn(WideSums<'_>)| {
                let mut values = vec![0.5; rows * stride];
                let sums = Sums {
                    values: &mut values,
                    rows,
                    stride,
                    first: 1,
                };
                let left = &left;
                add(WideSums { left, panel, sums });
                values
            };
            let exact: Vec<f32> = (0..rows * stride)
                .map(|index| {
                    let (row, column) = (index / stride, index % stride);
                    if !(1..=columns).contains(&column) {
                        return 0.5;
                    }
                    let left = left[row * depth..].iter();
                    let right = &right[(column - 1) * depth..][..depth];
                    0.5 + left.zip(right).map(|(a, b)| a * b).sum::<f32>()
                })
                .collect();
            assert_eq!(sums(&|it| Arch::new().dispatch(it)), exact);
            assert_eq!(sums(&|it| Scalar::vectorize(Scalar, it)), exact);
            #[cfg(target_arch = "x86_64")]
            if let Some(avx2) = pulp::x86::V3::try_new() {
                assert_eq!(sums(&|it| Simd::vectorize(avx2, it)), exact);
            }
        }
    }
}
