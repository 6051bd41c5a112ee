//! The adapters of a request: as written, and as found in the catalogue.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::Arc;

use super::recipe::{Recipe, ScheduleOrigin};
use super::{GenerationParams, InvalidRequest};

/// Largest number of adapters of a request.
pub const MAX_ADAPTERS: usize = 8;
/// Largest scale of an adapter in a request, without its sign.
pub const MAX_ADAPTER_SCALE: f64 = 8.0;
/// Largest sum of the ranks of a request's adapters.
pub const MAX_ADAPTER_RANKS: usize = 512;
/// How many names of adapters a message lists.
const MAX_LISTED: usize = 20;

/// An adapter as a client writes it.
#[derive(Debug, Clone, PartialEq)]
pub struct GivenAdapter {
    pub name: String,
    /// `None` means 1.
    pub scale: Option<f64>,
}

/// What is known of a usable adapter without its weights.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
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
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
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

    /// Looks up the adapters of a request. Those of scale 0 must exist as well, and are left out.
    pub(super) fn choose(
        &self,
        params: &GenerationParams,
    ) -> Result<Vec<ChosenAdapter>, InvalidRequest> {
        let given = &params.adapters;
        if given.len() > MAX_ADAPTERS {
            return Err(InvalidRequest::TooManyAdapters { got: given.len() });
        }
        let mut chosen: Vec<ChosenAdapter> = Vec::with_capacity(given.len());
        for (index, GivenAdapter { name, scale }) in given.iter().enumerate() {
            let info = self
                .get(name)
                .ok_or_else(|| InvalidRequest::UnknownAdapter {
                    name: name.clone(),
                    known: self.listed(),
                })?;
            if given[..index].iter().any(|other| other.name == *name) {
                return Err(InvalidRequest::AdapterTwice { name: name.clone() });
            }
            let scale = scale.unwrap_or(1.0);
            if !(-MAX_ADAPTER_SCALE..=MAX_ADAPTER_SCALE).contains(&scale) {
                let name = name.clone();
                return Err(InvalidRequest::AdapterScale { name, got: scale });
            }
            // What f32 rounds to 0 changes nothing either.
            if scale as f32 != 0.0 {
                let info = Arc::clone(info);
                chosen.push(ChosenAdapter { info, scale });
            }
        }
        let ranks = chosen.iter().filter_map(|chosen| chosen.info.rank).sum();
        if ranks > MAX_ADAPTER_RANKS {
            return Err(InvalidRequest::AdapterRanks { got: ranks });
        }
        Ok(chosen)
    }

    /// The usable names, for a message.
    fn listed(&self) -> String {
        let names: Vec<&str> = self.0.keys().map(String::as_str).collect();
        match names.len() {
            0 => "none is available".to_owned(),
            count @ ..=MAX_LISTED => {
                let verb = if count == 1 { "is" } else { "are" };
                format!("available {verb} {}", names.join(", "))
            }
            count => format!(
                "available are {} and {} more",
                names[..MAX_LISTED].join(", "),
                count - MAX_LISTED
            ),
        }
    }

    /// All adapters, by name.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<AdapterInfo>> {
        self.0.values()
    }
}
