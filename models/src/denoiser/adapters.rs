//! The adapters on one device: an LRU bounded by bytes, in which adapters of started jobs stay.

use std::sync::Arc;

use kiln_ops::FusedOps;

use crate::adapter::AdapterId;
use crate::pipeline::CacheUse;
use crate::transformer::LoadedAdapter;

/// The adapters on one device. An adapter that something besides the cache holds is never dropped, and
/// its bytes count as long as it is held.
#[derive(Debug)]
pub(super) struct AdapterCache<B: FusedOps> {
    /// The least recently used first.
    kept: Vec<Arc<LoadedAdapter<B>>>,
    counts: CacheUse,
}

impl<B: FusedOps> AdapterCache<B> {
    pub(super) fn new(max_bytes: usize) -> Self {
        Self {
            kept: Vec::new(),
            counts: CacheUse {
                max_bytes,
                ..CacheUse::default()
            },
        }
    }

    /// The adapter of this id, or the one that `load` loads. Before that, adapters that nothing holds are
    /// dropped until `bytes` more fit. If adapters in use leave no room, the bound is exceeded: callers
    /// start no job whose adapters do not fit.
    pub(super) fn get_or_load(
        &mut self,
        id: AdapterId,
        bytes: usize,
        load: impl FnOnce() -> LoadedAdapter<B>,
    ) -> Arc<LoadedAdapter<B>> {
        if let Some(index) = self.kept.iter().position(|kept| kept.id() == id) {
            self.counts.hits += 1;
            let found = self.kept.remove(index);
            self.kept.push(Arc::clone(&found));
            return found;
        }
        self.counts.misses += 1;
        self.make_room(bytes);
        let loaded = Arc::new(load());
        self.kept.push(Arc::clone(&loaded));
        loaded
    }

    /// Whether the adapter of this id is on the device.
    pub(super) fn holds(&self, id: AdapterId) -> bool {
        self.kept.iter().any(|kept| kept.id() == id)
    }

    /// Whether `bytes` more fit beside the adapters in use.
    pub(super) fn has_room(&self, bytes: usize) -> bool {
        let in_use = self.kept.iter().filter(|kept| is_in_use(kept));
        let in_use: usize = in_use.map(|kept| kept.bytes()).sum();
        in_use.saturating_add(bytes) <= self.counts.max_bytes
    }

    fn make_room(&mut self, bytes: usize) {
        while self.bytes().saturating_add(bytes) > self.counts.max_bytes {
            let Some(oldest) = self.kept.iter().position(|kept| !is_in_use(kept)) else {
                return;
            };
            self.kept.remove(oldest);
            self.counts.evictions += 1;
        }
    }

    /// Drops the adapters that nothing holds.
    pub(super) fn clear(&mut self) {
        self.kept.retain(is_in_use);
    }

    fn bytes(&self) -> usize {
        self.kept.iter().map(|kept| kept.bytes()).sum()
    }

    /// The cache's size, bound, hits and misses.
    pub(super) fn counts(&self) -> CacheUse {
        CacheUse {
            entries: self.kept.len(),
            bytes: self.bytes(),
            ..self.counts
        }
    }
}

fn is_in_use<B: FusedOps>(kept: &Arc<LoadedAdapter<B>>) -> bool {
    Arc::strong_count(kept) > 1
}
