//! From stored tensors to tensors on a device, strictly: a wanted tensor must be there with the
//! expected shape, and a tensor nobody wants must be on the component's written list.

use std::collections::HashSet;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use burn_tensor::{Bytes, DType, Shape, Tensor, TensorData, bf16, f16};
use cubecl_common::bytes::AllocationProperty;
use kiln_ops::FusedOps;
use rayon::prelude::*;

use crate::config::ConfigError;
use crate::source::{StoredDType, TensorSource};

/// Why a component could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error("{origin} has no tensor `{name}`{}", similar(.like.as_deref()))]
    Missing {
        origin: String,
        name: String,
        like: Option<String>,
    },
    #[error("{file}: tensor `{name}` has shape {found:?}, the configuration asks for {expected:?}")]
    Shape {
        file: String,
        name: String,
        found: Vec<usize>,
        expected: Vec<usize>,
    },
    #[error("{file}: tensor `{name}` is of type {dtype}; kiln reads F32, F16 and BF16")]
    DType {
        file: String,
        name: String,
        dtype: String,
    },
    #[error(
        "{origin} has {count} tensors that this model does not know, first: `{first}`; \
         is it a checkpoint of another model?"
    )]
    Unknown {
        origin: String,
        count: usize,
        first: String,
    },
}

fn similar(like: Option<&str>) -> String {
    like.map_or_else(String::new, |like| format!(" (it has `{like}`)"))
}

/// Types that a run works in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Precision {
    /// What the model counts as computing in: the type weights are kept in, and to which
    /// timesteps and noise are rounded, as diffusers does with its `torch_dtype`.
    pub model: DType,
    /// Type of the activations between ops. Wider than `model` where the backend has no fast
    /// arithmetic in it.
    pub activations: DType,
}

/// The weights of one component, on their way to a device.
pub(crate) struct Weights<B: FusedOps> {
    source: Arc<dyn TensorSource>,
    device: B::Device,
    precision: Precision,
    wanted: Mutex<HashSet<String>>,
}

impl<B: FusedOps> fmt::Debug for Weights<B> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Weights")
            .field("source", &self.source)
            .finish_non_exhaustive()
    }
}

impl<B: FusedOps> Weights<B> {
    pub(crate) fn new(
        source: Arc<dyn TensorSource>,
        device: &B::Device,
        precision: Precision,
    ) -> Arc<Self> {
        let wanted = Mutex::default();
        Arc::new(Self {
            source,
            device: device.clone(),
            precision,
            wanted,
        })
    }

    pub(crate) fn device(&self) -> &B::Device {
        &self.device
    }

    pub(crate) fn has(&self, name: &str) -> bool {
        self.source.info(name).is_some()
    }

    /// The tensors under `path` (`""` for all).
    pub(crate) fn at(self: &Arc<Self>, path: &str) -> Scope<B> {
        Scope {
            weights: Arc::clone(self),
            path: path.to_owned(),
        }
    }

    /// To be called when a component is loaded. Refuses tensors that were neither wanted nor start with, nor contain, a listed text.
    pub(crate) fn refuse_unknown(&self, expected: &[&str]) -> Result<(), LoadError> {
        let wanted = lock(&self.wanted);
        let mut unknown: Vec<String> = self
            .source
            .names()
            .into_iter()
            .filter(|name| !wanted.contains(name))
            .filter(|name| !expected.iter().any(|part| matches_part(name, part)))
            .collect();
        unknown.sort();
        match unknown.first() {
            None => Ok(()),
            Some(first) => Err(LoadError::Unknown {
                origin: self.source.origin(),
                count: unknown.len(),
                first: first.clone(),
            }),
        }
    }

    /// Checks a tensor without reading it.
    fn check(&self, name: &str, shape: &[usize]) -> Result<StoredDType, LoadError> {
        let Some(info) = self.source.declare(name, shape) else {
            return Err(LoadError::Missing {
                origin: self.source.origin(),
                name: name.to_owned(),
                like: self.nearest_name(name),
            });
        };
        if info.shape != shape {
            return Err(LoadError::Shape {
                file: info.file,
                name: name.to_owned(),
                found: info.shape,
                expected: shape.to_vec(),
            });
        }
        if let StoredDType::Other(dtype) = info.dtype {
            return Err(LoadError::DType {
                file: info.file,
                name: name.to_owned(),
                dtype,
            });
        }
        lock(&self.wanted).insert(name.to_owned());
        Ok(info.dtype)
    }

    /// The stored name that shares the longest ending with `name`, to hint at another prefix.
    fn nearest_name(&self, name: &str) -> Option<String> {
        let ending = name.split_once('.').map_or(name, |(_, ending)| ending);
        self.source
            .names()
            .into_iter()
            .filter(|stored| stored.ends_with(ending))
            .min()
    }
}

/// Nothing panics while it holds one of these; a device's threads are others.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// `prefix.` matches from the start of a name, `.part` anywhere in it.
fn matches_part(name: &str, part: &str) -> bool {
    if part.starts_with('.') {
        name.contains(part)
    } else {
        name.starts_with(part)
    }
}

/// A place in the tree of names.
#[derive(Debug, Clone)]
pub(crate) struct Scope<B: FusedOps> {
    weights: Arc<Weights<B>>,
    path: String,
}

impl<B: FusedOps> Scope<B> {
    pub(crate) fn at(&self, name: impl fmt::Display) -> Self {
        Self {
            weights: Arc::clone(&self.weights),
            path: self.name(name),
        }
    }

    fn name(&self, name: impl fmt::Display) -> String {
        if self.path.is_empty() {
            name.to_string()
        } else {
            format!("{}.{name}", self.path)
        }
    }

    /// `weight` `[out, in]` and `bias` `[out]` of this place.
    pub(crate) fn linear(&self, d_in: usize, d_out: usize) -> Result<Linear<B>, LoadError> {
        let mut linear = self.linear_without_bias(d_in, d_out)?;
        linear.bias = Some(self.bias(d_out)?);
        Ok(linear)
    }

    pub(crate) fn linear_without_bias(
        &self,
        d_in: usize,
        d_out: usize,
    ) -> Result<Linear<B>, LoadError> {
        Ok(Linear {
            weight: self.matrix("weight", d_out, d_in)?,
            bias: None,
        })
    }

    /// A linear layer that is checked now and read each time it is used.
    pub(crate) fn deferred_linear(
        &self,
        d_in: usize,
        d_out: usize,
    ) -> Result<DeferredLinear<B>, LoadError> {
        self.weights.check(&self.name("weight"), &[d_out, d_in])?;
        self.weights.check(&self.name("bias"), &[d_out])?;
        Ok(DeferredLinear {
            place: self.clone(),
            d_in,
            d_out,
        })
    }

    /// A matrix in the type weights are kept in.
    pub(crate) fn matrix(
        &self,
        name: &str,
        rows: usize,
        columns: usize,
    ) -> Result<Tensor<B, 2>, LoadError> {
        self.tensor(name, [rows, columns], self.weights.precision.model)
    }

    /// A norm's weight, in f32.
    pub(crate) fn norm(&self, name: &str, len: usize) -> Result<Tensor<B, 1>, LoadError> {
        self.tensor(name, [len], DType::F32)
    }

    /// A norm's weight that is stored with trailing dimensions of 1, in f32.
    pub(crate) fn channel_norm(
        &self,
        channels: usize,
        trailing: usize,
    ) -> Result<Tensor<B, 1>, LoadError> {
        let mut shape = vec![1; trailing + 1];
        shape[0] = channels;
        let name = self.name("gamma");
        let stored = self.weights.check(&name, &shape)?;
        let bytes = self.weights.source.bytes(&name);
        Ok(self.upload(bytes, &stored, [channels], DType::F32))
    }

    /// A 2-D convolution, in the type of the activations.
    pub(crate) fn conv2d(
        &self,
        channels_in: usize,
        channels_out: usize,
        kernel: usize,
    ) -> Result<Conv2d<B>, LoadError> {
        let dtype = self.weights.precision.activations;
        let weight = self.tensor("weight", [channels_out, channels_in, kernel, kernel], dtype)?;
        Ok(Conv2d {
            weight,
            bias: self.bias(channels_out)?,
        })
    }

    /// A causal 3-D convolution as the 2-D one it is on a single frame: the kernel's last
    /// temporal slice, since every earlier frame is zero padding.
    pub(crate) fn causal_conv3d(
        &self,
        channels_in: usize,
        channels_out: usize,
        kernel: usize,
    ) -> Result<Conv2d<B>, LoadError> {
        let name = self.name("weight");
        let shape = [channels_out, channels_in, kernel, kernel, kernel];
        let stored = self.weights.check(&name, &shape)?;
        let bytes = self.weights.source.bytes(&name);
        let slice = kernel * kernel * stored.size().expect("checked to be a readable type");
        let last: Vec<u8> = bytes
            .chunks_exact(slice * kernel)
            .flat_map(|kernel_3d| kernel_3d[slice * (kernel - 1)..].iter().copied())
            .collect();
        let weight = self.upload(
            last.into(),
            &stored,
            [channels_out, channels_in, kernel, kernel],
            self.weights.precision.activations,
        );
        Ok(Conv2d {
            weight,
            bias: self.bias(channels_out)?,
        })
    }

    fn bias(&self, len: usize) -> Result<Tensor<B, 1>, LoadError> {
        self.tensor("bias", [len], self.weights.precision.activations)
    }

    fn tensor<const D: usize>(
        &self,
        name: &str,
        shape: [usize; D],
        dtype: DType,
    ) -> Result<Tensor<B, D>, LoadError> {
        let name = self.name(name);
        let stored = self.weights.check(&name, &shape)?;
        let bytes = self.weights.source.bytes(&name);
        Ok(self.upload(bytes, &stored, shape, dtype))
    }

    fn upload<const D: usize>(
        &self,
        bytes: bytes::Bytes,
        stored: &StoredDType,
        shape: [usize; D],
        dtype: DType,
    ) -> Tensor<B, D> {
        if B::IS_IN_PLACE && stored.is(dtype) && bytes.as_ptr().align_offset(align_of::<f32>()) == 0
        {
            let data = TensorData {
                bytes: Bytes::from_shared(bytes, AllocationProperty::Other),
                shape: Shape::from(shape),
                dtype,
            };
            return Tensor::from_data(data, (&self.weights.device, dtype));
        }
        let element = bytes.len() / shape.iter().product::<usize>().max(1);
        B::upload(&self.weights.device, shape, dtype, |first, part| {
            let first = first / dtype.size() * element;
            let length = part.len() / dtype.size() * element;
            convert(&bytes[first..first + length], stored, dtype, part);
        })
    }
}

/// Elements that a thread converts at a time.
const ELEMENTS_AT_ONCE: usize = 1 << 17;

/// Writes stored elements as elements of `dtype`, on all cores.
fn convert(bytes: &[u8], stored: &StoredDType, dtype: DType, to: &mut [u8]) {
    match stored {
        _ if stored.is(dtype) => {
            let size = ELEMENTS_AT_ONCE * dtype.size();
            let parts = to.par_chunks_mut(size).zip(bytes.par_chunks(size));
            parts.for_each(|(to, bytes)| to.copy_from_slice(bytes));
        }
        StoredDType::F32 => convert_from(bytes, f32::from_le_bytes, dtype, to),
        StoredDType::F16 => convert_from(bytes, |x| f16::from_le_bytes(x).to_f32(), dtype, to),
        StoredDType::Bf16 => convert_from(bytes, |x| bf16::from_le_bytes(x).to_f32(), dtype, to),
        StoredDType::Other(_) => unreachable!("checked to be a readable type"),
    }
}

/// From elements of `N` bytes, whatever their alignment.
fn convert_from<const N: usize>(
    bytes: &[u8],
    widen: impl Fn([u8; N]) -> f32 + Sync,
    dtype: DType,
    to: &mut [u8],
) {
    match dtype {
        DType::F32 => write(bytes, to, |x| widen(x).to_ne_bytes()),
        DType::F16 => write(bytes, to, |x| f16::from_f32(widen(x)).to_ne_bytes()),
        DType::BF16 => write(bytes, to, |x| bf16::from_f32(widen(x)).to_ne_bytes()),
        other => unreachable!("models load f32, f16 and bf16, not {other:?}"),
    }
}

fn write<const N: usize, const M: usize>(
    bytes: &[u8],
    to: &mut [u8],
    converted: impl Fn([u8; N]) -> [u8; M] + Sync,
) {
    let parts = to
        .par_chunks_mut(ELEMENTS_AT_ONCE * M)
        .zip(bytes.par_chunks(ELEMENTS_AT_ONCE * N));
    parts.for_each(|(to, bytes)| {
        let elements = to.as_chunks_mut().0.iter_mut().zip(bytes.as_chunks().0);
        elements.for_each(|(to, element)| *to = converted(*element));
    });
}

/// `x · weightᵀ + bias`.
#[derive(Debug, Clone)]
pub(crate) struct Linear<B: FusedOps> {
    weight: Tensor<B, 2>,
    bias: Option<Tensor<B, 1>>,
}

impl<B: FusedOps> Linear<B> {
    /// `[tokens, in]` to `[tokens, out]`.
    pub(crate) fn forward(&self, x: Tensor<B, 2>) -> Tensor<B, 2> {
        B::fused_linear(x, self.weight.clone(), self.bias.clone())
    }
}

/// A [`Linear`] whose weights are read for each use and let go of again: for layers that run once
/// per schedule and would otherwise fill a third of the device.
#[derive(Debug, Clone)]
pub(crate) struct DeferredLinear<B: FusedOps> {
    place: Scope<B>,
    d_in: usize,
    d_out: usize,
}

impl<B: FusedOps> DeferredLinear<B> {
    pub(crate) fn forward(&self, x: Tensor<B, 2>) -> Tensor<B, 2> {
        let linear = self.place.linear(self.d_in, self.d_out);
        linear
            .expect("its names and shapes were checked at load")
            .forward(x)
    }
}

/// A convolution of stride 1 that keeps height and width.
#[derive(Debug, Clone)]
pub(crate) struct Conv2d<B: FusedOps> {
    weight: Tensor<B, 4>,
    bias: Tensor<B, 1>,
}

impl<B: FusedOps> Conv2d<B> {
    /// `[images, in, height, width]` to `[images, out, height, width]`.
    pub(crate) fn forward(&self, x: Tensor<B, 4>) -> Tensor<B, 4> {
        B::conv2d_same(x, self.weight.clone(), self.bias.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One, minus a half and the largest bf16, in every stored type, to every loaded one.
    #[test]
    fn every_stored_type_becomes_every_loaded_type() {
        let values = [1.0_f32, -0.5, 65280.0];
        let stored: [(StoredDType, Vec<u8>); 3] = [
            (
                StoredDType::F32,
                values.iter().flat_map(|x| x.to_le_bytes()).collect(),
            ),
            (
                StoredDType::F16,
                values
                    .iter()
                    .flat_map(|x| f16::from_f32(*x).to_le_bytes())
                    .collect(),
            ),
            (
                StoredDType::Bf16,
                values
                    .iter()
                    .flat_map(|x| bf16::from_f32(*x).to_le_bytes())
                    .collect(),
            ),
        ];
        for (stored, bytes) in stored {
            for dtype in [DType::F32, DType::F16, DType::BF16] {
                // From an aligned and from an odd address.
                let mut shifted = vec![0_u8; 1];
                shifted.extend(&bytes);
                let shifted = bytes::Bytes::from(shifted).slice(1..);
                for bytes in [bytes::Bytes::from(bytes.clone()), shifted] {
                    let mut data = TensorData::new(vec![0_f32; 3], [3]).convert_dtype(dtype);
                    convert(&bytes, &stored, dtype, &mut data.bytes);
                    let loaded: Vec<f32> = data.iter::<f32>().collect();
                    assert_eq!(loaded, values, "{stored:?} to {dtype:?}");
                }
            }
        }
    }
}
