//! Counts of webhooks, for the metrics.

use std::sync::atomic::{AtomicU64, Ordering};

/// How a try to send a webhook ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WebhookOutcome {
    /// The receiver has the message.
    Delivered,
    /// The try failed, and another one follows.
    Retried,
    /// The last try failed, or the receiver wants no messages.
    GivenUp,
    /// The settings do not allow the URL; nothing was sent.
    Refused,
}

impl WebhookOutcome {
    pub const ALL: [Self; 4] = [Self::Delivered, Self::Retried, Self::GivenUp, Self::Refused];

    /// The name in the metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Delivered => "delivered",
            Self::Retried => "retried",
            Self::GivenUp => "given_up",
            Self::Refused => "refused",
        }
    }
}

/// How often each outcome was there since the start.
#[derive(Debug, Default)]
pub struct WebhookStats([AtomicU64; WebhookOutcome::ALL.len()]);

impl WebhookStats {
    pub fn count(&self, outcome: WebhookOutcome) -> u64 {
        self.0[outcome as usize].load(Ordering::Relaxed)
    }

    pub(super) fn add(&self, outcome: WebhookOutcome) {
        self.0[outcome as usize].fetch_add(1, Ordering::Relaxed);
    }
}
