//! One try to send a webhook.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use reqwest::dns::Resolve;
use reqwest::header::{CONTENT_TYPE, RETRY_AFTER};
use reqwest::redirect::Policy;
use reqwest::{Client, Response, StatusCode, Url};

use super::check::InvalidWebhook;
use super::message::Message;
use super::resolver::{PublicResolver, SystemResolver};
use super::schedule;
use super::secret;
use super::settings::WebhookSettings;

/// Time for everything, from the look-up of the host until the end of the answer.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Bytes of an answer that are read, so that its sender is not interrupted; they are not looked at.
const MAX_ANSWER: usize = 4 << 10;

/// Sends webhooks.
#[derive(Debug)]
pub(super) struct Sender {
    client: Client,
    settings: WebhookSettings,
}

/// How a try ended.
#[derive(Debug)]
pub(super) enum Sent {
    /// Status 2xx.
    Delivered,
    /// The settings do not allow the URL, which they did when the job was submitted.
    Refused(InvalidWebhook),
    /// Status 410.
    Gone,
    Failed {
        reason: String,
        /// What the receiver asks for.
        retry_after: Option<Duration>,
    },
}

impl Sender {
    pub(super) fn new(settings: WebhookSettings) -> reqwest::Result<Self> {
        Self::with_resolver(settings, Arc::new(SystemResolver))
    }

    /// A sender that looks host names up with `resolver`.
    pub(super) fn with_resolver(
        settings: WebhookSettings,
        resolver: Arc<dyn Resolve>,
    ) -> reqwest::Result<Self> {
        crate::hub::install_tls();
        let client = Client::builder()
            .user_agent(concat!("kiln/", env!("CARGO_PKG_VERSION")))
            .redirect(Policy::none())
            // A proxy would look the host up itself, and find private addresses.
            .no_proxy()
            .pool_max_idle_per_host(0)
            .timeout(TIMEOUT);
        let client = if settings.allow_private {
            client.dns_resolver(resolver)
        } else {
            client.dns_resolver(Arc::new(PublicResolver::new(resolver)))
        };
        let client = client.build()?;
        Ok(Self { client, settings })
    }

    /// Sends a message once.
    pub(super) async fn send(&self, url: &str, message: &Message) -> Sent {
        let url = match self.settings.parse(url) {
            Ok(url) => url,
            Err(error) => return Sent::Refused(error),
        };
        match self.post(url, message).await {
            Ok(answer) => judge(answer).await,
            Err(error) => Sent::Failed {
                // The URL may contain a key.
                reason: crate::error_chain(&error.without_url()),
                retry_after: None,
            },
        }
    }

    async fn post(&self, url: Url, message: &Message) -> reqwest::Result<Response> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let now = now.unwrap_or_default().as_secs();
        let Message { id, body } = message;
        let signatures = secret::signatures(&self.settings.secrets, id, now, body);
        self.client
            .post(url)
            .header(CONTENT_TYPE, "application/json")
            .header("webhook-id", id)
            .header("webhook-timestamp", now)
            .header("webhook-signature", signatures)
            .body(body.clone())
            .send()
            .await
    }
}

async fn judge(mut answer: Response) -> Sent {
    let status = answer.status();
    let asked = answer.headers().get(RETRY_AFTER);
    let asked = asked.and_then(|value| schedule::retry_after(value.to_str().ok()?));
    let mut read = 0;
    // What was received decides, also if the rest of it fails.
    while let Ok(Some(part)) = answer.chunk().await {
        read += part.len();
        if read > MAX_ANSWER {
            break;
        }
    }
    match status {
        status if status.is_success() => Sent::Delivered,
        StatusCode::GONE => Sent::Gone,
        status => Sent::Failed {
            reason: format!("the receiver answered with status {status}"),
            retry_after: asked,
        },
    }
}
