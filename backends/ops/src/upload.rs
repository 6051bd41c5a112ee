//! Putting weights into a device's memory.

use burn_tensor::backend::Backend;
use burn_tensor::{DType, Shape, Tensor, TensorData};
use half::{bf16, f16};

/// A backend whose tensors can be written part by part.
pub trait Upload: Backend {
    /// Whether a tensor stays where its bytes lie in the host's memory, so that a tensor made of bytes
    /// that are there already takes no more memory.
    const IS_IN_PLACE: bool = true;

    /// A tensor of these bytes. `fill` is called with parts of the tensor in order, each with the place
    /// of its first byte, and writes the whole part. Elements are in the machine's byte order.
    ///
    /// The host's memory holds few parts at a time, whatever the size of the tensor. What fails on the
    /// device is for a [`crate::FaultWatch`] to tell.
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
