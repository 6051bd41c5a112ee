//! The open database, its lock for writers, and the memory beside it.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};
use std::time::{SystemTime, UNIX_EPOCH};

use redb::{Builder, Database, Durability, ReadTransaction, ReadableDatabase};
use tokio::sync::Notify;
use tokio::time::Instant;

use super::fault::{Fault, broken, io_error};
use super::live::{Change, Live, Running};
use super::results::Results;
use super::tables::{FORMAT, Row, Tables};
use crate::files::{folder_of, sync_folder};
use crate::jobs::{JobId, JobStatus, StoreError, StoreSettings, StoredJob};

/// Pages of the database that are kept in memory.
const CACHE_BYTES: usize = 16 << 20;

pub(super) struct Core {
    pub(super) settings: StoreSettings,
    pub(super) results: Results,
    /// The database file.
    path: PathBuf,
    database: RwLock<Slot>,
    /// Held from the begin of a change until it is applied to `live`.
    writing: Mutex<()>,
    live: Mutex<Live>,
    /// Told when a job may have become available.
    pub(super) jobs_changed: Notify,
    /// Told when a webhook may have become due.
    pub(super) webhooks_changed: Notify,
}

/// The database. One that failed is closed, and opened again by the next access.
struct Slot {
    database: Option<Database>,
    /// How often it was opened.
    opened: u64,
    /// Whether it stays closed.
    ended: bool,
}

/// A change that is under way.
pub(super) struct Transaction<'t> {
    pub(super) tables: Tables<'t>,
    pub(super) now_ms: u64,
    changes: Vec<Change>,
}

impl Transaction<'_> {
    /// Stores a job.
    pub(super) fn put(&mut self, row: Row) -> Result<(), Fault> {
        self.put_with(row, None, None)
    }

    /// Stores a job, with the lease of one that is taken, or the time before which a queued one is not
    /// taken.
    pub(super) fn put_with(
        &mut self,
        row: Row,
        lease: Option<Running>,
        ready: Option<Instant>,
    ) -> Result<(), Fault> {
        self.tables.put(&row)?;
        self.changes.push(Change::Stored { row, lease, ready });
        Ok(())
    }

    /// Takes a job whose record cannot be read out of the queue, so that it is in nobody's way.
    pub(super) fn set_aside(
        &mut self,
        id: &JobId,
        queued: Option<(&str, u64)>,
        expires_ms: u64,
    ) -> Result<(), Fault> {
        self.tables.set_aside(id, queued, expires_ms)?;
        self.changes.push(Change::SetAside { id: id.clone() });
        Ok(())
    }

    /// Removes an ended job and its files.
    pub(super) fn remove(&mut self, id: &JobId, expires_ms: u64, bytes: u64) -> Result<(), Fault> {
        self.tables.remove(id, expires_ms)?;
        let id = id.clone();
        self.changes.push(Change::Removed { id, bytes });
        Ok(())
    }

    /// Plans the next try of a webhook, or forgets it.
    pub(super) fn set_webhook(
        &mut self,
        id: &JobId,
        next: Option<(u64, u32)>,
    ) -> Result<(), Fault> {
        if self.tables.set_webhook(id, next)? {
            let id = id.clone();
            self.changes.push(Change::Webhook { id, next });
        }
        Ok(())
    }
}

impl Core {
    /// Opens the store in a folder, which is made if it does not exist.
    pub(super) fn open(folder: &Path, settings: StoreSettings) -> Result<Self, StoreError> {
        let is_new = !folder.exists();
        fs::create_dir_all(folder).map_err(|error| io_error(&error, folder))?;
        let core = Self {
            settings,
            results: Results::of(folder),
            path: database_in(folder),
            database: RwLock::new(Slot {
                database: None,
                opened: 0,
                ended: false,
            }),
            writing: Mutex::new(()),
            live: Mutex::new(Live::default()),
            jobs_changed: Notify::new(),
            webhooks_changed: Notify::new(),
        };
        // Only the process that has the database may change the results.
        drop(core.slot()?);
        core.results.prepare()?;
        let mut synced = sync_folder(folder);
        if is_new {
            synced = synced.and_then(|()| sync_folder(folder_of(folder)));
        }
        synced.map_err(|error| io_error(&error, folder))?;
        Ok(core)
    }

    /// Changes the database durably, then the memory. A closure that changes nothing writes nothing.
    pub(super) fn write<T>(
        &self,
        change: impl FnOnce(&mut Transaction<'_>) -> Result<T, Fault>,
    ) -> Result<T, StoreError> {
        drop(self.slot()?);
        let _writing = lock(&self.writing);
        let slot = self.database.read().unwrap_or_else(PoisonError::into_inner);
        let outcome = slot.write(change);
        let opened = slot.opened;
        drop(slot);
        let (value, changes) = outcome.map_err(|fault| self.failed(fault, opened))?;
        if !changes.is_empty() {
            self.apply(changes);
        }
        Ok(value)
    }

    fn apply(&self, changes: Vec<Change>) {
        let mut removed = Vec::new();
        let (mut jobs, mut webhooks) = (false, false);
        for change in &changes {
            match change {
                Change::Stored { row, .. } => {
                    jobs |= row.job.status == JobStatus::Queued;
                    webhooks |= row.job.status.is_ended();
                }
                Change::Removed { id, .. } => removed.push(id.clone()),
                Change::Webhook { .. } => webhooks = true,
                Change::SetAside { .. } => {}
            }
        }
        self.live().apply(changes);
        for id in removed {
            self.results.remove(&id);
        }
        if jobs {
            self.jobs_changed.notify_waiters();
        }
        if webhooks {
            self.webhooks_changed.notify_waiters();
        }
    }

    /// Reads from the database, as it is now.
    pub(super) fn read<T>(
        &self,
        read: impl FnOnce(&ReadTransaction) -> Result<T, Fault>,
    ) -> Result<T, StoreError> {
        let slot = self.slot()?;
        let outcome = slot.read(read);
        let opened = slot.opened;
        drop(slot);
        outcome.map_err(|fault| self.failed(fault, opened))
    }

    /// The database, which is opened if it is not.
    fn slot(&self) -> Result<RwLockReadGuard<'_, Slot>, StoreError> {
        loop {
            let slot = self.database.read().unwrap_or_else(PoisonError::into_inner);
            if slot.database.is_some() {
                return Ok(slot);
            }
            drop(slot);
            self.reopen()
                .map_err(|fault| fault.into_error(&self.path))?;
        }
    }

    fn reopen(&self) -> Result<(), Fault> {
        let _writing = lock(&self.writing);
        let mut slot = self
            .database
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        if slot.ended {
            let path = self.path.display();
            return Err(broken(format!("{path} was closed")).into());
        }
        if slot.database.is_some() {
            return Ok(());
        }
        let database = open_file(&self.path)?;
        let transaction = begin(&database)?;
        {
            let mut tables = Tables::open(&transaction)?;
            let format = tables.format()?;
            if format > FORMAT {
                return Err(broken(format!(
                    "{} has format {format} of kiln's jobs, and this kiln reads formats up to {FORMAT}: \
                     use the newer kiln that wrote it, or another folder",
                    self.path.display()
                ))
                .into());
            }
            self.live().reload(&tables)?;
        }
        transaction.commit()?;
        slot.database = Some(database);
        slot.opened += 1;
        Ok(())
    }

    /// The error of a fault. A database that does nothing more is closed.
    fn failed(&self, fault: Fault, opened: u64) -> StoreError {
        if fault.stops_database() {
            let mut slot = self
                .database
                .write()
                .unwrap_or_else(PoisonError::into_inner);
            if slot.opened == opened {
                slot.database = None;
            }
        }
        fault.into_error(&self.path)
    }

    /// Closes the database for good.
    pub(super) fn close(&self) {
        let mut slot = self
            .database
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        slot.ended = true;
        slot.database = None;
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn live(&self) -> MutexGuard<'_, Live> {
        lock(&self.live)
    }

    /// A job's record at its end.
    pub(super) fn ended(&self, row: &Row, status: JobStatus, now_ms: u64) -> StoredJob {
        let mut job = StoredJob::clone(&row.job);
        job.status = status;
        job.ended_ms = Some(now_ms);
        job.expires_ms = Some(self.expires_ms(now_ms));
        job
    }

    /// When a job is deleted that ends now.
    pub(super) fn expires_ms(&self, now_ms: u64) -> u64 {
        let keep = u64::try_from(self.settings.keep.as_millis()).unwrap_or(u64::MAX);
        now_ms.saturating_add(keep)
    }
}

impl Slot {
    fn write<T>(
        &self,
        change: impl FnOnce(&mut Transaction<'_>) -> Result<T, Fault>,
    ) -> Result<(T, Vec<Change>), Fault> {
        let transaction = begin(self.open()?)?;
        let (value, changes) = {
            let mut open = Transaction {
                tables: Tables::open(&transaction)?,
                now_ms: now_ms(),
                changes: Vec::new(),
            };
            (change(&mut open)?, open.changes)
        };
        if changes.is_empty() {
            transaction.abort()?;
        } else {
            transaction.commit()?;
        }
        Ok((value, changes))
    }

    fn read<T>(&self, read: impl FnOnce(&ReadTransaction) -> Result<T, Fault>) -> Result<T, Fault> {
        read(&self.open()?.begin_read()?)
    }

    fn open(&self) -> Result<&Database, Fault> {
        let closed = || Fault::Database(redb::Error::DatabaseClosed);
        self.database.as_ref().ok_or_else(closed)
    }
}

/// Begins a change that is on the disk when its commit returns.
fn begin(database: &Database) -> Result<redb::WriteTransaction, Fault> {
    let mut transaction = database.begin_write()?;
    transaction.set_durability(Durability::Immediate)?;
    Ok(transaction)
}

/// The database file in a folder of jobs.
pub(super) fn database_in(folder: &Path) -> PathBuf {
    folder.join("jobs.redb")
}

fn open_file(path: &Path) -> Result<Database, Fault> {
    let mut builder = Builder::new();
    builder.set_cache_size(CACHE_BYTES);
    Ok(builder.create(path)?)
}

impl fmt::Debug for Core {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut text = formatter.debug_struct("Core");
        text.field("path", &self.path).finish_non_exhaustive()
    }
}

/// Unix time in milliseconds.
pub(super) fn now_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.map_or(0, |now| u64::try_from(now.as_millis()).unwrap_or(u64::MAX))
}

/// No code that holds one of these locks can panic halfway through a change of what it guards.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs work that waits for the disk.
pub(super) async fn blocking<T: Send + 'static>(
    core: &Arc<Core>,
    work: impl FnOnce(&Arc<Core>) -> Result<T, StoreError> + Send + 'static,
) -> Result<T, StoreError> {
    let path = core.path.clone();
    let core = Arc::clone(core);
    off_thread(&path, move || work(&core)).await
}

/// As [`blocking`], for a database that is not open. A panic there is a damaged database's.
pub(super) async fn off_thread<T: Send + 'static>(
    path: &Path,
    work: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
) -> Result<T, StoreError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(outcome) => outcome,
        Err(error) if error.is_panic() => Err(super::fault::damaged(path, "reading it failed")),
        Err(_) => Err(StoreError::Unavailable("the server is stopping".to_owned())),
    }
}
