//! The binary with less memory than a request needs.

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::json;

use super::client::{Reply, connect, get, receive, send, wait_until_ready};
use crate::served;

/// A `kiln serve` process of the demo model, killed when dropped.
struct Server {
    process: Child,
    address: SocketAddr,
}

impl Server {
    /// `limit` comes before the command in the shell.
    fn start(limit: &str, arguments: &str) -> Self {
        let kiln = env!("CARGO_BIN_EXE_kiln");
        let script = format!("{limit} exec {kiln} serve --no-warm-up --port 0 {arguments}");
        let mut process = Command::new("sh")
            .args(["-c", &script])
            // Each thread's stack takes address space, whatever the number of cores.
            .env("RAYON_NUM_THREADS", "2")
            .env("TOKIO_WORKER_THREADS", "2")
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut log = BufReader::new(process.stderr.take().unwrap());
        let address = served::address(&mut log);
        std::thread::spawn(move || log.lines().for_each(drop));
        let server = Self { process, address };
        wait_until_ready(address);
        server
    }

    fn generate(&self, size: &str) -> Reply {
        let body = json!({"prompt": "a", "num_inference_steps": 1, "size": size});
        let stream = connect(self.address);
        // Debug builds take long for large images.
        let patience = Some(Duration::from_mins(5));
        stream.set_read_timeout(patience).unwrap();
        let path = "/v1/images/generations";
        receive(send(stream, "POST", path, Some(&body)))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.process.kill().ok();
        self.process.wait().ok();
    }
}

fn assert_too_large(reply: &Reply) -> String {
    assert_eq!(reply.status, 400, "{}", reply.body);
    let error = &reply.body["error"];
    assert_eq!(error["param"], "size");
    assert_eq!(error["type"], "invalid_request_error");
    let message = error["message"].as_str().unwrap();
    let largest = message.split_once("the largest size of this shape that fits is ");
    largest.unwrap_or_else(|| panic!("{message}")).1.to_owned()
}

#[test]
fn the_heaps_of_threads_do_not_fill_a_limited_address_space() {
    let server = Server::start("ulimit -v 600000;", "");
    let reply = server.generate("1024x1024");
    assert_eq!(reply.status, 200, "{}", reply.body);
    assert_eq!(reply.body["vae_use_tiling"], json!(null));
}

#[test]
fn a_server_with_little_address_space_decodes_in_tiles_and_lives() {
    let server = Server::start("ulimit -v 350000;", "");
    let reply = server.generate("1024x1024");
    assert_eq!(reply.status, 200, "{}", reply.body);
    assert_eq!(reply.body["vae_use_tiling"], true);
    assert_too_large(&server.generate("5120x5120"));
    assert_eq!(get(server.address, "/health/ready").status, 200);
    let small = server.generate("128x128");
    assert_eq!(small.status, 200, "{}", small.body);
    assert_eq!(small.body.get("vae_use_tiling"), None);
}

#[test]
fn the_largest_size_that_an_error_names_fits() {
    let server = Server::start("", "--max-memory 40000000");
    let largest = assert_too_large(&server.generate("2048x1024"));
    let (width, height) = largest.split_once('x').unwrap();
    let [width, height] = [width, height].map(|side| side.parse::<usize>().unwrap());
    // Both sides are rounded down to a multiple of 16.
    assert_eq!(width / 16 / 2, height / 16, "{largest}");
    let reply = server.generate(&largest);
    assert_eq!(reply.status, 200, "{}", reply.body);
    assert_eq!(reply.body["vae_use_tiling"], true);
    // The next size of the same shape.
    let width = (width / 32 + 1) * 32;
    let larger = format!("{width}x{}", width / 2);
    assert_eq!(assert_too_large(&server.generate(&larger)), largest);
    let metrics = String::from_utf8(get(server.address, "/metrics").bytes).unwrap();
    assert!(metrics.contains("kiln_memory_free_bytes "), "{metrics}");
    assert!(metrics.contains("kiln_memory_planned_bytes 0"), "{metrics}");
}
