//! Access control: API keys.

use std::fmt;
use std::sync::Arc;

use axum::body::Body;
use axum::http::header::AUTHORIZATION;
use axum::http::{HeaderMap, Request};
use axum::response::Response;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use subtle::ConstantTimeEq;
use tower_http::validate_request::{ValidateRequest, ValidateRequestHeaderLayer};

use crate::jobs::{Caller, Owner};

/// The keys of an API. Without keys, every request is allowed.
#[derive(Clone, Default)]
pub struct ApiKeys(Arc<[String]>);

/// A text that is not an API key.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("an API key is made of visible ASCII characters, without spaces")]
pub struct InvalidApiKey;

impl ApiKeys {
    /// Checks that every key is printable ASCII without spaces. The error does not contain the key.
    pub fn new(keys: Vec<String>) -> Result<Self, InvalidApiKey> {
        let visible =
            |key: &String| !key.is_empty() && key.bytes().all(|byte| byte.is_ascii_graphic());
        if !keys.iter().all(visible) {
            return Err(InvalidApiKey);
        }
        Ok(Self(keys.into()))
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The owner of the jobs of a caller.
    pub(super) fn owner(&self, caller: Caller) -> Owner {
        let key = caller.0.and_then(|index| self.0.get(index));
        key.map_or_else(Owner::anyone, |key| Owner::of_key(key))
    }

    /// The sender of a request with these headers, or `None` if it has none of the keys.
    fn caller(&self, headers: &HeaderMap, scheme: Scheme) -> Option<Caller> {
        match scheme {
            Scheme::Bearer => self.bearer(headers),
            Scheme::BasicOrBearer => self.basic_or_bearer(headers),
        }
    }

    /// Accepts a key as a bearer token.
    fn bearer(&self, headers: &HeaderMap) -> Option<Caller> {
        if self.0.is_empty() {
            return Some(Caller::ANYONE);
        }
        self.find(credentials(headers, b"Bearer ")?)
    }

    /// Accepts a key as a bearer token or as the password of HTTP Basic authentication. Clients of
    /// AUTOMATIC1111's web UI send what the user has entered: `USER:KEY`, or only the key.
    fn basic_or_bearer(&self, headers: &HeaderMap) -> Option<Caller> {
        let basic = || {
            let typed = BASE64.decode(credentials(headers, b"Basic ")?).ok()?;
            let colon = typed.iter().position(|byte| *byte == b':');
            let password = colon.and_then(|colon| self.find(&typed[colon + 1..]));
            password.or_else(|| self.find(&typed))
        };
        self.bearer(headers).or_else(basic)
    }

    /// Compares in constant time for tokens of one length.
    fn find(&self, token: &[u8]) -> Option<Caller> {
        let mut found = None;
        for (index, key) in self.0.iter().enumerate() {
            if key.as_bytes().ct_eq(token).into() {
                found = Some(Caller(Some(index)));
            }
        }
        found
    }
}

/// The part of the header `Authorization` after `scheme`, which ends with a space.
fn credentials<'a>(headers: &'a HeaderMap, scheme: &[u8]) -> Option<&'a [u8]> {
    let header = headers.get(AUTHORIZATION)?.as_bytes();
    let (start, rest) = header.split_at_checked(scheme.len())?;
    start.eq_ignore_ascii_case(scheme).then_some(rest)
}

impl fmt::Debug for ApiKeys {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "ApiKeys({} keys)", self.0.len())
    }
}

/// How a client sends its API key.
#[derive(Debug, Clone, Copy)]
pub(super) enum Scheme {
    /// As a bearer token.
    Bearer,
    /// As a bearer token, or as the password of HTTP Basic authentication.
    BasicOrBearer,
}

/// A layer that refuses requests without a key, with the response that `refuse` makes. It adds the
/// [`Caller`] to the extensions of all others.
pub(super) fn require_key(
    keys: &ApiKeys,
    scheme: Scheme,
    refuse: fn() -> Response,
) -> ValidateRequestHeaderLayer<RequireKey> {
    ValidateRequestHeaderLayer::custom(RequireKey {
        keys: keys.clone(),
        scheme,
        refuse,
    })
}

/// The check of [`require_key`].
#[derive(Debug, Clone)]
pub(super) struct RequireKey {
    keys: ApiKeys,
    scheme: Scheme,
    refuse: fn() -> Response,
}

impl<B> ValidateRequest<B> for RequireKey {
    type ResponseBody = Body;

    fn validate(&mut self, request: &mut Request<B>) -> Result<(), Response> {
        let caller = self.keys.caller(request.headers(), self.scheme);
        let caller = caller.ok_or_else(self.refuse)?;
        request.extensions_mut().insert(caller);
        Ok(())
    }
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
        keys.bearer(&headers).is_some()
    }

    /// Index of the key among `one` and `two:2` that this header contains.
    fn basic(authorization: &str) -> Option<usize> {
        let keys = ApiKeys::new(vec!["one".to_owned(), "two:2".to_owned()]).unwrap();
        let mut headers = HeaderMap::new();
        headers.insert(AUTHORIZATION, authorization.parse().unwrap());
        keys.basic_or_bearer(&headers)?.0
    }

    #[test]
    fn a_key_is_the_password_or_all_that_was_typed_in() {
        let typed = |text: &str| format!("Basic {}", BASE64.encode(text));
        for (text, index) in [
            ("one", 0),
            ("me:one", 0),
            (":one", 0),
            ("two:2", 1),
            ("a:two:2", 1),
        ] {
            assert_eq!(basic(&typed(text)), Some(index), "{text}");
        }
        for text in ["", ":", "one:", "me:on", "2", "me:me:one", "ones"] {
            assert_eq!(basic(&typed(text)), None, "{text}");
        }
        assert_eq!(basic("Bearer two:2"), Some(1));
        for wrong in ["Basic one", "Basic", "Basic ", "one", "Basic b25l!"] {
            assert_eq!(basic(wrong), None, "{wrong}");
        }
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
