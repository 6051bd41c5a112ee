//! Protection from web pages in the user's browser: the origins whose pages may use the API, and the
//! names by which a server on a loopback address may be called.
//!
//! A browser lets any page send requests to any server that the user can reach. It names the page's
//! origin in the header `Origin`, unless the page has given its own host name the server's address
//! (DNS rebinding); then the header `Host` has that name.

#[cfg(test)]
mod tests;

use std::net::IpAddr;
use std::str::FromStr;
use std::sync::Arc;

use axum::body::Body;
use axum::http::header::{HOST, ORIGIN};
use axum::http::uri::Authority;
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Uri};
use axum::response::{IntoResponse, Response};
use tower_http::validate_request::ValidateRequest;

use super::error::ApiError;

/// How the origin of a page is related to the server's, in the words of the browser.
const SEC_FETCH_SITE: HeaderName = HeaderName::from_static("sec-fetch-site");

/// The header `Host` of a request to a reverse proxy. A page cannot set it for another origin.
const X_FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");

/// An origin of web pages: a scheme and a host, `null`, or `*` for any origin.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CorsOrigin(String);

/// A text that is not an origin.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidOrigin {
    #[error(
        "an origin is a scheme and a host, such as http://localhost:3000 or app://obsidian.md, \
         null, or * for any origin"
    )]
    Form,
    #[error("* stands for any origin and cannot be a part of one: name each origin")]
    Wildcard,
    #[error("an origin has no path: leave out everything after the host and its port")]
    Path,
    #[error("an origin with letters beyond ASCII is given as browsers send it, with xn--")]
    NotAscii,
}

impl CorsOrigin {
    /// Whether any origin is meant.
    pub(super) fn is_any(&self) -> bool {
        self.0 == "*"
    }

    fn matches(&self, origin: &HeaderValue) -> bool {
        self.is_any() || self.0.as_bytes().eq_ignore_ascii_case(origin.as_bytes())
    }
}

impl FromStr for CorsOrigin {
    type Err = InvalidOrigin;

    /// Reads an origin as users write it, and keeps it as browsers send it: in lower case, without a
    /// slash at its end and without the scheme's default port.
    fn from_str(text: &str) -> Result<Self, InvalidOrigin> {
        if !text.is_ascii() {
            return Err(InvalidOrigin::NotAscii);
        }
        let text = text.to_ascii_lowercase();
        if text == "*" || text == "null" {
            return Ok(Self(text));
        }
        if text.contains('*') {
            return Err(InvalidOrigin::Wildcard);
        }
        let (scheme, host) = text.split_once("://").ok_or(InvalidOrigin::Form)?;
        let host = host.strip_suffix('/').unwrap_or(host);
        if host.contains(['/', '?', '#']) {
            return Err(InvalidOrigin::Path);
        }
        let default_port = match scheme {
            "http" => ":80",
            "https" => ":443",
            _ => "",
        };
        let host = host.strip_suffix(default_port).unwrap_or(host);
        // Pages from files have no host.
        let has_host = !host.is_empty() || scheme == "file";
        let is_visible = host.bytes().all(|byte| byte.is_ascii_graphic());
        if is_scheme(scheme) && has_host && is_visible && !host.contains(['@', '\\', ',', '"']) {
            Ok(Self(format!("{scheme}://{host}")))
        } else {
            Err(InvalidOrigin::Form)
        }
    }
}

/// Whether a text in lower case is the scheme of a URL.
fn is_scheme(text: &str) -> bool {
    text.starts_with(|first: char| first.is_ascii_lowercase())
        && text
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"+-.".contains(&byte))
}

/// Whether pages of this origin may use the API.
pub(super) fn is_allowed_origin(allowed: &[CorsOrigin], origin: &HeaderValue) -> bool {
    allowed.iter().any(|allowed| allowed.matches(origin))
}

/// A host name or address by which a server on a loopback address may be called, or `*` for any.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AllowedHost(String);

/// A text that is not a host.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a host is a name or an address without scheme, port and path, such as images.example.org")]
pub struct InvalidHost;

impl FromStr for AllowedHost {
    type Err = InvalidHost;

    fn from_str(text: &str) -> Result<Self, InvalidHost> {
        let name = text.trim_matches(['[', ']']).trim_end_matches('.');
        let is_address = name.parse::<IpAddr>().is_ok();
        let is_name = !name.is_empty()
            && name
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte));
        if is_address || is_name || text == "*" {
            Ok(Self(name.to_ascii_lowercase()))
        } else {
            Err(InvalidHost)
        }
    }
}

/// The check of every request: whether a page of another origin may have sent it.
#[derive(Debug, Clone)]
pub(super) struct RefuseOtherPages {
    origins: Arc<[CorsOrigin]>,
    /// The hosts that may be called besides this machine's; `None` if all may.
    hosts: Option<Arc<[AllowedHost]>>,
}

impl RefuseOtherPages {
    /// Lets pages of these origins change something. With `hosts`, refuses requests to other hosts
    /// than these and this machine's.
    pub(super) fn new(origins: &[CorsOrigin], hosts: Option<&[AllowedHost]>) -> Self {
        Self {
            origins: origins.into(),
            hosts: hosts.map(Into::into),
        }
    }

    /// Refuses a request to a host that is neither this machine nor allowed.
    fn check_host(&self, uri: &Uri, headers: &HeaderMap) -> Result<(), ApiError> {
        let Some(allowed) = &self.hosts else {
            return Ok(());
        };
        // Programs of HTTP/1.0 name no host, and browsers always do.
        let named = headers.get_all(HOST).iter().map(HeaderValue::as_bytes);
        let named = named.chain(uri.authority().map(|host| host.as_str().as_bytes()));
        for host in named {
            let host = String::from_utf8_lossy(host);
            let name = host_name(&host);
            let is_allowed =
                |allowed: &AllowedHost| allowed.0 == "*" || allowed.0.eq_ignore_ascii_case(name);
            if !is_this_machine(name) && !allowed.iter().any(is_allowed) {
                let host = name.chars().take(MAX_SHOWN).collect();
                return Err(ApiError::OtherHost { host });
            }
        }
        Ok(())
    }

    /// Refuses a request that changes something if a page of another origin sent it.
    fn check_origin<B>(&self, request: &Request<B>) -> Result<(), ApiError> {
        if [Method::GET, Method::HEAD, Method::OPTIONS].contains(request.method()) {
            return Ok(());
        }
        let headers = request.headers();
        let origin = headers.get(ORIGIN);
        let site = headers.get(SEC_FETCH_SITE).map(HeaderValue::as_bytes);
        let is_own = match (site, origin) {
            (Some(b"same-origin" | b"none"), _) | (None, None) => true,
            // Not one that browsers send this header to, or an old browser.
            (None, Some(origin)) => is_same_host(origin, request),
            (Some(_), _) => false,
        };
        let is_listed = match origin {
            Some(origin) => is_allowed_origin(&self.origins, origin),
            None => self.origins.iter().any(CorsOrigin::is_any),
        };
        if is_own || is_listed {
            return Ok(());
        }
        let origin = origin.map(|origin| String::from_utf8_lossy(origin.as_bytes()));
        let origin = origin.unwrap_or_default().chars().take(MAX_SHOWN).collect();
        Err(ApiError::OtherOrigin { origin })
    }
}

/// Most characters of a header in a message.
const MAX_SHOWN: usize = 200;

impl<B> ValidateRequest<B> for RefuseOtherPages {
    type ResponseBody = Body;

    fn validate(&mut self, request: &mut Request<B>) -> Result<(), Response> {
        self.check_host(request.uri(), request.headers())
            .and_then(|()| self.check_origin(request))
            .map_err(IntoResponse::into_response)
    }
}

/// Whether the server that the client called has the origin's host and port. The scheme is not
/// compared, as a reverse proxy may be the one that speaks TLS.
fn is_same_host<B>(origin: &HeaderValue, request: &Request<B>) -> bool {
    let Some((scheme, host)) = origin.to_str().ok().and_then(|text| text.split_once("://")) else {
        return false;
    };
    let default_port = match scheme {
        "http" => ":80",
        "https" => ":443",
        // Pages with other schemes do not come from this server.
        _ => return false,
    };
    let called = [HOST, X_FORWARDED_HOST].map(|name| request.headers().get(name));
    let called = called
        .into_iter()
        .flatten()
        .filter_map(|host| host.to_str().ok());
    let called = called.chain(request.uri().authority().map(Authority::as_str));
    let without_port = |host: &str| host.strip_suffix(default_port).unwrap_or(host).to_owned();
    // Each proxy on the way may have added one.
    called
        .flat_map(|hosts| hosts.split(','))
        .any(|called| without_port(called.trim()).eq_ignore_ascii_case(&without_port(host)))
}

/// The name or address in a header `Host`, without the port and the brackets of IPv6.
fn host_name(host: &str) -> &str {
    if host.parse::<IpAddr>().is_ok() {
        // Some programs leave out the brackets of IPv6.
        return host;
    }
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or(rest),
        None => match host.rsplit_once(':') {
            Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
            _ => host,
        },
    };
    name.strip_suffix('.').unwrap_or(name)
}

/// Whether a host name is this machine's, whatever a name server says.
fn is_this_machine(name: &str) -> bool {
    if let Ok(address) = name.parse::<IpAddr>() {
        let address = address.to_canonical();
        return address.is_loopback() || address.is_unspecified();
    }
    let name = name.to_ascii_lowercase();
    name == "localhost" || name.ends_with(".localhost")
}
