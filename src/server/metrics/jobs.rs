//! The metrics of durable jobs. A server without `--jobs` has none of them.

use std::time::{SystemTime, UNIX_EPOCH};

use crate::jobs::webhook::WebhookOutcome;
use crate::jobs::{JobFailure, JobStats};

use super::page::{Kind, Page};

/// Adds what this process does with jobs, and what the store last said of all of them.
pub(super) fn add(page: &mut Page, stats: &JobStats) {
    if let Some(counts) = stats.counts() {
        page.gauge(
            "kiln_jobs_queued",
            "Durable jobs that wait, of all servers that share them.",
            counts.queued as f64,
        );
        page.gauge(
            "kiln_jobs_in_progress",
            "Durable jobs whose images are being generated, of all servers that share them.",
            counts.in_progress as f64,
        );
        let now_ms = SystemTime::now().duration_since(UNIX_EPOCH);
        let now_ms = now_ms.unwrap_or_default().as_millis() as f64;
        let age = counts.oldest_queued_ms.map_or(0.0, |made| {
            let age_ms = now_ms - made as f64;
            age_ms.max(0.0) / 1000.0
        });
        page.gauge(
            "kiln_jobs_oldest_queued_seconds",
            "Age of the oldest durable job that waits; 0 if none does.",
            age,
        );
        if let Some(bytes) = counts.bytes {
            page.gauge(
                "kiln_jobs_bytes",
                "Size of the files of all durable jobs.",
                bytes as f64,
            );
        }
    }
    page.counter(
        "kiln_jobs_submitted_total",
        "Durable jobs that this server has stored.",
        stats.submitted(),
    );
    page.counter(
        "kiln_jobs_attempts_total",
        "Durable jobs that this server has begun, some of them again.",
        stats.attempts(),
    );
    let ended = stats.ended();
    page.labelled(
        (
            Kind::Counter,
            "kiln_jobs_ended_total",
            "Durable jobs that this server has ended, by outcome.",
        ),
        "outcome",
        ended.map(|(status, count)| (status.name(), count as f64)),
    );
    let mut failed = stats.failed();
    // An alert on an increase needs the value before the first one.
    failed
        .entry(JobFailure::WORKER_LOST.to_owned())
        .or_default();
    page.labelled(
        (
            Kind::Counter,
            "kiln_jobs_failed_total",
            "Durable jobs that this server has ended as failed, by the code of the failure.",
        ),
        "reason",
        failed
            .iter()
            .map(|(reason, &count)| (reason.as_str(), count as f64)),
    );
    page.labelled(
        (
            Kind::Counter,
            "kiln_webhooks_total",
            "Tries of this server to send the webhook of a job, by outcome.",
        ),
        "outcome",
        WebhookOutcome::ALL.map(|outcome| (outcome.name(), stats.webhooks.count(outcome) as f64)),
    );
}
