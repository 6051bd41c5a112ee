//! Kernels for the CPU backend flex.

use burn_flex::Flex;

use crate::FusedOps;

impl FusedOps for Flex {}
