//! Downloads one file: resumes, retries and checks it.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{self, Read, Seek, Write as _};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use reqwest::header::{CONTENT_LENGTH, CONTENT_RANGE};
use reqwest::{StatusCode, Url};
use ring::digest::{Context, SHA1_FOR_LEGACY_USE_ONLY, SHA256};

use super::HubError;
use super::cache::{CachedRepo, create_parent};
use super::error::Failure;
use super::http::{Answer, Http, etag};
use super::id::{HubId, is_plain_name};
use super::listing::{Listed, refusal};
use super::progress::{FileProgress, Progress};
use super::retry::{Backoff, RETRIES};

/// Times that the bytes received may have the wrong hash.
const MAX_WRONG: u32 = 3;

/// Fewer bytes than these within the timeout count as none.
const SLOWEST: u64 = 1024;

/// Bytes that are read at a time.
const CHUNK: usize = 256 << 10;

/// Downloads files of one commit.
pub(super) struct Fetcher<'a> {
    pub(super) http: &'a Http,
    pub(super) repo: &'a CachedRepo,
    pub(super) id: &'a HubId,
    pub(super) commit: &'a str,
    /// The Hub, for messages.
    pub(super) endpoint: &'a str,
    /// Wait before the first retry.
    pub(super) retry_wait: Duration,
    /// Longest time without bytes.
    pub(super) timeout: Duration,
    pub(super) progress: &'a Progress,
    /// Set when another file failed.
    pub(super) stop: AtomicBool,
}

/// Why an attempt to download a file ended.
enum Ended {
    Remote(Failure),
    /// The cache cannot be read or written.
    Local(io::Error),
}

impl From<io::Error> for Ended {
    fn from(error: io::Error) -> Self {
        Self::Local(error)
    }
}

impl From<Failure> for Ended {
    fn from(failure: Failure) -> Self {
        Self::Remote(failure)
    }
}

/// The part of a file that is on disk.
struct Partial<'a> {
    file: File,
    length: u64,
    size: u64,
    etag: &'a str,
    /// Hash of the bytes on disk, if the entity tag is a hash.
    hash: Option<Context>,
    /// Largest `length` so far.
    furthest: u64,
    /// Entity tag of the host that sent the bytes.
    sender_tag: Option<String>,
    progress: FileProgress<'a>,
}

impl Fetcher<'_> {
    /// Downloads a file into the snapshot, unless the cache has its content.
    pub(super) fn fetch(&self, listed: &Listed) -> Result<(), HubError> {
        let progress = self.progress.file(&listed.path, listed.size);
        let url = format!("{}/resolve/{}/{}", self.id.repo, self.commit, listed.path);
        let url = self
            .http
            .url(&url)
            .map_err(|failure| self.error(listed, 0, failure))?;
        let etag = self.etag(listed, &url)?;
        let lock = self
            .repo
            .lock(&etag, &listed.path)
            .map_err(|error| self.io(error))?;
        let blob = self.repo.blob(&etag);
        if blob.metadata().is_ok_and(|it| it.len() == listed.size) {
            progress.found(listed.size);
            progress.finish();
        } else {
            let incomplete = self.repo.incomplete(&etag, &lock);
            let partial = Partial::open(&incomplete, listed.size, &etag, progress);
            let partial = partial.map_err(|error| self.io(error))?;
            let partial = self.complete(listed, &url, partial)?;
            partial
                .file
                .sync_all()
                .and_then(|()| fs::rename(&incomplete, &blob))
                .map_err(|error| self.io(error))?;
            partial.progress.finish();
            if self.progress.is_hidden() {
                tracing::info!(file = listed.path, bytes = listed.size, "downloaded");
            }
        }
        self.repo
            .link(&etag, self.commit, &listed.path)
            .map_err(|error| self.io(error))
    }

    /// The listed entity tag, or else that of the file's URL.
    fn etag(&self, listed: &Listed, url: &Url) -> Result<String, HubError> {
        let mut backoff = Backoff::new(self.retry_wait, RETRIES);
        let mut etag = listed.etag.clone();
        while etag.is_none() {
            match self.http.etag(url) {
                Ok(found) => {
                    etag = found;
                    break;
                }
                Err(failure) => backoff
                    .wait(failure, &listed.path, &self.stop)
                    .map_err(|failure| self.error(listed, 0, failure))?,
            }
        }
        etag.filter(|etag| is_plain_name(etag))
            .ok_or_else(|| HubError::Mirror {
                endpoint: self.endpoint.to_owned(),
                lacking: "the hash of a file (\"oid\", or the header ETag)",
            })
    }

    /// Downloads what is missing of a file.
    fn complete<'p>(
        &self,
        listed: &Listed,
        url: &Url,
        mut partial: Partial<'p>,
    ) -> Result<Partial<'p>, HubError> {
        let mut backoff = Backoff::new(self.retry_wait, RETRIES);
        let mut wrong = 0;
        loop {
            let before = partial.furthest;
            let failure = match self.attempt(url, &mut partial) {
                Ok(()) => match partial.wrong_hash() {
                    None => return Ok(partial),
                    Some(failure) => {
                        wrong += 1;
                        partial.restart().map_err(|error| self.io(error))?;
                        failure
                    }
                },
                Err(Ended::Local(error)) => return Err(self.io(error)),
                Err(Ended::Remote(failure)) => failure,
            };
            let stalled = matches!(failure, Failure::Stalled { .. } | Failure::Slow { .. });
            let enough = if stalled { SLOWEST } else { 1 };
            if partial.furthest >= before + enough {
                backoff.reset();
            }
            let last = wrong >= MAX_WRONG;
            let waited = if last {
                Err(failure)
            } else {
                let what = format!("{} at byte {}", listed.path, partial.length);
                backoff.wait(failure, &what, &self.stop)
            };
            waited.map_err(|failure| self.error(listed, partial.length, failure))?;
        }
    }

    /// Requests what is missing of a file, and writes what comes.
    fn attempt(&self, url: &Url, partial: &mut Partial) -> Result<(), Ended> {
        if partial.length == partial.size {
            return Ok(());
        }
        let mut answer = match self.http.get(url, partial.length) {
            Err(Failure::Status {
                status: StatusCode::RANGE_NOT_SATISFIABLE,
                host,
                ..
            }) => {
                partial.restart()?;
                return Err(Failure::Changed { host }.into());
            }
            answer => answer?,
        };
        check_start(&answer, partial)?;
        let length = answer.response.headers().get(CONTENT_LENGTH);
        let length = length.and_then(|it| it.to_str().ok()?.parse::<u64>().ok());
        if let Some(length) = length.filter(|it| partial.length + it != partial.size) {
            return Err(Failure::Length {
                host: answer.host,
                actual: partial.length + length,
                expected: partial.size,
            }
            .into());
        }
        self.receive(&mut answer, length.is_some(), partial)
    }

    fn receive(
        &self,
        answer: &mut Answer,
        length_is_known: bool,
        partial: &mut Partial,
    ) -> Result<(), Ended> {
        let mut chunk = vec![0; CHUNK];
        let mut window = (Instant::now(), 0);
        loop {
            if self.stop.load(Ordering::Relaxed) {
                return Err(Failure::Stopped.into());
            }
            if partial.length == partial.size && length_is_known {
                return Ok(());
            }
            let read = match answer.response.read(&mut chunk) {
                Ok(read) => read,
                // The file is complete; only the end of the answer is not.
                Err(_) if partial.length == partial.size => return Ok(()),
                Err(error) => return Err(self.http.broken(&answer.host, error).into()),
            };
            if read == 0 {
                let complete = partial.length == partial.size;
                let cut = io::ErrorKind::UnexpectedEof.into();
                let failure = || self.http.broken(&answer.host, cut);
                return if complete {
                    Ok(())
                } else {
                    Err(failure().into())
                };
            }
            let new = read as u64;
            if partial.length + new > partial.size {
                let actual = partial.length + new;
                partial.restart()?;
                return Err(Failure::Length {
                    host: answer.host.clone(),
                    actual,
                    expected: partial.size,
                }
                .into());
            }
            partial.append(&chunk[..read])?;

            window.1 += new;
            let waited = window.0.elapsed();
            if waited > self.timeout {
                if window.1 < SLOWEST && partial.length < partial.size {
                    let (host, bytes) = (answer.host.clone(), window.1);
                    return Err(Failure::Slow {
                        host,
                        bytes,
                        waited,
                    }
                    .into());
                }
                window = (Instant::now(), 0);
            }
        }
    }

    fn error(&self, listed: &Listed, received: u64, failure: Failure) -> HubError {
        refusal(&failure, self.id, self.endpoint).unwrap_or_else(|| HubError::File {
            repo: self.id.repo.clone(),
            file: listed.path.clone(),
            received,
            size: listed.size,
            source: Box::new(failure),
        })
    }

    fn io(&self, source: io::Error) -> HubError {
        HubError::Io {
            cache: self.repo.root.clone(),
            source,
        }
    }
}

/// Checks that an answer goes on where the file ends, and starts over if it does not.
fn check_start(answer: &Answer, partial: &mut Partial) -> Result<(), Ended> {
    let headers = answer.response.headers();
    let tag = etag(headers);
    let partial_answer = answer.response.status() == StatusCode::PARTIAL_CONTENT;
    let changed = || Failure::Changed {
        host: answer.host.clone(),
    };
    if partial.length > 0 && !partial_answer {
        // The host ignores ranges: the whole file comes.
        partial.restart()?;
    } else if partial_answer {
        let range = headers.get(CONTENT_RANGE).and_then(|it| it.to_str().ok());
        let expected = format!("bytes {}-{}", partial.length, partial.size - 1);
        let fits = range.is_none_or(|range| range.starts_with(&expected));
        // Without a hash, only the sender's tag tells whether its bytes belong together.
        let same = partial.hash.is_some() || partial.sender_tag == tag;
        if !fits || !same {
            partial.restart()?;
            return Err(changed().into());
        }
    }
    partial.sender_tag = tag;
    Ok(())
}

impl<'a> Partial<'a> {
    /// Opens the file, and hashes what it has. Bytes of a file without a hash are not taken over.
    fn open(path: &Path, size: u64, etag: &'a str, progress: FileProgress<'a>) -> io::Result<Self> {
        create_parent(path)?;
        let options = File::options()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .clone();
        let mut partial = Self {
            file: options.open(path)?,
            length: 0,
            size,
            etag,
            hash: hash_for(etag, size),
            furthest: 0,
            sender_tag: None,
            progress,
        };
        let length = partial.file.metadata()?.len();
        let Some(hash) = partial.hash.as_mut().filter(|_| length <= size) else {
            partial.restart()?;
            return Ok(partial);
        };
        let mut chunk = vec![0; CHUNK];
        loop {
            let read = partial.file.read(&mut chunk)?;
            if read == 0 {
                break;
            }
            hash.update(&chunk[..read]);
            partial.length += read as u64;
        }
        partial.furthest = partial.length;
        partial.progress.found(partial.length);
        Ok(partial)
    }

    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all(bytes)?;
        if let Some(hash) = &mut self.hash {
            hash.update(bytes);
        }
        self.length += bytes.len() as u64;
        self.furthest = self.furthest.max(self.length);
        self.progress.add(bytes.len() as u64);
        Ok(())
    }

    fn restart(&mut self) -> io::Result<()> {
        self.file.set_len(0)?;
        self.file.rewind()?;
        self.progress.take_back(self.length);
        self.hash = hash_for(self.etag, self.size);
        self.length = 0;
        self.sender_tag = None;
        Ok(())
    }

    /// The failure if the complete file does not have its hash.
    fn wrong_hash(&self) -> Option<Failure> {
        let digest = self.hash.clone()?.finish();
        let mut found = String::new();
        for byte in digest.as_ref() {
            write!(found, "{byte:02x}").ok()?;
        }
        (found != self.etag).then(|| Failure::Hash {
            expected: self.etag.to_owned(),
        })
    }
}

/// The hash that an entity tag is, before the file's first byte: SHA-256 of files in Git LFS, and Git's
/// hash of others.
fn hash_for(etag: &str, size: u64) -> Option<Context> {
    let is_hex = etag
        .bytes()
        .all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    match etag.len() {
        64 if is_hex => Some(Context::new(&SHA256)),
        40 if is_hex => {
            let mut hash = Context::new(&SHA1_FOR_LEGACY_USE_ONLY);
            hash.update(format!("blob {size}\0").as_bytes());
            Some(hash)
        }
        _ => None,
    }
}
