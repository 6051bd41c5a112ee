//! Adapter files: every scheme gives the same canonical form, and what does not fit is refused.

mod damaged;
mod files;
mod numbers;
mod products;
mod refusals;
mod saved;
mod schemes;

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use half::{bf16, f16};
use kiln_models::StoredDType;
use kiln_models::adapter::{Adapter, AdapterTarget, Change, Factors, HostMatrix};
use safetensors::Dtype;
use safetensors::tensor::TensorView;

use super::*;
use crate::checkpoint::Checkpoint;

type Changes = BTreeMap<String, Change>;

/// The layers of a small model: two blocks of width 32.
fn targets() -> Vec<AdapterTarget> {
    let model = fixtures().join("checkpoints/base");
    let checkpoint = Checkpoint::open(&model).unwrap();
    checkpoint.parts().configs.adapter_targets().unwrap()
}

fn target(path: &str) -> AdapterTarget {
    let mut targets = targets().into_iter();
    targets.find(|it| it.path == path).unwrap()
}

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

/// A tensor of a test file.
#[derive(Debug, Clone)]
struct Tensor {
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

impl Tensor {
    /// Different values for different seeds, each at least 0.1 from 0.
    fn random(shape: &[usize], seed: usize, dtype: Dtype) -> Self {
        let values: Vec<f32> = (0..shape.iter().product())
            .map(|at: usize| {
                let hash =
                    (at + 1).wrapping_mul(0x9e37_79b9) ^ (seed + 1).wrapping_mul(0x85eb_ca6b);
                let hash = (hash as u32).wrapping_mul(0xc2b2_ae35) >> 8;
                let value = hash as f32 / (1 << 24) as f32;
                if hash.is_multiple_of(2) {
                    value + 0.1
                } else {
                    -value - 0.1
                }
            })
            .collect();
        Self::new(shape, &values, dtype)
    }

    fn new(shape: &[usize], values: &[f32], dtype: Dtype) -> Self {
        let bytes = |value: &f32| match dtype {
            Dtype::F32 => value.to_le_bytes().to_vec(),
            Dtype::F16 => f16::from_f32(*value).to_le_bytes().to_vec(),
            Dtype::BF16 => bf16::from_f32(*value).to_le_bytes().to_vec(),
            Dtype::F64 => f64::from(*value).to_le_bytes().to_vec(),
            Dtype::I64 => (*value as i64).to_le_bytes().to_vec(),
            Dtype::I32 => (*value as i32).to_le_bytes().to_vec(),
            Dtype::U8 | Dtype::F8_E4M3 => vec![*value as u8],
            other => panic!("{other}"),
        };
        Self {
            dtype,
            shape: shape.to_vec(),
            bytes: values.iter().flat_map(bytes).collect(),
        }
    }

    fn scalar(value: f32) -> Self {
        Self::new(&[], &[value], Dtype::F32)
    }

    /// The same tensor as the canonical form holds it.
    fn host(&self) -> HostMatrix {
        HostMatrix {
            shape: [self.shape[0], self.shape[1]],
            dtype: match self.dtype {
                Dtype::F32 => StoredDType::F32,
                Dtype::F16 => StoredDType::F16,
                Dtype::BF16 => StoredDType::Bf16,
                other => panic!("{other}"),
            },
            bytes: self.bytes.clone().into(),
        }
    }

    fn values(&self) -> Vec<f64> {
        let values = matrix::to_f32(&self.host());
        values.into_iter().map(f64::from).collect()
    }
}

/// A safetensors file in memory.
#[derive(Debug, Clone, Default)]
struct TestFile {
    tensors: BTreeMap<String, Tensor>,
    metadata: HashMap<String, String>,
}

impl TestFile {
    fn with(mut self, key: impl Into<String>, tensor: Tensor) -> Self {
        assert!(self.tensors.insert(key.into(), tensor).is_none());
        self
    }

    fn with_metadata(mut self, key: &str, value: impl Into<String>) -> Self {
        self.metadata.insert(key.to_owned(), value.into());
        self
    }

    fn bytes(&self) -> Bytes {
        let views = self.tensors.iter().map(|(key, tensor)| {
            let view = TensorView::new(tensor.dtype, tensor.shape.clone(), &tensor.bytes);
            (key.clone(), view.unwrap())
        });
        let metadata = (!self.metadata.is_empty()).then(|| self.metadata.clone());
        safetensors::serialize(views, metadata).unwrap().into()
    }

    fn open(&self) -> Result<LoraFile, LoraError> {
        open(self.bytes())
    }

    fn read(&self) -> Adapter {
        self.open().unwrap().read("test").unwrap()
    }

    fn changes(&self) -> Changes {
        self.read().changes().clone()
    }

    /// The message of the error of opening and reading.
    fn refusal(&self) -> String {
        let error = self.open().and_then(|it| it.read("test")).unwrap_err();
        error.to_string()
    }
}

fn open(bytes: Bytes) -> Result<LoraFile, LoraError> {
    LoraFile::from_bytes("x.safetensors", bytes, &targets(), &LoraOptions::default())
}

const QUERY: &str = "transformer_blocks.0.attn.to_q";

/// A small LoRA of one layer of width 32.
fn one_layer() -> TestFile {
    TestFile::default()
        .with(format!("{QUERY}.lora_A.weight"), f32s(&[4, 32], 1))
        .with(format!("{QUERY}.lora_B.weight"), f32s(&[32, 4], 2))
}

fn f32s(shape: &[usize], seed: usize) -> Tensor {
    Tensor::random(shape, seed, Dtype::F32)
}

/// The only change.
fn only(changes: &Changes) -> &Change {
    assert_eq!(changes.len(), 1, "{:?}", changes.keys());
    changes.values().next().unwrap()
}

/// The whole change of a layer in f64, with its scale.
fn delta(change: &Change) -> Vec<f64> {
    let values = |matrix: &HostMatrix| -> Vec<f64> {
        matrix::to_f32(matrix).into_iter().map(f64::from).collect()
    };
    let delta = match &change.factors {
        Factors::LowRank { down, up } => {
            product(&values(up), &values(down), up.shape[1], down.shape[1])
        }
        Factors::Kronecker { left, right } => {
            kronecker(&values(left), left.shape, &values(right), right.shape)
        }
        Factors::Dense(matrix) => values(matrix),
    };
    delta
        .into_iter()
        .map(|it| it * f64::from(change.scale))
        .collect()
}

fn product(a: &[f64], b: &[f64], inner: usize, columns: usize) -> Vec<f64> {
    let row = |a: &[f64]| -> Vec<f64> {
        let column = |n: usize| (0..inner).map(|k| a[k] * b[k * columns + n]).sum();
        (0..columns).map(column).collect()
    };
    a.chunks(inner).flat_map(row).collect()
}

fn kronecker(a: &[f64], a_shape: [usize; 2], b: &[f64], b_shape: [usize; 2]) -> Vec<f64> {
    let (rows, columns) = (a_shape[0] * b_shape[0], a_shape[1] * b_shape[1]);
    let at = |row: usize, column: usize| {
        a[row / b_shape[0] * a_shape[1] + column / b_shape[1]]
            * b[row % b_shape[0] * b_shape[1] + column % b_shape[1]]
    };
    (0..rows * columns)
        .map(|it| at(it / columns, it % columns))
        .collect()
}

/// The largest difference, in parts of the largest value.
#[track_caller]
fn assert_near(found: &[f64], expected: &[f64], bound: f64) {
    assert_eq!(found.len(), expected.len());
    let largest = expected.iter().fold(0.0, |max: f64, it| max.max(it.abs()));
    assert!(largest > 0.0);
    let differences = found.iter().zip(expected).map(|(a, b)| (a - b).abs());
    let difference = differences.fold(0.0, f64::max) / largest;
    assert!(difference <= bound, "{difference:e} > {bound:e}");
}
