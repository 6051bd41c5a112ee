//! Resolves the name of a model, a path or a Hugging Face Hub id, to a folder.
//!
//! Downloads go to the cache of `huggingface_hub` (Python), in its layout, so that both programs share
//! downloaded models. A model that is complete in the cache is used whether the Hub answers or not.
//!
//! - `id`: what a name stands for
//! - `environment`: settings from `huggingface_hub`'s variables
//! - `cache`, `complete`: the layout of the cache, and whether a model in it is complete
//! - `http`, `listing`, `retry`: requests to the Hub
//! - `download`, `transfer`, `progress`: several files, one file, and how far they are

mod cache;
mod complete;
mod download;
mod environment;
mod error;
mod http;
mod id;
mod listing;
mod progress;
mod retry;
mod transfer;

#[cfg(test)]
mod tests;

use std::fmt;
use std::path::Path;
use std::path::PathBuf;
use std::time::Duration;

use self::cache::CachedRepo;
use self::download::Found;
use self::environment::Environment;
use self::id::{HubId, Name};

pub use self::error::{Failure, HubError};
pub use self::id::id_in_cache;

/// Where models are downloaded from and cached. A field that is `None` is read from the environment
/// variables of `huggingface_hub`, such as `HF_ENDPOINT`, `HF_TOKEN` and `HF_HOME`
/// (<https://huggingface.co/docs/huggingface_hub/package_reference/environment_variables>).
#[derive(Debug, Clone, Default)]
pub struct HubSettings {
    /// Base URL of the Hub.
    pub endpoint: Option<String>,
    /// Access token, for private and gated models.
    pub token: Option<HubToken>,
    /// Folder of the cache.
    pub cache: Option<PathBuf>,
    /// Use only cached models, without network access.
    pub offline: bool,
    /// Neither need nor download weights, only configurations and the tokenizer.
    pub without_weights: bool,
    /// Longest time without an answer, or without a byte of one, when a model is looked up. 10 s if
    /// `HF_HUB_ETAG_TIMEOUT` is not set.
    pub etag_timeout: Option<Duration>,
    /// Longest time without a byte when a file is downloaded; then the rest is requested again. 10 s
    /// if `HF_HUB_DOWNLOAD_TIMEOUT` is not set.
    pub download_timeout: Option<Duration>,
    /// Time between a failure and the first of five retries, about; it doubles three times. 1 s by
    /// default.
    pub retry_wait: Option<Duration>,
}

/// An access token. Its `Debug` output does not contain it.
#[derive(Clone, PartialEq, Eq)]
pub struct HubToken(String);

/// How far a download is, with the files that were there before.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Transfer {
    /// Files that are complete.
    pub files: usize,
    /// Files that the model needs.
    pub total_files: usize,
    /// Bytes of these files that are on disk.
    pub bytes: u64,
    /// Bytes of all these files.
    pub total_bytes: u64,
}

/// Resolves the name of a model to a folder.
///
/// An existing path, or a name that can only be a path, is returned unchanged, but for a model's
/// folder in the Hub cache, `models--OWNER--NAME`, whose snapshot is returned;
/// [`crate::checkpoint::Checkpoint::open`] checks whether it is a model. Any other name is a Hub id,
/// `owner/name` or `owner/name@revision`, or its address on the Hub: the files that text-to-image
/// generation needs are downloaded unless they are cached. Blocks until the download is complete,
/// with progress bars if stderr is a terminal and log lines otherwise.
///
/// `report` is called on this thread several times a second while files are downloaded. The process
/// may end at any time: a later call goes on from there.
///
/// # Errors
///
/// A variable has a bad value, the name stands for no model, or files that the cache lacks cannot be
/// downloaded.
pub fn resolve(
    model: &str,
    settings: &HubSettings,
    report: &(dyn Fn(Transfer) + Send + Sync),
) -> Result<PathBuf, HubError> {
    match name(model, settings)? {
        Name::Path(path) => resolve_path(&path, settings),
        Name::Id(id) => resolve_id(&id, &Environment::read(settings)?, report),
    }
}

/// Chooses the implementation of TLS for every HTTP client of this process.
pub fn install_tls() {
    // An embedding program may have installed one.
    rustls::crypto::ring::default_provider()
        .install_default()
        .ok();
}

/// What a name of a model stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Location {
    /// `owner/name` or `owner/name@revision` on the Hub.
    Id(String),
    Path(PathBuf),
}

/// Reads a name as [`resolve`] does, without a download.
///
/// # Errors
///
/// The name stands for nothing, or `HF_ENDPOINT` is not an address.
pub fn locate(model: &str, settings: &HubSettings) -> Result<Location, HubError> {
    Ok(match name(model, settings)? {
        Name::Path(path) => Location::Path(path),
        Name::Id(id) => Location::Id(id.to_string()),
    })
}

fn name(model: &str, settings: &HubSettings) -> Result<Name, HubError> {
    let path = Path::new(model);
    if path.exists() {
        return Ok(Name::Path(path.to_owned()));
    }
    // A path needs no settings.
    if let Some(path) = id::as_path(model) {
        return Ok(Name::Path(path));
    }
    Name::read(model, &environment::endpoint(settings)?)
}

/// The path itself, or the snapshot in a model's folder of the cache.
fn resolve_path(path: &Path, settings: &HubSettings) -> Result<PathBuf, HubError> {
    let Some((snapshot, repo)) = id::snapshot_in(path)? else {
        return Ok(path.to_owned());
    };
    let missing = complete::missing_files(&snapshot, None, !settings.without_weights);
    if missing.is_empty() {
        return Ok(snapshot);
    }
    let remedy = format!("give {repo} to download what is missing");
    Err(HubError::Incomplete {
        repo,
        snapshot,
        missing,
        remedy,
    })
}

fn resolve_id(
    id: &HubId,
    environment: &Environment,
    report: &(dyn Fn(Transfer) + Send + Sync),
) -> Result<PathBuf, HubError> {
    let repo = CachedRepo::new(&environment.cache, &id.repo, environment.symlinks)
        .with_weights(!environment.without_weights);
    let cached = repo.find(&id.revision);
    let complete = cached.as_ref().is_some_and(|it| it.missing.is_empty());
    if let Some(variable) = environment.offline {
        let (repo, revision) = (id.repo.clone(), id.revision.clone());
        return match cached {
            Some(cached) if complete => Ok(cached.snapshot),
            Some(cached) => Err(HubError::Incomplete {
                repo,
                snapshot: cached.snapshot,
                missing: cached.missing,
                remedy: format!("unset {variable} to download what is missing"),
            }),
            None => Err(HubError::Offline {
                variable,
                repo,
                revision,
                cache: environment.cache.clone(),
            }),
        };
    }
    if let Some(cached) = cached.filter(|_| complete && id.is_commit()) {
        // The files of a commit never change.
        return Ok(cached.snapshot);
    }
    let found = match download::look_up(environment, &repo, id, !complete) {
        Ok(found) => found,
        Err(error) => return cached_instead(error, &repo, id, None),
    };
    download::complete(environment, &repo, id, &found, report)
        .or_else(|error| cached_instead(error, &repo, id, Some(&found)))
}

/// The snapshot in the cache with a warning, if it is complete, or else the error.
fn cached_instead(
    error: HubError,
    repo: &CachedRepo,
    id: &HubId,
    found: Option<&Found>,
) -> Result<PathBuf, HubError> {
    let cached = repo.find(&id.revision).filter(|_| !error.is_final());
    let Some(cached) = cached.filter(|cached| cached.missing.is_empty()) else {
        return Err(error);
    };
    // The Hub's own list is the better judge of the commit that it lists.
    let listed = found.filter(|found| cached.snapshot.ends_with(&found.commit));
    let listing = listed.map(|found| &found.listing);
    if !complete::missing_files(&cached.snapshot, listing, repo.weights).is_empty() {
        return Err(error);
    }
    tracing::warn!(
        "{}; the copy in the cache is used: {}",
        crate::error_chain(&error),
        cached.snapshot.display()
    );
    Ok(cached.snapshot)
}

impl HubSettings {
    /// Reads `HF_HUB_OFFLINE` and `TRANSFORMERS_OFFLINE`; the other settings stay `None`.
    pub fn from_env() -> Self {
        Self {
            offline: environment::is_offline(),
            ..Self::default()
        }
    }
}

impl HubToken {
    /// Trims white space; `None` if nothing is left.
    pub fn new(token: &str) -> Option<Self> {
        let token = token.trim();
        (!token.is_empty()).then(|| Self(token.to_owned()))
    }
}

impl fmt::Debug for HubToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}
