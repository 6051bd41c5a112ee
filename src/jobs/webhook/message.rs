//! What a webhook contains.

use std::fmt::Write as _;

use serde_json::json;

use crate::jobs::{JobObject, JobStatus, Progress, StoredJob};

/// The message about the end of a job. Every try sends the same id and the same body.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Message {
    /// The header `webhook-id`.
    pub(super) id: String,
    pub(super) body: Vec<u8>,
}

impl Message {
    /// The message about a job that has ended.
    pub(super) fn new(job: &StoredJob) -> Self {
        let ended = job.ended_ms.unwrap_or(job.created_ms);
        let body = json!({
            "type": kind(job.status),
            "timestamp": utc(ended),
            "data": JobObject::new(job, Progress::default(), None),
        });
        Self {
            // A job that was deleted and submitted again with its idempotency key has the same id.
            id: format!("{}-{ended}", job.id),
            body: body.to_string().into_bytes(),
        }
    }
}

fn kind(status: JobStatus) -> &'static str {
    match status {
        JobStatus::Completed => "image.job.completed",
        JobStatus::Cancelled => "image.job.cancelled",
        _ => "image.job.failed",
    }
}

/// A Unix time in milliseconds as `2026-11-28T13:14:04.123Z`.
fn utc(ms: u64) -> String {
    const DAYS_OF_4_YEARS: u64 = 4 * 365 + 1;
    const DAYS_OF_100_YEARS: u64 = 25 * DAYS_OF_4_YEARS - 1;
    const DAYS_OF_400_YEARS: u64 = 4 * DAYS_OF_100_YEARS + 1;
    /// Days from 1 March of the year 0 until 1970.
    const BEFORE_1970: u64 = 719_468;

    let (seconds, days) = (ms / 1000 % 86_400, ms / 86_400_000 + BEFORE_1970);
    // Years begin in March here, so that a leap day is the last day of its year.
    let (era, day) = (days / DAYS_OF_400_YEARS, days % DAYS_OF_400_YEARS);
    let century = (day / DAYS_OF_100_YEARS).min(3);
    let day = day - century * DAYS_OF_100_YEARS;
    let (four, day) = (day / DAYS_OF_4_YEARS, day % DAYS_OF_4_YEARS);
    let one = (day / 365).min(3);
    let day = day - one * 365;
    // Months of 31 and 30 days alternate, five of them in 153 days.
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let year = 400 * era + 100 * century + 4 * four + one + u64::from(month >= 10);
    let month = (month + 2) % 12 + 1;

    let mut text = format!("{year:04}-{month:02}-{day:02}T");
    let (hour, minute, second) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    // Writing to a string cannot fail.
    let _ = write!(text, "{hour:02}:{minute:02}:{second:02}.{:03}Z", ms % 1000);
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_utc() {
        for (ms, expected) in [
            (0, "1970-01-01T00:00:00.000Z"),
            (951_782_399_999, "2000-02-28T23:59:59.999Z"),
            (951_782_400_000, "2000-02-29T00:00:00.000Z"),
            (951_868_800_000, "2000-03-01T00:00:00.000Z"),
            (1_614_265_330_123, "2021-02-25T15:02:10.123Z"),
            (1_709_164_800_000, "2024-02-29T00:00:00.000Z"),
            (1_735_689_599_000, "2024-12-31T23:59:59.000Z"),
            (1_735_689_600_000, "2025-01-01T00:00:00.000Z"),
            (4_107_542_400_000, "2100-03-01T00:00:00.000Z"),
            (4_107_456_000_000, "2100-02-28T00:00:00.000Z"),
        ] {
            assert_eq!(utc(ms), expected);
        }
    }
}
