//! wgpu against the definitions of the fused ops, and against diffusers, on the best adapter there
//! is. `scripts/test-wgpu.sh` runs it on lavapipe, which computes on the CPU.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on should stop")]
#![expect(
    clippy::print_stdout,
    reason = "--nocapture shows how close each stage is"
)]

#[path = "../../../../models/tests/stages/fixtures.rs"]
#[expect(dead_code, reason = "the models' own tests compare more stages")]
mod fixtures;
mod parity;
#[path = "../../../ops/tests/properties/suite.rs"]
mod suite;

use burn_wgpu::{Wgpu, WgpuDevice};

use suite::{Extent, suites, test_every_op};

/// Few cases: every shape is compiled anew, and lavapipe is slow at that.
const EXTENT: Extent = Extent {
    cases: 8,
    tolerance: 1e-5,
    product_cases: 2,
    product_tolerance: 1e-5,
    f16_product_tolerance: 1e-2,
};

test_every_op!(suites::<Wgpu<f32, i32>>(&WgpuDevice::default(), EXTENT));
