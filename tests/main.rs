//! The one integration test binary: each module is a door of the program, or a comparison.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on should stop")]

/// The real binary, timing itself.
mod bench;
/// The real binary with checkpoints that cannot be loaded.
mod broken_models;
/// The real binary, run with arguments.
mod cli;
/// The real binary, comparing backends.
mod compare;
/// The example program that embeds kiln.
#[cfg(feature = "flex")]
mod embed;
/// A server in this process, asked over TCP.
mod http;
/// The real binary beside diffusers.
mod parity;
/// The demo model in this process, job beside job.
#[cfg(feature = "flex")]
mod pipeline;
/// Comparisons with the texts in `tests/snapshots`.
mod snapshot;
/// The tables of reports, from fixed figures.
mod tables;
