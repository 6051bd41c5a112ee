//! Jobs on one machine: a database, `jobs.redb`, and the files of completed jobs, in one folder.
//!
//! A change is on the disk before a method that makes it returns. One process at a time has the folder.
//! Leases, progress and watchers are in memory: a process that opens the folder makes the jobs available
//! again that were in progress.

mod changes;
mod core;
mod fault;
mod lease;
mod live;
mod results;
mod tables;

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};

use self::core::{Core, blocking, database_in, now_ms, off_thread};
use self::lease::{HeldWebhook, LocalLease, LocalWebhook};
use self::live::Next;
use self::tables::{read_job, read_list};
use super::{
    Content, JobCounts, JobId, JobLease, JobPage, JobStore, JobView, ListQuery, NewJob, Owner,
    StoreError, StoreSettings, Submitted, WebhookLease,
};

/// Time between two searches for result folders without a job.
const ORPHANS_EVERY: Duration = Duration::from_mins(10);

/// The store of jobs in a folder.
#[derive(Debug)]
pub struct LocalStore {
    core: Arc<Core>,
    /// When result folders without a job are searched for.
    orphans_due: Mutex<Instant>,
}

impl LocalStore {
    /// Opens the store in a folder, which is made if it does not exist. Jobs that were in progress when it
    /// was last used are queued again.
    pub async fn open(folder: &Path, settings: StoreSettings) -> Result<Arc<Self>, StoreError> {
        let path = folder.to_owned();
        let database = database_in(folder);
        let core = off_thread(&database, move || {
            let core = Core::open(&path, settings)?;
            core.recover()?;
            for (model, jobs) in core.live().other_models(&core.settings.model) {
                let own = &core.settings.model;
                let path = path.display();
                tracing::warn!(
                    "{jobs} jobs in {path} wait for the model {model}, which this server does not have: they \
                     stay queued while it serves {own}"
                );
            }
            Ok(core)
        });
        Ok(Arc::new(Self {
            core: Arc::new(core.await?),
            orphans_due: Mutex::new(Instant::now()),
        }))
    }

    /// Closes the database, so that it can be opened again while leases are held. Every later call fails.
    pub async fn close(&self) {
        let close = |core: &Arc<Core>| {
            core.close();
            Ok(())
        };
        // Closing cannot fail.
        blocking(&self.core, close).await.ok();
    }

    async fn find(&self, id: &JobId) -> Result<Option<tables::Row>, StoreError> {
        let id = id.clone();
        blocking(&self.core, move |core| {
            core.read(|tables| read_job(tables, &id))
        })
        .await
    }
}

#[async_trait]
impl JobStore for LocalStore {
    fn settings(&self) -> &StoreSettings {
        &self.core.settings
    }

    async fn submit(&self, job: NewJob) -> Result<Submitted, StoreError> {
        blocking(&self.core, |core| core.submit(job)).await
    }

    async fn get(&self, id: &JobId) -> Result<Option<JobView>, StoreError> {
        let row = self.find(id).await?;
        Ok(row.map(|row| self.core.view(&row)))
    }

    async fn watch(&self, id: &JobId) -> Result<Option<watch::Receiver<JobView>>, StoreError> {
        loop {
            let version = {
                let live = self.core.live();
                if let Some(receiver) = live.subscribe(id) {
                    return Ok(Some(receiver));
                }
                live.version
            };
            let Some(row) = self.find(id).await? else {
                return Ok(None);
            };
            let mut live = self.core.live();
            // Else the record may have changed before anything was told of it.
            if live.version == version {
                return Ok(Some(live.watch(&row)));
            }
        }
    }

    async fn list(&self, owner: &Owner, query: &ListQuery) -> Result<JobPage, StoreError> {
        let (owner, query) = (owner.clone(), query.clone());
        blocking(&self.core, move |core| {
            let (rows, has_more) = core.read(|tables| {
                let before = match &query.after {
                    None => u64::MAX,
                    Some(after) => match read_job(tables, after)? {
                        Some(row) if row.job.owner == owner => row.sequence,
                        _ => 0,
                    },
                };
                read_list(tables, owner.as_str(), before, query.limit, query.status)
            })?;
            let jobs = rows.iter().map(|row| core.view(row)).collect();
            Ok(JobPage { jobs, has_more })
        })
        .await
    }

    async fn cancel(&self, id: &JobId) -> Result<Option<JobView>, StoreError> {
        let id = id.clone();
        blocking(&self.core, move |core| core.cancel(&id)).await
    }

    async fn delete(&self, id: &JobId) -> Result<bool, StoreError> {
        let id = id.clone();
        blocking(&self.core, move |core| core.delete(&id)).await
    }

    async fn content(&self, id: &JobId, index: usize) -> Result<Option<Content>, StoreError> {
        let id = id.clone();
        blocking(&self.core, move |core| core.content(&id, index)).await
    }

    async fn take(&self) -> Result<Box<dyn JobLease>, StoreError> {
        loop {
            let mut changed = std::pin::pin!(self.core.jobs_changed.notified());
            changed.as_mut().enable();
            let next = blocking(&self.core, |core| {
                Ok(match core.try_take()? {
                    // If nobody waits any more the lease is dropped here.
                    Next::Now(taken) => Next::Now(LocalLease::new(Arc::clone(core), taken)),
                    Next::At(at) => Next::At(at),
                })
            });
            match next.await? {
                Next::Now(lease) => return Ok(Box::new(lease.handed_over())),
                Next::At(at) => wait(changed, at).await,
            }
        }
    }

    async fn take_webhook(&self) -> Result<Box<dyn WebhookLease>, StoreError> {
        loop {
            let mut changed = std::pin::pin!(self.core.webhooks_changed.notified());
            changed.as_mut().enable();
            let next = self.core.live().next_webhook(now_ms(), Instant::now());
            let (id, token, tries) = match next {
                Next::Now(next) => next,
                Next::At(at) => {
                    wait(changed, at).await;
                    continue;
                }
            };
            let mut held = HeldWebhook {
                core: Arc::clone(&self.core),
                id,
                token,
                tries,
                handed_over: false,
            };
            let row = self.find(&held.id).await?;
            held.handed_over = true;
            // Else the job was deleted meanwhile, and its webhook with it.
            if let Some(row) = row {
                let job = row.job;
                return Ok(Box::new(LocalWebhook { held, job }));
            }
        }
    }

    async fn sweep(&self) -> Result<(), StoreError> {
        let orphans = {
            let mut due = self
                .orphans_due
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            let now = Instant::now();
            let is_due = *due <= now;
            if is_due {
                *due = now + ORPHANS_EVERY;
            }
            is_due
        };
        blocking(&self.core, move |core| {
            core.recover()?;
            core.expire()?;
            if orphans {
                core.remove_orphans()?;
            }
            Ok(())
        })
        .await
    }

    async fn counts(&self) -> Result<JobCounts, StoreError> {
        let live = self.core.live();
        let (queued, oldest_queued_ms) = live.queued(&self.core.settings.model);
        Ok(JobCounts {
            queued: queued as u64,
            in_progress: live.running() as u64,
            oldest_queued_ms,
            bytes: Some(live.bytes),
        })
    }
}

/// Waits for a change, or for a time if there is one.
async fn wait(changed: impl Future<Output = ()>, at: Option<Instant>) {
    match at {
        Some(at) => {
            tokio::select! {
                () = changed => {}
                () = sleep_until(at) => {}
            }
        }
        None => changed.await,
    }
}
