//! Matrix products over strided views of slices, by the crate gemm.

use std::ops::Range;

use gemm::Parallelism;

/// A strided matrix inside a slice.
#[derive(Clone, Copy)]
pub(super) struct Matrix<'a> {
    values: &'a [f32],
    rows: usize,
    columns: usize,
    row_stride: usize,
    column_stride: usize,
}

impl<'a> Matrix<'a> {
    /// A matrix of `rows` rows of `columns` consecutive values, with rows `row_stride` values apart.
    pub(super) fn rows(values: &'a [f32], rows: usize, columns: usize, row_stride: usize) -> Self {
        let matrix = Self {
            values,
            rows,
            columns,
            row_stride,
            column_stride: 1,
        };
        assert!(
            matrix.end() <= values.len(),
            "a matrix reaches outside its slice"
        );
        matrix
    }

    pub(super) fn transposed(self) -> Self {
        Self {
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
            ..self
        }
    }

    /// Index after the last value.
    fn end(&self) -> usize {
        if self.rows == 0 || self.columns == 0 {
            return 0;
        }
        (self.rows - 1) * self.row_stride + (self.columns - 1) * self.column_stride + 1
    }
}

/// Whether a product overwrites its output or is added to it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Output {
    Overwrite,
    Add,
}

/// Largest number of terms that are summed before the sum is added to the output. gemm chooses the
/// number by the shape of the product otherwise, and so the rounding of a row would depend on the
/// number of rows. With so few terms it sums all of them.
const MAX_TERMS: usize = 512;

/// Largest number of output values that gemm computes in another order of the terms.
const HORIZONTAL: usize = 16 * 16;

/// Smallest number of rows, with this number of columns, whose sums gemm computes in the same order
/// as those of any larger number.
pub(super) fn least_rows(columns: usize) -> usize {
    HORIZONTAL / columns.max(1) + 1
}

/// The parts of `depth` terms that are summed one after the other, of at most [`MAX_TERMS`] terms.
pub(super) fn parts(depth: usize) -> impl Iterator<Item = Range<usize>> {
    let count = depth.div_ceil(MAX_TERMS).max(1);
    let part = depth.div_ceil(count);
    (0..count).map(move |index| index * part..depth.min((index + 1) * part))
}

/// Computes `output = left · right`, or `output += left · right`. `output` is row-major and
/// contiguous. A row does not depend on the other rows, nor on their number if that is at least
/// [`least_rows`].
pub(super) fn product(
    output: &mut [f32],
    left: Matrix<'_>,
    right: Matrix<'_>,
    mode: Output,
    threads: Parallelism,
) {
    let (m, n, depth) = (left.rows, right.columns, left.columns);
    assert_eq!(depth, right.rows, "inner dimensions of a product differ");
    assert!(m * n <= output.len(), "a product does not fit its output");
    for terms in parts(depth) {
        let k = terms.len();
        let is_added = mode == Output::Add || terms.start > 0;
        #[expect(unsafe_code, reason = "gemm takes raw pointers")]
        // SAFETY: `Matrix` checked that its strides stay inside its slice, the terms are some of its
        // columns or rows, the output's size is checked above, and `&mut` rules out overlap.
        unsafe {
            gemm::gemm(
                m,
                n,
                k,
                output.as_mut_ptr(),
                1,
                n as isize,
                is_added,
                left.values.as_ptr().add(terms.start * left.column_stride),
                left.column_stride as isize,
                left.row_stride as isize,
                right.values.as_ptr().add(terms.start * right.row_stride),
                right.column_stride as isize,
                right.row_stride as isize,
                1.0,
                1.0,
                false,
                false,
                false,
                threads,
            );
        }
    }
}
