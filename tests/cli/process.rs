//! The process of `kiln serve`: its signals, its log when nobody reads it, and its descriptors.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::{Child, ChildStderr, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Resource, Rlimit, Signal, getrlimit, kill_process, prlimit, setrlimit};

use crate::served;

/// A server with the demo model. It is killed when this is dropped.
struct Server {
    process: Child,
    address: SocketAddr,
    stderr: BufReader<ChildStderr>,
}

impl Server {
    /// Starts a server from a shell, after these commands.
    fn start(commands: &str) -> Self {
        let kiln = env!("CARGO_BIN_EXE_kiln");
        let mut process = Command::new("sh")
            .arg("-c")
            .arg(format!(
                "{commands}\nexec '{kiln}' serve --port 0 --no-warm-up --enable-sdapi"
            ))
            .env("HF_HUB_OFFLINE", "1")
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stderr = BufReader::new(process.stderr.take().unwrap());
        let address = served::address(&mut stderr);
        let server = Self {
            process,
            address,
            stderr,
        };
        let start = Instant::now();
        while !server.get("/health/ready").starts_with("HTTP/1.1 200") {
            assert!(
                start.elapsed() < Duration::from_mins(1),
                "the server is not ready"
            );
            std::thread::sleep(Duration::from_millis(20));
        }
        server
    }

    fn pid(&self) -> Pid {
        Pid::from_child(&self.process)
    }

    fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).unwrap();
    }

    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).unwrap();
        let timeout = Some(Duration::from_secs(30));
        stream.set_read_timeout(timeout).unwrap();
        stream
    }

    /// A connection that has sent this.
    fn send(&self, bytes: &[u8]) -> TcpStream {
        let mut stream = self.connect();
        stream.write_all(bytes).unwrap();
        stream
    }

    /// The response to a GET request, with its head.
    fn get(&self, path: &str) -> String {
        let head = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
        read(self.send(head.as_bytes()))
    }

    /// A connection on which an image is being generated.
    fn generate(&self, steps: usize) -> TcpStream {
        let body = format!("{{\"prompt\": \"a red circle\", \"num_inference_steps\": {steps}}}");
        let head = format!(
            "POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\
             Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        let stream = self.send(head.as_bytes());
        while !self.get("/metrics").contains("\nkiln_requests_running 1\n") {
            std::thread::sleep(Duration::from_millis(5));
        }
        stream
    }

    /// Makes many lines in the log.
    fn fill_log(&self, lines: usize) {
        let path = "x".repeat(180);
        let request = format!("GET /{path} HTTP/1.1\r\nHost: localhost\r\n\r\n");
        let mut stream = self.connect();
        let mut answers = BufReader::new(stream.try_clone().unwrap());
        for _ in 0..lines {
            stream.write_all(request.as_bytes()).unwrap();
            let (mut line, mut length) = (String::new(), 0);
            while line != "\r\n" {
                line.clear();
                assert_ne!(answers.read_line(&mut line).unwrap(), 0);
                if let Some(value) = line.strip_prefix("content-length: ") {
                    length = value.trim().parse().unwrap();
                }
            }
            answers.read_exact(&mut vec![0; length]).unwrap();
        }
    }

    /// Waits for the end of the process.
    fn end(&mut self, time: Duration) -> ExitStatus {
        let start = Instant::now();
        loop {
            if let Some(status) = self.process.try_wait().unwrap() {
                return status;
            }
            assert!(start.elapsed() < time, "the server does not end");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// The rest of the log of a server that has ended.
    fn log(&mut self) -> String {
        let mut log = String::new();
        self.stderr.read_to_string(&mut log).unwrap();
        log
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.process.kill().ok();
        self.process.wait().ok();
    }
}

/// All that arrives until the end of the connection, whichever end that is.
fn read(mut stream: TcpStream) -> String {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).ok();
    String::from_utf8_lossy(&bytes).into_owned()
}

#[test]
fn every_signal_that_ends_the_server_lets_running_requests_finish() {
    for (signal, name) in [
        (Signal::HUP, "SIGHUP"),
        (Signal::TERM, "SIGTERM"),
        (Signal::INT, "SIGINT"),
    ] {
        let mut server = Server::start("");
        let request = server.generate(40);
        server.signal(signal);
        let answer = read(request);
        assert!(answer.starts_with("HTTP/1.1 200"), "{name}: {answer}");
        assert!(server.end(Duration::from_secs(20)).success(), "{name}");
        let log = server.log();
        assert!(log.contains(&format!("{name}: no new requests")), "{log}");
    }
}

const IMAGE: &str = r#"{"prompt": "a red circle", "num_inference_steps": 1}"#;

/// A request for an image that leaves the connection open.
fn image_request() -> String {
    format!(
        "POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\n\
         Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{IMAGE}",
        IMAGE.len()
    )
}

#[test]
fn requests_are_taken_for_the_delay_of_a_shutdown() {
    let mut server = Server::start("export KILN_SHUTDOWN_DELAY=3 KILN_INSTANCE=pod-7");
    let mut idle = server.send(b"GET /health/ready HTTP/1.1\r\nHost: localhost\r\n\r\n");
    let mut first = [0; 12];
    idle.read_exact(&mut first).unwrap();
    assert_eq!(&first, b"HTTP/1.1 200");
    let signalled = Instant::now();
    server.signal(Signal::TERM);
    while !server.get("/health/ready").starts_with("HTTP/1.1 503") {
        std::thread::sleep(Duration::from_millis(5));
    }
    let ready = server.get("/health/ready");
    assert!(ready.contains("\"status\":\"draining\""), "{ready}");
    assert!(server.get("/health/live").starts_with("HTTP/1.1 200"));
    let answer = read(server.send(image_request().as_bytes()));
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    let head = answer.split("\r\n\r\n").next().unwrap();
    for header in ["connection: close", "x-kiln-instance: pod-7"] {
        assert!(head.lines().any(|line| line == header), "{head}");
    }
    // Until the server closes it.
    read(idle);
    assert!(signalled.elapsed() >= Duration::from_secs(3));
    assert!(server.end(Duration::from_secs(20)).success());
    let log = server.log();
    assert!(log.contains("still takes requests for 3 s"), "{log}");
    assert!(log.contains("SIGTERM: no new requests"), "{log}");
}

#[test]
fn a_second_signal_ends_the_delay_of_a_shutdown() {
    let mut server = Server::start("export KILN_SHUTDOWN_DELAY=600");
    let request = server.generate(1000);
    server.signal(Signal::TERM);
    while !server.get("/health/ready").starts_with("HTTP/1.1 503") {
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(
        server
            .get("/metrics")
            .contains("\nkiln_requests_running 1\n")
    );
    server.signal(Signal::INT);
    let answer = read(request);
    assert!(answer.starts_with("HTTP/1.1 503"), "{answer}");
    assert!(answer.contains("connection: close\r\n"), "{answer}");
    assert!(server.end(Duration::from_secs(20)).success());
    assert!(server.log().contains("SIGINT: unfinished requests end now"));
}

#[test]
fn idle_connections_are_closed_when_requests_are_refused() {
    let mut server = Server::start("");
    let request = server.generate(200);
    let mut idle = server.send(b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n");
    let mut first = [0; 12];
    idle.read_exact(&mut first).unwrap();
    server.signal(Signal::TERM);
    read(idle);
    // Others are still answered.
    let refused = read(server.send(image_request().as_bytes()));
    assert!(refused.starts_with("HTTP/1.1 503"), "{refused}");
    assert!(refused.contains("connection: close\r\n"), "{refused}");
    assert!(read(request).starts_with("HTTP/1.1 200"));
    assert!(server.end(Duration::from_secs(20)).success());
}

#[test]
fn a_hang_up_that_is_ignored_at_the_start_stays_ignored() {
    let mut server = Server::start("trap '' HUP");
    server.signal(Signal::HUP);
    std::thread::sleep(Duration::from_millis(300));
    assert!(server.get("/health/ready").starts_with("HTTP/1.1 200"));
    server.signal(Signal::TERM);
    assert!(server.end(Duration::from_secs(20)).success());
    assert!(!server.log().contains("SIGHUP"));
}

#[test]
fn a_log_that_nobody_reads_stops_neither_requests_nor_the_end() {
    let mut server = Server::start("");
    // Several times what the pipe takes.
    server.fill_log(1000);
    let request = server.generate(20);
    assert!(read(request).starts_with("HTTP/1.1 200"));
    server.signal(Signal::TERM);
    assert!(server.end(Duration::from_secs(10)).success());
}

#[test]
fn dropped_lines_of_the_log_are_counted_when_it_is_read_again() {
    let mut server = Server::start("");
    server.fill_log(6000);
    let (sender, lines) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        let Server {
            process, stderr, ..
        } = &mut server;
        scope.spawn(move || {
            for line in stderr.lines() {
                sender.send(line.unwrap()).ok();
            }
        });
        let is_report = |line: &String| line.contains("lines of this log were dropped");
        let report = lines.iter().find(is_report).unwrap();
        let count = report.split(" lines of this log").next().unwrap();
        let count: usize = count.rsplit(' ').next().unwrap().parse().unwrap();
        assert!((1..6000).contains(&count), "{report}");
        // The last lines are written before the end.
        kill_process(Pid::from_child(process), Signal::TERM).unwrap();
        assert!(lines.iter().any(|line| line.contains("SIGTERM")));
    });
    assert!(server.end(Duration::from_secs(10)).success());
}

#[test]
fn the_log_has_the_id_of_a_request() {
    let mut server = Server::start("");
    let head = "GET /unknown HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n";
    let answer = read(server.send(format!("{head}X-Request-Id: my-id\r\n\r\n").as_bytes()));
    assert!(answer.contains("x-request-id: my-id\r\n"), "{answer}");
    let made = read(server.send(format!("{head}\r\n").as_bytes()));
    let (_, made) = made.split_once("x-request-id: ").unwrap();
    server.signal(Signal::TERM);
    server.end(Duration::from_secs(20));
    let log = server.log();
    assert!(log.contains("my-id"), "{log}");
    assert!(log.contains(made.lines().next().unwrap()), "{log}");
}

#[test]
fn an_error_at_the_end_is_the_last_line() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let output = Command::new(env!("CARGO_BIN_EXE_kiln"))
        .args(["serve", "--port", &port])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let log = String::from_utf8(output.stderr).unwrap();
    let end: Vec<&str> = log.lines().rev().take(2).collect();
    assert!(end[0].starts_with("tip: another program"), "{log}");
    assert!(end[1].starts_with("error: cannot listen"), "{log}");
}

/// Lets this process, and so the tests, open as many files as it may.
fn open_many_files() {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    setrlimit(Resource::Nofile, raised).unwrap();
}

#[test]
fn the_limit_of_open_files_is_raised() {
    let server = Server::start("ulimit -Sn 100; ulimit -Hn 900");
    let limits = fs::read_to_string(format!("/proc/{}/limits", server.pid())).unwrap();
    let files = limits
        .lines()
        .find(|line| line.starts_with("Max open files"));
    let files: Vec<&str> = files.unwrap().split_whitespace().collect();
    assert_eq!(files[3..5], ["900", "900"]);
}

#[test]
fn connections_without_a_request_shut_nobody_out() {
    open_many_files();
    let server = Server::start("ulimit -n 256");
    let mut held = Vec::new();
    for request in [
        "GET /health HTTP/1.1\r\nHost: localhost\r\nX-a",
        "GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n",
        "POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\n\
         Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{",
        "",
    ] {
        for _ in 0..200 {
            held.push(server.send(request.as_bytes()));
        }
        let start = Instant::now();
        let answer = server.get("/health");
        assert!(answer.starts_with("HTTP/1.1 200"), "{request}: {answer}");
        assert!(start.elapsed() < Duration::from_secs(5), "{request}");
    }
    let request = server.generate(2);
    assert!(read(request).starts_with("HTTP/1.1 200"));
    let open = fs::read_dir(format!("/proc/{}/fd", server.pid())).unwrap();
    assert!(open.count() < 230);
}

#[test]
fn a_server_without_free_descriptors_says_so_and_recovers() {
    let mut server = Server::start("");
    let held: Vec<_> = (0..20)
        .map(|_| server.send(b"GET /health HTTP/1.1\r\nX-a"))
        .collect();
    assert!(server.get("/health").starts_with("HTTP/1.1 200"));
    let open = fs::read_dir(format!("/proc/{}/fd", server.pid())).unwrap();
    let limit = getrlimit(Resource::Nofile);
    let lowered = Rlimit {
        current: Some(open.count() as u64 - 1),
        maximum: limit.maximum,
    };
    prlimit(Some(server.pid()), Resource::Nofile, lowered).unwrap();
    // The place of a connection that waits is taken.
    for _ in 0..5 {
        assert!(server.get("/health").starts_with("HTTP/1.1 200"));
    }
    drop(held);
    server.signal(Signal::TERM);
    server.end(Duration::from_secs(20));
    let log = server.log();
    let lines = log.lines().filter(|line| line.contains("cannot accept"));
    assert_eq!(lines.count(), 1, "{log}");
}
