//! Compares the fused ops on wgpu with their default bodies, and the pipeline with diffusers, on the
//! first adapter. `scripts/test-wgpu.sh` runs it on lavapipe, which computes on the CPU.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on should stop")]
#![expect(
    clippy::print_stdout,
    reason = "--nocapture prints the difference at each stage"
)]

#[path = "../../../../models/tests/stages/adapter_cases.rs"]
#[expect(dead_code, reason = "the tests of models/ check more")]
mod adapter_cases;
#[path = "../../../../models/tests/stages/backend_parity.rs"]
mod backend_parity;
#[path = "../../../../models/tests/stages/fixtures.rs"]
#[expect(dead_code, reason = "the tests of models/ compare more stages")]
mod fixtures;
#[path = "../../../ops/tests/properties/suite.rs"]
mod suite;

use burn_wgpu::{Wgpu, WgpuDevice};

use backend_parity::generates_what_diffusers_generates;
use kiln_models::families::CheckpointParts;
use kiln_models::loading::{LoadOptions, ModelDType};
use kiln_models::pipeline::Pipeline;
use suite::{Extent, suites, test_every_op};

/// Few cases: every shape compiles new kernels, which is slow on lavapipe.
const EXTENT: Extent = Extent {
    cases: 8,
    tolerance: 1e-5,
    product_cases: 2,
    product_tolerance: 1e-5,
    f16_product_tolerance: 1e-2,
};

/// Covers true CFG, and sizes that are powers of two.
#[test]
fn base() {
    generates_what_diffusers_generates("base", open);
}

/// Covers one step, odd sizes, and VAE tiling.
#[test]
fn tiled_odd() {
    generates_what_diffusers_generates("tiled_odd", open);
}

/// Covers bf16 weights, which WGSL has no type for, with the bundled demo model.
#[test]
fn demo() {
    generates_what_diffusers_generates("demo", open);
}

/// Covers adapters of the blocks' linear layers.
#[test]
fn adapter_of_the_blocks() {
    adapter_cases::generates_what_diffusers_generates("twelve", &open);
}

/// Covers adapters of the modulation layers.
#[test]
fn adapter_of_the_modulation() {
    adapter_cases::generates_what_diffusers_generates("modulation", &open);
}

/// Covers jobs with and without adapters in one step. A product may round otherwise on another number of
/// rows.
#[test]
fn adapters_in_one_step() {
    let options = LoadOptions {
        dtype: Some(ModelDType::F32),
        ..LoadOptions::default()
    };
    let mut pipeline = open(&fixtures::parts("base"), options);
    adapter_cases::jobs_do_not_depend_on_their_company(&mut *pipeline, 2e-5, 2e-5);
}

fn open(parts: &CheckpointParts, options: LoadOptions) -> Box<dyn Pipeline> {
    let device = kiln_wgpu::devices().unwrap().remove(0);
    println!("on {}", device.name);
    kiln_wgpu::open(&[device], parts, options).unwrap()
}

test_every_op!(suites::<Wgpu<f32, i32>>(&WgpuDevice::default(), EXTENT));
test_every_op!(suites::<Wgpu<f32, i32>>(&WgpuDevice::default(), EXTENT); attention_by_ops);
