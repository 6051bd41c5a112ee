//! Invalid requests: their status, and the parameter that the error names.

use serde_json::{Value, json};

use super::client::{Reply, connect, get, post_to, receive, send, send_raw};
use super::pipeline::Pace;
use super::server::TestServer;
use super::user;

/// A chat request with these keys added.
fn cat(extra: &Value) -> Value {
    let mut body = json!({"messages": user(&json!("a cat"))});
    body.as_object_mut()
        .unwrap()
        .extend(extra.as_object().unwrap().clone());
    body
}

/// Checks the error body of `OpenAI`, its status and its parameter.
fn assert_refused(reply: &Reply, status: u16, param: Option<&str>) {
    let error = &reply.body["error"];
    assert_eq!(reply.status, status, "{error}");
    assert_eq!(error["code"], status, "{error}");
    assert_eq!(error["param"].as_str(), param, "{error}");
    assert!(!error["message"].as_str().unwrap().is_empty(), "{error}");
    assert!(error["type"].is_string(), "{error}");
    let id = reply.header("x-request-id");
    assert_eq!(error["request_id"].as_str(), id, "{error}");
    assert_eq!(error.as_object().unwrap().len(), 5, "{error}");
    assert_eq!(reply.body.as_object().unwrap().len(), 1, "{error}");
}

/// Checks that every body is refused with status 400 and the given parameter.
fn assert_all_refused(cases: &[(Value, &str)]) {
    assert_all_refused_at("/v1/chat/completions", cases);
}

fn assert_all_refused_at(path: &str, cases: &[(Value, &str)]) {
    let server = TestServer::start(Pace::Fast, 4);
    for (body, param) in cases {
        let reply = post_to(server.address, path, body);
        assert_eq!(reply.status, 400, "accepted {body}");
        assert_refused(&reply, 400, Some(param));
    }
}

/// An images request with these keys added.
fn image(extra: &Value) -> Value {
    let mut body = json!({"prompt": "a cat"});
    body.as_object_mut()
        .unwrap()
        .extend(extra.as_object().unwrap().clone());
    body
}

#[test]
fn values_out_of_bounds() {
    assert_all_refused(&[
        (cat(&json!({"height": 0})), "height"),
        (cat(&json!({"height": 15})), "height"),
        (cat(&json!({"height": -64})), "height"),
        (cat(&json!({"width": 4112})), "width"),
        (cat(&json!({"width": u64::MAX})), "width"),
        (cat(&json!({"width": i64::MIN})), "width"),
        (cat(&json!({"extra_body": {"width": 100_000}})), "width"),
        (cat(&json!({"size": "0x64"})), "size"),
        (cat(&json!({"size": "100000x10000"})), "size"),
        (
            cat(&json!({"num_inference_steps": 0})),
            "num_inference_steps",
        ),
        (
            cat(&json!({"num_inference_steps": -1})),
            "num_inference_steps",
        ),
        (
            cat(&json!({"num_inference_steps": 1001})),
            "num_inference_steps",
        ),
        (cat(&json!({"true_cfg_scale": -0.5})), "true_cfg_scale"),
        (cat(&json!({"true_cfg_scale": 1e308})), "true_cfg_scale"),
        (cat(&json!({"true_cfg_scale": 20.5})), "true_cfg_scale"),
        (cat(&json!({"seed": -2})), "seed"),
        (cat(&json!({"seed": i64::MIN})), "seed"),
        (cat(&json!({"n": 0})), "n"),
        (cat(&json!({"n": 11})), "n"),
        (
            cat(&json!({"num_outputs_per_prompt": 0})),
            "num_outputs_per_prompt",
        ),
        (
            cat(&json!({"extra_body": {"num_outputs_per_prompt": 1000}})),
            "num_outputs_per_prompt",
        ),
        (
            json!({"messages": user(&json!("cat ".repeat(3000)))}),
            "messages",
        ),
        (
            cat(&json!({"negative_prompt": "cat ".repeat(3000)})),
            "negative_prompt",
        ),
    ]);
}

#[test]
fn invalid_images_requests() {
    let long = "x".repeat(kiln::request::MAX_PROMPT_BYTES + 1);
    let cases = [
        (json!({}), "prompt"),
        (json!({"prompt": null}), "prompt"),
        (json!({"prompt": 7}), "prompt"),
        (json!({"prompt": ["a cat"]}), "prompt"),
        (json!({"prompt": "cat ".repeat(3000)}), "prompt"),
        (json!({"prompt": long}), "prompt"),
        (image(&json!({"negative_prompt": long})), "negative_prompt"),
        (image(&json!({"negative_prompt": {}})), "negative_prompt"),
        (image(&json!({"messages": []})), "messages"),
        (image(&json!({"image": "AA=="})), "image"),
        (image(&json!({"model": 5})), "model"),
        (image(&json!({"n": 0})), "n"),
        (image(&json!({"n": 11})), "n"),
        (image(&json!({"n": 1.5})), "n"),
        (
            image(&json!({"n": 2, "num_outputs_per_prompt": 3})),
            "num_outputs_per_prompt",
        ),
        (image(&json!({"n": 3, "size": "4096x4096"})), "n"),
        (image(&json!({"size": "large"})), "size"),
        (image(&json!({"size": "0x0"})), "size"),
        (image(&json!({"size": "64x8"})), "size"),
        (image(&json!({"size": [64, 64]})), "size"),
        (image(&json!({"size": "auto", "height": 64})), "size"),
        (
            image(&json!({"response_format": "urls"})),
            "response_format",
        ),
        (
            image(&json!({"response_format": {"type": "text"}})),
            "response_format",
        ),
        (image(&json!({"output_format": "gif"})), "output_format"),
        (
            image(&json!({"output_format": "image/png"})),
            "output_format",
        ),
        (image(&json!({"output_format": 1})), "output_format"),
        (
            image(&json!({"output_compression": -1})),
            "output_compression",
        ),
        (
            image(&json!({"output_compression": 101})),
            "output_compression",
        ),
        (
            image(&json!({"output_compression": "80"})),
            "output_compression",
        ),
        (image(&json!({"quality": "best"})), "quality"),
        (image(&json!({"background": "transparent"})), "background"),
        (image(&json!({"moderation": "high"})), "moderation"),
        (image(&json!({"style": "oil"})), "style"),
        (image(&json!({"user": 5})), "user"),
        (image(&json!({"stream": 1})), "stream"),
        (image(&json!({"partial_images": 2})), "partial_images"),
        (
            image(&json!({"stream": true, "partial_images": 4})),
            "partial_images",
        ),
        (
            image(&json!({"stream": true, "partial_images": -1})),
            "partial_images",
        ),
        (
            image(&json!({"stream": true, "response_format": "file"})),
            "response_format",
        ),
        (image(&json!({"preview_every": 2})), "preview_every"),
        (
            image(&json!({"generator_device": "tpu"})),
            "generator_device",
        ),
        (
            image(&json!({"num_inference_steps": 1001})),
            "num_inference_steps",
        ),
        (image(&json!({"true_cfg_scale": -1})), "true_cfg_scale"),
        (image(&json!({"cfg_scale": -1})), "cfg_scale"),
        (image(&json!({"seed": -2})), "seed"),
        (image(&json!({"seed": "7"})), "seed"),
    ];
    assert_all_refused_at("/v1/images/generations", &cases);
}

#[test]
fn keys_of_images_requests_that_cannot_be_honoured() {
    let cases = [
        (image(&json!({"extra_body": []})), "extra_body"),
        (image(&json!({"extra_body": "n=2"})), "extra_body"),
        (image(&json!({"extra_body": {"m": 2}})), "extra_body.m"),
        (
            image(&json!({"extra_body": {"quality": "low"}})),
            "extra_body.quality",
        ),
        (image(&json!({"n": 1, "extra_body": {"n": 2}})), "n"),
        (image(&json!({"layers": 4})), "layers"),
        (image(&json!({"loras": [{"name": "x"}]})), "loras"),
        (image(&json!({"lorra": ""})), "lorra"),
        (image(&json!({"guidance_scale": 7.5})), "guidance_scale"),
        (
            image(&json!({"lora": {"name": "x", "path": "/x"}})),
            "lora.path",
        ),
        (image(&json!({"vae_use_tiling": true})), "vae_use_tiling"),
        (image(&json!({"vae_use_slicing": true})), "vae_use_slicing"),
        (image(&json!({"temperature": 1})), "temperature"),
    ];
    assert_all_refused_at("/v1/images/generations", &cases);
}

#[test]
fn messages_are_short_however_long_the_value() {
    let server = TestServer::start(Pace::Fast, 4);
    let body = image(&json!({"size": "9".repeat(100_000)}));
    let reply = post_to(server.address, "/v1/images/generations", &body);
    assert_refused(&reply, 400, Some("size"));
    assert!(reply.bytes.len() < 500, "{} bytes", reply.bytes.len());
}

#[test]
fn values_of_the_wrong_type() {
    assert_all_refused(&[
        (cat(&json!({"height": "512"})), "height"),
        (cat(&json!({"height": 512.5})), "height"),
        (cat(&json!({"width": [512]})), "width"),
        (cat(&json!({"width": true})), "width"),
        (cat(&json!({"size": 512})), "size"),
        (cat(&json!({"size": "512"})), "size"),
        (cat(&json!({"size": "512:512"})), "size"),
        (cat(&json!({"size": "-512x512"})), "size"),
        (
            cat(&json!({"num_inference_steps": "many"})),
            "num_inference_steps",
        ),
        (
            cat(&json!({"num_inference_steps": {}})),
            "num_inference_steps",
        ),
        (cat(&json!({"true_cfg_scale": "4"})), "true_cfg_scale"),
        (cat(&json!({"cfg_scale": false})), "cfg_scale"),
        (cat(&json!({"seed": "42"})), "seed"),
        (cat(&json!({"seed": 0.5})), "seed"),
        (cat(&json!({"seed": 1e30})), "seed"),
        (cat(&json!({"negative_prompt": 7})), "negative_prompt"),
        (
            cat(&json!({"negative_prompt": ["blurry"]})),
            "negative_prompt",
        ),
        (cat(&json!({"n": "2"})), "n"),
        (cat(&json!({"extra_body": []})), "extra_body"),
        (cat(&json!({"extra_body": "height=512"})), "extra_body"),
        (cat(&json!({"stream": "yes"})), "stream"),
        (cat(&json!({"model": 5})), "model"),
        (cat(&json!({"output_format": "bmp"})), "output_format"),
        (
            cat(&json!({"output_compression": 200})),
            "output_compression",
        ),
        (cat(&json!({"generator_device": 0})), "generator_device"),
    ]);
}

#[test]
fn keys_that_are_unknown_or_contradict_each_other() {
    assert_all_refused(&[
        (cat(&json!({"preview_every": 2})), "preview_every"),
        (
            cat(&json!({"extra_body": {"preview_every": 2}})),
            "preview_every",
        ),
        (
            cat(&json!({"stream": true, "preview_every": 0})),
            "preview_every",
        ),
        (
            cat(&json!({"stream": true, "preview_every": "all"})),
            "preview_every",
        ),
        (
            cat(&json!({"stream": true, "extra_body": {"stream": true}})),
            "extra_body.stream",
        ),
        (
            cat(&json!({"stream": true, "stream_options": true})),
            "stream_options",
        ),
        (cat(&json!({"heigth": 512})), "heigth"),
        (cat(&json!({"top_q": 5})), "top_q"),
        (
            cat(&json!({"chat_template_kwarg": {}})),
            "chat_template_kwarg",
        ),
        (
            cat(&json!({"image_config": {"aspect_ratio": "1:1"}})),
            "image_config",
        ),
        (cat(&json!({"prompt": "a dog"})), "prompt"),
        (
            cat(&json!({"extra_body": {"steps": 20}})),
            "extra_body.steps",
        ),
        (
            cat(&json!({"extra_body": {"model": "x"}})),
            "extra_body.model",
        ),
        (
            cat(&json!({"extra_body": {"extra_body": {}}})),
            "extra_body.extra_body",
        ),
        (
            cat(&json!({"extra_body": {"guidance_scale": 4}})),
            "extra_body.guidance_scale",
        ),
        (cat(&json!({"lora": {"name": "x"}})), "lora"),
        (
            cat(&json!({"height": 64, "extra_body": {"height": 32}})),
            "height",
        ),
        (cat(&json!({"seed": 1, "extra_body": {"seed": 2}})), "seed"),
        (
            cat(&json!({"cfg_scale": 1, "true_cfg_scale": 2})),
            "true_cfg_scale",
        ),
        (
            cat(&json!({"cfg_scale": 1, "extra_body": {"true_cfg_scale": 2}})),
            "true_cfg_scale",
        ),
        (
            cat(&json!({"n": 1, "num_outputs_per_prompt": 2})),
            "num_outputs_per_prompt",
        ),
        (cat(&json!({"size": "64x64", "height": 32})), "size"),
        (
            cat(&json!({"size": "64x64", "extra_body": {"width": 32}})),
            "size",
        ),
    ]);
}

#[test]
fn messages_without_a_prompt() {
    let image = json!({"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}});
    let content = |content: &Value| json!({"messages": user(content)});
    assert_all_refused(&[
        (json!({}), "messages"),
        (json!({"messages": null}), "messages"),
        (json!({"messages": "a cat"}), "messages"),
        (json!({"messages": {}}), "messages"),
        (json!({"messages": []}), "messages"),
        (json!({"messages": ["a cat"]}), "messages.0"),
        (
            json!({"messages": [{"content": "a cat"}]}),
            "messages.0.role",
        ),
        (
            json!({"messages": [{"role": 1, "content": "a cat"}]}),
            "messages.0.role",
        ),
        (
            json!({"messages": [{"role": "system", "content": "a cat"}]}),
            "messages",
        ),
        (
            json!({"messages": [{"role": "user"}]}),
            "messages.0.content",
        ),
        (content(&json!(null)), "messages.0.content"),
        (content(&json!(5)), "messages.0.content"),
        (content(&json!({"text": "a cat"})), "messages.0.content"),
        (content(&json!([])), "messages.0.content"),
        (content(&json!([5])), "messages.0.content.0"),
        (
            content(&json!([{"type": "text"}])),
            "messages.0.content.0.text",
        ),
        (
            content(&json!([{"type": "text", "text": 5}])),
            "messages.0.content.0.text",
        ),
        (
            content(&json!([{"type": "text", "text": "a cat"}, image])),
            "messages.0.content.1",
        ),
        (content(&json!([{"image": "AA=="}])), "messages.0.content.0"),
        (
            content(&json!([{"type": "input_audio", "input_audio": {}}])),
            "messages.0.content.0",
        ),
    ]);
}

#[test]
fn bodies_that_are_not_a_json_object() {
    let server = TestServer::start(Pace::Fast, 4);
    let json_type = "Content-Type: application/json\r\n";
    let post = |headers: &str, body: &[u8]| {
        receive(send_raw(
            connect(server.address),
            "POST",
            "/v1/chat/completions",
            (headers, body),
        ))
    };
    let not_json: [&[u8]; 9] = [
        b"",
        b"{",
        b"{\"messages\": }",
        b"a=b",
        b"[]",
        b"null",
        b"7",
        b"\"a cat\"",
        b"{\"a\":\"\xff\"}",
    ];
    for body in not_json {
        assert_refused(&post(json_type, body), 400, None);
    }
    let good = cat(&json!({})).to_string();
    for headers in [
        "",
        "Content-Type: text/plain\r\n",
        "Content-Type: application/x-www-form-urlencoded\r\n",
        "Content-Type: multipart/form-data; boundary=x\r\n",
    ] {
        assert_refused(&post(headers, good.as_bytes()), 400, None);
    }
    for encoding in ["gzip", "deflate", "br", "zstd", "identity, gzip", "x"] {
        let headers = format!("{json_type}Content-Encoding: {encoding}\r\n");
        let reply = post(&headers, b"\x1f\x8b\x08\x00");
        assert_refused(&reply, 415, None);
        let message = reply.body["error"]["message"].as_str().unwrap();
        let header = format!("Content-Encoding: {encoding}");
        assert!(message.contains(&header), "{message}");
    }
    let with_charset = "Content-Type: Application/JSON; charset=utf-8\r\n";
    assert_eq!(post(with_charset, good.as_bytes()).status, 200);

    let large = cat(&json!({"user": "x".repeat(kiln::server::DEFAULT_MAX_BODY_BYTES)})).to_string();
    assert_refused(&post(json_type, large.as_bytes()), 413, None);
}

#[test]
fn bodies_of_windows_and_of_careful_clients_are_read() {
    let server = TestServer::start(Pace::Fast, 4);
    let post = |path: &str, headers: &str, body: &[u8]| {
        let headers = format!("Content-Type: application/json\r\n{headers}");
        let content = (headers.as_str(), body);
        receive(send_raw(connect(server.address), "POST", path, content))
    };
    // Windows editors and PowerShell write a byte order mark.
    let marked = |body: &Value| [b"\xef\xbb\xbf", body.to_string().as_bytes()].concat();
    let (chat, images) = ("/v1/chat/completions", "/v1/images/generations");
    assert_eq!(post(chat, "", &marked(&cat(&json!({})))).status, 200);
    assert_eq!(post(images, "", &marked(&image(&json!({})))).status, 200);
    let twice = [b"\xef\xbb\xbf".to_vec(), marked(&image(&json!({})))].concat();
    assert_refused(&post(images, "", &twice), 400, None);
    for utf16 in [&b"\xff\xfe{\0}\0"[..], b"\xfe\xff\0{\0}"] {
        let reply = post(images, "", utf16);
        assert_refused(&reply, 400, None);
        let message = reply.body["error"]["message"].as_str().unwrap();
        assert!(message.contains("UTF-16"), "{message}");
    }

    let plain = image(&json!({})).to_string();
    for headers in ["Content-Encoding: identity\r\n", "Content-Encoding:\r\n"] {
        assert_eq!(
            post(images, headers, plain.as_bytes()).status,
            200,
            "{headers}"
        );
    }
}

#[test]
fn routes_and_methods_that_do_not_exist() {
    let server = TestServer::start(Pace::Fast, 4);
    for path in [
        "/page",
        "/page/",
        "/index.html",
        "/v1",
        "/v1/chat/completion",
        "/v1/images/edits",
    ] {
        assert_refused(&get(server.address, path), 404, None);
    }
    // Names that are not UTF-8 too.
    for path in ["other", "%FF", "a/%C3", "%", "%2", "%zz"] {
        let path = format!("/v1/models/{path}");
        assert_refused(&get(server.address, &path), 404, Some("model"));
    }
    for (method, path) in [
        ("GET", "/v1/chat/completions"),
        ("PUT", "/v1/chat/completions"),
        ("DELETE", "/v1/chat/completions"),
        ("POST", "/health"),
        ("GET", "/v1/images/generations"),
        ("POST", "/v1/models"),
        ("DELETE", "/v1/models/test/model"),
    ] {
        let reply = receive(send(connect(server.address), method, path, None));
        assert_refused(&reply, 405, None);
        assert!(reply.header("allow").is_some());
    }
}

#[test]
fn every_path_and_query_that_cannot_be_read_has_the_error_body() {
    let settings = kiln::server::Settings {
        sdapi: true,
        ..kiln::server::Settings::new("m")
    };
    let server = TestServer::with_settings(Pace::Fast, 4, settings);
    for (path, status) in [
        ("/%FF", 404),
        ("/v1/%FF", 404),
        ("/v1/models%FF", 404),
        ("/sdapi/v1/%FF", 404),
        ("/sdapi/v1/progress?skip_current_image=%FF", 400),
        (
            "/sdapi/v1/progress?skip_current_image=1&skip_current_image=0",
            400,
        ),
    ] {
        let reply = get(server.address, path);
        assert_eq!(reply.status, status, "{path}");
        assert_eq!(reply.body["error"]["code"], status, "{path}");
    }
}

#[test]
fn a_slash_at_the_end_of_a_path_changes_nothing() {
    let server = TestServer::start(Pace::Fast, 4);
    for path in [
        "/",
        "/health/",
        "/v1/models/",
        "/v1/models/test/model/",
        "/docs/",
        "/health///",
    ] {
        assert_eq!(get(server.address, path).status, 200, "{path}");
    }
    let body = json!({"prompt": "a cat", "num_inference_steps": 1});
    let reply = post_to(server.address, "/v1/images/generations/?x=1", &body);
    assert_eq!(reply.status, 200);
    for (path, status) in [
        ("/v1/", 404),
        ("/unknown/", 404),
        ("/v1/chat/completions/", 405),
    ] {
        let reply = get(server.address, path);
        assert_refused(&reply, status, None);
        let message = reply.body["error"]["message"].as_str().unwrap();
        assert!(message.contains(path), "{message}");
    }
}

#[test]
fn a_body_over_the_limit_is_413_for_clients_that_send_all_of_it_first() {
    let server = TestServer::start(Pace::Fast, 4);
    let body = vec![b'x'; 60 << 20];
    for path in ["/v1/chat/completions", "/v1/images/generations"] {
        let content = ("Content-Type: application/json\r\n", body.as_slice());
        let stream = send_raw(connect(server.address), "POST", path, content);
        assert_refused(&receive(stream), 413, None);
    }
    // Any other error too.
    let stream = send_raw(connect(server.address), "POST", "/unknown", ("", &body));
    assert_refused(&receive(stream), 404, None);
}
