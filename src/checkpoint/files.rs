//! Reading folders and text files, with errors that name the path.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::Path;

use super::CheckpointError;

pub(super) fn read_text(path: &Path) -> Result<String, CheckpointError> {
    let text = fs::read_to_string(path).map_err(|source| CheckpointError::io(path, source))?;
    if is_lfs_pointer(text.as_bytes()) {
        return Err(CheckpointError::LfsPointer {
            path: path.to_owned(),
        });
    }
    if text.is_empty() {
        return Err(CheckpointError::Empty {
            path: path.to_owned(),
        });
    }
    Ok(crate::without_mark(text))
}

/// Whether there is a file or a folder at `path`.
///
/// # Errors
/// If the path is a link to nothing, or cannot be looked at.
pub(super) fn is_there(path: &Path) -> Result<bool, CheckpointError> {
    match fs::metadata(path) {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => match fs::read_link(path) {
            Ok(target) => Err(CheckpointError::DanglingLink {
                path: path.to_owned(),
                target,
            }),
            Err(_) => Ok(false),
        },
        // A part of the path is a file.
        Err(error) if error.kind() == io::ErrorKind::NotADirectory => Ok(false),
        Err(source) => Err(CheckpointError::io(path, source)),
    }
}

/// Whether a file is the pointer that a clone without Git LFS has in place of a large file:
/// <https://github.com/git-lfs/git-lfs/blob/v3.5.1/docs/spec.md>.
pub(super) fn is_lfs_pointer(content: &[u8]) -> bool {
    content.starts_with(b"version https://git-lfs")
}

/// Refuses a file that is a pointer of Git LFS.
pub(super) fn refuse_lfs_pointer(path: &Path) -> Result<(), CheckpointError> {
    let mut start = [0; 64];
    let bytes = File::open(path)
        .and_then(|mut file| file.read(&mut start))
        .map_err(|source| CheckpointError::io(path, source))?;
    if is_lfs_pointer(&start[..bytes]) {
        return Err(CheckpointError::LfsPointer {
            path: path.to_owned(),
        });
    }
    Ok(())
}

/// The names in a folder, sorted; the names of folders end in a slash.
pub(super) fn list_folder(folder: &Path) -> Result<Vec<String>, CheckpointError> {
    let mut names = fs::read_dir(folder)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|source| CheckpointError::io(folder, source))?
        .into_iter()
        .map(|entry| {
            let slash = if entry.path().is_dir() { "/" } else { "" };
            format!("{}{slash}", entry.file_name().display())
        })
        .collect::<Vec<_>>();
    names.sort();
    Ok(names)
}
