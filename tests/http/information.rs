//! Models, version, the `OpenAPI` document and the page that shows it.

use kiln::server::Settings;
use serde_json::json;

use super::client::get;
use super::pipeline::Pace;
use super::server::TestServer;

#[test]
fn the_models_names_are_listed_and_used() {
    let settings = Settings {
        served_model_names: vec!["Qwen/Qwen-Image".to_owned(), "gpt-image-1".to_owned()],
        ..Settings::new("")
    };
    let server = TestServer::with_settings(Pace::Fast, 4, settings);
    let reply = get(server.address, "/v1/models");
    assert_eq!(reply.status, 200);
    assert_eq!(reply.body["object"], "list");
    let models = reply.body["data"].as_array().unwrap();
    let ids: Vec<_> = models.iter().map(|model| &model["id"]).collect();
    assert_eq!(ids, ["Qwen/Qwen-Image", "gpt-image-1"]);
    assert_eq!(models[0]["object"], "model");
    assert!(models[0]["created"].as_u64().unwrap() > 1_700_000_000);

    for path in ["/v1/models/Qwen/Qwen-Image", "/v1/models/Qwen%2FQwen-Image"] {
        let reply = get(server.address, path);
        assert_eq!((reply.status, &reply.body), (200, &models[0]), "{path}");
    }
    for (asked, answered) in [
        (json!("gpt-image-1"), "gpt-image-1"),
        (json!("other"), "Qwen/Qwen-Image"),
        (json!(null), "Qwen/Qwen-Image"),
    ] {
        let body = json!({"prompt": "a cat", "model": asked, "num_inference_steps": 1});
        let reply = super::client::post_to(server.address, "/v1/images/generations", &body);
        assert_eq!(reply.body["model"], answered);
    }
}

#[test]
fn the_version_is_the_programs() {
    let server = TestServer::start(Pace::Fast, 4);
    let reply = get(server.address, "/version");
    let expected = json!({
        "version": env!("CARGO_PKG_VERSION"),
        "commit": kiln::version::commit(),
        "date": kiln::version::date(),
        "features": kiln::version::features(),
        "burn": "0.21.0",
    });
    assert_eq!(reply.body, expected);
}

#[test]
fn the_document_has_every_route_and_the_servers_limits() {
    let server = TestServer::start(Pace::Fast, 4);
    let document = get(server.address, "/openapi.json").body;
    let paths: Vec<&str> = document["paths"]
        .as_object()
        .unwrap()
        .keys()
        .map(String::as_str)
        .collect();
    let expected = [
        "/health",
        "/health/live",
        "/health/ready",
        "/metrics",
        "/v1/chat/completions",
        "/v1/images/estimate",
        "/v1/images/generations",
        "/v1/images/jobs",
        "/v1/images/jobs/{id}",
        "/v1/images/jobs/{id}/cancel",
        "/v1/images/jobs/{id}/content",
        "/v1/load_lora_adapter",
        "/v1/models",
        "/v1/models/{name}",
        "/v1/refresh_lora_adapters",
        "/v1/status",
        "/v1/unload_lora_adapter",
        "/version",
    ];
    assert_eq!(paths, expected);
    for request in [
        "ChatRequest",
        "ExtraBody",
        "ImagesRequest",
        "ImagesExtraBody",
    ] {
        let fields = &document["components"]["schemas"][request]["properties"];
        assert_eq!(fields["height"]["minimum"], 16, "{request}");
        assert_eq!(fields["height"]["maximum"], 4096, "{request}");
        assert_eq!(fields["n"]["maximum"], 10, "{request}");
    }
    for event in ["ChatCompletionChunk", "PartialImageEvent", "CompletedEvent"] {
        assert!(
            document["components"]["schemas"][event].is_object(),
            "{event}"
        );
    }
}

#[test]
fn the_documentation_page_takes_nothing_from_elsewhere() {
    let server = TestServer::start(Pace::Fast, 4);
    let reply = get(server.address, "/docs");
    assert_eq!(
        reply.header("content-type"),
        Some("text/html; charset=utf-8")
    );
    let policy = reply.header("content-security-policy").unwrap();
    assert!(policy.starts_with("default-src 'self'"), "{policy}");
    let page = String::from_utf8(reply.bytes).unwrap();
    assert!(page.contains("fetch('openapi.json')"));
    assert!(!page.contains("http://") && !page.contains("https://"));
}
