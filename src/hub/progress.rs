//! Progress of a download.

use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::PoisonError;

use hf_hub::progress::DownloadEvent;
use hf_hub::progress::FileProgress;
use hf_hub::progress::FileStatus;
use hf_hub::progress::ProgressEvent;
use hf_hub::progress::ProgressHandler;
use indicatif::MultiProgress;
use indicatif::ProgressBar;
use indicatif::ProgressStyle;

use super::Transfer;

/// One progress bar for all files and one for each file, or log lines if stderr is not a terminal.
pub(super) struct Bars {
    all: MultiProgress,
    total: ProgressBar,
    files: Mutex<HashMap<String, ProgressBar>>,
}

impl Bars {
    pub(super) fn new() -> Self {
        Self {
            all: MultiProgress::new(),
            total: ProgressBar::no_length(),
            files: Mutex::default(),
        }
    }

    /// Removes the bars from the terminal.
    pub(super) fn clear(&self) {
        self.all.clear().ok();
    }

    /// How far the download is; `None` if nothing is downloaded.
    pub(super) fn transfer(&self) -> Option<Transfer> {
        let total_bytes = self.total.length().filter(|bytes| *bytes > 0)?;
        let bars = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        Some(Transfer {
            files: bars.values().filter(|bar| bar.is_finished()).count(),
            total_files: bars.len(),
            bytes: self.total.position(),
            total_bytes,
        })
    }

    fn update(&self, file: &FileProgress) {
        let mut bars = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        let bar = bars.entry(file.filename.clone()).or_insert_with(|| {
            let bar = self.all.add(ProgressBar::no_length());
            set_up(&bar, file.total_bytes, &file.filename);
            bar
        });
        if bar.is_finished() {
            return; // completion may be reported more than once
        }
        let added = file.bytes_completed.saturating_sub(bar.position());
        bar.inc(added);
        self.total.inc(added);
        if file.status == FileStatus::Complete {
            bar.finish_and_clear();
            if self.all.is_hidden() && file.total_bytes > 0 {
                tracing::info!(file = file.filename, bytes = file.total_bytes, "downloaded");
            }
        }
    }
}

impl ProgressHandler for Bars {
    fn on_progress(&self, event: &ProgressEvent) {
        match event {
            // The first event is for all files, the following ones for one file each.
            ProgressEvent::Download(DownloadEvent::Start { total_bytes, .. })
                if self.total.length().is_none() =>
            {
                if *total_bytes > 0 {
                    self.all.add(self.total.clone());
                    if self.all.is_hidden() {
                        tracing::info!(bytes = total_bytes, "downloading");
                    }
                }
                set_up(&self.total, *total_bytes, "all files");
            }
            ProgressEvent::Download(DownloadEvent::Progress { files }) => {
                for file in files {
                    self.update(file);
                }
            }
            _ => {}
        }
    }
}

fn set_up(bar: &ProgressBar, bytes: u64, name: &str) {
    let style = ProgressStyle::with_template(
        "{wide_msg} {bar:12} {binary_bytes:>10}/{binary_total_bytes:10} {eta:>4}",
    );
    bar.set_style(style.expect("the template is valid"));
    bar.set_length(bytes);
    bar.set_message(name.to_owned());
}
