//! The files of a model at one commit, as the Hub lists them.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::HubError;
use super::error::Failure;
use super::http::Http;
use super::id::{HubId, is_commit, is_plain_name};

/// A file of a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Listed {
    /// Path in the repository.
    pub(super) path: String,
    pub(super) size: u64,
    /// The file's entity tag on the Hub, which names it in the cache. `None` if a mirror lists none.
    pub(super) etag: Option<String>,
}

/// Every file of a commit, in the form of the cache's `trees/COMMIT.json`, which `huggingface_hub`
/// reads and writes too.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Listing {
    format_version: u32,
    files: BTreeMap<String, Entry>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Entry {
    size: u64,
    /// Git's hash of the file, or of its Git LFS pointer.
    blob_id: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    lfs_sha256: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    lfs_size: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    xet_hash: Option<String>,
}

const FORMAT_VERSION: u32 = 1;

/// Pages of a listing that are read at most, of 1,000 files each.
const MAX_PAGES: usize = 100;

/// A revision in the Hub's API.
#[derive(Deserialize)]
struct Revision {
    sha: Option<String>,
}

/// An entry of a folder in the Hub's API.
#[derive(Deserialize)]
struct TreeEntry {
    #[serde(rename = "type")]
    kind: String,
    path: String,
    #[serde(default)]
    size: u64,
    oid: Option<String>,
    lfs: Option<Lfs>,
    #[serde(rename = "xetHash")]
    xet_hash: Option<String>,
}

#[derive(Deserialize)]
struct Lfs {
    oid: Option<String>,
    size: Option<u64>,
}

/// Why a look-up failed.
#[derive(Debug)]
pub(super) enum LookUpError {
    Failure(Failure),
    /// What the answers of a mirror lack.
    Lacking(&'static str),
}

impl From<Failure> for LookUpError {
    fn from(failure: Failure) -> Self {
        Self::Failure(failure)
    }
}

/// Asks the Hub for the commit of a revision.
pub(super) fn look_up_commit(http: &Http, id: &HubId) -> Result<String, LookUpError> {
    let revision = id.revision.replace('/', "%2F");
    let url = http.url(&format!("api/models/{}/revision/{revision}", id.repo))?;
    let (Revision { sha }, _) = http.json(&url)?;
    sha.filter(|sha| is_commit(sha))
        .ok_or(LookUpError::Lacking("the commit of a revision (\"sha\")"))
}

/// Asks the Hub for the files of a commit.
pub(super) fn look_up_files(http: &Http, repo: &str, commit: &str) -> Result<Listing, LookUpError> {
    let mut url = http.url(&format!("api/models/{repo}/tree/{commit}?recursive=true"))?;
    let mut files = BTreeMap::new();
    for _ in 0..MAX_PAGES {
        let (entries, next) = http.json::<Vec<TreeEntry>>(&url)?;
        let entries = entries.into_iter().filter(|entry| entry.kind == "file");
        files.extend(entries.map(|entry| (entry.path.clone(), Entry::from(entry))));
        let Some(next) = next else { break };
        url = next;
    }
    Ok(Listing {
        format_version: FORMAT_VERSION,
        files,
    })
}

impl From<TreeEntry> for Entry {
    fn from(entry: TreeEntry) -> Self {
        let lfs = entry.lfs.unwrap_or(Lfs {
            oid: None,
            size: None,
        });
        Self {
            size: entry.size,
            blob_id: entry.oid.unwrap_or_default(),
            lfs_size: lfs.size,
            // Some mirrors write the hash as it stands in a Git LFS pointer.
            lfs_sha256: lfs
                .oid
                .map(|oid| oid.trim_start_matches("sha256:").to_owned()),
            xet_hash: entry.xet_hash,
        }
    }
}

impl Listing {
    /// Reads a listing in the cache; `None` if there is none that can be used.
    pub(super) fn read(path: &Path) -> Option<Self> {
        let listing: Self = serde_json::from_slice(&fs::read(path).ok()?).ok()?;
        (listing.format_version == FORMAT_VERSION).then_some(listing)
    }

    /// The files that text-to-image generation needs.
    pub(super) fn needed(&self) -> Vec<Listed> {
        let needed = self.files.iter().filter(|(path, _)| is_needed(path));
        needed
            .map(|(path, entry)| {
                let etag = entry.lfs_sha256.as_ref().unwrap_or(&entry.blob_id);
                Listed {
                    path: path.clone(),
                    size: entry.lfs_size.unwrap_or(entry.size),
                    etag: Some(etag.clone()).filter(|etag| !etag.is_empty()),
                }
            })
            .collect()
    }

    /// Size of a file, if it is listed.
    pub(super) fn size(&self, path: &str) -> Option<u64> {
        let entry = self.files.get(path)?;
        Some(entry.lfs_size.unwrap_or(entry.size))
    }
}

/// Whether text-to-image generation reads a file of a repository.
///
/// Variants of the weights, such as `model.fp16.safetensors`, duplicate them.
fn is_needed(path: &str) -> bool {
    let parts: Vec<&str> = path.split('/').collect();
    if !parts.iter().all(|part| is_plain_name(part)) {
        return false;
    }
    let is_json = path.strip_suffix(".json").is_some();
    match parts.as_slice() {
        ["model_index.json"] | ["tokenizer", _] => true,
        ["scheduler", _] => is_json,
        ["text_encoder" | "transformer" | "vae", name] => {
            let weights = name.strip_suffix(".safetensors");
            is_json || weights.is_some_and(|stem| !stem.contains('.'))
        }
        _ => false,
    }
}

/// What a look-up's failure means for a user.
pub(super) fn explain(error: LookUpError, id: &HubId, endpoint: &str) -> HubError {
    let (repo, endpoint) = (id.repo.clone(), endpoint.to_owned());
    match error {
        LookUpError::Lacking(lacking) => HubError::Mirror { endpoint, lacking },
        LookUpError::Failure(failure) => {
            refusal(&failure, id, &endpoint).unwrap_or_else(|| match failure {
                Failure::Status { .. } => HubError::Download {
                    repo,
                    source: Box::new(failure),
                },
                failure => HubError::Network {
                    endpoint,
                    source: Box::new(failure),
                },
            })
        }
    }
}

/// What the Hub's refusal means, if a failure is one.
pub(super) fn refusal(failure: &Failure, id: &HubId, endpoint: &str) -> Option<HubError> {
    let Failure::Status {
        status,
        code,
        of_hub: true,
        ..
    } = failure
    else {
        return None;
    };
    let (repo, endpoint, status) = (id.repo.clone(), endpoint.to_owned(), status.as_u16());
    match (status, code.as_deref()) {
        (_, Some("GatedRepo")) => Some(HubError::Gated {
            repo,
            endpoint,
            status,
        }),
        (404, Some("RevisionNotFound")) => Some(HubError::RevisionNotFound {
            repo,
            revision: id.revision.clone(),
        }),
        (404, None | Some("RepoNotFound")) => Some(HubError::NotFound { repo, endpoint }),
        (401 | 403, _) => Some(HubError::NoAccess {
            repo,
            endpoint,
            status,
        }),
        _ => None,
    }
}
