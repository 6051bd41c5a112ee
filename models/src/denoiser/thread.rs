//! The thread of a device besides the first, which runs calls one after the other.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{self, JoinHandle};

use kiln_ops::FusedOps;

use super::lane::Lane;

type Call<B> = Box<dyn FnOnce(&mut Lane<B>) + Send>;

/// A lane on a thread of its own. Dropping it waits for the thread's end.
#[derive(Debug)]
pub(super) struct LaneThread<B: FusedOps> {
    calls: Option<Sender<Call<B>>>,
    thread: Option<JoinHandle<()>>,
}

impl<B: FusedOps> LaneThread<B> {
    /// Starts a thread that makes a lane, with all that this allocates on the thread's own stream of
    /// the device.
    ///
    /// # Errors
    /// Those of `make`.
    ///
    /// # Panics
    /// If `make` panics, or the operating system starts no thread.
    pub(super) fn start<E: Send + 'static>(
        name: String,
        make: impl FnOnce() -> Result<Lane<B>, E> + Send + 'static,
    ) -> Result<Self, E> {
        let (calls, received) = channel::<Call<B>>();
        let (made, is_made) = channel();
        let run = move || {
            let lane = catch_unwind(AssertUnwindSafe(make));
            let mut lane = match lane {
                Ok(Ok(lane)) => {
                    made.send(Ok(Ok(()))).ok();
                    lane
                }
                Ok(Err(error)) => return drop(made.send(Ok(Err(error)))),
                Err(panic) => return drop(made.send(Err(panic))),
            };
            // Ends when the sender is dropped.
            for call in received {
                call(&mut lane);
            }
        };
        let thread = thread::Builder::new().name(name).spawn(run);
        let thread = thread.expect("the operating system starts a thread");
        let made = is_made.recv();
        match made.expect("the thread of a device says whether it has a lane") {
            Ok(made) => made?,
            Err(panic) => std::panic::resume_unwind(panic),
        }
        Ok(Self {
            calls: Some(calls),
            thread: Some(thread),
        })
    }

    /// Queues a call. The result is waited for with [`Pending::wait`].
    pub(super) fn call<T: Send + 'static>(
        &self,
        call: impl FnOnce(&mut Lane<B>) -> T + Send + 'static,
    ) -> Pending<T> {
        let (sender, receiver) = channel();
        let call = Box::new(move |lane: &mut Lane<B>| {
            let result = catch_unwind(AssertUnwindSafe(|| call(lane)));
            // An error means that nobody waits.
            sender.send(result).ok();
        });
        if let Some(calls) = &self.calls {
            calls.send(call).ok();
        }
        Pending(receiver)
    }
}

impl<B: FusedOps> Drop for LaneThread<B> {
    fn drop(&mut self) {
        self.calls = None;
        if let Some(thread) = self.thread.take() {
            // A panic has been reported to the caller whose call it was.
            thread.join().ok();
        }
    }
}

/// The result of a call that may not have ended.
#[derive(Debug)]
pub(super) struct Pending<T>(Receiver<thread::Result<T>>);

impl<T> Pending<T> {
    /// Waits for the end of the call.
    ///
    /// # Errors
    /// The payload of the call's panic.
    pub(super) fn wait(self) -> thread::Result<T> {
        let ended = self.0.recv();
        ended.unwrap_or_else(|_| Err(Box::new("the thread of a device has ended")))
    }
}
