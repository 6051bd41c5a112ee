//! What `kiln serve` answers while its model is on the way, and how it ends then.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::served;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// How a fake Hub misbehaves.
#[derive(Debug, Clone, Copy)]
enum Fault {
    /// It accepts connections and never answers.
    Silent,
    /// It sends the first half of every file.
    Stalls,
    /// It answers after half a second that there is no such model.
    KnowsNothing,
}

/// A Hub that has the demo model as `own/tiny`. Returns its URL.
fn fake_hub(fault: Fault) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for connection in listener.incoming() {
            thread::spawn(move || answer(connection.unwrap(), fault));
        }
    });
    format!("http://{address}")
}

/// Answers one request. Errors mean that the client has gone.
fn answer(mut connection: TcpStream, fault: Fault) {
    let lines = BufReader::new(&connection).lines().map_while(Result::ok);
    let head: Vec<String> = lines.take_while(|line| !line.is_empty()).collect();
    let Some(request) = head.first() else { return };
    let path = request.split(' ').nth(1).unwrap();
    let head_of = |status: &str, length: usize| {
        format!(
            "HTTP/1.1 {status}\r\nContent-Length: {length}\r\nX-Repo-Commit: {COMMIT}\r\n\
             ETag: \"{}\"\r\nConnection: close\r\n\r\n",
            tag(path
                .rsplit_once(COMMIT)
                .map_or("", |(_, name)| name.trim_start_matches('/')))
        )
    };
    match fault {
        Fault::Silent => return stay(connection),
        Fault::KnowsNothing => {
            thread::sleep(Duration::from_millis(500));
            let head =
                head_of("404 Not Found", 0).replace("ETag", "X-Error-Code: RepoNotFound\r\nETag");
            connection.write_all(head.as_bytes()).ok();
            return;
        }
        Fault::Stalls => {}
    }
    let body = if path.contains("/tree/") {
        let entry = |name: &String| {
            let size = std::fs::metadata(demo().join(name)).unwrap().len();
            json!({"type": "file", "oid": tag(name), "size": size, "path": name})
        };
        let files = files();
        let tree: Vec<Value> = files.iter().map(entry).collect();
        serde_json::to_vec(&tree).unwrap()
    } else if path.starts_with("/api/") {
        let info = json!({"id": "own/tiny", "sha": COMMIT});
        info.to_string().into_bytes()
    } else {
        let (_, name) = path.split_once("/resolve/").unwrap();
        let (_, name) = name.split_once('/').unwrap();
        std::fs::read(demo().join(name)).unwrap()
    };
    let head = head_of("200 OK", body.len());
    connection.write_all(head.as_bytes()).ok();
    if request.starts_with("HEAD") {
        return;
    }
    if path.contains("/resolve/") {
        connection.write_all(&body[..body.len() / 2]).ok();
        return stay(connection);
    }
    connection.write_all(&body).ok();
}

/// A stand-in for the hash of a file.
fn tag(name: &str) -> String {
    name.replace('/', "-")
}

/// Keeps a connection open until the other side closes it.
fn stay(mut connection: TcpStream) {
    connection.read_to_end(&mut Vec::new()).ok();
}

fn demo() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("models/demo")
}

fn files() -> Vec<String> {
    let mut files = vec!["model_index.json".to_owned()];
    for folder in [
        "scheduler",
        "text_encoder",
        "tokenizer",
        "transformer",
        "vae",
    ] {
        for entry in std::fs::read_dir(demo().join(folder)).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            files.push(format!("{folder}/{name}"));
        }
    }
    files
}

/// A folder with the configurations of the demo model, changed by `edit`, for random weights.
fn shape(folder: &Path, edit: impl Fn(&mut Value)) -> PathBuf {
    let model = folder.join("shape");
    for name in files() {
        // Random weights come with the demo model's tokenizer.
        let is_config = name.ends_with("config.json") || name == "model_index.json";
        if !is_config || name.starts_with("tokenizer") {
            continue;
        }
        let to = model.join(&name);
        std::fs::create_dir_all(to.parent().unwrap()).unwrap();
        std::fs::copy(demo().join(name), to).unwrap();
    }
    let path = model.join("transformer/config.json");
    let mut config = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    edit(&mut config);
    std::fs::write(path, config.to_string()).unwrap();
    model
}

/// A `kiln serve` process, killed when dropped.
struct Server {
    process: Child,
    address: SocketAddr,
    log: Arc<Mutex<String>>,
    _home: TempDir,
}

impl Server {
    fn start(args: &[&str], hub: Option<&str>) -> Self {
        let home = tempfile::tempdir().unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_kiln"));
        command
            .args([&["serve", "--port", "0", "--backend", "flex"], args].concat())
            .current_dir(home.path())
            .env("HF_HOME", home.path())
            .env("HF_ENDPOINT", hub.unwrap_or("http://127.0.0.1:1"))
            .env_remove("HF_HUB_OFFLINE")
            .stderr(Stdio::piped());
        let mut process = command.spawn().unwrap();
        let mut lines = BufReader::new(process.stderr.take().unwrap());
        let address = served::address(&mut lines);
        let log = Arc::new(Mutex::new(String::new()));
        let written = Arc::clone(&log);
        thread::spawn(move || {
            for line in lines.lines().map_while(Result::ok) {
                *written.lock().unwrap() += &(line + "\n");
            }
        });
        Self {
            process,
            address,
            log,
            _home: home,
        }
    }

    /// Status, head and JSON body of the response to a GET request.
    fn get(&self, path: &str) -> (u16, String, Value) {
        let mut stream = TcpStream::connect(self.address).unwrap();
        let head = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
        stream.write_all(head.as_bytes()).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(30)))
            .unwrap();
        let mut response = String::new();
        stream.read_to_string(&mut response).unwrap();
        let (head, body) = response.split_once("\r\n\r\n").unwrap();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        let body = serde_json::from_str(body).unwrap_or_default();
        (status, head.to_owned(), body)
    }

    /// Waits until the server is in a stage, and returns what `/health/ready` says then.
    fn wait_for(&self, stage: &str, is_far_enough: impl Fn(&Value) -> bool) -> Value {
        let started = Instant::now();
        loop {
            let (status, _, body) = self.get("/health/ready");
            assert_eq!(
                (status, &body["status"]),
                (503, &json!("loading")),
                "{}",
                self.log.lock().unwrap()
            );
            if body["stage"] == stage && is_far_enough(&body) {
                return body;
            }
            assert!(
                started.elapsed() < Duration::from_mins(1),
                "{body} instead of {stage}: {}",
                self.log.lock().unwrap()
            );
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// What holds in every stage before the server is ready.
    fn assert_starting(&self) {
        for path in ["/health", "/health/live"] {
            assert_eq!(self.get(path).0, 200, "{path}");
        }
        for path in ["/", "/metrics", "/openapi.json", "/version"] {
            assert_eq!(self.get(path).0, 200, "{path}");
        }
        for path in ["/v1/models", "/v1/status"] {
            let (status, head, body) = self.get(path);
            assert_eq!((status, &body["error"]["code"]), (503, &json!(503)));
            assert!(head.to_lowercase().contains("\r\nretry-after: "), "{head}");
        }
    }

    /// Sends a signal, with a client that sends half a request and one that sends none. Asserts that
    /// the process ends soon, with code 0.
    fn assert_ends_at(mut self, signal: Signal) -> String {
        let _idle = TcpStream::connect(self.address).unwrap();
        let mut half = TcpStream::connect(self.address).unwrap();
        half.write_all(b"GET /v1/models HTTP/1.1\r\nHost:").unwrap();
        let sent = Instant::now();
        kill_process(Pid::from_child(&self.process), signal).unwrap();
        assert_eq!(self.wait(), 0, "{}", self.log.lock().unwrap());
        // It gives clients a second; the rest is for a machine that has other work.
        assert!(
            sent.elapsed() < Duration::from_secs(8),
            "{:?}",
            sent.elapsed()
        );
        let address = self.address;
        assert!(TcpStream::connect(address).is_err(), "the port is open");
        let log = self.log.lock().unwrap().clone();
        assert!(
            log.contains("the server is stopped before it is ready"),
            "{log}"
        );
        log
    }

    /// Waits for the end of the process. Returns its exit code.
    fn wait(&mut self) -> i32 {
        let started = Instant::now();
        loop {
            if let Some(status) = self.process.try_wait().unwrap() {
                return status.code().expect("an exit code");
            }
            assert!(
                started.elapsed() < Duration::from_mins(1),
                "it does not end"
            );
            thread::sleep(Duration::from_millis(10));
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
fn a_server_that_looks_for_its_model_answers_and_can_be_stopped() {
    let hub = fake_hub(Fault::Silent);
    let server = Server::start(&["own/tiny"], Some(&hub));
    let body = server.wait_for("finding", |_| true);
    assert_eq!(body["progress"], Value::Null);
    server.assert_starting();

    let port = server.address.port().to_string();
    let health = Command::new(env!("CARGO_BIN_EXE_kiln"))
        .args(["health", "--port", &port])
        .output()
        .unwrap();
    assert_eq!(health.status.code(), Some(1));
    let message = String::from_utf8(health.stderr).unwrap();
    assert_eq!(message, "error: not ready: finding\n");
    server.assert_ends_at(Signal::TERM);
}

#[test]
fn a_server_that_downloads_its_model_tells_how_far_it_is_and_can_be_stopped() {
    let hub = fake_hub(Fault::Stalls);
    let server = Server::start(&["own/tiny"], Some(&hub));
    let body = server.wait_for("downloading", |body| body["bytes"].as_u64() > Some(0));
    let number = |name: &str| body[name].as_f64().unwrap();
    assert!(number("bytes") < number("total_bytes"), "{body}");
    assert!((0.0..1.0).contains(&number("progress")), "{body}");
    server.assert_starting();
    server.assert_ends_at(Signal::INT);
}

/// Every stage that the model of these arguments passes must be long enough to be seen.
fn assert_ends_in(stage: &str, args: &[&str], end_of_stage: &str) {
    let server = Server::start(args, None);
    let body = server.wait_for(stage, |_| true);
    assert!(body["elapsed"].as_f64().unwrap() >= 0.0, "{body}");
    server.assert_starting();
    let log = server.assert_ends_at(Signal::TERM);
    assert!(!log.contains(end_of_stage), "{log}");
}

#[test]
fn a_server_that_loads_its_model_answers_and_can_be_stopped() {
    let folder = tempfile::tempdir().unwrap();
    // 1.2 GB, of which little is made until the signal comes.
    let model = shape(folder.path(), |transformer| {
        transformer["num_attention_heads"] = 16.into();
        transformer["num_layers"] = 64.into();
    });
    let args = [model.to_str().unwrap(), "--load-format", "dummy"];
    assert_ends_in("loading", &args, "loaded in");
}

#[test]
fn a_server_that_warms_up_answers_and_can_be_stopped() {
    let folder = tempfile::tempdir().unwrap();
    // Images of 1024x1024.
    let model = shape(folder.path(), |transformer| {
        transformer["sample_size"] = 128.into();
    });
    let args = [model.to_str().unwrap(), "--load-format", "dummy"];
    assert_ends_in("warming_up", &args, "kiln::cli::serve: ready");
}

#[test]
fn a_model_that_is_not_found_ends_the_server_though_clients_are_connected() {
    let hub = fake_hub(Fault::KnowsNothing);
    let mut server = Server::start(&["own/tiny"], Some(&hub));
    let _idle = TcpStream::connect(server.address).unwrap();
    let mut half = TcpStream::connect(server.address).unwrap();
    half.write_all(b"POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\n")
        .unwrap();
    assert_eq!(server.wait(), 1);
    let log = server.log.lock().unwrap().clone();
    let error = log.lines().find_map(|line| line.strip_prefix("error: "));
    assert!(error.unwrap().contains("has no model own/tiny"), "{log}");
}

#[test]
fn a_server_becomes_ready_and_drains_at_a_signal() {
    let mut server = Server::start(&["demo"], None);
    let started = Instant::now();
    while server.get("/health/ready").0 != 200 {
        assert!(
            started.elapsed() < Duration::from_mins(1),
            "it is never ready"
        );
        thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(server.get("/v1/models").0, 200);
    kill_process(Pid::from_child(&server.process), Signal::TERM).unwrap();
    assert_eq!(server.wait(), 0);
    let log = server.log.lock().unwrap().clone();
    assert!(log.contains("no new requests are accepted"), "{log}");
}
