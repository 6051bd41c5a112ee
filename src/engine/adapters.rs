//! The adapters of jobs: what they take on a device, and whether there is room for those of a job beside
//! those of the started ones. Pure decisions.
//!
//! The pipeline keeps the adapters that were used last, up to a number of bytes, and never evicts one that a
//! started job uses. So a job is started only if its adapters and those of the started jobs have at most
//! that many bytes together; an adapter that several jobs use counts once.

use std::fmt;

use kiln_models::adapter::AdapterUse;
use kiln_models::job::Job;
use kiln_models::pipeline::ModelInfo;

use super::entry::Entry;

/// An adapter of a job.
#[derive(Debug, Clone)]
pub(super) struct JobAdapter {
    pub(super) used: AdapterUse,
    /// What it takes on a device.
    pub(super) bytes: u64,
}

impl PartialEq for JobAdapter {
    fn eq(&self, other: &Self) -> bool {
        self.used.adapter == other.used.adapter
    }
}

/// Whether the adapters of a job are on the devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Upload {
    /// They have not been uploaded for this job.
    Due,
    Done,
    /// That failed, or they may have been dropped since. They are uploaded when the job is started.
    Tried,
}

/// What a job needs of the room for adapters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum AdapterNeed {
    /// It has no adapters.
    None,
    /// It has been started, or its adapters fit beside those of the started jobs.
    Fits,
    /// It waits, and its adapters do not fit beside those of the started jobs.
    Waits,
}

/// The device memory that is for adapters.
#[derive(Debug, Clone, Copy)]
pub(super) struct AdapterRoom {
    max_bytes: u64,
    /// Bytes of a value on the device.
    weight_size: usize,
}

impl AdapterRoom {
    pub(super) fn of(info: &ModelInfo, max_bytes: usize) -> Self {
        Self {
            max_bytes: max_bytes as u64,
            weight_size: info.weight_size(),
        }
    }

    pub(super) fn adapters_of(&self, job: &Job) -> Vec<JobAdapter> {
        let adapter = |used: &AdapterUse| JobAdapter {
            bytes: used.adapter.device_bytes(self.weight_size) as u64,
            used: used.clone(),
        };
        job.adapters.iter().map(adapter).collect()
    }

    /// Checks that the adapters of a job fit if no other job has any.
    ///
    /// # Errors
    ///
    /// If they do not.
    pub(super) fn check(&self, job: &Job) -> Result<(), AdaptersTooLarge> {
        let adapters = self.adapters_of(job);
        let needed = sum(&adapters.iter().collect::<Vec<_>>());
        if needed <= self.max_bytes {
            return Ok(());
        }
        let sizes = adapters.iter();
        let sizes = sizes.map(|it| (it.used.adapter.name().to_owned(), it.bytes));
        Err(AdaptersTooLarge {
            sizes: sizes.collect(),
            needed,
            max: self.max_bytes,
        })
    }

    /// What a job with these adapters needs that has not been started, beside those in use.
    pub(super) fn need(&self, own: &[JobAdapter], in_use: &[&JobAdapter]) -> AdapterNeed {
        if own.is_empty() {
            AdapterNeed::None
        } else if self.fits_beside(own, in_use) {
            AdapterNeed::Fits
        } else {
            AdapterNeed::Waits
        }
    }

    /// Whether adapters fit beside others.
    pub(super) fn fits_beside(&self, own: &[JobAdapter], others: &[&JobAdapter]) -> bool {
        let more = missing(own, others);
        more == 0 || others.is_empty() || sum(others).saturating_add(more) <= self.max_bytes
    }

    /// How many adapters of this many bytes there is room for.
    pub(super) fn count_of(&self, bytes: u64) -> usize {
        usize::try_from(self.max_bytes / bytes.max(1)).unwrap_or(usize::MAX)
    }
}

/// The adapters of the started jobs, each once.
pub(super) fn in_use(entries: &[Entry]) -> Vec<&JobAdapter> {
    let started = entries.iter().filter(|entry| entry.is_started());
    distinct(started.flat_map(|entry| &entry.adapters))
}

/// The adapters, each once.
pub(super) fn distinct<'a>(adapters: impl Iterator<Item = &'a JobAdapter>) -> Vec<&'a JobAdapter> {
    let mut distinct = Vec::new();
    for adapter in adapters {
        if !distinct.contains(&adapter) {
            distinct.push(adapter);
        }
    }
    distinct
}

/// Bytes of the adapters together.
pub(super) fn sum(adapters: &[&JobAdapter]) -> u64 {
    let bytes = adapters.iter().map(|adapter| adapter.bytes);
    bytes.fold(0, u64::saturating_add)
}

/// Bytes of those adapters that are not among the others.
pub(super) fn missing(own: &[JobAdapter], others: &[&JobAdapter]) -> u64 {
    let missing: Vec<&JobAdapter> = own.iter().filter(|it| !others.contains(it)).collect();
    sum(&missing)
}

/// The adapters of a job take more device memory than there is for adapters.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct AdaptersTooLarge {
    /// The adapters' names, and what each takes in bytes.
    pub sizes: Vec<(String, u64)>,
    /// Bytes of all of them.
    pub needed: u64,
    /// Bytes that adapters may take.
    pub max: u64,
}

impl fmt::Display for AdaptersTooLarge {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let size = |(name, bytes): &(String, u64)| format!("{name:?} takes {bytes} bytes");
        let sizes: Vec<String> = self.sizes.iter().map(size).collect();
        write!(
            formatter,
            "there is no room on the device for the adapters of the request: {}, {} bytes together, and \
             --lora-cache allows {}: leave adapters out, or start the server with a larger --lora-cache",
            sizes.join(", "),
            self.needed,
            self.max
        )
    }
}
