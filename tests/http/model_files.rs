//! Model files that change, or hold damaged weights, while the server runs: the request fails with
//! the file's name or the stage, and the process lives.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::client::{Reply, connect, get, post, send};
use super::real_model::{Server, model};
use crate::broken_models::{copy, set_first_value};

const FILES: [&str; 3] = [
    "transformer/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
];

/// A server of a copy of the smallest checkpoint, when it is ready.
fn serve_copy(change: impl Fn(&Path)) -> (tempfile::TempDir, Server) {
    serve_copy_with(change, &["--no-warm-up"])
}

fn serve_copy_with(change: impl Fn(&Path), args: &[&str]) -> (tempfile::TempDir, Server) {
    let folder = tempfile::tempdir().unwrap();
    copy(&model(), folder.path());
    change(folder.path());
    let server = Server::start_with(Some(folder.path()), args);
    let started = Instant::now();
    while get(server.address, "/health/ready").status != 200 {
        assert!(started.elapsed() < Duration::from_mins(1), "not ready");
        std::thread::sleep(Duration::from_millis(20));
    }
    (folder, server)
}

fn body(size: usize, steps: usize) -> Value {
    json!({
        "messages": [{"role": "user", "content": "a cat"}], "num_inference_steps": steps,
        "size": format!("{size}x{size}"),
    })
}

fn message(reply: &Reply) -> &str {
    reply.body["error"]["message"].as_str().unwrap()
}

#[test]
fn a_file_that_is_cut_short_fails_requests_with_its_name_and_the_process_lives() {
    for file in FILES {
        let (folder, mut server) = serve_copy(|_| ());
        assert_eq!(post(server.address, &body(32, 1)).status, 200);

        // What `cp new old` begins with.
        File::create(folder.path().join(file)).unwrap();
        let reply = post(server.address, &body(32, 2));
        assert_eq!(reply.status, 500, "{file}: {}", reply.body);
        let changed = format!("{file} changed while it was in use");
        assert!(message(&reply).starts_with(&changed), "{}", reply.body);

        // The server says that it must be restarted.
        let ready = get(server.address, "/health/ready");
        assert_eq!(ready.status, 503);
        let reason = ready.body["reason"].as_str().unwrap();
        assert!(reason.starts_with(&changed), "{reason}");
        let reply = post(server.address, &body(32, 1));
        assert_eq!(reply.status, 503);
        assert!(message(&reply).contains(&changed), "{}", reply.body);
        assert_eq!(server.process.try_wait().unwrap(), None);
    }
}

#[test]
fn a_file_that_is_cut_short_during_a_request_fails_it_with_its_name() {
    for file in FILES {
        let (folder, mut server) = serve_copy(|_| ());
        let mut body = body(128, 200);
        body["stream"] = json!(true);
        let path = "/v1/chat/completions";
        let stream = send(connect(server.address), "POST", path, Some(&body));
        let mut lines = BufReader::new(stream).lines().map(Result::unwrap);
        let begun = lines.find(|line| line.contains("\"stage\":\"step\""));
        assert!(begun.is_some());
        File::create(folder.path().join(file)).unwrap();
        let changed = format!("{file} changed while it was in use");
        let rest: Vec<String> = lines.collect();
        assert!(rest.iter().any(|line| line.contains(&changed)), "{rest:?}");
        assert!(!rest.iter().any(|line| line.contains("data:image")));
        assert_eq!(server.process.try_wait().unwrap(), None);
    }
}

#[test]
fn files_that_are_replaced_by_renaming_leave_the_server_as_it_was() {
    let (folder, server) = serve_copy(|_| ());
    let mut seeded = body(32, 2);
    seeded["seed"] = json!(3);
    let before = post(server.address, &seeded);
    for file in FILES {
        let new = folder.path().join("new");
        fs::write(&new, "not weights").unwrap();
        fs::rename(&new, folder.path().join(file)).unwrap();
    }
    let after = post(server.address, &seeded);
    assert_eq!(after.status, 200, "{}", after.body);
    let images = |reply: &Value| reply["choices"][0]["message"]["images"].clone();
    assert!(images(&after.body).is_array());
    assert_eq!(images(&after.body), images(&before.body));
    // A new schedule reads the modulation layers again.
    assert_eq!(post(server.address, &body(32, 3)).status, 200);
}

#[test]
fn weights_in_memory_let_files_change() {
    let (folder, server) = serve_copy_with(|_| (), &["--no-warm-up", "--no-mmap"]);
    assert_eq!(post(server.address, &body(32, 1)).status, 200);
    for file in FILES {
        File::create(folder.path().join(file)).unwrap();
    }
    assert_eq!(post(server.address, &body(32, 2)).status, 200);
}

#[test]
fn values_that_are_not_numbers_fail_the_request_with_the_stage_and_the_server_goes_on() {
    let (_folder, server) = serve_copy(|folder| {
        set_first_value(&folder.join(FILES[0]), "proj_out.weight", f32::NAN);
    });
    for _ in 0..2 {
        let reply = post(server.address, &body(32, 2));
        assert_eq!(reply.status, 500, "{}", reply.body);
        assert_eq!(
            message(&reply),
            "the model produced values that are not numbers (NaN or infinity) in denoising step 1 \
             of 2: its weights may be damaged: download them again"
        );
    }
    assert_eq!(get(server.address, "/health/ready").status, 200);
}
