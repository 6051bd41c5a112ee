//! Weights with an adapter added to them when they are read.

use std::sync::Arc;

use bytes::Bytes;
use gemm::Parallelism;
use half::{bf16, f16};
use rayon::prelude::*;

use super::{Adapter, Change, Factors, HostMatrix};
use crate::source::{FileFault, StoredDType, TensorInfo, TensorSource};

/// Elements that one task adds to: their f32 values stay in a core's cache.
const ELEMENTS_AT_ONCE: usize = 1 << 17;

/// The weights of a component with one adapter merged into them: `weight + scale · change`, computed
/// in f32 and not rounded, so that the conversion to the model's dtype rounds once.
///
/// A weight is merged whenever it is read. Nothing is kept, also not of the layers that are read once
/// per schedule.
#[derive(Debug)]
pub struct MergedSource {
    base: Arc<dyn TensorSource>,
    adapter: Arc<Adapter>,
    scale: f32,
}

impl MergedSource {
    /// `scale` multiplies every change of the adapter. The paths and shapes of the changes are those
    /// of linear layers of the component.
    pub fn new(base: Arc<dyn TensorSource>, adapter: Arc<Adapter>, scale: f32) -> Self {
        Self {
            base,
            adapter,
            scale,
        }
    }

    /// The change of the tensor of this name, which is a linear layer's weight.
    fn change(&self, name: &str) -> Option<&Change> {
        let path = name.strip_suffix(".weight")?;
        self.adapter.changes().get(path)
    }

    /// A merged weight is f32, whatever the stored one is.
    fn merged_info(&self, name: &str, mut info: TensorInfo) -> TensorInfo {
        if self.change(name).is_some() && info.dtype.size().is_some() {
            info.dtype = StoredDType::F32;
        }
        info
    }
}

impl TensorSource for MergedSource {
    fn origin(&self) -> String {
        self.base.origin()
    }

    fn names(&self) -> Vec<String> {
        self.base.names()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        Some(self.merged_info(name, self.base.info(name)?))
    }

    fn declare(&self, name: &str, shape: &[usize]) -> Option<TensorInfo> {
        Some(self.merged_info(name, self.base.declare(name, shape)?))
    }

    /// The type of the weights before they are merged.
    fn main_dtype(&self) -> Option<StoredDType> {
        self.base.main_dtype()
    }

    /// # Panics
    /// If there is no such tensor, or the adapter's change of it has another shape.
    fn bytes(&self, name: &str) -> Bytes {
        let stored = self.base.bytes(name);
        let (Some(change), Some(info)) = (self.change(name), self.base.info(name)) else {
            return stored;
        };
        assert_eq!(
            info.shape,
            change.factors.shape(),
            "`{name}` and its change have different shapes"
        );
        merge(&stored, &info.dtype, change, self.scale)
    }

    fn check_files(&self) -> Result<(), FileFault> {
        self.base.check_files()
    }
}

/// Adds a change to the weight `[out, in]` in `stored`. Returns f32 values.
fn merge(stored: &Bytes, dtype: &StoredDType, change: &Change, scale: f32) -> Bytes {
    let [rows, columns] = change.factors.shape();
    let delta = Delta::new(&change.factors, change.scale * scale);
    let at_once = (ELEMENTS_AT_ONCE / columns.max(1)).clamp(1, rows.max(1));
    let size = dtype.size().expect("the dtype was checked at load");
    let mut merged = vec![0; rows * columns * size_of::<f32>()];
    let parts = merged
        .par_chunks_mut((at_once * columns * size_of::<f32>()).max(1))
        .zip(stored.par_chunks((at_once * columns * size).max(1)))
        .enumerate();
    parts.for_each_init(Vec::new, |values, (index, (to, from))| {
        values.clear();
        widen(from, dtype, values);
        delta.add(index * at_once, values);
        for (to, value) in to.as_chunks_mut().0.iter_mut().zip(values.iter()) {
            *to = value.to_le_bytes();
        }
    });
    merged.into()
}

/// The factors of a change in f32, with the scale.
enum Delta {
    LowRank {
        down: Vec<f32>,
        up: Vec<f32>,
        rank: usize,
        columns: usize,
        scale: f32,
    },
    Kronecker {
        /// With the scale.
        left: Vec<f32>,
        right: Vec<f32>,
        /// Columns of both.
        columns: [usize; 2],
        right_rows: usize,
    },
    Dense {
        values: Vec<f32>,
        columns: usize,
        scale: f32,
    },
}

impl Delta {
    fn new(factors: &Factors, scale: f32) -> Self {
        match factors {
            Factors::LowRank { down, up } => Self::LowRank {
                rank: down.shape[0],
                columns: down.shape[1],
                down: widened(down),
                up: widened(up),
                scale,
            },
            Factors::Kronecker { left, right } => Self::Kronecker {
                left: widened(left).iter().map(|value| value * scale).collect(),
                columns: [left.shape[1], right.shape[1]],
                right: widened(right),
                right_rows: right.shape[0],
            },
            Factors::Dense(matrix) => Self::Dense {
                values: widened(matrix),
                columns: matrix.shape[1],
                scale,
            },
        }
    }

    /// Adds the rows from `first` on to `values`, which has whole rows.
    fn add(&self, first: usize, values: &mut [f32]) {
        match self {
            Self::LowRank {
                down,
                up,
                rank,
                columns,
                scale,
            } => add_product(values, &up[first * rank..], down, [*rank, *columns], *scale),
            Self::Kronecker {
                left,
                right,
                columns: [left_columns, columns],
                right_rows,
            } => {
                for (row, values) in values.chunks_mut(left_columns * columns).enumerate() {
                    let (i, j) = ((first + row) / right_rows, (first + row) % right_rows);
                    let left = &left[i * left_columns..(i + 1) * left_columns];
                    let right = &right[j * columns..(j + 1) * columns];
                    for (left, values) in left.iter().zip(values.chunks_mut(*columns)) {
                        let added = values.iter_mut().zip(right);
                        added.for_each(|(value, right)| *value += left * right);
                    }
                }
            }
            Self::Dense {
                values: dense,
                columns,
                scale,
            } => {
                let added = values.iter_mut().zip(&dense[first * columns..]);
                added.for_each(|(value, change)| *value += scale * change);
            }
        }
    }
}

/// Adds `scale · up · down` to `values` `[rows, columns]`: `up` begins with `[rows, rank]`, `down` is
/// `[rank, columns]`.
fn add_product(
    values: &mut [f32],
    up: &[f32],
    down: &[f32],
    [rank, columns]: [usize; 2],
    scale: f32,
) {
    let rows = values.len() / columns.max(1);
    assert!(rows * rank <= up.len() && rank * columns <= down.len());
    #[expect(unsafe_code, reason = "gemm takes raw pointers")]
    // SAFETY: the three row-major matrices have the sizes that are checked above, and `&mut` rules
    // out overlap.
    unsafe {
        gemm::gemm(
            rows,
            columns,
            rank,
            values.as_mut_ptr(),
            1,
            columns as isize,
            true,
            up.as_ptr(),
            1,
            rank as isize,
            down.as_ptr(),
            1,
            columns as isize,
            1.0,
            scale,
            false,
            false,
            false,
            Parallelism::None,
        );
    }
}

fn widened(matrix: &HostMatrix) -> Vec<f32> {
    let mut values = Vec::with_capacity(matrix.shape[0] * matrix.shape[1]);
    widen(&matrix.bytes, &matrix.dtype, &mut values);
    values
}

/// Appends stored elements as f32.
fn widen(bytes: &[u8], dtype: &StoredDType, values: &mut Vec<f32>) {
    let pairs = || bytes.as_chunks::<2>().0.iter();
    match dtype {
        StoredDType::F32 => {
            let elements = bytes.as_chunks::<4>().0.iter();
            values.extend(elements.map(|it| f32::from_le_bytes(*it)));
        }
        StoredDType::F16 => values.extend(pairs().map(|it| f16::from_le_bytes(*it).to_f32())),
        StoredDType::Bf16 => values.extend(pairs().map(|it| bf16::from_le_bytes(*it).to_f32())),
        StoredDType::Other(_) => unreachable!("checked to be a readable type"),
    }
}

#[cfg(test)]
mod tests;
