//! The fused ops on wgpu beside their default bodies: `cargo bench -p kiln-wgpu`.

#[path = "../../ops/benches/cases/mod.rs"]
mod cases;

use burn_wgpu::{Wgpu, WgpuDevice};

fn main() {
    cases::run::<Wgpu<f32, i32>>(&WgpuDevice::default());
}
