//! Detects device failures that burn does not report to the caller.
//!
//! burn's GPU backends queue ops and report failures later, at the next wait or read. Two kinds of
//! failure are lost: burn catches a panic on one of its device threads, and it drops the errors of
//! queued ops when it starts to time candidate kernels (autotuning). [`FaultWatch`] records the
//! first kind, [`DeviceCheck`] detects the second.

use std::panic::{self, PanicHookInfo};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, Once, OnceLock, PoisonError};
use std::thread;

use burn_tensor::backend::Backend;

/// A point at which a device had completed all queued work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Checkpoint {
    /// Sequence number of the profiling measurement made here; `None` on backends without
    /// autotuning.
    measurement: Option<u64>,
}

impl Checkpoint {
    /// Whether kernels were timed since `earlier`, the checkpoint before this one. If so, errors
    /// of ops queued in between may be lost.
    pub fn measured_since(self, earlier: Self) -> bool {
        self.measurement != earlier.measurement.map(|number| number + 1)
    }

    #[cfg(feature = "cubecl")]
    fn numbered(number: u64) -> Self {
        Self {
            measurement: Some(number),
        }
    }
}

/// A backend that can report whether its device completed the queued work.
pub trait DeviceCheck: Backend {
    /// Waits until the device has completed all work queued on this thread. The error is the
    /// device's report of failures since the last call, which may be very long.
    fn checkpoint(device: &Self::Device) -> Result<Checkpoint, String> {
        Self::sync(device).map_err(|error| error.to_string())?;
        Ok(Checkpoint { measurement: None })
    }
}

#[cfg(feature = "flex")]
impl DeviceCheck for burn_flex::Flex {}

#[cfg(feature = "ndarray")]
impl DeviceCheck for burn_ndarray::NdArray {}

#[cfg(feature = "cubecl")]
impl<R, F, I, BT> DeviceCheck for burn_cubecl::CubeBackend<R, F, I, BT>
where
    R: burn_cubecl::CubeRuntime,
    F: burn_cubecl::FloatElement,
    I: burn_cubecl::IntElement,
    BT: burn_cubecl::element::BoolElement,
{
    /// Starts and ends an empty profiling measurement to read the number of measurements so far.
    fn checkpoint(device: &Self::Device) -> Result<Checkpoint, String> {
        use burn_cubecl::cubecl::server::ComputeServer;
        use cubecl_common::device::Device;
        use cubecl_common::device_handle::DeviceHandle;
        use cubecl_common::stream_id::StreamId;

        Self::sync(device).map_err(|error| error.to_string())?;
        let stream = StreamId::current();
        let server = DeviceHandle::<R::Server>::new(device.to_id());
        let number = server.submit_blocking(move |server| {
            let token = server
                .start_profile(stream)
                .map_err(|error| error.to_string())?;
            let ended = server.end_profile(stream, token);
            ended
                .map(|_| token.id)
                .map_err(|error| format!("{error:?}"))
        });
        // A `FaultWatch` reports the panic that ended the device's thread.
        number
            .map_err(|_| "the device's thread failed".to_owned())?
            .map(Checkpoint::numbered)
    }
}

#[cfg(feature = "cubecl")]
impl<B: burn_fusion::FusionBackend + DeviceCheck> DeviceCheck for burn_fusion::Fusion<B> {
    fn checkpoint(device: &Self::Device) -> Result<Checkpoint, String> {
        // Flushes the ops that fusion holds back.
        Self::sync(device).map_err(|error| error.to_string())?;
        B::checkpoint(device)
    }
}

/// Records the first panic on a device thread, from `start` until the watch is dropped.
///
/// While a watch exists, the panic hook prints no panic of a device thread, and none of another
/// thread that follows one: the owner of the watch has to report the fault.
#[derive(Debug)]
pub struct FaultWatch {
    first: Slot,
}

/// The message of the first panic, empty until there is one.
type Slot = Arc<OnceLock<String>>;

/// Whether any watch has recorded a panic in this process.
static HAS_FAILED: AtomicBool = AtomicBool::new(false);

/// The slots of all live watches.
static WATCHES: Mutex<Vec<Slot>> = Mutex::new(Vec::new());

impl FaultWatch {
    /// Starts recording. Panics are seen only after [`watch_device_threads`] was called.
    pub fn start() -> Self {
        let first = Slot::default();
        lock_watches().push(Arc::clone(&first));
        Self { first }
    }

    /// Message of the first panic on a device thread since the watch started, or of the first
    /// failure that [`DeviceCheck`] or an upload reported.
    pub fn fault(&self) -> Option<&str> {
        self.first.get().map(String::as_str)
    }
}

impl Drop for FaultWatch {
    fn drop(&mut self) {
        lock_watches().retain(|slot| !Arc::ptr_eq(slot, &self.first));
    }
}

fn lock_watches() -> std::sync::MutexGuard<'static, Vec<Slot>> {
    WATCHES.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Records a failure that is not a panic in every watch.
#[cfg(feature = "cubecl")]
pub(crate) fn record(report: &str) {
    for watch in lock_watches().iter() {
        // A slot keeps its first message.
        watch.set(report.to_owned()).ok();
    }
}

/// Installs the panic hook that [`FaultWatch`] relies on, once per process. Panics that no watch
/// records go to the hook that was set before. A hook that is set later replaces this one.
pub fn watch_device_threads() {
    static INSTALLED: Once = Once::new();
    INSTALLED.call_once(|| {
        let earlier = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            if !record_panic(info) {
                earlier(info);
            }
        }));
    });
}

/// Records the panic if it is a device's. Returns whether the earlier hook should be skipped.
fn record_panic(info: &PanicHookInfo<'_>) -> bool {
    let watches = lock_watches();
    let file = info.location().map_or("", panic::Location::file);
    if is_of_device(thread::current().name(), file) {
        let message = info.payload_as_str().unwrap_or("no message");
        for watch in watches.iter() {
            // A slot keeps its first message.
            watch.set(message.to_owned()).ok();
        }
        let is_first = !HAS_FAILED.load(Ordering::Relaxed);
        HAS_FAILED.fetch_or(!watches.is_empty(), Ordering::Relaxed);
        // Later panics of a failed device are consequences of the recorded one, even without a
        // watch.
        !watches.is_empty() || !is_first
    } else {
        watches.iter().any(|watch| watch.get().is_some())
    }
}

/// Whether a thread belongs to one of burn's devices: two such threads have names, the others are
/// unnamed and run only `CubeCL`'s code.
fn is_of_device(thread: Option<&str>, panicked_in: &str) -> bool {
    match thread {
        Some(name) => name.starts_with("DSU-") || name.starts_with("DSD-"),
        None => panicked_in.contains("cubecl"),
    }
}

#[cfg(test)]
mod tests {
    use std::panic::catch_unwind;

    use super::*;

    fn panic_on_thread(name: &str, message: &'static str) {
        let thread = thread::Builder::new().name(name.to_owned());
        let spawned = thread.spawn(move || panic!("{message}")).unwrap();
        spawned.join().unwrap_err();
    }

    #[test]
    fn a_watch_notes_the_first_panic_of_a_devices_thread() {
        watch_device_threads();
        let watch = FaultWatch::start();
        panic_on_thread("pipeline", "not a device thread");
        assert_eq!(watch.fault(), None);
        panic_on_thread("DSD-0-7", "first");
        panic_on_thread("DSU-0-7", "second");
        assert_eq!(watch.fault(), Some("first"));
        assert_eq!(FaultWatch::start().fault(), None);
        // A panic that follows a fault is not printed.
        catch_unwind(|| panic!("a consequence")).unwrap_err();
    }

    #[test]
    fn device_threads_are_recognised_by_name_or_source_file() {
        let gc = "/cargo/cubecl-runtime-0.10.0/src/stream/event.rs";
        assert!(is_of_device(Some("DSD-0-0"), "anywhere"));
        assert!(is_of_device(Some("DSU-1-3"), "anywhere"));
        assert!(is_of_device(None, gc));
        assert!(!is_of_device(None, "src/main.rs"));
        assert!(!is_of_device(Some("pipeline"), gc));
    }

    #[test]
    fn measurements_between_two_checkpoints_are_detected() {
        let none = Checkpoint { measurement: None };
        let numbered = |number| Checkpoint {
            measurement: Some(number),
        };
        assert!(!none.measured_since(none));
        assert!(!numbered(5).measured_since(numbered(4)));
        assert!(numbered(6).measured_since(numbered(4)));
    }
}
