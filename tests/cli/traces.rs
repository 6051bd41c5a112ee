//! `kiln serve` with a collector of traces in this process.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::common::v1::{AnyValue, KeyValue};
use opentelemetry_proto::tonic::trace::v1::status::StatusCode;
use prost::Message;
use rustix::process::{Pid, Signal, kill_process};

use crate::served;

const ENDPOINT: &str = "OTEL_EXPORTER_OTLP_ENDPOINT";
const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
const PARENT: &str = "b7ad6b7169203331";

/// More steps than are made before a client leaves at the first preview, after a quarter of them.
const ENDLESS: u32 = 60;

/// A span as the collector received it.
#[derive(Debug, Clone)]
struct Seen {
    name: String,
    trace: String,
    id: String,
    parent: String,
    state: String,
    kind: i32,
    start: u64,
    end: u64,
    failed: bool,
    attributes: BTreeMap<String, String>,
    resource: BTreeMap<String, String>,
}

impl Seen {
    fn attribute(&self, name: &str) -> &str {
        self.attributes.get(name).map_or("", String::as_str)
    }
}

/// What a collector does with each request.
#[derive(Debug, Clone, Copy)]
enum Answer {
    Success,
    Error,
    Never,
}

/// A collector on a free port.
struct Collector {
    address: SocketAddr,
    spans: Arc<Mutex<Vec<Seen>>>,
    /// The heads of the requests, in lower case.
    heads: Arc<Mutex<Vec<String>>>,
}

impl Collector {
    fn start(answer: Answer) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let collector = Self {
            address: listener.local_addr().unwrap(),
            spans: Arc::default(),
            heads: Arc::default(),
        };
        let (spans, heads) = (Arc::clone(&collector.spans), Arc::clone(&collector.heads));
        thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let (spans, heads) = (Arc::clone(&spans), Arc::clone(&heads));
                thread::spawn(move || {
                    let mut stream = BufReader::new(stream);
                    while let Some((head, body)) = request(&mut stream) {
                        heads.lock().unwrap().push(head);
                        let status = match answer {
                            Answer::Success => "200 OK",
                            Answer::Error => "400 Bad Request",
                            Answer::Never => return thread::park(),
                        };
                        let message = ExportTraceServiceRequest::decode(body.as_slice()).unwrap();
                        spans.lock().unwrap().extend(seen(message));
                        let head = format!("HTTP/1.1 {status}\r\nContent-Length: 0\r\n\r\n");
                        stream.get_mut().write_all(head.as_bytes()).unwrap();
                    }
                });
            }
        });
        collector
    }

    fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    fn spans(&self) -> Vec<Seen> {
        self.spans.lock().unwrap().clone()
    }
}

/// The head, in lower case, and the body of a request.
fn request(stream: &mut impl BufRead) -> Option<(String, Vec<u8>)> {
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        if stream.read_line(&mut head).ok()? == 0 {
            return None;
        }
    }
    let head = head.to_lowercase();
    let length = head
        .lines()
        .find_map(|line| line.strip_prefix("content-length: "));
    let mut body = vec![0; length.unwrap().parse().unwrap()];
    stream.read_exact(&mut body).ok()?;
    Some((head, body))
}

fn seen(message: ExportTraceServiceRequest) -> Vec<Seen> {
    let mut spans = Vec::new();
    for resource_spans in message.resource_spans {
        let resource = attributes(resource_spans.resource.unwrap().attributes);
        let scopes = resource_spans.scope_spans.into_iter();
        for span in scopes.flat_map(|scope| scope.spans) {
            spans.push(Seen {
                name: span.name,
                trace: hex(&span.trace_id),
                id: hex(&span.span_id),
                parent: hex(&span.parent_span_id),
                state: span.trace_state,
                kind: span.kind,
                start: span.start_time_unix_nano,
                end: span.end_time_unix_nano,
                failed: span.status.unwrap().code == StatusCode::Error as i32,
                attributes: attributes(span.attributes),
                resource: resource.clone(),
            });
        }
    }
    spans
}

fn attributes(pairs: Vec<KeyValue>) -> BTreeMap<String, String> {
    let pairs = pairs.into_iter();
    pairs
        .map(|pair| (pair.key, text(pair.value.unwrap())))
        .collect()
}

fn text(value: AnyValue) -> String {
    match value.value.unwrap() {
        Value::StringValue(text) => text,
        Value::IntValue(number) => number.to_string(),
        Value::DoubleValue(number) => number.to_string(),
        Value::BoolValue(flag) => flag.to_string(),
        other => panic!("{other:?}"),
    }
}

fn hex(bytes: &[u8]) -> String {
    let digits = bytes.iter().flat_map(|byte| [byte >> 4, byte & 15]);
    let digits = digits.map(|digit| char::from_digit(u32::from(digit), 16));
    digits.map(Option::unwrap).collect()
}

/// A server with the demo model. It is killed when this is dropped.
struct Server {
    process: Child,
    address: SocketAddr,
    log: Receiver<String>,
}

impl Server {
    fn start(environment: &[(&str, &str)], arguments: &[&str]) -> Self {
        let mut process = Command::new(env!("CARGO_BIN_EXE_kiln"))
            .args(["serve", "--port", "0", "--no-warm-up"])
            .args(arguments)
            .env("HF_HUB_OFFLINE", "1")
            // Batches are sent at once, and given up soon.
            .env("OTEL_BSP_SCHEDULE_DELAY", "50")
            .env("OTEL_EXPORTER_OTLP_TIMEOUT", "1000")
            .envs(environment.iter().copied())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stderr = BufReader::new(process.stderr.take().unwrap());
        let (lines, log) = channel();
        let mut first = Copying(&mut stderr, String::new());
        let address = served::address(&mut first);
        lines.send(first.1).unwrap();
        thread::spawn(move || {
            for line in stderr.lines().map_while(Result::ok) {
                lines.send(line + "\n").ok();
            }
        });
        let server = Self {
            process,
            address,
            log,
        };
        let start = Instant::now();
        while server.get("/health/ready").0 != 200 {
            assert!(start.elapsed() < Duration::from_mins(1), "not ready");
            thread::sleep(Duration::from_millis(20));
        }
        server
    }

    fn send(&self, method: &str, path: &str, headers: &str, body: &str) -> TcpStream {
        let mut stream = TcpStream::connect(self.address).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_mins(1)))
            .unwrap();
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n\
             Content-Type: application/json\r\nContent-Length: {}\r\n{headers}\r\n",
            self.address,
            body.len()
        );
        stream.write_all((head + body).as_bytes()).unwrap();
        stream
    }

    /// The status, and the whole response.
    fn call(&self, method: &str, path: &str, headers: &str, body: &str) -> (u16, String) {
        let mut reply = Vec::new();
        let mut stream = self.send(method, path, headers, body);
        stream.read_to_end(&mut reply).unwrap();
        let reply = String::from_utf8_lossy(&reply).into_owned();
        (reply[9..12].parse().unwrap(), reply)
    }

    fn get(&self, path: &str) -> (u16, String) {
        self.call("GET", path, "", "")
    }

    /// Generates an image, with these headers and further fields.
    fn generate(&self, headers: &str, fields: &str) -> (u16, String) {
        self.call("POST", "/v1/images/generations", headers, &body(2, fields))
    }

    /// Ends the server by a signal. Returns its log and how long it took.
    fn end(mut self) -> (String, Duration) {
        let start = Instant::now();
        kill_process(Pid::from_child(&self.process), Signal::TERM).unwrap();
        assert!(self.process.wait().unwrap().success());
        let took = start.elapsed();
        (self.log.iter().collect(), took)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.process.kill().ok();
        self.process.wait().ok();
    }
}

/// Keeps what is read.
struct Copying<'a, R>(&'a mut R, String);

impl<R: BufRead> Read for Copying<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        self.0.read(buffer)
    }
}

impl<R: BufRead> BufRead for Copying<'_, R> {
    fn fill_buf(&mut self) -> std::io::Result<&[u8]> {
        self.0.fill_buf()
    }

    fn consume(&mut self, amount: usize) {
        let text = String::from_utf8_lossy(self.0.fill_buf().unwrap_or_default()).into_owned();
        self.1 += &text[..amount.min(text.len())];
        self.0.consume(amount);
    }
}

fn body(steps: u32, fields: &str) -> String {
    format!(r#"{{"prompt": "a red circle", "num_inference_steps": {steps}, "seed": 1{fields}}}"#)
}

/// The only span of this name in a trace.
fn find<'a>(spans: &'a [Seen], trace: &str, name: &str) -> &'a Seen {
    let mut found = spans
        .iter()
        .filter(|span| span.trace == trace && span.name == name);
    let first = found.next();
    let first = first.unwrap_or_else(|| panic!("no {name} of {trace} in {spans:#?}"));
    assert!(found.next().is_none(), "{name} twice in {spans:#?}");
    first
}

fn server_spans<'a>(spans: &'a [Seen], name: &str) -> Vec<&'a Seen> {
    spans.iter().filter(|span| span.name == name).collect()
}

#[test]
fn a_request_has_a_span_and_below_it_one_for_each_stage() {
    let collector = Collector::start(Answer::Success);
    let environment = [
        (ENDPOINT, collector.url()),
        (
            "OTEL_EXPORTER_OTLP_HEADERS",
            "x-tenant=one,x-more=a%20b".to_owned(),
        ),
        (
            "OTEL_RESOURCE_ATTRIBUTES",
            "deployment.environment=test".to_owned(),
        ),
    ];
    let environment = environment
        .each_ref()
        .map(|(name, value)| (*name, value.as_str()));
    let server = Server::start(&environment, &[]);
    let headers = format!(
        "traceparent: 00-{TRACE}-{PARENT}-01\r\ntracestate: a=1,b=2\r\nUser-Agent: test\r\n"
    );
    let (status, reply) = server.generate(&headers, r#", "n": 2, "size": "48x32""#);
    assert_eq!(status, 200, "{reply}");
    assert_eq!(server.get("/metrics").0, 200);
    let port = server.address.port().to_string();
    // What was not sent yet is sent at the end.
    let (log, _) = server.end();

    let spans = collector.spans();
    let root = find(&spans, TRACE, "POST /v1/images/generations");
    assert_eq!((root.parent.as_str(), root.kind), (PARENT, 2));
    assert_eq!(root.state, "a=1,b=2");
    for (name, value) in [
        ("http.request.method", "POST"),
        ("http.route", "/v1/images/generations"),
        ("http.response.status_code", "200"),
        ("url.path", "/v1/images/generations"),
        ("url.scheme", "http"),
        ("server.address", "127.0.0.1"),
        ("server.port", &port),
        ("user_agent.original", "test"),
    ] {
        assert_eq!(root.attribute(name), value, "{name}");
    }
    assert!(!root.failed);
    let stages = ["queue", "encode", "denoise", "decode", "write"];
    let stages = stages.map(|name| find(&spans, TRACE, name));
    assert_eq!(spans.iter().filter(|span| span.trace == TRACE).count(), 6);
    for stage in stages {
        assert_eq!((&stage.parent, stage.kind), (&root.id, 1), "{stage:?}");
        assert!(
            root.start <= stage.start && stage.end <= root.end,
            "{stage:?} {root:?}"
        );
        assert!(stage.start <= stage.end && !stage.failed, "{stage:?}");
    }
    for pair in stages.windows(2) {
        assert!(pair[0].end <= pair[1].start, "{pair:?}");
    }
    let denoise = stages[2];
    for (name, value) in [
        ("kiln.size", "48x32"),
        ("kiln.images", "2"),
        ("kiln.steps", "2"),
        ("kiln.steps_done", "2"),
        ("kiln.skipped_steps", "0"),
    ] {
        assert_eq!(denoise.attribute(name), value, "{name}");
    }
    assert_eq!(stages[4].attribute("kiln.format"), "png");
    assert_eq!(stages[4].attribute("kiln.images"), "2");
    for (name, value) in [
        ("service.name", "kiln"),
        ("service.version", env!("CARGO_PKG_VERSION")),
        ("deployment.environment", "test"),
    ] {
        assert_eq!(root.resource.get(name).unwrap(), value);
    }
    assert!(!root.resource["service.instance.id"].is_empty());

    // Requests of monitoring have no spans.
    let probed = |span: &&Seen| span.name.contains("health") || span.name.contains("metrics");
    assert_eq!(spans.iter().find(probed).map(|span| &span.name), None);
    let head = collector.heads.lock().unwrap()[0].clone();
    assert!(head.starts_with("post /v1/traces http/1.1\r\n"), "{head}");
    for header in [
        "x-tenant: one",
        "x-more: a b",
        "content-type: application/x-protobuf",
    ] {
        assert!(head.contains(header), "{head}");
    }
    let finished = log
        .lines()
        .find(|line| line.contains("finished in"))
        .unwrap();
    assert!(
        finished.contains(&format!("trace_id=\"{TRACE}\"")),
        "{finished}"
    );
    assert!(
        !log.contains("kiln_trace") && !log.contains("otel."),
        "{log}"
    );
}

#[test]
fn errors_streams_and_cancelled_requests_are_told_apart() {
    let collector = Collector::start(Answer::Success);
    let server = Server::start(&[(ENDPOINT, &collector.url())], &["--log-format", "json"]);
    assert_eq!(server.generate("", r#", "n": "many""#).0, 400);
    assert_eq!(server.get("/no/such/page").0, 404);
    assert_eq!(server.call("PAINT", "/v1/models", "", "").0, 405);
    let (status, stream) = server.generate("", r#", "stream": true"#);
    assert_eq!(status, 200);
    assert!(stream.contains("image_generation.completed"), "{stream}");
    // A client that leaves during the steps.
    let fields = r#", "size": "128x128", "stream": true, "partial_images": 3"#;
    let cancelled = server.send("POST", "/v1/images/generations", "", &body(ENDLESS, fields));
    let mut cancelled = BufReader::new(cancelled);
    let mut line = String::new();
    while !line.contains("partial_image") {
        line.clear();
        assert_ne!(
            cancelled.read_line(&mut line).unwrap(),
            0,
            "the stream ended"
        );
    }
    drop(cancelled);
    let (log, _) = server.end();
    let spans = collector.spans();

    let generations = server_spans(&spans, "POST /v1/images/generations");
    let with = |name: &str, value: &str| {
        let found: Vec<_> = generations
            .iter()
            .filter(|span| span.attribute(name) == value)
            .collect();
        assert_eq!(found.len(), 1, "{name} {value}: {generations:#?}");
        found[0]
    };
    let refused = with("http.response.status_code", "400");
    assert!(
        !refused.failed,
        "an error of the client is none of the server's: {refused:?}"
    );
    assert_eq!(
        spans
            .iter()
            .filter(|span| span.trace == refused.trace)
            .count(),
        1
    );
    let unknown = server_spans(&spans, "GET");
    assert_eq!(unknown[0].attribute("http.response.status_code"), "404");
    assert_eq!(unknown[0].attribute("url.path"), "/no/such/page");
    let other = server_spans(&spans, "HTTP /v1/models");
    assert_eq!(other[0].attribute("http.request.method"), "_OTHER");
    assert_eq!(other[0].attribute("http.request.method_original"), "PAINT");

    let given_up = with("kiln.cancelled", "true");
    let denoise = find(&spans, &given_up.trace, "denoise");
    let done: u32 = denoise.attribute("kiln.steps_done").parse().unwrap();
    assert!((1..ENDLESS).contains(&done), "{denoise:?}");
    assert_eq!(denoise.parent, given_up.id);
    find(&spans, &given_up.trace, "queue");
    let streamed = generations.iter().find(|span| {
        let write = |other: &Seen| other.trace == span.trace && other.name == "write";
        span.id != given_up.id && spans.iter().any(write)
    });
    let streamed = streamed.unwrap();
    // The span of a stream ends with the stream, not with the head of the response.
    assert!(find(&spans, &streamed.trace, "write").end <= streamed.end);
    let line = log
        .lines()
        .find(|line| line.contains("finished in"))
        .unwrap();
    let line: serde_json::Value = serde_json::from_str(line).unwrap();
    assert_eq!(line["span"]["trace_id"], streamed.trace, "{line}");
}

#[test]
fn the_clients_sampled_flag_and_the_sampler_are_respected() {
    let collector = Collector::start(Answer::Success);
    let server = Server::start(&[(ENDPOINT, &collector.url())], &[]);
    for header in [
        format!("traceparent: 00-{TRACE}-{PARENT}-00\r\n"),
        "traceparent: 00-1-2-01\r\n".to_owned(),
        format!("traceparent: 00-{}-{PARENT}-01\r\n", "0".repeat(32)),
    ] {
        assert_eq!(server.generate(&header, "").0, 200);
    }
    server.end();
    let spans = collector.spans();
    let roots = server_spans(&spans, "POST /v1/images/generations");
    assert_eq!(roots.len(), 2, "invalid parents are left out: {roots:#?}");
    assert_eq!(spans.len(), 12);
    assert!(
        roots
            .iter()
            .all(|span| span.parent.is_empty() && span.trace != TRACE)
    );

    let server = Server::start(
        &[
            (ENDPOINT, &collector.url()),
            ("OTEL_TRACES_SAMPLER", "always_off"),
        ],
        &[],
    );
    assert_eq!(server.generate("", "").0, 200);
    server.end();
    let server = Server::start(
        &[(ENDPOINT, &collector.url()), ("OTEL_SDK_DISABLED", "true")],
        &[],
    );
    assert_eq!(server.generate("", "").0, 200);
    let (log, _) = server.end();
    assert!(!log.contains("trace_id"), "{log}");
    assert_eq!(collector.spans().len(), 12);
}

/// The id of a job that is made and has ended. `headers` are those of the request that makes it.
fn job(server: &Server, headers: &str) -> String {
    let (status, reply) = server.call("POST", "/v1/images/jobs", headers, &body(2, ""));
    assert_eq!(status, 202, "{reply}");
    let id = id_of(&reply);
    let (_, reply) = server.get(&format!("/v1/images/jobs/{id}?wait=60"));
    assert!(reply.contains(r#""status":"completed""#), "{reply}");
    id
}

fn id_of(reply: &str) -> String {
    let body = reply.split_once("\r\n\r\n").unwrap().1;
    let body: serde_json::Value = serde_json::from_str(body).unwrap();
    body["id"].as_str().unwrap().to_owned()
}

#[test]
fn a_job_continues_the_trace_of_its_submission() {
    let collector = Collector::start(Answer::Success);
    let folder = tempfile::tempdir().unwrap();
    let jobs = ["--jobs", folder.path().to_str().unwrap()];
    let server = Server::start(&[(ENDPOINT, &collector.url())], &jobs);
    let continued = job(&server, &format!("traceparent: 00-{TRACE}-{PARENT}-01\r\n"));
    let own = job(&server, "");
    job(
        &server,
        &format!("traceparent: 00-{}-{PARENT}-00\r\n", "1".repeat(32)),
    );
    let (log, _) = server.end();

    let spans = collector.spans();
    let runs: Vec<&Seen> = spans.iter().filter(|span| span.name == "job run").collect();
    assert_eq!(
        runs.len(),
        2,
        "a job of a trace that is not sampled has none: {runs:#?}"
    );
    for id in [&continued, &own] {
        let run = runs
            .iter()
            .find(|run| run.attribute("kiln.job.id") == id)
            .unwrap();
        let submit = find(&spans, &run.trace, "job submit");
        let request = find(&spans, &run.trace, "POST /v1/images/jobs");
        assert_eq!((&submit.parent, &run.parent), (&request.id, &submit.id));
        // Server, producer, consumer.
        assert_eq!((request.kind, submit.kind, run.kind), (2, 4, 5));
        assert_eq!(submit.attribute("kiln.job.id"), id);
        assert_eq!(run.attribute("kiln.job.attempt"), "1");
        for stage in ["queue", "encode", "denoise", "decode", "write"] {
            let stage = find(&spans, &run.trace, stage);
            assert_eq!(stage.parent, run.id);
            assert!(
                run.start <= stage.start && stage.end <= run.end,
                "{stage:?} {run:?}"
            );
        }
        assert_eq!((run.trace == TRACE), (id == &continued));
    }
    let line = log
        .lines()
        .find(|line| line.contains("finished in") && line.contains(TRACE));
    assert!(line.unwrap().contains(&continued), "{log}");
}

#[test]
fn a_worker_continues_the_clients_trace_if_the_server_that_took_the_job_has_no_tracing() {
    let collector = Collector::start(Answer::Success);
    let folder = tempfile::tempdir().unwrap();
    let jobs = ["--jobs", folder.path().to_str().unwrap()];
    let server = Server::start(&[], &jobs);
    let header = format!("traceparent: 00-{TRACE}-{PARENT}-01\r\n");
    let body = body(ENDLESS, r#", "size": "128x128""#);
    let (status, reply) = server.call("POST", "/v1/images/jobs", &header, &body);
    assert_eq!(status, 202, "{reply}");
    // Killed before the job has ended.
    drop(server);
    let server = Server::start(&[(ENDPOINT, &collector.url())], &jobs);
    server.get(&format!("/v1/images/jobs/{}?wait=60", id_of(&reply)));
    server.end();
    let spans = collector.spans();
    assert_eq!(find(&spans, TRACE, "job run").parent, PARENT);
}

/// Generates images with a collector of this URL that takes nothing. Returns the log.
fn without_collector(url: &str) -> String {
    let server = Server::start(&[(ENDPOINT, url)], &[]);
    let mut slowest = Duration::ZERO;
    for _ in 0..5 {
        let start = Instant::now();
        assert_eq!(server.generate("", "").0, 200);
        slowest = slowest.max(start.elapsed());
        // Each in a batch of its own.
        thread::sleep(Duration::from_millis(100));
    }
    assert!(slowest < Duration::from_secs(5), "{slowest:?}");
    let (log, took) = server.end();
    assert!(took < Duration::from_secs(10), "{took:?}");
    log
}

#[test]
fn a_collector_that_is_not_there_is_one_warning() {
    let free = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap();
    let refusing = Collector::start(Answer::Error);
    for (url, reason) in [
        (format!("http://{free}/base/"), "refused"),
        (refusing.url(), "400 Bad Request"),
        // Not TLS.
        (format!("https://{}", refusing.address), ""),
    ] {
        let log = without_collector(&url);
        let warnings: Vec<&str> = log.lines().filter(|line| line.contains("WARN")).collect();
        assert_eq!(warnings.len(), 1, "{log}");
        assert!(
            warnings[0].contains("traces cannot be sent to") && warnings[0].contains(reason),
            "{log}"
        );
        assert!(!log.contains("panic"), "{log}");
    }
}

#[test]
fn a_collector_that_hangs_delays_neither_requests_nor_the_end() {
    let hanging = Collector::start(Answer::Never);
    let log = without_collector(&hanging.url());
    let warnings = log.matches("traces cannot be sent to").count();
    assert!(warnings <= 1, "{log}");
    // With the default time limit, the end does not wait for it.
    let environment = [
        (ENDPOINT, hanging.url()),
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "60000".to_owned()),
    ];
    let environment = environment
        .each_ref()
        .map(|(name, value)| (*name, value.as_str()));
    let server = Server::start(&environment, &[]);
    assert_eq!(server.generate("", "").0, 200);
    let (log, took) = server.end();
    assert!(took < Duration::from_secs(10), "{took:?}");
    assert!(log.contains("the last spans were not sent"), "{log}");
}

#[test]
fn an_endpoint_that_is_no_url_is_refused() {
    for (name, value) in [
        (ENDPOINT, "collector"),
        (ENDPOINT, "ftp://collector"),
        ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://"),
        ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "collector:4318"),
    ] {
        let output = Command::new(env!("CARGO_BIN_EXE_kiln"))
            .args(["serve", "--port", "0"])
            .env(name, value)
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{stderr}");
        let begin = format!("error: {name} is \"{value}\", which is not the URL of a collector");
        assert!(stderr.starts_with(&begin), "{stderr}");
    }
}

/// A request to a server, which returns the status of the answer.
type Call<'a> = &'a dyn Fn(&Server) -> u16;

/// Prints milliseconds of requests to a server with tracing and to one without, in turn.
#[test]
#[ignore = "prints figures for docs/performance.md"]
fn what_tracing_costs() {
    let collector = Collector::start(Answer::Success);
    let servers = [
        Server::start(&[], &[]),
        Server::start(&[(ENDPOINT, &collector.url())], &[]),
    ];
    let fields = r#", "size": "32x32""#;
    let calls: [(&str, Call<'_>, usize); 2] = [
        ("GET /v1/models", &|server| server.get("/v1/models").0, 2000),
        (
            "POST /v1/images/generations",
            &|server| {
                let body = body(1, fields);
                server.call("POST", "/v1/images/generations", "", &body).0
            },
            200,
        ),
    ];
    for (name, call, rounds) in calls {
        let mut times = [Vec::new(), Vec::new()];
        for round in 0..2 * rounds {
            let start = Instant::now();
            assert_eq!(call(&servers[round % 2]), 200);
            times[round % 2].push(start.elapsed().as_secs_f64() * 1000.0);
        }
        let [without, with] = times.map(|mut times| {
            times.sort_by(f64::total_cmp);
            times[times.len() / 2]
        });
        eprintln!("{name}: {without:.3} ms without tracing, {with:.3} with, medians of {rounds}");
    }
    let [without, with] = servers;
    without.end();
    with.end();
    assert_eq!(collector.spans().len(), 2000 + 200 * 6);
}
