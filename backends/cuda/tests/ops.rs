//! The property suite of the fused ops on the first NVIDIA GPU. It needs the driver, NVRTC and the
//! CUDA headers, and is not among the tests that `scripts/test.sh` runs.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on should stop")]

#[path = "../../ops/tests/properties/suite.rs"]
mod suite;

use burn_cuda::{Cuda, CudaDevice};

use suite::{Extent, suites, test_every_op};

/// Products may run in TF32, which keeps 11 significant bits of what it multiplies.
const EXTENT: Extent = Extent {
    cases: 32,
    tolerance: 1e-5,
    product_cases: 8,
    product_tolerance: 2e-3,
    f16_product_tolerance: 2e-3,
};

test_every_op!(suites::<Cuda<f32, i32>>(&CudaDevice::default(), EXTENT));
