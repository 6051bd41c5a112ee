//! An LRU cache bounded by the bytes of its values.

use std::collections::HashMap;
use std::hash::Hash;

use crate::pipeline::CacheUse;

/// Keeps the most recently used values that fit into a number of bytes.
#[derive(Debug)]
pub(crate) struct Cache<K, V> {
    kept: HashMap<K, Kept<V>>,
    /// Number of uses so far: the time of [`Kept::last_used`].
    now: u64,
    counts: CacheUse,
}

#[derive(Debug)]
struct Kept<V> {
    value: V,
    bytes: usize,
    last_used: u64,
}

impl<K: Hash + Eq + Clone, V: Clone> Cache<K, V> {
    pub(crate) fn new(max_bytes: usize) -> Self {
        let counts = CacheUse {
            max_bytes,
            ..CacheUse::default()
        };
        Self {
            kept: HashMap::new(),
            now: 0,
            counts,
        }
    }

    /// Returns the value of a key; calls `make` for it if the cache does not hold it. `bytes` measures
    /// a value.
    pub(crate) fn get_or_make(
        &mut self,
        key: &K,
        make: impl FnOnce() -> V,
        bytes: impl FnOnce(&V) -> usize,
    ) -> V {
        self.now += 1;
        if let Some(kept) = self.kept.get_mut(key) {
            kept.last_used = self.now;
            self.counts.hits += 1;
            return kept.value.clone();
        }
        self.counts.misses += 1;
        let value = make();
        let bytes = bytes(&value);
        // A value above the bound is not kept: it would evict all others.
        if bytes <= self.counts.max_bytes {
            self.make_room(bytes);
            self.counts.bytes += bytes;
            let kept = Kept {
                value: value.clone(),
                bytes,
                last_used: self.now,
            };
            self.kept.insert(key.clone(), kept);
        }
        value
    }

    /// Whether the cache holds the value of a key. Counts as no use.
    pub(crate) fn holds(&self, key: &K) -> bool {
        self.kept.contains_key(key)
    }

    /// Evicts the least recently used values until `bytes` more fit.
    fn make_room(&mut self, bytes: usize) {
        while self.counts.bytes + bytes > self.counts.max_bytes {
            let oldest = self.kept.iter().min_by_key(|(_, kept)| kept.last_used);
            let Some(key) = oldest.map(|(key, _)| key.clone()) else {
                return;
            };
            self.counts.bytes -= self.kept.remove(&key).map_or(0, |kept| kept.bytes);
            self.counts.evictions += 1;
        }
    }

    /// Drops the values of the other keys.
    pub(crate) fn retain(&mut self, keeps: impl Fn(&K) -> bool) {
        let bytes = &mut self.counts.bytes;
        self.kept.retain(|key, kept| {
            let stays = keeps(key);
            if !stays {
                *bytes -= kept.bytes;
            }
            stays
        });
    }

    /// Drops all values. The counts of hits and misses stay.
    pub(crate) fn clear(&mut self) {
        self.kept.clear();
        self.counts.bytes = 0;
    }

    /// The cache's size, bound, hits and misses.
    pub(crate) fn counts(&self) -> CacheUse {
        CacheUse {
            entries: self.kept.len(),
            ..self.counts
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Gets a value whose size in bytes is its value, `bytes` if it is not kept.
    fn ask(cache: &mut Cache<&'static str, usize>, key: &'static str, bytes: usize) -> usize {
        cache.get_or_make(&key, || bytes, |bytes| *bytes)
    }

    #[test]
    fn the_least_recently_used_value_is_evicted() {
        let mut cache = Cache::new(10);
        ask(&mut cache, "a", 4);
        ask(&mut cache, "b", 4);
        ask(&mut cache, "a", 4);
        ask(&mut cache, "c", 4);
        // "b" was evicted, so it is made again, now with another size.
        assert_eq!(ask(&mut cache, "a", 1), 4);
        assert_eq!(ask(&mut cache, "b", 6), 6);
        let expected = CacheUse {
            entries: 2,
            bytes: 10,
            max_bytes: 10,
            hits: 2,
            misses: 4,
            evictions: 2,
        };
        assert_eq!(cache.counts(), expected);
        assert_eq!(ask(&mut cache, "c", 2), 2);
    }

    #[test]
    fn a_value_larger_than_the_bound_is_made_and_not_kept() {
        let mut cache = Cache::new(10);
        ask(&mut cache, "a", 10);
        assert_eq!(ask(&mut cache, "huge", 11), 11);
        assert_eq!(ask(&mut cache, "huge", 12), 12);
        assert_eq!(ask(&mut cache, "a", 1), 10);
        assert_eq!(cache.counts().bytes, 10);
    }

    #[test]
    fn a_cleared_cache_has_all_its_room_again() {
        let mut cache = Cache::new(10);
        ask(&mut cache, "a", 6);
        cache.clear();
        assert_eq!(cache.counts().entries, 0);
        ask(&mut cache, "b", 10);
        assert_eq!(ask(&mut cache, "b", 1), 10);
        assert_eq!((cache.counts().bytes, cache.counts().misses), (10, 2));
    }

    #[test]
    fn values_that_are_not_retained_leave_their_room() {
        let mut cache = Cache::new(10);
        ask(&mut cache, "a", 6);
        ask(&mut cache, "b", 3);
        cache.retain(|key| *key == "b");
        assert_eq!((cache.counts().entries, cache.counts().bytes), (1, 3));
        ask(&mut cache, "c", 7);
        assert_eq!(ask(&mut cache, "b", 1), 3);
    }

    #[test]
    fn a_bound_of_nothing_keeps_nothing() {
        let mut cache = Cache::new(0);
        assert_eq!(ask(&mut cache, "a", 1), 1);
        assert_eq!(ask(&mut cache, "a", 2), 2);
        assert_eq!(cache.counts().entries, 0);
    }
}
