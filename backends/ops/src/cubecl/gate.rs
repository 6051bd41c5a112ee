//! Which of kiln's kernels are in use.

use std::env;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::KernelShape;

/// The environment variable that turns all kernels off.
const SWITCH: &str = "KILN_KERNELS";

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
        }
    }
}

/// The kernels that a runtime was found to compute wrong with, if any.
#[derive(Debug)]
pub struct Gate(AtomicU32);

impl Gate {
    /// All kernels are in use.
    pub const fn open() -> Self {
        Self(AtomicU32::new(0))
    }

    /// Whether the kernel is to be used, rather than the default body of its op.
    pub fn uses(&self, kernel: Kernel) -> bool {
        static OFF: LazyLock<bool> = LazyLock::new(|| kernels_are_off() == Ok(true));
        !*OFF && self.0.load(Ordering::Relaxed) & 1 << kernel as u32 == 0
    }

    /// Does not use the kernel again in this process.
    pub fn close(&self, kernel: Kernel) {
        self.0.fetch_or(1 << kernel as u32, Ordering::Relaxed);
    }
}

/// What `KILN_KERNELS` says. The error is for people.
pub(super) fn kernels_are_off() -> Result<bool, String> {
    match env::var_os(SWITCH) {
        None => Ok(false),
        Some(value) if value == "on" || value.is_empty() => Ok(false),
        Some(value) if value == "off" => Ok(true),
        Some(value) => Err(format!(
            "{SWITCH} is {}; set it to on or off",
            value.display()
        )),
    }
}
