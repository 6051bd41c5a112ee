//! Saves address space where it is limited.

/// Makes all threads share one heap if the address space of this process is limited (`ulimit -v`).
///
/// glibc reserves 64 MiB of address space for the heap of each further thread: eight threads would
/// take 512 MiB of a limit, and use next to nothing of it. Must be called before threads are started.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
pub(super) fn share_in_limited_address_space() {
    use rustix::process::{Resource, getrlimit};

    if getrlimit(Resource::As).current.is_some() {
        #[expect(unsafe_code, reason = "only mallopt sets the number of heaps")]
        // SAFETY: sets a number, before there are other threads. A failure leaves the default.
        unsafe {
            libc::mallopt(libc::M_ARENA_MAX, 1);
        }
    }
}

/// Does nothing: other allocators reserve little.
#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
pub(super) fn share_in_limited_address_space() {}
