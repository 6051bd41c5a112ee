//! Compares every stage of the models with what diffusers computes for the same tiny checkpoints.
//! `tests/reference/make_fixtures.py` and `make_lora_fixtures.py` make the fixtures and name the versions
//! that they use.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on should stop")]
#![expect(
    clippy::print_stdout,
    reason = "--nocapture shows how close each stage is"
)]

mod adapter_cases;
mod adapters;
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
