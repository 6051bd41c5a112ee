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

    /// Takes an adapter out of the cache. It lives on as long as it is in use, and is not counted any more.
    pub(super) fn forget(&self, id: u64) {
        let mut state = self.lock();
        if let Some(Slot::Read(_)) = state.slots.get(&id) {
            state.slots.remove(&id);
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

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::thread;
    use std::time::Duration;

    use kiln_models::adapter::{Change, Factors, HostMatrix};

    use super::*;

    /// An adapter of 4 bytes for each value.
    fn adapter(values: usize) -> Adapter {
        let matrix = HostMatrix::from_f32([1, values], &vec![1.0; values]);
        let change = Change {
            factors: Factors::Dense(matrix),
            scale: 1.0,
        };
        Adapter::new("a", BTreeMap::from([("x".to_owned(), change)]))
    }

    fn get(cache: &HostCache, id: u64, values: usize) -> Arc<Adapter> {
        let read = || Ok::<_, Infallible>(adapter(values));
        match cache.get(id, 4 * values as u64, read) {
            Ok(adapter) => adapter,
        }
    }

    #[test]
    fn the_adapter_that_was_used_last_is_dropped_last() {
        let cache = HostCache::new(80);
        for id in [1, 2, 1, 3, 1, 2] {
            get(&cache, id, 10);
        }
        let expected = CacheUse {
            entries: 2,
            bytes: 80,
            max_bytes: 80,
            hits: 2,
            misses: 4,
            loads: 4,
            evictions: 2,
        };
        assert_eq!(cache.used(), expected);
    }

    #[test]
    fn an_adapter_in_use_is_never_dropped() {
        let cache = HostCache::new(80);
        let first = get(&cache, 1, 10);
        get(&cache, 2, 10);
        get(&cache, 3, 10);
        assert!(Arc::ptr_eq(&first, &get(&cache, 1, 10)));
        assert_eq!(cache.used().bytes, 80);
    }

    #[test]
    fn without_room_an_adapter_is_shared_while_it_is_in_use_and_then_freed() {
        let cache = HostCache::new(80);
        let held = [get(&cache, 1, 10), get(&cache, 2, 10)];
        let third = get(&cache, 3, 10);
        assert!(Arc::ptr_eq(&third, &get(&cache, 3, 10)));
        assert_eq!((cache.used().entries, cache.used().bytes), (3, 120));
        drop(third);
        assert_eq!((cache.used().entries, cache.used().bytes), (2, 80));
        drop(held);
        get(&cache, 3, 10);
        assert_eq!((cache.used().entries, cache.used().bytes), (2, 80));
        // Larger than the cache.
        let large = get(&cache, 4, 100);
        assert_eq!((cache.used().entries, cache.used().bytes), (1, 400));
        drop(large);
        assert_eq!((cache.used().entries, cache.used().bytes), (0, 0));
    }

    #[test]
    fn there_is_room_beside_what_is_in_use() {
        let cache = HostCache::new(80);
        let room = |wanted: &[(u64, u64)]| cache.has_room(&wanted.iter().copied().collect());
        assert!(room(&[(1, 400)]));
        let first = get(&cache, 1, 10);
        get(&cache, 2, 10);
        assert!(room(&[(3, 40)]) && room(&[(1, 40), (3, 40)]));
        assert!(!room(&[(3, 41)]) && !room(&[(2, 40), (3, 40)]));
        drop(first);
        assert!(room(&[(3, 41)]));
    }

    #[test]
    fn threads_that_want_the_same_adapter_read_it_once() {
        let (cache, reads) = (HostCache::new(80), AtomicUsize::new(0));
        thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    let read = || {
                        reads.fetch_add(1, Ordering::SeqCst);
                        thread::sleep(Duration::from_millis(20));
                        Ok::<_, Infallible>(adapter(10))
                    };
                    cache.get(1, 40, read)
                });
            }
        });
        assert_eq!(reads.into_inner(), 1);
        assert_eq!((cache.used().hits, cache.used().loads), (7, 1));
    }

    #[test]
    fn what_cannot_be_read_is_not_there() {
        let cache = HostCache::new(80);
        assert_eq!(cache.get(1, 40, || Err("no")).unwrap_err(), "no");
        let panics = || -> Result<Adapter, Infallible> { panic!("while it is read") };
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            cache.get(1, 40, panics).map(drop)
        }));
        assert!(outcome.is_err());
        assert_eq!((cache.used().entries, cache.used().bytes), (0, 0));
        get(&cache, 1, 10);
        assert_eq!((cache.used().entries, cache.used().bytes), (1, 40));
    }

    #[test]
    fn a_forgotten_adapter_takes_no_room() {
        let cache = HostCache::new(80);
        let held = get(&cache, 1, 10);
        cache.forget(1);
        assert_eq!((cache.used().entries, cache.used().bytes), (0, 0));
        assert!(cache.has_room(&BTreeMap::from([(2, 80)])));
        assert_eq!(held.bytes(), 40);
    }
}
