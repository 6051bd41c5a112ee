//! Work on a device that either was done or ends with an error, and what the error says.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use kiln_ops::faults::Checkpoint;
use kiln_ops::{FaultWatch, FusedOps};

use crate::painter::PaintError;

/// How often work is done at most because kernels were measured meanwhile.
const MAX_RUNS: usize = 3;

/// Longest report of a failure, in characters.
const MAX_REPORT: usize = 240;

/// Does some work and waits for the device. It is an error if anything failed that the device was
/// given, wherever that came to light.
///
/// burn drops the errors of earlier ops when it begins to measure kernels. If it did, the work is
/// done once more, now that kernels are chosen; `work` is told which time it is, from 0.
pub(crate) fn reliably<B: FusedOps, T>(
    device: &B::Device,
    mut work: impl FnMut(usize) -> Result<T, PaintError>,
) -> Result<T, PaintError> {
    let mut run = 0;
    loop {
        let before = idle::<B>(device)?;
        let watch = FaultWatch::start();
        let (value, after) = caught(&watch, || Ok((work(run)?, checkpoint::<B>(device)?)))?;
        run += 1;
        // There is no end of measuring if a settings file asks for the time of each kernel.
        if !after.measured_since(before) || run == MAX_RUNS {
            return fault(&watch).map_or(Ok(value), Err);
        }
    }
}

/// Waits until the device has done all that it was given. What failed of that is not told here: it
/// was for work that has ended with an error already.
fn idle<B: FusedOps>(device: &B::Device) -> Result<Checkpoint, PaintError> {
    let wait = || caught(&FaultWatch::start(), || checkpoint::<B>(device));
    wait().or_else(|_| wait())
}

pub(crate) fn checkpoint<B: FusedOps>(device: &B::Device) -> Result<Checkpoint, PaintError> {
    B::checkpoint(device).map_err(|report| PaintError::Device(summary(&report)))
}

/// What a call gives; a panic that follows from one on a device's thread is an error.
pub(crate) fn caught<T>(
    watch: &FaultWatch,
    call: impl FnOnce() -> Result<T, PaintError>,
) -> Result<T, PaintError> {
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(outcome) => outcome,
        Err(panic) => match fault(watch) {
            Some(error) => Err(error),
            None => resume_unwind(panic),
        },
    }
}

/// What a watch has seen.
pub(crate) fn fault(watch: &FaultWatch) -> Option<PaintError> {
    watch
        .fault()
        .map(|report| PaintError::Device(summary(report)))
}

/// The message of a caught panic.
pub fn panic_message(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<&str>().copied();
    let text = text.or_else(|| payload.downcast_ref::<String>().map(String::as_str));
    cut(text.unwrap_or("no message"))
}

/// A device's own report, which may hold whole programs and backtraces, in one line: what failed,
/// and what to do about it.
pub(crate) fn summary(report: &str) -> String {
    if let Some(bytes) = number_after(report, "can't allocate buffer of size: ") {
        let mebibytes = bytes as f64 / f64::from(1 << 20);
        return format!("no memory is left for {mebibytes:.1} MiB; {SAVE_MEMORY}");
    }
    if ["OUT_OF_MEMORY", "out of memory", "out-of-memory"]
        .iter()
        .any(|words| report.contains(words))
    {
        return format!("no memory is left; {SAVE_MEMORY}");
    }
    if report.contains("[Compilation Error]") {
        let errors = report.lines().filter(|line| line.contains("error"));
        let first = errors.map(str::trim).find(|line| !is_frame(line));
        let first = cut(first.unwrap_or("the compiler does not say why"));
        return format!(
            "a kernel does not compile: {first}; try another --dtype, and please report this line"
        );
    }
    let what = cut(report);
    if report.contains("CUDA_ERROR_") {
        return format!(
            "the driver answers with an error: {what}; if it comes again, restart kiln and see \
             the system's log for messages of the driver"
        );
    }
    what
}

const SAVE_MEMORY: &str = "ask for smaller or fewer images, use --vae-use-tiling, choose --dtype \
                           bf16, or end what else uses the device";

/// The lines of a report that say something, in one line of at most [`MAX_REPORT`] characters.
fn cut(report: &str) -> String {
    // Programs and backtraces follow.
    let end = ["[Source]", "Backtrace"]
        .iter()
        .filter_map(|mark| report.find(mark))
        .min();
    let lines = report[..end.unwrap_or(report.len())].lines().map(str::trim);
    let words: Vec<&str> = lines
        .filter(|line| !is_frame(line))
        .flat_map(str::split_whitespace)
        .collect();
    let line = words.join(" ");
    match line.char_indices().nth(MAX_REPORT) {
        None => line,
        Some((end, _)) => format!("{}...", line[..end].trim_end()),
    }
}

/// Whether a line is of a backtrace, or of those that stand around every error of `CubeCL`.
fn is_frame(line: &str) -> bool {
    const EMPTY: [&str; 6] = [
        "Caused by:",
        "No backtrace available",
        "An error happened during execution",
        "A launch error happened during profiling",
        "An execution error happened during profiling",
        "The server is in an invalid state",
    ];
    EMPTY.iter().any(|words| line.ends_with(words))
        || line.starts_with("at ")
        || line
            .split_once(": ")
            .is_some_and(|(number, _)| number.parse::<u32>().is_ok())
}

fn number_after(text: &str, words: &str) -> Option<u64> {
    let rest = &text[text.find(words)? + words.len()..];
    let end = rest
        .find(|letter: char| !letter.is_ascii_digit())
        .unwrap_or(rest.len());
    rest[..end].parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_that_ran_out_says_how_much_was_asked_for() {
        let report = "called `Result::unwrap()` on an `Err` value: can't allocate buffer of size: \
                      20971520\n   0: std::backtrace\n             at /rustc/lib.rs:1\n";
        let summary = summary(report);
        assert!(
            summary.starts_with("no memory is left for 20.0 MiB; ask for smaller"),
            "{summary}"
        );
    }

    #[test]
    fn a_kernel_that_does_not_compile_is_told_by_the_compilers_first_error() {
        let source = "__global__ void kernel() { error_prone(); }\n".repeat(3000);
        let report = format!(
            "An error happened during execution\nCaused by:\n  The server is in an invalid state\n\
             Caused by:\n  [A launch error happened during profiling\nCaused by:\n  A compilation \
             error happened during launch\nCaused by:\n  An unknown error: [Compilation Error] \n    \
             default_program(1): warning #1: unused\n    default_program(42): error: no operator \
             \"-\" matches\n\n    1 error detected\n[Source]  \n{source}\nBacktrace:\n"
        );
        assert_eq!(
            summary(&report),
            "a kernel does not compile: default_program(42): error: no operator \"-\" matches; try \
             another --dtype, and please report this line"
        );
    }

    #[test]
    fn no_report_is_longer_than_some_lines() {
        let words = "é lost ".repeat(10_000);
        for report in [
            words.clone(),
            format!("[Compilation Error] error {words}"),
            format!("DriverError(CUDA_ERROR_UNKNOWN, {words})"),
        ] {
            let summary = summary(&report);
            assert!(summary.chars().count() < 450, "{summary}");
            assert!(summary.contains("lost..."), "{summary}");
        }
    }

    #[test]
    fn what_stands_around_every_error_is_left_out() {
        let report = "An error happened during execution\nCaused by:\n  The server is in an \
                      invalid state\nCaused by:\n  DriverError(CUDA_ERROR_ILLEGAL_ADDRESS, \
                      \"illegal\")\nBacktrace:\n   0: cubecl\n      at /src/lib.rs:7:1\n";
        assert_eq!(
            summary(report),
            "the driver answers with an error: DriverError(CUDA_ERROR_ILLEGAL_ADDRESS, \
             \"illegal\"); if it comes again, restart kiln and see the system's log for messages \
             of the driver"
        );
        assert_eq!(summary("one\n  two\n"), "one two");
    }
}
