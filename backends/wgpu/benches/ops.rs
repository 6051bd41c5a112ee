//! Times the fused ops and their default bodies on wgpu: `cargo bench -p kiln-wgpu`.

#[path = "../../ops/benches/cases/mod.rs"]
mod cases;

use burn_wgpu::{Wgpu, WgpuDevice};

fn main() {
    cases::run::<Wgpu<f32, i32>>(&WgpuDevice::default());
}
