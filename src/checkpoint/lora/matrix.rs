//! Arithmetic on matrices in host memory, in f32.

use half::{bf16, f16};
use kiln_models::StoredDType;
use kiln_models::adapter::HostMatrix;
use rayon::prelude::*;

/// The values of a matrix as f32.
pub(super) fn to_f32(matrix: &HostMatrix) -> Vec<f32> {
    let bytes = &matrix.bytes;
    match matrix.dtype {
        StoredDType::F32 => values(bytes, f32::from_le_bytes),
        StoredDType::F16 => values(bytes, |it| f16::from_le_bytes(it).to_f32()),
        StoredDType::Bf16 => values(bytes, |it| bf16::from_le_bytes(it).to_f32()),
        StoredDType::Other(_) => Vec::new(),
    }
}

fn values<const N: usize>(bytes: &[u8], value: impl Fn([u8; N]) -> f32) -> Vec<f32> {
    let (chunks, _) = bytes.as_chunks::<N>();
    chunks.iter().map(|it| value(*it)).collect()
}

/// Whether all values are finite: no exponent has all bits set.
pub(super) fn is_finite(matrix: &HostMatrix) -> bool {
    let bytes = &matrix.bytes;
    match matrix.dtype {
        StoredDType::F32 => {
            let exponent = 0x7f80_0000;
            none(bytes, |it| u32::from_le_bytes(it) & exponent == exponent)
        }
        StoredDType::F16 => exponents_fit(bytes, 0x7c00),
        StoredDType::Bf16 => exponents_fit(bytes, 0x7f80),
        StoredDType::Other(_) => false,
    }
}

fn exponents_fit(bytes: &[u8], exponent: u16) -> bool {
    none(bytes, |it| u16::from_le_bytes(it) & exponent == exponent)
}

/// Whether no value is as `is`. Looks at blocks of values, which is faster than to stop at the first.
fn none<const N: usize>(bytes: &[u8], is: impl Fn([u8; N]) -> bool) -> bool {
    const BLOCK: usize = 4096;
    let mut blocks = bytes.as_chunks::<N>().0.chunks(BLOCK);
    blocks.all(|block| !block.iter().fold(false, |found, it| found | is(*it)))
}

/// `a · b`
pub(super) fn product(a: &HostMatrix, b: &HostMatrix) -> HostMatrix {
    let ([rows, inner], columns) = (a.shape, b.shape[1]);
    let (a, b) = (to_f32(a), to_f32(b));
    let mut out = vec![0.0; rows * columns];
    if columns > 0 && inner > 0 {
        let rows = out.par_chunks_mut(columns).zip(a.par_chunks(inner));
        rows.for_each(|(out, a)| {
            for (a, b) in a.iter().zip(b.chunks(columns)) {
                for (out, b) in out.iter_mut().zip(b) {
                    *out += a * b;
                }
            }
        });
    }
    HostMatrix::from_f32([rows, columns], &out)
}

/// The products of each value of `a` and the value of `b` at its place.
pub(super) fn hadamard(a: &HostMatrix, b: &HostMatrix) -> HostMatrix {
    let values: Vec<f32> = (to_f32(a).iter().zip(to_f32(b)))
        .map(|(a, b)| a * b)
        .collect();
    HostMatrix::from_f32(a.shape, &values)
}

/// The Kronecker product of each row of `a` and the row of `b` at its place.
pub(super) fn row_products(a: &HostMatrix, b: &HostMatrix) -> HostMatrix {
    let ([rows, first], second) = (a.shape, b.shape[1]);
    let (a, b) = (to_f32(a), to_f32(b));
    let mut values = Vec::with_capacity(rows * first * second);
    for (a, b) in a.chunks(first.max(1)).zip(b.chunks(second.max(1))) {
        for a in a {
            values.extend(b.iter().map(|b| a * b));
        }
    }
    HostMatrix::from_f32([rows, first * second], &values)
}

/// The Kronecker product of each column of `a` and the column of `b` at its place.
pub(super) fn column_products(a: &HostMatrix, b: &HostMatrix) -> HostMatrix {
    let ([first, columns], second) = (a.shape, b.shape[0]);
    let (a, b) = (to_f32(a), to_f32(b));
    let mut values = Vec::with_capacity(first * second * columns);
    for a in a.chunks(columns.max(1)) {
        for b in b.chunks(columns.max(1)) {
            values.extend(a.iter().zip(b).map(|(a, b)| a * b));
        }
    }
    HostMatrix::from_f32([first * second, columns], &values)
}

/// The Kronecker product of `a` and `b`.
pub(super) fn kronecker(a: &HostMatrix, b: &HostMatrix) -> HostMatrix {
    let ([_, columns], [_, b_columns]) = (a.shape, b.shape);
    let shape = [a.shape[0] * b.shape[0], columns * b_columns];
    let (a, b) = (to_f32(a), to_f32(b));
    let mut values = Vec::with_capacity(shape[0] * shape[1]);
    for a in a.chunks(columns.max(1)) {
        for b in b.chunks(b_columns.max(1)) {
            for a in a {
                values.extend(b.iter().map(|b| a * b));
            }
        }
    }
    HostMatrix::from_f32(shape, &values)
}

/// Consecutive rows of a matrix, without a copy.
pub(super) fn rows(matrix: &HostMatrix, start: usize, count: usize) -> HostMatrix {
    let row = row_bytes(matrix);
    HostMatrix {
        shape: [count, matrix.shape[1]],
        dtype: matrix.dtype.clone(),
        bytes: matrix.bytes.slice(start * row..(start + count) * row),
    }
}

/// Consecutive columns of a matrix.
pub(super) fn columns(matrix: &HostMatrix, start: usize, count: usize) -> HostMatrix {
    let row = row_bytes(matrix);
    let size = row / matrix.shape[1].max(1);
    let range = start * size..(start + count) * size;
    let rows = matrix.bytes.chunks(row.max(1));
    let bytes: Vec<u8> = rows.flat_map(|it| &it[range.clone()]).copied().collect();
    HostMatrix {
        shape: [matrix.shape[0], count],
        dtype: matrix.dtype.clone(),
        bytes: bytes.into(),
    }
}

/// Whether all values are 0.
pub(super) fn is_zero(matrix: &HostMatrix) -> bool {
    to_f32(matrix).iter().all(|it| *it == 0.0)
}

fn row_bytes(matrix: &HostMatrix) -> usize {
    matrix.bytes.len() / matrix.shape[0].max(1)
}
