//! Webhooks: an ended job is posted to the URL that its request named, signed as the Standard Webhooks
//! specification says (<https://www.standardwebhooks.com>).
//!
//! - `settings`, `secret`, `check`, `address`: what may be sent where
//! - `message`, `send`, `resolver`: one try
//! - `schedule`, `deliver`, `stats`: tries until one succeeds
//!
//! Which webhooks are due, and how often each was tried, is kept by the [`JobStore`](super::JobStore):
//! a webhook is sent at least once, also if the server ends in between.

mod address;
mod check;
mod deliver;
mod message;
mod resolver;
mod schedule;
mod secret;
mod send;
mod settings;
mod stats;

#[cfg(test)]
mod tests;

pub use self::check::InvalidWebhook;
pub use self::deliver::deliver;
pub use self::secret::{InvalidWebhookSecret, WebhookSecret};
pub use self::settings::{InvalidWebhookHost, WebhookHost, WebhookSettings};
pub use self::stats::{WebhookOutcome, WebhookStats};
