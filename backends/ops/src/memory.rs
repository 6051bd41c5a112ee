//! What a device holds in memory.

use burn_tensor::backend::Backend;

/// Memory held for this program, in bytes; `None` where the backend does not count.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MemoryUse {
    /// Of tensors that are alive; on a CPU all that the process holds.
    pub in_use: Option<u64>,
    /// Taken from the device, with what is kept for tensors to come.
    pub reserved: Option<u64>,
    /// The most that was held at once since the program began.
    pub peak: Option<u64>,
}

/// A backend that tells what its devices hold.
pub trait MemoryReport: Backend {
    /// Call it on the thread that the device's tensors were made on: GPU backends count by thread.
    fn memory_use(device: &Self::Device) -> MemoryUse;
}

#[cfg(feature = "flex")]
impl MemoryReport for burn_flex::Flex {
    fn memory_use(_device: &Self::Device) -> MemoryUse {
        crate::host::process_memory()
    }
}

#[cfg(feature = "ndarray")]
impl MemoryReport for burn_ndarray::NdArray {
    fn memory_use(_device: &Self::Device) -> MemoryUse {
        crate::host::process_memory()
    }
}

#[cfg(feature = "cubecl")]
impl<R, F, I, BT> MemoryReport for burn_cubecl::CubeBackend<R, F, I, BT>
where
    R: burn_cubecl::CubeRuntime,
    F: burn_cubecl::FloatElement,
    I: burn_cubecl::IntElement,
    BT: burn_cubecl::element::BoolElement,
{
    fn memory_use(device: &Self::Device) -> MemoryUse {
        // A device that failed has nothing to tell; what failed says so by itself.
        R::client(device).memory_usage().map_or_else(
            |_| MemoryUse::default(),
            |usage| MemoryUse {
                in_use: Some(usage.bytes_in_use),
                reserved: Some(usage.bytes_reserved),
                peak: None,
            },
        )
    }
}

#[cfg(feature = "cubecl")]
impl<B: burn_fusion::FusionBackend + MemoryReport> MemoryReport for burn_fusion::Fusion<B> {
    fn memory_use(device: &Self::Device) -> MemoryUse {
        B::memory_use(device)
    }
}
