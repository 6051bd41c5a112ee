//! The integration tests, in one binary: one module for each interface of the program, and for each
//! comparison with the reference.

#![expect(clippy::unwrap_used, reason = "a failed precondition ends the test")]

/// `kiln bench`, run as a process.
mod bench;
/// What each module may name, read from the source files.
mod boundaries;
/// `kiln generate` with invalid checkpoints, run as a process.
mod broken_models;
/// `kiln bench --calibrate-cache`, run as a process.
#[cfg(feature = "flex")]
mod calibrate;
/// The command line, run as a process.
mod cli;
/// `kiln compare`, run as a process.
mod compare;
/// One model on several devices, in this process.
#[cfg(feature = "flex")]
mod devices;
/// The example program that embeds kiln.
#[cfg(feature = "flex")]
mod embed;
/// The HTTP server, in this process, over TCP.
mod http;
/// Adapter files compared with diffusers and peft, in this process.
mod lora_parity;
/// The memory of jobs on flex, planned and measured.
#[cfg(all(feature = "flex", target_os = "linux"))]
mod memory;
/// Jobs of the demo model in company, compared with each alone.
#[cfg(feature = "flex")]
mod packed;
/// `kiln generate` compared with diffusers.
mod parity;
/// The demo model's pipeline, in this process, with one and several jobs.
#[cfg(feature = "flex")]
mod pipeline;
/// Noise levels and samplers other than a checkpoint's own, compared with diffusers.
#[cfg(feature = "flex")]
mod schedules;
/// Helpers for tests that run `kiln serve` as a process.
mod served;
/// Configurations for random weights.
mod shape;
/// Comparisons with the texts in `tests/snapshots`.
mod snapshot;
/// `kiln serve` before it is ready, run as a process.
#[cfg(all(unix, feature = "flex"))]
mod start;
/// The tables of reports, from fixed figures.
mod tables;
