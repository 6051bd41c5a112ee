//! The binary with real weights.

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use base64::Engine as _;
use serde_json::{Value, json};

use super::client::{connect, get, post, post_to, send, wait_until_ready};
use super::{decode, parts};
use crate::served;

pub(super) fn model() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/checkpoints/base")
}

/// A `kiln serve` process, killed when dropped.
pub(super) struct Server {
    pub(super) process: Child,
    pub(super) address: SocketAddr,
}

impl Server {
    /// Serves `model`, or the default model, from an empty folder and without network access.
    fn start(model: Option<&Path>) -> Self {
        Self::start_with(model, &[])
    }

    /// As [`Server::start`], with more arguments.
    pub(super) fn start_with(model: Option<&Path>, args: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut process = Command::new(env!("CARGO_BIN_EXE_kiln"))
            .arg("serve")
            .args(model)
            .args(["--port", "0", "--backend", "flex"])
            .args(args)
            .current_dir(folder.path())
            .env("HF_HUB_OFFLINE", "1")
            .env("HF_HOME", folder.path())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut log = BufReader::new(process.stderr.take().unwrap());
        let address = served::address(&mut log);
        // Reads the rest of the log, so that the process never blocks on a full pipe.
        std::thread::spawn(move || log.lines().for_each(drop));
        let server = Self { process, address };
        wait_until_ready(address);
        server
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.process.kill().ok();
        self.process.wait().ok();
    }
}

#[test]
fn the_server_and_the_command_line_generate_the_same_images() {
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

    let server = Server::start(Some(&model()));
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
        let written = std::fs::read(folder.path().join(format!("out-{index}.png"))).unwrap();
        assert!(served == written, "image {index} differs");
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

#[test]
fn answers_and_images_do_not_say_where_the_model_is() {
    let server = Server::start(Some(&model()));
    let models = get(server.address, "/v1/models").body;
    assert_eq!(models["data"][0]["id"], "base");
    assert_eq!(get(server.address, "/v1/status").body["model"], "base");
    let body = json!({
        "messages": [{"role": "user", "content": "a\u{0}b"}], "num_inference_steps": 1, "size": "32x32",
    });
    let reply = post(server.address, &body);
    assert_eq!(reply.body["model"], "base");
    let url = parts(&reply)[0]["image_url"]["url"]
        .as_str()
        .unwrap()
        .to_owned();
    let data = url.strip_prefix("data:image/png;base64,").unwrap();
    let file = base64::engine::general_purpose::STANDARD
        .decode(data)
        .unwrap();
    let holds = |text: &[u8]| file.windows(text.len()).any(|part| part == text);
    assert!(holds(b"parameters\0ab\nSteps: 1, ") && holds(b", Model: base, "));
}

#[test]
fn an_image_that_its_file_cannot_hold_is_refused() {
    let server = Server::start(None);
    for (format, name, longest, size, param) in [
        ("jpeg", "JPEG", 65_500, json!({"size": "65536x16"}), "size"),
        (
            "jpg",
            "JPEG",
            65_500,
            json!({"width": 16, "height": 65_519}),
            "height",
        ),
        (
            "webp",
            "WebP",
            16_383,
            json!({"width": 16_384, "height": 16}),
            "width",
        ),
    ] {
        let mut body = json!({"prompt": "a", "num_inference_steps": 1, "output_format": format});
        body.as_object_mut()
            .unwrap()
            .extend(size.as_object().unwrap().clone());
        let reply = post_to(server.address, "/v1/images/generations", &body);
        let error = &reply.body["error"];
        assert_eq!(
            (reply.status, &error["param"]),
            (400, &json!(param)),
            "{error}"
        );
        let message = error["message"].as_str().unwrap();
        let expected = format!("{param}: a {name} file has {longest} pixels a side at most, got ");
        assert!(message.starts_with(&expected), "{message}");
        assert!(message.ends_with("or another output_format"), "{message}");
    }
    // The longest that fits.
    let body = json!({
        "prompt": "a", "num_inference_steps": 1, "size": "65503x16", "output_format": "jpeg",
    });
    let reply = post_to(server.address, "/v1/images/estimate", &body);
    assert_eq!(reply.status, 200, "{}", reply.body);
}

#[cfg(unix)]
#[test]
fn a_signal_lets_requests_finish_and_the_exit_code_is_0() {
    let mut server = Server::start(None);
    let body = json!({
        "messages": [{"role": "user", "content": "a red circle"}], "num_inference_steps": 60,
        "stream": true,
    });
    let path = "/v1/chat/completions";
    let stream = send(connect(server.address), "POST", path, Some(&body));
    let mut lines = BufReader::new(stream).lines().map(Result::unwrap);
    let begun = lines.find(|line| line.contains("\"stage\":\"step\""));
    assert!(begun.is_some());

    let process = server.process.id().to_string();
    let signal = Command::new("kill").args(["-TERM", &process]).status();
    assert!(signal.unwrap().success());
    assert!(lines.any(|line| line.contains("data:image/png;base64,")));
    assert!(lines.any(|line| line == "data: [DONE]"));
    drop(lines);
    assert_eq!(server.process.wait().unwrap().code(), Some(0));
}

/// A demo prompt and its content: a shape of one colour on a background.
struct Scene {
    prompt: &'static str,
    background: [u8; 3],
    colour: [u8; 3],
    /// Middle of the shape, as fractions of width and height.
    place: [f32; 2],
}

// The colours in models/demo/scenes.py.
const RED: [u8; 3] = [214, 40, 44];
const ORANGE: [u8; 3] = [246, 128, 18];
const YELLOW: [u8; 3] = [252, 222, 64];
const GREEN: [u8; 3] = [42, 158, 72];
const BLUE: [u8; 3] = [38, 84, 204];
const PURPLE: [u8; 3] = [136, 52, 164];
const WHITE: [u8; 3] = [244, 244, 244];
const BLACK: [u8; 3] = [18, 18, 20];

const SCENES: [Scene; 6] = [
    Scene {
        prompt: "a large red circle on a blue background",
        background: BLUE,
        colour: RED,
        place: [0.5, 0.5],
    },
    Scene {
        prompt: "a small yellow square in the top left corner on a purple background",
        background: PURPLE,
        colour: YELLOW,
        place: [0.27, 0.27],
    },
    Scene {
        prompt: "A big white triangle at the bottom on a green background.",
        background: GREEN,
        colour: WHITE,
        place: [0.5, 0.73],
    },
    Scene {
        prompt: "black background with a tiny orange circle on the right",
        background: BLACK,
        colour: ORANGE,
        place: [0.73, 0.5],
    },
    Scene {
        prompt: "a picture of a small blue square at the bottom right, white background",
        background: WHITE,
        colour: BLUE,
        place: [0.73, 0.73],
    },
    Scene {
        prompt: "large purple square on the left, yellow background",
        background: YELLOW,
        colour: PURPLE,
        place: [0.27, 0.5],
    },
];

fn distance(a: [u8; 3], b: [u8; 3]) -> f32 {
    let squares = a
        .iter()
        .zip(b)
        .map(|(a, b)| f32::from(a.abs_diff(b)).powi(2));
    squares.sum::<f32>().sqrt()
}

/// The median of each channel.
fn median(pixels: &[[u8; 3]]) -> [u8; 3] {
    std::array::from_fn(|channel| {
        let mut values: Vec<u8> = pixels.iter().map(|pixel| pixel[channel]).collect();
        values.sort_unstable();
        values[values.len() / 2]
    })
}

/// Checks the colours of an image and the position of its shape.
fn check(scene: &Scene, (width, height, bytes): &(u32, u32, Vec<u8>)) {
    let prompt = scene.prompt;
    let (mut border, mut shape) = (Vec::new(), Vec::new());
    let (mut x_sum, mut y_sum) = (0.0, 0.0);
    for (pixel, i) in bytes.chunks_exact(3).zip(0..) {
        let (x, y) = (i % width, i / width);
        let pixel: [u8; 3] = pixel.try_into().unwrap();
        if x == 0 || y == 0 || x == width - 1 || y == height - 1 {
            border.push(pixel);
        }
        if distance(pixel, scene.colour) < distance(pixel, scene.background) {
            shape.push(pixel);
            x_sum += (x as f32 + 0.5) / *width as f32;
            y_sum += (y as f32 + 0.5) / *height as f32;
        }
    }
    let share = shape.len() as f32 / (width * height) as f32;
    assert!(
        (0.01..0.3).contains(&share),
        "{prompt}: the shape covers {share}"
    );
    for (of, asked, pixels) in [
        ("background", scene.background, &border),
        ("shape", scene.colour, &shape),
    ] {
        let found = median(pixels);
        assert!(
            distance(found, asked) < 40.0,
            "{prompt}: the {of} is {found:?}"
        );
    }
    let place = [x_sum, y_sum].map(|sum| sum / shape.len() as f32);
    for (found, asked) in place.iter().zip(scene.place) {
        assert!(
            (found - asked).abs() < 0.11,
            "{prompt}: the shape is at {place:?}"
        );
    }
}

#[test]
fn the_default_model_generates_the_scene_of_the_prompt() {
    let server = Server::start(None);
    let generate = |scene: &Scene, mut settings: Value| {
        settings["num_inference_steps"] = json!(20);
        settings["negative_prompt"] = json!(" ");
        let message = json!({"role": "user", "content": scene.prompt});
        let reply = post(
            server.address,
            &json!({"messages": [message], "extra_body": settings}),
        );
        let image = decode(&parts(&reply)[0]);
        check(scene, &image);
        assert_eq!(reply.body["size"], format!("{}x{}", image.0, image.1));
        reply.body
    };
    for (seed, scene) in SCENES.iter().enumerate() {
        let body = generate(scene, json!({"seed": seed}));
        assert_eq!(body["size"], "128x128", "the model's own size");
        assert_eq!(body["model"], "demo");
    }
    for (size, scene) in ["160x96", "128x192"].iter().zip(&SCENES) {
        let body = generate(scene, json!({"seed": 1, "size": size}));
        assert_eq!(body["size"], *size);
    }
}
