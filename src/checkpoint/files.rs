//! Reading folders and text files, with errors that name the path.

use std::fs;
use std::path::Path;

use super::CheckpointError;

pub(super) fn read_text(path: &Path) -> Result<String, CheckpointError> {
    let text = fs::read_to_string(path).map_err(|source| CheckpointError::io(path, source))?;
    if is_lfs_pointer(text.as_bytes()) {
        return Err(CheckpointError::LfsPointer {
            path: path.to_owned(),
        });
    }
    Ok(text)
}

/// Whether a file is the pointer that a clone without Git LFS has in place of a large file:
/// <https://github.com/git-lfs/git-lfs/blob/v3.5.1/docs/spec.md>.
pub(super) fn is_lfs_pointer(content: &[u8]) -> bool {
    content.starts_with(b"version https://git-lfs")
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
