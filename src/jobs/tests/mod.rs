//! Tests of every store: the functions in [`conformance`], run on each store, and what one store alone
//! promises.

mod bench;
mod conformance;
mod local;
#[cfg(feature = "nats")]
mod nats;
#[cfg(feature = "nats")]
mod nats_server;
mod random;
