//! Which of kiln's kernels are in use.

use std::env;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use crate::KernelShape;

/// The environment variable that says which kernels are used.
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

/// The kernels that a runtime was found to compute wrong with, if any.
#[derive(Debug)]
pub struct Gate {
    closed: AtomicU32,
    tries_large: AtomicBool,
}

impl Gate {
    /// All kernels are in use.
    pub const fn open() -> Self {
        Self {
            closed: AtomicU32::new(0),
            tries_large: AtomicBool::new(false),
        }
    }

    /// Whether the kernel is to be used, rather than the default body of its op.
    pub fn uses(&self, kernel: Kernel) -> bool {
        switch() != Ok(Switch::Off) && self.closed.load(Ordering::Relaxed) & 1 << kernel as u32 == 0
    }

    /// Does not use the kernel again in this process.
    pub fn close(&self, kernel: Kernel) {
        self.closed.fetch_or(1 << kernel as u32, Ordering::Relaxed);
    }

    /// Whether small sizes have the kernels of large ones, so that these can be tried fast.
    pub fn tries_large(&self) -> bool {
        self.tries_large.load(Ordering::Relaxed)
    }

    pub(super) fn try_large(&self, on: bool) {
        self.tries_large.store(on, Ordering::Relaxed);
    }
}

/// Which kernels a user wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Switch {
    /// Those that were compared with the definitions of their ops.
    On,
    /// None.
    Off,
    /// All, without a comparison: devices that compute nothing, for tests, would fail it.
    Unchecked,
}

/// What `KILN_KERNELS` says. The error is for people.
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
