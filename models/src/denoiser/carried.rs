//! Tensors that cross from one device to another through the host's memory.

use burn::tensor::{Tensor, TensorData};
use kiln_ops::FusedOps;

use crate::finite::read_data;
use crate::pipeline::PipelineError;

/// A tensor on the device that needs it, or the values of one.
#[derive(Debug)]
pub(crate) enum Carried<B: FusedOps> {
    Here(Tensor<B, 2>),
    Values(TensorData),
}

impl<B: FusedOps> Carried<B> {
    /// The tensor on this device, which is the device of a tensor that is [`Carried::Here`].
    pub(super) fn onto(&self, device: &B::Device) -> Tensor<B, 2> {
        match self {
            Self::Here(tensor) => tensor.clone(),
            Self::Values(data) => Tensor::from_data(data.clone(), (device, data.dtype)),
        }
    }

    /// Reads the tensor, so that another device can have it.
    ///
    /// # Errors
    /// If the device fails.
    pub(super) fn read(&mut self) -> Result<(), PipelineError> {
        if let Self::Here(tensor) = self {
            *self = Self::Values(read_data(tensor.clone())?);
        }
        Ok(())
    }
}
