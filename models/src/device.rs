//! Runs work on a device such that every failure is reported, and summarises the device's reports.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use cubecl_common::stream_id::StreamId;
use kiln_ops::faults::Checkpoint;
use kiln_ops::{FaultWatch, FusedOps};

use crate::pipeline::PipelineError;

/// How often work runs at most, if burn measures kernels each time.
const MAX_RUNS: usize = 3;

/// Longest report of a failure, in characters.
const MAX_REPORT: usize = 240;

/// Returns the backend's memory to the device when a pipeline is dropped: GPU backends keep the
/// memory of dropped tensors for later ones, and another backend could not have it.
#[derive(Debug)]
pub(crate) struct DeviceMemory<B: FusedOps> {
    device: B::Device,
    /// Memory is kept by stream.
    stream: StreamId,
}

impl<B: FusedOps> DeviceMemory<B> {
    /// The memory of this thread's stream on a device.
    pub(crate) fn of(device: B::Device) -> Self {
        Self {
            device,
            stream: StreamId::current(),
        }
    }
}

impl<B: FusedOps> Drop for DeviceMemory<B> {
    fn drop(&mut self) {
        let watch = FaultWatch::start();
        let clean_up = || {
            // Until then the device may use it.
            B::sync(&self.device).ok();
            B::memory_cleanup(&self.device);
            // The clean-up is queued as well.
            B::sync(&self.device).ok();
            Ok(())
        };
        // burn panics if a device is lost, and no caller can act on it here.
        self.stream.executes(|| caught(&watch, clean_up).ok());
    }
}

/// Runs `work` and waits for the device. `work` gets the number of the run, from 0.
///
/// burn drops the errors of earlier ops when it begins to measure kernels (autotune). If it did so,
/// the work runs once more, now with the kernels chosen.
///
/// # Errors
/// If `work` fails, or if any op that was queued on the device failed, on whichever thread.
pub(crate) fn reliably<B: FusedOps, T>(
    device: &B::Device,
    mut work: impl FnMut(usize) -> Result<T, PipelineError>,
) -> Result<T, PipelineError> {
    let mut run = 0;
    loop {
        let before = idle::<B>(device)?;
        let watch = FaultWatch::start();
        let (value, after) = caught(&watch, || Ok((work(run)?, checkpoint::<B>(device)?)))?;
        run += 1;
        // burn measures without end if a settings file asks for the time of each kernel.
        if !after.measured_since(before) || run == MAX_RUNS {
            return fault(&watch).map_or(Ok(value), Err);
        }
    }
}

/// Waits until the device has finished all queued work, and ignores its failures: they belong to
/// work that has ended with an error already.
///
/// # Errors
/// If the device fails twice in a row.
pub(crate) fn idle<B: FusedOps>(device: &B::Device) -> Result<Checkpoint, PipelineError> {
    let wait = || caught(&FaultWatch::start(), || checkpoint::<B>(device));
    wait().or_else(|_| wait())
}

/// Waits until the device has finished all queued work.
///
/// # Errors
/// [`PipelineError::Device`] if any of it failed.
pub(crate) fn checkpoint<B: FusedOps>(device: &B::Device) -> Result<Checkpoint, PipelineError> {
    B::checkpoint(device).map_err(|report| PipelineError::Device(summary(&report)))
}

/// Runs `call`, and turns a panic into an error if the cause is a failure on a device's thread.
///
/// # Errors
/// If `call` fails, or panics after a failure that `watch` has seen.
pub(crate) fn caught<T>(
    watch: &FaultWatch,
    call: impl FnOnce() -> Result<T, PipelineError>,
) -> Result<T, PipelineError> {
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(outcome) => outcome,
        Err(panic) => match fault(watch) {
            Some(error) => Err(error),
            None => resume_unwind(panic),
        },
    }
}

/// The failure that a watch has seen, if any.
pub(crate) fn fault(watch: &FaultWatch) -> Option<PipelineError> {
    watch
        .fault()
        .map(|report| PipelineError::Device(summary(report)))
}

/// The message of a caught panic.
pub fn panic_message(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<&str>().copied();
    let text = text.or_else(|| payload.downcast_ref::<String>().map(String::as_str));
    cut(text.unwrap_or("no message"))
}

/// Summarises a device's report, which may contain whole programs and backtraces, in one line: what
/// failed, and what to do about it.
pub(crate) fn summary(report: &str) -> String {
    if let Some(bytes) = number_after(report, "can't allocate buffer of size: ") {
        let mebibytes = bytes.div_ceil(1 << 20);
        return format!("no memory is left for {mebibytes} MiB; {SAVE_MEMORY}");
    }
    if ["OUT_OF_MEMORY", "out of memory", "out-of-memory"]
        .iter()
        .any(|words| report.contains(words))
    {
        return format!("no memory is left; {SAVE_MEMORY}");
    }
    if let Some((_, log)) = report.split_once("[Compilation Error]") {
        let (log, source) = log.split_once("[Source]").unwrap_or((log, ""));
        let error = log.lines().find(|line| line.contains("error"));
        return format!(
            "kernel {} does not compile: {}; try another --dtype, and please report this line",
            kernel_name(source),
            cut(error.unwrap_or(log))
        );
    }
    if let Some(answer) = driver_answer(report) {
        let what = if report.contains("Unable to ") {
            "while a kernel was loaded (`kiln cache clear` removes those that are kept)"
        } else if report.contains("Launch(") || report.contains("during launch") {
            "while a kernel was launched"
        } else {
            "while it was waited for"
        };
        return format!(
            "the driver answered {answer} {what}; try again, restart kiln if it stays so, and look \
             for messages of the driver in the system's log"
        );
    }
    if report.contains("Unknown error happened during execution") {
        return "a copy, or memory for it, was refused by the driver, and burn does not say why; try \
                again, and restart kiln if it stays so"
            .to_owned();
    }
    cut(report)
}

const SAVE_MEMORY: &str = "use smaller or fewer images, --vae-use-tiling or a smaller --dtype, or \
                           end what else is on the device";

/// The name of the kernel in CUDA C++ source: the word before the arguments.
fn kernel_name(source: &str) -> &str {
    let head = source.split_once("__global__").map_or("", |(_, head)| head);
    head.split(['(', ')'])
        .filter_map(|part| part.split_whitespace().last())
        .find(|word| *word != "__launch_bounds__" && word.parse::<u32>().is_err())
        .filter(|word| word.len() <= MAX_NAME)
        .unwrap_or("of no name")
}

/// Longest kernel name in a summary, in bytes.
const MAX_NAME: usize = 80;

/// The code and the text of the driver's first error: `DriverError(CUDA_ERROR_..., "...")`.
fn driver_answer(report: &str) -> Option<String> {
    let (_, answer) = report.split_once("DriverError(")?;
    let (answer, _) = answer.split_once(')')?;
    Some(match answer.split_once(", ") {
        Some((code, words)) => format!("{code} ({})", cut(words.trim_matches('"'))),
        None => cut(answer),
    })
}

/// Joins the informative lines of a report to one of at most [`MAX_REPORT`] characters.
fn cut(report: &str) -> String {
    // The rest is program text and backtraces.
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

/// Whether a line belongs to a backtrace or to the frame that `CubeCL` puts around every error.
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

/// The decimal number that follows `words`.
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
    fn out_of_memory_names_the_requested_size() {
        let report = "called `Result::unwrap()` on an `Err` value: can't allocate buffer of size: \
                      20971520\n   0: std::backtrace\n             at /rustc/lib.rs:1\n";
        let summary = summary(report);
        assert!(
            summary.starts_with("no memory is left for 20 MiB; use smaller"),
            "{summary}"
        );
    }

    #[test]
    fn a_compilation_error_is_reported_by_its_first_line() {
        let source =
            "extern \"C\" __global__ void __launch_bounds__(\n  128)rms_norm_f_32(\n  float \
                      error[4]) {}\n"
                .repeat(3000);
        let report = format!(
            "An error happened during execution\nCaused by:\n  The server is in an invalid state\n\
             Caused by:\n  [Launch(A compilation error happened during launch\nCaused by:\n  An \
             error: [Compilation Error] \n    default_program(1): warning #1: unused\n    \
             default_program(42): error: no operator \"-\" matches\n\n    1 error detected\n\
             [Source]  \n{source}\nBacktrace:\n"
        );
        assert_eq!(
            summary(&report),
            "kernel rms_norm_f_32 does not compile: default_program(42): error: no operator \"-\" \
             matches; try another --dtype, and please report this line"
        );
    }

    #[test]
    fn summaries_are_short() {
        let words = "é lost ".repeat(10_000);
        for report in [
            words.clone(),
            format!("[Compilation Error] error {words}[Source] __global__ {words}("),
            format!("DriverError(CUDA_ERROR_UNKNOWN, \"{words}\")"),
        ] {
            let summary = summary(&report);
            assert!(summary.chars().count() < 450, "{summary}");
            assert!(summary.contains("..."), "{summary}");
        }
    }

    #[test]
    fn a_driver_error_is_reported_by_its_code() {
        let answer = "DriverError(CUDA_ERROR_ILLEGAL_ADDRESS, \"illegal\")";
        for (report, what) in [
            (
                format!("called `unwrap()`: {answer}"),
                "while it was waited for",
            ),
            (
                format!(
                    "[Launch(An unknown error happened during launch\nCaused by:\n  {answer})]"
                ),
                "while a kernel was launched",
            ),
            (
                format!("[Launch(A compilation error\n Unable to load the PTX: {answer})]"),
                "while a kernel was loaded (`kiln cache clear` removes those that are kept)",
            ),
        ] {
            let summary = summary(&report);
            let expected =
                format!("the driver answered CUDA_ERROR_ILLEGAL_ADDRESS (illegal) {what}; try");
            assert!(summary.starts_with(&expected), "{summary}");
        }
    }

    #[test]
    fn the_frame_of_an_error_is_left_out() {
        let report = "An error happened during execution\nCaused by:\n  The server is in an \
                      invalid state\nCaused by:\n  one\n  two\nBacktrace:\n   0: cubecl\n";
        assert_eq!(summary(report), "one two");
        assert_eq!(
            summary("one\n   7: cubecl\n      at /src/lib.rs:7:1\n"),
            "one"
        );
    }
}
