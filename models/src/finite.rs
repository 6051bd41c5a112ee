//! The check that a stage's values are finite numbers, on values that were read from the device.
//!
//! The check is made on the host, because shaders may assume that there is no NaN and no infinity
//! (WGSL, 15.7.2). It reads the latents of each step, a few hundred bytes for a token whose step
//! takes billions of operations.

use std::fmt;

use burn::tensor::{DType, Tensor, TensorData};
use kiln_ops::FusedOps;

use crate::device::summary;
use crate::job::{Job, TraceTensor};
use crate::pipeline::PipelineError;

/// A stage of a job that computes values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Encoding the prompts.
    TextEncoding,
    /// A denoising step, counted from 1.
    Step { step: usize, steps: usize },
    /// Decoding latents to pixels.
    Decoding,
}

impl fmt::Display for Stage {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TextEncoding => formatter.write_str("text encoding"),
            Self::Step { step, steps } => write!(formatter, "denoising step {step} of {steps}"),
            Self::Decoding => formatter.write_str("VAE decoding"),
        }
    }
}

/// The first stage of a job that computed NaN or infinity.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "the model produced values that are not numbers (NaN or infinity) in {stage}: its weights may \
     be damaged{}", self.advice()
)]
pub struct NotFinite {
    pub stage: Stage,
    /// Name of the model's type.
    pub dtype: &'static str,
}

impl NotFinite {
    fn advice(&self) -> String {
        match self.dtype {
            "f32" => ": download them again".to_owned(),
            narrow => format!(", or {narrow} too narrow for them: try --dtype f32"),
        }
    }
}

/// Whether a value is NaN or infinite.
fn any_not_finite(values: &[f32]) -> bool {
    // Without an early end, so that the loop is vectorised.
    values
        .iter()
        .fold(false, |found, value| found | !value.is_finite())
}

/// Refuses values that are not finite. A recorded job goes on, so that its values can be compared.
pub(crate) fn check(
    values: &[f32],
    stage: Stage,
    dtype: &'static str,
    job: &Job,
) -> Result<Option<NotFinite>, PipelineError> {
    let found = any_not_finite(values).then_some(NotFinite { stage, dtype });
    match found {
        Some(found) if !job.record => Err(found.into()),
        found => Ok(found),
    }
}

/// Reads a tensor of any float type as f32 values.
///
/// # Errors
/// If the device fails.
pub(crate) fn read<B: FusedOps, const D: usize>(
    tensor: Tensor<B, D>,
) -> Result<Vec<f32>, PipelineError> {
    // Out-of-memory errors of queued work are reported here.
    let data = tensor
        .cast(DType::F32)
        .try_into_data()
        .map_err(|error| PipelineError::Device(summary(&error.to_string())))?;
    data.into_vec::<f32>()
        .map_err(|error| PipelineError::Device(summary(&format!("{error:?}"))))
}

/// Reads a tensor in its own type.
///
/// # Errors
/// If the device fails.
pub(crate) fn read_data<B: FusedOps, const D: usize>(
    tensor: Tensor<B, D>,
) -> Result<TensorData, PipelineError> {
    let data = tensor.try_into_data();
    data.map_err(|error| PipelineError::Device(summary(&error.to_string())))
}

/// A stage of a recorded run.
pub(crate) fn traced(name: &str, shape: Vec<usize>, values: Vec<f32>) -> TraceTensor {
    TraceTensor {
        name: name.to_owned(),
        shape,
        values,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nan_and_both_infinities_are_found_anywhere() {
        assert!(!any_not_finite(&[]));
        let mut values = vec![f32::MAX; 1000];
        assert!(!any_not_finite(&values));
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for place in [0, 517, 999] {
                values[place] = bad;
                assert!(any_not_finite(&values), "{bad} at {place}");
                values[place] = -0.0;
            }
        }
    }

    #[test]
    fn the_message_names_the_stage_and_what_to_do() {
        let stage = Stage::Step { step: 3, steps: 20 };
        let message = |dtype| NotFinite { stage, dtype }.to_string();
        assert_eq!(
            message("f16"),
            "the model produced values that are not numbers (NaN or infinity) in denoising step 3 \
             of 20: its weights may be damaged, or f16 too narrow for them: try --dtype f32"
        );
        assert!(message("f32").ends_with("its weights may be damaged: download them again"));
        assert_eq!(Stage::TextEncoding.to_string(), "text encoding");
        assert_eq!(Stage::Decoding.to_string(), "VAE decoding");
    }
}
