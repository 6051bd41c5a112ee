//! Why a model cannot be resolved to a folder.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// Why a model cannot be resolved. Every message says how to fix it.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    #[error(
        "{model:?} is neither a folder that exists nor a Hub id: give the path of a model folder, \
         or owner/name such as Qwen/Qwen-Image, if need be with @revision"
    )]
    InvalidId { model: String },

    #[error("{address} is not the address of a model: {hint}")]
    Address { address: String, hint: String },

    #[error("{folder} is a model's folder in the Hub cache, and {reason}")]
    CacheFolder { folder: PathBuf, reason: String },

    #[error("{variable} must begin with http:// or https://, it is {value:?}")]
    Endpoint {
        variable: &'static str,
        value: String,
    },

    #[error("{variable} must be {expected}, it is {value:?}")]
    Variable {
        variable: &'static str,
        expected: &'static str,
        value: String,
    },

    #[error("HTTPS cannot be used: check the system's certificates and the variables of its proxy")]
    Client { source: Box<Failure> },

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
        "{variable} is set and revision {revision:?} of {repo} is not in the cache {cache}: \
         unset {variable} to download it, or set HF_HOME or HF_HUB_CACHE to where it is"
    )]
    Offline {
        variable: &'static str,
        repo: String,
        revision: String,
        cache: PathBuf,
    },

    #[error("the copy of {repo} in {snapshot} is incomplete: {} {}: {remedy}", missing.join(", "), if missing.len() == 1 { "is missing" } else { "are missing" })]
    Incomplete {
        repo: String,
        snapshot: PathBuf,
        /// Path of each file in the snapshot, with what is wrong if it is there.
        missing: Vec<String>,
        remedy: String,
    },

    #[error(
        "{endpoint} cannot be reached or does not answer as the Hub does: check the network and \
         HF_ENDPOINT; with HF_HUB_OFFLINE=1 a model that is in the cache is used without the \
         network"
    )]
    Network {
        endpoint: String,
        source: Box<Failure>,
    },

    #[error(
        "the answers of {endpoint} lack {lacking}: set HF_ENDPOINT to another mirror, or unset it"
    )]
    Mirror {
        endpoint: String,
        lacking: &'static str,
    },

    #[error("cannot download {repo}: try again later")]
    Download { repo: String, source: Box<Failure> },

    #[error(
        "cannot download {file} of {repo}: {received} of {size} bytes are there; start again to go \
         on from there, and check the network or HF_ENDPOINT if that does not help"
    )]
    File {
        repo: String,
        file: String,
        /// Bytes that a later attempt need not download again.
        received: u64,
        size: u64,
        source: Box<Failure>,
    },

    #[error(
        "not enough disk space for {repo}: {needed} bytes are still to be downloaded, and {free} \
         bytes are free in {cache}: free some, or set HF_HOME to a folder elsewhere"
    )]
    NoSpace {
        repo: String,
        needed: u64,
        free: u64,
        cache: PathBuf,
    },

    #[error(
        "cannot use the Hub cache {cache}: check its permissions and the disk's free space, or set \
         HF_HOME to a folder elsewhere"
    )]
    Io { cache: PathBuf, source: io::Error },
}

/// Why a request to the Hub failed.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    #[error("{host} sent nothing for {} s", waited.as_secs_f64())]
    Stalled { host: String, waited: Duration },

    #[error("{host} sends too slowly: {bytes} bytes in {} s", waited.as_secs_f64())]
    Slow {
        host: String,
        bytes: u64,
        waited: Duration,
    },

    #[error("HTTP request error")]
    Request(#[source] reqwest::Error),

    #[error("the connection to {host} broke")]
    Broken { host: String, source: io::Error },

    #[error("HTTP error: {status} from {host}")]
    Status {
        host: String,
        status: reqwest::StatusCode,
        /// The `X-Error-Code` header.
        code: Option<String>,
        /// The `Retry-After` header.
        retry_after: Option<Duration>,
        /// Whether the host is the Hub's own, and not one that it redirected to.
        of_hub: bool,
    },

    #[error("{host} redirects {to}")]
    Redirect { host: String, to: String },

    #[error("the answer is not that of the Hub's API")]
    Json(#[source] serde_json::Error),

    #[error("the answer of {host} is too large")]
    TooLarge { host: String },

    #[error("{host} offers {actual} bytes where the Hub lists {expected}")]
    Length {
        host: String,
        actual: u64,
        expected: u64,
    },

    #[error("the file changed while it was downloaded from {host}")]
    Changed { host: String },

    #[error(
        "the bytes received do not have the hash {expected} that the Hub lists, and were removed"
    )]
    Hash { expected: String },

    #[error("another download failed")]
    Stopped,
}

impl HubError {
    /// Whether the error holds whatever is in the cache.
    pub(super) fn is_final(&self) -> bool {
        matches!(self, Self::RevisionNotFound { .. } | Self::NotAModel { .. })
    }

    /// Whether a file is not what the Hub lists.
    pub(super) fn doubts_listing(&self) -> bool {
        let Self::File { source, .. } = self else {
            return false;
        };
        matches!(**source, Failure::Hash { .. } | Failure::Length { .. })
    }
}

impl Failure {
    /// Whether the same request may succeed later.
    pub(super) fn is_temporary(&self) -> bool {
        match self {
            // A link to another host is valid for a while, and the Hub gives a new one.
            Self::Status { status, of_hub, .. } => {
                !of_hub || matches!(status.as_u16(), 408 | 429 | 500 | 502 | 503 | 504)
            }
            Self::Redirect { .. } | Self::TooLarge { .. } | Self::Stopped => false,
            Self::Json(_)
            | Self::Stalled { .. }
            | Self::Slow { .. }
            | Self::Request(_)
            | Self::Broken { .. }
            | Self::Length { .. }
            | Self::Changed { .. }
            | Self::Hash { .. } => true,
        }
    }
}
