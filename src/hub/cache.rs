//! The cache of `huggingface_hub` (Python), in its layout: `refs`, `snapshots` of links to `blobs`,
//! `trees` of listings, and lock files.

use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::process;
use std::thread;
use std::time::{Duration, Instant};

use crate::files;

use super::complete;
use super::id::{folder_of_repo, is_commit};
use super::listing::{Listed, Listing};

/// Time between two attempts to take a lock.
const LOCK_POLL: Duration = Duration::from_millis(100);

/// Time between two messages about a lock that another process holds.
const LOCK_LOG: Duration = Duration::from_secs(10);

/// One model in the cache.
#[derive(Debug)]
pub(super) struct CachedRepo {
    /// The cache.
    pub(super) root: PathBuf,
    /// Name of the model's folder.
    name: String,
    symlinks: bool,
    /// Whether weights are needed.
    pub(super) weights: bool,
}

/// What the cache has of a revision.
#[derive(Debug)]
pub(super) struct Cached {
    pub(super) snapshot: PathBuf,
    /// Files that a model needs and the snapshot lacks.
    pub(super) missing: Vec<String>,
}

/// A lock on a blob, until it is dropped.
#[derive(Debug)]
pub(super) struct Lock {
    /// `None` if the file system has no locks.
    file: Option<File>,
}

impl CachedRepo {
    pub(super) fn new(root: &Path, repo: &str, symlinks: bool) -> Self {
        Self {
            root: root.to_owned(),
            name: folder_of_repo(repo),
            symlinks,
            weights: true,
        }
    }

    /// This model, with or without the need of weights.
    pub(super) fn with_weights(self, weights: bool) -> Self {
        Self { weights, ..self }
    }

    fn folder(&self) -> PathBuf {
        self.root.join(&self.name)
    }

    pub(super) fn snapshot(&self, commit: &str) -> PathBuf {
        self.folder().join("snapshots").join(commit)
    }

    pub(super) fn blob(&self, etag: &str) -> PathBuf {
        self.folder().join("blobs").join(etag)
    }

    /// The commit of a revision, as it was when the revision was last looked up.
    pub(super) fn commit(&self, revision: &str) -> Option<String> {
        if is_commit(revision) {
            return Some(revision.to_owned());
        }
        let commit = fs::read_to_string(self.reference(revision)).ok()?;
        is_commit(commit.trim()).then(|| commit.trim().to_owned())
    }

    /// What there is of a revision, without network access; `None` if there is no snapshot.
    pub(super) fn find(&self, revision: &str) -> Option<Cached> {
        let commit = self.commit(revision)?;
        let snapshot = self.snapshot(&commit);
        if !snapshot.is_dir() {
            return None;
        }
        let listing = self.listing(&commit);
        let missing = complete::missing_files(&snapshot, listing.as_ref(), self.weights);
        Some(Cached { snapshot, missing })
    }

    /// The files of a commit, as they were listed before.
    pub(super) fn listing(&self, commit: &str) -> Option<Listing> {
        Listing::read(&self.tree(commit))
    }

    /// Whether the snapshot has a file with its listed size.
    pub(super) fn has(&self, commit: &str, file: &Listed) -> bool {
        let path = self.snapshot(commit).join(&file.path);
        let size = path.metadata().ok().map(|it| it.len());
        if let Some(size) = size.filter(|size| *size != file.size) {
            tracing::warn!(
                "{} has {size} bytes where the Hub lists {}: it is downloaded again",
                path.display(),
                file.size
            );
        }
        size == Some(file.size)
    }

    /// Notes the commit of a revision. Does nothing if it is noted already.
    pub(super) fn set_commit(&self, revision: &str, commit: &str) -> io::Result<()> {
        if self.commit(revision).as_deref() == Some(commit) {
            return Ok(());
        }
        write_whole(&self.reference(revision), commit.as_bytes())
    }

    /// Keeps the files of a commit, for later look-ups without network access.
    pub(super) fn set_listing(&self, commit: &str, listing: &Listing) -> io::Result<()> {
        let path = self.tree(commit);
        if path.exists() {
            return Ok(());
        }
        write_whole(&path, &serde_json::to_vec(listing)?)
    }

    pub(super) fn forget_listing(&self, commit: &str) {
        fs::remove_file(self.tree(commit)).ok();
    }

    /// Makes a blob a file of a snapshot, in place of one that is there.
    pub(super) fn link(&self, etag: &str, commit: &str, path: &str) -> io::Result<()> {
        let target = self.snapshot(commit).join(path);
        let blob = self.blob(etag);
        create_parent(&target)?;
        let up = "../".repeat(path.split('/').count() + 1);
        let source = PathBuf::from(format!("{up}blobs/{etag}"));
        if self.symlinks {
            match symlink(&source, &target) {
                Ok(()) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                    fs::remove_file(&target)?;
                    return symlink(&source, &target);
                }
                Err(error) => {
                    tracing::debug!("{} cannot be a link: {error}", target.display());
                }
            }
        }
        // As `huggingface_hub` does where there are no symbolic links.
        fs::rename(blob, target)
    }

    /// Waits until no other process downloads a blob. `file` is what messages call it.
    pub(super) fn lock(&self, etag: &str, file: &str) -> io::Result<Lock> {
        let path = self.root.join(".locks").join(&self.name);
        let path = path.join(format!("{etag}.lock"));
        create_parent(&path)?;
        let lock = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)?;
        let mut logged: Option<Instant> = None;
        loop {
            match lock.try_lock() {
                Ok(()) => return Ok(Lock { file: Some(lock) }),
                Err(TryLockError::WouldBlock) => {
                    if logged.is_none_or(|at| at.elapsed() > LOCK_LOG) {
                        let path = path.display();
                        tracing::info!(
                            "waiting for another process that downloads {file} (it holds {path})"
                        );
                        logged = Some(Instant::now());
                    }
                    thread::sleep(LOCK_POLL);
                }
                Err(TryLockError::Error(error)) => {
                    tracing::warn!("{} cannot be locked: {error}", path.display());
                    return Ok(Lock { file: None });
                }
            }
        }
    }

    /// Where the bytes of a blob go until it is complete. Without a lock the file is this process's
    /// own.
    pub(super) fn incomplete(&self, etag: &str, lock: &Lock) -> PathBuf {
        let name = match lock.file {
            Some(_) => format!("{etag}.incomplete"),
            None => format!("{etag}.{}.incomplete", process::id()),
        };
        self.blob(&name)
    }

    /// Bytes of files that are still to be downloaded.
    pub(super) fn remaining(&self, files: &[Listed]) -> u64 {
        let length = |path: PathBuf| path.metadata().map_or(0, |it| it.len());
        let remaining = files.iter().map(|file| {
            let etag = file.etag.as_deref().unwrap_or_default();
            if length(self.blob(etag)) == file.size {
                return 0;
            }
            let begun = length(self.blob(&format!("{etag}.incomplete")));
            file.size.saturating_sub(begun)
        });
        remaining.sum()
    }

    fn reference(&self, revision: &str) -> PathBuf {
        self.folder().join("refs").join(revision)
    }

    fn tree(&self, commit: &str) -> PathBuf {
        self.folder().join("trees").join(format!("{commit}.json"))
    }
}

/// Free bytes of the file system of a folder that need not exist yet; `None` if they are not known.
#[cfg(unix)]
pub(super) fn free_space(folder: &Path) -> Option<u64> {
    let existing = folder.ancestors().find(|folder| folder.is_dir())?;
    let stats = rustix::fs::statvfs(existing).ok()?;
    // Some network file systems report no blocks at all.
    (stats.f_blocks > 0).then(|| stats.f_bavail.saturating_mul(stats.f_frsize))
}

/// Free bytes are not known on this system.
#[cfg(not(unix))]
pub(super) fn free_space(_folder: &Path) -> Option<u64> {
    None
}

pub(super) fn create_parent(path: &Path) -> io::Result<()> {
    path.parent().map_or(Ok(()), fs::create_dir_all)
}

/// Writes a small file that is either as before or complete.
fn write_whole(path: &Path, content: &[u8]) -> io::Result<()> {
    create_parent(path)?;
    files::write(path, content)
}

#[cfg(unix)]
fn symlink(source: &Path, link: &Path) -> io::Result<()> {
    std::os::unix::fs::symlink(source, link)
}

#[cfg(windows)]
fn symlink(source: &Path, link: &Path) -> io::Result<()> {
    std::os::windows::fs::symlink_file(source, link)
}
