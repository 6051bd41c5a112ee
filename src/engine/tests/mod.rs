//! A pipeline that generates nothing, on a clock that only the pipeline moves: what takes how long, and
//! what comes when, is exact. Most tests do the thread's work themselves, turn by turn; those of
//! [`thread`] have a real one.

mod bench;
/// Jobs that end before they are finished.
mod ends;
/// Waiting times, and what is counted.
mod numbers;
/// Who has the device when.
mod order;
mod previews;
/// Warm-up, draining, stopping.
mod states;
/// The real thread, woken and joined.
mod thread;
