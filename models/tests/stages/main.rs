//! Compares every stage of the models with what diffusers computes for the same tiny checkpoints.
//! `tests/reference/make_fixtures.py` makes the fixtures and names the versions it uses.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on should stop")]
#![expect(
    clippy::print_stdout,
    reason = "--nocapture shows how close each stage is"
)]

mod devices;
mod failure;
mod finite;
mod fixtures;
mod halves;
mod low_rank;
mod merged;
mod modules;
mod packing;
mod parity;
mod tiles;
