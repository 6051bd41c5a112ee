//! Loads stored tensors onto a device, strictly.
//!
//! Every tensor that a network asks for must exist with the expected shape, and every stored tensor
//! must either be asked for or be on the component's list of unused names. The layers that are made
//! of these tensors are in [`crate::layers`].

use std::collections::HashSet;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use burn::tensor::{Bytes, DType, Shape, Tensor, TensorData, bf16, f16};
use cubecl_common::bytes::AllocationProperty;
use kiln_ops::FusedOps;
use rayon::prelude::*;

use crate::config::ConfigError;
use crate::source::{FileFault, StoredDType, TensorSource};

/// Why a component could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The configuration file is refused.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A tensor that the network needs does not exist. `like` is a stored name with the same ending.
    #[error("{origin} has no tensor `{name}`{}", similar(.like.as_deref()))]
    Missing {
        origin: String,
        name: String,
        like: Option<String>,
    },
    /// A tensor has another shape than the configuration implies.
    #[error("{file}: tensor `{name}` has shape {found:?}, the configuration asks for {expected:?}")]
    Shape {
        file: String,
        name: String,
        found: Vec<usize>,
        expected: Vec<usize>,
    },
    /// A tensor that the network needs is stored in a type that kiln does not read.
    #[error("{file}: tensor `{name}` is of type {dtype}; kiln reads F32, F16 and BF16")]
    DType {
        file: String,
        name: String,
        dtype: String,
    },
    /// A device failed while weights were uploaded.
    #[error("{device} failed while the model was loaded: {report}")]
    Device { device: String, report: String },
    /// A file changed or failed while it was loaded.
    #[error(transparent)]
    File(#[from] FileFault),
    /// The component has tensors that the network does not use and does not list as unused.
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

/// The dtypes that a model runs in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Precision {
    /// Dtype of the weights of linear layers and of the embedding table, and the dtype that
    /// timesteps and noise are rounded to. It is diffusers' `torch_dtype`.
    pub model: DType,
    /// Dtype of the activations between ops, of biases and of convolution weights. It is wider than
    /// `model` where the backend has no fast arithmetic in `model`.
    pub activations: DType,
}

/// The stored weights of one component and the device to load them onto. `D` is the backend's
/// device type.
pub(crate) struct Weights<D> {
    source: Arc<dyn TensorSource>,
    device: D,
    precision: Precision,
    /// Names of the tensors that were asked for.
    wanted: Mutex<HashSet<String>>,
}

impl<D> fmt::Debug for Weights<D> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Weights")
            .field("source", &self.source)
            .finish_non_exhaustive()
    }
}

impl<D: Clone> Weights<D> {
    pub(crate) fn new(
        source: Arc<dyn TensorSource>,
        device: &D,
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

    /// Whether the component has a tensor of this name.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.source.info(name).is_some()
    }

    /// The tensors whose names begin with `path` and a dot; all tensors if `path` is empty.
    pub(crate) fn at(self: &Arc<Self>, path: &str) -> Scope<D> {
        Scope {
            weights: Arc::clone(self),
            path: path.to_owned(),
        }
    }

    /// Refuses stored tensors that no layer asked for, once a component is loaded.
    ///
    /// `unused` lists the exceptions: `prefix.` allows names that begin with it, `.part` allows names
    /// that contain it.
    ///
    /// # Errors
    /// [`LoadError::Unknown`] with the first such name in alphabetical order.
    pub(crate) fn refuse_unknown(&self, unused: &[&str]) -> Result<(), LoadError> {
        let wanted = lock(&self.wanted);
        let mut unknown: Vec<String> = self
            .source
            .names()
            .into_iter()
            .filter(|name| !wanted.contains(name))
            .filter(|name| !unused.iter().any(|part| matches_part(name, part)))
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

    /// Checks a tensor's shape and dtype without reading it, and counts it as wanted.
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

    /// The first stored name, in alphabetical order, that differs from `name` only before its first
    /// dot: a hint at another prefix.
    fn nearest_name(&self, name: &str) -> Option<String> {
        let ending = name.split_once('.').map_or(name, |(_, ending)| ending);
        self.source
            .names()
            .into_iter()
            .filter(|stored| stored.ends_with(ending))
            .min()
    }
}

/// Locks a mutex whose value is valid even if another thread panicked: nothing panics while it
/// holds one.
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

/// The stored bytes of a tensor whose shape and dtype were checked.
#[derive(Debug)]
pub(crate) struct StoredTensor {
    /// Elements in row-major order, little-endian.
    pub(crate) bytes: bytes::Bytes,
    pub(crate) dtype: StoredDType,
}

impl StoredTensor {
    /// Bytes per element.
    pub(crate) fn element_size(&self) -> usize {
        self.dtype
            .size()
            .expect("its dtype was checked when it was read")
    }
}

/// The tensors of a component whose names share a prefix.
#[derive(Debug, Clone)]
pub(crate) struct Scope<D> {
    weights: Arc<Weights<D>>,
    path: String,
}

impl<D: Clone> Scope<D> {
    /// The tensors one level down.
    pub(crate) fn at(&self, name: impl fmt::Display) -> Self {
        Self {
            weights: Arc::clone(&self.weights),
            path: self.name(name),
        }
    }

    pub(crate) fn precision(&self) -> Precision {
        self.weights.precision
    }

    /// The prefix that names here begin with.
    pub(crate) fn path(&self) -> &str {
        &self.path
    }

    fn name(&self, name: impl fmt::Display) -> String {
        if self.path.is_empty() {
            name.to_string()
        } else {
            format!("{}.{name}", self.path)
        }
    }

    /// Checks that a tensor exists with this shape, without reading it.
    ///
    /// # Errors
    /// If there is no such tensor, or it has another shape or a dtype that kiln does not read.
    pub(crate) fn check(&self, name: &str, shape: &[usize]) -> Result<(), LoadError> {
        self.weights.check(&self.name(name), shape).map(drop)
    }

    /// Reads the stored bytes of a tensor.
    ///
    /// # Errors
    /// As [`Scope::check`].
    pub(crate) fn read(&self, name: &str, shape: &[usize]) -> Result<StoredTensor, LoadError> {
        let name = self.name(name);
        let dtype = self.weights.check(&name, shape)?;
        let bytes = self.weights.source.bytes(&name);
        Ok(StoredTensor { bytes, dtype })
    }

    /// Loads a tensor onto the device, converted to `dtype`.
    ///
    /// # Errors
    /// As [`Scope::check`].
    pub(crate) fn tensor<B: FusedOps<Device = D>, const N: usize>(
        &self,
        name: &str,
        shape: [usize; N],
        dtype: DType,
    ) -> Result<Tensor<B, N>, LoadError> {
        Ok(self.upload(self.read(name, &shape)?, shape, dtype))
    }

    /// Puts stored bytes onto the device: see [`upload`].
    pub(crate) fn upload<B: FusedOps<Device = D>, const N: usize>(
        &self,
        stored: StoredTensor,
        shape: [usize; N],
        dtype: DType,
    ) -> Tensor<B, N> {
        upload::<B, N>(stored, shape, &self.weights.device, dtype)
    }
}

/// Puts stored bytes onto a device, converted to `dtype`. A backend that computes in the host's memory
/// uses bytes of the right dtype where they lie, without a copy.
pub(crate) fn upload<B: FusedOps, const N: usize>(
    stored: StoredTensor,
    shape: [usize; N],
    device: &B::Device,
    dtype: DType,
) -> Tensor<B, N> {
    let StoredTensor {
        bytes,
        dtype: stored,
    } = stored;
    if B::IS_IN_PLACE && stored.is(dtype) && bytes.as_ptr().align_offset(align_of::<f32>()) == 0 {
        let data = TensorData {
            bytes: Bytes::from_shared(bytes, AllocationProperty::Other),
            shape: Shape::from(shape),
            dtype,
        };
        return Tensor::from_data(data, (device, dtype));
    }
    let element = bytes.len() / shape.iter().product::<usize>().max(1);
    B::upload(device, shape, dtype, |first, part| {
        let first = first / dtype.size() * element;
        let length = part.len() / dtype.size() * element;
        convert(&bytes[first..first + length], &stored, dtype, part);
    })
}

/// Elements that one task of the thread pool converts.
const ELEMENTS_AT_ONCE: usize = 1 << 17;

/// Converts stored elements to `dtype` and writes them to `to`, on all cores.
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

/// Converts elements of `N` bytes, of any alignment, that `widen` makes an f32 of.
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

/// Converts elements of `N` bytes to elements of `M` bytes, on all cores.
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Three values that f16 and bf16 both hold exactly, from and to every dtype.
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
