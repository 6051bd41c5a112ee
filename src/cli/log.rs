//! The log on stderr: plain lines for interactive commands; for `kiln serve`, lines with times that
//! never wait for the reader of stderr.

use std::env;
use std::io::{self, IsTerminal, Write};
use std::panic;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use tracing::level_filters::LevelFilter;
use tracing_appender::non_blocking::{ErrorCounter, NonBlocking, NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::{Layer, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;

use super::progress::LogLines;
use super::serve::LogFormat;

/// Log lines that wait for stderr at most; further ones are dropped and counted.
const MAX_WAITING_LINES: usize = 4096;

/// How long the end of the program waits for a reader of stderr that has missed lines. For one that
/// has not, it waits a second.
const LAST_LINES: Duration = Duration::from_millis(500);

/// Log format of interactive commands: the message only, no time, level or target.
pub(super) fn log_plain_lines(level: LevelFilter) {
    let layer = tracing_subscriber::fmt::layer()
        .without_time()
        .with_level(false)
        .with_target(false)
        .with_ansi(has_colours())
        .with_writer(LogLines::default);
    tracing_subscriber::registry()
        .with(layer.with_filter(log_filter(level)))
        .init();
}

/// Starts the log of a server. Keep the returned value to the end of the program.
pub(super) fn log_with_times(format: LogFormat) -> ServerLog {
    let (log, writer) = ServerLog::to(io::stderr());
    let layer = tracing_subscriber::fmt::layer().with_writer(writer);
    let layer = match format {
        LogFormat::Text => layer.with_ansi(has_colours()).boxed(),
        LogFormat::Json => layer.json().flatten_event(true).boxed(),
    };
    tracing_subscriber::registry()
        .with(layer.with_filter(log_filter(LevelFilter::INFO)))
        .init();
    log
}

/// The log of a server: lines wait in memory while nobody reads stderr. Dropping it waits for the
/// last lines to be written, but about a second at most.
#[derive(Debug)]
pub(super) struct ServerLog {
    writer: NonBlocking,
    thread: Option<WorkerGuard>,
    losses: Arc<Losses>,
}

impl ServerLog {
    fn to(output: impl Write + Send + 'static) -> (Self, NonBlocking) {
        let losses = Arc::new(Losses::default());
        let output = Output {
            output,
            losses: Arc::clone(&losses),
        };
        let (writer, thread) = NonBlockingBuilder::default()
            .lossy(true)
            .buffered_lines_limit(MAX_WAITING_LINES)
            .thread_name("log")
            .finish(output);
        losses.counter.set(writer.error_counter()).ok();
        let log = Self {
            writer: writer.clone(),
            thread: Some(thread),
            losses,
        };
        (log, writer)
    }

    /// Writes text after the lines that wait.
    pub(super) fn write(&mut self, text: &str) {
        // It never fails: what does not fit is counted as dropped.
        self.writer.write_all(text.as_bytes()).ok();
    }
}

impl Drop for ServerLog {
    fn drop(&mut self) {
        let end = Instant::now() + LAST_LINES;
        while self.losses.unreported() != 0 && Instant::now() < end {
            thread::sleep(Duration::from_millis(10));
        }
        // With lines that could not be reported nobody reads. The guard would print that to stdout,
        // which may be the same terminal.
        if self.losses.unreported() != 0 {
            std::mem::forget(self.thread.take());
        }
    }
}

/// Lines that were dropped.
#[derive(Debug, Default)]
struct Losses {
    counter: OnceLock<ErrorCounter>,
    reported: AtomicUsize,
}

impl Losses {
    fn unreported(&self) -> usize {
        let dropped = self.counter.get().map_or(0, ErrorCounter::dropped_lines);
        dropped.saturating_sub(self.reported.load(Ordering::Acquire))
    }
}

/// Writes the lines of the log, and reports dropped ones.
struct Output<W> {
    output: W,
    losses: Arc<Losses>,
}

impl<W: Write> Write for Output<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.output.write(bytes)
    }

    /// Called when no line waits, so that there is room for the report.
    fn flush(&mut self) -> io::Result<()> {
        self.output.flush()?;
        let lost = self.losses.unreported();
        if lost > 0 {
            tracing::warn!("{lost} lines of this log were dropped while nobody read it");
            self.losses.reported.fetch_add(lost, Ordering::AcqRel);
        }
        Ok(())
    }
}

/// Whether the log has colours: on a terminal, unless `NO_COLOR` is set (<https://no-color.org>).
fn has_colours() -> bool {
    io::stderr().is_terminal() && env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

/// kiln's messages of this level, and warnings of libraries.
fn log_filter(level: LevelFilter) -> Targets {
    Targets::new()
        .with_default(LevelFilter::WARN)
        .with_target("kiln", level)
        // The job reports a panic on a device's thread, and kernel_cache a cache that does not work.
        .with_target("cubecl_common", LevelFilter::OFF)
        // Prints every measurement if two processes tune the same operation.
        .with_target("cubecl_runtime::tune", LevelFilter::ERROR)
}

/// Logs a panic as one line without a backtrace: the engine catches it, and it ends one job only.
pub(super) fn log_panics_on_one_line() {
    panic::set_hook(Box::new(|info| {
        let location = info.location().map(ToString::to_string).unwrap_or_default();
        let message = kiln_models::panic_message(info.payload());
        tracing::error!("panic at {location}: {message}");
    }));
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

    use super::*;

    /// A stderr that blocks until its text is received.
    struct Unread(SyncSender<String>);

    impl Write for Unread {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let text = String::from_utf8_lossy(bytes).into_owned();
            self.0.send(text).map_err(io::Error::other)?;
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn unread() -> (ServerLog, Receiver<String>) {
        let (sender, receiver) = sync_channel(0);
        (ServerLog::to(Unread(sender)).0, receiver)
    }

    #[test]
    fn the_last_lines_are_written_before_the_end() {
        let (mut log, lines) = unread();
        let reader = thread::spawn(move || lines.iter().collect::<String>());
        for line in 0..100 {
            log.write(&format!("{line}\n"));
        }
        drop(log);
        let written = reader.join().unwrap();
        assert!(
            written.lines().map(str::parse).eq((0..100).map(Ok)),
            "{written}"
        );
    }

    #[test]
    fn a_stderr_that_nobody_reads_delays_neither_the_work_nor_the_end() {
        for lines in [10, 3 * MAX_WAITING_LINES] {
            let (mut log, receiver) = unread();
            let start = Instant::now();
            for _ in 0..lines {
                log.write("a line\n");
            }
            assert!(start.elapsed() < Duration::from_millis(500), "{lines}");
            assert_eq!(log.losses.unreported() > 0, lines > MAX_WAITING_LINES);
            drop(log);
            assert!(start.elapsed() < Duration::from_secs(3), "{lines}");
            drop(receiver);
        }
    }
}
