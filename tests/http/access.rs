//! API keys, origins of web pages, and names of the host.

use std::io::Write;

use kiln::server::{ApiKeys, Settings};
use serde_json::json;

use super::client::{
    Reply, connect, get, json_with_headers, receive, send, send_raw, with_headers,
};
use super::pipeline::Pace;
use super::server::TestServer;

/// Paths in the `OpenAPI` document that need no key.
const OPEN: [&str; 5] = [
    "/health",
    "/health/live",
    "/health/ready",
    "/metrics",
    "/version",
];

fn with_keys() -> TestServer {
    let keys = vec!["first-key".to_owned(), "second-key".to_owned()];
    let settings = Settings {
        api_keys: ApiKeys::new(keys).unwrap(),
        ..Settings::new("m")
    };
    TestServer::with_settings(Pace::Fast, 4, settings)
}

#[test]
fn with_keys_the_api_needs_one_of_them() {
    let server = with_keys();
    let body = json!({"prompt": "a cat", "num_inference_steps": 1}).to_string();
    let status = |path: &str, headers: &str| {
        let headers = format!("Content-Type: application/json\r\n{headers}");
        let content = (headers.as_str(), body.as_bytes());
        receive(send_raw(connect(server.address), "POST", path, content)).status
    };
    let path = "/v1/images/generations";
    for key in ["first-key", "second-key"] {
        let headers = format!("Authorization: Bearer {key}\r\n");
        assert_eq!(status(path, &headers), 200);
    }
    for headers in [
        "",
        "Authorization: Bearer third-key\r\n",
        "Authorization: Bearer first-key2\r\n",
        "Authorization: first-key\r\n",
        "Authorization: Basic first-key\r\n",
        "X-Api-Key: first-key\r\n",
    ] {
        for path in [path, "/v1/chat/completions", "/v1/models", "/v1/unknown"] {
            assert_eq!(status(path, headers), 401, "{path} {headers:?}");
        }
    }
    let reply = get(server.address, "/v1/models");
    assert_eq!(reply.header("www-authenticate"), Some("Bearer"));
    assert_eq!(reply.body["error"]["code"], 401);
    assert_eq!(reply.body["error"]["type"], "authentication_error");
}

#[test]
fn public_routes_need_no_key() {
    let server = with_keys();
    for path in ["/health", "/version", "/openapi.json", "/docs", "/"] {
        assert_eq!(get(server.address, path).status, 200, "{path}");
    }
}

#[test]
fn every_other_route_needs_a_key() {
    let settings = Settings {
        api_keys: ApiKeys::new(vec!["first-key".to_owned()]).unwrap(),
        sdapi: true,
        ..Settings::new("m")
    };
    let server = TestServer::with_settings(Pace::Fast, 4, settings);
    let document = get(server.address, "/openapi.json").body;
    let paths = document["paths"].as_object().unwrap();
    let mut open: Vec<&str> = Vec::new();
    for (template, methods) in paths {
        let path = template.replace("{name}", "m").replace("{id}", "job-0");
        assert!(
            !path.contains('{'),
            "{template}: give its parameters a value"
        );
        for method in methods.as_object().unwrap().keys() {
            let stream = connect(server.address);
            let request = send(stream, &method.to_uppercase(), &path, Some(&json!({})));
            let reply = receive(request);
            if OPEN.contains(&template.as_str()) {
                assert_ne!(reply.status, 401, "{method} {path}");
                open.push(template);
            } else {
                assert_eq!(reply.status, 401, "{method} {path}");
                assert!(reply.header("www-authenticate").is_some());
            }
        }
    }
    assert_eq!(open.len(), OPEN.len(), "only {open:?} are in the document");
    // Unknown paths and methods do not tell which routes exist.
    for (method, path) in [
        ("GET", "/v1/unknown"),
        ("POST", "/v1/models/unknown"),
        ("DELETE", "/v1/models"),
        ("GET", "/v1/chat/completions"),
        ("GET", "/sdapi/unknown"),
        ("DELETE", "/sdapi/v1/options"),
    ] {
        let reply = with_headers(server.address, method, path, "");
        assert_eq!(reply.status, 401, "{method} {path}");
    }
}

#[test]
fn other_origins_are_allowed_only_by_the_settings() {
    let preflight = "Origin: https://a.example\r\nAccess-Control-Request-Method: POST\r\n\
                     Access-Control-Request-Headers: authorization,x-stainless-os\r\n";
    let path = "/v1/images/generations";
    let allowed = |server: &TestServer, headers: &str| {
        let reply = with_headers(server.address, "OPTIONS", path, headers);
        let origin = reply.header("access-control-allow-origin");
        origin.map(|origin| (reply.status, origin.to_owned()))
    };

    let closed = TestServer::start(Pace::Fast, 4);
    assert_eq!(allowed(&closed, preflight), None);

    let settings = Settings {
        cors_origins: vec!["https://a.example".parse().unwrap()],
        api_keys: ApiKeys::new(vec!["k".to_owned()]).unwrap(),
        ..Settings::new("m")
    };
    let server = TestServer::with_settings(Pace::Fast, 4, settings);
    assert_eq!(
        allowed(&server, preflight),
        Some((200, "https://a.example".to_owned()))
    );
    let other = preflight.replace("a.example", "b.example");
    assert_eq!(allowed(&server, &other), None);
    // Every response has the header, errors included.
    let reply = with_headers(server.address, "GET", path, "Origin: https://a.example\r\n");
    assert_eq!(reply.status, 401);
    assert_eq!(
        reply.header("access-control-allow-origin"),
        Some("https://a.example")
    );

    let settings = Settings {
        cors_origins: vec!["*".parse().unwrap()],
        ..Settings::new("m")
    };
    let server = TestServer::with_settings(Pace::Fast, 4, settings);
    assert_eq!(allowed(&server, preflight), Some((200, "*".to_owned())));
}

#[test]
fn pages_of_any_scheme_can_be_allowed() {
    let allowed = ["app://obsidian.md", "https://A.example/", "null"];
    let settings = Settings {
        cors_origins: allowed.map(|origin| origin.parse().unwrap()).to_vec(),
        ..Settings::new("m")
    };
    let server = TestServer::with_settings(Pace::Fast, 4, settings);
    for (origin, is_allowed) in [
        ("app://obsidian.md", true),
        ("https://a.example", true),
        ("null", true),
        ("https://b.example", false),
        ("app://other.md", false),
    ] {
        let headers = format!("Origin: {origin}\r\nAccess-Control-Request-Method: POST\r\n");
        let path = "/v1/images/generations";
        let reply = with_headers(server.address, "OPTIONS", path, &headers);
        let allowed = reply.header("access-control-allow-origin");
        assert_eq!(allowed, is_allowed.then_some(origin));
        let body = json!({"prompt": "a cat", "num_inference_steps": 1});
        let reply = json_with_headers(server.address, path, &headers, &body);
        assert_eq!(reply.status, if is_allowed { 200 } else { 403 }, "{origin}");
    }
}

#[test]
fn pages_of_other_origins_change_nothing() {
    let settings = Settings {
        sdapi: true,
        ..Settings::new("m")
    };
    let server = TestServer::with_settings(Pace::Fast, 4, settings);
    let document = get(server.address, "/openapi.json").body;
    let mut posts = 0;
    for (path, methods) in document["paths"].as_object().unwrap() {
        if methods.get("post").is_none() {
            continue;
        }
        posts += 1;
        for origin in [
            "https://other.example",
            "null",
            "http://localhost.other.example",
        ] {
            let headers = format!("Origin: {origin}\r\n");
            let reply = json_with_headers(server.address, path, &headers, &json!({}));
            assert_eq!(reply.status, 403, "{path}");
            assert_eq!(reply.body["error"]["code"], 403);
            let message = reply.body["error"]["message"].as_str().unwrap();
            assert!(message.contains("--cors-origin"), "{message}");
        }
        // Its own page, and programs.
        for headers in ["Origin: http://localhost\r\n", ""] {
            let reply = json_with_headers(server.address, path, headers, &json!({}));
            assert_ne!(reply.status, 403, "{path}");
        }
    }
    assert!(posts >= 5, "{posts}");
    let reply = with_headers(
        server.address,
        "GET",
        "/v1/models",
        "Origin: https://other.example\r\n",
    );
    assert_eq!(reply.status, 200);
}

/// The reply to a request without headers but these.
fn with_head(server: &TestServer, version: &str, headers: &str) -> Reply {
    let mut stream = connect(server.address);
    let head = format!("GET /v1/models HTTP/{version}\r\nConnection: close\r\n{headers}\r\n");
    stream.write_all(head.as_bytes()).unwrap();
    receive(stream)
}

#[test]
fn a_local_server_without_keys_answers_to_names_of_this_machine_only() {
    let status = |server: &TestServer, host: &str| {
        with_head(server, "1.1", &format!("Host: {host}\r\n")).status
    };
    let server = TestServer::start(Pace::Fast, 4);
    for host in [
        "localhost",
        "localhost:8091",
        "127.0.0.1:8091",
        "[::1]:8091",
        "x.localhost",
    ] {
        assert_eq!(status(&server, host), 200, "{host}");
    }
    assert_eq!(with_head(&server, "1.0", "").status, 200);
    for host in ["rebound.example", "rebound.example:8091", "192.0.2.1:8091"] {
        let reply = with_head(&server, "1.1", &format!("Host: {host}\r\n"));
        assert_eq!(reply.status, 403, "{host}");
        assert_eq!(reply.body["error"]["code"], 403);
        let message = reply.body["error"]["message"].as_str().unwrap();
        assert!(message.contains("--allowed-host"), "{message}");
        assert!(reply.header("x-request-id").is_some());
    }

    let settings = Settings {
        allowed_hosts: vec!["images.example".parse().unwrap()],
        ..Settings::new("m")
    };
    let server = TestServer::with_settings(Pace::Fast, 4, settings);
    assert_eq!(status(&server, "Images.example:443"), 200);
    assert_eq!(status(&server, "other.example"), 403);
    // A page under another name does not know the key.
    let server = with_keys();
    assert_eq!(status(&server, "other.example"), 401);
}
