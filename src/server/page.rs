//! `GET /`: a web page for generating images, made of static files in the binary.
//!
//! The files need no API key. The page uses the API like any other client and needs a key for it.

use std::hash::{DefaultHasher, Hash, Hasher};

use axum::Router;
use axum::body::Bytes;
use axum::http::header::{
    CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, ETAG, IF_NONE_MATCH, REFERRER_POLICY,
    X_CONTENT_TYPE_OPTIONS,
};
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::get;

/// Allows only the server's own files, and images that the page makes from responses.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; \
                      img-src 'self' blob:; connect-src 'self'; base-uri 'none'; \
                      form-action 'none'; frame-ancestors 'none'; \
                      require-trusted-types-for 'script'; trusted-types 'none'";

const HTML: &str = "text/html; charset=utf-8";
const CSS: &str = "text/css; charset=utf-8";
const SCRIPT: &str = "text/javascript; charset=utf-8";
const SVG: &str = "image/svg+xml";

/// Path, media type and content of each file.
macro_rules! files {
    ($($path:literal $kind:ident $file:literal)*) => {
        [$(($path, $kind, include_str!(concat!("page/", $file)))),*]
    };
}

const FILES: [(&str, &str, &str); 15] = files! {
    "/" HTML "index.html"
    "/page/style.css" CSS "style.css"
    "/page/icon.svg" SVG "icon.svg"
    "/page/adapters.js" SCRIPT "adapters.js"
    "/page/api.js" SCRIPT "api.js"
    "/page/drawing.js" SCRIPT "drawing.js"
    "/page/guide.js" SCRIPT "guide.js"
    "/page/history.js" SCRIPT "history.js"
    "/page/jobs.js" SCRIPT "jobs.js"
    "/page/main.js" SCRIPT "main.js"
    "/page/settings.js" SCRIPT "settings.js"
    "/page/stage.js" SCRIPT "stage.js"
    "/page/start.js" SCRIPT "start.js"
    "/page/store.js" SCRIPT "store.js"
    "/page/wording.js" SCRIPT "wording.js"
};

/// Serves the page and its files.
pub(super) fn routes<S: Clone + Send + Sync + 'static>() -> Router<S> {
    FILES
        .into_iter()
        .fold(Router::new(), |router, (path, media_type, text)| {
            let tag = tag(text);
            router.route(
                path,
                get(async move |headers: HeaderMap| respond(&headers, media_type, &tag, text)),
            )
        })
}

/// An entity tag that changes with the text.
fn tag(text: &str) -> HeaderValue {
    let mut hasher = DefaultHasher::new();
    text.hash(&mut hasher);
    HeaderValue::from_str(&format!("\"{:016x}\"", hasher.finish()))
        .expect("hexadecimal digits are visible")
}

fn respond(
    headers: &HeaderMap,
    media_type: &'static str,
    tag: &HeaderValue,
    text: &'static str,
) -> Response {
    let policy = HeaderValue::from_static(POLICY);
    // Browsers revalidate each time, so that a new version of kiln is used at once.
    let common = [
        (CACHE_CONTROL, HeaderValue::from_static("no-cache")),
        (ETAG, tag.clone()),
        (CONTENT_SECURITY_POLICY, policy),
        (X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff")),
        (REFERRER_POLICY, HeaderValue::from_static("no-referrer")),
    ];
    if is_known(headers, tag) {
        return (StatusCode::NOT_MODIFIED, common).into_response();
    }
    let content_type = [(CONTENT_TYPE, media_type)];
    (common, content_type, Bytes::from_static(text.as_bytes())).into_response()
}

/// Whether the client has this version.
fn is_known(headers: &HeaderMap, tag: &HeaderValue) -> bool {
    let lists = headers.get_all(IF_NONE_MATCH).iter();
    lists
        .filter_map(|list| list.to_str().ok())
        .flat_map(|list| list.split(','))
        .map(|known| known.trim().trim_start_matches("W/"))
        .any(|known| known == "*" || known.as_bytes() == tag.as_bytes())
}
