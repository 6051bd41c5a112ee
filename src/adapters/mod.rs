//! The adapters that requests may name: a list of usable files, and their weights in host memory.
//!
//! An [`AdapterStore`] lists the adapters of one folder, and those that are embedded in the binary. It
//! reads the header of each file when it lists it, and the weights when they are first wanted.
//!
//! - `folder`: which files of the folder are adapters, and what they are called
//! - `listed`: a listed adapter, and whether its file is still the listed one
//! - `content`: what a file says about its adapter, and its weights
//! - `cache`: weights in host memory, bounded by bytes

mod cache;
mod content;
mod error;
mod folder;
mod listed;
mod name;

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kiln_models::adapter::{Adapter, AdapterTarget};

use crate::checkpoint::EmbeddedAdapter;
use crate::request::{AdapterInfo, Catalogue};

use self::cache::HostCache;
use self::content::Rules;
use self::folder::{Folder, Found, PEFT_CONFIG};
use self::listed::Source;

pub use self::cache::CacheUse;
pub use self::error::AdapterError;
pub use self::listed::Listed;

/// Default bound of the adapters' weights in host memory, in bytes.
pub const DEFAULT_HOST_CACHE_BYTES: u64 = 4 << 30;

/// Where adapters come from.
#[derive(Debug, Clone)]
pub struct AdapterSettings {
    /// The folder whose files requests may name.
    pub dir: Option<PathBuf>,
    /// Bound of the weights in host memory, in bytes.
    pub host_cache_bytes: u64,
    /// Accepts adapters with changes of the text encoder, which are left out.
    pub ignore_text_encoder: bool,
}

/// The adapters of a model. Clones share the list and the weights.
///
/// The default store has no adapters.
#[derive(Debug, Clone, Default)]
pub struct AdapterStore(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    folder: Option<Folder>,
    rules: Rules,
    /// Those in the binary, by name.
    embedded: BTreeMap<String, Source>,
    cache: HostCache,
    list: Mutex<List>,
    /// Held while the list is being changed, so that changes do not overwrite each other.
    changing: Mutex<()>,
}

#[derive(Debug, Default)]
struct List {
    usable: BTreeMap<String, Arc<Listed>>,
    /// Why each of the others is not usable, by name.
    unusable: BTreeMap<String, String>,
    /// Those that were added under a name that is not their file's: file by name.
    renamed: BTreeMap<String, String>,
    /// Names that were removed, which a new scan does not list.
    removed: BTreeSet<String>,
    catalogue: Catalogue,
}

impl Default for AdapterSettings {
    fn default() -> Self {
        Self {
            dir: None,
            host_cache_bytes: DEFAULT_HOST_CACHE_BYTES,
            ignore_text_encoder: false,
        }
    }
}

impl AdapterStore {
    /// Lists the files of the folder and those in the binary. A file of the folder hides one in the
    /// binary that has its name. Adapters that cannot be used are logged, with the reason.
    ///
    /// `targets` are the layers that adapters of the model can change, `blocks` the number of its
    /// blocks.
    ///
    /// # Errors
    ///
    /// The folder cannot be read.
    pub fn open(
        settings: AdapterSettings,
        targets: Vec<AdapterTarget>,
        blocks: usize,
        embedded: &[EmbeddedAdapter],
    ) -> Result<Self, AdapterError> {
        let folder = settings.dir.as_deref().map(Folder::open).transpose()?;
        let embedded = embedded.iter().map(Source::embedded).collect();
        let store = Self(Arc::new(Shared {
            folder,
            rules: Rules::new(targets, blocks, settings.ignore_text_encoder),
            embedded,
            cache: HostCache::new(settings.host_cache_bytes),
            list: Mutex::default(),
            changing: Mutex::default(),
        }));
        store.rescan()?;
        Ok(store)
    }

    /// Whether there are adapters, or a folder that may get some.
    pub fn may_have_any(&self) -> bool {
        self.0.folder.is_some() || !self.0.embedded.is_empty()
    }

    /// The usable adapters.
    pub fn catalogue(&self) -> Catalogue {
        self.list().catalogue.clone()
    }

    /// The usable adapters with what is known of their files, by name.
    pub fn listed(&self) -> Vec<Arc<Listed>> {
        self.list().usable.values().cloned().collect()
    }

    /// Name and reason of each adapter that cannot be used.
    pub fn unusable(&self) -> Vec<(String, String)> {
        let list = self.list();
        let pairs = list.unusable.iter();
        pairs
            .map(|(name, reason)| (name.clone(), reason.clone()))
            .collect()
    }

    /// Why an adapter cannot be used, if it is known and cannot.
    pub fn why_unusable(&self, name: &str) -> Option<String> {
        self.list().unusable.get(name).cloned()
    }

    /// Whether [`AdapterStore::remove`] has taken the adapter from the list.
    pub fn is_removed(&self, name: &str) -> bool {
        self.list().removed.contains(name)
    }

    /// Name of the listed adapter whose file this is: a path below the folder, from its root or
    /// relative to it. Looks at the list only, not at files.
    pub fn name_of_file(&self, file: &str) -> Option<String> {
        let file = self.0.folder.as_ref()?.relative(file)?;
        let list = self.list();
        let of_file = |listed: &&Arc<Listed>| listed.file() == file;
        let named = list.usable.get(&file);
        let found = named.or_else(|| list.usable.values().find(of_file));
        found.map(|listed| listed.info.name.clone())
    }

    /// Lists the files again: new ones, changed ones, and no longer those that are gone.
    ///
    /// # Errors
    ///
    /// The folder cannot be read. The list is as before.
    pub fn rescan(&self) -> Result<(), AdapterError> {
        let _changing = lock(&self.0.changing);
        let (renamed, mut removed) = {
            let list = self.list();
            (list.renamed.clone(), list.removed.clone())
        };
        let mut sources: BTreeMap<String, Result<Source, String>> = BTreeMap::new();
        for (name, source) in &self.0.embedded {
            sources.insert(name.clone(), Ok(source.clone()));
        }
        if let Some(folder) = &self.0.folder {
            for Found { name, source } in folder.scan()? {
                sources.insert(name, source);
            }
            for (name, file) in &renamed {
                let source = folder.find(file).map_err(|error| error.to_string());
                sources.insert(name.clone(), source);
            }
        }
        // A name is free again once its file is gone.
        removed.retain(|name| sources.contains_key(name));
        let mut found = List {
            renamed,
            ..List::default()
        };
        for (name, source) in sources {
            if removed.contains(&name) {
                continue;
            }
            match source.and_then(|source| self.0.rules.list(&name, source)) {
                Ok(listed) => drop(found.usable.insert(name, Arc::new(listed))),
                Err(reason) => drop(found.unusable.insert(name, reason)),
            }
        }
        found.removed = removed;
        self.replace(found);
        Ok(())
    }

    /// Puts an adapter on the list. `file` is a file below the folder, or the name of one; its name in
    /// requests is `name`. With `replace` the name may be on the list already: jobs keep the weights
    /// that they have.
    ///
    /// # Errors
    ///
    /// The name is on the list or not possible, there is no such file in the folder, or it cannot be
    /// used. The list is as before.
    pub fn add(&self, name: &str, file: &str, replace: bool) -> Result<(), AdapterError> {
        let _changing = lock(&self.0.changing);
        name::check(name).map_err(|reason| AdapterError::Name { reason })?;
        if !replace && self.list().usable.contains_key(name) {
            return Err(AdapterError::Listed { name: name.into() });
        }
        let source = match &self.0.folder {
            Some(folder) => folder.find(file),
            None => Err(AdapterError::NoFolder),
        };
        let embedded = || self.0.embedded.get(name).filter(|_| file == name).cloned();
        let source = source.or_else(|error| embedded().ok_or(error))?;
        let listed = self.0.rules.list(name, source);
        let listed = listed.map_err(|reason| AdapterError::Unusable {
            name: name.into(),
            reason,
        })?;
        let mut list = self.list();
        let old = list.usable.insert(name.into(), Arc::new(listed));
        list.unusable.remove(name);
        list.removed.remove(name);
        list.renamed.remove(name);
        let file = list.usable[name].file().to_owned();
        if folder::name_of(&file) != name {
            list.renamed.insert(name.into(), file);
        }
        list.update();
        drop(list);
        old.inspect(|old| self.0.cache.forget(old.id));
        tracing::info!(adapter = name, "listed");
        Ok(())
    }

    /// Puts a file from anywhere on this machine on the list, until the folder is listed again, and returns
    /// its name: that of the file, with a number behind it if another file has the same.
    ///
    /// # Errors
    ///
    /// There is no such file, or it cannot be used.
    pub fn add_file(&self, path: &Path) -> Result<String, AdapterError> {
        let _changing = lock(&self.0.changing);
        let refused = |reason: String| AdapterError::File {
            path: path.to_owned(),
            reason,
        };
        if path.is_dir() && !path.join(PEFT_CONFIG).exists() {
            return Err(refused(format!(
                "the folder has no {PEFT_CONFIG}: give a safetensors file, or a folder as PEFT saves it"
            )));
        }
        let (file, source) = Source::anywhere(path).map_err(|error| refused(error.to_string()))?;
        let is_taken = |name: &str| {
            let list = self.list();
            let other = list.usable.get(name);
            other.is_some_and(|other| {
                !self.0.embedded.contains_key(name) && !other.source.is_same_path(&source)
            })
        };
        let numbered = (2..).map(|number| format!("{file}-{number}"));
        let mut names = std::iter::once(file.clone()).chain(numbered);
        let name = names.find(|name| !is_taken(name)).unwrap_or(file);
        let listed = self.0.rules.list(&name, source).map_err(refused)?;
        let mut list = self.list();
        list.usable.insert(name.clone(), Arc::new(listed));
        list.update();
        Ok(name)
    }

    /// Takes an adapter from the list, until it is added again. Jobs keep its weights.
    ///
    /// # Errors
    ///
    /// It is not on the list.
    pub fn remove(&self, name: &str) -> Result<(), AdapterError> {
        let _changing = lock(&self.0.changing);
        let mut list = self.list();
        let old = list.usable.remove(name);
        if old.is_none() && list.unusable.remove(name).is_none() {
            return Err(AdapterError::Unknown { name: name.into() });
        }
        list.renamed.remove(name);
        list.removed.insert(name.into());
        list.update();
        drop(list);
        old.inspect(|old| self.0.cache.forget(old.id));
        tracing::info!(adapter = name, "removed from the list");
        Ok(())
    }

    /// The weights of an adapter, from memory or read now. Blocks while they are read; several threads
    /// that want the same adapter read it once.
    ///
    /// If the adapters in use leave no room in the cache, the weights are not kept: they are shared
    /// while they are in use, and freed after that. [`AdapterStore::has_room`] says so before.
    ///
    /// # Errors
    ///
    /// The adapter is not on the list, or its file was changed since it was listed, is gone, cannot be
    /// read, or has values that are not finite. An adapter with such values is not usable any more.
    pub fn get(&self, name: &str) -> Result<Arc<Adapter>, AdapterError> {
        let listed = self.list().usable.get(name).cloned();
        let listed = listed.ok_or_else(|| AdapterError::Unknown { name: name.into() })?;
        listed.check()?;
        let read = || self.0.rules.read(&listed);
        let outcome = self.0.cache.get(listed.id, listed.info.bytes, read);
        if let Err(AdapterError::Unusable { reason, .. }) = &outcome {
            self.give_up(&listed, reason);
        }
        outcome
    }

    /// Whether these adapters fit into the cache together, beside those that jobs are using. Adapters
    /// that are larger than the cache have room while no others are in use.
    pub fn has_room<'a>(&self, names: impl IntoIterator<Item = &'a str>) -> bool {
        let list = self.list();
        let listed = names.into_iter().filter_map(|name| list.usable.get(name));
        let wanted: BTreeMap<u64, u64> = listed.map(|it| (it.id, it.info.bytes)).collect();
        self.0.cache.has_room(&wanted)
    }

    /// What the host cache holds and has done.
    pub fn cache_use(&self) -> CacheUse {
        self.0.cache.used()
    }

    /// Moves an adapter to the unusable ones.
    fn give_up(&self, listed: &Listed, reason: &str) {
        let name = &listed.info.name;
        let mut list = self.list();
        if list.usable.get(name).is_none_or(|it| it.id != listed.id) {
            return;
        }
        tracing::warn!(adapter = name, "cannot be used: {reason}");
        list.usable.remove(name);
        list.unusable.insert(name.clone(), reason.to_owned());
        list.update();
    }

    /// Replaces the list. Adapters whose files are the same keep their weights.
    fn replace(&self, mut new: List) {
        let mut list = self.list();
        for (name, listed) in &mut new.usable {
            let old = list.usable.get(name);
            if let Some(old) = old.filter(|old| old.is_same_file(listed)) {
                *listed = Arc::new(listed.with_id(old.id));
            }
        }
        for (name, reason) in &new.unusable {
            if list.unusable.get(name) != Some(reason) {
                tracing::warn!(adapter = name, "cannot be used: {reason}");
            }
        }
        let kept: BTreeSet<u64> = new.usable.values().map(|it| it.id).collect();
        new.update();
        let old = std::mem::replace(&mut *list, new);
        drop(list);
        for listed in old.usable.values().filter(|it| !kept.contains(&it.id)) {
            self.0.cache.forget(listed.id);
        }
    }

    fn list(&self) -> MutexGuard<'_, List> {
        lock(&self.0.list)
    }
}

impl List {
    /// Builds the catalogue of what is usable.
    fn update(&mut self) {
        let infos = self.usable.values().map(|it| AdapterInfo::clone(&it.info));
        self.catalogue = Catalogue::new(infos);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
