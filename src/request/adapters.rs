//! The adapters of a request: as written, and as found in the catalogue.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::recipe::{Recipe, ScheduleOrigin};

/// An adapter as a client writes it.
#[derive(Debug, Clone, PartialEq)]
pub struct GivenAdapter {
    pub name: String,
    /// `None` means 1.
    pub scale: Option<f64>,
}

/// What is known of a usable adapter without its weights.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterInfo {
    /// Its name in requests.
    pub name: String,
    /// What its file, its sidecar or its name says about sampling.
    pub recipe: Option<(Recipe, ScheduleOrigin)>,
    /// Number of linear layers that it changes.
    pub modules: usize,
    /// The largest rank of its changes; `None` if none has a rank.
    pub rank: Option<usize>,
    /// Size of its matrices in bytes, as stored.
    pub bytes: u64,
    /// Hexadecimal digits that identify the file, as images' metadata has them.
    pub hash: String,
}

/// The adapters that requests may name.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Catalogue(Arc<BTreeMap<String, Arc<AdapterInfo>>>);

/// An adapter that a request uses.
#[derive(Debug, Clone, PartialEq)]
pub struct ChosenAdapter {
    pub info: Arc<AdapterInfo>,
    /// Finite and not 0.
    pub scale: f64,
}

impl Catalogue {
    pub fn new(adapters: impl IntoIterator<Item = AdapterInfo>) -> Self {
        let named = |info: AdapterInfo| (info.name.clone(), Arc::new(info));
        Self(Arc::new(adapters.into_iter().map(named).collect()))
    }

    pub fn get(&self, name: &str) -> Option<&Arc<AdapterInfo>> {
        self.0.get(name)
    }

    /// All adapters, by name.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<AdapterInfo>> {
        self.0.values()
    }
}
