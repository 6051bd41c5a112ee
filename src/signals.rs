//! What this process does with a signal before it installs a handler.

/// Whether a signal is ignored, as SIGHUP is below `nohup`. A handler would replace that.
#[expect(unsafe_code, reason = "only sigaction tells what a signal does")]
pub(crate) fn is_ignored(number: libc::c_int) -> bool {
    let mut action = std::mem::MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: reads the action of a signal into a structure of that type, for which zeros are valid.
    let action = unsafe {
        libc::sigaction(number, std::ptr::null(), action.as_mut_ptr());
        action.assume_init()
    };
    action.sa_sigaction == libc::SIG_IGN
}
