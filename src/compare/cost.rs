//! What a stage of a run costs.

use std::fs;
use std::time::Instant;

use kiln_models::pipeline::MemoryUse;
use serde::Serialize;

/// Time and memory of one stage. Memory is in bytes, and `None` where the backend does not count.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Cost {
    pub seconds: f64,
    /// Held after the stage: of the process on CPU backends, of the device otherwise.
    pub memory_in_use: Option<u64>,
    /// As `memory_in_use`, with what is kept for reuse.
    pub memory_reserved: Option<u64>,
    /// The most that was held at once: in the stage on CPU backends under Linux, since the program
    /// began otherwise.
    pub memory_peak: Option<u64>,
}

/// Runs from the beginning of a stage to its end.
#[derive(Debug)]
pub struct CostMeter {
    started: Instant,
}

impl CostMeter {
    pub fn start() -> Self {
        // Linux: the peak of the process begins anew, at what it holds now.
        fs::write("/proc/self/clear_refs", "5").ok();
        Self {
            started: Instant::now(),
        }
    }

    /// `memory` is the pipeline's at the end.
    pub fn stop(self, memory: MemoryUse) -> Cost {
        Cost {
            seconds: self.started.elapsed().as_secs_f64(),
            memory_in_use: memory.in_use,
            memory_reserved: memory.reserved,
            memory_peak: memory.peak,
        }
    }
}
