//! What goes wrong on a device, and where a caller would not see it.
//!
//! burn's GPU backends queue what they are asked for, and report failures later, at the next wait
//! or read. Two kinds of failure get lost on the way: a panic on one of the threads that burn has
//! for a device is caught there, and the errors of ops that were queued before burn measures
//! kernels are dropped when it begins to. [`FaultWatch`] sees the first, [`DeviceCheck`] tells of
//! the second.

use std::panic::{self, PanicHookInfo};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, Once, OnceLock, PoisonError};
use std::thread;

use burn_tensor::backend::Backend;

/// How a device stood when it had done all that it was given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Checkpoint {
    /// The number of this measurement, where kernels are measured.
    measurement: Option<u64>,
}

impl Checkpoint {
    /// Whether kernels were measured between the two. Errors of ops that were given to the device
    /// in between may be lost then.
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

/// A backend that can be asked whether its device did what it was given.
pub trait DeviceCheck: Backend {
    /// Waits until the device has done all that it was given on this thread. The error is the
    /// device's report of what failed since it was last asked, which may be very long.
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
    /// Begins and ends a measurement of nothing: measurements are numbered.
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
        // What went wrong on that thread is for a watch to tell.
        number
            .map_err(|_| "the device's thread failed".to_owned())?
            .map(Checkpoint::numbered)
    }
}

#[cfg(feature = "cubecl")]
impl<B: burn_fusion::FusionBackend + DeviceCheck> DeviceCheck for burn_fusion::Fusion<B> {
    fn checkpoint(device: &Self::Device) -> Result<Checkpoint, String> {
        // What is queued becomes work of the device.
        Self::sync(device).map_err(|error| error.to_string())?;
        B::checkpoint(device)
    }
}

/// Notes the first panic on a thread of a device, from its start until it is dropped.
///
/// Such panics are not reported in any other way while there is a watch: who watches reports them.
/// Nor are the panics of other threads that come after one, as they follow from it.
#[derive(Debug)]
pub struct FaultWatch {
    first: Slot,
}

/// The message of a panic.
type Slot = Arc<OnceLock<String>>;

/// Whether a watch has ever seen a panic.
static HAS_FAILED: AtomicBool = AtomicBool::new(false);

/// Those of all watches.
static WATCHES: Mutex<Vec<Slot>> = Mutex::new(Vec::new());

impl FaultWatch {
    pub fn start() -> Self {
        let first = Slot::default();
        lock_watches().push(Arc::clone(&first));
        Self { first }
    }

    /// The message of the first panic on a device's thread, if there was one.
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

/// Tells every watch of a failure that is no panic.
#[cfg(feature = "cubecl")]
pub(crate) fn note(report: &str) {
    for watch in lock_watches().iter() {
        // The first one stays.
        watch.set(report.to_owned()).ok();
    }
}

/// Lets every [`FaultWatch`] see the panics of devices' threads from now on. Panics that no watch
/// cares for go to the hook that was set before; a hook that is set later sees all of them.
pub fn watch_device_threads() {
    static INSTALLED: Once = Once::new();
    INSTALLED.call_once(|| {
        let earlier = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            if !noted(info) {
                earlier(info);
            }
        }));
    });
}

/// Whether a watch reports the panic.
fn noted(info: &PanicHookInfo<'_>) -> bool {
    let watches = lock_watches();
    let file = info.location().map_or("", panic::Location::file);
    if is_of_device(thread::current().name(), file) {
        let message = info.payload_as_str().unwrap_or("no message");
        for watch in watches.iter() {
            // The first one stays.
            watch.set(message.to_owned()).ok();
        }
        let is_first = !HAS_FAILED.load(Ordering::Relaxed);
        HAS_FAILED.fetch_or(!watches.is_empty(), Ordering::Relaxed);
        // What a device that failed once does while nobody watches, follows from that.
        !watches.is_empty() || !is_first
    } else {
        watches.iter().any(|watch| watch.get().is_some())
    }
}

/// Whether a thread is one of those that burn has for a device: two that have names, and some
/// without, which run nothing but `CubeCL`'s code.
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
        panic_on_thread("pipeline", "not a device's");
        assert_eq!(watch.fault(), None);
        panic_on_thread("DSD-0-7", "first");
        panic_on_thread("DSU-0-7", "second");
        assert_eq!(watch.fault(), Some("first"));
        assert_eq!(FaultWatch::start().fault(), None);
        // What follows from a fault is not reported again.
        catch_unwind(|| panic!("because of it")).unwrap_err();
    }

    #[test]
    fn threads_of_devices_are_known_by_name_or_place() {
        let gc = "/cargo/cubecl-runtime-0.10.0/src/stream/event.rs";
        assert!(is_of_device(Some("DSD-0-0"), "anywhere"));
        assert!(is_of_device(Some("DSU-1-3"), "anywhere"));
        assert!(is_of_device(None, gc));
        assert!(!is_of_device(None, "src/main.rs"));
        assert!(!is_of_device(Some("pipeline"), gc));
    }

    #[test]
    fn measurements_between_two_checkpoints_are_told() {
        let none = Checkpoint { measurement: None };
        let numbered = |number| Checkpoint {
            measurement: Some(number),
        };
        assert!(!none.measured_since(none));
        assert!(!numbered(5).measured_since(numbered(4)));
        assert!(numbered(6).measured_since(numbered(4)));
    }
}
