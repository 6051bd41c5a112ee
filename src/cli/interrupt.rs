//! Ends an interrupted command without leaving temporary files.

use std::io;
use std::sync::OnceLock;

use tokio::runtime::{Builder, Runtime};

/// Makes the signals that end this process remove the temporary files of [`crate::files`] first. The
/// process then ends as it would without this: shells see the signal. Ignored signals, such as
/// SIGHUP below nohup, stay ignored.
pub(super) fn clean_up_on_signals() {
    static LISTENER: OnceLock<Option<Runtime>> = OnceLock::new();
    LISTENER.get_or_init(|| {
        let runtime = Builder::new_multi_thread()
            .worker_threads(1)
            .enable_io()
            .build()
            .and_then(|runtime| listen(&runtime).map(|()| runtime));
        // Without it the command can still write, and only an interrupted one leaves its file.
        runtime
            .inspect_err(|error| tracing::warn!(%error, "cannot listen for signals"))
            .ok()
    });
}

#[cfg(unix)]
fn listen(runtime: &Runtime) -> io::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};

    use crate::signals::is_ignored;

    let _context = runtime.enter();
    let ends = [libc::SIGHUP, libc::SIGINT, libc::SIGQUIT, libc::SIGTERM];
    for number in ends.into_iter().filter(|&number| !is_ignored(number)) {
        let mut stream = signal(SignalKind::from_raw(number))?;
        runtime.spawn(async move {
            stream.recv().await;
            crate::files::remove_unfinished(|| end_by(number));
        });
    }
    // With a handler a write above `ulimit -f` fails, instead of ending the process.
    signal(SignalKind::from_raw(libc::SIGXFSZ)).map(drop)
}

#[cfg(not(unix))]
fn listen(runtime: &Runtime) -> io::Result<()> {
    runtime.spawn(async {
        if tokio::signal::ctrl_c().await.is_ok() {
            // The code of a process that ctrl-c ended.
            #[expect(clippy::exit, reason = "the command is interrupted")]
            crate::files::remove_unfinished(|| std::process::exit(0xC000_013A_u32 as i32));
        }
    });
    Ok(())
}

/// Ends the process as the signal does by default.
#[cfg(unix)]
#[expect(unsafe_code, reason = "signals have no safe interface")]
fn end_by(number: libc::c_int) {
    // SAFETY: installs no handler, and no other thread of a command changes this signal.
    unsafe {
        libc::signal(number, libc::SIG_DFL);
        libc::raise(number);
    }
}
