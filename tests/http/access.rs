use kiln::server::{ApiKeys, Settings};
use serde_json::json;

use super::client::{connect, get, receive, send_raw, with_headers};
use super::pipeline::Pace;
use super::server::TestServer;

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
fn what_is_no_secret_needs_no_key() {
    let server = with_keys();
    for path in ["/health", "/version", "/openapi.json", "/docs", "/"] {
        assert_eq!(get(server.address, path).status, 200, "{path}");
    }
}

#[test]
fn other_origins_are_let_in_only_if_the_server_says_so() {
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
    // The answer itself, also where it is an error, says who may read it.
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
