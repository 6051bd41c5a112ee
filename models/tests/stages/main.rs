//! Every stage of the models against what diffusers computed for the same tiny checkpoints.
//! The fixtures and their versions are those of tests/reference/make_fixtures.py.

mod fixtures;
mod packing;
mod parity;
