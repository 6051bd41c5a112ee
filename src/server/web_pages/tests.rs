//! Origins of pages and names of hosts.

use super::*;

fn origin(text: &str) -> Result<String, InvalidOrigin> {
    text.parse::<CorsOrigin>().map(|origin| origin.0)
}

#[test]
fn an_origin_of_any_scheme_is_kept_as_browsers_send_it() {
    for (text, kept) in [
        ("*", "*"),
        ("null", "null"),
        ("NULL", "null"),
        ("https://example.org", "https://example.org"),
        ("https://Example.ORG/", "https://example.org"),
        ("http://localhost:3000/", "http://localhost:3000"),
        ("HTTP://localhost:80", "http://localhost"),
        ("https://a.org:443/", "https://a.org"),
        ("https://a.org:80", "https://a.org:80"),
        ("http://[::1]:3000", "http://[::1]:3000"),
        ("app://obsidian.md", "app://obsidian.md"),
        ("app://.", "app://."),
        ("tauri://localhost", "tauri://localhost"),
        ("capacitor://localhost", "capacitor://localhost"),
        ("chrome-extension://ABC", "chrome-extension://abc"),
        ("file://", "file://"),
        ("file:///", "file://"),
    ] {
        assert_eq!(origin(text).as_deref(), Ok(kept), "{text}");
    }
}

#[test]
fn a_text_that_no_browser_sends_as_an_origin_is_refused() {
    use InvalidOrigin::{Form, NotAscii, Path, Wildcard};
    for (text, error) in [
        ("", Form),
        ("example.org", Form),
        ("localhost:3000", Form),
        ("https://", Form),
        ("https:///", Form),
        ("app://", Form),
        ("://a", Form),
        ("1a://b", Form),
        ("a b://c", Form),
        ("https://a b", Form),
        ("https://a\n", Form),
        ("https://me@a", Form),
        ("https://a/b", Path),
        ("https://a//", Path),
        ("https://a?b", Path),
        ("https://*.example.com", Wildcard),
        ("*://a", Wildcard),
        ("https://a:*", Wildcard),
        ("https://é.org", NotAscii),
    ] {
        assert_eq!(origin(text), Err(error), "{text}");
    }
}

#[test]
fn letter_case_of_the_header_does_not_matter() {
    let allowed = ["https://A.example".parse().unwrap()];
    for origin in [
        "https://a.example",
        "https://A.EXAMPLE",
        "HTTPS://a.example",
    ] {
        assert!(is_allowed_origin(
            &allowed,
            &HeaderValue::from_static(origin)
        ));
    }
    for other in ["http://a.example", "https://a.example:8443", "null", "*"] {
        assert!(!is_allowed_origin(
            &allowed,
            &HeaderValue::from_static(other)
        ));
    }
}

fn request(method: Method, uri: &str, headers: &[(&str, &str)]) -> Request<()> {
    let mut request = Request::builder().method(method).uri(uri);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    request.body(()).unwrap()
}

#[test]
fn only_names_of_this_machine_and_allowed_hosts_are_answered() {
    let allowed = [
        "images.example".parse().unwrap(),
        "192.0.2.7".parse().unwrap(),
    ];
    let check = RefuseOtherPages::new(&[], Some(&allowed));
    let is_answered = |uri: &str, headers: &[(&str, &str)]| {
        let request = request(Method::GET, uri, headers);
        check.check_host(request.uri(), request.headers()).is_ok()
    };
    for host in [
        "localhost",
        "localhost:8091",
        "LocalHost.:1",
        "kiln.localhost:8091",
        "127.0.0.1",
        "127.0.0.1:8091",
        "127.9.9.9:80",
        "[::1]",
        "[::1]:8091",
        "::1",
        "[::ffff:127.0.0.1]:8091",
        "0.0.0.0:8091",
        "images.example",
        "Images.Example:443",
        "192.0.2.7:8091",
    ] {
        assert!(is_answered("/", &[("host", host)]), "{host}");
    }
    for host in [
        "",
        "evil.example",
        "evil.example:8091",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "notlocalhost",
        "a.images.example",
        "192.0.2.8",
        "[2001:db8::1]:8091",
        "localhost:1@evil.example",
        "evil.example:localhost",
        "[::1",
    ] {
        // The last one is an address without its bracket, which cannot be a name of others.
        let is_local = host == "[::1";
        assert_eq!(is_answered("/", &[("host", host)]), is_local, "{host}");
    }
    assert!(is_answered("/", &[]), "HTTP/1.0");
    assert!(!is_answered(
        "/",
        &[("host", "localhost"), ("host", "evil.example")]
    ));
    assert!(!is_answered(
        "http://evil.example/",
        &[("host", "localhost")]
    ));
    assert!(is_answered(
        "http://localhost:8091/",
        &[("host", "localhost:8091")]
    ));
}

#[test]
fn an_allowed_host_is_a_name_or_an_address() {
    for host in ["a", "A.b", "a-b.c.", "192.0.2.7", "::1", "[::1]", "*"] {
        assert!(host.parse::<AllowedHost>().is_ok(), "{host}");
    }
    for host in ["", ".", "http://a", "a:80", "a/b", "a b", "*.a", "é"] {
        assert_eq!(host.parse::<AllowedHost>(), Err(InvalidHost), "{host}");
    }
}

#[test]
fn pages_of_other_origins_may_read_but_not_change() {
    let may = |method: Method, origins: &[&str], headers: &[(&str, &str)]| {
        let origins: Vec<_> = origins.iter().map(|text| text.parse().unwrap()).collect();
        let check = RefuseOtherPages::new(&origins, None);
        check.check_origin(&request(method, "/x", headers)).is_ok()
    };
    let host = ("host", "a.example:8091");
    let other = ("origin", "https://b.example");
    for safe in [Method::GET, Method::HEAD, Method::OPTIONS] {
        assert!(may(safe, &[], &[host, other]));
    }
    for method in [Method::POST, Method::PUT, Method::DELETE, Method::PATCH] {
        assert!(!may(method, &[], &[host, other]));
    }
    let post = |origins: &[&str], headers: &[(&str, &str)]| may(Method::POST, origins, headers);
    // Programs send no origin.
    assert!(post(&[], &[host]));
    assert!(post(&[], &[host, ("origin", "http://a.example:8091")]));
    assert!(post(&[], &[host, ("origin", "https://A.example:8091")]));
    for origin in [
        "null",
        "",
        "http://a.example",
        "http://a.example:80",
        "app://a.example:8091",
        "http://a.example:8091.b",
        "http://b.example/http://a.example:8091",
    ] {
        assert!(!post(&[], &[host, ("origin", origin)]), "{origin}");
    }
    assert!(post(&["https://b.example"], &[host, other]));
    assert!(post(&["*"], &[host, other]));
    assert!(post(&["null"], &[host, ("origin", "null")]));
    assert!(!post(&["https://c.example"], &[host, other]));
}

#[test]
fn the_own_page_works_behind_a_reverse_proxy() {
    let check = RefuseOtherPages::new(&[], None);
    let may = |headers: &[(&str, &str)]| {
        check
            .check_origin(&request(Method::POST, "/x", headers))
            .is_ok()
    };
    let origin = ("origin", "https://images.example");
    let upstream = ("host", "127.0.0.1:8091");
    assert!(may(&[origin, ("host", "images.example")]));
    assert!(may(&[origin, ("host", "images.example:443")]));
    assert!(may(&[
        origin,
        upstream,
        ("x-forwarded-host", "images.example")
    ]));
    assert!(may(&[
        origin,
        upstream,
        ("x-forwarded-host", "images.example, proxy.local")
    ]));
    // Browsers tell it over TLS and to this machine, whatever the proxy does to the host.
    assert!(may(&[origin, upstream, ("sec-fetch-site", "same-origin")]));
    assert!(!may(&[origin, upstream]));
    assert!(!may(&[origin, upstream, ("sec-fetch-site", "cross-site")]));
    assert!(!may(&[upstream, ("sec-fetch-site", "cross-site")]));
    assert!(!may(&[
        origin,
        ("host", "images.example"),
        ("sec-fetch-site", "same-site")
    ]));
}
