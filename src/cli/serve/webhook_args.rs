//! Arguments of `kiln serve` about webhooks.

use std::fmt;

use clap::Args;

use crate::cli::error::CliError;
use crate::jobs::webhook::{WebhookHost, WebhookSecret, WebhookSettings};

/// Where ended jobs may be posted to.
#[derive(Clone, Args)]
#[command(next_help_heading = "Jobs")]
#[expect(
    clippy::struct_field_names,
    reason = "the fields are named like the options"
)]
pub(super) struct WebhookArgs {
    /// Host that ended jobs may be posted to; may be given several times
    ///
    /// A name such as example.org, *.example.org for all names below it, or an address; with a port, such
    /// as example.org:8443, that port alone. Commas separate several hosts. Without it, jobs with a webhook
    /// are refused. Needs --webhook-secret.
    #[arg(
        long,
        value_name = "HOST",
        value_delimiter = ',',
        requires = "webhook_secret"
    )]
    webhook_host: Vec<WebhookHost>,

    /// Secret that signs webhooks: whsec_ and Base64, as in Standard Webhooks; may be given several times
    ///
    /// Each secret makes one signature, so that receivers can change from one to another. Commas separate
    /// several secrets. Other users of this machine can see the command line, but not the environment.
    #[arg(long, value_name = "SECRET", value_delimiter = ',')]
    webhook_secret: Vec<String>,

    /// Let the hosts of --webhook-host have private addresses, such as 127.0.0.1 or 10.0.0.1
    ///
    /// By default private, local and reserved addresses are never connected to, whatever name stands for
    /// them.
    #[arg(long)]
    webhook_allow_private: bool,
}

impl WebhookArgs {
    pub(super) fn settings(&self) -> Result<WebhookSettings, CliError> {
        let secrets = self.webhook_secret.iter();
        let secrets: Result<Vec<WebhookSecret>, _> = secrets.map(|text| text.parse()).collect();
        Ok(WebhookSettings {
            hosts: self.webhook_host.clone(),
            secrets: secrets?,
            allow_private: self.webhook_allow_private,
        })
    }
}

/// Leaves out the secrets.
impl fmt::Debug for WebhookArgs {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("WebhookArgs")
            .field("webhook_host", &self.webhook_host)
            .field("webhook_allow_private", &self.webhook_allow_private)
            .finish_non_exhaustive()
    }
}
