//! Adapters for tests, and the adapter cache of a [`FakePipeline`](super::FakePipeline).

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::adapter::{Adapter, AdapterId, AdapterUse, Change, Factors, HostMatrix};
use crate::pipeline::{CacheUse, PipelineError};

/// An adapter of this many values, all 0: the whole change of one layer.
pub fn adapter(name: &str, values: usize) -> Arc<Adapter> {
    let matrix = HostMatrix::from_f32([1, values], &vec![0.0; values]);
    let change = Change {
        factors: Factors::Dense(matrix),
        scale: 1.0,
    };
    let changes = BTreeMap::from([("img_in".to_owned(), change)]);
    Arc::new(Adapter::new(name, changes))
}

/// Uses of adapters with a scale of 1.
pub fn uses<'a>(adapters: impl IntoIterator<Item = &'a Arc<Adapter>>) -> Vec<AdapterUse> {
    let used = |adapter: &Arc<Adapter>| AdapterUse {
        adapter: Arc::clone(adapter),
        scale: 1.0,
    };
    adapters.into_iter().map(used).collect()
}

/// The adapters on a fake device: those that were used last, within a number of bytes.
#[derive(Debug)]
pub(super) struct FakeAdapters {
    /// The one that was used last comes last.
    held: Vec<Arc<Adapter>>,
    weight_size: usize,
    counts: CacheUse,
}

impl FakeAdapters {
    pub(super) fn new(max_bytes: usize, weight_size: usize) -> Self {
        Self {
            held: Vec::new(),
            weight_size,
            counts: CacheUse {
                max_bytes,
                ..CacheUse::default()
            },
        }
    }

    /// Brings adapters onto the device, and calls `upload` before each upload. False if one does not fit
    /// beside those that are `in_use`.
    pub(super) fn load(
        &mut self,
        adapters: &[AdapterUse],
        in_use: &[AdapterId],
        mut upload: impl FnMut(&Adapter) -> Result<(), PipelineError>,
    ) -> Result<bool, PipelineError> {
        for used in adapters {
            let adapter = &used.adapter;
            if let Some(index) = self.held.iter().position(|held| held == adapter) {
                let held = self.held.remove(index);
                self.held.push(held);
                self.counts.hits += 1;
                continue;
            }
            self.counts.misses += 1;
            let keeps = |id: AdapterId| {
                in_use.contains(&id) || adapters.iter().any(|it| it.adapter.id() == id)
            };
            let bytes = adapter.device_bytes(self.weight_size);
            while self.bytes().saturating_add(bytes) > self.counts.max_bytes {
                let Some(unused) = self.held.iter().position(|held| !keeps(held.id())) else {
                    return Ok(false);
                };
                self.held.remove(unused);
                self.counts.evictions += 1;
            }
            upload(adapter)?;
            self.held.push(Arc::clone(adapter));
        }
        Ok(true)
    }

    /// Drops the adapters that are not in use.
    pub(super) fn drop_unused(&mut self, in_use: &[AdapterId]) {
        self.held.retain(|held| in_use.contains(&held.id()));
    }

    fn bytes(&self) -> usize {
        let bytes = self.held.iter();
        bytes.map(|it| it.device_bytes(self.weight_size)).sum()
    }

    pub(super) fn counts(&self) -> CacheUse {
        CacheUse {
            entries: self.held.len(),
            bytes: self.bytes(),
            ..self.counts
        }
    }
}
