//! The HTTP API over real sockets, with a fake pipeline that generates flat grey images and a real
//! tokenizer.

mod access;
mod bad_requests;
mod caches;
mod client;
mod deadlines;
mod images;
mod information;
#[cfg(all(target_os = "linux", feature = "flex"))]
mod job_work;
mod jobs;
mod lora;
#[cfg(target_os = "linux")]
mod lora_load;
mod lora_merged;
mod lora_prompts;
#[cfg(target_os = "linux")]
mod memory;
mod model_files;
mod operation;
mod page;
mod pipeline;
mod random_bodies;
mod real_model;
mod replicas;
mod schedules;
mod sdapi;
mod server;
mod stage_metrics;
mod start;
mod streams;

use base64::Engine as _;
use kiln::server::Settings;
use serde_json::{Value, json};

use self::client::{Reply, connect, get, post, send};
use self::pipeline::{FAIL_IN_START, PANIC_IN_STEP, Pace};
use self::server::{TestServer, load_tokenizer};

fn user(content: &Value) -> Value {
    json!([{"role": "user", "content": content}])
}

/// Width, height and pixels of an image part of a chat response.
fn decode(part: &Value) -> (u32, u32, Vec<u8>) {
    assert_eq!(part["type"], "image_url");
    let url = part["image_url"]["url"].as_str().unwrap();
    let data = url.strip_prefix("data:image/png;base64,").unwrap();
    decode_png(&from_base64(data))
}

fn from_base64(data: &str) -> Vec<u8> {
    base64::engine::general_purpose::STANDARD
        .decode(data)
        .unwrap()
}

/// Width, height and pixels of a PNG file.
pub(crate) fn decode_png(file: &[u8]) -> (u32, u32, Vec<u8>) {
    let mut reader = png::Decoder::new(std::io::Cursor::new(file))
        .read_info()
        .unwrap();
    let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
    let info = reader.next_frame(&mut pixels).unwrap();
    (info.width, info.height, pixels)
}

/// The generation parameters in a PNG file.
pub(crate) fn metadata(file: &[u8]) -> Option<String> {
    let reader = png::Decoder::new(std::io::Cursor::new(file))
        .read_info()
        .unwrap();
    let info = reader.info();
    let plain = info.uncompressed_latin1_text.first();
    let text = plain.map(|chunk| chunk.text.clone());
    text.or_else(|| Some(info.utf8_text.first()?.get_text().unwrap()))
}

fn parts(reply: &Reply) -> &Vec<Value> {
    assert_eq!(reply.status, 200, "{}", reply.body);
    reply.body["choices"][0]["message"]["content"]
        .as_array()
        .unwrap()
}

#[test]
fn a_plain_prompt_is_generated_with_the_defaults() {
    let server = TestServer::start(Pace::Fast, 4);
    let reply = post(server.address, &json!({"messages": user(&json!("a cat"))}));
    let parts = parts(&reply);
    assert_eq!(parts.len(), 1);

    let body = &reply.body;
    assert!(body["id"].as_str().unwrap().starts_with("chatcmpl-"));
    assert_eq!(body["object"], "chat.completion");
    assert_eq!(body["model"], "test/model");
    assert!(body["created"].as_u64().unwrap() > 1_700_000_000);
    assert_eq!(body["choices"][0]["index"], 0);
    assert_eq!(body["choices"][0]["finish_reason"], "stop");
    assert_eq!(body["choices"][0]["message"]["role"], "assistant");
    assert_eq!(body["size"], "64x64");
    assert_eq!(body["num_inference_steps"], 50);
    for stage in ["queue", "encode", "denoise", "previews", "decode", "paused"] {
        assert!(body["timings"][stage].as_f64().unwrap() >= 0.0);
    }
    // The seed in the response is the one of the image.
    let seed = body["seed"].as_u64().unwrap();
    assert!(seed < 1 << 31);
    let (width, height, pixels) = decode(&parts[0]);
    assert_eq!((width, height), (64, 64));
    assert_eq!(pixels, vec![seed as u8; 64 * 64 * 3]);
}

/// Open WebUI, `LiteLLM` and clients of `OpenRouter` read the field `images` of a message.
#[test]
fn an_answer_has_its_images_in_content_and_in_images() {
    let server = TestServer::start(Pace::Fast, 4);
    let body = json!({"messages": user(&json!("a cat")), "n": 2, "seed": 7});
    let reply = post(server.address, &body);
    let parts = parts(&reply);
    let images = reply.body["choices"][0]["message"]["images"]
        .as_array()
        .unwrap();
    assert_eq!((parts.len(), images.len()), (2, 2));
    for (index, (part, image)) in parts.iter().zip(images).enumerate() {
        let expected = json!({
            "type": "image_url", "image_url": part["image_url"], "index": index,
        });
        assert_eq!(image, &expected);
        assert_eq!(decode(image), (64, 64, vec![7; 64 * 64 * 3]));
    }
}

/// Proxies of language models and chat programs send these with every request.
#[test]
fn keys_of_text_sampling_are_ignored() {
    let server = TestServer::start(Pace::Fast, 4);
    let text = json!({
        "top_k": 20, "min_p": 0.05, "repetition_penalty": 1.1, "enable_thinking": false,
        "chat_template_kwargs": {"enable_thinking": false}, "session_id": "s",
        "provider": {"order": ["x"]}, "reasoning": {"effort": "low"}, "usage": {"include": true},
        "keep_alive": "5m", "cache_salt": "salt", "priority": 1, "skip_special_tokens": false,
        "stop_token_ids": [1], "guided_json": {}, "models": ["a", "b"], "transforms": [],
        "cache_prompt": true, "mirostat": 2, "think": false, "temperature": 0.7,
    });
    let mut flat = json!({"messages": user(&json!("a cat")), "seed": 3});
    flat.as_object_mut()
        .unwrap()
        .extend(text.as_object().unwrap().clone());
    let mut nested = json!({"messages": user(&json!("a cat")), "extra_body": text});
    nested["extra_body"]["seed"] = json!(3);
    for body in [flat, nested] {
        let reply = post(server.address, &body);
        assert_eq!(parts(&reply).len(), 1);
        assert_eq!(reply.body["seed"], 3);
    }
}

/// Clients that send vLLM-Omni's own request model send all of its keys.
#[test]
fn keys_that_say_nothing_are_accepted_on_every_route() {
    let server = TestServer::start(Pace::Fast, 4);
    let nothing = json!({
        "guidance_scale": null, "lora": null, "vae_use_tiling": false, "vae_use_slicing": false,
        "image": null, "layers": null, "extra_body": {}, "extra_params": {}, "flow_shift": null,
        "bot_task": null, "system_prompt": "", "use_system_prompt": null, "mask_image": "",
        "infer_align_image_size": null, "generator_device": null, "size": null, "seed": null,
        "a_key_that_nobody_knows": null,
    });
    let neutral = json!({"guidance_scale": 1.0, "lora": {}, "layers": 0, "num_frames": 1});
    let nested = json!({"extra_body": {"guidance_scale": 1, "lora": null, "unknown": null}});
    for extra in [nothing, neutral, nested] {
        for (path, mut body) in [
            (
                "/v1/chat/completions",
                json!({"messages": user(&json!("a cat"))}),
            ),
            ("/v1/images/generations", json!({"prompt": "a cat"})),
            ("/v1/images/estimate", json!({"prompt": "a cat"})),
        ] {
            body.as_object_mut()
                .unwrap()
                .extend(extra.as_object().unwrap().clone());
            let reply = client::post_to(server.address, path, &body);
            assert_eq!(reply.status, 200, "{path}: {}", reply.body);
        }
    }
}

#[test]
fn the_seed_minus_one_is_any_and_reported() {
    let server = TestServer::start(Pace::Fast, 4);
    for (path, mut body) in [
        (
            "/v1/chat/completions",
            json!({"messages": user(&json!("a cat"))}),
        ),
        ("/v1/images/generations", json!({"prompt": "a cat"})),
    ] {
        body["seed"] = json!(-1);
        let seeds = [(); 3].map(|()| {
            let reply = client::post_to(server.address, path, &body);
            assert_eq!(reply.status, 200, "{}", reply.body);
            let seed = reply.body["seed"].as_u64().unwrap();
            assert_eq!(server.last_job().noise.seed, seed);
            seed
        });
        assert!(seeds[0] != seeds[1] || seeds[1] != seeds[2], "{seeds:?}");
    }
}

#[test]
fn parameters_in_a_nested_extra_body_are_used() {
    let server = TestServer::start(Pace::Fast, 4);
    let body = json!({
        "messages": user(&json!("a cat")),
        "extra_body": {"height": 40, "width": 97, "num_inference_steps": 3, "true_cfg_scale": 4.0,
            "seed": 42, "negative_prompt": "blurry", "num_outputs_per_prompt": 2},
    });
    let reply = post(server.address, &body);
    let parts = parts(&reply);
    assert_eq!(parts.len(), 2);
    for part in parts {
        assert_eq!(decode(part), (96, 32, vec![42; 96 * 32 * 3]));
    }
    assert_eq!(reply.body["seed"], 42);
    assert_eq!(reply.body["size"], "96x32");
    assert_eq!(reply.body["num_inference_steps"], 3);

    let job = server.last_job();
    assert!(job.guidance.is_some());
    assert_eq!((job.size.height, job.size.width), (32, 96));
}

#[test]
fn the_openai_sdks_flat_parameters_and_content_parts_are_used() {
    let server = TestServer::start(Pace::Fast, 4);
    let body = json!({
        "model": "anything", "temperature": 1.0, "max_tokens": 100, "stream": false, "user": "me",
        "messages": [
            {"role": "system", "content": "You paint."},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "cat"}]},
        ],
        "size": "32X48", "seed": u64::MAX, "n": 3, "cfg_scale": 2, "num_inference_steps": 1,
    });
    let reply = post(server.address, &body);
    assert_eq!(parts(&reply).len(), 3);
    assert_eq!(reply.body["seed"], u64::MAX);
    assert_eq!(reply.body["size"], "32x48");

    let job = server.last_job();
    assert_eq!(job.guidance, None);
    let plain = load_tokenizer().encode_prompt("a cat").unwrap();
    assert_eq!(job.conditioning.tokens, plain);
    let usage = &reply.body["usage"];
    let tokenizer = load_tokenizer();
    let prompt_tokens = tokenizer.prompt_tokens(&tokenizer.encode_prompt("a cat").unwrap());
    assert_eq!(usage["prompt_tokens"], prompt_tokens);
    assert_eq!(usage["completion_tokens"], 2 * 3 * 3);
    assert_eq!(usage["total_tokens"], prompt_tokens + 18);
}

#[test]
fn an_empty_negative_prompt_turns_guidance_on() {
    let server = TestServer::start(Pace::Fast, 4);
    let body = json!({"messages": user(&json!("")), "extra_body": {"negative_prompt": ""}});
    assert_eq!(post(server.address, &body).status, 200);
    assert!(server.last_job().guidance.is_some());
}

#[test]
fn the_default_negative_prompt_is_used_by_requests_without_one() {
    let settings = Settings {
        default_negative_prompt: Some(" ".to_owned()),
        ..Settings::new("m")
    };
    let server = TestServer::with_settings(Pace::Fast, 4, settings);
    let body = json!({"messages": user(&json!("a cat")), "negative_prompt": null});
    assert_eq!(post(server.address, &body).status, 200);
    let tokenizer = load_tokenizer();
    let default = tokenizer.encode_prompt(" ").unwrap();
    assert_eq!(server.last_job().guidance.unwrap().negative.tokens, default);

    let body = json!({"messages": user(&json!("a cat")), "negative_prompt": "blurry"});
    assert_eq!(post(server.address, &body).status, 200);
    let own = tokenizer.encode_prompt("blurry").unwrap();
    assert_eq!(server.last_job().guidance.unwrap().negative.tokens, own);
}

#[test]
fn png_files_contain_the_generation_parameters() {
    let generate = |server: &TestServer, prompt: &str| {
        let body = json!({"messages": user(&json!(prompt)), "n": 2, "seed": 7});
        let reply = post(server.address, &body);
        let url = parts(&reply)[1]["image_url"]["url"].as_str().unwrap();
        metadata(&from_base64(url.split_once(',').unwrap().1))
    };
    let server = TestServer::start(Pace::Fast, 4);
    for prompt in ["a café", "雪"] {
        let text = generate(&server, prompt).unwrap();
        let expected = format!(
            "{prompt}\nSteps: 50, Sampler: Euler, CFG scale: 1, Seed: 7, Size: 64x64, Model: test/model, RNG: CPU, Batch size: 2, Batch pos: 1"
        );
        assert!(text.starts_with(&expected), "{text}");
    }

    let settings = Settings {
        metadata: false,
        ..Settings::new("m")
    };
    let server = TestServer::with_settings(Pace::Fast, 4, settings);
    assert_eq!(generate(&server, "a cat"), None);
}

#[test]
fn a_server_is_healthy() {
    let server = TestServer::start(Pace::Fast, 4);
    let reply = get(server.address, "/health");
    assert_eq!(
        (reply.status, &reply.body),
        (200, &json!({"status": "healthy"}))
    );
}

#[test]
fn a_full_queue_is_429_with_a_time_to_retry() {
    let server = TestServer::start(Pace::Slow, 0);
    let body = json!({"messages": user(&json!("a cat")), "num_inference_steps": 1000});
    let first = send(
        connect(server.address),
        "POST",
        "/v1/chat/completions",
        Some(&body),
    );
    server.wait_for_steps(1);
    let reply = post(server.address, &body);
    assert_eq!(reply.status, 429);
    assert_eq!(reply.body["error"]["type"], "rate_limit_error");
    assert_eq!(reply.body["error"]["code"], 429);
    let seconds: u64 = reply.header("retry-after").unwrap().parse().unwrap();
    assert!((1..=3600).contains(&seconds));
    drop(first);
}

#[test]
fn a_failure_of_the_pipeline_is_500_without_detail_and_the_next_request_succeeds() {
    let server = TestServer::start(Pace::Fast, 4);
    for seed in [PANIC_IN_STEP, FAIL_IN_START] {
        let reply = post(
            server.address,
            &json!({"messages": user(&json!("a")), "seed": seed}),
        );
        assert_eq!(reply.status, 500);
        assert_eq!(reply.body["error"]["type"], "server_error");
        assert_eq!(reply.body["error"]["param"], Value::Null);
        let message = reply.body["error"]["message"].as_str().unwrap();
        assert!(!message.contains("secret"), "{message}");

        let reply = post(
            server.address,
            &json!({"messages": user(&json!("a")), "seed": 1}),
        );
        assert_eq!(reply.status, 200);
    }
}

#[test]
fn a_client_that_disconnects_frees_the_pipeline() {
    let server = TestServer::start(Pace::Slow, 4);
    let body = json!({"messages": user(&json!("a cat")), "num_inference_steps": 1000});
    let reply = send(
        connect(server.address),
        "POST",
        "/v1/chat/completions",
        Some(&body),
    );
    server.wait_for_steps(2);
    let waiting = send(
        connect(server.address),
        "POST",
        "/v1/chat/completions",
        Some(&body),
    );
    // The waiting request is dropped first, so that it never starts.
    server.wait_for_waiting(1);
    drop(waiting);
    server.wait_for_waiting(0);
    drop(reply);

    let one_step = json!({"messages": user(&json!("a cat")), "num_inference_steps": 1});
    assert_eq!(post(server.address, &one_step).status, 200);
    // There would be 1000 steps for each request if the pipeline were not freed.
    assert!(server.steps() < 500, "{} steps were made", server.steps());
    assert_eq!(server.discards(), 1);
}

#[test]
fn running_requests_are_finished_on_shutdown() {
    let mut server = TestServer::start(Pace::Slow, 4);
    let body = json!({"messages": user(&json!("a cat")), "num_inference_steps": 20});
    let pending = send(
        connect(server.address),
        "POST",
        "/v1/chat/completions",
        Some(&body),
    );
    server.wait_for_steps(1);
    server.begin_shutdown();
    assert_eq!(client::receive(pending).status, 200);
    server.join();
}

#[test]
fn a_stopped_engine_is_503() {
    let server = TestServer::start(Pace::Slow, 4);
    let body = json!({"messages": user(&json!("a cat")), "num_inference_steps": 1000});
    let pending = send(
        connect(server.address),
        "POST",
        "/v1/chat/completions",
        Some(&body),
    );
    server.wait_for_steps(1);
    server.engine.stop();
    assert_eq!(client::receive(pending).status, 503);
    let reply = post(server.address, &body);
    assert_eq!(
        (reply.status, &reply.body["error"]["type"]),
        (503, &json!("server_error"))
    );
    let reply = get(server.address, "/health");
    assert_eq!(
        (reply.status, &reply.body),
        (503, &json!({"status": "unhealthy"}))
    );
}
