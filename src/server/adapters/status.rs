//! What `GET /v1/status` says about adapters.

use kiln_models::pipeline;
use serde::Serialize;
use utoipa::ToSchema;

use crate::adapters::{AdapterStore, CacheUse, Listed};

/// The adapters of the server.
#[derive(Debug, Serialize, ToSchema)]
pub(in super::super) struct AdapterStatus {
    /// Adapters that requests may name.
    usable: Vec<UsableAdapter>,
    /// Files of the folder that cannot be used.
    unusable: Vec<UnusableAdapter>,
    /// Whether clients may change the list: `--enable-lora-updates`.
    updates: bool,
    host_cache: AdapterCacheStatus,
    /// Of several devices, that which holds the most.
    device_cache: AdapterCacheStatus,
}

/// An adapter that requests may name.
#[derive(Debug, Serialize, ToSchema)]
struct UsableAdapter {
    name: String,
    /// Its file, relative to the folder of adapters.
    file: String,
    /// Number of linear layers that it changes.
    modules: usize,
    /// The largest rank of its changes; null if none has a rank.
    rank: Option<usize>,
    /// Bytes that its weights take in host memory.
    bytes: u64,
    /// First digits of the SHA-256 of its file's header.
    hash: String,
    /// What requests with it get where they name no value of their own; null if there is nothing.
    recipe: Option<RecipeStatus>,
}

/// The sampling that an adapter was trained for.
#[derive(Debug, Serialize, ToSchema)]
struct RecipeStatus {
    name: String,
    /// Where it comes from: `sidecar`, `header` or `known_name`.
    origin: &'static str,
    num_inference_steps: Option<usize>,
    true_cfg_scale: Option<f64>,
}

/// An adapter that cannot be used.
#[derive(Debug, Serialize, ToSchema)]
struct UnusableAdapter {
    name: String,
    reason: String,
}

/// The weights of adapters in host memory or on a device.
#[derive(Debug, Serialize, ToSchema)]
struct AdapterCacheStatus {
    /// Adapters in memory.
    entries: usize,
    bytes: u64,
    /// The bound of `bytes`.
    max_bytes: u64,
    /// Times that an adapter was in memory already.
    hits: u64,
    misses: u64,
    /// Files that were read, or adapters that were uploaded.
    loads: u64,
    /// Adapters that were dropped to make room for others.
    evictions: u64,
}

impl From<CacheUse> for AdapterCacheStatus {
    fn from(cache: CacheUse) -> Self {
        Self {
            entries: cache.entries,
            bytes: cache.bytes,
            max_bytes: cache.max_bytes,
            hits: cache.hits,
            misses: cache.misses,
            loads: cache.loads,
            evictions: cache.evictions,
        }
    }
}

impl From<pipeline::CacheUse> for AdapterCacheStatus {
    fn from(cache: pipeline::CacheUse) -> Self {
        Self {
            entries: cache.entries,
            bytes: cache.bytes as u64,
            max_bytes: cache.max_bytes as u64,
            hits: cache.hits,
            misses: cache.misses,
            loads: cache.misses,
            evictions: cache.evictions,
        }
    }
}

impl AdapterStatus {
    pub(in super::super) fn new(
        store: &AdapterStore,
        device: pipeline::CacheUse,
        updates: bool,
    ) -> Self {
        let unusable = store.unusable().into_iter();
        Self {
            usable: store.listed().iter().map(|it| usable(it)).collect(),
            unusable: unusable
                .map(|(name, reason)| UnusableAdapter { name, reason })
                .collect(),
            updates,
            host_cache: store.cache_use().into(),
            device_cache: device.into(),
        }
    }
}

fn usable(listed: &Listed) -> UsableAdapter {
    let info = &listed.info;
    let recipe = info.recipe.as_ref();
    UsableAdapter {
        name: info.name.clone(),
        file: listed.file().to_owned(),
        modules: info.modules,
        rank: info.rank,
        bytes: info.bytes,
        hash: info.hash.clone(),
        recipe: recipe.map(|(recipe, origin)| RecipeStatus {
            name: recipe.name.clone(),
            origin: origin.name(),
            num_inference_steps: recipe.steps,
            true_cfg_scale: recipe.true_cfg_scale,
        }),
    }
}
