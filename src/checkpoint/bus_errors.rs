//! SIGBUS in the memory map of a weight file: the signal that the system raises where a file was
//! cut short, or its disk or network failed. Its default action ends the process.
//!
//! The handler puts zeros in the place of the map, marks it as broken, and lets the reader go on;
//! who reads weights checks the mark afterwards. A SIGBUS anywhere else goes to the handler that was
//! there before.

use std::ffi::{c_int, c_void};
use std::io;
use std::mem::{self, MaybeUninit};
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// A map that the handler knows, until it is dropped.
#[derive(Debug)]
pub(super) struct Guard(&'static Range);

/// The addresses of one map. The handler may read any of them at any time, so none is ever freed or
/// used for another map: a process maps few files.
#[derive(Debug)]
struct Range {
    start: usize,
    bytes: usize,
    is_mapped: AtomicBool,
    is_broken: AtomicBool,
    next: OnceLock<Box<Self>>,
}

/// The first of all ranges; it is empty.
static FIRST: Range = Range::new(0, 0);

/// What handled SIGBUS before.
static PREVIOUS: OnceLock<Action> = OnceLock::new();

/// Size of a page, for the handler.
static PAGE_BYTES: AtomicUsize = AtomicUsize::new(0);

struct Action(libc::sigaction);

impl Guard {
    /// Guards a map. The first call installs the handler.
    pub(super) fn new(map: &[u8]) -> Self {
        static INSTALLED: OnceLock<()> = OnceLock::new();
        INSTALLED.get_or_init(|| {
            if let Err(error) = install() {
                tracing::warn!(%error, "a weight file that is cut short will end the process");
            }
        });
        let mut place = &FIRST;
        let mut new = Box::new(Range::new(map.as_ptr() as usize, map.len()));
        // Another thread may add a range meanwhile.
        while let Err(unused) = place.next.set(new) {
            new = unused;
            place = place.next.get().map_or(place, |next| next);
        }
        let added = place.next.get().map_or(&FIRST, |added| added);
        Self(added)
    }

    /// Whether a part of the map could not be read. The map reads as zeros from then on.
    pub(super) fn is_broken(&self) -> bool {
        self.0.is_broken.load(Ordering::Acquire)
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.0.is_mapped.store(false, Ordering::Release);
    }
}

impl Range {
    const fn new(start: usize, bytes: usize) -> Self {
        Self {
            start,
            bytes,
            is_mapped: AtomicBool::new(true),
            is_broken: AtomicBool::new(false),
            next: OnceLock::new(),
        }
    }

    /// The mapped range with this address. Safe in a signal handler: it only loads atomics.
    fn with(address: usize, page_bytes: usize) -> Option<&'static Self> {
        let mut next = Some(&FIRST);
        while let Some(range) = next {
            // The last page is mapped as a whole.
            let bytes = range.bytes.next_multiple_of(page_bytes);
            let offset = address.checked_sub(range.start);
            if offset.is_some_and(|offset| offset < bytes)
                && range.is_mapped.load(Ordering::Acquire)
            {
                return Some(range);
            }
            next = range.next.get().map(|next| &**next);
        }
        None
    }
}

#[expect(unsafe_code, reason = "signals and page sizes have no safe interface")]
fn install() -> io::Result<()> {
    // SAFETY: a constant of the system is asked for.
    let page_bytes = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    let page_bytes = usize::try_from(page_bytes).map_err(|_| io::Error::last_os_error())?;
    PAGE_BYTES.store(page_bytes, Ordering::Release);
    let mut previous = MaybeUninit::<libc::sigaction>::uninit();
    // SAFETY: all zeros are a valid `sigaction`: no flags, an empty mask, the default action.
    let mut action: libc::sigaction = unsafe { mem::zeroed() };
    // On the alternative stack, which Rust's threads have.
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    action.sa_sigaction = handle as *const () as usize;
    // SAFETY: both pointers are valid, and `handle` calls nothing that a signal handler may not.
    if unsafe { libc::sigaction(libc::SIGBUS, &raw const action, previous.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call above succeeded, so it wrote the previous action.
    PREVIOUS.get_or_init(|| Action(unsafe { previous.assume_init() }));
    Ok(())
}

/// The handler. It may use neither locks nor the heap.
#[expect(unsafe_code, reason = "signal handlers have no safe interface")]
extern "C" fn handle(signal: c_int, info: *mut libc::siginfo_t, _context: *mut c_void) {
    // SAFETY: the system gives a valid `info` to a handler with `SA_SIGINFO`.
    let address = unsafe { (*info).si_addr() } as usize;
    let page_bytes = PAGE_BYTES.load(Ordering::Acquire);
    if let Some(range) = Range::with(address, page_bytes) {
        // Before the zeros can be read.
        range.is_broken.store(true, Ordering::Release);
        // SAFETY: the range is a read-only map of this program, so no other memory is replaced, and
        // its readers find initialised memory there before and after.
        let mapped = unsafe {
            libc::mmap(
                range.start as *mut c_void,
                range.bytes.next_multiple_of(page_bytes),
                libc::PROT_READ,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if mapped != libc::MAP_FAILED {
            return;
        }
    }
    // An instruction that faulted runs again after the return, and the previous action gets its
    // signal.
    let previous = PREVIOUS.get();
    let previous = previous.map_or(ptr::null(), |Action(action)| &raw const *action);
    if previous.is_null() {
        // SAFETY: the call has no conditions; the process has no way to go on.
        unsafe { libc::abort() };
    }
    // SAFETY: `previous` was returned by the system.
    unsafe { libc::sigaction(libc::SIGBUS, previous, ptr::null_mut()) };
    // SAFETY: as for `si_addr`; and signal handlers may raise signals.
    unsafe {
        // A signal that a process sent has no instruction.
        if (*info).si_code <= 0 {
            libc::raise(signal);
        }
    }
}
