//! Connections over real sockets, with small bounds and a router without a model.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::thread;

use axum::body::Bytes;
use axum::extract::DefaultBodyLimit;
use axum::response::IntoResponse;
use axum::routing::{get, post};
use tokio::sync::oneshot;

use super::*;

/// The default bounds, with short times.
const BOUNDS: Bounds = Bounds {
    max: 100,
    idle: Duration::from_secs(3),
    head: Duration::from_millis(500),
    stall: Duration::from_secs(2),
};

/// More than the buffers of two sockets take.
const LARGE: usize = 64 << 20;

struct TestServer {
    address: SocketAddr,
    connections: Arc<Connections>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl TestServer {
    fn start(bounds: Bounds) -> Self {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap();
        let connections = Arc::<Connections>::default();
        let (stop, stopped) = oneshot::channel::<()>();
        let router = Router::new()
            .route("/fast", get(async || "fast"))
            .route(
                "/slow",
                get(async || {
                    sleep(Duration::from_secs(4)).await;
                    "slow"
                }),
            )
            .route("/large", get(async || Bytes::from(vec![7; LARGE])))
            .route("/body", post(async |body: Bytes| body.len().to_string()))
            .route(
                "/refused",
                post(async || {
                    (axum::http::StatusCode::PAYLOAD_TOO_LARGE, "refused").into_response()
                }),
            )
            .layer(DefaultBodyLimit::max(1 << 20));
        let shared = Arc::clone(&connections);
        let thread = thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_multi_thread()
                .worker_threads(1)
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(async {
                let listener = TcpListener::from_std(listener).unwrap();
                let shutdown = async { drop(stopped.await) };
                serve(listener, router, shared, bounds, shutdown).await;
            });
        });
        Self {
            address,
            connections,
            stop: Some(stop),
            thread: Some(thread),
        }
    }

    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).unwrap();
        let timeout = Some(Duration::from_secs(20));
        stream.set_read_timeout(timeout).unwrap();
        stream.set_write_timeout(timeout).unwrap();
        stream
    }

    /// A connection that has sent this.
    fn send(&self, bytes: &[u8]) -> TcpStream {
        let mut stream = self.connect();
        stream.write_all(bytes).unwrap();
        stream
    }

    fn get(&self, path: &str) -> String {
        let head = format!("GET {path} HTTP/1.1\r\nConnection: close\r\n\r\n");
        rest(&mut self.send(head.as_bytes()))
    }

    fn wait_until(&self, condition: impl Fn(&Connections) -> bool) {
        let start = Instant::now();
        while !condition(&self.connections) {
            assert!(start.elapsed() < Duration::from_secs(20));
            thread::sleep(Duration::from_millis(10));
        }
    }

    fn shut_down(&mut self) {
        self.stop = None;
        self.thread.take().unwrap().join().unwrap();
    }
}

/// All that arrives until the end of the connection, whichever end that is.
fn rest(stream: &mut TcpStream) -> String {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).ok();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// What arrives at once.
fn next(stream: &mut TcpStream) -> String {
    let mut bytes = [0; 4096];
    let count = stream.read(&mut bytes).unwrap();
    String::from_utf8_lossy(&bytes[..count]).into_owned()
}

/// Whether the server has closed this connection.
fn is_closed(stream: &mut TcpStream) -> bool {
    stream.set_nonblocking(true).unwrap();
    let read = stream.read(&mut [0]);
    stream.set_nonblocking(false).unwrap();
    !read.is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock)
}

#[test]
fn the_bounds_leave_descriptors_for_other_files() {
    for (files, max) in [
        (Some(0), 1),
        (Some(1), 1),
        (Some(100), 50),
        (Some(256), 128),
        (Some(1024), 896),
        (Some(4096), 3968),
        (Some(1 << 20), 4096),
        (None, 4096),
    ] {
        assert_eq!(Bounds::of_process(files).max, max, "{files:?}");
    }
}

#[test]
fn a_connection_that_sends_no_whole_head_is_closed() {
    let server = TestServer::start(BOUNDS);
    let start = Instant::now();
    for half in [
        b"".as_slice(),
        b"GET /fast HT",
        b"GET /fast HTTP/1.1\r\nHost: x\r\nX-a",
    ] {
        let mut stream = server.send(half);
        assert_eq!(rest(&mut stream), "");
    }
    // A byte now and then does not help.
    let mut stream = server.connect();
    let sent = (0..100).take_while(|_| {
        thread::sleep(Duration::from_millis(50));
        stream.write_all(b"G").is_ok()
    });
    assert!(sent.count() < 60);
    assert_eq!(server.connections.closed(Closed::SlowHead), 4);
    assert!(start.elapsed() >= 4 * BOUNDS.head);
}

#[test]
fn a_kept_connection_is_closed_after_a_time_without_a_request() {
    let server = TestServer::start(BOUNDS);
    let mut stream = server.connect();
    for _ in 0..3 {
        stream.write_all(b"GET /fast HTTP/1.1\r\n\r\n").unwrap();
        assert!(next(&mut stream).ends_with("fast"));
        // Longer than a head may take.
        thread::sleep(Duration::from_millis(800));
    }
    assert_eq!(rest(&mut stream), "");
    assert_eq!(server.connections.closed(Closed::Idle), 1);
    server.wait_until(|connections| connections.count() == 0);
}

#[test]
fn a_request_that_takes_long_is_answered() {
    let server = TestServer::start(BOUNDS);
    assert!(server.get("/slow").ends_with("slow"));
}

#[test]
fn a_client_that_does_not_read_is_closed_and_one_that_reads_slowly_is_not() {
    let server = TestServer::start(BOUNDS);
    let request = b"GET /large HTTP/1.1\r\nConnection: close\r\n\r\n";
    let unread = server.send(request);
    let mut slow = server.send(request);
    // A little at a time, for several times the limit: the buffers of the sockets hold far more.
    let mut read = 0;
    let mut buffer = vec![0; 256 << 10];
    for _ in 0..20 {
        thread::sleep(BOUNDS.stall / 5);
        slow.read_exact(&mut buffer).unwrap();
        read += buffer.len();
    }
    read += rest(&mut slow).len();
    assert!(read > LARGE, "{read}");
    server.wait_until(|connections| connections.closed(Closed::NotRead) == 1);
    drop(unread);
    assert_eq!(server.connections.closed(Closed::NotRead), 1);
}

#[test]
fn idle_and_half_sent_connections_give_way_to_new_ones() {
    let bounds = Bounds {
        max: 10,
        ..Bounds::default()
    };
    let server = TestServer::start(bounds);
    let slow = server.send(b"GET /slow HTTP/1.1\r\nConnection: close\r\n\r\n");
    let mut kept = server.send(b"GET /fast HTTP/1.1\r\n\r\n");
    assert!(next(&mut kept).ends_with("fast"));
    let mut others = Vec::new();
    for half in [
        b"".as_slice(),
        b"GET /fast HTTP/1.1\r\nX-a",
        b"POST /body HTTP/1.1\r\nContent-Length: 5\r\n\r\nab",
    ] {
        for _ in 0..20 {
            others.push(server.send(half));
        }
        assert!(server.get("/fast").ends_with("fast"));
        assert!(server.connections.count() <= bounds.max);
    }
    // The oldest went first, and the one that is answered not at all.
    assert!(is_closed(&mut kept));
    assert!(is_closed(&mut others[0]));
    assert!(!is_closed(others.last_mut().unwrap()));
    assert!(rest(&mut { slow }).ends_with("slow"));
}

#[test]
fn clients_that_do_not_read_give_way_when_all_others_are_busy() {
    let bounds = Bounds {
        max: 4,
        ..Bounds::default()
    };
    let server = TestServer::start(bounds);
    let unread: Vec<_> = (0..4)
        .map(|_| server.send(b"GET /large HTTP/1.1\r\n\r\n"))
        .collect();
    let start = Instant::now();
    assert!(server.get("/fast").ends_with("fast"));
    assert!(start.elapsed() < Duration::from_secs(15));
    drop(unread);
}

#[test]
fn new_connections_wait_while_all_are_busy() {
    let bounds = Bounds {
        max: 2,
        ..Bounds::default()
    };
    let server = TestServer::start(bounds);
    let slow = b"GET /slow HTTP/1.1\r\nConnection: close\r\n\r\n";
    let busy = [server.send(slow), server.send(slow)];
    assert!(server.get("/fast").ends_with("fast"));
    for mut stream in busy {
        assert!(rest(&mut stream).ends_with("slow"));
    }
}

#[test]
fn an_error_reaches_a_client_that_sends_its_whole_body_first() {
    let server = TestServer::start(Bounds::default());
    // Refused before any of it is read, and after a part of it; with a length, and in chunks.
    for path in ["/refused", "/body"] {
        for head in [
            format!(
                "POST {path} HTTP/1.1\r\nContent-Length: {}\r\n\r\n",
                40 << 20
            ),
            format!("POST {path} HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n2800000\r\n"),
        ] {
            let mut stream = server.send(head.as_bytes());
            for _ in 0..40 {
                stream.write_all(&vec![b'x'; 1 << 20]).unwrap();
            }
            let answer = next(&mut stream);
            assert!(answer.starts_with("HTTP/1.1 413"), "{head}: {answer}");
        }
    }
}

#[test]
fn an_unwanted_body_is_not_read_without_end() {
    let server = TestServer::start(Bounds::default());
    let head = "POST /refused HTTP/1.1\r\nContent-Length: 1000000000000\r\n\r\n";
    let mut stream = server.send(head.as_bytes());
    let chunk = vec![b'x'; 1 << 20];
    let sent = (0..1000).take_while(|_| stream.write_all(&chunk).is_ok());
    let sent = sent.count();
    // Buffers of the sockets take some more.
    assert!((64..128).contains(&sent), "{sent} MiB");
    // One that sends no more is closed after a time.
    let mut stream = server.send(head.as_bytes());
    let start = Instant::now();
    assert!(rest(&mut stream).starts_with("HTTP/1.1 413"));
    assert!(start.elapsed() < Duration::from_secs(10));
}

#[test]
fn a_body_that_waits_for_a_continue_is_asked_for_only_if_it_is_wanted() {
    let server = TestServer::start(Bounds::default());
    let head = |path: &str| {
        format!("POST {path} HTTP/1.1\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n")
    };
    let mut stream = server.send(head("/refused").as_bytes());
    assert!(rest(&mut stream).starts_with("HTTP/1.1 413"));
    let mut stream = server.send(head("/body").as_bytes());
    assert!(next(&mut stream).starts_with("HTTP/1.1 100"));
    stream.write_all(b"12345").unwrap();
    assert!(next(&mut stream).ends_with("\r\n5"));
}

#[test]
fn a_large_head_is_refused() {
    let server = TestServer::start(BOUNDS);
    let head = |bytes: usize| format!("GET /fast HTTP/1.1\r\nX: {}\r\n", "x".repeat(bytes));
    let mut stream = server.send(format!("{}\r\n", head(60_000)).as_bytes());
    assert!(next(&mut stream).ends_with("fast"));
    // Before it has arrived as a whole.
    let mut stream = server.send(head(70_000).as_bytes());
    assert!(next(&mut stream).starts_with("HTTP/1.1 431"));
}

#[test]
fn requests_that_are_sent_at_once_are_answered_in_order() {
    let server = TestServer::start(BOUNDS);
    let body = "POST /body HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc";
    let fast = "GET /fast HTTP/1.1\r\nUpgrade: h2c\r\nConnection: Upgrade\r\n\r\n";
    let last = "GET /fast HTTP/1.1\r\nConnection: close\r\n\r\n";
    let answers = rest(&mut server.send(format!("{body}{fast}{body}{last}").as_bytes()));
    let bodies: Vec<&str> = answers
        .split("HTTP/1.1 200 OK\r\n")
        .filter_map(|answer| answer.split("\r\n\r\n").nth(1))
        .collect();
    assert_eq!(bodies, ["3", "fast", "3", "fast"]);
}

#[test]
fn a_shutdown_finishes_requests_and_closes_idle_connections() {
    let mut server = TestServer::start(Bounds::default());
    let mut kept = server.send(b"GET /fast HTTP/1.1\r\n\r\n");
    assert!(next(&mut kept).ends_with("fast"));
    let silent = server.connect();
    let mut slow = server.send(b"GET /slow HTTP/1.1\r\n\r\n");
    server.wait_until(|connections| connections.count() == 3);
    thread::sleep(Duration::from_millis(200));
    let start = Instant::now();
    server.shut_down();
    assert!(start.elapsed() < Duration::from_secs(8));
    assert!(rest(&mut slow).ends_with("slow"));
    assert_eq!(rest(&mut kept), "");
    silent.shutdown(Shutdown::Both).ok();
    assert_eq!(server.connections.count(), 0);
}

#[test]
fn open_connections_end_after_their_request_and_later_ones_are_answered() {
    let server = TestServer::start(BOUNDS);
    let mut idle = server.send(b"GET /fast HTTP/1.1\r\nHost: x\r\n\r\n");
    assert!(next(&mut idle).ends_with("fast"));
    let mut busy = server.send(b"POST /body HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\nab");
    server.wait_until(|connections| connections.count() == 2);
    thread::sleep(Duration::from_millis(50));
    server.connections.end_open();
    assert_eq!(rest(&mut idle), "");
    busy.write_all(b"cd").unwrap();
    let answer = rest(&mut busy).to_lowercase();
    assert!(answer.contains("connection: close\r\n"), "{answer}");
    assert!(answer.ends_with("\r\n\r\n4"), "{answer}");
    // One that is opened later is not concerned.
    let mut later = server.send(b"GET /fast HTTP/1.1\r\nHost: x\r\n\r\n");
    assert!(next(&mut later).ends_with("fast"));
    assert!(!is_closed(&mut later));
}
