//! A source of weights that reports how much of it has been loaded.

use std::sync::Arc;

use bytes::Bytes;
use kiln_models::{FileFault, StoredDType, TensorInfo, TensorSource};

use super::Start;

/// Passes every call on, and adds the bytes of each tensor that a network takes to the progress.
#[derive(Debug)]
pub(super) struct Counted {
    source: Arc<dyn TensorSource>,
    start: Start,
}

impl Counted {
    pub(super) fn new(source: Arc<dyn TensorSource>, start: &Start) -> Self {
        Self {
            source,
            start: start.clone(),
        }
    }
}

impl TensorSource for Counted {
    fn origin(&self) -> String {
        self.source.origin()
    }

    fn names(&self) -> Vec<String> {
        self.source.names()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        self.source.info(name)
    }

    /// Every tensor is declared once while a model is loaded, also one that is read later.
    fn declare(&self, name: &str, shape: &[usize]) -> Option<TensorInfo> {
        let info = self.source.declare(name, shape)?;
        self.start.add_loaded(size(&info));
        Some(info)
    }

    fn main_dtype(&self) -> Option<StoredDType> {
        self.source.main_dtype()
    }

    fn bytes(&self, name: &str) -> Bytes {
        self.source.bytes(name)
    }

    fn check_files(&self) -> Result<(), FileFault> {
        self.source.check_files()
    }
}

/// Bytes of all tensors of a source; 0 if the source makes its tensors when they are declared.
pub(super) fn total_bytes(source: &dyn TensorSource) -> u64 {
    let names = source.names();
    let infos = names.iter().filter_map(|name| source.info(name));
    infos.map(|info| size(&info)).sum()
}

fn size(info: &TensorInfo) -> u64 {
    let elements: usize = info.shape.iter().product();
    (elements * info.dtype.size().unwrap_or(0)) as u64
}
