//! Requests to the Hub and to the hosts that it redirects to.

use std::io::{self, Read};
use std::time::{Duration, Instant, SystemTime};

use reqwest::blocking::{Client, Response};
use reqwest::header::{
    ACCEPT_ENCODING, AUTHORIZATION, ETAG, HeaderMap, HeaderName, HeaderValue, LINK, LOCATION,
    RANGE, RETRY_AFTER,
};
use reqwest::redirect::Policy;
use reqwest::{Method, StatusCode, Url};
use serde::de::DeserializeOwned;

use super::environment::Environment;
use super::error::Failure;

const MAX_REDIRECTS: usize = 10;

/// Largest answer of the Hub's API.
const MAX_JSON: usize = 64 << 20;

/// A whole answer of the API may take this many times as long as one read of it.
const JSON_READS: u32 = 10;

/// Longest wait that a `Retry-After` header can ask for.
const MAX_RETRY_AFTER: Duration = Duration::from_mins(5);

/// A client of one Hub. Follows redirects itself: the token goes to the Hub alone.
pub(super) struct Http {
    client: Client,
    hub: Url,
    authorization: Option<HeaderValue>,
    timeout: Duration,
}

/// An answer with success, after redirects.
pub(super) struct Answer {
    pub(super) response: Response,
    /// Host that sent it.
    pub(super) host: String,
    /// `X-Linked-ETag` or `ETag` of the Hub's own answer.
    pub(super) hub_etag: Option<String>,
}

impl Http {
    /// A client that gives up a connection, or a read, after `timeout`.
    pub(super) fn new(environment: &Environment, timeout: Duration) -> Result<Self, Failure> {
        super::install_tls();
        let client = Client::builder()
            .user_agent(&environment.user_agent)
            .redirect(Policy::none())
            .connect_timeout(timeout)
            .timeout(timeout)
            .build()
            .map_err(Failure::Request)?;
        let authorization = environment.token.as_ref().and_then(|token| {
            let value = HeaderValue::from_str(&format!("Bearer {}", token.0));
            if value.is_err() {
                tracing::warn!("no token is used: it has characters that a header cannot have");
            }
            value.ok()
        });
        Ok(Self {
            client,
            hub: environment.endpoint.clone(),
            authorization,
            timeout,
        })
    }

    /// URL of a path on the Hub.
    pub(super) fn url(&self, path: &str) -> Result<Url, Failure> {
        let hub = self.hub.as_str().trim_end_matches('/');
        join(&self.hub, &format!("{hub}/{path}"))
    }

    /// Requests a URL, from byte `start` of what it stands for.
    pub(super) fn get(&self, url: &Url, start: u64) -> Result<Answer, Failure> {
        self.send(&Method::GET, url, start)
    }

    /// The entity tag of a URL.
    pub(super) fn etag(&self, url: &Url) -> Result<Option<String>, Failure> {
        Ok(self.send(&Method::HEAD, url, 0)?.hub_etag)
    }

    /// Requests JSON, and the URL of the next page if there is one.
    pub(super) fn json<T: DeserializeOwned>(&self, url: &Url) -> Result<(T, Option<Url>), Failure> {
        let started = Instant::now();
        let mut answer = self.get(url, 0)?;
        let next = next_page(answer.response.headers());
        let next = next.map(|next| join(url, &next)).transpose()?;
        let mut body = Vec::new();
        let mut chunk = vec![0; 64 << 10];
        loop {
            let length = answer
                .response
                .read(&mut chunk)
                .map_err(|error| self.broken(&answer.host, error))?;
            if length == 0 {
                break;
            }
            body.extend(&chunk[..length]);
            let host = answer.host.clone();
            if body.len() > MAX_JSON {
                return Err(Failure::TooLarge { host });
            }
            if started.elapsed() > self.timeout * JSON_READS {
                return Err(Failure::Slow {
                    host,
                    bytes: body.len() as u64,
                    waited: started.elapsed(),
                });
            }
        }
        let value = serde_json::from_slice(&body).map_err(Failure::Json)?;
        Ok((value, next))
    }

    /// Converts an error of reading a body.
    pub(super) fn broken(&self, host: &str, source: io::Error) -> Failure {
        let host = host.to_owned();
        let inner = source.get_ref().and_then(|it| it.downcast_ref());
        if inner.is_some_and(reqwest::Error::is_timeout) || source.kind() == io::ErrorKind::TimedOut
        {
            let waited = self.timeout;
            return Failure::Stalled { host, waited };
        }
        Failure::Broken { host, source }
    }

    fn send(&self, method: &Method, url: &Url, start: u64) -> Result<Answer, Failure> {
        let mut url = url.clone();
        let mut hub_etag = None;
        for _ in 0..=MAX_REDIRECTS {
            let host = host(&url);
            let of_hub = self.is_hub(&url);
            let mut request = self.client.request(method.clone(), url.clone());
            request = request.header(ACCEPT_ENCODING, "identity");
            if start > 0 {
                request = request.header(RANGE, format!("bytes={start}-"));
            }
            if let Some(token) = self.authorization.clone().filter(|_| of_hub) {
                request = request.header(AUTHORIZATION, token);
            }
            let response = request.send().map_err(|error| {
                if error.is_timeout() {
                    let (host, waited) = (host.clone(), self.timeout);
                    return Failure::Stalled { host, waited };
                }
                // The URL may contain a signature.
                Failure::Request(error.without_url())
            })?;
            let headers = response.headers();
            if of_hub && hub_etag.is_none() {
                hub_etag = etag(headers);
            }
            let status = response.status();
            if status.is_redirection() && status != StatusCode::NOT_MODIFIED {
                let to = headers.get(LOCATION).and_then(|it| it.to_str().ok());
                let to = to.unwrap_or_default();
                url = join(&url, to)?;
                continue;
            }
            if !status.is_success() {
                return Err(Failure::Status {
                    host,
                    status,
                    code: text(headers, &HeaderName::from_static("x-error-code")),
                    retry_after: retry_after(headers),
                    of_hub,
                });
            }
            return Ok(Answer {
                response,
                host,
                hub_etag,
            });
        }
        Err(Failure::Redirect {
            host: host(&url),
            to: format!("more than {MAX_REDIRECTS} times"),
        })
    }

    /// Whether the token may go to this URL: the Hub's own host, without a step down from HTTPS.
    fn is_hub(&self, url: &Url) -> bool {
        let upgraded = self.hub.scheme() == "http"
            && url.scheme() == "https"
            && (self.hub.port(), url.port()) == (None, None);
        url.host_str() == self.hub.host_str() && (url.origin() == self.hub.origin() || upgraded)
    }
}

/// The URL of a link in an answer from `base`.
fn join(base: &Url, location: &str) -> Result<Url, Failure> {
    let url = base.join(location).ok();
    let url = url.filter(|url| !location.is_empty() && matches!(url.scheme(), "http" | "https"));
    url.ok_or_else(|| Failure::Redirect {
        host: host(base),
        to: format!("to {location:?}, which is no address"),
    })
}

fn host(url: &Url) -> String {
    let host = url.host_str().unwrap_or_default();
    url.port()
        .map_or_else(|| host.to_owned(), |port| format!("{host}:{port}"))
}

/// The entity tag of a file, without quotes.
pub(super) fn etag(headers: &HeaderMap) -> Option<String> {
    let linked = text(headers, &HeaderName::from_static("x-linked-etag"));
    let tag = linked.or_else(|| text(headers, &ETAG))?;
    let tag = tag.strip_prefix("W/").unwrap_or(&tag).trim_matches('"');
    (!tag.is_empty()).then(|| tag.to_owned())
}

fn text(headers: &HeaderMap, name: &HeaderName) -> Option<String> {
    let value = headers.get(name)?.to_str().ok()?.trim();
    Some(value.to_owned())
}

/// `Retry-After`, in seconds or as a date.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let value = text(headers, &RETRY_AFTER)?;
    let wait = if let Ok(seconds) = value.parse() {
        Duration::from_secs(seconds)
    } else {
        let date = httpdate::parse_http_date(&value).ok()?;
        date.duration_since(SystemTime::now()).unwrap_or_default()
    };
    Some(wait.min(MAX_RETRY_AFTER))
}

/// The URL with `rel="next"` in a `Link` header.
fn next_page(headers: &HeaderMap) -> Option<String> {
    let links = text(headers, &LINK)?;
    links.split(',').find_map(|link| {
        let (url, parameters) = link.split_once('>')?;
        let url = url.trim().strip_prefix('<')?;
        parameters.contains("rel=\"next\"").then(|| url.to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(name: &'static str, value: &'static str) -> HeaderMap {
        let name = HeaderName::from_static(name);
        HeaderMap::from_iter([(name, HeaderValue::from_static(value))])
    }

    #[test]
    fn retry_after_is_seconds_or_a_date() {
        let read = |value| retry_after(&headers("retry-after", value));
        assert_eq!(read("7"), Some(Duration::from_secs(7)));
        assert_eq!(read("86400"), Some(MAX_RETRY_AFTER));
        let past = read("Sun, 06 Nov 1994 08:49:37 GMT");
        assert_eq!(past, Some(Duration::ZERO));
        assert_eq!(read("soon"), None);
    }

    #[test]
    fn entity_tags_lose_their_quotes() {
        assert_eq!(etag(&headers("etag", "\"ab\"")).unwrap(), "ab");
        assert_eq!(etag(&headers("etag", "W/\"ab\"")).unwrap(), "ab");
        assert_eq!(etag(&headers("x-linked-etag", "\"cd\"")).unwrap(), "cd");
        assert_eq!(etag(&HeaderMap::new()), None);
    }

    #[test]
    fn the_next_page_is_read_from_links() {
        let link = "<http://x/a?b=1>; rel=\"last\", <http://x/a?cursor=2>; rel=\"next\"";
        let next = next_page(&headers("link", link));
        assert_eq!(next.unwrap(), "http://x/a?cursor=2");
        assert_eq!(
            next_page(&headers("link", "<http://x>; rel=\"last\"")),
            None
        );
    }

    #[test]
    fn the_token_goes_to_the_hub_alone() {
        let hub = |endpoint: &str| {
            let settings = crate::hub::HubSettings {
                endpoint: Some(endpoint.to_owned()),
                ..crate::hub::HubSettings::default()
            };
            let environment = Environment::read(&settings).unwrap();
            Http::new(&environment, Duration::from_secs(1)).unwrap()
        };
        let url = |text| Url::parse(text).unwrap();
        let plain = hub("http://hub.example");
        assert!(plain.is_hub(&url("http://hub.example/x")));
        assert!(plain.is_hub(&url("https://hub.example/x")));
        assert!(!plain.is_hub(&url("http://hub.example:81/x")));
        assert!(!plain.is_hub(&url("http://cdn.hub.example/x")));
        assert!(!hub("https://hub.example").is_hub(&url("http://hub.example/x")));
    }
}
