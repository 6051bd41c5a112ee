//! Matrix products over strided views of slices, by the crate gemm.

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

/// Computes `output += left · right`. `output` is row-major and contiguous.
pub(super) fn product(
    output: &mut [f32],
    left: Matrix<'_>,
    right: Matrix<'_>,
    threads: Parallelism,
) {
    let (m, n, k) = (left.rows, right.columns, left.columns);
    assert_eq!(k, right.rows, "inner dimensions of a product differ");
    assert!(m * n <= output.len(), "a product does not fit its output");
    #[expect(unsafe_code, reason = "gemm takes raw pointers")]
    // SAFETY: `Matrix` checked that its strides stay inside its slice, the output's size is
    // checked above, and `&mut` rules out overlap.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            output.as_mut_ptr(),
            1,
            n as isize,
            true,
            left.values.as_ptr(),
            left.column_stride as isize,
            left.row_stride as isize,
            right.values.as_ptr(),
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
