//! What a computed step of a half leaves for later steps that reuse it.

use burn::tensor::{DType, Tensor, TensorData};
use kiln_ops::FusedOps;

use crate::finite::read_data;
use crate::pipeline::PipelineError;

/// The changes that blocks made to the tokens of one half in its last computed step. `T` is a tensor
/// on the device of the half's lane, or the values of one on their way to another lane.
#[derive(Debug, Clone)]
pub(crate) struct Kept<T> {
    /// Index of the step that computed it.
    pub(super) step: usize,
    /// The change that the first blocks made to the image tokens, which a later step is compared
    /// with; `None` if the steps to reuse are known beforehand.
    pub(super) head: Option<T>,
    /// The change that the blocks which a reused step leaves out made to the image tokens.
    pub(super) image: Residual<T>,
    /// The same for the text tokens; `None` unless blocks follow that a reused step runs.
    pub(super) text: Option<Residual<T>>,
}

/// A change of tokens, and how it changes from one step to the next.
#[derive(Debug, Clone)]
pub(super) struct Residual<T> {
    value: T,
    /// Change of `value` for each step; `None` if it is taken as constant.
    slope: Option<T>,
}

impl<T> Kept<T> {
    /// Converts every tensor.
    ///
    /// # Errors
    /// Those of `convert`.
    pub(super) fn convert<U, E>(
        self,
        convert: &mut dyn FnMut(T) -> Result<U, E>,
    ) -> Result<Kept<U>, E> {
        Ok(Kept {
            step: self.step,
            head: self.head.map(&mut *convert).transpose()?,
            image: self.image.convert(convert)?,
            text: self.text.map(|text| text.convert(convert)).transpose()?,
        })
    }
}

impl<T> Residual<T> {
    fn convert<U, E>(self, convert: &mut dyn FnMut(T) -> Result<U, E>) -> Result<Residual<U>, E> {
        Ok(Residual {
            value: convert(self.value)?,
            slope: self.slope.map(convert).transpose()?,
        })
    }
}

impl<B: FusedOps> Kept<Tensor<B, 2>> {
    /// Reads the tensors.
    ///
    /// # Errors
    /// If the device fails.
    pub(super) fn into_values(self) -> Result<Kept<TensorData>, PipelineError> {
        self.convert(&mut read_data)
    }
}

impl Kept<TensorData> {
    /// Writes the tensors to a device.
    pub(super) fn onto<B: FusedOps>(self, device: &B::Device) -> Kept<Tensor<B, 2>> {
        let mut upload = |data: TensorData| -> Result<Tensor<B, 2>, std::convert::Infallible> {
            let dtype = data.dtype;
            Ok(Tensor::from_data(data, (device, dtype)))
        };
        match self.convert(&mut upload) {
            Ok(kept) => kept,
            Err(never) => match never {},
        }
    }
}

impl<B: FusedOps> Residual<Tensor<B, 2>> {
    /// The change of step `step`, with its slope since the residual and the step before if these are
    /// given.
    pub(super) fn new(value: Tensor<B, 2>, step: usize, before: Option<(&Self, usize)>) -> Self {
        let slope = before
            .filter(|(_, earlier)| *earlier < step)
            .map(|(before, earlier)| {
                (value.clone() - before.value.clone()) / (step - earlier) as f32
            });
        Self { value, slope }
    }

    /// The change that is expected this many steps later: a Taylor series of order 0 or 1.
    pub(super) fn after(&self, steps: usize) -> Tensor<B, 2> {
        match &self.slope {
            Some(slope) => self.value.clone() + slope.clone() * steps as f32,
            None => self.value.clone(),
        }
    }

    /// The mean over tokens of this change's length divided by that of an earlier one: `MagCache`'s
    /// ratio. `[1, 1]`, f32.
    pub(super) fn ratio_to(&self, before: &Self) -> Tensor<B, 2> {
        let length = |residual: &Self| {
            let value = residual.value.clone().cast(DType::F32);
            value.square().sum_dim(1).sqrt()
        };
        (length(self) / length(before)).mean_dim(0)
    }
}

/// `mean(|a - b|) / mean(|b|)`: how far `a` is from `b`. `[1, 1]`, f32.
pub(super) fn relative_change<B: FusedOps>(a: Tensor<B, 2>, b: Tensor<B, 2>) -> Tensor<B, 2> {
    let (a, b) = (a.cast(DType::F32), b.cast(DType::F32));
    let mean = |x: Tensor<B, 2>| x.abs().mean_dim(1).mean_dim(0);
    mean(a - b.clone()) / mean(b)
}
