//! The interface that networks load their weights through: tensors by name, as stored bytes.
//!
//! kiln has its own loader and does not use burn-store, for these reasons (burn-store 0.21):
//!
//! - it reads one safetensors file and no index of shards, which published checkpoints have;
//! - it does not fail on stored tensors that no module uses;
//! - it fills whole modules, while kiln reads the transformer's modulation layers, a third of its
//!   weights, on demand and never keeps them on the device;
//! - it copies every tensor out of its memory map, while on backends that compute in the host's
//!   memory kiln uses the bytes of the map where they lie.

use std::fmt;
use std::sync::Arc;

use burn::tensor::DType;
use bytes::Bytes;

/// Element type of a stored tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StoredDType {
    F32,
    F16,
    Bf16,
    /// A type that the models cannot read, by its name in the file. Loading fails only if a network
    /// uses such a tensor.
    Other(String),
}

impl StoredDType {
    /// Bytes per element; `None` for a type the models do not read.
    pub fn size(&self) -> Option<usize> {
        match self {
            Self::F32 => Some(4),
            Self::F16 | Self::Bf16 => Some(2),
            Self::Other(_) => None,
        }
    }

    /// Whether elements of this type need no conversion to `dtype`.
    pub(crate) fn is(&self, dtype: DType) -> bool {
        matches!(
            (self, dtype),
            (Self::F32, DType::F32) | (Self::F16, DType::F16) | (Self::Bf16, DType::BF16)
        )
    }
}

/// Shape, type and file of a stored tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    pub shape: Vec<usize>,
    pub dtype: StoredDType,
    /// The file that holds the tensor, for messages.
    pub file: String,
}

/// A file of weights that changed, or could not be read, after it was opened.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{file} {problem} while it was in use: put the right file in its place and restart kiln")]
pub struct FileFault {
    /// The file's name, with its folder in the model's.
    pub file: String,
    pub problem: FileProblem,
}

/// What happened to a file of weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileProblem {
    Changed,
    Unreadable,
}

impl fmt::Display for FileProblem {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Changed => "changed",
            Self::Unreadable => "could not be read",
        })
    }
}

/// The weights of one component (text encoder, transformer or VAE), by tensor name.
///
/// Implementations should read lazily: [`TensorSource::bytes`] is called once for each tensor that is
/// loaded, and once per schedule for each tensor of the modulation layers.
pub trait TensorSource: std::fmt::Debug + Send + Sync {
    /// The folder or file that the weights come from, for messages.
    fn origin(&self) -> String;

    /// The names of all tensors in the component's files.
    fn names(&self) -> Vec<String>;

    /// Describes a tensor without reading it; `None` if there is no such name.
    fn info(&self, name: &str) -> Option<TensorInfo>;

    /// Describes the tensor that a network expects with this shape. A source that generates weights
    /// creates the tensor with this shape; by default this is [`TensorSource::info`].
    fn declare(&self, name: &str, _shape: &[usize]) -> Option<TensorInfo> {
        self.info(name)
    }

    /// The type that most bytes of the weights are stored in; `None` if no tensor is readable.
    fn main_dtype(&self) -> Option<StoredDType> {
        let mut bytes = [StoredDType::F32, StoredDType::Bf16, StoredDType::F16].map(|it| (it, 0));
        for info in self.names().iter().filter_map(|name| self.info(name)) {
            let size = info.dtype.size().unwrap_or(0) * info.shape.iter().product::<usize>();
            if let Some((_, sum)) = bytes.iter_mut().find(|(dtype, _)| *dtype == info.dtype) {
                *sum += size;
            }
        }
        let (dtype, bytes) = bytes.into_iter().max_by_key(|(_, bytes)| *bytes)?;
        (bytes > 0).then_some(dtype)
    }

    /// Reads the tensor's elements, in row-major order and little-endian. The bytes may lie in a
    /// memory map that is unmapped, page by page, when the last clone is dropped.
    ///
    /// # Panics
    /// If there is no such tensor: callers check [`TensorSource::info`] first.
    fn bytes(&self, name: &str) -> Bytes;

    /// Checks that no file has changed or failed since it was opened. Until this is checked, bytes
    /// that were read may be wrong.
    ///
    /// # Errors
    /// The first file that has.
    fn check_files(&self) -> Result<(), FileFault> {
        Ok(())
    }
}

/// The weights that are read after a model is loaded.
#[derive(Debug)]
pub(crate) struct WeightFiles {
    /// Read whenever a job starts.
    deferred: Arc<dyn TensorSource>,
    /// Read by every op, where they lie.
    in_place: Vec<Arc<dyn TensorSource>>,
}

impl WeightFiles {
    pub(crate) fn new(
        deferred: &Arc<dyn TensorSource>,
        in_place: &[&Arc<dyn TensorSource>],
    ) -> Self {
        Self {
            deferred: Arc::clone(deferred),
            in_place: in_place.iter().copied().cloned().collect(),
        }
    }

    /// Checks all files that may be read from now on.
    pub(crate) fn check(&self) -> Result<(), FileFault> {
        self.deferred.check_files()?;
        self.check_in_place()
    }

    /// Checks the files that a step and a decoding may have read.
    pub(crate) fn check_in_place(&self) -> Result<(), FileFault> {
        self.in_place
            .iter()
            .try_for_each(|source| source.check_files())
    }
}
