//! Sampling: the noise levels that the denoising loop passes through. Host arithmetic only.

mod schedule;

pub(crate) use schedule::round_to;
pub use schedule::{Schedule, SchedulerConfig, TimeShift};
