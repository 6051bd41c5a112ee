//! `kiln jobs`, with a server that gives scripted answers.

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::process::Output;
use std::sync::{Arc, Mutex};
use std::thread;

use serde_json::{Value, json};

use super::{kiln, stderr};

const ID: &str = "job-00c0ffee00c0ffee00c0ffee";
const OTHER: &str = "job-00c0ffee00c0ffee00c0fff0";

/// A request that the server got.
#[derive(Debug, Clone)]
struct Got {
    line: String,
    /// Lines with lower-case names.
    headers: Vec<String>,
    body: Vec<u8>,
}

impl Got {
    fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap()
    }

    fn header(&self, name: &str) -> Option<&str> {
        let prefix = format!("{name}: ");
        self.headers
            .iter()
            .find_map(|line| line.strip_prefix(&prefix))
    }
}

/// A server that answers each request with the next of its answers, and the last one for ever. An empty
/// answer closes the connection.
struct Server {
    address: SocketAddr,
    got: Arc<Mutex<Vec<Got>>>,
}

impl Server {
    fn start(answers: Vec<Vec<u8>>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let got: Arc<Mutex<Vec<Got>>> = Arc::default();
        let all = Arc::clone(&got);
        thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let number = {
                    let mut all = all.lock().unwrap();
                    all.push(read(&mut BufReader::new(&stream)));
                    all.len() - 1
                };
                let answer = answers.get(number).or(answers.last()).unwrap();
                // A client that has gone is one that had enough.
                stream.write_all(answer).ok();
            }
        });
        Self { address, got }
    }

    fn got(&self) -> Vec<Got> {
        self.got.lock().unwrap().clone()
    }

    /// Runs a command with this server.
    fn run(&self, folder: &Path, args: &[&str]) -> Output {
        let url = format!("http://{}/v1/", self.address);
        kiln(folder, &[&["jobs"], args, &["--server", &url]].concat())
    }
}

fn read(stream: &mut impl BufRead) -> Got {
    let mut lines = Vec::new();
    loop {
        let mut line = String::new();
        stream.read_line(&mut line).unwrap();
        match line.trim_end() {
            "" => break,
            line => lines.push(line.to_owned()),
        }
    }
    let mut got = Got {
        line: lines.remove(0),
        headers: lines
            .iter()
            .map(|line| {
                let (name, value) = line.split_once(": ").unwrap();
                format!("{}: {value}", name.to_lowercase())
            })
            .collect(),
        body: Vec::new(),
    };
    let length = got
        .header("content-length")
        .map_or(0, |it| it.parse().unwrap());
    got.body = vec![0; length];
    stream.read_exact(&mut got.body).unwrap();
    got
}

fn answer(head: &str, body: &[u8]) -> Vec<u8> {
    let length = body.len();
    let head = format!("HTTP/1.1 {head}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n");
    [head.as_bytes(), body].concat()
}

fn ok(body: &Value) -> Vec<u8> {
    answer("200 OK", body.to_string().as_bytes())
}

fn busy() -> Vec<u8> {
    let body = json!({"error": {"message": "the store of jobs does not answer"}});
    answer(
        "503 Service Unavailable\r\nRetry-After: 0",
        body.to_string().as_bytes(),
    )
}

fn job(status: &str) -> Value {
    json!({
        "id": ID, "object": "image.job", "status": status, "progress": 40, "queue_position": null,
        "created_at": 1, "seed": 7, "attempt": 1, "model": "demo", "error": null, "files": [],
        "request": {"prompt": "a cat", "size": "16x16", "num_inference_steps": 2, "n": 1},
    })
}

/// A completed job with these files.
fn completed(files: &[&[u8]]) -> Value {
    let file = |content: &&[u8]| json!({"media_type": "image/png", "bytes": content.len()});
    let mut job = job("completed");
    job["files"] = files.iter().map(file).collect();
    job
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

/// The exit code of a command against these answers, stdout, and stderr, which has no panic.
fn outcome(answers: Vec<Vec<u8>>, args: &[&str]) -> (i32, String, String) {
    let folder = tempfile::tempdir().unwrap();
    let output = Server::start(answers).run(folder.path(), args);
    let errors = stderr(&output);
    assert!(!errors.contains("panicked"), "{errors}");
    (output.status.code().unwrap(), stdout(&output), errors)
}

#[test]
fn a_submission_has_the_given_options() {
    let server = Server::start(vec![answer(
        "202 Accepted",
        job("queued").to_string().as_bytes(),
    )]);
    let folder = tempfile::tempdir().unwrap();
    let url = "https://example.org/hook";
    let args = [
        "submit",
        "a cat",
        "--size",
        "64x48",
        "--steps",
        "4",
        "--seed",
        "18446744073709551615",
        "--cfg",
        "3.5",
        "--negative-prompt",
        "",
        "--num-images",
        "2",
        "--format",
        "webp",
        "--lora",
        "ink:0.5",
        "--lora",
        "style/oil",
        "--cache",
        "off",
        "--schedule",
        "{\"shift\": 3}",
        "--rng",
        "cuda",
        "--webhook",
        url,
        "--idempotency-key",
        "order 7",
        "--api-key",
        "key-1,key-2",
    ];
    let output = server.run(folder.path(), &args);
    assert_eq!(stdout(&output), format!("{ID}\n"), "{}", stderr(&output));
    let got = &server.got()[0];
    assert_eq!(got.line, "POST /v1/images/jobs HTTP/1.1");
    assert_eq!(got.header("idempotency-key"), Some("order 7"));
    assert_eq!(got.header("authorization"), Some("Bearer key-1"));
    assert_eq!(got.header("content-type"), Some("application/json"));
    let expected = json!({
        "prompt": "a cat", "width": 64, "height": 48, "num_inference_steps": 4, "seed": u64::MAX,
        "true_cfg_scale": 3.5, "negative_prompt": "", "n": 2, "output_format": "webp",
        "loras": [{"name": "ink", "scale": 0.5}, {"name": "style/oil"}], "cache": "off",
        "schedule": {"shift": 3}, "generator_device": "cuda", "webhook": url,
    });
    assert_eq!(got.json(), expected);
}

#[test]
fn what_is_not_given_is_left_to_the_server() {
    let server = Server::start(vec![ok(&job("queued"))]);
    let folder = tempfile::tempdir().unwrap();
    let output = server.run(folder.path(), &["submit", "--prompt", "a cat", "--json"]);
    let printed: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(printed, job("queued"));
    let got = &server.got()[0];
    assert_eq!(got.json(), json!({"prompt": "a cat"}));
    assert_eq!(got.header("authorization"), None);
}

#[test]
fn a_submission_is_repeated_with_its_key() {
    let server = Server::start(vec![busy(), Vec::new(), ok(&job("queued"))]);
    let folder = tempfile::tempdir().unwrap();
    let output = server.run(folder.path(), &["submit", "a cat"]);
    assert_eq!(stdout(&output), format!("{ID}\n"), "{}", stderr(&output));
    assert!(stderr(&output).contains("the store of jobs does not answer"));
    let got = server.got();
    assert_eq!(got.len(), 3);
    let keys: Vec<_> = got
        .iter()
        .map(|got| got.header("idempotency-key"))
        .collect();
    assert!(keys[0].is_some_and(|key| key.len() > 20) && keys.iter().all(|key| *key == keys[0]));
    // Another command makes another job.
    server.run(folder.path(), &["submit", "a cat"]);
    assert_ne!(server.got()[3].header("idempotency-key"), keys[0]);
}

#[test]
fn a_refused_submission_tells_the_message_and_the_key() {
    let error =
        json!({"error": {"message": "size is too large\u{1b}[2J", "param": "size", "code": 400}});
    let refused = |head: &str| vec![answer(head, error.to_string().as_bytes())];
    let (code, out, errors) = outcome(refused("400 Bad Request"), &["submit", "a cat"]);
    assert_eq!((code, out.as_str()), (2, ""));
    assert!(
        errors.ends_with("error: size is too large [2J (size, status 400)\n"),
        "{errors}"
    );
    let (code, out, _) = outcome(refused("404 Not Found"), &["submit", "a cat", "--json"]);
    let out: Value = serde_json::from_str(&out).unwrap();
    assert_eq!((code, &out["error"]["exit_code"]), (1, &json!(1)));
    let (code, _, errors) = outcome(refused("401 Unauthorized"), &["list"]);
    assert_eq!(code, 1);
    assert!(
        errors.contains("tip: give the key as --api-key or KILN_API_KEY"),
        "{errors}"
    );
    let html = vec![answer("403 Forbidden", b"<h1>proxy</h1>")];
    let (code, _, errors) = outcome(html, &["show", ID]);
    assert_eq!(code, 1);
    assert!(errors.contains("<h1>proxy</h1> (status 403)"), "{errors}");
}

#[test]
fn a_wait_survives_a_restart_and_downloads_the_files() {
    let files: [&[u8]; 2] = [b"first", b"second file"];
    let server = Server::start(vec![
        ok(&job("queued")),
        ok(&job("queued")),
        busy(),
        Vec::new(),
        ok(&job("in_progress")),
        ok(&completed(&files)),
        answer("200 OK", files[0]),
        busy(),
        answer("200 OK", files[1]),
    ]);
    let folder = tempfile::tempdir().unwrap();
    let args = [
        "submit",
        "a cat",
        "--num-images",
        "2",
        "--wait",
        "--output",
        "out.png",
    ];
    let output = server.run(folder.path(), &args);
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(stdout(&output), format!("{ID}\nout-0.png\nout-1.png\n"));
    for (index, content) in files.iter().enumerate() {
        let path = folder.path().join(format!("out-{index}.png"));
        assert_eq!(std::fs::read(path).unwrap(), *content);
    }
    let got = server.got();
    assert_eq!(got[0].json()["output_format"], "png");
    assert!(
        got[1]
            .line
            .starts_with(&format!("GET /v1/images/jobs/{ID}?wait="))
    );
    let last = format!("GET /v1/images/jobs/{ID}/content?index=1 HTTP/1.1");
    assert_eq!(got.last().unwrap().line, last);
}

#[test]
fn files_go_to_a_folder_by_default_and_to_stdout() {
    let server = |content: &[u8]| {
        Server::start(vec![ok(&completed(&[b"image"])), answer("200 OK", content)])
    };
    let folder = tempfile::tempdir().unwrap();
    let output = server(b"image").run(folder.path(), &["download", ID, "--json"]);
    let printed: Value = serde_json::from_slice(&output.stdout).unwrap();
    let path = format!("./{ID}.png");
    assert_eq!(printed["paths"], json!([path]), "{}", stderr(&output));
    assert_eq!(std::fs::read(folder.path().join(path)).unwrap(), b"image");
    let output = server(b"image").run(folder.path(), &["wait", ID, "--output", "-"]);
    assert_eq!(output.stdout, b"image");
    let stored = Server::start(vec![
        ok(&job("queued")),
        ok(&completed(&[b"image"])),
        answer("200 OK", b"image"),
    ]);
    let output = stored.run(folder.path(), &["submit", "a cat", "--wait", "-o", "-"]);
    assert_eq!(output.stdout, b"image");
    assert!(stderr(&output).contains(&format!("submitted {ID}")));
    // Cut, or too long.
    for content in [b"imag".as_slice(), b"images"] {
        let output = server(content).run(folder.path(), &["wait", ID, "--output", "x.png"]);
        assert_eq!(output.status.code(), Some(1));
        assert!(
            stderr(&output).contains("other bytes"),
            "{}",
            stderr(&output)
        );
        assert!(!folder.path().join("x.png").exists());
    }
    let output = server(b"image").run(folder.path(), &["wait", ID, "--output", "x.jpg"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(
        stderr(&output).contains("the files are image/png"),
        "{}",
        stderr(&output)
    );
}

#[test]
fn the_exit_code_tells_how_a_job_ended() {
    let wait = |status: &str, args: &[&str]| {
        let mut job = job(status);
        if status == "failed" {
            job["error"] = json!({"code": "worker_lost", "message": "the worker ended"});
        }
        outcome(vec![ok(&job)], &[&["wait", ID], args].concat())
    };
    let (code, out, _) = wait("completed", &[]);
    assert_eq!((code, out.as_str()), (0, "completed\n"));
    let (code, out, errors) = wait("failed", &[]);
    assert_eq!((code, out.as_str()), (3, ""));
    let line = format!("error: {ID} failed: the worker ended (worker_lost)\n");
    assert!(errors.ends_with(&line), "{errors}");
    let (code, out, _) = wait("cancelled", &["--json"]);
    let out: Value = serde_json::from_str(&out).unwrap();
    assert_eq!((code, &out["error"]["exit_code"]), (4, &json!(4)));
    let (code, _, errors) = wait("in_progress", &["--timeout", "1"]);
    assert_eq!(code, 5);
    assert!(errors.contains("its status is in_progress"), "{errors}");
    let (code, _, _) = wait("queued", &["--timeout", "0"]);
    assert_eq!(code, 5);
    let (code, _, errors) = outcome(vec![ok(&job("queued"))], &["download", ID]);
    assert_eq!(code, 1);
    assert!(
        errors.contains("has no files, as its status is queued"),
        "{errors}"
    );
}

#[test]
fn a_list_goes_on_with_the_last_job() {
    let page = |id: &str, has_more: bool| {
        let mut job = job("queued");
        job["id"] = id.into();
        ok(&json!({"object": "list", "data": [job], "has_more": has_more}))
    };
    let server = Server::start(vec![page(ID, true), page(OTHER, false)]);
    let folder = tempfile::tempdir().unwrap();
    let output = server.run(
        folder.path(),
        &["list", "--all", "--json", "--status", "queued"],
    );
    let list: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(list["data"].as_array().unwrap().len(), 2);
    assert_eq!(list["has_more"], false);
    let lines: Vec<String> = server.got().into_iter().map(|got| got.line).collect();
    assert_eq!(
        lines,
        [
            "GET /v1/images/jobs?limit=100&status=queued HTTP/1.1".to_owned(),
            format!("GET /v1/images/jobs?limit=100&after={ID}&status=queued HTTP/1.1"),
        ]
    );
    let (code, out, errors) = outcome(vec![page(ID, true)], &["list", "--limit", "1"]);
    assert_eq!(code, 0, "{errors}");
    assert!(out.contains(ID) && out.contains("a cat"), "{out}");
    assert!(errors.contains("--all"), "{errors}");
    // A server that never gets on.
    let empty = ok(&json!({"data": [], "has_more": true}));
    assert_eq!(outcome(vec![empty], &["list", "--all"]).0, 0);
}

#[test]
fn every_job_is_cancelled_that_can_be() {
    let unknown = json!({"error": {"message": "there is no job of this id", "code": 404}});
    let server = Server::start(vec![
        answer("404 Not Found", unknown.to_string().as_bytes()),
        ok(&job("cancelled")),
        ok(&job("completed")),
    ]);
    let folder = tempfile::tempdir().unwrap();
    let output = server.run(folder.path(), &["cancel", OTHER, ID, OTHER]);
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(
        stdout(&output),
        format!("{ID} cancelled\n{OTHER} has ended already: completed\n")
    );
    assert!(stderr(&output).contains("there is no job of this id"));
    let line = format!("POST /v1/images/jobs/{OTHER}/cancel HTTP/1.1");
    assert_eq!(server.got()[0].line, line);
}

#[test]
fn a_job_is_shown() {
    let (code, out, _) = outcome(vec![ok(&job("in_progress"))], &["show", ID]);
    assert_eq!(code, 0);
    for line in [
        "status           in_progress",
        "progress         40 %",
        "prompt           a cat",
    ] {
        assert!(out.lines().any(|it| it == line), "{out}");
    }
    let (_, out, _) = outcome(vec![ok(&job("queued"))], &["show", ID, "--json"]);
    assert_eq!(serde_json::from_str::<Value>(&out).unwrap(), job("queued"));
}

#[test]
fn junk_is_no_job() {
    let mut deep = "[".repeat(100_000).into_bytes();
    deep.push(b'1');
    for body in [
        b"".as_slice(),
        b"null",
        b"[]",
        b"{}",
        b"<html>",
        b"\xff\xfe\0",
        br#"{"id": "job-1", "status": "queued"}"#,
        br#"{"id": 3, "status": {}}"#,
        br#"{"data": {}}"#,
        br#"{"data": [{"id": "x"}], "has_more": "yes"}"#,
        &deep,
    ] {
        for args in [
            ["submit", "a cat"],
            ["list", "--all"],
            ["show", ID],
            ["wait", ID],
            ["download", ID],
            ["cancel", ID],
        ] {
            let (code, out, errors) = outcome(vec![answer("200 OK", body)], &args);
            assert_eq!((code, out.as_str()), (1, ""), "{args:?} {errors}");
            assert!(errors.contains("is it a kiln server?"), "{args:?} {errors}");
        }
    }
    let (code, _, errors) = outcome(vec![b"SSH-2.0-OpenSSH\r\n".to_vec()], &["show", ID]);
    assert_eq!(code, 1);
    assert!(errors.contains("cannot be asked"), "{errors}");
}

#[test]
fn a_server_that_is_not_there_is_named() {
    let port = {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.local_addr().unwrap().port()
    };
    let folder = tempfile::tempdir().unwrap();
    let url = format!("http://127.0.0.1:{port}");
    let output = kiln(folder.path(), &["jobs", "list", "--server", &url]);
    assert_eq!(output.status.code(), Some(1));
    let errors = stderr(&output);
    assert!(
        errors.contains(&format!("error: {url} refuses connections")),
        "{errors}"
    );
    assert!(
        errors.contains("tip: start one with kiln serve --jobs DIR"),
        "{errors}"
    );
}

/// A process of `kiln serve`, which is killed when this is dropped.
#[cfg(feature = "flex")]
struct Served {
    process: std::process::Child,
    address: SocketAddr,
}

#[cfg(feature = "flex")]
impl Served {
    /// A server with jobs in `folder`, on this port.
    fn start(folder: &Path, port: u16) -> Self {
        let mut process = std::process::Command::new(env!("CARGO_BIN_EXE_kiln"))
            .args(["serve", "demo", "--no-warm-up", "--jobs"])
            .arg(folder.join("jobs"))
            .args(["--webhook-host", "127.0.0.1", "--webhook-allow-private"])
            .args(["--port", &port.to_string()])
            .env(
                "KILN_WEBHOOK_SECRET",
                "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
            )
            .env("HF_HUB_OFFLINE", "1")
            .stdin(std::process::Stdio::null())
            .stderr(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut log = BufReader::new(process.stderr.take().unwrap());
        let address = crate::served::address(&mut log);
        // Else the server waits for a reader of its log.
        thread::spawn(move || std::io::copy(&mut log, &mut std::io::sink()));
        let port = address.port().to_string();
        while !kiln(folder, &["health", "--port", &port]).status.success() {
            thread::sleep(std::time::Duration::from_millis(20));
        }
        Self { process, address }
    }

    fn url(&self) -> String {
        format!("http://{}", self.address)
    }
}

#[cfg(feature = "flex")]
impl Drop for Served {
    fn drop(&mut self) {
        self.process.kill().ok();
        self.process.wait().ok();
    }
}

/// Runs a command that succeeds, and returns its stdout.
#[cfg(feature = "flex")]
fn done(folder: &Path, url: &str, args: &[&str]) -> String {
    let output = kiln(folder, &[&["jobs"], args, &["--server", url]].concat());
    assert!(output.status.success(), "{args:?}: {}", stderr(&output));
    stdout(&output)
}

#[test]
#[cfg(feature = "flex")]
fn a_job_of_a_server_survives_its_end() {
    let folder = tempfile::tempdir().unwrap();
    let receiver = Server::start(vec![ok(&json!(null))]);
    let hook = format!("http://{}/hook", receiver.address);
    let server = Served::start(folder.path(), 0);
    let (port, url) = (server.address.port(), server.url());
    let submit = [
        "submit",
        "a large red circle",
        "--steps",
        "300",
        "--seed",
        "7",
        "--webhook",
        &hook,
        "--idempotency-key",
        "one",
    ];
    let id = done(folder.path(), &url, &submit);
    let id = id.trim();
    assert_eq!(done(folder.path(), &url, &submit).trim(), id);
    let waiting = thread::scope(|scope| {
        let wait = scope.spawn(|| done(folder.path(), &url, &["wait", id, "--output", "a.png"]));
        // The server is killed while it generates the image.
        while !done(folder.path(), &url, &["show", id]).contains("in_progress") {}
        drop(server);
        let server = Served::start(folder.path(), port);
        assert_eq!(wait.join().unwrap(), "a.png\n");
        server
    });
    let job: Value =
        serde_json::from_str(&done(folder.path(), &url, &["show", id, "--json"])).unwrap();
    assert_eq!(
        (&job["status"], &job["attempt"]),
        (&json!("completed"), &json!(2))
    );
    let again = [
        "submit",
        "a large red circle",
        "--steps",
        "300",
        "--seed",
        "7",
        "--wait",
        "-o",
        "b.png",
    ];
    done(folder.path(), &url, &again);
    let read = |name: &str| std::fs::read(folder.path().join(name)).unwrap();
    assert!(
        read("a.png") == read("b.png"),
        "the second attempt made another image"
    );

    let long = done(
        folder.path(),
        &url,
        &["submit", "a blue square", "--steps", "1000"],
    );
    let long = long.trim();
    assert_eq!(
        done(folder.path(), &url, &["cancel", long]),
        format!("{long} cancelled\n")
    );
    let list = done(folder.path(), &url, &["list", "--status", "cancelled"]);
    assert!(list.contains(long) && !list.contains(id), "{list}");

    while receiver.got().is_empty() {
        thread::sleep(std::time::Duration::from_millis(10));
    }
    let got = &receiver.got()[0];
    assert_eq!(got.line, "POST /hook HTTP/1.1");
    assert_eq!(got.json()["type"], "image.job.completed");
    assert_eq!(got.json()["data"], job);
    assert!(got.header("webhook-signature").unwrap().starts_with("v1,"));
    drop(waiting);
}
