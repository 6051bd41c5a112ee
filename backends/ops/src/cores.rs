//! A share of the processor's cores, for one of several devices of a CPU backend: without shares,
//! each device would use all cores, and they would wait for each other.

#[cfg(any(feature = "flex", feature = "ndarray"))]
use rayon::{ThreadPool, ThreadPoolBuilder};

/// The threads that compute what one device is given.
#[derive(Debug, Default)]
pub struct Cores {
    /// `None` computes on the caller's thread and the threads that all work of the process shares.
    #[cfg(any(feature = "flex", feature = "ndarray"))]
    pool: Option<ThreadPool>,
}

impl Cores {
    /// The threads of device number `part` among `parts` devices of a CPU backend that compute side
    /// by side. All cores if `parts` is 1 or the system starts no more threads; otherwise
    /// `1 / parts` of the cores, and at least one.
    ///
    /// # Panics
    ///
    /// If there is no such part.
    #[cfg(any(feature = "flex", feature = "ndarray"))]
    pub(crate) fn share(part: usize, parts: usize) -> Self {
        assert!(part < parts, "there is no part {part} of {parts}");
        if parts == 1 {
            return Self::default();
        }
        let cores = rayon::current_num_threads();
        let threads = cores / parts + usize::from(part < cores % parts);
        let pool = ThreadPoolBuilder::new()
            .num_threads(threads.max(1))
            .thread_name(move |thread| format!("device{part}-{thread}"))
            .build();
        Self { pool: pool.ok() }
    }

    /// Runs `work` on these threads, and returns when it has finished. A panic in `work` is the
    /// caller's.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        #[cfg(any(feature = "flex", feature = "ndarray"))]
        if let Some(pool) = &self.pool {
            return pool.install(work);
        }
        work()
    }
}
