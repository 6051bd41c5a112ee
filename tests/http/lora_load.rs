//! Adapters under load: the binary with the demo model, and caches that are smaller than the adapters.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use kiln::runtime::{Model, ModelSettings};
use serde_json::{Map, Value, json};
use tempfile::TempDir;

use super::client::{Reply, connect, get, post_to, receive, send};
use super::real_model::Server;
use super::{decode_png, from_base64};

const IMAGES: &str = "/v1/images/generations";
const ADAPTERS: usize = 8;
const RANK: usize = 8;

/// Numbers from -1 to 1, always the same ones for a seed.
fn numbers(seed: u64) -> impl Iterator<Item = f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    std::iter::repeat_with(move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    })
}

/// An adapter file that changes every layer of the demo model's blocks, and the number of its values.
fn lora(seed: u64) -> (Vec<u8>, usize) {
    let model = Model::find(&ModelSettings::new("demo")).unwrap();
    let (mut header, mut data) = (Map::new(), Vec::new());
    let mut values = numbers(seed);
    let targets = model.adapter_targets().unwrap();
    let in_blocks = targets
        .iter()
        .filter(|it| it.path.starts_with("transformer_blocks."));
    for target in in_blocks {
        for (part, shape) in [("A", [RANK, target.d_in]), ("B", [target.d_out, RANK])] {
            let start = data.len();
            let scale = if part == "A" { 0.2 } else { 0.05 };
            for value in values.by_ref().take(shape[0] * shape[1]) {
                data.extend((value * scale).to_le_bytes());
            }
            let tensor =
                json!({"dtype": "F32", "shape": shape, "data_offsets": [start, data.len()]});
            header.insert(
                format!("transformer.{}.lora_{part}.weight", target.path),
                tensor,
            );
        }
    }
    let count = data.len() / 4;
    let mut header = Value::Object(header).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header);
    file.extend(data);
    (file, count)
}

/// A folder with the adapters `a0` to `a7`, and the bytes of each in f32.
fn folder() -> (TempDir, usize) {
    let folder = tempfile::tempdir().unwrap();
    let mut bytes = 0;
    for number in 0..ADAPTERS {
        let (file, values) = lora(number as u64 + 1);
        fs::write(folder.path().join(format!("a{number}.safetensors")), file).unwrap();
        bytes = 4 * values;
    }
    (folder, bytes)
}

fn serve(folder: &Path, args: &[&str]) -> Server {
    let mut all = vec!["--lora-dir", folder.to_str().unwrap(), "--dtype", "f32"];
    all.extend(args);
    Server::start_with(None, &all)
}

/// The body of a small request with the adapter of this number.
fn body(adapter: Option<usize>, steps: usize) -> Value {
    let mut body = json!({
        "prompt": "a large red circle on a blue background", "size": "64x64", "seed": 7,
        "num_inference_steps": steps, "true_cfg_scale": 1,
    });
    if let Some(adapter) = adapter {
        body["lora"] = json!(format!("a{adapter}"));
    }
    body
}

fn pixels(reply: &Reply) -> Vec<u8> {
    assert_eq!(reply.status, 200, "{}", reply.body);
    let image = reply.body["data"][0]["b64_json"].as_str().unwrap();
    decode_png(&from_base64(image)).2
}

/// Every sample of `/metrics` by its name and labels.
fn metrics(server: &Server) -> BTreeMap<String, f64> {
    let text = String::from_utf8(get(server.address, "/metrics").bytes).unwrap();
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    lines
        .map(|line| {
            let (name, value) = line.rsplit_once(' ').unwrap();
            (name.to_owned(), value.parse().unwrap())
        })
        .collect()
}

/// Names of the adapters in use.
fn running(metrics: &BTreeMap<String, f64>) -> Vec<String> {
    let mut names = metrics.keys();
    let info = names.find(|name| name.starts_with("vllm:lora_requests_info{"));
    let (_, rest) = info
        .unwrap()
        .split_once("running_lora_adapters=\"")
        .unwrap();
    let (running, _) = rest.split_once('"').unwrap();
    let running = running.split(',').filter(|name| !name.is_empty());
    running.map(str::to_owned).collect()
}

/// Memory of a process in MiB.
fn resident(server: &Server) -> f64 {
    let status = fs::read_to_string(format!("/proc/{}/status", server.process.id())).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:"));
    let kib = line.unwrap().split_whitespace().nth(1).unwrap();
    kib.parse::<f64>().unwrap() / 1024.0
}

/// What was seen in the metrics while clients worked.
#[derive(Debug, Default)]
struct Seen {
    device_bytes: f64,
    host_bytes: f64,
    /// The most adapters in use at a time.
    running: usize,
}

/// Eight clients, each with an adapter of its own. Every third request has none.
fn load(server: &Server, alone: &[Vec<u8>], rounds: usize) -> Seen {
    let is_over = AtomicBool::new(false);
    thread::scope(|scope| {
        let polled = scope.spawn(|| {
            let mut seen = Seen::default();
            while !is_over.load(Ordering::Relaxed) {
                let metrics = metrics(server);
                let of = |name: &str| metrics[name];
                seen.device_bytes = seen.device_bytes.max(of("kiln_lora_device_cache_bytes"));
                seen.host_bytes = seen.host_bytes.max(of("kiln_lora_host_cache_bytes"));
                seen.running = seen.running.max(running(&metrics).len());
                thread::sleep(Duration::from_millis(3));
            }
            seen
        });
        let clients: Vec<_> = (0..ADAPTERS)
            .map(|client| {
                scope.spawn(move || {
                    for round in 0..rounds {
                        let (adapter, expected) = if round % 3 == 2 {
                            (None, &alone[ADAPTERS])
                        } else {
                            (Some(client), &alone[client])
                        };
                        let reply = post_to(server.address, IMAGES, &body(adapter, 4));
                        let same = pixels(&reply) == *expected;
                        assert!(
                            same,
                            "client {client}, round {round}: another image than alone"
                        );
                    }
                })
            })
            .collect();
        for client in clients {
            client.join().unwrap();
        }
        is_over.store(true, Ordering::Relaxed);
        polled.join().unwrap()
    })
}

#[test]
fn eight_clients_with_eight_adapters_share_caches_of_fewer() {
    let (folder, bytes) = folder();
    let (device, host) = (3 * bytes + bytes / 2, 5 * bytes);
    let (device_text, host_text) = (device.to_string(), host.to_string());
    let server = serve(
        folder.path(),
        &[
            "--lora-cache",
            &device_text,
            "--lora-host-cache",
            &host_text,
        ],
    );
    let adapters = (0..ADAPTERS).map(Some).chain([None]);
    let alone: Vec<Vec<u8>> = adapters
        .map(|adapter| pixels(&post_to(server.address, IMAGES, &body(adapter, 4))))
        .collect();
    for (index, image) in alone.iter().enumerate() {
        assert!(
            !alone[index + 1..].contains(image),
            "adapter {index} has no effect"
        );
    }
    load(&server, &alone, 6);
    let before = (metrics(&server), resident(&server));
    let seen = load(&server, &alone, 15);
    let after = (metrics(&server), resident(&server));

    assert!(seen.device_bytes <= device as f64, "{seen:?} of {device}");
    assert!(seen.host_bytes <= host as f64, "{seen:?} of {host}");
    assert!((2..=3).contains(&seen.running), "{seen:?}");
    let grown = |name: &str| after.0[name] - before.0[name];
    assert!(grown("kiln_lora_evictions_total{cache=\"device\"}") > 0.0);
    assert!(grown("kiln_lora_loads_total{cache=\"device\"}") > 0.0);
    for adapter in 0..ADAPTERS {
        let name =
            format!("kiln_lora_requests_total{{adapter=\"a{adapter}\",outcome=\"finished\"}}");
        assert_eq!(grown(&name).round() as usize, 10, "{name}");
    }
    let failed = |name: &&String| name.contains("outcome=\"failed\"") && after.0[*name] > 0.0;
    assert_eq!(after.0.keys().find(failed), None);
    let idle = "vllm:lora_requests_info{max_lora=\"3\",running_lora_adapters=\"\",waiting_lora_adapters=\"\"}";
    assert!(after.0.contains_key(idle), "{:?}", after.0.keys());
    // Tables of the modulation: those of the adapters on the device, and those of the base model for the
    // steps of the warm-up and of the requests.
    let tables = after.0["kiln_cache_entries{cache=\"modulation\"}"].round() as usize;
    assert!(tables <= 3 + 2, "{tables} tables");
    // An allocator keeps some of what was freed: 7 to 18 MiB were seen.
    let (before, after) = (before.1, after.1);
    assert!(
        after < before + 48.0,
        "{before} MiB before, {after} MiB after"
    );
}

#[test]
fn adapters_that_do_not_fit_the_device_are_refused_with_their_sizes() {
    let (folder, bytes) = folder();
    let bound = (bytes + bytes / 2).to_string();
    let server = serve(folder.path(), &["--lora-cache", &bound, "--no-warm-up"]);
    let mut both = body(Some(0), 1);
    both["lora"] = json!(["a0", "a1"]);
    let reply = post_to(server.address, IMAGES, &both);
    let error = &reply.body["error"];
    assert_eq!(
        (reply.status, &error["param"]),
        (400, &json!("loras")),
        "{error}"
    );
    let expected = format!(
        "there is no room on the device for the adapters of the request: \"a0\" takes {bytes} bytes, \
         \"a1\" takes {bytes} bytes, {} bytes together, and --lora-cache allows {bound}: leave adapters \
         out, or start the server with a larger --lora-cache",
        2 * bytes
    );
    assert_eq!(error["message"], expected);
    let reply = post_to(server.address, "/v1/images/estimate", &both);
    assert_eq!(reply.body["accepted"], json!(false), "{}", reply.body);
    pixels(&post_to(server.address, IMAGES, &body(Some(0), 1)));
    let rejected = "kiln_lora_requests_total{adapter=\"a1\",outcome=\"rejected\"}";
    assert_eq!(metrics(&server)[rejected].round() as u64, 1);
}

/// A request keeps its weights to its end when its adapter is taken from the list, also while others push
/// it out of the caches.
#[test]
fn an_adapter_can_be_unloaded_while_it_is_in_use() {
    let (folder, bytes) = folder();
    let bound = (2 * bytes).to_string();
    let server = serve(
        folder.path(),
        &[
            "--lora-cache",
            &bound,
            "--enable-lora-updates",
            "--no-warm-up",
        ],
    );
    let alone = pixels(&post_to(server.address, IMAGES, &body(Some(0), 300)));
    let open = send(
        connect(server.address),
        "POST",
        IMAGES,
        Some(&body(Some(0), 300)),
    );
    while !running(&metrics(&server)).contains(&"a0".to_owned()) {
        thread::sleep(Duration::from_millis(2));
    }
    let unload = json!({"lora_name": "a0"});
    let reply = post_to(server.address, "/v1/unload_lora_adapter", &unload);
    assert_eq!(reply.status, 200);
    let reply = post_to(server.address, IMAGES, &body(Some(0), 1));
    assert_eq!(reply.status, 400);
    for other in 1..4 {
        pixels(&post_to(server.address, IMAGES, &body(Some(other), 1)));
    }
    let is_running = running(&metrics(&server)).contains(&"a0".to_owned());
    assert!(is_running, "the request was over before the others");
    assert!(pixels(&receive(open)) == alone, "the image changed");
}

#[test]
fn a_signal_while_adapters_are_loaded_ends_the_server_cleanly() {
    let (folder, bytes) = folder();
    let bound = (2 * bytes).to_string();
    for delay in [0, 10, 40, 150] {
        let mut server = serve(folder.path(), &["--lora-cache", &bound, "--no-warm-up"]);
        let open: Vec<_> = (0..ADAPTERS)
            .map(|adapter| {
                let stream = connect(server.address);
                send(stream, "POST", IMAGES, Some(&body(Some(adapter), 4)))
            })
            .collect();
        thread::sleep(Duration::from_millis(delay));
        let process = server.process.id().to_string();
        let signal = Command::new("kill").args(["-TERM", &process]).status();
        assert!(signal.unwrap().success());
        for stream in open {
            let reply = receive(stream);
            assert!(
                matches!(reply.status, 200 | 503),
                "{delay} ms: {}",
                reply.body
            );
        }
        assert_eq!(server.process.wait().unwrap().code(), Some(0), "{delay} ms");
    }
}
