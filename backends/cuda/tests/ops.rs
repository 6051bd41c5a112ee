//! The fused ops against their definitions, and the pipeline against diffusers, on the first NVIDIA
//! GPU. It needs the driver, NVRTC and the CUDA headers; `scripts/test-cuda.sh` runs it without.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on should stop")]
#![expect(
    clippy::print_stdout,
    reason = "--nocapture shows how close each stage is"
)]

#[path = "../../../models/tests/stages/backend_parity.rs"]
mod backend_parity;
#[path = "../../../models/tests/stages/fixtures.rs"]
#[expect(dead_code, reason = "the models' own tests compare more stages")]
mod fixtures;
#[path = "../../ops/tests/properties/suite.rs"]
#[expect(dead_code, reason = "what burn's own products compute is not tested")]
mod suite;

use std::env;

use burn_cuda::{Cuda, CudaDevice};

use backend_parity::draws_what_diffusers_draws;
use kiln_models::families::CheckpointParts;
use kiln_models::loading::LoadOptions;
use kiln_models::pipeline::Pipeline;
use suite::{Extent, suites, test_every_op};

/// `KILN_CASES` is the number of cases of each op.
fn extent() -> Extent {
    let cases = env::var("KILN_CASES").map_or(8, |cases| cases.parse().unwrap());
    Extent {
        cases,
        tolerance: 1e-5,
        product_cases: cases,
        product_tolerance: 1e-5,
        f16_product_tolerance: 2e-3,
    }
}

/// Guidance, and sizes that are powers of two.
#[test]
fn base() {
    draws_what_diffusers_draws("base", open);
}

/// One step, odd sizes, and a VAE in tiles.
#[test]
fn tiled_odd() {
    draws_what_diffusers_draws("tiled_odd", open);
}

/// bf16 weights.
#[test]
fn demo() {
    draws_what_diffusers_draws("demo", open);
}

fn open(parts: &CheckpointParts, options: LoadOptions) -> Box<dyn Pipeline> {
    let device = kiln_cuda::devices().unwrap().remove(0);
    println!("on {}", device.name);
    kiln_cuda::open(&device, parts, options).unwrap()
}

test_every_op!(suites::<Cuda<f32, i32>>(&CudaDevice::default(), extent()));
