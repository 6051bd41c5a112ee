//! Retries after failed requests: how often, and after which wait.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::error::Failure;

/// Failures in succession after which a request is given up, less one.
pub(super) const RETRIES: u32 = 5;

/// How often a wait doubles.
const DOUBLINGS: u32 = 3;

/// Longest sleep before a stop is noticed.
const POLL: Duration = Duration::from_millis(50);

/// Counts failures in succession.
#[derive(Debug)]
pub(super) struct Backoff {
    /// Wait after the first failure, about.
    first: Duration,
    retries: u32,
    failures: u32,
}

impl Backoff {
    pub(super) fn new(first: Duration, retries: u32) -> Self {
        Self {
            first,
            retries,
            failures: 0,
        }
    }

    /// Forgets the failures, after progress.
    pub(super) fn reset(&mut self) {
        self.failures = 0;
    }

    /// Waits after a failure, and says so; returns the failure if it is the last one. `what` is what
    /// the request is for.
    pub(super) fn wait(
        &mut self,
        failure: Failure,
        what: &str,
        stop: &AtomicBool,
    ) -> Result<(), Failure> {
        if !failure.is_temporary() || self.failures >= self.retries {
            return Err(failure);
        }
        let random = f64::from(getrandom::u32().unwrap_or_default()) / f64::from(u32::MAX);
        let doubled = self.first * 2_u32.pow(self.failures.min(DOUBLINGS));
        let mut wait = doubled.mul_f64(0.5 + random);
        if let Failure::Status {
            retry_after: Some(asked),
            ..
        } = failure
        {
            wait = wait.max(asked);
        }
        self.failures += 1;
        tracing::warn!(
            "{what}: {}; trying again in {:.1} s ({} of {})",
            crate::error_chain(&failure),
            wait.as_secs_f64(),
            self.failures,
            self.retries
        );
        let until = Instant::now() + wait;
        while let Some(left) = until.checked_duration_since(Instant::now()) {
            if stop.load(Ordering::Relaxed) {
                return Err(Failure::Stopped);
            }
            thread::sleep(left.min(POLL));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use reqwest::StatusCode;

    use super::*;

    fn broken() -> Failure {
        Failure::Broken {
            host: "hub".to_owned(),
            source: io::ErrorKind::ConnectionReset.into(),
        }
    }

    fn status(status: StatusCode, retry_after: Option<Duration>, of_hub: bool) -> Failure {
        Failure::Status {
            host: "hub".to_owned(),
            status,
            code: None,
            retry_after,
            of_hub,
        }
    }

    #[test]
    fn five_failures_are_retried_and_progress_resets_the_count() {
        let stop = AtomicBool::new(false);
        let mut backoff = Backoff::new(Duration::from_micros(1), RETRIES);
        for _ in 0..2 {
            for _ in 0..RETRIES {
                backoff.wait(broken(), "a", &stop).unwrap();
            }
            backoff.wait(broken(), "a", &stop).unwrap_err();
            backoff.reset();
        }
    }

    #[test]
    fn the_hub_decides_how_long_to_wait() {
        let stop = AtomicBool::new(false);
        let mut backoff = Backoff::new(Duration::from_micros(1), RETRIES);
        let asked = Some(Duration::from_millis(80));
        let started = Instant::now();
        let busy = status(StatusCode::TOO_MANY_REQUESTS, asked, true);
        backoff.wait(busy, "a", &stop).unwrap();
        assert!(started.elapsed() >= Duration::from_millis(80));
    }

    #[test]
    fn refusals_of_the_hub_are_not_retried() {
        let stop = AtomicBool::new(false);
        let mut backoff = Backoff::new(Duration::from_micros(1), RETRIES);
        let mut wait = |code, of_hub| {
            let code = StatusCode::from_u16(code).unwrap();
            backoff.wait(status(code, None, of_hub), "a", &stop).is_ok()
        };
        assert!(!wait(401, true) && !wait(404, true) && !wait(507, true));
        // A signed link may have expired.
        assert!(wait(403, false) && wait(503, true));
    }

    #[test]
    fn a_stop_ends_the_wait() {
        let stop = AtomicBool::new(true);
        let mut backoff = Backoff::new(Duration::from_mins(1), RETRIES);
        let failure = backoff.wait(broken(), "a", &stop).unwrap_err();
        assert!(matches!(failure, Failure::Stopped));
    }
}
