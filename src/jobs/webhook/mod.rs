//! Webhooks: an ended job is posted to the URL that its request named, signed as the Standard Webhooks
//! specification says.

mod address;
mod check;
mod secret;
mod settings;

pub use self::check::InvalidWebhook;
pub use self::secret::{InvalidWebhookSecret, WebhookSecret};
pub use self::settings::{InvalidWebhookHost, WebhookHost, WebhookSettings};
