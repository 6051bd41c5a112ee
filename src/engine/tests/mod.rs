//! Tests on a fake pipeline and a clock that only the test moves, so that durations and orders are
//! exact. Those of [`scheduler`] drive the scheduler alone, those of [`thread`] run the real thread,
//! and the others do the thread's work themselves, cycle by cycle.

mod adapters;
mod auto;
mod bench;
mod deadlines;
mod ends;
mod numbers;
mod order;
mod packing;
mod previews;
mod scale;
mod scheduler;
mod states;
mod thread;
mod worker;
