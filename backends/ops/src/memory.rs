//! Memory use of devices.

use burn_tensor::backend::Backend;

/// Memory held for this process, in bytes; `None` where the backend does not count it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MemoryUse {
    /// Bytes of live tensors; on CPU backends the resident memory of the process.
    pub in_use: Option<u64>,
    /// Bytes allocated on the device, including memory cached for later tensors.
    pub reserved: Option<u64>,
    /// Peak since the start of the process.
    pub peak: Option<u64>,
}

/// Memory that this process can still allocate, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryRoom {
    /// What can be allocated now.
    pub free: u64,
    /// What could be allocated besides what this process holds now, if no other program held memory.
    pub total: u64,
}

/// A backend that reports the memory use of its devices.
pub trait MemoryReport: Backend {
    /// Reads the memory use of a device. Call it on the thread that created the device's tensors:
    /// GPU backends count per thread.
    fn memory_use(device: &Self::Device) -> MemoryUse;

    /// Reads what can still be allocated on a device; `None` where the backend does not know it.
    fn memory_room(_device: &Self::Device) -> Option<MemoryRoom> {
        None
    }
}

#[cfg(feature = "flex")]
impl MemoryReport for burn_flex::Flex {
    fn memory_use(_device: &Self::Device) -> MemoryUse {
        crate::host::process_memory()
    }

    fn memory_room(_device: &Self::Device) -> Option<MemoryRoom> {
        crate::host_room::room()
    }
}

#[cfg(feature = "ndarray")]
impl MemoryReport for burn_ndarray::NdArray {
    fn memory_use(_device: &Self::Device) -> MemoryUse {
        crate::host::process_memory()
    }

    fn memory_room(_device: &Self::Device) -> Option<MemoryRoom> {
        crate::host_room::room()
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
        // A failed device has no numbers; the failure itself is reported elsewhere.
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
