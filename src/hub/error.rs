//! Why a model cannot be resolved to a folder.

use std::io;
use std::path::PathBuf;

use hf_hub::HFError;

/// Why a model cannot be resolved. Every message says how to fix it.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    #[error(
        "{model:?} is neither a folder that exists nor a Hub id: give the path of a model folder, \
         or owner/name such as Qwen/Qwen-Image, if need be with @revision"
    )]
    InvalidId { model: String },

    #[error("the Hub cannot be used: check HF_ENDPOINT")]
    Client { source: Box<HFError> },

    #[error("{endpoint} has no model {repo}: check the spelling of owner/name")]
    NotFound { repo: String, endpoint: String },

    #[error(
        "{repo} has no revision {revision:?}: give a branch, a tag or a full commit hash after the \
         @, or leave it out"
    )]
    RevisionNotFound { repo: String, revision: String },

    #[error(
        "{repo} does not exist, is private, or the token in use is not valid (HTTP {status}): \
         check the spelling; if it is private, set HF_TOKEN to a token of an account that may read \
         it from {endpoint}/settings/tokens"
    )]
    NoAccess {
        repo: String,
        endpoint: String,
        status: u16,
    },

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
        "{endpoint} cannot be reached or does not answer as the Hub does: check the network and \
         HF_ENDPOINT; with HF_HUB_OFFLINE=1 a model that is in the cache is used without the \
         network"
    )]
    Network {
        endpoint: String,
        source: Box<HFError>,
    },

    #[error("{path} has {actual} bytes where the Hub lists {expected}, and was removed: try again")]
    WrongSize {
        path: PathBuf,
        expected: u64,
        actual: u64,
    },

    #[error(
        "another process is downloading the same and holds {lock}: try again when it has ended"
    )]
    Busy { lock: PathBuf },

    #[error(
        "cannot use the Hub cache {cache}: check its permissions and the disk's free space, or set \
         HF_HOME to a folder elsewhere"
    )]
    Io { cache: PathBuf, source: io::Error },

    #[error("cannot download {repo}: try again later")]
    Download { repo: String, source: Box<HFError> },
}
