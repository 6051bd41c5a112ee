//! How weights reach the models: by name, from whoever can read the files.

use burn_tensor::DType;
use bytes::Bytes;

/// Element type of a stored tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StoredDType {
    F32,
    F16,
    Bf16,
    /// A type the models cannot read, by the name its file gives it. Such a tensor may be present
    /// as long as nothing asks for it.
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

    /// Whether elements are stored as a device has them in this type.
    pub(crate) fn is(&self, dtype: DType) -> bool {
        matches!(
            (self, dtype),
            (Self::F32, DType::F32) | (Self::F16, DType::F16) | (Self::Bf16, DType::BF16)
        )
    }
}

/// What is known of a tensor without reading it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    pub shape: Vec<usize>,
    pub dtype: StoredDType,
    /// The file it lies in, for messages.
    pub file: String,
}

/// The weights of one component (text encoder, transformer or VAE), by tensor name.
///
/// Implementations read lazily: [`TensorSource::bytes`] is called once for each tensor that is
/// loaded, and again for those that are computed from and let go of (the modulation weights).
pub trait TensorSource: std::fmt::Debug + Send + Sync {
    /// Where the weights come from (a folder), for messages.
    fn origin(&self) -> String;

    /// Every name the component's files hold.
    fn names(&self) -> Vec<String>;

    /// Shape, type and file of a tensor; `None` if there is no such name.
    fn info(&self, name: &str) -> Option<TensorInfo>;

    /// What there is for a tensor that must have this shape. A source that makes weights up makes
    /// them so; one that reads files has what [`TensorSource::info`] says.
    fn declare(&self, name: &str, _shape: &[usize]) -> Option<TensorInfo> {
        self.info(name)
    }

    /// The type that most of the weights are stored in, by bytes; `None` without readable ones.
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

    /// The tensor's elements in row-major order, little-endian. The bytes may lie in a memory map
    /// that is unmapped, page by page, when the last clone is dropped.
    ///
    /// # Panics
    /// If there is no such tensor: callers ask [`TensorSource::info`] first.
    fn bytes(&self, name: &str) -> Bytes;
}
