//! Which webhooks a server sends, and how it signs them.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use reqwest::Url;

use super::secret::WebhookSecret;

/// Settings of webhooks. Without hosts, or without secrets, every webhook is refused.
#[derive(Debug, Clone, Default)]
pub struct WebhookSettings {
    /// Hosts that webhooks may be sent to.
    pub hosts: Vec<WebhookHost>,
    /// Secrets that sign each webhook: each of them makes one signature.
    pub secrets: Vec<WebhookSecret>,
    /// Whether these hosts may have private addresses.
    pub allow_private: bool,
}

impl WebhookSettings {
    /// Whether webhooks can be sent.
    pub fn are_on(&self) -> bool {
        !self.hosts.is_empty() && !self.secrets.is_empty()
    }
}

/// A host on the allow-list: `example.org`, `*.example.org` for all names below it, or an IP address;
/// with `:8443` that port alone, else every port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WebhookHost {
    name: Name,
    port: Option<u16>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Name {
    Exact(String),
    /// The text after `*`, with its dot.
    Below(String),
    Address(IpAddr),
}

impl WebhookHost {
    /// Whether the host and the port of a URL are these.
    pub(super) fn matches(&self, url: &Url) -> bool {
        let host = url.host_str().unwrap_or_default();
        let host = host.strip_suffix('.').unwrap_or(host);
        let is_host = match &self.name {
            Name::Exact(name) => host == name,
            Name::Below(end) => host.len() > end.len() && host.ends_with(end.as_str()),
            Name::Address(address) => address_of(host) == Some(*address),
        };
        let is_port = self.port.is_none() || self.port == url.port_or_known_default();
        is_host && is_port
    }
}

/// The address that the host of a URL is written as.
pub(super) fn address_of(host: &str) -> Option<IpAddr> {
    let bare = host.strip_prefix('[').and_then(|it| it.strip_suffix(']'));
    bare.unwrap_or(host).parse().ok()
}

/// Why a host cannot be on the list.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("give a host name such as example.org, *.example.org or example.org:8443")]
pub struct InvalidWebhookHost;

impl FromStr for WebhookHost {
    type Err = InvalidWebhookHost;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let text = text.trim();
        let (is_below, host) = match text.strip_prefix("*.") {
            Some(rest) => (true, rest),
            None => (false, text),
        };
        // An IPv6 address alone may be without brackets.
        let bracketed = host.parse::<IpAddr>().ok().filter(IpAddr::is_ipv6);
        let host = bracketed.map_or_else(|| host.to_owned(), |address| format!("[{address}]"));
        let allowed = |letter: char| letter.is_alphanumeric() || "-_.:[]".contains(letter);
        if !host.chars().all(allowed) {
            return Err(InvalidWebhookHost);
        }
        // The scheme has no default port, so that a port is never left out.
        let port = match host.rsplit_once(':') {
            Some((_, port)) if !port.ends_with(']') => {
                let port: u16 = port.parse().map_err(|_| InvalidWebhookHost)?;
                Some(port)
            }
            _ => None,
        };
        // Read as in a URL, so that spellings are the same on both sides.
        let url = Url::parse(&format!("http://{host}/")).map_err(|_| InvalidWebhookHost)?;
        let host = url.host_str().ok_or(InvalidWebhookHost)?;
        let host = host.strip_suffix('.').unwrap_or(host);
        let name = match address_of(host) {
            Some(_) if is_below => return Err(InvalidWebhookHost),
            Some(address) => Name::Address(address),
            None if is_below => Name::Below(format!(".{host}")),
            None => Name::Exact(host.to_owned()),
        };
        Ok(Self { name, port })
    }
}

impl fmt::Display for WebhookHost {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.name {
            Name::Exact(name) => formatter.write_str(name)?,
            Name::Below(end) => write!(formatter, "*{end}")?,
            Name::Address(IpAddr::V4(address)) => write!(formatter, "{address}")?,
            Name::Address(IpAddr::V6(address)) => write!(formatter, "[{address}]")?,
        }
        match self.port {
            Some(port) => write!(formatter, ":{port}"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_are_read_as_in_a_url() {
        for (text, expected) in [
            ("example.org", "example.org"),
            ("Example.ORG.", "example.org"),
            ("*.example.org", "*.example.org"),
            ("*.example.org:8443", "*.example.org:8443"),
            ("example.org:80", "example.org:80"),
            ("10.0.0.1", "10.0.0.1"),
            ("10.1", "10.0.0.1"),
            ("[::1]:9000", "[::1]:9000"),
            ("::1", "[::1]"),
            ("localhost", "localhost"),
            ("bücher.example", "xn--bcher-kva.example"),
        ] {
            let host: WebhookHost = text.parse().unwrap();
            assert_eq!(host.to_string(), expected, "{text}");
        }
        for text in [
            "",
            "*",
            "*.",
            "https://example.org",
            "example.org/hook",
            "user@example.org",
            "example.org:0x50",
            "example.org:99999",
            "example.org:",
            "*.10.0.0.1",
            "a b",
            "*example.org",
        ] {
            assert!(text.parse::<WebhookHost>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_host_matches_itself_and_a_star_what_is_below() {
        let matches = |host: &str, url: &str| {
            let host: WebhookHost = host.parse().unwrap();
            host.matches(&Url::parse(url).unwrap())
        };
        assert!(matches("example.org", "https://example.org/x"));
        assert!(matches("example.org", "https://EXAMPLE.org.:8443/x"));
        assert!(!matches("example.org", "https://a.example.org/x"));
        assert!(!matches("example.org", "https://badexample.org/x"));
        assert!(matches("*.example.org", "https://a.b.example.org/x"));
        assert!(!matches("*.example.org", "https://example.org/x"));
        assert!(!matches("*.example.org", "https://badexample.org/x"));
        assert!(matches("example.org:443", "https://example.org/x"));
        assert!(!matches("example.org:443", "http://example.org/x"));
        assert!(matches("127.0.0.1", "http://2130706433:8080/x"));
        assert!(matches("[::1]", "http://[0:0::1]/x"));
        assert!(!matches("[::1]", "http://127.0.0.1/x"));
    }
}
