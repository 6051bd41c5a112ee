//! `POST /v1/images/generations`.

use kiln_models::noise::NoiseGenerator;
use serde_json::{Value, json};

use super::client::{Reply, post_to};
use super::pipeline::Pace;
use super::server::{TestServer, load_tokenizer};
use super::{decode_png, from_base64};

fn generate(server: &TestServer, body: &Value) -> Reply {
    post_to(server.address, "/v1/images/generations", body)
}

/// The image files in a response.
fn files(reply: &Reply) -> Vec<Vec<u8>> {
    assert_eq!(reply.status, 200, "{}", reply.body);
    let data = reply.body["data"].as_array().unwrap();
    data.iter()
        .map(|image| from_base64(image["b64_json"].as_str().unwrap()))
        .collect()
}

#[test]
fn a_prompt_is_enough() {
    let server = TestServer::start(Pace::Fast, 4);
    let reply = generate(&server, &json!({"prompt": "a cat"}));
    let files = files(&reply);
    let seed = reply.body["seed"].as_u64().unwrap();
    assert_eq!(files.len(), 1);
    assert_eq!(
        decode_png(&files[0]),
        (64, 64, vec![seed as u8; 64 * 64 * 3])
    );

    let body = &reply.body;
    assert!(body["created"].as_u64().unwrap() > 1_700_000_000);
    assert_eq!(body["output_format"], "png");
    assert_eq!(body["background"], "opaque");
    assert_eq!(body["size"], "64x64");
    assert_eq!(body["model"], "test/model");
    assert_eq!(body["num_inference_steps"], 50);
    let tokenizer = load_tokenizer();
    let prompt_tokens = tokenizer.prompt_tokens(&tokenizer.encode_prompt("a cat").unwrap());
    let usage = &body["usage"];
    assert_eq!(usage["input_tokens"], prompt_tokens);
    assert_eq!(usage["input_tokens_details"]["text_tokens"], prompt_tokens);
    assert_eq!(usage["output_tokens"], 16);
    assert_eq!(usage["total_tokens"], prompt_tokens + 16);
}

#[test]
fn all_fields_of_openais_clients_are_accepted() {
    let server = TestServer::start(Pace::Fast, 4);
    let body = json!({
        "prompt": "a cat", "model": "gpt-image-1", "n": 2, "size": "auto", "user": "me",
        "response_format": "b64_json", "output_format": "webp", "output_compression": 40,
        "quality": "low", "background": "auto", "moderation": "low", "style": "vivid",
        "safety_identifier": "x", "stream": false,
    });
    let reply = generate(&server, &body);
    let files = files(&reply);
    assert_eq!(files.len(), 2);
    assert!(files.iter().all(|file| file.starts_with(b"RIFF")));
    assert_eq!(reply.body["output_format"], "webp");
    assert_eq!(server.last_job().sampling.steps, 20);
}

#[test]
fn quality_is_the_number_of_steps_unless_that_is_given() {
    let server = TestServer::start(Pace::Fast, 4);
    for (quality, steps) in [("low", 20), ("medium", 30), ("high", 50), ("standard", 50)] {
        let reply = generate(&server, &json!({"prompt": "a cat", "quality": quality}));
        assert_eq!(reply.body["num_inference_steps"], steps, "{quality}");
    }
    let both = json!({"prompt": "a cat", "quality": "low", "num_inference_steps": 3});
    assert_eq!(generate(&server, &both).body["num_inference_steps"], 3);
}

#[test]
fn the_fields_of_vllm_omni_are_used() {
    let server = TestServer::start(Pace::Fast, 4);
    let body = json!({
        "prompt": "", "size": "96x32", "negative_prompt": "blurry", "num_inference_steps": 3,
        "true_cfg_scale": 2.5, "seed": 42, "generator_device": "cuda", "output_format": "jpg",
    });
    let reply = generate(&server, &body);
    assert!(files(&reply)[0].starts_with(b"\xff\xd8\xff"));
    assert_eq!(reply.body["output_format"], "jpeg");
    assert_eq!(reply.body["size"], "96x32");
    assert_eq!(reply.body["seed"], 42);

    let job = server.last_job();
    assert_eq!(job.guidance.map(|guidance| guidance.scale), Some(2.5));
    assert_eq!(
        (job.size.height, job.size.width, job.sampling.steps),
        (32, 96, 3)
    );
    assert_eq!(job.noise.generator, NoiseGenerator::Cuda);
}

#[test]
fn a_file_is_the_image_itself() {
    let server = TestServer::start(Pace::Fast, 4);
    let body = json!({"prompt": "a cat", "response_format": "file", "seed": 9});
    let reply = generate(&server, &body);
    assert_eq!(reply.status, 200);
    assert_eq!(reply.header("content-type"), Some("image/png"));
    assert_eq!(reply.header("x-kiln-seed"), Some("9"));
    let disposition = reply.header("content-disposition").unwrap();
    assert!(disposition.starts_with("attachment; filename=\"img-"));
    assert!(disposition.ends_with(".png\""), "{disposition}");
    assert_eq!(decode_png(&reply.bytes), (64, 64, vec![9; 64 * 64 * 3]));
}

/// Gateways and clients of DALL-E ask for URLs by default.
#[test]
fn a_url_contains_the_image() {
    let server = TestServer::start(Pace::Fast, 4);
    let body = json!({
        "prompt": "a cat", "model": "dall-e-3", "response_format": "url", "n": 2, "seed": 9,
        "quality": "hd", "style": "vivid",
    });
    let reply = generate(&server, &body);
    assert_eq!(reply.status, 200, "{}", reply.body);
    let data = reply.body["data"].as_array().unwrap();
    assert_eq!(data.len(), 2);
    for image in data {
        assert_eq!(image.as_object().unwrap().len(), 1, "{image}");
        let url = image["url"].as_str().unwrap();
        let file = from_base64(url.strip_prefix("data:image/png;base64,").unwrap());
        assert_eq!(decode_png(&file), (64, 64, vec![9; 64 * 64 * 3]));
    }
    let body = json!({"prompt": "a cat", "response_format": "URL", "output_format": "JPEG"});
    let reply = generate(&server, &body);
    let url = reply.body["data"][0]["url"].as_str().unwrap();
    assert!(url.starts_with("data:image/jpeg;base64,/9j/"), "{url}");
}

#[test]
fn base64_is_the_default_response_format() {
    let server = TestServer::start(Pace::Fast, 4);
    for format in [json!(null), json!(""), json!("b64_json")] {
        let reply = generate(
            &server,
            &json!({"prompt": "a cat", "response_format": format}),
        );
        assert_eq!(files(&reply).len(), 1);
        assert!(reply.body["data"][0]["url"].is_null());
    }
}

#[test]
fn sizes_and_words_are_read_in_the_forms_that_clients_write() {
    let server = TestServer::start(Pace::Fast, 4);
    for (size, expected) in [
        ("96X32", "96x32"),
        ("96*32", "96x32"),
        ("96×32", "96x32"),
        ("", "64x64"),
        ("AUTO", "64x64"),
    ] {
        let body = json!({
            "prompt": "a cat", "size": size, "output_format": "JPG", "quality": "LOW",
            "background": "", "style": "", "moderation": "",
        });
        let reply = generate(&server, &body);
        assert!(files(&reply)[0].starts_with(b"\xff\xd8\xff"));
        assert_eq!(reply.body["size"], expected, "{size}");
        assert_eq!(reply.body["num_inference_steps"], 20);
    }
}

/// `LiteLLM` puts a literal `extra_body` into the body, as curl users do.
#[test]
fn extra_body_is_read_as_in_chats() {
    let server = TestServer::start(Pace::Fast, 4);
    let body = json!({
        "prompt": "a cat", "size": "96x32",
        "extra_body": {
            "seed": 1, "num_inference_steps": 3, "negative_prompt": "blurry", "width": 96,
        },
    });
    let reply = generate(&server, &body);
    assert_eq!(files(&reply).len(), 1);
    assert_eq!(reply.body["seed"], 1);
    assert_eq!(reply.body["size"], "96x32");
    assert_eq!(server.last_job().sampling.steps, 3);
    assert!(server.last_job().guidance.is_some());
}

#[test]
fn several_files_are_an_archive() {
    let server = TestServer::start(Pace::Fast, 4);
    let body = json!({
        "prompt": "a cat", "response_format": "file", "n": 3, "output_format": "jpeg",
    });
    let reply = generate(&server, &body);
    assert_eq!(reply.header("content-type"), Some("application/zip"));
    let mut archive = zip::ZipArchive::new(std::io::Cursor::new(reply.bytes)).unwrap();
    let names: Vec<String> = archive
        .file_names()
        .map(|name| name.unwrap().into_owned())
        .collect();
    assert_eq!(names, ["image_0.jpeg", "image_1.jpeg", "image_2.jpeg"]);
    for name in names {
        let mut file = Vec::new();
        std::io::copy(&mut archive.by_name(&name).unwrap(), &mut file).unwrap();
        assert!(file.starts_with(b"\xff\xd8\xff"), "{name}");
    }
}
