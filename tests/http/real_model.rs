//! The real binary with real weights: what the server draws is what the command line draws.

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use base64::Engine as _;
use serde_json::json;

use super::client::{get, post};

fn model() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/checkpoints/base")
}

/// A `kiln serve` that is ended when the test is.
struct Server {
    process: Child,
    address: SocketAddr,
}

impl Server {
    fn start() -> Self {
        let mut process = Command::new(env!("CARGO_BIN_EXE_kiln"))
            .arg("serve")
            .arg(model())
            .args(["--port", "0", "--backend", "flex"])
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(process.stderr.take().unwrap()).lines();
        let address = lines.find_map(|line| {
            let line = line.unwrap();
            line.split_once("listening on http://")
                .map(|(_, address)| address.parse().unwrap())
        });
        // What else it says is read, or it would wait for a reader.
        std::thread::spawn(move || lines.for_each(drop));
        Self {
            process,
            address: address.expect("the server says where it listens"),
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.process.kill().ok();
        self.process.wait().ok();
    }
}

#[test]
fn the_server_draws_what_the_command_line_draws() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("out.png");
    let generated = Command::new(env!("CARGO_BIN_EXE_kiln"))
        .args([
            "generate",
            "a red fox, 雪",
            "--negative-prompt",
            " ",
            "--height",
            "48",
        ])
        .args(["--width", "70", "--num-inference-steps", "2", "--seed", "7"])
        .args(["--num-images", "2", "--backend", "flex", "--model"])
        .arg(model())
        .arg("--output")
        .arg(&output)
        .output()
        .unwrap();
    assert!(
        generated.status.success(),
        "{}",
        String::from_utf8_lossy(&generated.stderr)
    );

    let server = Server::start();
    assert_eq!(
        get(server.address, "/health").body,
        json!({"status": "healthy"})
    );
    let reply = post(
        server.address,
        &json!({
            "messages": [{"role": "user", "content": [{"type": "text", "text": "a red fox, 雪"}]}],
            "extra_body": {"height": 48, "width": 70, "num_inference_steps": 2, "seed": 7,
                           "negative_prompt": " ", "num_outputs_per_prompt": 2},
        }),
    );
    assert_eq!(reply.status, 200, "{}", reply.body);
    assert_eq!(reply.body["size"], "64x48");
    let parts = reply.body["choices"][0]["message"]["content"]
        .as_array()
        .unwrap();
    assert_eq!(parts.len(), 2);
    for (index, part) in parts.iter().enumerate() {
        let url = part["image_url"]["url"].as_str().unwrap();
        let data = url.strip_prefix("data:image/png;base64,").unwrap();
        let served = base64::engine::general_purpose::STANDARD
            .decode(data)
            .unwrap();
        let drawn = std::fs::read(folder.path().join(format!("out-{index}.png"))).unwrap();
        assert!(served == drawn, "picture {index} differs");
    }
    let refused = post(
        server.address,
        &json!({"messages": [{"role": "user", "content": "x"}], "extra_body": {"height": 8}}),
    );
    assert_eq!(
        (refused.status, &refused.body["error"]["param"]),
        (400, &json!("height"))
    );
}
