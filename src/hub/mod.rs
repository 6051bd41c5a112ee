//! Resolves the name of a model, a path or a Hugging Face Hub id, to a folder.
//!
//! Downloads go to the cache of `huggingface_hub` (Python), in its layout, so that both programs share
//! downloaded models.

mod error;
mod progress;

#[cfg(test)]
mod tests;

use std::env;
use std::fmt;
use std::fs;
use std::panic::resume_unwind;
use std::path::Path;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use hf_hub::HFClient;
use hf_hub::HFClientSync;
use hf_hub::HFError;
use hf_hub::HFRepositorySync;
use hf_hub::HFResult;
use hf_hub::RepoTypeModel;
use hf_hub::repository::RepoTreeEntry;

use self::progress::Bars;

pub use self::error::HubError;

/// Patterns of the files of a repository that text-to-image generation reads.
const NEEDED: [&str; 4] = [
    "model_index.json",
    "scheduler/*.json",
    "tokenizer/*",
    "{text_encoder,transformer,vae}/*.{json,safetensors}",
];

/// Exceptions from `NEEDED`: nested folders (a `*` also matches slashes), and variants of the weights
/// such as `model.fp16.safetensors`, which duplicate them.
const NOT_NEEDED: [&str; 2] = ["*/*/*", "*.*.safetensors"];

/// Time from one report of a download to the next.
const REPORT_INTERVAL: Duration = Duration::from_millis(100);

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
}

/// An access token. Its `Debug` output does not contain it.
#[derive(Clone, PartialEq, Eq)]
pub struct HubToken(String);

/// How far a download is, with the files that were there before.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Transfer {
    pub files: usize,
    pub total_files: usize,
    pub bytes: u64,
    pub total_bytes: u64,
}

/// Receives the state of a download again and again, on any thread.
type Report<'a> = &'a (dyn Fn(Transfer) + Send + Sync);

/// Resolves the name of a model to a folder.
///
/// An existing path, or a name that can only be a path, is returned unchanged;
/// [`crate::checkpoint::Checkpoint::open`] checks whether it is a model. Any other name is a Hub id,
/// `owner/name` or `owner/name@revision`: the files that text-to-image generation needs are
/// downloaded unless they are cached. Blocks until the download is complete, with progress bars if
/// stderr is a terminal and log lines otherwise. `report` is called while files are downloaded.
pub fn resolve(
    model: &str,
    settings: &HubSettings,
    report: &(dyn Fn(Transfer) + Send + Sync),
) -> Result<PathBuf, HubError> {
    if Path::new(model).exists() {
        return Ok(model.into());
    }
    if let Some(path) = as_path(model) {
        return Ok(path);
    }
    let model = HubModel::new(HubId::parse(model)?, settings)?;
    if settings.offline {
        model.cached()
    } else {
        model.downloaded(report)
    }
}

impl HubSettings {
    /// Reads `HF_HUB_OFFLINE`; the other settings stay `None`.
    pub fn from_env() -> Self {
        let offline = env::var("HF_HUB_OFFLINE").unwrap_or_default();
        Self {
            offline: ["1", "true", "yes", "on"].contains(&offline.to_lowercase().as_str()),
            ..Self::default()
        }
    }

    fn client(&self) -> HFResult<HFClient> {
        let mut builder =
            HFClient::builder().user_agent(concat!("kiln/", env!("CARGO_PKG_VERSION")));
        if let Some(endpoint) = &self.endpoint {
            builder = builder.endpoint(endpoint);
        }
        if let Some(token) = &self.token {
            builder = builder.token(&token.0);
        }
        if let Some(cache) = &self.cache {
            builder = builder.cache_dir(cache);
        }
        builder.build()
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

/// Hub id of a model. Both parts are safe in URLs and in paths.
#[derive(Debug, PartialEq, Eq)]
struct HubId<'a> {
    /// `owner/name`.
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
}

/// Whether a name consists of ASCII letters, digits, `-`, `_` and `.` and does not begin with a dot.
fn is_plain_name(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    !name.is_empty() && !name.starts_with('.') && name.chars().all(plain)
}

/// The path, with `~` expanded, if the name can only be a path; it need not exist.
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

/// A model on the Hub, with the client that downloads it.
struct HubModel<'a> {
    id: HubId<'a>,
    client: HFClient,
    repo: HFRepositorySync<RepoTypeModel>,
}

impl<'a> HubModel<'a> {
    fn new(id: HubId<'a>, settings: &HubSettings) -> Result<Self, HubError> {
        let error = |source| HubError::Client {
            source: Box::new(source),
        };
        let client = settings.client().map_err(error)?;
        let blocking = HFClientSync::from_inner(client.clone()).map_err(error)?;
        let (owner, name) = hf_hub::split_id(id.repo);
        let repo = blocking.model(owner, name);
        Ok(Self { id, client, repo })
    }

    /// The snapshot in the cache, without network access.
    fn cached(&self) -> Result<PathBuf, HubError> {
        let snapshot = self.snapshot(true, &|_| ())?;
        if !snapshot.join("model_index.json").exists() {
            let path = snapshot.display().to_string();
            return Err(self.error(HFError::LocalEntryNotFound { path }));
        }
        Ok(snapshot)
    }

    /// The snapshot after downloading the files that are not cached.
    fn downloaded(&self, report: Report<'_>) -> Result<PathBuf, HubError> {
        let tree = self.repo.list_tree().revision(self.id.revision);
        let tree = tree.recursive(true).send().map_err(|it| self.error(it))?;
        let files = tree
            .iter()
            .filter_map(|entry| match entry {
                RepoTreeEntry::File {
                    path, size, lfs, ..
                } => {
                    // `size` may be that of the Git LFS pointer.
                    let size = lfs.as_ref().and_then(|it| it.size).unwrap_or(*size);
                    Some((path.as_str(), size))
                }
                RepoTreeEntry::Directory { .. } => None,
            })
            .filter(|(path, _)| path.split('/').all(is_plain_name))
            .collect::<Vec<_>>();
        if !files.iter().any(|(path, _)| *path == "model_index.json") {
            return Err(HubError::NotAModel {
                repo: self.id.repo.to_owned(),
            });
        }
        let snapshot = self.snapshot(false, report)?;
        // Check all files, so that one retry replaces every wrong one.
        let sizes = files
            .into_iter()
            .map(|(path, size)| check_size(&snapshot.join(path), size));
        sizes.fold(Ok(()), Result::and).map(|()| snapshot)
    }

    fn snapshot(&self, offline: bool, report: Report<'_>) -> Result<PathBuf, HubError> {
        let bars = Arc::new(Bars::new());
        let download = self
            .repo
            .snapshot_download()
            .revision(self.id.revision)
            .allow_patterns(NEEDED.map(str::to_owned).into())
            .ignore_patterns(NOT_NEEDED.map(str::to_owned).into())
            .local_files_only(offline)
            .progress(Arc::clone(&bars));
        let snapshot = thread::scope(|threads| {
            let sending = threads.spawn(|| download.send());
            while !sending.is_finished() {
                if let Some(transfer) = bars.transfer() {
                    report(transfer);
                }
                thread::sleep(REPORT_INTERVAL);
            }
            sending.join()
        });
        let snapshot = snapshot.unwrap_or_else(|panic| resume_unwind(panic));
        bars.clear();
        snapshot.map_err(|error| self.error(error))
    }

    /// Converts an error of the client.
    fn error(&self, error: HFError) -> HubError {
        let repo = self.id.repo.to_owned();
        let revision = self.id.revision.to_owned();
        let endpoint = self.client.endpoint().to_owned();
        let cache = self.client.cache_dir().to_owned();
        let (status, code) = match &error {
            HFError::Http { context }
            | HFError::AuthRequired { context }
            | HFError::Forbidden { context }
            | HFError::RevisionNotFound {
                context: Some(context),
                ..
            } => (context.status.as_u16(), context.error_code.clone()),
            _ => (0, None),
        };
        match (status, code.as_deref(), error) {
            (_, Some("GatedRepo"), _) => HubError::Gated {
                repo,
                endpoint,
                status,
            },
            (404, Some("RevisionNotFound"), _) => HubError::RevisionNotFound { repo, revision },
            (404, None | Some("RepoNotFound"), _) => HubError::NotFound { repo, endpoint },
            (401 | 403, _, _) => HubError::NoAccess {
                repo,
                endpoint,
                status,
            },
            (_, _, HFError::LocalEntryNotFound { .. }) => HubError::Offline {
                repo,
                revision,
                cache,
            },
            (_, _, HFError::CacheLockTimeout { path: lock }) => HubError::Busy { lock },
            (_, _, HFError::Io(source)) => HubError::Io { cache, source },
            (_, _, source @ HFError::Request { .. }) => HubError::Network {
                endpoint,
                source: Box::new(source),
            },
            (_, _, source) => HubError::Download {
                repo,
                source: Box::new(source),
            },
        }
    }
}

/// Removes a cached file whose size differs from the listed one: the client may store a truncated
/// response, or an error page of the storage host, as a file.
fn check_size(path: &Path, expected: u64) -> Result<(), HubError> {
    // Resolves the link to the blob; files that are not needed do not exist.
    let Ok(blob) = path.canonicalize() else {
        return Ok(());
    };
    let actual = blob.metadata().map_or(0, |it| it.len());
    if actual == expected {
        return Ok(());
    }
    fs::remove_file(blob).ok();
    Err(HubError::WrongSize {
        path: path.to_owned(),
        expected,
        actual,
    })
}
