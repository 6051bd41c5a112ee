//! Sampling: the noise levels that the denoising loop passes through, and the step between two of
//! them. Schedules are host arithmetic.

mod euler;
mod schedule;

pub(crate) use euler::euler_step;
pub(crate) use schedule::round_to;
pub use schedule::{Schedule, SchedulerConfig, TimeShift};
