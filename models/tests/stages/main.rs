//! Every stage of the models against what diffusers computed for the same tiny checkpoints.
//! The fixtures and their versions are those of `tests/reference/make_fixtures.py`.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on should stop")]
#![expect(
    clippy::print_stdout,
    reason = "--nocapture shows how close each stage is"
)]

mod failure;
mod fixtures;
mod packing;
mod parity;
