//! Times the fused ops and their default bodies on cuda: `cargo bench -p kiln-cuda`.

#[path = "../../ops/benches/cases/mod.rs"]
mod cases;

use burn_cuda::{Cuda, CudaDevice};

fn main() {
    cases::run::<Cuda<f32, i32>>(&CudaDevice::default());
}
