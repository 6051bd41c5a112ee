//! The one integration test binary: each module is a door of the program, or a comparison.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on should stop")]

/// The real binary, timing itself.
mod bench;
/// What each part of the source may name.
mod boundaries;
/// The real binary with checkpoints that cannot be loaded.
mod broken_models;
/// The real binary, run with arguments.
mod cli;
/// The real binary, comparing backends.
mod compare;
/// A server in this process, asked over TCP.
mod http;
/// The real binary beside diffusers.
mod parity;
/// The demo model in this process, job beside job.
#[cfg(feature = "flex")]
mod pipeline;
