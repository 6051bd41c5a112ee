//! What can go wrong in the folder of jobs, as messages for the person who runs the server.

use std::io::{self, ErrorKind};
use std::path::Path;

use crate::jobs::{JobId, StoreError};

/// Why an access to the database failed.
#[derive(Debug)]
pub(super) enum Fault {
    Database(redb::Error),
    /// A record that this version cannot read.
    Unreadable {
        id: JobId,
        error: String,
    },
    Store(StoreError),
}

macro_rules! from_database {
    ($($error:ty),*) => {$(
        impl From<$error> for Fault {
            fn from(error: $error) -> Self {
                Self::Database(error.into())
            }
        }
    )*};
}

from_database!(
    redb::Error,
    redb::DatabaseError,
    redb::StorageError,
    redb::TableError,
    redb::TransactionError,
    redb::CommitError,
    redb::SetDurabilityError
);

impl From<StoreError> for Fault {
    fn from(error: StoreError) -> Self {
        Self::Store(error)
    }
}

impl Fault {
    /// Whether the database refuses everything from now on, until it is opened again.
    pub(super) fn stops_database(&self) -> bool {
        use redb::Error::{DatabaseClosed, Io, LockPoisoned, PreviousIo};

        let Self::Database(error) = self else {
            return false;
        };
        matches!(error, Io(_) | PreviousIo | LockPoisoned(_) | DatabaseClosed)
    }

    /// The error to report. `database` is the path of the file.
    pub(super) fn into_error(self, database: &Path) -> StoreError {
        match self {
            Self::Store(error) => error,
            Self::Unreadable { id, error } => broken(format!(
                "the record of {id} in {} cannot be read ({error}): it was written by another version of \
                 kiln, or is damaged",
                database.display()
            )),
            Self::Database(error) => database_error(&error, database),
        }
    }
}

fn database_error(error: &redb::Error, database: &Path) -> StoreError {
    let path = database.display();
    let folder = database.parent().unwrap_or(database).display();
    match error {
        redb::Error::DatabaseAlreadyOpen | redb::Error::LockProtocolMismatch => broken(format!(
            "another process uses the jobs in {folder}: stop it, or give each server a folder of its own. \
             Servers can share jobs over NATS: --jobs nats://HOST"
        )),
        redb::Error::UpgradeRequired(version) => broken(format!(
            "{path} has version {version} of the database's file format, which this kiln cannot read: use \
             the kiln that wrote it, or move {folder} away to begin without jobs"
        )),
        redb::Error::Corrupted(found) => damaged(database, found),
        redb::Error::Io(error) if error.kind() == ErrorKind::InvalidData => {
            damaged(database, &error.to_string())
        }
        redb::Error::TableTypeMismatch { .. }
        | redb::Error::TableIsMultimap(_)
        | redb::Error::TypeDefinitionChanged { .. } => broken(format!(
            "{path} is not a database of kiln's jobs: {error}. Move it away, or use another folder"
        )),
        redb::Error::Io(error) => io_error(error, database),
        error => broken(format!("{path}: {error}")),
    }
}

/// A database, or a file, that does not hold what was written to it.
pub(super) fn damaged(path: &Path, found: &str) -> StoreError {
    broken(format!(
        "{} is damaged ({found}): restore the folder of jobs from a backup, or move it away to begin \
         without jobs",
        path.display()
    ))
}

/// A file or a folder that cannot be read or written.
pub(super) fn io_error(error: &io::Error, path: &Path) -> StoreError {
    let advice = match error.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => {
            "free space on its disk, or keep fewer results with --jobs-keep or --jobs-max-bytes; kiln \
             then goes on by itself"
        }
        ErrorKind::PermissionDenied => "let this user read and write it, or use another folder",
        ErrorKind::ReadOnlyFilesystem => "use a folder that can be written",
        ErrorKind::NotADirectory | ErrorKind::AlreadyExists => "name a folder",
        _ => "check the disk, and that this user can read and write the folder",
    };
    broken(format!(
        "cannot read or write {}: {error}: {advice}",
        path.display()
    ))
}

pub(super) fn broken(message: String) -> StoreError {
    StoreError::Broken(message)
}
