//! Looks a model up on the Hub, and downloads what the cache lacks of it.

use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError, mpsc};
use std::thread;
use std::time::Duration;

use super::cache::{self, CachedRepo};
use super::environment::Environment;
use super::error::Failure;
use super::http::Http;
use super::id::HubId;
use super::listing::{self, Listed, Listing, LookUpError};
use super::progress::{LogLines, Progress};
use super::retry::{Backoff, RETRIES};
use super::transfer::Fetcher;
use super::{HubError, Transfer};

/// Files that are downloaded at the same time, as many as in `huggingface_hub`.
const CONNECTIONS: usize = 8;

/// Time between two reports of the progress.
const REPORT_INTERVAL: Duration = Duration::from_millis(250);

/// What the Hub has of a revision.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) commit: String,
    pub(super) listing: Listing,
}

/// Asks the Hub for the commit and the files of a revision. Not `patient` means that the first failure
/// ends it.
pub(super) fn look_up(
    environment: &Environment,
    repo: &CachedRepo,
    id: &HubId,
    patient: bool,
) -> Result<Found, HubError> {
    let endpoint = environment.endpoint_name();
    tracing::info!("looking up {id} at {endpoint}");
    let http = Http::new(environment, environment.etag_timeout).map_err(client)?;
    let retries = if patient { RETRIES } else { 0 };
    let mut backoff = Backoff::new(environment.retry_wait, retries);
    loop {
        let error = match try_look_up(&http, repo, id) {
            Ok(found) => return Ok(found),
            Err(error) => error,
        };
        let waited = match error {
            LookUpError::Failure(failure) => backoff
                .wait(failure, &endpoint, &AtomicBool::new(false))
                .map_err(LookUpError::Failure),
            lacking @ LookUpError::Lacking(_) => Err(lacking),
        };
        waited.map_err(|error| listing::explain(error, id, &endpoint))?;
    }
}

fn try_look_up(http: &Http, repo: &CachedRepo, id: &HubId) -> Result<Found, LookUpError> {
    let commit = if id.is_commit() {
        id.revision.clone()
    } else {
        listing::look_up_commit(http, id)?
    };
    let listing = match repo.listing(&commit) {
        Some(listing) => listing,
        None => listing::look_up_files(http, &id.repo, &commit)?,
    };
    Ok(Found { commit, listing })
}

/// Downloads the files that the cache lacks; returns the snapshot. Writes nothing if it lacks none.
pub(super) fn complete(
    environment: &Environment,
    repo: &CachedRepo,
    id: &HubId,
    found: &Found,
    report: &(dyn Fn(Transfer) + Send + Sync),
) -> Result<PathBuf, HubError> {
    let Found { commit, listing } = found;
    let mut needed = listing.needed();
    needed.retain(|file| repo.weights || !file.path.ends_with(".safetensors"));
    if !needed.iter().any(|file| file.path == "model_index.json") {
        return Err(HubError::NotAModel {
            repo: id.repo.clone(),
        });
    }
    let io = |source: io::Error| HubError::Io {
        cache: repo.root.clone(),
        source,
    };
    let snapshot = repo.snapshot(commit);
    let (there, mut files) = needed
        .into_iter()
        .partition::<Vec<_>, _>(|file| repo.has(commit, file));
    if files.is_empty() {
        // A cache that cannot be written works without it.
        repo.set_commit(&id.revision, commit).ok();
        return Ok(snapshot);
    }
    check_space(repo, id, &files)?;
    // An older commit that is complete stays in use until this one is.
    if !id.is_commit() && repo.commit(&id.revision).is_none() {
        repo.set_commit(&id.revision, commit).map_err(io)?;
    }
    repo.set_listing(commit, listing).map_err(io)?;
    // Small files first: an interrupted download then tells what it lacks.
    files.sort_by_key(|file| file.size);
    let progress = Progress::new(&files, &there, environment.progress_bars);
    if progress.is_hidden() {
        let bytes = repo.remaining(&files);
        tracing::info!(bytes, files = files.len(), "downloading {id}");
    }
    let fetcher = Fetcher {
        http: &Http::new(environment, environment.download_timeout).map_err(client)?,
        repo,
        id,
        commit,
        endpoint: &environment.endpoint_name(),
        retry_wait: environment.retry_wait,
        timeout: environment.download_timeout,
        progress: &progress,
        stop: AtomicBool::new(false),
    };
    let fetched = fetch_all(&fetcher, files, report);
    progress.clear();
    fetched.inspect_err(|error| {
        // The list may be what is wrong: it is asked for again next time.
        if error.doubts_listing() {
            repo.forget_listing(commit);
        }
    })?;
    repo.set_commit(&id.revision, commit).map_err(io)?;
    Ok(snapshot)
}

fn check_space(repo: &CachedRepo, id: &HubId, files: &[Listed]) -> Result<(), HubError> {
    let needed = repo.remaining(files);
    match cache::free_space(&repo.root) {
        Some(free) if free < needed => Err(HubError::NoSpace {
            repo: id.repo.clone(),
            needed,
            free,
            cache: repo.root.clone(),
        }),
        _ => Ok(()),
    }
}

/// Downloads files on several threads. The first failure ends them all.
fn fetch_all(
    fetcher: &Fetcher,
    files: Vec<Listed>,
    report: &(dyn Fn(Transfer) + Send + Sync),
) -> Result<(), HubError> {
    let Fetcher { progress, stop, .. } = fetcher;
    let threads = CONNECTIONS.min(files.len());
    let queue = Mutex::new(files.into_iter());
    let failed = Mutex::new(None);
    let (alive, ended) = mpsc::channel::<()>();
    thread::scope(|scope| {
        for _ in 0..threads {
            let alive = alive.clone();
            let (queue, failed) = (&queue, &failed);
            scope.spawn(move || {
                // The reports end when the last thread drops it.
                let _alive = alive;
                while !stop.load(Ordering::Relaxed) {
                    let next = queue.lock().unwrap_or_else(PoisonError::into_inner).next();
                    let Some(file) = next else { break };
                    if let Err(error) = fetcher.fetch(&file) {
                        stop.store(true, Ordering::Relaxed);
                        let mut failed = failed.lock().unwrap_or_else(PoisonError::into_inner);
                        failed.get_or_insert(error);
                    }
                }
            });
        }
        drop(alive);
        let mut lines = LogLines::new(fetcher.id.to_string(), progress.transfer());
        loop {
            report(progress.transfer());
            if progress.is_hidden() {
                lines.update(progress.transfer());
            }
            let timeout = ended.recv_timeout(REPORT_INTERVAL);
            if timeout == Err(mpsc::RecvTimeoutError::Disconnected) {
                break;
            }
        }
    });
    report(progress.transfer());
    let failed = failed.into_inner().unwrap_or_else(PoisonError::into_inner);
    failed.map_or(Ok(()), Err)
}

fn client(failure: Failure) -> HubError {
    HubError::Client {
        source: Box::new(failure),
    }
}
