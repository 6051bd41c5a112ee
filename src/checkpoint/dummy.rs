//! Random weights, for measuring speed and memory without a model's files.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use half::bf16;
use kiln_models::noise::{NoiseGenerator, randn};
use kiln_models::{StoredDType, TensorInfo, TensorSource};
use rayon::prelude::*;

/// Number of values in the block that all weights repeat. A prime, so that no matrix has equal rows.
const BLOCK: usize = 1_048_573;

const SEED: u64 = 0;

/// Standard deviation of biases, and of norm weights around 1.
const SMALL: f32 = 0.02;

/// Fabricates any requested tensor in bf16, scaled so that activations keep unit variance.
///
/// The values of a tensor depend only on its component, name and shape. They are generated when they
/// are read and not kept, so a source holds the memory of one block.
#[derive(Debug)]
struct DummyWeights {
    component: &'static str,
    block: Arc<[f32]>,
    /// Names and shapes of the requested tensors.
    declared: Mutex<HashMap<String, Vec<usize>>>,
}

/// Creates one source for each component of a checkpoint; all share one block.
pub(super) fn sources<const N: usize>(components: [&'static str; N]) -> [Arc<dyn TensorSource>; N] {
    let block: Arc<[f32]> = randn(NoiseGenerator::Cpu, SEED, BLOCK).into();
    components.map(|component| -> Arc<dyn TensorSource> {
        Arc::new(DummyWeights {
            component,
            block: Arc::clone(&block),
            declared: Mutex::default(),
        })
    })
}

impl DummyWeights {
    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        let declared = self.declared.lock().unwrap_or_else(PoisonError::into_inner);
        declared.get(name).cloned()
    }

    /// Offset in the block of a tensor's first value (64-bit FNV-1a of component and name).
    fn offset(&self, name: &str) -> usize {
        let bytes = self.component.bytes().chain(name.bytes());
        let hash = bytes.fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        (hash % BLOCK as u64) as usize
    }
}

impl TensorSource for DummyWeights {
    fn origin(&self) -> String {
        format!("random weights ({})", self.component)
    }

    fn names(&self) -> Vec<String> {
        let declared = self.declared.lock().unwrap_or_else(PoisonError::into_inner);
        declared.keys().cloned().collect()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        Some(TensorInfo {
            shape: self.shape(name)?,
            dtype: StoredDType::Bf16,
            file: self.origin(),
        })
    }

    fn declare(&self, name: &str, shape: &[usize]) -> Option<TensorInfo> {
        let mut declared = self.declared.lock().unwrap_or_else(PoisonError::into_inner);
        declared.insert(name.to_owned(), shape.to_vec());
        drop(declared);
        self.info(name)
    }

    fn main_dtype(&self) -> Option<StoredDType> {
        Some(StoredDType::Bf16)
    }

    fn bytes(&self, name: &str) -> Bytes {
        let shape = self.shape(name).unwrap_or_default();
        let count: usize = shape.iter().product();
        let (mean, deviation) = distribution(name, &shape);
        let offset = self.offset(name);
        let [end, start] = [&self.block[offset..], &self.block[..offset]];
        let values = end.iter().chain(start).take(count);
        let block: Vec<u8> = values
            .flat_map(|value| bf16::from_f32(mean + deviation * value).to_le_bytes())
            .collect();
        // A tensor larger than the block repeats it.
        let mut bytes = vec![0; count * size_of::<bf16>()];
        bytes
            .par_chunks_mut(block.len().max(1))
            .for_each(|part| part.copy_from_slice(&block[..part.len()]));
        bytes.into()
    }
}

/// Mean and standard deviation of a tensor's values, by the kind of layer that its name and shape
/// indicate.
fn distribution(name: &str, shape: &[usize]) -> (f32, f32) {
    match *shape {
        _ if name.ends_with("bias") => (0.0, SMALL),
        // 1/sqrt(fan-in) preserves the variance of the input. A causal convolution only uses its
        // last temporal slice.
        [_, inputs] => (0.0, 1.0 / (inputs as f32).sqrt()),
        [_, inputs, height, width] | [_, inputs, _, height, width] if inputs > 1 => {
            (0.0, 1.0 / ((inputs * height * width) as f32).sqrt())
        }
        // A norm weight, which may have trailing dimensions of 1.
        _ => (1.0, SMALL),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(source: &dyn TensorSource, name: &str, shape: &[usize]) -> Vec<f32> {
        let info = source.declare(name, shape).unwrap();
        assert_eq!(
            (info.shape.as_slice(), info.dtype),
            (shape, StoredDType::Bf16)
        );
        let bytes = source.bytes(name);
        assert_eq!(bytes.len(), shape.iter().product::<usize>() * 2);
        let elements = bytes.as_chunks::<2>().0.iter();
        elements
            .map(|element| bf16::from_le_bytes(*element).to_f32())
            .collect()
    }

    fn mean_and_deviation(values: &[f32]) -> (f32, f32) {
        let mean = values.iter().sum::<f32>() / values.len() as f32;
        let square = values
            .iter()
            .map(|value| (value - mean).powi(2))
            .sum::<f32>();
        (mean, (square / values.len() as f32).sqrt())
    }

    #[test]
    fn weights_are_scaled_by_their_fan_in() {
        let [source] = sources(["vae"]);
        for (name, shape, mean, deviation) in [
            ("proj.weight", [256, 1024].as_slice(), 0.0, 1.0 / 32.0),
            ("proj.bias", &[4096], 0.0, 0.02),
            ("norm.weight", &[4096], 1.0, 0.02),
            ("norm.gamma", &[4096, 1, 1, 1], 1.0, 0.02),
            ("norm.gamma", &[4096, 1, 1], 1.0, 0.02),
            ("conv.weight", &[64, 64, 3, 3], 0.0, 1.0 / 24.0),
            ("conv_in.weight", &[64, 64, 3, 3, 3], 0.0, 1.0 / 24.0),
        ] {
            let (found_mean, found) = mean_and_deviation(&values(&*source, name, shape));
            assert!(
                (found_mean - mean).abs() < 0.002,
                "{name}: mean {found_mean}"
            );
            assert!(
                (found - deviation).abs() < 0.05 * deviation,
                "{name} {shape:?}: deviation {found}"
            );
        }
    }

    #[test]
    fn values_depend_on_component_and_name_and_repeat_after_the_block() {
        let [a, b] = sources(["a", "b"]);
        let first = values(&*a, "x.weight", &[8, 8]);
        assert_eq!(first, values(&*a, "x.weight", &[8, 8]));
        assert_ne!(first, values(&*a, "y.weight", &[8, 8]));
        assert_ne!(first, values(&*b, "x.weight", &[8, 8]));

        let long = values(&*a, "x.bias", &[2 * BLOCK + 5]);
        assert_eq!(long[..1000], long[BLOCK..BLOCK + 1000]);
        assert_eq!(long[..5], long[2 * BLOCK..]);
    }
}
