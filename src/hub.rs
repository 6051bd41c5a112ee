//! From what the user names a model by, a folder or a Hugging Face Hub id, to a folder.
//!
//! Downloads go to the cache that `huggingface_hub` (Python) uses, in its layout, so either program
//! finds what the other has fetched.
//!
//! The protocol is spoken here, over ureq, and not through the crate hf-hub. Built from nothing with
//! optimised dependencies, this way costs 31 crates and 58 CPU seconds; hf-hub 1.0.0 costs 236 and
//! 12 CPU minutes (reqwest, the Xet client, AWS-LC), hf-hub 0.5.0 costs 58 and 110 CPU seconds.
//! Neither knows `HF_HUB_OFFLINE`; 0.5.0 also sends the token to the storage host, does not check
//! that a file is complete, and gives a bare status where the Hub says why it refused.

mod download;

#[cfg(test)]
mod tests;

use std::env;
use std::fmt;
use std::fs;
use std::io;
use std::path::Path;
use std::path::PathBuf;

/// Where models are fetched from and kept.
#[derive(Debug, Clone)]
pub struct HubSettings {
    /// Base URL of the Hub, without a slash at its end.
    pub endpoint: String,
    /// For private and gated models.
    pub token: Option<HubToken>,
    /// The folder of downloaded models.
    pub cache: PathBuf,
    /// Use what the cache has and never the network.
    pub offline: bool,
}

/// A secret: it does not appear in logs.
#[derive(Clone, PartialEq, Eq)]
pub struct HubToken(String);

/// Why a model cannot be had. Every message says what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    #[error(
        "{model:?} is neither a folder that exists nor a Hub id: give the path of a model folder, \
         or owner/name such as Qwen/Qwen-Image, if need be with @revision"
    )]
    InvalidId { model: String },

    #[error("{endpoint} has no model {repo}: check the spelling of owner/name")]
    NotFound { repo: String, endpoint: String },

    #[error(
        "{repo} has no revision {revision:?}: give a branch, a tag or a full commit hash after the \
         @, or leave it out"
    )]
    RevisionNotFound { repo: String, revision: String },

    #[error(
        "{repo} does not exist, or is private (HTTP {status}): check the spelling; if it is \
         private, set HF_TOKEN to a token with read access from {endpoint}/settings/tokens"
    )]
    TokenNeeded {
        repo: String,
        endpoint: String,
        status: u16,
    },

    #[error(
        "the Hub does not give {repo} to the account of the token in use (HTTP {status}): set \
         HF_TOKEN to a valid token of an account that may read it"
    )]
    TokenRefused { repo: String, status: u16 },

    #[error(
        "{repo} is gated (HTTP {status}): accept its conditions at {endpoint}/{repo}, and set \
         HF_TOKEN to a token of the same account from {endpoint}/settings/tokens"
    )]
    Gated {
        repo: String,
        endpoint: String,
        status: u16,
    },

    #[error(
        "{repo} has no model_index.json, so it is not a model in diffusers layout: single-file \
         checkpoints and other formats cannot be loaded; use one such as Qwen/Qwen-Image"
    )]
    NotAModel { repo: String },

    #[error(
        "HF_HUB_OFFLINE is set and revision {revision:?} of {repo} is not in the cache {cache}: \
         unset HF_HUB_OFFLINE to download it, or set HF_HOME or HF_HUB_CACHE to where it is"
    )]
    Offline {
        repo: String,
        revision: String,
        cache: PathBuf,
    },

    #[error(
        "cannot reach {url}: check the network and HF_ENDPOINT; with HF_HUB_OFFLINE=1 a model \
         that is in the cache is used without the network"
    )]
    Network {
        url: String,
        source: Box<ureq::Error>,
    },

    #[error("{url} answered HTTP {status}: try again later")]
    Status { url: String, status: u16 },

    #[error("{url} gave {actual} bytes where the Hub lists {expected}: try again later")]
    WrongSize {
        url: String,
        expected: u64,
        actual: u64,
    },

    #[error("{url} does not answer as the Hub does ({reason}): check HF_ENDPOINT")]
    Answer { url: String, reason: String },

    #[error(
        "cannot use {path} in the Hub cache: check its permissions and the disk's free space, or \
         set HF_HOME to a folder elsewhere"
    )]
    Io { path: PathBuf, source: io::Error },
}

/// The folder of a model.
///
/// A folder that exists, or what looks like a path, is returned as it is; whether it holds a model
/// is for [`crate::checkpoint::Checkpoint::open`] to find out. Otherwise `model` is a Hub id,
/// `owner/name` or `owner/name@revision`, and what text-to-image needs of it is downloaded unless
/// the cache has it. Blocks for as long as that takes, with progress bars if stderr is a terminal
/// and a log line for each file otherwise.
pub fn resolve(model: &str, settings: &HubSettings) -> Result<PathBuf, HubError> {
    if Path::new(model).exists() {
        return Ok(model.into());
    }
    if let Some(path) = as_path(model) {
        return Ok(path);
    }
    let id = HubId::parse(model)?;
    if settings.offline {
        cached(&id, settings)
    } else {
        download::download(&id, settings)
    }
}

impl HubSettings {
    /// The settings in the environment variables of `huggingface_hub`: `HF_ENDPOINT`, `HF_TOKEN`,
    /// `HF_TOKEN_PATH`, `HF_HUB_CACHE`, `HF_HOME`, `XDG_CACHE_HOME` and `HF_HUB_OFFLINE`
    /// (<https://huggingface.co/docs/huggingface_hub/package_reference/environment_variables>).
    pub fn from_env() -> Self {
        Self::from_variables(|name| env::var(name).ok().filter(|value| !value.is_empty()))
    }

    fn from_variables(get: impl Fn(&str) -> Option<String>) -> Self {
        let path = |name: &str| get(name).map(|value| expand_home(&value));
        let home = path("HF_HOME").unwrap_or_else(|| {
            let cache = path("XDG_CACHE_HOME").unwrap_or_else(|| expand_home("~/.cache"));
            cache.join("huggingface")
        });
        let token_file = path("HF_TOKEN_PATH").unwrap_or_else(|| home.join("token"));
        let token = get("HF_TOKEN").or_else(|| fs::read_to_string(token_file).ok());
        let endpoint = get("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".to_owned());
        let offline = get("HF_HUB_OFFLINE").unwrap_or_default().to_lowercase();
        Self {
            endpoint: endpoint.trim_end_matches('/').to_owned(),
            token: token.and_then(|token| HubToken::new(&token)),
            cache: path("HF_HUB_CACHE").unwrap_or_else(|| home.join("hub")),
            offline: ["1", "true", "yes", "on"].contains(&offline.as_str()),
        }
    }
}

impl HubToken {
    /// `None` if there is nothing but white space.
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

/// A model on the Hub. Both parts are safe to put in a URL and in a path.
#[derive(Debug, PartialEq, Eq)]
struct HubId<'a> {
    /// `owner/name`
    repo: &'a str,
    /// A branch, a tag, a ref such as `refs/pr/1`, or a commit hash.
    revision: &'a str,
}

impl<'a> HubId<'a> {
    fn parse(model: &'a str) -> Result<Self, HubError> {
        let (repo, revision) = model.split_once('@').unwrap_or((model, "main"));
        let valid = repo.split('/').count() == 2
            && repo.split('/').all(is_plain_name)
            && revision.split('/').all(is_plain_name);
        if !valid {
            return Err(HubError::InvalidId {
                model: model.to_owned(),
            });
        }
        Ok(Self { repo, revision })
    }

    /// Where the cache keeps the model.
    fn folder(&self, settings: &HubSettings) -> PathBuf {
        settings
            .cache
            .join(format!("models--{}", self.repo.replace('/', "--")))
    }

    /// The file with the commit that a branch or tag was at when it was last fetched.
    fn ref_file(&self, settings: &HubSettings) -> PathBuf {
        self.folder(settings).join("refs").join(self.revision)
    }

    /// The folder with the files of a commit.
    fn snapshot(&self, settings: &HubSettings, commit: &str) -> PathBuf {
        self.folder(settings).join("snapshots").join(commit)
    }
}

/// Letters, digits, `-`, `_` and `.`, not beginning with a dot.
fn is_plain_name(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    !name.is_empty() && !name.starts_with('.') && name.chars().all(plain)
}

/// What can only be meant as a path, whether it exists or not.
fn as_path(model: &str) -> Option<PathBuf> {
    let before_revision = model.split('@').next().unwrap_or(model);
    let is_path = model.starts_with(['.', '/', '~'])
        || model.contains('\\')
        || before_revision.matches('/').count() > 1
        || before_revision.ends_with('/');
    is_path.then(|| expand_home(model))
}

fn expand_home(path: &str) -> PathBuf {
    match (path.strip_prefix('~'), env::home_dir()) {
        (Some(""), Some(home)) => home,
        (Some(rest), Some(home)) if rest.starts_with('/') => home.join(&rest[1..]),
        _ => path.into(),
    }
}

/// A snapshot that is in the cache.
fn cached(id: &HubId<'_>, settings: &HubSettings) -> Result<PathBuf, HubError> {
    // A revision without a ref is a commit hash, or not there.
    let commit = fs::read_to_string(id.ref_file(settings)).unwrap_or(id.revision.to_owned());
    let snapshot = id.snapshot(settings, commit.trim());
    if !snapshot.join("model_index.json").exists() {
        return Err(HubError::Offline {
            repo: id.repo.to_owned(),
            revision: id.revision.to_owned(),
            cache: settings.cache.clone(),
        });
    }
    Ok(snapshot)
}
