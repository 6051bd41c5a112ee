//! The connections of the server: how many are open, how long each may do nothing, and which ones
//! are closed when there are too many.
//!
//! A connection whose request is being answered is closed only if its client does not read. Others
//! have a time limit, and the one that has been waiting longest gives way when a new connection
//! needs its place.

mod body;
mod slot;
#[cfg(test)]
mod tests;

use std::convert::Infallible;
use std::io;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Body;
use axum::extract::Request;
use axum::http::Response;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{interval, sleep, timeout};
use tower::ServiceExt;

use self::body::{Received, Sent};
use self::slot::{Open, Phase, Slot};

pub(super) use self::slot::{Closed, Connections};

/// Bounds of connections.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bounds {
    /// Connections that may be open at a time.
    max: usize,
    /// How long a connection may wait for its next request. Longer than load balancers keep their
    /// idle connections, which is 60 s as a rule, so that they close first.
    idle: Duration,
    /// How long the head of a request may take, from its first byte; of the first request, from the
    /// start of the connection.
    head: Duration,
    /// How long a client may read nothing of a response.
    stall: Duration,
}

impl Bounds {
    /// The most connections, where the process may open more files than that.
    const MAX: usize = 4096;

    /// Descriptors that are kept for other files: those of the model, of the log, of a GPU.
    const OTHER_FILES: usize = 128;

    /// The bounds of a process that may open this number of files.
    fn of_process(files: Option<u64>) -> Self {
        let files = files.map_or(usize::MAX, |files| {
            usize::try_from(files).unwrap_or(usize::MAX)
        });
        let left = files.saturating_sub(Self::OTHER_FILES).max(files / 2);
        Self {
            max: left.clamp(1, Self::MAX),
            idle: Duration::from_secs(75),
            head: Duration::from_secs(30),
            stall: Duration::from_mins(1),
        }
    }
}

impl Default for Bounds {
    fn default() -> Self {
        Self::of_process(max_open_files())
    }
}

/// Size of a request's head; larger ones are answered with 431.
const MAX_HEAD_BYTES: usize = 64 << 10;

/// How often the time limits are checked.
const CHECK_INTERVAL: Duration = Duration::from_millis(500);

/// How long to wait before another connection is asked to make room, or `accept` is tried again.
const RETRY: Duration = Duration::from_millis(10);

/// The least time between two log lines about one lack.
const LOG_INTERVAL: Duration = Duration::from_secs(30);

/// Unsent bytes that the kernel takes of a response. Few, so that a client that reads slowly is seen
/// to read: each time it has read this much, there is room for more.
#[cfg(any(target_os = "linux", target_os = "android"))]
const MAX_UNSENT_BYTES: u32 = 128 << 10;

/// Time without a packet after which a client is asked for one, and the time between further
/// questions. The system closes the connection after some of them, nine on Linux.
const KEEPALIVE: Duration = Duration::from_mins(1);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(15);

/// Answers requests with a router until `shutdown` is ready, then finishes the requests that have
/// begun.
pub(super) async fn serve(
    listener: TcpListener,
    router: Router,
    connections: Arc<Connections>,
    bounds: Bounds,
    shutdown: impl Future<Output = ()>,
) {
    let places = Arc::new(Semaphore::new(bounds.max));
    let mut acceptor = Acceptor {
        listener,
        places: Arc::clone(&places),
        connections: Arc::clone(&connections),
        full: LogLimit::default(),
        failed: LogLimit::default(),
    };
    tokio::select! {
        () = shutdown => {}
        () = acceptor.run(&router) => {}
        () = close_expired(&connections, &bounds) => {}
    }
    // From here on, clients that connect are refused.
    drop(acceptor);
    connections.end_open();
    let all = u32::try_from(bounds.max).unwrap_or(u32::MAX);
    drop(places.acquire_many(all).await);
}

/// Closes connections whose time is over, without end.
async fn close_expired(connections: &Connections, bounds: &Bounds) {
    let mut check = interval(CHECK_INTERVAL);
    loop {
        check.tick().await;
        connections.close_expired(bounds);
    }
}

/// Accepts connections for which there is a place.
struct Acceptor {
    listener: TcpListener,
    places: Arc<Semaphore>,
    connections: Arc<Connections>,
    full: LogLimit,
    failed: LogLimit,
}

impl Acceptor {
    /// Accepts connections, without end.
    async fn run(&mut self, router: &Router) {
        loop {
            let stream = self.accept().await;
            let place = self.place().await;
            let open = self.connections.open();
            tokio::spawn(connection(stream, router.clone(), open, place));
        }
    }

    async fn accept(&mut self) -> TcpStream {
        loop {
            match self.listener.accept().await {
                Ok((stream, _)) => return stream,
                // The client has given up.
                Err(error) if is_of_client(&error) => {}
                Err(error) => {
                    if self.failed.allows() {
                        tracing::error!(
                            %error,
                            "cannot accept a connection; if too many files are open, raise their \
                             limit (ulimit -n)"
                        );
                    }
                    self.connections.make_room();
                    sleep(RETRY).await;
                }
            }
        }
    }

    /// A place for a connection. If there is none, another connection has to close.
    async fn place(&mut self) -> OwnedSemaphorePermit {
        loop {
            if let Ok(place) = Arc::clone(&self.places).try_acquire_owned() {
                return place;
            }
            let closes = self.connections.make_room();
            if self.full.allows() {
                let open = self.connections.count();
                let what = if closes {
                    "those that have been idle longest are closed"
                } else {
                    "new ones wait for one to become idle"
                };
                tracing::warn!("{open} connections are open, which is the limit: {what}");
            }
            if let Ok(Ok(place)) = timeout(RETRY, Arc::clone(&self.places).acquire_owned()).await {
                return place;
            }
        }
    }
}

/// Whether a failure of `accept` concerns one connection only.
fn is_of_client(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted
            | io::ErrorKind::ConnectionRefused
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::Interrupted
    )
}

/// Answers the requests of one connection.
async fn connection(
    stream: TcpStream,
    router: Router,
    mut open: Open,
    _place: OwnedSemaphorePermit,
) {
    let slot = &open.slot;
    let ending = &mut open.ending;
    if let Err(error) = set_options(&stream) {
        tracing::debug!(%error, "a connection keeps its default options");
    }
    let service = {
        let slot = Arc::clone(slot);
        service_fn(move |request| answer(router.clone(), request, Arc::clone(&slot)))
    };
    let io = TokioIo::new(Watched {
        stream,
        slot: Arc::clone(slot),
    });
    let mut builder = http1::Builder::new();
    builder.max_header_size(MAX_HEAD_BYTES);
    let mut http = pin!(builder.serve_connection(io, service));
    let mut is_ending = false;
    loop {
        tokio::select! {
            biased;
            outcome = &mut http => return log_end(outcome),
            () = slot.told_to_close() => {
                if slot.still_closes() {
                    return;
                }
            }
            // Whether it changed or the sender is gone.
            _ = ending.changed(), if !is_ending => {
                is_ending = true;
                http.as_mut().graceful_shutdown();
            }
        }
    }
}

fn log_end(outcome: hyper::Result<()>) {
    if let Err(error) = outcome {
        tracing::debug!("a connection ended: {}", crate::error_chain(&error));
    }
}

fn set_options(stream: &TcpStream) -> io::Result<()> {
    // Events are small, and each is to arrive at once.
    stream.set_nodelay(true)?;
    let socket = SockRef::from(stream);
    #[cfg(any(target_os = "linux", target_os = "android"))]
    socket.set_tcp_notsent_lowat(MAX_UNSENT_BYTES)?;
    // Tells that a client has lost its network, for which an image is being generated.
    let keepalive = TcpKeepalive::new().with_time(KEEPALIVE);
    socket.set_tcp_keepalive(&keepalive.with_interval(KEEPALIVE_INTERVAL))
}

async fn answer(
    router: Router,
    request: hyper::Request<Incoming>,
    slot: Arc<Slot>,
) -> Result<Response<Sent>, Infallible> {
    let (head, body) = request.into_parts();
    let body = Received::new(body, &head.headers, Arc::clone(&slot));
    let request = Request::from_parts(head, Body::new(body));
    let response = router.oneshot(request).await?;
    Ok(response.map(|body| Sent::new(body, slot)))
}

/// A stream that notes when its client begins a request, and since when it does not read.
struct Watched {
    stream: TcpStream,
    slot: Arc<Slot>,
}

impl Watched {
    fn note<T>(&self, written: Poll<T>) -> Poll<T> {
        self.slot.note_write(written.is_ready());
        written
    }
}

impl AsyncRead for Watched {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let read = Pin::new(&mut self.stream).poll_read(context, buffer);
        if read.is_ready() {
            self.slot.advance(Phase::Idle, Phase::Head);
        }
        read
    }
}

impl AsyncWrite for Watched {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.note(written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(context, slices);
        self.note(written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

/// Allows a log line from time to time.
#[derive(Debug, Default)]
struct LogLimit {
    last: Option<Instant>,
}

impl LogLimit {
    fn allows(&mut self) -> bool {
        let is_due = self.last.is_none_or(|last| last.elapsed() >= LOG_INTERVAL);
        if is_due {
            self.last = Some(Instant::now());
        }
        is_due
    }
}

/// Raises the number of files that this process may open to the most that the system allows it.
pub fn raise_open_file_limit() {
    #[cfg(unix)]
    {
        use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

        let limit = getrlimit(Resource::Nofile);
        let raised = |current| Rlimit { current, ..limit };
        // macOS has a lower limit than the one that it reports.
        if setrlimit(Resource::Nofile, raised(limit.maximum)).is_err()
            && limit.current.is_some_and(|files| files < MACOS_OPEN_MAX)
        {
            setrlimit(Resource::Nofile, raised(Some(MACOS_OPEN_MAX))).ok();
        }
    }
}

/// The most files that a process may open by default on macOS.
#[cfg(unix)]
const MACOS_OPEN_MAX: u64 = 10_240;

/// The number of files that this process may open; `None` if there is no limit.
fn max_open_files() -> Option<u64> {
    #[cfg(unix)]
    {
        rustix::process::getrlimit(rustix::process::Resource::Nofile).current
    }
    #[cfg(not(unix))]
    {
        None
    }
}
