//! Which URLs a webhook may have, decided when a job is submitted and again before each try.

use std::net::IpAddr;

use reqwest::Url;

use super::address;
use super::settings::{WebhookSettings, address_of};

/// Longest URL.
const MAX_BYTES: usize = 2048;

/// Why a webhook is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidWebhook {
    #[error("this server sends no webhooks, as it was started without --webhook-host")]
    Off,
    #[error(
        "this server sends no webhooks, as it was started without --webhook-secret to sign them"
    )]
    Unsigned,
    #[error("a URL has at most {MAX_BYTES} bytes, got {bytes}")]
    Long { bytes: usize },
    #[error("{url:?} is not an address such as https://example.org/hook")]
    Url { url: String },
    #[error("the URL must begin with https:// or http://, got {scheme}:")]
    Scheme { scheme: String },
    #[error("leave the user name and the password out of the URL")]
    Credentials,
    #[error(
        "{host} is not among the hosts that webhooks may be sent to; the server's option \
         --webhook-host adds it"
    )]
    Host { host: String },
    #[error(
        "{host} is a private or reserved address; the server's option \
         --webhook-allow-private allows such addresses"
    )]
    Private { host: String },
}

impl WebhookSettings {
    /// Checks the URL of a webhook as far as this is possible without a look-up of its host: the
    /// addresses that the host has are checked when the webhook is sent.
    pub fn check(&self, url: &str) -> Result<(), InvalidWebhook> {
        self.parse(url).map(drop)
    }

    /// A URL that webhooks may be sent to.
    pub(super) fn parse(&self, text: &str) -> Result<Url, InvalidWebhook> {
        if self.hosts.is_empty() {
            return Err(InvalidWebhook::Off);
        }
        if self.secrets.is_empty() {
            return Err(InvalidWebhook::Unsigned);
        }
        if text.len() > MAX_BYTES {
            let bytes = text.len();
            return Err(InvalidWebhook::Long { bytes });
        }
        let no_url = || InvalidWebhook::Url {
            url: text.to_owned(),
        };
        // A URL's parser removes or replaces these, so that people and programs read different hosts.
        let is_odd = |letter: char| letter.is_whitespace() || letter.is_control() || letter == '\\';
        if text.contains(is_odd) {
            return Err(no_url());
        }
        let url = Url::parse(text).map_err(|_| no_url())?;
        if !matches!(url.scheme(), "http" | "https") {
            let scheme = url.scheme().to_owned();
            return Err(InvalidWebhook::Scheme { scheme });
        }
        if !url.username().is_empty() || url.password().is_some() {
            return Err(InvalidWebhook::Credentials);
        }
        let host = url.host_str().ok_or_else(no_url)?.to_owned();
        if !self.hosts.iter().any(|allowed| allowed.matches(&url)) {
            let host = match url.port() {
                Some(port) => format!("{host}:{port}"),
                None => host,
            };
            return Err(InvalidWebhook::Host { host });
        }
        if !self.allow_private && is_private(&host) {
            return Err(InvalidWebhook::Private { host });
        }
        Ok(url)
    }
}

/// Whether a host is a private address, or the name of this machine.
fn is_private(host: &str) -> bool {
    let name = host.strip_suffix('.').unwrap_or(host);
    let is_local = name == "localhost" || name.ends_with(".localhost");
    let is_private = |address: IpAddr| !address::is_public(address);
    is_local || address_of(name).is_some_and(is_private)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(hosts: &[&str], allow_private: bool) -> WebhookSettings {
        WebhookSettings {
            hosts: hosts.iter().map(|host| host.parse().unwrap()).collect(),
            secrets: vec!["whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw".parse().unwrap()],
            allow_private,
        }
    }

    /// The error's message, or an empty text.
    fn refusal(settings: &WebhookSettings, url: &str) -> String {
        let outcome = settings.check(url);
        outcome.err().map_or_else(String::new, |it| it.to_string())
    }

    #[test]
    fn a_server_without_hosts_or_secrets_names_the_flag() {
        let url = "https://example.org/hook";
        let off = refusal(&WebhookSettings::default(), url);
        assert!(off.contains("without --webhook-host"), "{off}");
        let unsigned = WebhookSettings {
            secrets: Vec::new(),
            ..settings(&["example.org"], false)
        };
        let unsigned = refusal(&unsigned, url);
        assert!(unsigned.contains("without --webhook-secret"), "{unsigned}");
    }

    #[test]
    fn only_plain_urls_of_listed_hosts_pass() {
        let settings = settings(
            &["example.org", "*.hooks.example", "other.example:8443"],
            false,
        );
        for url in [
            "https://example.org/hook?job=1",
            "http://example.org:8080",
            "HTTPS://EXAMPLE.ORG/hook",
            "https://example.org./hook",
            "https://a.hooks.example/",
            "https://other.example:8443/",
        ] {
            assert_eq!(refusal(&settings, url), "", "{url}");
        }
        for (url, expected) in [
            ("https://example.com/hook", "--webhook-host"),
            ("https://hooks.example/", "--webhook-host"),
            ("https://other.example/", "--webhook-host"),
            ("https://example.org.evil.example/", "--webhook-host"),
            ("https://example.org%2eevil.example/", "--webhook-host"),
            ("ftp://example.org/hook", "https://"),
            ("file:///etc/passwd", "https://"),
            ("javascript:alert(1)", "https://"),
            ("https://user:key@example.org/", "user name"),
            ("https://example.org@evil.example/", "user name"),
            ("https://example.org\\@evil.example/", "not an address"),
            ("https://exam\tple.org/", "not an address"),
            (" https://example.org/", "not an address"),
            ("https://example.org /", "not an address"),
            ("example.org/hook", "not an address"),
            ("//example.org/hook", "not an address"),
            ("https://", "not an address"),
            ("", "not an address"),
        ] {
            let refusal = refusal(&settings, url);
            assert!(refusal.contains(expected), "{url}: {refusal}");
        }
        let long = format!("https://example.org/{}", "a".repeat(MAX_BYTES));
        assert!(refusal(&settings, &long).contains("2048 bytes"));
    }

    /// Every spelling of an address that is on the list is refused, unless private addresses may be used.
    #[test]
    fn private_addresses_are_refused_in_every_spelling() {
        for (host, url) in [
            ("127.0.0.1", "http://127.0.0.1/"),
            ("127.0.0.1", "http://127.0.0.1./"),
            ("127.0.0.1", "http://2130706433/"),
            ("127.0.0.1", "http://0x7f000001/"),
            ("127.0.0.1", "http://0x7f.1/"),
            ("127.0.0.1", "http://0177.0.0.1/"),
            ("127.0.0.1", "http://127.1:8080/"),
            ("127.0.0.1", "http://１２７.0.0.1/"),
            ("127.0.0.1", "http://%31%32%37.0.0.1/"),
            ("[::ffff:127.0.0.1]", "http://[::ffff:127.0.0.1]/"),
            ("[::ffff:127.0.0.1]", "http://[::FFFF:7f00:1]/"),
            ("[::127.0.0.1]", "http://[::127.0.0.1]/"),
            ("[64:ff9b::10.0.0.1]", "http://[64:ff9b::a00:1]/"),
            ("[::1]", "http://[::1]/"),
            ("[::]", "http://[::]/"),
            ("0.0.0.0", "http://0/"),
            ("10.1.2.3", "http://10.1.2.3/"),
            ("172.31.255.255", "http://172.31.255.255/"),
            ("192.168.0.1", "http://192.168.0.1/"),
            ("169.254.169.254", "http://169.254.169.254/latest/meta-data"),
            ("168.63.129.16", "http://168.63.129.16/"),
            ("100.100.100.200", "http://100.100.100.200/"),
            ("224.0.0.1", "http://224.0.0.1/"),
            ("255.255.255.255", "http://255.255.255.255/"),
            ("[fe80::1]", "http://[fe80::1]/"),
            ("[fd00:ec2::254]", "http://[fd00:ec2::254]/"),
            ("[ff02::1]", "http://[ff02::1]/"),
            ("localhost", "http://LOCALHOST:8091/"),
            ("localhost", "http://localhost./"),
            ("a.localhost", "http://a.localhost/"),
        ] {
            let refusal_of = |allow_private| refusal(&settings(&[host], allow_private), url);
            let refused = refusal_of(false);
            assert!(
                refused.contains("--webhook-allow-private"),
                "{url}: {refused}"
            );
            assert_eq!(refusal_of(true), "", "{url}");
            // The list is asked also where private addresses may be used.
            let unlisted = refusal(&settings(&["example.org"], true), url);
            assert!(unlisted.contains("--webhook-host"), "{url}: {unlisted}");
        }
        let public = settings(&["8.8.8.8", "[2606:4700::1111]"], false);
        assert_eq!(refusal(&public, "http://8.8.8.8/"), "");
        assert_eq!(refusal(&public, "http://[2606:4700::1111]/"), "");
    }
}
