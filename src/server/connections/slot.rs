//! What each open connection is doing, and since when.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, watch};

use super::Bounds;

/// All open connections, and why others have been closed.
#[derive(Debug, Default)]
pub(in crate::server) struct Connections {
    open: Mutex<HashMap<u64, Arc<Slot>>>,
    next_id: AtomicU64,
    closed: [AtomicU64; Closed::ALL.len()],
    /// Changes when all connections that are open must end after the request in progress.
    ending: watch::Sender<()>,
}

/// Why the server closed a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::server) enum Closed {
    /// No request came.
    Idle,
    /// The head of a request was not complete in time.
    SlowHead,
    /// The client did not read a response.
    NotRead,
    /// A new connection needed the place.
    ForAnother,
}

impl Closed {
    pub(in crate::server) const ALL: [Self; 4] =
        [Self::Idle, Self::SlowHead, Self::NotRead, Self::ForAnother];

    /// The name in the metrics.
    pub(in crate::server) fn name(self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::SlowHead => "slow_head",
            Self::NotRead => "not_read",
            Self::ForAnother => "for_another",
        }
    }
}

impl Connections {
    /// Adds a connection. It is removed when the returned value is dropped.
    pub(super) fn open(self: &Arc<Self>) -> Open {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let slot = Arc::new(Slot::new());
        self.lock().insert(id, Arc::clone(&slot));
        let connections = Arc::clone(self);
        Open {
            id,
            slot,
            ending: self.ending.subscribe(),
            connections,
        }
    }

    /// Closes the connections that are open and wait for a request, and the others at the end of
    /// their answer. Connections that are opened later are not concerned.
    pub(in crate::server) fn end_open(&self) {
        self.ending.send_replace(());
    }

    /// The number of open connections.
    pub(in crate::server) fn count(&self) -> usize {
        self.lock().len()
    }

    /// The number of connections that the server closed for this reason.
    pub(in crate::server) fn closed(&self, reason: Closed) -> u64 {
        self.closed[reason as usize].load(Ordering::Relaxed)
    }

    /// Closes the connections whose time is over.
    pub(super) fn close_expired(&self, bounds: &Bounds) {
        let now = now();
        for slot in self.lock().values() {
            if let Some(reason) = slot.expired(now, bounds) {
                self.close(slot, reason);
            }
        }
    }

    /// Closes the connections that have waited longest for their client, one in [`AT_ONCE`]; if none
    /// waits, those whose client has read nothing for longest. Returns whether there are any.
    pub(super) fn make_room(&self) -> bool {
        let now = now();
        let open = self.lock();
        let ranked = open
            .values()
            .filter_map(|slot| slot.rank(now).map(|rank| (rank, slot)));
        let mut ranked: Vec<_> = ranked.collect();
        ranked.sort_unstable_by_key(|(rank, _)| *rank);
        for (_, slot) in ranked.iter().take(open.len().div_ceil(AT_ONCE)) {
            self.close(slot, Closed::ForAnother);
        }
        !ranked.is_empty()
    }

    fn close(&self, slot: &Slot, reason: Closed) {
        if !slot.is_closing.swap(true, Ordering::Relaxed) {
            self.closed[reason as usize].fetch_add(1, Ordering::Relaxed);
            slot.close.notify_one();
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<u64, Arc<Slot>>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An open connection.
#[derive(Debug)]
pub(super) struct Open {
    id: u64,
    pub(super) slot: Arc<Slot>,
    /// Changes when the connection must end after the request in progress.
    pub(super) ending: watch::Receiver<()>,
    connections: Arc<Connections>,
}

impl Drop for Open {
    fn drop(&mut self) {
        self.connections.lock().remove(&self.id);
    }
}

/// What a connection is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// It waits for the next request.
    Idle,
    /// The head of a request arrives. A new connection begins so.
    Head,
    /// The body of a request arrives.
    Body,
    /// A request is answered.
    Answer,
}

/// Time without a byte read after which a client counts as one that does not read.
const STALLED: Duration = Duration::from_secs(5);

/// One in this many connections is closed when room is needed, so that there is room for some more.
const AT_ONCE: usize = 32;

/// Time for which a connection that waits for its client stays open in any case: what the client has
/// sent may not have been read yet.
const GRACE_MS: u64 = 50;

/// The state of one connection. Times are milliseconds of [`now`].
#[derive(Debug)]
pub(super) struct Slot {
    phase: Mutex<(Phase, u64)>,
    /// Since when the client has read nothing that waits for it; 0 if nothing waits.
    unread_since: AtomicU64,
    is_closing: AtomicBool,
    close: Notify,
}

impl Slot {
    fn new() -> Self {
        Self {
            phase: Mutex::new((Phase::Head, now())),
            unread_since: AtomicU64::new(0),
            is_closing: AtomicBool::new(false),
            close: Notify::new(),
        }
    }

    pub(super) fn enter(&self, phase: Phase) {
        *self.phase() = (phase, now());
    }

    /// Enters the phase `next` if the phase is `from`.
    pub(super) fn advance(&self, from: Phase, next: Phase) {
        let mut phase = self.phase();
        if phase.0 == from {
            *phase = (next, now());
        }
    }

    /// Notes whether bytes could be written.
    pub(super) fn note_write(&self, is_written: bool) {
        if is_written {
            self.unread_since.store(0, Ordering::Relaxed);
        } else if self.unread_since.load(Ordering::Relaxed) == 0 {
            self.unread_since.store(now(), Ordering::Relaxed);
        }
    }

    /// Completes when the connection must be closed.
    pub(super) async fn told_to_close(&self) {
        self.close.notified().await;
    }

    /// Whether a connection that was told to close must do so: not if a request has arrived, or the
    /// client has read, in the meantime.
    pub(super) fn still_closes(&self) -> bool {
        let is_unread = self.unread_since.load(Ordering::Relaxed) != 0;
        let closes = is_unread || self.phase().0 != Phase::Answer;
        self.is_closing.store(closes, Ordering::Relaxed);
        closes
    }

    /// How long the client has read nothing that waits for it.
    fn unread(&self, now: u64) -> Option<Duration> {
        let since = self.unread_since.load(Ordering::Relaxed);
        (since != 0).then(|| Duration::from_millis(now.saturating_sub(since)))
    }

    /// Why the connection must be closed.
    fn expired(&self, now: u64, bounds: &Bounds) -> Option<Closed> {
        if let Some(unread) = self.unread(now) {
            return (unread >= bounds.stall).then_some(Closed::NotRead);
        }
        let (phase, since) = *self.phase();
        let time = Duration::from_millis(now.saturating_sub(since));
        match phase {
            Phase::Idle => (time >= bounds.idle).then_some(Closed::Idle),
            Phase::Head => (time >= bounds.head).then_some(Closed::SlowHead),
            // The handler limits the time of a body, and so its error reaches the client.
            Phase::Body | Phase::Answer => None,
        }
    }

    /// The place among the connections that may be closed for another: those that wait for their
    /// client first, then those whose client does not read, each by time.
    fn rank(&self, now: u64) -> Option<(bool, u64)> {
        if self.is_closing.load(Ordering::Relaxed) {
            return None;
        }
        if let Some(unread) = self.unread(now) {
            let since = self.unread_since.load(Ordering::Relaxed);
            return (unread >= STALLED).then_some((true, since));
        }
        let (phase, since) = *self.phase();
        let may_close = phase != Phase::Answer && now.saturating_sub(since) >= GRACE_MS;
        may_close.then_some((false, since))
    }

    fn phase(&self) -> MutexGuard<'_, (Phase, u64)> {
        self.phase.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Milliseconds since the first call, plus 1.
fn now() -> u64 {
    static START: LazyLock<Instant> = LazyLock::new(Instant::now);
    u64::try_from(START.elapsed().as_millis()).map_or(u64::MAX, |passed| passed + 1)
}
