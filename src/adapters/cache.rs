//! Weights of adapters in host memory, bounded by bytes.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};

use kiln_models::adapter::Adapter;

use super::lock;

/// Adapters by the id of their place on the list.
///
/// The bound holds for all weights together: those that are kept, and those in use, which are never
/// dropped. The adapter that was used last is dropped last.
#[derive(Debug, Default)]
pub(super) struct HostCache {
    max_bytes: u64,
    state: Mutex<State>,
    /// Notified when a file has been read, or could not be.
    read: Condvar,
}

/// What a cache of adapters holds, and has done since the start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CacheUse {
    /// Adapters in memory, also those that are in use and not kept.
    pub entries: usize,
    /// Bytes of their weights.
    pub bytes: u64,
    pub max_bytes: u64,
    /// Times that an adapter was in memory already.
    pub hits: u64,
    /// Times that an adapter was not in memory.
    pub misses: u64,
    /// Files that were read whole.
    pub loads: u64,
    /// Adapters that were dropped to make room for others.
    pub evictions: u64,
}

#[derive(Debug, Default)]
struct State {
    slots: HashMap<u64, Slot>,
    /// Counts uses.
    clock: u64,
    counts: CacheUse,
}

#[derive(Debug)]
enum Slot {
    /// A thread reads the file.
    Reading {
        bytes: u64,
    },
    Read(Entry),
}

#[derive(Debug)]
struct Entry {
    adapter: Weak<Adapter>,
    /// `None` if it lives as long as it is in use only.
    kept: Option<Arc<Adapter>>,
    bytes: u64,
    /// When it was last used.
    used: u64,
}

impl Entry {
    fn is_in_use(&self) -> bool {
        self.adapter.strong_count() > usize::from(self.kept.is_some())
    }
}

impl Slot {
    /// Bytes that cannot be freed now.
    fn pinned(&self) -> u64 {
        match self {
            Self::Reading { bytes } => *bytes,
            Self::Read(entry) if entry.is_in_use() => entry.bytes,
            Self::Read(_) => 0,
        }
    }
}

impl State {
    /// Drops the adapters that are not in use, those first that were used longest ago, until there is
    /// room for as many bytes. Whether there is.
    fn make_room(&mut self, bytes: u64, max_bytes: u64) -> bool {
        self.slots.retain(|_, slot| match slot {
            Slot::Read(entry) => entry.adapter.strong_count() > 0,
            Slot::Reading { .. } => true,
        });
        while self.bytes().saturating_add(bytes) > max_bytes {
            let unused = self.slots.iter().filter_map(|(id, slot)| match slot {
                Slot::Read(entry) if !entry.is_in_use() => Some((entry.used, *id)),
                _ => None,
            });
            let Some((_, oldest)) = unused.min() else {
                return false;
            };
            self.slots.remove(&oldest);
            self.counts.evictions += 1;
        }
        true
    }

    /// Bytes of all adapters in memory.
    fn bytes(&self) -> u64 {
        let bytes = self.slots.values().map(|slot| match slot {
            Slot::Reading { bytes } => *bytes,
            Slot::Read(entry) if entry.adapter.strong_count() > 0 => entry.bytes,
            Slot::Read(_) => 0,
        });
        bytes.sum()
    }

    /// An adapter that is in memory.
    fn find(&mut self, id: u64) -> Option<Arc<Adapter>> {
        let Some(Slot::Read(entry)) = self.slots.get_mut(&id) else {
            return None;
        };
        let adapter = entry.adapter.upgrade()?;
        self.clock += 1;
        entry.used = self.clock;
        self.counts.hits += 1;
        Some(adapter)
    }

    fn is_reading(&self, id: u64) -> bool {
        matches!(self.slots.get(&id), Some(Slot::Reading { .. }))
    }
}

/// A file that is being read. Dropping it lets other threads read the file if this one has not.
struct Reading<'a> {
    cache: &'a HostCache,
    id: u64,
}

impl Drop for Reading<'_> {
    fn drop(&mut self) {
        let mut state = self.cache.lock();
        if state.is_reading(self.id) {
            state.slots.remove(&self.id);
        }
        drop(state);
        self.cache.read.notify_all();
    }
}

impl HostCache {
    pub(super) fn new(max_bytes: u64) -> Self {
        Self {
            max_bytes,
            ..Self::default()
        }
    }

    /// The adapter with this id, or what `read` returns. Of several threads that want it at once, one
    /// reads it. `bytes` is the expected size.
    pub(super) fn get<E>(
        &self,
        id: u64,
        bytes: u64,
        read: impl FnOnce() -> Result<Adapter, E>,
    ) -> Result<Arc<Adapter>, E> {
        let mut state = self.lock();
        while state.is_reading(id) {
            let woken = self.read.wait(state);
            state = woken.unwrap_or_else(PoisonError::into_inner);
        }
        if let Some(adapter) = state.find(id) {
            return Ok(adapter);
        }
        state.counts.misses += 1;
        state.slots.remove(&id);
        state.make_room(bytes, self.max_bytes);
        state.slots.insert(id, Slot::Reading { bytes });
        drop(state);

        let reading = Reading { cache: self, id };
        let adapter = Arc::new(read()?);
        let bytes = adapter.bytes() as u64;
        let mut state = self.lock();
        state.slots.remove(&id);
        let fits = state.make_room(bytes, self.max_bytes);
        state.clock += 1;
        let entry = Entry {
            adapter: Arc::downgrade(&adapter),
            kept: fits.then(|| Arc::clone(&adapter)),
            bytes,
            used: state.clock,
        };
        state.counts.loads += 1;
        state.slots.insert(id, Slot::Read(entry));
        drop(state);
        drop(reading);
        Ok(adapter)
    }

    /// Whether adapters of these sizes, by id, fit together beside those in use.
    pub(super) fn has_room(&self, wanted: &BTreeMap<u64, u64>) -> bool {
        let state = self.lock();
        let others = state
            .slots
            .iter()
            .filter(|(id, _)| !wanted.contains_key(id));
        let pinned: u64 = others.map(|(_, slot)| slot.pinned()).sum();
        let wanted: u64 = wanted.values().sum();
        pinned == 0 || pinned.saturating_add(wanted) <= self.max_bytes
    }

    /// Keeps the adapter no longer than it is in use.
    pub(super) fn forget(&self, id: u64) {
        let mut state = self.lock();
        if let Some(Slot::Read(entry)) = state.slots.get_mut(&id) {
            entry.kept = None;
        }
    }

    pub(super) fn used(&self) -> CacheUse {
        let state = self.lock();
        let is_alive = |slot: &&Slot| match slot {
            Slot::Read(entry) => entry.adapter.strong_count() > 0,
            Slot::Reading { .. } => false,
        };
        CacheUse {
            entries: state.slots.values().filter(is_alive).count(),
            bytes: state.bytes(),
            max_bytes: self.max_bytes,
            ..state.counts
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}
