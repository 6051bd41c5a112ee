//! Writes files at paths that a user gave, whole or not at all.
//!
//! The content goes to a temporary file in the same folder, which then takes the name. A failure
//! (a full disk, a process that is ended) leaves the old file as it was. A program that is ended by
//! a signal calls [`remove_unfinished`] first.

use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use tempfile::{NamedTempFile, TempDir};

/// Most symbolic links that a path may pass through: as many as Linux follows.
const MAX_LINKS: usize = 40;

/// Begin and end of temporary names. Short, so that every name has room for them.
const PREFIX: &str = ".kiln-";
const SUFFIX: &str = ".tmp";

/// The temporary files that this process is writing.
static UNFINISHED: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// A new folder of files, under a temporary name until it is complete. Dropping it removes it.
#[derive(Debug)]
pub struct NewFolder(TempDir);

/// Where the content of a file goes.
enum Target {
    /// A device, a pipe, a socket, or a file that this process has open, such as `/dev/stdout`.
    Stream,
    /// A regular file, after symbolic links. `old` describes the file that is there.
    File {
        path: PathBuf,
        old: Option<Metadata>,
    },
}

/// Writes a file. A new file has the permissions that the umask gives, an existing one keeps its
/// own. Symbolic links are followed.
///
/// Devices and pipes are written directly. So is an existing file in a folder that takes no new
/// files: only there a failure may leave a part of the file.
///
/// # Errors
///
/// The file cannot be written. It is as it was before, and no temporary file is left.
pub fn write(path: &Path, content: &[u8]) -> io::Result<()> {
    write_with_mode(path, content, 0o666)
}

/// As [`write()`]; only the user can read a new file.
pub fn write_private(path: &Path, content: &[u8]) -> io::Result<()> {
    write_with_mode(path, content, 0o600)
}

/// Checks that a file can be written, without changing an existing one. Does not open pipes, whose
/// readers would see an end.
pub fn check(path: &Path) -> io::Result<()> {
    match Target::find(path)? {
        Target::Stream => Ok(()),
        // Permissions are not enough (read-only mounts, quotas, names that the disk cannot hold).
        Target::File { path, old: None } => {
            let _no_signal = unfinished();
            OpenOptions::new()
                .write(true)
                .create_new(true)
                .open(&path)?;
            fs::remove_file(&path)
        }
        Target::File { path, old: Some(_) } => match tempfile::tempfile_in(folder_of(&path)) {
            Err(error) if !takes_no_files(&error) => Err(error),
            _ => Ok(()),
        },
    }
}

/// Removes the temporary files of all writes that are under way and calls `end`, which ends the
/// process. Until it returns no other file is begun or completed.
pub fn remove_unfinished(end: impl FnOnce()) {
    let mut paths = unfinished();
    for path in paths.drain(..) {
        fs::remove_file(path).ok();
    }
    end();
}

impl NewFolder {
    /// Makes an empty folder in `parent`.
    pub fn create(parent: &Path) -> io::Result<Self> {
        let mut builder = temporary_name();
        #[cfg(unix)]
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o777));
        builder.tempdir_in(parent).map(Self)
    }

    /// Whether a folder of this name was not completed, as its process ended.
    pub fn is_unfinished(name: &str) -> bool {
        name.starts_with(PREFIX) && name.ends_with(SUFFIX)
    }

    /// Adds a file, durably.
    pub fn write(&self, name: &str, content: &[u8]) -> io::Result<()> {
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(self.0.path().join(name))?;
        fill(&mut file, content, None)
    }

    /// Gives the folder its name, durably. There must be nothing of this name.
    pub fn persist(mut self, path: &Path) -> io::Result<()> {
        sync_folder(self.0.path())?;
        fs::rename(self.0.path(), path)?;
        self.0.disable_cleanup(true);
        sync_folder(folder_of(path))
    }
}

/// Makes the names in a folder durable.
pub fn sync_folder(path: &Path) -> io::Result<()> {
    // Other systems cannot open a folder.
    if cfg!(unix) {
        sync(&File::open(path)?)?;
    }
    Ok(())
}

impl Target {
    fn find(path: &Path) -> io::Result<Self> {
        let is_stream = match fs::metadata(path) {
            Ok(found) => !found.is_file(),
            Err(error) if error.kind() == ErrorKind::NotFound => false,
            Err(error) => return Err(error),
        };
        let Some(path) = followed(path)?.filter(|_| !is_stream) else {
            return Ok(Self::Stream);
        };
        // Replacing a file needs no permission to write to it; asking for it keeps read-only files.
        let old = match OpenOptions::new().write(true).open(&path) {
            Ok(file) => Some(file.metadata()?),
            Err(error) if error.kind() == ErrorKind::NotFound => None,
            Err(error) => return Err(error),
        };
        Ok(Self::File { path, old })
    }
}

/// The path that symbolic links lead to, which need not exist; `None` for a file that a process has
/// open (`/dev/stdout`, `/proc/self/fd/1`), which must not be replaced by another of its name.
fn followed(path: &Path) -> io::Result<Option<PathBuf>> {
    let mut path = path.to_owned();
    for _ in 0..MAX_LINKS {
        if path.starts_with("/proc") || path.starts_with("/dev/fd") {
            return Ok(None);
        }
        match fs::read_link(&path) {
            Ok(link) => path = folder_of(&path).join(link),
            // Not a link, or nothing.
            Err(_) => return Ok(Some(path)),
        }
    }
    Err(io::Error::other("too many levels of symbolic links"))
}

/// The folder that a path is in; `.` for a bare name.
pub(crate) fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if folder != Path::new("") => folder,
        _ => Path::new("."),
    }
}

fn write_with_mode(path: &Path, content: &[u8], mode: u32) -> io::Result<()> {
    let outcome = match Target::find(path)? {
        Target::Stream => return write_directly(path, content),
        Target::File { path, old: None } => return replace(&path, content, mode, None),
        Target::File { path, old } => replace(&path, content, mode, old.as_ref()),
    };
    match outcome {
        Err(error) if takes_no_files(&error) => write_directly(path, content),
        outcome => outcome,
    }
}

/// Whether an error says that the folder takes no new files, or that the file is a mount point. Both
/// say nothing about the file itself.
fn takes_no_files(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::PermissionDenied
            | ErrorKind::ReadOnlyFilesystem
            | ErrorKind::ResourceBusy
            | ErrorKind::CrossesDevices
    )
}

fn write_directly(path: &Path, content: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).truncate(true).open(path)?;
    file.write_all(content)
}

fn replace(path: &Path, content: &[u8], mode: u32, old: Option<&Metadata>) -> io::Result<()> {
    let mut file = create(folder_of(path), mode, old)?;
    let temporary = file.path().to_owned();
    let outcome = fill(file.as_file_mut(), content, old).and_then(|()| {
        let _no_signal = unfinished();
        // If this fails the temporary file is removed.
        file.persist(path).map(drop).map_err(|error| error.error)
    });
    unfinished().retain(|it| *it != temporary);
    outcome
}

fn temporary_name() -> tempfile::Builder<'static, 'static> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(PREFIX).suffix(SUFFIX);
    builder
}

/// Creates a temporary file that is removed when it is dropped.
#[cfg_attr(
    not(unix),
    expect(unused_variables, reason = "other systems have no file modes")
)]
fn create(folder: &Path, mode: u32, old: Option<&Metadata>) -> io::Result<NamedTempFile> {
    let mut builder = temporary_name();
    #[cfg(unix)]
    {
        use std::os::unix::fs::{MetadataExt, PermissionsExt};

        let mode = old.map_or(mode, |old| old.mode() & 0o777);
        builder.permissions(fs::Permissions::from_mode(mode));
    }
    let mut unfinished = unfinished();
    let file = builder.tempfile_in(folder)?;
    unfinished.push(file.path().to_owned());
    Ok(file)
}

fn fill(file: &mut File, content: &[u8], old: Option<&Metadata>) -> io::Result<()> {
    old.map_or(Ok(()), |old| keep_owner_and_mode(file, old))?;
    file.write_all(content)?;
    sync(file)
}

fn sync(file: &File) -> io::Result<()> {
    match file.sync_all() {
        // Some network file systems cannot.
        Err(error)
            if matches!(
                error.kind(),
                ErrorKind::InvalidInput | ErrorKind::Unsupported
            ) =>
        {
            Ok(())
        }
        outcome => outcome,
    }
}

#[cfg(unix)]
fn keep_owner_and_mode(file: &File, old: &Metadata) -> io::Result<()> {
    use std::os::unix::fs::{MetadataExt, fchown};

    let new = file.metadata()?;
    if (new.uid(), new.gid()) != (old.uid(), old.gid()) {
        // Only root can give a file to another user, and others only to a group of theirs.
        fchown(file, Some(old.uid()), Some(old.gid()))
            .or_else(|_| fchown(file, None, Some(old.gid())))
            .ok();
    }
    if new.mode() == old.mode() {
        return Ok(());
    }
    file.set_permissions(old.permissions())
}

#[cfg(not(unix))]
fn keep_owner_and_mode(_file: &File, _old: &Metadata) -> io::Result<()> {
    Ok(())
}

fn unfinished() -> MutexGuard<'static, Vec<PathBuf>> {
    UNFINISHED.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
#[cfg(unix)]
mod tests;
