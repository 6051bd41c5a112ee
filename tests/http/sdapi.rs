//! The API of AUTOMATIC1111's web UI.

use std::time::{Duration, Instant};

use base64::Engine as _;
use kiln::server::{ApiKeys, Settings};
use serde_json::{Value, json};

use super::client::{
    Reply, connect, get, json_with_headers, post_to, receive, send, send_raw, with_headers,
};
use super::pipeline::{PANIC_IN_STEP, Pace};
use super::server::TestServer;
use super::{decode_png, from_base64, metadata};

const TXT2IMG: &str = "/sdapi/v1/txt2img";
const INTERRUPT: &str = "/sdapi/v1/interrupt";
const PROGRESS: &str = "/sdapi/v1/progress";

fn settings() -> Settings {
    Settings {
        sdapi: true,
        ..Settings::new("test/model")
    }
}

fn start(pace: Pace) -> TestServer {
    TestServer::with_settings(pace, 4, settings())
}

fn with_keys(pace: Pace) -> TestServer {
    let keys = vec!["first-key".to_owned(), "second-key".to_owned()];
    let settings = Settings {
        api_keys: ApiKeys::new(keys).unwrap(),
        ..settings()
    };
    TestServer::with_settings(pace, 4, settings)
}

fn generate(server: &TestServer, body: &Value) -> Reply {
    post_to(server.address, TXT2IMG, body)
}

fn files(reply: &Reply) -> Vec<Vec<u8>> {
    assert_eq!(reply.status, 200, "{}", reply.body);
    let images = reply.body["images"].as_array().unwrap();
    images
        .iter()
        .map(|image| from_base64(image.as_str().unwrap()))
        .collect()
}

fn info(reply: &Reply) -> Value {
    serde_json::from_str(reply.body["info"].as_str().unwrap()).unwrap()
}

/// The header that a client sends for the text that its user entered.
fn basic(typed: &str) -> String {
    let typed = base64::engine::general_purpose::STANDARD.encode(typed);
    format!("Authorization: Basic {typed}\r\n")
}

/// Polls the progress until it fulfils the condition.
fn wait_for_progress(
    server: &TestServer,
    headers: &str,
    is_there: impl Fn(&Value) -> bool,
) -> Value {
    let started = Instant::now();
    loop {
        let reply = with_headers(server.address, "GET", PROGRESS, headers);
        assert_eq!(reply.status, 200, "{}", reply.body);
        if is_there(&reply.body) {
            return reply.body;
        }
        let waited = started.elapsed();
        assert!(waited < Duration::from_mins(1), "{}", reply.body);
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_prompt_is_enough() {
    let server = start(Pace::Fast);
    let reply = generate(&server, &json!({"prompt": "a cat"}));
    let files = files(&reply);
    let seed = reply.body["parameters"]["seed"].as_u64().unwrap();
    assert_eq!(files.len(), 1);
    assert_eq!(
        decode_png(&files[0]),
        (64, 64, vec![seed as u8; 64 * 64 * 3])
    );
    let job = server.last_job();
    assert_eq!((job.noise.seed, job.sampling.steps), (seed, 50));
    assert!(job.guidance.is_none());
    let info = info(&reply);
    assert_eq!(info["seed"], seed);
    assert_eq!(info["cfg_scale"], 1.0);
    assert_eq!(info["sd_model_name"], "test/model");
}

#[test]
fn all_fields_are_used_and_returned() {
    let server = start(Pace::Fast);
    let body = json!({
        "prompt": "a \"cat\"\n雪", "negative_prompt": "", "steps": 3, "cfg_scale": 7, "width": 97,
        "height": 40, "seed": 42, "batch_size": 2, "n_iter": 2, "sampler_name": "DPM++ 2M",
        "scheduler": "karras",
    });
    let reply = generate(&server, &body);
    let files = files(&reply);
    assert_eq!(files.len(), 4);
    for file in &files {
        assert_eq!(decode_png(file), (96, 32, vec![42; 96 * 32 * 3]));
    }
    let job = server.last_job();
    assert_eq!(job.guidance.unwrap().scale, 7.0);
    assert_eq!(job.sampling.steps, 3);

    let parameters = &reply.body["parameters"];
    for (key, value) in [
        ("prompt", json!("a \"cat\"\n雪")),
        ("negative_prompt", json!("")),
        ("width", json!(96)),
        ("height", json!(32)),
        ("steps", json!(3)),
        ("seed", json!(42)),
        ("batch_size", json!(2)),
        ("n_iter", json!(2)),
        ("sampler_name", json!("Euler")),
    ] {
        assert_eq!(parameters[key], value, "{key}");
    }
    let info = info(&reply);
    assert_eq!(info["all_seeds"], json!([42, 42, 42, 42]));
    assert_eq!(info["all_prompts"].as_array().unwrap().len(), 4);
    assert_eq!(info["cfg_scale"], 7.0);
    assert_eq!(info["index_of_first_image"], 0);
    let texts = info["infotexts"].as_array().unwrap();
    for (text, file) in texts.iter().zip(&files) {
        assert_eq!(text.as_str(), metadata(file).as_deref());
    }
    assert!(texts[3].as_str().unwrap().contains("Batch pos: 3"));
}

#[test]
fn the_seed_minus_one_is_any() {
    let server = start(Pace::Fast);
    let seeds = [json!(-1), json!(-1.0), json!(null)].map(|seed| {
        let reply = generate(&server, &json!({"prompt": "a", "steps": 1, "seed": seed}));
        info(&reply)["seed"].as_u64().unwrap()
    });
    assert!(seeds[0] != seeds[1] || seeds[1] != seeds[2], "{seeds:?}");
}

/// The body that SillyTavern 1.19.0 makes of its default settings (generateAutoImage in
/// public/scripts/extensions/stable-diffusion/index.js).
fn silly_tavern() -> Value {
    json!({
        "url": "http://127.0.0.1:8091", "auth": "", "prompt": "a cat", "negative_prompt": "blurry",
        "sampler_name": "DDIM", "scheduler": "normal", "steps": 20, "cfg_scale": 7, "width": 512,
        "height": 512, "restore_faces": false, "enable_hr": false, "hr_upscaler": "Latent",
        "hr_scale": 1, "hr_additional_modules": [], "denoising_strength": 0.7,
        "hr_second_pass_steps": 0, "override_settings": {"CLIP_stop_at_last_layers": 1},
        "override_settings_restore_afterwards": true, "clip_skip": 1, "save_images": true,
        "send_images": true, "do_not_save_grid": false, "do_not_save_samples": false,
    })
}

#[test]
fn fields_that_clients_always_send_are_accepted() {
    let server = start(Pace::Fast);
    let reply = generate(&server, &silly_tavern());
    assert_eq!(decode_png(&files(&reply)[0]).0, 512);
    // All fields with a default in the description of the web UI's API.
    let all: Value = serde_json::from_str(
        r#"{
        "prompt": "", "negative_prompt": "", "styles": [], "seed": -1, "subseed": -1,
        "subseed_strength": 0, "seed_resize_from_h": -1, "seed_resize_from_w": -1,
        "sampler_name": "Euler", "sampler_index": "Euler", "scheduler": "", "batch_size": 1,
        "n_iter": 1, "steps": 1, "cfg_scale": 7.0, "width": 64, "height": 64,
        "restore_faces": null, "tiling": false, "do_not_save_samples": false,
        "do_not_save_grid": false, "eta": 0, "denoising_strength": 0, "s_min_uncond": 0,
        "s_churn": 0, "s_tmax": 0, "s_tmin": 0, "s_noise": 0, "override_settings": {},
        "override_settings_restore_afterwards": true, "refiner_checkpoint": "",
        "refiner_switch_at": 0, "disable_extra_networks": false, "firstpass_image": null,
        "comments": {}, "enable_hr": false, "firstphase_width": 0, "firstphase_height": 0,
        "hr_scale": 2, "hr_upscaler": "", "hr_second_pass_steps": 0, "hr_resize_x": 0,
        "hr_resize_y": 0, "hr_checkpoint_name": "", "hr_sampler_name": "", "hr_scheduler": "",
        "hr_prompt": "", "hr_negative_prompt": "", "force_task_id": null, "script_name": null,
        "script_args": [], "send_images": true, "save_images": false, "alwayson_scripts": {},
        "infotext": null
    }"#,
    )
    .unwrap();
    assert_eq!(files(&generate(&server, &all)).len(), 1);
}

/// The body that the Stable Diffusion tool of Dify makes, and the one that
/// text-generation-webui's `sd_api_pictures` makes.
#[test]
fn bodies_of_other_programs_generate_an_image() {
    let server = start(Pace::Fast);
    let dify = json!({
        "prompt": "a cat", "negative_prompt": "", "seed": -1, "subseed": -1,
        "subseed_strength": 0, "seed_resize_from_h": -1, "seed_resize_from_w": -1,
        "sampler_index": "DPM++ SDE Karras", "batch_size": 1, "n_iter": 1, "steps": 10,
        "cfg_scale": 7, "width": 64, "height": 64, "tiling": false, "do_not_save_samples": false,
        "do_not_save_grid": false, "styles": [], "restore_faces": false, "eta": 0,
        "denoising_strength": 0, "s_min_uncond": 0, "s_noise": 1, "sampler_name": "Euler a",
        "override_settings": {"sd_model_checkpoint": "demo"}, "lora": "", "model": "demo",
        "image_id": "", "lora_1": null,
    });
    let pictures = json!({
        "prompt": "a cat", "seed": -1.0, "sampler_name": "DPM++ 2M", "enable_hr": false,
        "hr_scale": "1.0", "hr_upscaler": "ESRGAN_4x", "denoising_strength": 0.61, "steps": 32,
        "cfg_scale": 7, "width": 64, "height": 64, "restore_faces": false,
        "override_settings_restore_afterwards": true, "negative_prompt": "low quality",
    });
    for body in [dify, pictures] {
        assert_eq!(decode_png(&files(&generate(&server, &body))[0]).0, 64);
    }
}

/// Dify and other programs post a text without a content type, which the web UI takes as JSON.
#[test]
fn a_body_without_a_content_type_is_json() {
    let server = start(Pace::Fast);
    let post = |path: &str, headers: &str, body: &str| {
        let content = (headers, body.as_bytes());
        receive(send_raw(connect(server.address), "POST", path, content))
    };
    let (options, prompt) = (
        r#"{"sd_model_checkpoint": "demo"}"#,
        r#"{"prompt": "a cat"}"#,
    );
    for headers in ["", "Content-Type:\r\n"] {
        let reply = post("/sdapi/v1/options", headers, options);
        assert_eq!(reply.status, 200, "{}", reply.body);
        let reply = post(TXT2IMG, headers, prompt);
        assert_eq!(reply.status, 200, "{}", reply.body);
        assert_eq!(post("/v1/images/generations", headers, prompt).status, 400);
    }
    // A web page can send these without asking the server.
    for headers in [
        "Content-Type: text/plain\r\n",
        "Content-Type: application/x-www-form-urlencoded\r\n",
        "Content-Type: ;charset=utf-8\r\nContent-Encoding: gzip\r\n",
    ] {
        let reply = post(TXT2IMG, headers, prompt);
        assert!([400, 415].contains(&reply.status), "{headers}");
        assert_eq!(reply.body["detail"], reply.body["error"]["message"]);
    }
}

#[test]
fn what_kiln_does_not_have_is_an_empty_list() {
    let server = start(Pace::Fast);
    for (path, expected) in [
        ("loras", json!([])),
        ("hypernetworks", json!([])),
        ("face-restorers", json!([])),
        ("realesrgan-models", json!([])),
        ("prompt-styles", json!([])),
        ("script-info", json!([])),
        ("scripts", json!({"txt2img": [], "img2img": []})),
        ("embeddings", json!({"loaded": {}, "skipped": {}})),
        ("memory", json!({"ram": {}, "cuda": {}})),
        ("cmd-flags", json!({})),
    ] {
        let reply = get(server.address, &format!("/sdapi/v1/{path}"));
        assert_eq!((reply.status, reply.body), (200, expected), "{path}");
    }
}

/// text-generation-webui frees the memory of the GPU with these, and stops at an error.
#[test]
fn commands_that_have_nothing_to_do_succeed() {
    let server = start(Pace::Fast);
    for path in [
        "unload-checkpoint",
        "reload-checkpoint",
        "refresh-checkpoints",
        "refresh-vae",
        "refresh-loras",
        "refresh-embeddings",
    ] {
        let path = format!("/sdapi/v1/{path}");
        // With an empty JSON text as the body, and without a body.
        let reply = post_to(server.address, &path, &json!(""));
        assert_eq!(reply.status, 200, "{path}");
        assert_eq!(with_headers(server.address, "POST", &path, "").status, 200);
        assert_eq!(get(server.address, &path).status, 405);
    }
    assert_eq!(generate(&server, &json!({"prompt": "a cat"})).status, 200);
}

#[test]
fn unsupported_features_are_refused_by_name() {
    let server = start(Pace::Fast);
    for (key, value) in [
        ("steps", json!(0)),
        ("steps", json!("20")),
        ("width", json!(15)),
        ("height", json!(100_000)),
        ("cfg_scale", json!(-1)),
        ("seed", json!(-2)),
        ("batch_size", json!(0)),
        ("batch_size", json!(11)),
        ("n_iter", json!(11)),
        ("n_iter", json!(-1)),
        ("batch_size", json!(i64::MAX)),
        ("sampler_name", json!(7)),
        ("send_images", json!(false)),
        ("enable_hr", json!(true)),
        ("restore_faces", json!(true)),
        ("tiling", json!(true)),
        ("subseed_strength", json!(0.5)),
        ("styles", json!(["watercolour"])),
        ("script_name", json!("x/y/z plot")),
        ("alwayson_scripts", json!({"ADetailer": {"args": [true]}})),
        ("refiner_checkpoint", json!("other")),
        ("num_inference_steps", json!(4)),
        ("init_images", json!(["AA=="])),
        ("lora", json!("<lora:x:1>")),
        ("loras", json!([{"name": "x"}])),
        ("stepz", json!(4)),
        ("prompt", json!(null)),
        ("prompt", json!(["a"])),
    ] {
        let mut body = silly_tavern();
        body[key] = value.clone();
        let reply = generate(&server, &body);
        assert_eq!(reply.status, 400, "{key}: {value}");
        let error = &reply.body["error"];
        assert_eq!(error["param"], key, "{value}: {}", reply.body);
        // The web UI's place of the message, which Open WebUI reads.
        assert_eq!(reply.body["detail"], error["message"]);
        assert!(error["message"].as_str().unwrap().len() > 10);
    }
    let reply = generate(
        &server,
        &json!({"prompt": "a", "batch_size": -2, "n_iter": -2}),
    );
    assert_eq!(reply.status, 400);
    let reply = post_to(server.address, TXT2IMG, &json!([]));
    assert_eq!(
        (reply.status, reply.body["detail"].is_string()),
        (400, true)
    );
    assert_eq!(server.steps(), 0);
}

#[test]
fn failures_do_not_reveal_details() {
    let server = start(Pace::Fast);
    let reply = generate(&server, &json!({"prompt": "a cat", "seed": PANIC_IN_STEP}));
    assert_eq!(reply.status, 500);
    let detail = reply.body["detail"].as_str().unwrap();
    assert!(!detail.contains("secret"), "{detail}");
    assert_eq!(generate(&server, &json!({"prompt": "a cat"})).status, 200);
}

#[test]
fn a_full_queue_is_429() {
    let server = TestServer::with_settings(Pace::Slow, 0, settings());
    let body = json!({"prompt": "a cat", "steps": 1000});
    let first = send(connect(server.address), "POST", TXT2IMG, Some(&body));
    server.wait_for_steps(1);
    let reply = generate(&server, &body);
    assert_eq!(reply.status, 429);
    assert!(reply.header("retry-after").is_some());
    assert!(reply.body["detail"].is_string());
    drop(first);
}

#[test]
fn there_is_one_model_with_one_sampler() {
    let settings = Settings {
        served_model_names: vec!["Qwen/Qwen-Image".to_owned(), "gpt-image-1".to_owned()],
        ..settings()
    };
    let server = TestServer::with_settings(Pace::Fast, 4, settings);
    let body = |path: &str| {
        let reply = get(server.address, &format!("/sdapi/v1/{path}"));
        assert_eq!(reply.status, 200, "{path}");
        reply.body
    };
    assert_eq!(body("options")["sd_model_checkpoint"], "Qwen/Qwen-Image");
    let models = body("sd-models");
    for (index, name) in ["Qwen/Qwen-Image", "gpt-image-1"].iter().enumerate() {
        assert_eq!(models[index]["title"], *name);
        assert_eq!(models[index]["model_name"], *name);
    }
    for (path, name) in [
        ("samplers", "Euler"),
        ("schedulers", "automatic"),
        ("upscalers", "None"),
    ] {
        let names = body(path);
        assert_eq!(names.as_array().unwrap().len(), 1, "{path}");
        assert_eq!(names[0]["name"], name);
    }
    for path in ["latent-upscale-modes", "sd-vae"] {
        assert_eq!(body(path), json!([]), "{path}");
    }
}

#[test]
fn options_may_be_sent_back_with_any_model() {
    let server = start(Pace::Fast);
    let path = "/sdapi/v1/options";
    let mut options = get(server.address, path).body;
    options["sd_model_checkpoint"] = json!("dall-e-3");
    let reply = post_to(server.address, path, &options);
    assert_eq!((reply.status, reply.bytes.as_slice()), (200, &b"null"[..]));
    let nothing = json!({"sd_vae": null, "sd_lora": "", "sd_model_checkpoint": null});
    assert_eq!(post_to(server.address, path, &nothing).status, 200);
    assert_eq!(
        get(server.address, path).body["sd_model_checkpoint"],
        "test/model"
    );
    for (key, value) in [
        ("samples_format", json!("webp")),
        ("other", json!(1)),
        ("sd_model_checkpoint", json!(7)),
    ] {
        let reply = post_to(server.address, path, &json!({key: value}));
        assert_eq!(reply.status, 400, "{key}");
        assert_eq!(reply.body["error"]["param"], key);
    }
}

#[test]
fn progress_is_reported_while_an_image_is_generated() {
    let server = start(Pace::Slow);
    let idle = get(server.address, PROGRESS).body;
    assert_eq!(idle["progress"], 0.0);
    assert_eq!(idle["state"]["job_count"], 0);
    assert_eq!(idle["current_image"], Value::Null);

    let body = json!({"prompt": "a cat", "steps": 400, "seed": 9});
    let running = send(connect(server.address), "POST", TXT2IMG, Some(&body));
    let seen = wait_for_progress(&server, "", |body| !body["current_image"].is_null());
    let step = seen["state"]["sampling_step"].as_u64().unwrap();
    assert!((5..400).contains(&step), "{seen}");
    assert_eq!(seen["state"]["sampling_steps"], 400);
    assert_eq!(seen["state"]["job_count"], 1);
    assert!((seen["progress"].as_f64().unwrap() - step as f64 / 400.0).abs() < 1e-9);
    // A step takes 10 ms, and more on a busy machine.
    let eta = seen["eta_relative"].as_f64().unwrap();
    let least = 0.01 * (400 - step) as f64;
    assert!(eta > 0.9 * least && eta < 60.0 * least, "{eta} s, {step}");
    let image = from_base64(seen["current_image"].as_str().unwrap());
    assert_eq!(decode_png(&image), (16, 16, vec![9; 16 * 16 * 3]));

    let skipped = get(
        server.address,
        &format!("{PROGRESS}?skip_current_image=true"),
    );
    assert_eq!(skipped.body["state"]["job_count"], 1);
    assert_eq!(skipped.body["current_image"], Value::Null);
    let shown = get(
        server.address,
        &format!("{PROGRESS}?skip_current_image=false&other=1"),
    );
    assert!(shown.body["current_image"].is_string());
    for query in [
        "skip_current_image=",
        "skip_current_image=2",
        "skip_current_image=true&skip_current_image=false",
    ] {
        let reply = get(server.address, &format!("{PROGRESS}?{query}"));
        assert_eq!(reply.status, 400, "{query}");
        assert_eq!(reply.body["error"]["param"], "skip_current_image");
    }

    assert_eq!(post_to(server.address, INTERRUPT, &json!({})).status, 200);
    assert_eq!(receive(running).status, 409);
    assert_eq!(get(server.address, PROGRESS).body, idle);
}

#[test]
fn an_interrupt_frees_the_device() {
    let server = start(Pace::Slow);
    let nothing = with_headers(server.address, "POST", INTERRUPT, "");
    assert_eq!((nothing.status, nothing.body), (200, json!({})));

    let body = json!({"prompt": "a cat", "steps": 1000});
    let running = send(connect(server.address), "POST", TXT2IMG, Some(&body));
    wait_for_progress(&server, "", |body| body["state"]["sampling_step"] != 0);
    let waiting = send(connect(server.address), "POST", TXT2IMG, Some(&body));
    wait_for_progress(&server, "", |body| body["state"]["job_count"] == 2);

    // Clients send no body and no content type.
    let reply = with_headers(server.address, "POST", INTERRUPT, "");
    assert_eq!((reply.status, reply.body), (200, json!({})));
    let reply = receive(running);
    assert_eq!(reply.status, 409);
    assert_eq!(reply.body["detail"], "the request was interrupted");
    // The other request starts, and can be interrupted as well.
    wait_for_progress(&server, "", |body| {
        body["state"]["job_count"] == 1 && body["state"]["sampling_step"] != 0
    });
    with_headers(server.address, "POST", INTERRUPT, "");
    assert_eq!(receive(waiting).status, 409);

    assert_eq!(
        generate(&server, &json!({"prompt": "a", "steps": 1})).status,
        200
    );
    assert_eq!(server.discards(), 2);
    assert!(server.steps() < 500, "{} steps were made", server.steps());
}

#[test]
fn the_request_of_a_client_that_disconnects_has_no_progress() {
    let server = start(Pace::Slow);
    let body = json!({"prompt": "a cat", "steps": 1000});
    let running = send(connect(server.address), "POST", TXT2IMG, Some(&body));
    wait_for_progress(&server, "", |body| body["state"]["job_count"] == 1);
    drop(running);
    wait_for_progress(&server, "", |body| body["state"]["job_count"] == 0);
    assert_eq!(
        generate(&server, &json!({"prompt": "a", "steps": 1})).status,
        200
    );
    assert!(server.steps() < 500, "{} steps were made", server.steps());
}

#[test]
fn requests_to_other_routes_have_no_progress() {
    let server = start(Pace::Slow);
    let body = json!({"prompt": "a cat", "num_inference_steps": 30});
    let path = "/v1/images/generations";
    let running = send(connect(server.address), "POST", path, Some(&body));
    server.wait_for_steps(1);
    assert_eq!(get(server.address, PROGRESS).body["state"]["job_count"], 0);
    with_headers(server.address, "POST", INTERRUPT, "");
    assert_eq!(receive(running).status, 200);
}

#[test]
fn with_keys_one_of_them_is_the_password() {
    let server = with_keys(Pace::Fast);
    let body = json!({"prompt": "a cat", "steps": 1});
    let status = |headers: &str| json_with_headers(server.address, TXT2IMG, headers, &body).status;
    for typed in ["second-key", "me:first-key", ":first-key"] {
        assert_eq!(status(&basic(typed)), 200, "{typed}");
    }
    assert_eq!(status("Authorization: Bearer first-key\r\n"), 200);
    for headers in [
        String::new(),
        basic(""),
        basic("first-key:"),
        basic("me:third-key"),
        "Authorization: Basic first-key\r\n".to_owned(),
        "Authorization: Basic \r\n".to_owned(),
        "Authorization: first-key\r\n".to_owned(),
    ] {
        assert_eq!(status(&headers), 401, "{headers:?}");
        for path in ["options", "sd-models", "progress", "unknown"] {
            let path = format!("/sdapi/v1/{path}");
            let reply = with_headers(server.address, "GET", &path, &headers);
            assert_eq!(reply.status, 401, "{path} {headers:?}");
            assert_eq!(reply.body["error"]["type"], "authentication_error");
            assert_eq!(reply.body["detail"], reply.body["error"]["message"]);
            let challenge = reply.header("www-authenticate").unwrap();
            assert!(challenge.starts_with("Basic "), "{challenge}");
        }
    }
    // The rest of the API accepts bearer tokens only.
    let reply = with_headers(server.address, "GET", "/v1/models", &basic("first-key"));
    assert_eq!(reply.status, 401);
    assert_eq!(reply.header("www-authenticate"), Some("Bearer"));
}

#[test]
fn a_caller_cannot_see_or_interrupt_requests_of_another_key() {
    let server = with_keys(Pace::Slow);
    let (first, second) = (basic("me:first-key"), basic("second-key"));
    let body = json!({"prompt": "a cat", "steps": 1000}).to_string();
    let headers = format!("Content-Type: application/json\r\n{first}");
    let content = (headers.as_str(), body.as_bytes());
    let running = send_raw(connect(server.address), "POST", TXT2IMG, content);
    // The same key as a bearer token belongs to the same caller.
    let bearer = "Authorization: Bearer first-key\r\n";
    wait_for_progress(&server, bearer, |body| body["state"]["sampling_step"] != 0);

    let other = with_headers(server.address, "GET", PROGRESS, &second).body;
    assert_eq!(other["state"]["job_count"], 0);
    assert_eq!(
        with_headers(server.address, "POST", INTERRUPT, &second).status,
        200
    );
    std::thread::sleep(Duration::from_millis(50));
    let own = with_headers(server.address, "GET", PROGRESS, &first).body;
    assert_eq!(own["state"]["job_count"], 1);
    with_headers(server.address, "POST", INTERRUPT, &first);
    assert_eq!(receive(running).status, 409);
}

#[test]
fn without_the_flag_the_error_names_it() {
    let server = TestServer::start(Pace::Fast, 4);
    for (method, path) in [
        ("GET", "/sdapi/v1/options"),
        ("POST", TXT2IMG),
        ("GET", "/sdapi/x"),
    ] {
        let reply = with_headers(server.address, method, path, "");
        assert_eq!(reply.status, 404, "{path}");
        let message = reply.body["error"]["message"].as_str().unwrap();
        assert!(message.contains("--enable-sdapi"), "{message}");
    }
    let document = get(server.address, "/openapi.json").body;
    assert!(document["paths"][TXT2IMG].is_null());
}

#[test]
fn unknown_routes_and_methods_are_errors_as_elsewhere() {
    let server = start(Pace::Fast);
    let reply = get(server.address, "/sdapi/v1/img2img");
    assert_eq!(reply.status, 404);
    let message = reply.body["error"]["message"].as_str().unwrap();
    assert!(!message.contains("--enable-sdapi"), "{message}");
    assert_eq!(get(server.address, TXT2IMG).status, 405);
}

#[test]
fn the_document_has_the_routes_and_every_key() {
    let server = start(Pace::Fast);
    let document = get(server.address, "/openapi.json").body;
    for path in [
        TXT2IMG,
        PROGRESS,
        INTERRUPT,
        "/sdapi/v1/options",
        "/sdapi/v1/sd-models",
        "/sdapi/v1/loras",
        "/sdapi/v1/unload-checkpoint",
    ] {
        assert!(document["paths"][path].is_object(), "{path}");
    }
    let request = &document["components"]["schemas"]["Txt2ImgRequest"];
    let others = json!([null, false, 0, "", [], {}]);
    assert_eq!(request["additionalProperties"]["enum"], others);
    assert_eq!(request["properties"]["lora"]["enum"], others);
    assert_eq!(request["required"], json!(["prompt"]));
    assert_eq!(request["properties"]["width"]["maximum"], 4096);
    assert_eq!(request["properties"]["steps"]["maximum"], 1000);
    let sent = silly_tavern();
    for key in sent.as_object().unwrap().keys() {
        assert!(request["properties"][key].is_object(), "{key}");
    }
    assert_eq!(
        document["components"]["securitySchemes"]["basic"]["scheme"],
        "basic"
    );
}
