//! Progress of a download: bars on a terminal, log lines elsewhere, and numbers for the caller.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use indicatif::{BinaryBytes, HumanDuration, MultiProgress, ProgressBar};
use indicatif::{ProgressDrawTarget, ProgressStyle};

use super::Transfer;
use super::listing::Listed;

/// Time between two log lines.
const LOG_INTERVAL: Duration = Duration::from_secs(30);

/// Progress of all files, shared by the threads that download them.
pub(super) struct Progress {
    total_files: usize,
    total_bytes: u64,
    files: AtomicUsize,
    bytes: AtomicU64,
    bars: MultiProgress,
    total: ProgressBar,
}

/// Progress of one file.
pub(super) struct FileProgress<'a> {
    all: &'a Progress,
    bar: ProgressBar,
}

/// Writes a log line now and then.
pub(super) struct LogLines {
    /// What is downloaded.
    name: String,
    last: Instant,
    /// Bytes at the last line.
    bytes: u64,
}

impl Progress {
    /// Progress of files that are to be downloaded, with those that are there.
    pub(super) fn new(missing: &[Listed], there: &[Listed], with_bars: bool) -> Self {
        let bytes = |files: &[Listed]| files.iter().map(|file| file.size).sum::<u64>();
        let bytes_there = bytes(there);
        let total_bytes = bytes_there + bytes(missing);
        let bars = MultiProgress::new();
        if !with_bars {
            bars.set_draw_target(ProgressDrawTarget::hidden());
        }
        let total = bars.add(ProgressBar::new(total_bytes));
        total.set_style(style("{binary_bytes_per_sec:>12} {eta:>4}"));
        total.set_message("all files");
        total.set_position(bytes_there);
        total.reset_eta();
        Self {
            total_files: there.len() + missing.len(),
            total_bytes,
            files: AtomicUsize::new(there.len()),
            bytes: AtomicU64::new(bytes_there),
            bars,
            total,
        }
    }

    pub(super) fn file(&self, name: &str, size: u64) -> FileProgress<'_> {
        let bar = self.bars.add(ProgressBar::new(size));
        bar.set_style(style("{eta:>17}"));
        bar.set_message(name.to_owned());
        FileProgress { all: self, bar }
    }

    pub(super) fn transfer(&self) -> Transfer {
        Transfer {
            files: self.files.load(Ordering::Relaxed),
            total_files: self.total_files,
            bytes: self.bytes.load(Ordering::Relaxed),
            total_bytes: self.total_bytes,
        }
    }

    pub(super) fn is_hidden(&self) -> bool {
        self.bars.is_hidden()
    }

    /// Removes the bars from the terminal.
    pub(super) fn clear(&self) {
        self.bars.clear().ok();
    }
}

impl FileProgress<'_> {
    /// Counts bytes that were there before.
    pub(super) fn found(&self, bytes: u64) {
        self.add(bytes);
        self.all.total.reset_eta();
        self.bar.reset_eta();
    }

    pub(super) fn add(&self, bytes: u64) {
        self.all.bytes.fetch_add(bytes, Ordering::Relaxed);
        self.all.total.inc(bytes);
        self.bar.inc(bytes);
    }

    /// Takes back bytes that have to be downloaded again.
    pub(super) fn take_back(&self, bytes: u64) {
        let left = self.all.bytes.fetch_sub(bytes, Ordering::Relaxed);
        self.all.total.set_position(left.saturating_sub(bytes));
        self.bar.reset();
    }

    pub(super) fn finish(&self) {
        self.all.files.fetch_add(1, Ordering::Relaxed);
    }
}

impl Drop for FileProgress<'_> {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
        self.all.bars.remove(&self.bar);
    }
}

impl LogLines {
    /// `start` is how far the download is already.
    pub(super) fn new(name: String, start: Transfer) -> Self {
        Self {
            name,
            last: Instant::now(),
            bytes: start.bytes,
        }
    }

    /// Writes a line if the last one is long ago.
    pub(super) fn update(&mut self, now: Transfer) {
        let passed = self.last.elapsed();
        if passed < LOG_INTERVAL {
            return;
        }
        tracing::info!("{}", line(&self.name, now, self.bytes, passed));
        self.last = Instant::now();
        self.bytes = now.bytes;
    }
}

/// How far a download is, its rate since it was at `before` bytes, and the time left at this rate.
fn line(name: &str, now: Transfer, before: u64, passed: Duration) -> String {
    let rate = now.bytes.saturating_sub(before) as f64 / passed.as_secs_f64();
    let left = (now.total_bytes - now.bytes.min(now.total_bytes)) as f64 / rate;
    let left = match Duration::try_from_secs_f64(left) {
        Ok(left) => format!("{} left", HumanDuration(left)),
        Err(_) => "time left not known".to_owned(),
    };
    format!(
        "downloading {name}: {} of {} ({:.0} %), {} of {} files, {}/s, {left}",
        BinaryBytes(now.bytes),
        BinaryBytes(now.total_bytes),
        100.0 * now.bytes as f64 / now.total_bytes.max(1) as f64,
        now.files,
        now.total_files,
        BinaryBytes(rate as u64),
    )
}

fn style(end: &str) -> ProgressStyle {
    let template =
        format!("{{wide_msg}} {{bar:12}} {{binary_bytes:>10}}/{{binary_total_bytes:10}} {end}");
    ProgressStyle::with_template(&template).expect("the template is valid")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn log_lines_have_rate_and_time_left() {
        let now = Transfer {
            files: 3,
            total_files: 24,
            bytes: 3 << 30,
            total_bytes: 12 << 30,
        };
        assert_eq!(
            line("a/b", now, 0, Duration::from_secs(30)),
            "downloading a/b: 3.00 GiB of 12.00 GiB (25 %), 3 of 24 files, 102.40 MiB/s, 2 minutes \
             left"
        );
        assert!(line("a/b", now, now.bytes, LOG_INTERVAL).ends_with("0 B/s, time left not known"));
    }

    #[test]
    fn bytes_that_are_taken_back_are_counted_once() {
        let listed = |path: &str, size| Listed {
            path: path.to_owned(),
            size,
            etag: None,
        };
        let progress = Progress::new(&[listed("a", 60)], &[listed("b", 40)], false);
        let file = progress.file("a", 60);
        file.found(20);
        file.add(30);
        file.take_back(50);
        file.add(60);
        file.finish();
        let expected = Transfer {
            files: 2,
            total_files: 2,
            bytes: 100,
            total_bytes: 100,
        };
        assert_eq!(progress.transfer(), expected);
    }
}
