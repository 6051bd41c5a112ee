//! Downloads a snapshot of a model from the Hub into the cache.
//!
//! The cache of a model is, as in `huggingface_hub`: `blobs/` with the files by their hash,
//! `snapshots/<commit>/` with links to them by their name, and `refs/<revision>` with a commit.

use std::fs;
use std::fs::File;
use std::io;
use std::io::IsTerminal;
use std::io::Read;
use std::io::Write;
use std::path::Path;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::Duration;

use indicatif::MultiProgress;
use indicatif::ProgressBar;
use indicatif::ProgressStyle;
use serde::Deserialize;
use ureq::Agent;
use ureq::Body;
use ureq::http::Response;
use ureq::http::StatusCode;

use super::HubError;
use super::HubId;
use super::HubSettings;
use super::is_plain_name;

/// Files fetched at a time: one connection rarely fills the line.
const PARALLEL: usize = 4;

/// Waits before a file is tried again, from where it broke off.
const RETRY_WAITS: [Duration; 4] = [
    Duration::from_secs(1),
    Duration::from_secs(4),
    Duration::from_secs(15),
    Duration::from_secs(30),
];

/// What the Hub says about a revision when asked for "blobs" too
/// (`huggingface_hub/hf_api.py`, `ModelInfo` and `RepoSibling`).
#[derive(Deserialize)]
struct RevisionInfo {
    /// The commit.
    sha: String,
    siblings: Vec<Sibling>,
}

/// A file of the revision.
#[derive(Deserialize)]
struct Sibling {
    #[serde(rename = "rfilename")]
    path: String,
    /// In bytes.
    size: u64,
    /// The hash of a file in git.
    #[serde(rename = "blobId")]
    git_hash: String,
    /// Large files are kept outside git.
    lfs: Option<LargeFile>,
}

#[derive(Deserialize)]
struct LargeFile {
    sha256: String,
}

impl Sibling {
    /// The name of the blob in the cache. The Hub gives the same as the file's `ETag`.
    fn hash(&self) -> &str {
        self.lfs.as_ref().map_or(&self.git_hash, |lfs| &lfs.sha256)
    }
}

/// Downloads what is not in the cache yet; the folder of the snapshot.
pub(super) fn download(id: &HubId<'_>, settings: &HubSettings) -> Result<PathBuf, HubError> {
    let hub = Hub::new(id, settings);
    let info = hub.revision_info()?;
    let files = info
        .siblings
        .iter()
        .filter(|it| is_needed(&it.path))
        .collect::<Vec<_>>();
    if !files.iter().any(|it| it.path == "model_index.json") {
        return Err(HubError::NotAModel {
            repo: id.repo.to_owned(),
        });
    }
    let snapshot = id.snapshot(settings, &info.sha);
    let missing = files
        .into_iter()
        .filter(|it| !snapshot.join(&it.path).exists())
        .collect();
    hub.fetch_all(missing, &snapshot, &info.sha)?;
    // Last, so that a ref means that its snapshot is complete.
    if id.revision != info.sha {
        write_file(&id.ref_file(settings), &info.sha)?;
    }
    Ok(snapshot)
}

/// Whether text-to-image reads the file. Of the weights that means those in safetensors without a
/// variant (`model.fp16.safetensors`): they would be the same once more.
fn is_needed(path: &str) -> bool {
    let Some((folder, name)) = path.split_once('/') else {
        return path == "model_index.json";
    };
    if !is_plain_name(name) {
        return false; // deeper down, or not fit for a URL or a path
    }
    let (stem, extension) = name.rsplit_once('.').unwrap_or((name, ""));
    let json = extension == "json";
    let weights = extension == "safetensors" && !stem.contains('.');
    match folder {
        "scheduler" => json,
        "tokenizer" => true,
        "text_encoder" | "transformer" | "vae" => json || weights,
        _ => false,
    }
}

/// A model on the Hub and how to reach it.
struct Hub<'a> {
    id: &'a HubId<'a>,
    settings: &'a HubSettings,
    agent: Agent,
    bars: MultiProgress,
    total: ProgressBar,
    /// Set when a file has failed: the others stop.
    failed: AtomicBool,
}

impl<'a> Hub<'a> {
    fn new(id: &'a HubId<'a>, settings: &'a HubSettings) -> Self {
        let agent = Agent::config_builder()
            .http_status_as_error(false)
            .user_agent(concat!("kiln/", env!("CARGO_PKG_VERSION")))
            // A model that was renamed is a redirect on the Hub, and may need the token; large
            // files are a redirect to a storage host, which must not see it.
            .redirect_auth_headers(ureq::config::RedirectAuthHeaders::SameHost)
            .timeout_connect(Some(Duration::from_secs(15)))
            .timeout_recv_response(Some(Duration::from_mins(1)))
            .timeout_per_read(Some(Duration::from_mins(1)))
            .build()
            .new_agent();
        // Bars do not draw where stderr is not a terminal.
        let bars = MultiProgress::new();
        let total = ProgressBar::hidden();
        Self {
            id,
            settings,
            agent,
            bars,
            total,
            failed: AtomicBool::new(false),
        }
    }

    fn revision_info(&self) -> Result<RevisionInfo, HubError> {
        let HubSettings { endpoint, .. } = self.settings;
        let HubId { repo, revision } = self.id;
        let revision = revision.replace('/', "%2F");
        // With "blobs" come sizes and hashes, so no file needs a request of its own for them.
        let url = format!("{endpoint}/api/models/{repo}/revision/{revision}?blobs=true");
        let mut response = self.get(&url, 0)?;
        let body = response
            .body_mut()
            .read_to_string()
            .map_err(|error| network(&url, error))?;
        let answer = |reason: String| HubError::Answer {
            url: url.clone(),
            reason,
        };
        let info: RevisionInfo =
            serde_json::from_str(&body).map_err(|error| answer(error.to_string()))?;
        // They become file names.
        let hashes = info
            .siblings
            .iter()
            .map(Sibling::hash)
            .chain([info.sha.as_str()]);
        for hash in hashes {
            if hash.is_empty() || !hash.bytes().all(|byte| byte.is_ascii_alphanumeric()) {
                return Err(answer(format!("{hash:?} is not a hash")));
            }
        }
        Ok(info)
    }

    /// Fetches the files, a few at a time; the first error.
    fn fetch_all(
        &self,
        files: Vec<&Sibling>,
        snapshot: &Path,
        commit: &str,
    ) -> Result<(), HubError> {
        if files.len() > 1 {
            let bytes = files.iter().map(|it| it.size).sum();
            self.bars.add(self.total.clone());
            set_up_bar(&self.total, bytes, &format!("{} files", files.len()));
        }
        let queue = Mutex::new(files.into_iter());
        let next = || queue.lock().unwrap_or_else(PoisonError::into_inner).next();
        let work = || {
            while !self.failed.load(Ordering::Relaxed)
                && let Some(file) = next()
            {
                let fetched = self.fetch(file, snapshot, commit);
                if fetched.is_err() {
                    self.failed.store(true, Ordering::Relaxed);
                    return fetched;
                }
            }
            Ok(())
        };
        let result = thread::scope(|scope| {
            let workers = [(); PARALLEL].map(|()| scope.spawn(work));
            workers.into_iter().try_for_each(|worker| {
                worker
                    .join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            })
        });
        self.total.finish_and_clear();
        result
    }

    /// Fetches a file into the cache and links it into the snapshot.
    fn fetch(&self, file: &Sibling, snapshot: &Path, commit: &str) -> Result<(), HubError> {
        let blobs = self.id.folder(self.settings).join("blobs");
        let blob = blobs.join(file.hash());
        let link = snapshot.join(&file.path);
        // Not ".incomplete": huggingface_hub fills that in an order of its own.
        let part_path = blobs.join(format!("{}.kiln-part", file.hash()));
        create_parent(&part_path)?;
        create_parent(&link)?;

        let mut part = File::options()
            .append(true)
            .create(true)
            .open(&part_path)
            .map_err(|source| io_error(&part_path, source))?;
        // Another process may be at the same file.
        if let Err(error) = part.lock() {
            tracing::warn!(path = %part_path.display(), %error, "cannot lock a partial download");
        }
        if blob.exists() {
            // From an earlier revision, or this other process.
            fs::remove_file(&part_path).ok();
            return link_blob(&blob, &link, &file.path);
        }

        let bar = self.bars.add(ProgressBar::no_length());
        set_up_bar(&bar, file.size, &file.path);
        if !io::stderr().is_terminal() {
            tracing::info!(
                repo = self.id.repo,
                file = file.path,
                bytes = file.size,
                "downloading"
            );
        }
        let url = self.file_url(file, commit);
        let complete = self.fill(&mut part, &part_path, file, &url, &bar);
        bar.finish_and_clear();
        self.bars.remove(&bar);
        if complete? {
            fs::rename(&part_path, &blob).map_err(|source| io_error(&blob, source))?;
            link_blob(&blob, &link, &file.path)?;
        }
        Ok(())
    }

    fn file_url(&self, file: &Sibling, commit: &str) -> String {
        format!(
            "{}/{}/resolve/{commit}/{}",
            self.settings.endpoint, self.id.repo, file.path
        )
    }

    /// Downloads until the file is complete, or another one has failed (`false`).
    fn fill(
        &self,
        part: &mut File,
        path: &Path,
        file: &Sibling,
        url: &str,
        bar: &ProgressBar,
    ) -> Result<bool, HubError> {
        let mut waits = RETRY_WAITS.into_iter();
        loop {
            let error = match self.transfer(part, path, url, file.size, bar) {
                Ok(_) if self.failed.load(Ordering::Relaxed) => return Ok(false),
                Ok(actual) if actual == file.size => return Ok(true),
                Ok(actual) => HubError::WrongSize {
                    url: url.to_owned(),
                    expected: file.size,
                    actual,
                },
                Err(error) => error,
            };
            let transient = match &error {
                HubError::Network { .. } | HubError::WrongSize { .. } => true,
                HubError::Status { status, .. } => *status == 429 || *status >= 500,
                _ => false,
            };
            match waits.next() {
                _ if self.failed.load(Ordering::Relaxed) => return Ok(false),
                Some(wait) if transient => {
                    tracing::warn!(%error, ?wait, "a download broke off and will go on");
                    thread::sleep(wait);
                }
                _ => return Err(error),
            }
        }
    }

    /// Downloads what the partial file lacks; its new length.
    fn transfer(
        &self,
        part: &mut File,
        path: &Path,
        url: &str,
        size: u64,
        bar: &ProgressBar,
    ) -> Result<u64, HubError> {
        let mut length = part
            .metadata()
            .map_err(|source| io_error(path, source))?
            .len();
        if length == size {
            return Ok(length);
        }
        if length > size {
            part.set_len(0).map_err(|source| io_error(path, source))?;
            length = 0;
        }
        let mut response = self.get(url, length)?;
        if response.status() != StatusCode::PARTIAL_CONTENT {
            part.set_len(0).map_err(|source| io_error(path, source))?;
            length = 0;
        }
        self.total.inc(length.saturating_sub(bar.position()));
        bar.set_position(length);

        let mut body = response.body_mut().as_reader();
        let mut buffer = vec![0; 256 * 1024];
        while !self.failed.load(Ordering::Relaxed) {
            let read = body
                .read(&mut buffer)
                .map_err(|error| network(url, error.into()))?;
            if read == 0 {
                break;
            }
            part.write_all(&buffer[..read])
                .map_err(|source| io_error(path, source))?;
            length += read as u64;
            bar.inc(read as u64);
            self.total.inc(read as u64);
        }
        Ok(length)
    }

    /// A request for what follows the first `start` bytes. The answer is a success.
    fn get(&self, url: &str, start: u64) -> Result<Response<Body>, HubError> {
        let mut request = self.agent.get(url);
        if let Some(token) = &self.settings.token {
            request = request.header("Authorization", format!("Bearer {}", token.0));
        }
        if start > 0 {
            request = request.header("Range", format!("bytes={start}-"));
        }
        let response = request.call().map_err(|error| network(url, error))?;
        if response.status().is_success() {
            Ok(response)
        } else {
            Err(self.refusal(url, &response))
        }
    }

    /// What a status means; the Hub says more in a header
    /// (`huggingface_hub/utils/_http.py`, `hf_raise_for_status`).
    fn refusal(&self, url: &str, response: &Response<Body>) -> HubError {
        let repo = self.id.repo.to_owned();
        let endpoint = self.settings.endpoint.clone();
        let status = response.status().as_u16();
        let code = response
            .headers()
            .get("X-Error-Code")
            .and_then(|it| it.to_str().ok());
        match (status, code) {
            (_, Some("GatedRepo")) => HubError::Gated {
                repo,
                endpoint,
                status,
            },
            (_, Some("RevisionNotFound")) => HubError::RevisionNotFound {
                repo,
                revision: self.id.revision.to_owned(),
            },
            (401 | 403, _) if self.settings.token.is_some() => {
                HubError::TokenRefused { repo, status }
            }
            (401 | 403, _) => HubError::TokenNeeded {
                repo,
                endpoint,
                status,
            },
            (404, None | Some("RepoNotFound")) => HubError::NotFound { repo, endpoint },
            _ => HubError::Status {
                url: url.to_owned(),
                status,
            },
        }
    }
}

fn set_up_bar(bar: &ProgressBar, bytes: u64, name: &str) {
    let style = ProgressStyle::with_template(
        "{msg:50} [{wide_bar}] {binary_bytes:>11}/{binary_total_bytes:11} \
         {binary_bytes_per_sec:>13} {eta:>4}",
    );
    bar.set_style(style.expect("the template is valid"));
    bar.set_length(bytes);
    bar.set_message(name.to_owned());
}

/// Makes `link` a relative link to `blob`. `name` is the link's path within its snapshot.
#[cfg(unix)]
fn link_blob(blob: &Path, link: &Path, name: &str) -> Result<(), HubError> {
    let hash = blob.file_name().expect("a blob has a name");
    let target = Path::new("../..").join("../".repeat(name.matches('/').count()));
    if link.exists() {
        return Ok(());
    }
    // A link to nothing may be in the way.
    fs::remove_file(link).ok();
    match std::os::unix::fs::symlink(target.join("blobs").join(hash), link) {
        Err(_) if link.exists() => Ok(()), // by another process
        result => result.map_err(|source| io_error(link, source)),
    }
}

/// Links need a privilege on Windows: the file itself goes to the snapshot.
#[cfg(not(unix))]
fn link_blob(blob: &Path, link: &Path, _name: &str) -> Result<(), HubError> {
    fs::rename(blob, link).map_err(|source| io_error(link, source))
}

fn write_file(path: &Path, content: &str) -> Result<(), HubError> {
    create_parent(path)?;
    fs::write(path, content).map_err(|source| io_error(path, source))
}

fn create_parent(path: &Path) -> Result<(), HubError> {
    let folder = path.parent().unwrap_or(path);
    fs::create_dir_all(folder).map_err(|source| io_error(folder, source))
}

fn network(url: &str, source: ureq::Error) -> HubError {
    HubError::Network {
        url: url.to_owned(),
        source: Box::new(source),
    }
}

fn io_error(path: &Path, source: io::Error) -> HubError {
    HubError::Io {
        path: path.to_owned(),
        source,
    }
}
