//! Waits for the end of a job, with its progress on stderr.

use std::thread;
use std::time::{Duration, Instant};

use indicatif::ProgressBar;

use crate::cli::progress;
use crate::jobs::JobId;

use super::client::Client;
use super::error::JobsError;
use super::job::{Job, printable};

/// Time of a long poll: short where its progress is seen.
const POLL: Duration = Duration::from_secs(20);
const POLL_ON_TERMINAL: Duration = Duration::from_secs(1);

/// Shortest time between two requests, if the server does not wait.
const PACE: Duration = Duration::from_millis(500);

/// First and longest wait after a failure, and the longest one that the server can ask for.
const FIRST_WAIT: Duration = Duration::from_millis(500);
const LONGEST_WAIT: Duration = Duration::from_secs(15);
const MAX_RETRY_AFTER: Duration = Duration::from_mins(1);

/// Time without an answer after which the server is given up.
const PATIENCE: Duration = Duration::from_mins(10);

/// The completed job; an error if it fails, is cancelled, or has not ended at the deadline.
pub(super) fn until_completed(
    client: &Client,
    id: &JobId,
    deadline: Option<Instant>,
    quiet: bool,
) -> Result<Job, JobsError> {
    let left = || deadline.map(|end| end.saturating_duration_since(Instant::now()));
    let mut progress = Progress::new(quiet);
    let poll = if progress.bar.is_some() {
        POLL_ON_TERMINAL
    } else {
        POLL
    };
    let mut answered = Instant::now();
    let mut wait = FIRST_WAIT;
    let mut status = "unknown".to_owned();
    loop {
        let started = Instant::now();
        let pause = match client.poll(id, left().map_or(poll, |left| left.min(poll))) {
            Ok(job) => {
                progress.show(&job);
                if job.has_ended() {
                    drop(progress);
                    job.check_completed()?;
                    return Ok(job);
                }
                answered = Instant::now();
                wait = FIRST_WAIT;
                status = printable(job.status());
                PACE.saturating_sub(started.elapsed())
            }
            Err(error) if error.is_temporary() && answered.elapsed() < PATIENCE => {
                let asked = match &error {
                    JobsError::Status { retry_after, .. } => retry_after.unwrap_or(0),
                    _ => 0,
                };
                let pause = wait.max(Duration::from_secs(asked).min(MAX_RETRY_AFTER));
                wait = (2 * wait).min(LONGEST_WAIT);
                tracing::warn!(
                    "{}; trying again in {:.1} s",
                    crate::error_chain(&error),
                    pause.as_secs_f64()
                );
                pause
            }
            Err(error) => return Err(error),
        };
        if left().is_some_and(|left| left.is_zero()) {
            let id = id.to_string();
            return Err(JobsError::TimedOut { id, status });
        }
        thread::sleep(left().map_or(pause, |left| left.min(pause)));
    }
}

/// How far a job is: on a terminal a bar, elsewhere a line when it changes.
struct Progress {
    bar: Option<ProgressBar>,
    /// The last line.
    said: String,
}

impl Progress {
    fn new(quiet: bool) -> Self {
        Self {
            bar: progress::bar(quiet, "asking the server, {elapsed} passed"),
            said: String::new(),
        }
    }

    fn show(&mut self, job: &Job) {
        let line = describe(job);
        if let Some(bar) = &self.bar {
            let template = if job.status() == "in_progress" {
                "{msg} {bar:30} {pos} %, {elapsed} passed"
            } else {
                "{msg}, {elapsed} passed"
            };
            bar.set_style(progress::style(template));
            bar.set_length(100);
            bar.set_position(job.progress());
            bar.set_message(line);
        } else if self.said != line {
            tracing::info!("{line}");
            self.said = line;
        }
    }
}

impl Drop for Progress {
    /// Removes the bar, also after an error.
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// `queued, 3 jobs before it`, `in progress`, `in progress, attempt 2`.
fn describe(job: &Job) -> String {
    let status = printable(&job.status().replace('_', " "));
    let position = job.number("queue_position");
    let attempt = job.number("attempt");
    match (job.status(), position, attempt) {
        ("queued", Some(1), _) => format!("{status}, 1 job before it"),
        ("queued", Some(jobs), _) => format!("{status}, {jobs} jobs before it"),
        ("in_progress", _, Some(attempt @ 2..)) => format!("{status}, attempt {attempt}"),
        _ => status,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_line_says_how_far_a_job_is() {
        for (status, position, attempt, expected) in [
            ("queued", json!(null), 0, "queued"),
            ("queued", json!(0), 0, "queued, 0 jobs before it"),
            ("queued", json!(1), 0, "queued, 1 job before it"),
            ("in_progress", json!(null), 1, "in progress"),
            ("in_progress", json!(null), 2, "in progress, attempt 2"),
            ("a\u{1b}b", json!("x"), 2, "a b"),
        ] {
            let job = Job::new(json!({
                "id": "job-00c0ffee00c0ffee00c0ffee", "status": status,
                "queue_position": position, "attempt": attempt,
            }));
            assert_eq!(describe(&job.unwrap()), expected);
        }
    }
}
