//! Uploads of weights to a device's memory.

use burn_tensor::backend::Backend;
use burn_tensor::{DType, Shape, Tensor, TensorData};
use half::{bf16, f16};

/// A backend to which tensors can be uploaded chunk by chunk.
pub trait Upload: Backend {
    /// Whether tensors live in host memory, so that a tensor made of bytes that are already there
    /// needs no copy and no further memory.
    const IS_IN_PLACE: bool = true;

    /// Creates a tensor of `shape` and `dtype` from the bytes that `fill` writes. `fill(offset, chunk)`
    /// is called with consecutive chunks of the tensor, `offset` in bytes, and has to fill each chunk
    /// completely. Elements are in native byte order.
    ///
    /// Where tensors do not live in host memory, only a few chunks exist there at a time. Device
    /// failures are reported by a [`crate::FaultWatch`].
    ///
    /// # Panics
    /// If `dtype` is not f32, f16 or bf16.
    fn upload<const D: usize>(
        device: &Self::Device,
        shape: [usize; D],
        dtype: DType,
        mut fill: impl FnMut(usize, &mut [u8]),
    ) -> Tensor<Self, D> {
        let shape = Shape::from(shape);
        let count = shape.num_elements();
        let mut data = match dtype {
            DType::F32 => TensorData::new(vec![0_f32; count], shape),
            DType::F16 => TensorData::new(vec![f16::ZERO; count], shape),
            DType::BF16 => TensorData::new(vec![bf16::ZERO; count], shape),
            other => panic!("weights are f32, f16 or bf16, not {other:?}"),
        };
        fill(0, &mut data.bytes);
        Tensor::from_data(data, (device, dtype))
    }
}

#[cfg(feature = "flex")]
impl Upload for burn_flex::Flex {}

#[cfg(feature = "ndarray")]
impl Upload for burn_ndarray::NdArray {}
