//! How weights reach the models: by name, from whoever can read the files.

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

    /// The tensor's elements in row-major order, little-endian. The bytes may lie in a memory map
    /// that is unmapped, page by page, when the last clone is dropped.
    ///
    /// # Panics
    /// If there is no such tensor: callers ask [`TensorSource::info`] first.
    fn bytes(&self, name: &str) -> Bytes;
}
