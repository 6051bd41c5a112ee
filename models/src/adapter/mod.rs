//! Adapters: changes of the transformer's linear layers, such as LoRAs, in one canonical form.
//!
//! An [`Adapter`] is plain data in host memory. Whoever reads adapter files maps their names to module
//! paths of the checkpoint, and their factors to [`Factors`]; nothing here knows a file format. A
//! [`Job`](crate::job::Job) names the adapters that it is generated with and the scale of each.

mod merged;
mod totals;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;

use crate::source::StoredDType;

pub use self::merged::MergedSource;
pub(crate) use self::totals::{TokenWork, Totals};

/// Identifies the content of an adapter within the process. An adapter that is read again gets
/// another id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct AdapterId(u64);

/// A linear layer that an adapter can change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdapterTarget {
    /// Path of the module in the checkpoint, such as `transformer_blocks.0.attn.to_out.0`: the
    /// tensor's name without `.weight`.
    pub path: String,
    pub d_in: usize,
    pub d_out: usize,
}

/// An adapter of the transformer. Two adapters are equal if they have the same id.
#[derive(Debug)]
pub struct Adapter {
    id: AdapterId,
    name: String,
    changes: BTreeMap<String, Change>,
    totals: Totals,
}

/// The change of the weight `[out, in]` of one linear layer: `scale · factors`, before the scale of the
/// request.
#[derive(Debug, Clone, PartialEq)]
pub struct Change {
    pub factors: Factors,
    /// For LoRA `alpha / rank`.
    pub scale: f32,
}

/// What a change is the product of.
#[derive(Debug, Clone, PartialEq)]
pub enum Factors {
    /// `up · down`: LoRA, and LoHa with the square of its rank.
    LowRank {
        /// `[rank, in]`
        down: HostMatrix,
        /// `[out, rank]`
        up: HostMatrix,
    },
    /// The Kronecker product of `left` `[a, b]` and `right` `[out / a, in / b]`: `LoKr`.
    Kronecker { left: HostMatrix, right: HostMatrix },
    /// The whole change, `[out, in]`.
    Dense(HostMatrix),
}

/// A matrix in host memory, row-major and little-endian.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostMatrix {
    pub shape: [usize; 2],
    /// One of the types that models read: see [`StoredDType::size`].
    pub dtype: StoredDType,
    pub bytes: Bytes,
}

impl HostMatrix {
    /// Rows and columns of f32 values.
    ///
    /// # Panics
    /// If the number of values is another.
    pub fn from_f32(shape: [usize; 2], values: &[f32]) -> Self {
        assert_eq!(
            values.len(),
            shape[0] * shape[1],
            "one value for each element"
        );
        let bytes: Vec<u8> = values.iter().flat_map(|it| it.to_le_bytes()).collect();
        Self {
            shape,
            dtype: StoredDType::F32,
            bytes: bytes.into(),
        }
    }
}

impl Factors {
    /// `[out, in]` of the layer that the factors fit.
    pub fn shape(&self) -> [usize; 2] {
        match self {
            Self::LowRank { down, up } => [up.shape[0], down.shape[1]],
            Self::Kronecker { left, right } => [
                left.shape[0] * right.shape[0],
                left.shape[1] * right.shape[1],
            ],
            Self::Dense(matrix) => matrix.shape,
        }
    }

    /// Rank of a [`Factors::LowRank`].
    pub fn rank(&self) -> Option<usize> {
        match self {
            Self::LowRank { down, .. } => Some(down.shape[0]),
            Self::Kronecker { .. } | Self::Dense(_) => None,
        }
    }

    /// The matrices.
    pub fn matrices(&self) -> impl Iterator<Item = &HostMatrix> {
        let (first, second) = match self {
            Self::LowRank { down, up } => (down, Some(up)),
            Self::Kronecker { left, right } => (left, Some(right)),
            Self::Dense(matrix) => (matrix, None),
        };
        std::iter::once(first).chain(second)
    }
}

impl Adapter {
    /// An adapter with these changes by module path. `name` is what messages call it.
    pub fn new(name: impl Into<String>, changes: BTreeMap<String, Change>) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self {
            id: AdapterId(NEXT.fetch_add(1, Ordering::Relaxed)),
            name: name.into(),
            totals: Totals::of_changes(&changes),
            changes,
        }
    }

    pub fn id(&self) -> AdapterId {
        self.id
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// The changes by path of their module.
    pub fn changes(&self) -> &BTreeMap<String, Change> {
        &self.changes
    }

    /// Bytes of all matrices in host memory.
    pub fn bytes(&self) -> usize {
        let matrices = self.changes.values().flat_map(|it| it.factors.matrices());
        matrices.map(|matrix| matrix.bytes.len()).sum()
    }

    /// Number of values in all matrices.
    pub fn parameters(&self) -> usize {
        let matrices = self.changes.values().flat_map(|it| it.factors.matrices());
        matrices.map(|it| it.shape[0] * it.shape[1]).sum()
    }

    /// Bytes that the adapter takes on a device, in a model whose weights have this many bytes each.
    pub fn device_bytes(&self, weight_size: usize) -> usize {
        self.parameters().saturating_mul(weight_size)
    }
}

impl PartialEq for Adapter {
    fn eq(&self, other: &Self) -> bool {
        self.id == other.id
    }
}

/// An adapter of a job.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterUse {
    pub adapter: Arc<Adapter>,
    /// Multiplies every change. Not 0: an adapter of scale 0 is left out.
    pub scale: f32,
}
