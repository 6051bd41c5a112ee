//! The files of completed jobs: `results/ID/0.png` and so on, in the folder of jobs.
//!
//! A job's files are written to a folder with a temporary name, which is then renamed, so that
//! `results/ID` holds either all files or does not exist. The caller renames and removes such folders only
//! while it holds the lock of the database, so that no two attempts of a job meet.

use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use bytes::Bytes;

use super::fault::{damaged, io_error};
use crate::files::NewFolder;
use crate::jobs::{JobFile, JobId, ResultFile, StoreError};

#[derive(Debug)]
pub(super) struct Results {
    folder: PathBuf,
}

impl Results {
    /// The results in a folder of jobs.
    pub(super) fn of(jobs: &Path) -> Self {
        let folder = jobs.join("results");
        Self { folder }
    }

    /// Makes the folder, tests that it can be written, and removes what interrupted writes have left.
    pub(super) fn prepare(&self) -> Result<(), StoreError> {
        let prepare = || {
            fs::create_dir_all(&self.folder)?;
            drop(NewFolder::create(&self.folder)?);
            for name in names(&self.folder)? {
                if NewFolder::is_unfinished(&name) {
                    remove_folder(&self.folder.join(name))?;
                }
            }
            Ok(())
        };
        prepare().map_err(|error| io_error(&error, &self.folder))
    }

    /// Writes files durably, to a folder with a temporary name.
    pub(super) fn stage(&self, files: &[JobFile]) -> Result<NewFolder, StoreError> {
        let stage = || {
            let stage = NewFolder::create(&self.folder)?;
            for (index, file) in files.iter().enumerate() {
                let name = format!("{index}.{}", file.extension);
                stage.write(&name, &file.content)?;
            }
            Ok(stage)
        };
        stage().map_err(|error| io_error(&error, &self.folder))
    }

    /// Gives staged files the id of their job, in place of files that an attempt left that was interrupted.
    pub(super) fn publish(&self, staged: NewFolder, id: &JobId) -> Result<(), StoreError> {
        let folder = self.folder_of(id);
        remove_folder(&folder)
            .and_then(|()| staged.persist(&folder))
            .map_err(|error| io_error(&error, &folder))
    }

    /// Removes the files of a job. What cannot be removed now is removed by a later sweep.
    pub(super) fn remove(&self, id: &JobId) {
        let folder = self.folder_of(id);
        if let Err(error) = remove_folder(&folder) {
            tracing::warn!("{}", io_error(&error, &folder));
        }
    }

    /// Ids of the jobs that have a folder.
    pub(super) fn list(&self) -> Result<Vec<JobId>, StoreError> {
        let names = names(&self.folder).map_err(|error| io_error(&error, &self.folder))?;
        Ok(names.iter().filter_map(|name| JobId::parse(name)).collect())
    }

    /// Reads a file of a completed job, and compares it with its hash.
    pub(super) fn read(
        &self,
        id: &JobId,
        index: usize,
        file: &ResultFile,
    ) -> Result<Bytes, StoreError> {
        let folder = self.folder_of(id);
        let path = find(&folder, index).map_err(|error| io_error(&error, &folder))?;
        let content = fs::read(&path).map_err(|error| io_error(&error, &path))?;
        if ResultFile::hash(&content) != file.sha256 {
            return Err(damaged(&path, "its SHA-256 is not the recorded one"));
        }
        Ok(content.into())
    }

    fn folder_of(&self, id: &JobId) -> PathBuf {
        self.folder.join(id.as_str())
    }
}

/// The names in a folder, without those that are no text.
fn names(folder: &Path) -> io::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(folder)? {
        names.extend(entry?.file_name().into_string().ok());
    }
    Ok(names)
}

/// The path of a file of this index, whatever its extension.
fn find(folder: &Path, index: usize) -> io::Result<PathBuf> {
    let prefix = format!("{index}.");
    if let Some(name) = names(folder)?.iter().find(|name| name.starts_with(&prefix)) {
        return Ok(folder.join(name));
    }
    let message = format!("there is no file {index}");
    Err(io::Error::new(ErrorKind::NotFound, message))
}

fn remove_folder(path: &Path) -> io::Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        outcome => outcome,
    }
}
