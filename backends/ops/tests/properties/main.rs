//! Runs the property tests of the fused ops on the CPU backends.

#![cfg(feature = "flex")]
#![expect(clippy::unwrap_used, reason = "a test that cannot go on should stop")]

mod low_rank;
mod suite;

/// Tolerances for results that are both computed in f32 and differ in the order of additions.
const EXTENT: suite::Extent = suite::Extent {
    cases: 64,
    tolerance: 3e-6,
    product_cases: 64,
    product_tolerance: 3e-6,
    f16_product_tolerance: 2e-3,
};

mod flex {
    use burn_flex::{Flex, FlexDevice};

    use crate::suite::{suites, test_every_op};

    test_every_op!(suites::<Flex>(&FlexDevice, crate::EXTENT));
    test_every_op!(suites::<Flex>(&FlexDevice, crate::EXTENT); attention_by_ops);
}

/// ndarray takes the default bodies too, but computes burn's ops with code independent of flex.
#[cfg(feature = "ndarray")]
mod ndarray {
    use burn_ndarray::{NdArray, NdArrayDevice};

    use crate::suite::{suites, test_every_op};

    test_every_op!(suites::<NdArray>(&NdArrayDevice::Cpu, crate::EXTENT));
    test_every_op!(suites::<NdArray>(&NdArrayDevice::Cpu, crate::EXTENT); attention_by_ops);
}
