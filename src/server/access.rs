//! Who may ask: API keys, and web pages of other origins.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::header::{AUTHORIZATION, RETRY_AFTER};
use axum::http::{HeaderMap, HeaderValue, Method};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use subtle::{Choice, ConstantTimeEq};
use tower_http::cors::{AllowHeaders, AllowOrigin, CorsLayer};

use super::App;
use super::error::ApiError;
use super::images::SEED_HEADER;

/// Keys that open `/v1`; with none it is open to all.
#[derive(Clone, Default)]
pub struct ApiKeys(Vec<String>);

/// Why a text is no API key.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("an API key is made of visible ASCII characters, without spaces")]
pub struct InvalidApiKey;

impl ApiKeys {
    /// The error does not repeat the key.
    pub fn new(keys: Vec<String>) -> Result<Self, InvalidApiKey> {
        let visible =
            |key: &String| !key.is_empty() && key.bytes().all(|byte| byte.is_ascii_graphic());
        if !keys.iter().all(visible) {
            return Err(InvalidApiKey);
        }
        Ok(Self(keys))
    }

    /// Whether the request has one of the keys as a bearer token. The time this takes depends on
    /// the length of the token, not on how much of it is right.
    fn allow(&self, headers: &HeaderMap) -> bool {
        if self.0.is_empty() {
            return true;
        }
        let Some(credentials) = headers.get(AUTHORIZATION).map(HeaderValue::as_bytes) else {
            return false;
        };
        let (scheme, token) = credentials.split_at(credentials.len().min("Bearer ".len()));
        let known = self.0.iter().fold(Choice::from(0), |known, key| {
            known | key.as_bytes().ct_eq(token)
        });
        scheme.eq_ignore_ascii_case(b"Bearer ") && known.into()
    }
}

impl fmt::Debug for ApiKeys {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "ApiKeys({} of them)", self.0.len())
    }
}

/// Where a web page comes from: a scheme and a host, or `*` for anywhere.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CorsOrigin(HeaderValue);

/// Why a text is no origin.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("an origin is a scheme and a host, such as http://localhost:3000, or *")]
pub struct InvalidOrigin;

impl FromStr for CorsOrigin {
    type Err = InvalidOrigin;

    fn from_str(text: &str) -> Result<Self, InvalidOrigin> {
        let host = text
            .strip_prefix("https://")
            .or_else(|| text.strip_prefix("http://"));
        let is_origin = host.is_some_and(|host| !host.is_empty() && !host.contains('/'));
        let value = HeaderValue::from_str(text).ok();
        let value = value.filter(|_| is_origin || text == "*");
        value.map(Self).ok_or(InvalidOrigin)
    }
}

/// Lets requests below `/v1/` pass only with a key. The rest of the server, which tells health and
/// what the API is, is open.
pub(super) async fn require_key(
    State(app): State<Arc<App>>,
    request: Request,
    next: Next,
) -> Response {
    let open = !request.uri().path().starts_with("/v1/");
    if open || app.settings.api_keys.allow(request.headers()) {
        next.run(request).await
    } else {
        ApiError::Unauthorized.into_response()
    }
}

/// Lets web pages of these origins use the API.
pub(super) fn cors(origins: &[CorsOrigin]) -> CorsLayer {
    let origins = origins.iter().map(|origin| origin.0.clone());
    let allowed = if origins.clone().any(|origin| origin == "*") {
        AllowOrigin::any()
    } else {
        AllowOrigin::list(origins)
    };
    CorsLayer::new()
        .allow_origin(allowed)
        .allow_methods([Method::GET, Method::POST])
        // Clients add headers of their own, such as OpenAI's x-stainless-os.
        .allow_headers(AllowHeaders::mirror_request())
        .expose_headers([RETRY_AFTER, SEED_HEADER])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allowed(keys: &[&str], authorization: Option<&str>) -> bool {
        let keys = ApiKeys::new(keys.iter().map(|key| (*key).to_owned()).collect()).unwrap();
        let mut headers = HeaderMap::new();
        if let Some(value) = authorization {
            headers.insert(AUTHORIZATION, value.parse().unwrap());
        }
        keys.allow(&headers)
    }

    #[test]
    fn any_of_the_keys_opens() {
        assert!(allowed(&["one", "two"], Some("Bearer one")));
        assert!(allowed(&["one", "two"], Some("bearer two")));
        for wrong in [
            "Bearer three",
            "Bearer on",
            "Bearer ones",
            "Bearer ",
            "Bearer",
            "one",
            "Basic one",
            "Bearer  one",
            "",
        ] {
            assert!(!allowed(&["one", "two"], Some(wrong)), "{wrong:?}");
        }
        assert!(!allowed(&["one"], None));
        assert!(allowed(&[], None));
    }

    #[test]
    fn an_origin_is_a_scheme_and_a_host() {
        for origin in ["*", "https://example.org", "http://localhost:3000"] {
            assert_eq!(origin.parse::<CorsOrigin>().unwrap().0, origin);
        }
        for origin in [
            "",
            "example.org",
            "https://",
            "https://a/b",
            "ftp://a",
            "https://a\n",
        ] {
            assert_eq!(origin.parse::<CorsOrigin>(), Err(InvalidOrigin), "{origin}");
        }
    }

    #[test]
    fn a_key_is_visible_and_never_shown() {
        for key in ["", " ", "a b", "ключ", "a\n"] {
            assert_eq!(
                ApiKeys::new(vec![key.to_owned()]).unwrap_err(),
                InvalidApiKey
            );
        }
        let keys = ApiKeys::new(vec!["hunter2".to_owned()]).unwrap();
        assert!(!format!("{keys:?}").contains("hunter2"));
    }
}
