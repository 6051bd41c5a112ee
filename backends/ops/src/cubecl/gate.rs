//! Selection of the kernels in use: `KILN_KERNELS`, and what [`crate::FusedOps::check_kernels`] found.

use std::env;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use crate::KernelShape;

/// Environment variable that selects which kernels are used.
const VARIABLE: &str = "KILN_KERNELS";

/// An op of [`crate::FusedOps`] that has a kernel on GPU backends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kernel {
    Linear,
    RmsNorm,
    LayerNormModulate,
    QkNormRope,
    Attention,
    Convolution,
    ChannelNorm,
    Elementwise,
}

impl Kernel {
    /// The kernel that computes this shape's op.
    pub(super) fn of(shape: &KernelShape) -> Self {
        match shape {
            KernelShape::Linear { .. } => Self::Linear,
            KernelShape::RmsNorm { .. } => Self::RmsNorm,
            KernelShape::LayerNormModulate { .. } => Self::LayerNormModulate,
            KernelShape::QkNormRope { .. } => Self::QkNormRope,
            KernelShape::Attention { .. } => Self::Attention,
            KernelShape::Convolution { .. } => Self::Convolution,
            KernelShape::ChannelNorm { .. } => Self::ChannelNorm,
            KernelShape::Elementwise { .. } => Self::Elementwise,
        }
    }
}

/// The kernels of a runtime that are disabled because they computed wrong results or failed.
#[derive(Debug)]
pub struct Gate {
    /// One bit per [`Kernel`].
    closed: AtomicU32,
    forces_large_tiles: AtomicBool,
}

impl Gate {
    /// Creates a gate with all kernels in use.
    pub const fn open() -> Self {
        Self {
            closed: AtomicU32::new(0),
            forces_large_tiles: AtomicBool::new(false),
        }
    }

    /// Whether the kernel is in use; if not, its op takes the default body.
    pub fn uses(&self, kernel: Kernel) -> bool {
        switch() != Ok(Switch::Off) && self.closed.load(Ordering::Relaxed) & 1 << kernel as u32 == 0
    }

    /// Disables the kernel for the rest of the process.
    pub fn close(&self, kernel: Kernel) {
        self.closed.fetch_or(1 << kernel as u32, Ordering::Relaxed);
    }

    /// Whether small matrix products use the kernels of large ones, so that a check of those is fast.
    pub fn forces_large_tiles(&self) -> bool {
        self.forces_large_tiles.load(Ordering::Relaxed)
    }

    pub(super) fn force_large_tiles(&self, on: bool) {
        self.forces_large_tiles.store(on, Ordering::Relaxed);
    }
}

/// The value of `KILN_KERNELS`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Switch {
    /// Uses the kernels that pass the comparison with their default bodies.
    On,
    /// Uses no kernels.
    Off,
    /// Uses all kernels without a comparison, which test devices that compute nothing would fail.
    Unchecked,
}

/// Reads `KILN_KERNELS`. The error is a message for the user.
pub(super) fn switch() -> Result<Switch, String> {
    static SWITCH: LazyLock<Result<Switch, String>> = LazyLock::new(|| {
        let value = env::var_os(VARIABLE).unwrap_or_default();
        match value.to_str() {
            Some("on" | "") => Ok(Switch::On),
            Some("off") => Ok(Switch::Off),
            Some("unchecked") => Ok(Switch::Unchecked),
            _ => Err(format!(
                "{VARIABLE} is {}; set it to on, off or unchecked",
                value.display()
            )),
        }
    });
    SWITCH.clone()
}
