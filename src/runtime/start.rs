//! How far a model is on its way from its name to a first image: [`Start`].

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::hub::Transfer;

/// Work that is done before a model can generate images.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Looking for the model's files, in the cache and on the Hub.
    Finding,
    /// Downloading the files that are not cached.
    Downloading,
    /// Reading the weights onto the device.
    Loading,
    /// Generating a first image, which is dropped.
    WarmingUp,
}

impl Stage {
    /// Every stage, in its order.
    pub const ALL: [Self; 4] = [
        Self::Finding,
        Self::Downloading,
        Self::Loading,
        Self::WarmingUp,
    ];

    /// The stage in responses.
    pub fn name(self) -> &'static str {
        match self {
            Self::Finding => "finding",
            Self::Downloading => "downloading",
            Self::Loading => "loading",
            Self::WarmingUp => "warming_up",
        }
    }
}

/// The shared progress of a start. Clones share it: one thread works, others read
/// [`Start::progress`].
#[derive(Debug, Clone)]
pub struct Start(Arc<Mutex<Record>>);

/// Times are passed in, so that tests need no clock.
#[derive(Debug)]
struct Record {
    stage: Stage,
    /// When the stage began.
    since: Instant,
    /// Time in the stages before this one.
    past: [Duration; Stage::ALL.len()],
    amount: Transfer,
    /// Bytes that were there when the stage began.
    first_bytes: u64,
    /// When the last stage ended.
    end: Option<Instant>,
}

/// The progress of a start at one time.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Progress {
    pub stage: Stage,
    /// Time in this stage.
    pub elapsed: Duration,
    /// Bytes and files that are downloaded, or bytes that are loaded. The totals are 0 if they are
    /// not known.
    pub amount: Transfer,
    /// Time that the rest of this stage will probably take, if the bytes say so.
    pub estimated_rest: Option<Duration>,
}

impl Start {
    /// A start that begins now, with [`Stage::Finding`].
    pub fn new() -> Self {
        Self(Arc::new(Mutex::new(Record::new(Instant::now()))))
    }

    /// Enters a stage. An earlier stage than the present one is ignored.
    pub fn enter(&self, stage: Stage) {
        self.lock()
            .enter(stage, Transfer::default(), Instant::now());
    }

    /// Reports the state of a download.
    pub fn download(&self, transfer: Transfer) {
        let mut record = self.lock();
        record.enter(Stage::Downloading, transfer, Instant::now());
        if record.stage == Stage::Downloading {
            record.amount = transfer;
        }
    }

    /// Enters [`Stage::Loading`], in which this number of bytes is loaded; 0 if it is not known.
    pub fn load(&self, total_bytes: u64) {
        let amount = Transfer {
            total_bytes,
            ..Transfer::default()
        };
        self.lock().enter(Stage::Loading, amount, Instant::now());
    }

    /// Adds to the loaded bytes. Does nothing after [`Stage::Loading`].
    pub fn add_loaded(&self, bytes: u64) {
        let mut record = self.lock();
        if record.stage == Stage::Loading {
            let amount = &mut record.amount;
            amount.bytes = amount.bytes.saturating_add(bytes).min(amount.total_bytes);
        }
    }

    /// Ends the last stage.
    pub fn finish(&self) {
        self.lock().end.get_or_insert_with(Instant::now);
    }

    /// How far the start is.
    pub fn progress(&self) -> Progress {
        self.lock().progress(Instant::now())
    }

    /// The time that each stage has taken so far.
    pub fn times(&self) -> [(Stage, Duration); Stage::ALL.len()] {
        let record = self.lock();
        let mut times = record.past;
        times[record.stage as usize] += record.elapsed(Instant::now());
        drop(record);
        Stage::ALL.map(|stage| (stage, times[stage as usize]))
    }

    /// No code that holds this lock can panic halfway, so a poisoned lock guards sound values.
    fn lock(&self) -> MutexGuard<'_, Record> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Default for Start {
    fn default() -> Self {
        Self::new()
    }
}

impl Record {
    fn new(now: Instant) -> Self {
        Self {
            stage: Stage::Finding,
            since: now,
            past: [Duration::ZERO; Stage::ALL.len()],
            amount: Transfer::default(),
            first_bytes: 0,
            end: None,
        }
    }

    fn enter(&mut self, stage: Stage, amount: Transfer, now: Instant) {
        if stage as usize <= self.stage as usize || self.end.is_some() {
            return;
        }
        self.past[self.stage as usize] += self.elapsed(now);
        self.stage = stage;
        self.since = now;
        self.amount = amount;
        self.first_bytes = amount.bytes;
    }

    fn elapsed(&self, now: Instant) -> Duration {
        let end = self.end.unwrap_or(now);
        end.saturating_duration_since(self.since)
    }

    fn progress(&self, now: Instant) -> Progress {
        let elapsed = self.elapsed(now);
        let Transfer {
            bytes, total_bytes, ..
        } = self.amount;
        let done = bytes.saturating_sub(self.first_bytes);
        let rest = total_bytes.saturating_sub(bytes);
        let is_known = done > 0 && total_bytes > 0;
        let seconds = rest as f64 / done as f64 * elapsed.as_secs_f64();
        Progress {
            stage: self.stage,
            elapsed,
            amount: self.amount,
            estimated_rest: is_known
                .then(|| Duration::try_from_secs_f64(seconds).ok())
                .flatten(),
        }
    }
}

impl Progress {
    /// The part of the stage that is done, from 0 to 1, if the bytes are known.
    pub fn share(&self) -> Option<f64> {
        let Transfer {
            bytes, total_bytes, ..
        } = self.amount;
        (total_bytes > 0).then(|| (bytes as f64 / total_bytes as f64).min(1.0))
    }
}

/// `the model is being downloaded, 42 % done`.
impl fmt::Display for Progress {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self.stage {
            Stage::Finding => "the model's files are being looked for",
            Stage::Downloading => "the model is being downloaded",
            Stage::Loading => "the model is being loaded",
            Stage::WarmingUp => "the model generates a first image to warm up",
        })?;
        match self.share() {
            // Rounded down: 100 % means done.
            Some(share) => write!(formatter, ", {} % done", (share * 100.0) as u32),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn transfer(bytes: u64, total_bytes: u64) -> Transfer {
        Transfer {
            bytes,
            total_bytes,
            ..Transfer::default()
        }
    }

    #[test]
    fn the_rest_of_a_resumed_download_follows_from_what_was_downloaded_now() {
        let start = Instant::now();
        let after = |seconds| start + Duration::from_secs(seconds);
        let mut record = Record::new(start);
        record.enter(Stage::Downloading, transfer(600, 1000), after(5));
        assert_eq!(record.progress(after(6)).estimated_rest, None);
        record.amount = transfer(700, 1000);
        let progress = record.progress(after(15));
        assert_eq!(progress.elapsed, Duration::from_secs(10));
        assert_eq!(progress.share(), Some(0.7));
        assert_eq!(progress.estimated_rest, Some(Duration::from_secs(30)));
        assert_eq!(
            progress.to_string(),
            "the model is being downloaded, 70 % done"
        );
    }

    #[test]
    fn a_stage_without_bytes_has_no_share() {
        let start = Start::new();
        for stage in Stage::ALL {
            start.enter(stage);
            let progress = start.progress();
            assert_eq!(progress.stage, stage);
            assert_eq!((progress.share(), progress.estimated_rest), (None, None));
            assert!(!progress.to_string().contains('%'), "{progress}");
        }
    }

    #[test]
    fn a_late_report_of_an_earlier_stage_changes_nothing() {
        let start = Start::new();
        start.load(100);
        start.download(transfer(5, 10));
        start.enter(Stage::Finding);
        start.add_loaded(30);
        let progress = start.progress();
        assert_eq!(
            (progress.stage, progress.share()),
            (Stage::Loading, Some(0.3))
        );
        // A tensor that is read twice counts twice, and the whole is never exceeded.
        start.add_loaded(90);
        assert_eq!(start.progress().share(), Some(1.0));
        start.enter(Stage::WarmingUp);
        start.add_loaded(1);
        assert_eq!(start.progress().share(), None);
    }

    #[test]
    fn the_times_of_the_stages_stand_still_after_the_end() {
        let start = Start::new();
        start.load(0);
        start.enter(Stage::WarmingUp);
        start.finish();
        let times = start.times();
        assert_eq!(times[1], (Stage::Downloading, Duration::ZERO));
        std::thread::sleep(Duration::from_millis(2));
        start.enter(Stage::WarmingUp);
        start.finish();
        assert_eq!(start.times(), times);
    }
}
