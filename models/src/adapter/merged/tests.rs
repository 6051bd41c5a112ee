//! Merged weights against `weight + scale · change` in f64.

use std::collections::BTreeMap;

use super::*;
use crate::noise::{NoiseGenerator, randn};

/// A component of one linear layer with a bias, and a norm.
#[derive(Debug)]
struct Layers {
    shape: [usize; 2],
    dtype: StoredDType,
    weight: Bytes,
}

impl Layers {
    fn new(shape: [usize; 2], dtype: StoredDType) -> Self {
        let values = values(1, shape[0] * shape[1]);
        let weight = stored(&values, &dtype);
        Self {
            shape,
            dtype,
            weight,
        }
    }

    fn weight(&self) -> Vec<f32> {
        let mut values = Vec::new();
        widen(&self.weight, &self.dtype, &mut values);
        values
    }
}

impl TensorSource for Layers {
    fn origin(&self) -> String {
        "layers".to_owned()
    }

    fn names(&self) -> Vec<String> {
        ["a.bias", "a.weight", "norm.weight"]
            .map(str::to_owned)
            .to_vec()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        let shape = match name {
            "a.weight" => self.shape.to_vec(),
            "a.bias" | "norm.weight" => vec![self.shape[0]],
            _ => return None,
        };
        Some(TensorInfo {
            shape,
            dtype: self.dtype.clone(),
            file: "layers.safetensors".to_owned(),
        })
    }

    fn bytes(&self, _name: &str) -> Bytes {
        self.weight.clone()
    }
}

fn values(seed: u64, count: usize) -> Vec<f32> {
    randn(NoiseGenerator::Cpu, seed, count)
}

fn stored(values: &[f32], dtype: &StoredDType) -> Bytes {
    let bytes: Vec<u8> = match dtype {
        StoredDType::F32 => values.iter().flat_map(|it| it.to_le_bytes()).collect(),
        StoredDType::F16 => (values.iter())
            .flat_map(|it| f16::from_f32(*it).to_le_bytes())
            .collect(),
        StoredDType::Bf16 => (values.iter())
            .flat_map(|it| bf16::from_f32(*it).to_le_bytes())
            .collect(),
        StoredDType::Other(_) => unreachable!(),
    };
    bytes.into()
}

fn matrix(seed: u64, shape: [usize; 2], dtype: &StoredDType) -> HostMatrix {
    HostMatrix {
        shape,
        dtype: dtype.clone(),
        bytes: stored(&values(seed, shape[0] * shape[1]), dtype),
    }
}

/// The factors of a change of a `[12, 20]` weight.
fn factors(dtype: &StoredDType) -> [Factors; 4] {
    let low_rank = |rank| Factors::LowRank {
        down: matrix(2, [rank, 20], dtype),
        up: matrix(3, [12, rank], dtype),
    };
    [
        low_rank(1),
        low_rank(5),
        Factors::Kronecker {
            left: matrix(4, [3, 4], dtype),
            right: matrix(5, [4, 5], dtype),
        },
        Factors::Dense(matrix(6, [12, 20], dtype)),
    ]
}

/// The change `[out, in]` of these factors, in f64.
fn change(factors: &Factors) -> Vec<f64> {
    let [rows, columns] = factors.shape();
    let at = |matrix: &HostMatrix, row: usize, column: usize| {
        f64::from(widened(matrix)[row * matrix.shape[1] + column])
    };
    let element = |row: usize, column: usize| match factors {
        Factors::LowRank { down, up } => {
            let terms = 0..down.shape[0];
            terms.map(|k| at(up, row, k) * at(down, k, column)).sum()
        }
        Factors::Kronecker { left, right } => {
            let [p, q] = right.shape;
            at(left, row / p, column / q) * at(right, row % p, column % q)
        }
        Factors::Dense(matrix) => at(matrix, row, column),
    };
    let rows = (0..rows).flat_map(|row| (0..columns).map(move |column| (row, column)));
    rows.map(|(row, column)| element(row, column)).collect()
}

fn merged(layers: Layers, factors: Factors, scale: f32, user_scale: f32) -> MergedSource {
    let changes = BTreeMap::from([("a".to_owned(), Change { factors, scale })]);
    let adapter = Arc::new(Adapter::new("fox", changes));
    MergedSource::new(Arc::new(layers), adapter, user_scale)
}

fn weight(source: &MergedSource) -> Vec<f32> {
    let mut values = Vec::new();
    widen(&source.bytes("a.weight"), &StoredDType::F32, &mut values);
    values
}

const TYPES: [StoredDType; 3] = [StoredDType::F32, StoredDType::F16, StoredDType::Bf16];

#[test]
fn every_kind_of_factors_is_added_in_f32_to_every_type_of_weight() {
    for dtype in TYPES {
        for factors in TYPES.iter().flat_map(factors) {
            let layers = Layers::new([12, 20], dtype.clone());
            let change = change(&factors);
            let expected: Vec<f64> = (layers.weight().iter().zip(&change))
                .map(|(weight, change)| f64::from(*weight) + 0.75 * -1.5 * change)
                .collect();
            let largest = expected.iter().fold(0.0_f64, |max, it| max.max(it.abs()));
            let found = weight(&merged(layers, factors.clone(), 0.75, -1.5));
            assert_eq!(found.len(), expected.len());
            for (found, expected) in found.iter().zip(&expected) {
                let difference = (f64::from(*found) - expected).abs() / largest;
                assert!(difference < 1e-6, "{dtype:?} {factors:?}: {difference}");
            }
        }
    }
}

/// More elements than one task has, and a last task with fewer rows.
#[test]
fn parts_of_a_weight_are_merged_with_their_own_rows() {
    let (rows, columns, rank) = (1001, 300, 3);
    let layers = Layers::new([rows, columns], StoredDType::F32);
    let factors = Factors::LowRank {
        down: matrix(2, [rank, columns], &StoredDType::F32),
        up: matrix(3, [rows, rank], &StoredDType::F32),
    };
    assert!(rows * columns > 2 * ELEMENTS_AT_ONCE);
    let change = change(&factors);
    let before = layers.weight();
    let after = weight(&merged(layers, factors, 1.0, 0.5));
    for ((before, change), after) in before.iter().zip(&change).zip(&after) {
        let expected = f64::from(*before) + 0.5 * change;
        assert!((f64::from(*after) - expected).abs() < 1e-5);
    }
}

/// The sum is rounded to bf16 once: nearly every weight is the nearest value to the exact sum.
#[test]
fn a_merged_weight_is_rounded_once() {
    let shape = [64, 200];
    let factors = Factors::LowRank {
        down: matrix(2, [8, shape[1]], &StoredDType::Bf16),
        up: matrix(3, [shape[0], 8], &StoredDType::Bf16),
    };
    let change = change(&factors);
    // Changes far below the spacing of bf16 and near it, and changes as large as the weights.
    for scale in [1e-4, 1e-2, 0.3] {
        let layers = Layers::new(shape, StoredDType::Bf16);
        let before = layers.weight();
        let expected = before
            .iter()
            .zip(&change)
            .map(|(weight, change)| bf16::from_f64(f64::from(*weight) + f64::from(scale) * change));
        let found = weight(&merged(layers, factors.clone(), 1.0, scale));
        let found = found.into_iter().map(bf16::from_f32);
        let ulps = found.zip(expected).map(|(found, expected)| {
            assert_eq!(found.is_sign_negative(), expected.is_sign_negative());
            found.to_bits().abs_diff(expected.to_bits())
        });
        let ulps: Vec<u16> = ulps.collect();
        assert!(ulps.iter().all(|ulps| *ulps <= 1), "{scale}");
        let equal = ulps.iter().filter(|ulps| **ulps == 0).count();
        assert!(equal * 100 >= ulps.len() * 99, "{scale}: {equal}");
    }
}

#[test]
fn other_tensors_stay_as_they_are() {
    let layers = Layers::new([12, 20], StoredDType::Bf16);
    let stored = layers.weight.clone();
    let names = layers.names();
    let source = merged(layers, factors(&StoredDType::F32)[1].clone(), 1.0, 1.0);
    assert_eq!(source.names(), names);
    assert_eq!(source.origin(), "layers");
    assert_eq!(source.main_dtype(), Some(StoredDType::Bf16));
    assert_eq!(source.info("b.weight"), None);
    for name in ["a.bias", "norm.weight"] {
        assert_eq!(source.info(name).unwrap().dtype, StoredDType::Bf16);
        // Also not copied.
        assert_eq!(source.bytes(name).as_ptr(), stored.as_ptr());
    }
    let info = source.declare("a.weight", &[12, 20]).unwrap();
    assert_eq!(info, source.info("a.weight").unwrap());
    assert_eq!((info.shape, info.dtype), (vec![12, 20], StoredDType::F32));
    assert_eq!(source.bytes("a.weight").len(), 12 * 20 * size_of::<f32>());
    source.check_files().unwrap();
}
