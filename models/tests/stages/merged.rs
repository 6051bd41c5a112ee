//! Weights with an adapter merged into them, compared with diffusers' `fuse_lora`.
//! `tests/reference/make_merged_fixtures.py` makes the reference.

use std::collections::BTreeMap;
use std::sync::Arc;

use half::bf16;
use kiln_models::adapter::{Adapter, Change, Factors, HostMatrix, MergedSource};
use kiln_models::families::CheckpointParts;
use kiln_models::{StoredDType, TensorSource};

use crate::failure::{generate, job, open};
use crate::fixtures::{Component, Stages, folder, parts};
use crate::low_rank::{Kind, adapter, difference, recorded, with};

/// `SCALE` of the script.
const SCALE: f32 = 0.7;

/// The transformer of a checkpoint with the adapter of the reference, and the reference.
fn merged(checkpoint: &str) -> (MergedSource, Stages) {
    let file = folder().join(format!("merged/{checkpoint}.safetensors"));
    let stages = Stages::read(&file);
    let matrix = |name: &str| {
        let (info, bytes) = &stages.0[name];
        HostMatrix {
            shape: [info.shape[0], info.shape[1]],
            dtype: info.dtype.clone(),
            bytes: bytes.clone(),
        }
    };
    let paths = stages
        .0
        .keys()
        .filter_map(|name| name.strip_suffix(".down"));
    let change = |path: &str| Change {
        factors: Factors::LowRank {
            down: matrix(&format!("{path}.down")),
            up: matrix(&format!("{path}.up")),
        },
        scale: 1.0,
    };
    let changes: BTreeMap<String, Change> =
        paths.map(|path| (path.to_owned(), change(path))).collect();
    // 14 linear layers in each of two blocks, and six outside.
    assert_eq!(changes.len(), 34);
    let adapter = Arc::new(Adapter::new(checkpoint, changes));
    let base = Component::open(checkpoint, "transformer");
    (MergedSource::new(base, adapter, SCALE), stages)
}

fn f32s(bytes: &[u8]) -> impl Iterator<Item = f32> {
    bytes
        .as_chunks::<4>()
        .0
        .iter()
        .map(|it| f32::from_le_bytes(*it))
}

fn bf16s(bytes: &[u8]) -> impl Iterator<Item = f32> {
    let elements = bytes.as_chunks::<2>().0.iter();
    elements.map(|it| bf16::from_le_bytes(*it).to_f32())
}

#[test]
fn merged_f32_weights_are_those_of_diffusers() {
    let (source, reference) = merged("base");
    assert_eq!(source.main_dtype(), Some(StoredDType::F32));
    for name in reference.0.keys() {
        let Some(path) = name.strip_suffix(".fused") else {
            continue;
        };
        let found: Vec<f32> = f32s(&source.bytes(&format!("{path}.weight"))).collect();
        crate::fixtures::assert_close(path, &found, &reference.values(name), 1e-6);
    }
}

/// diffusers rounds the change to bf16 and then the sum; a merged weight is rounded once. So a few
/// weights are neighbours of those of diffusers, at the spacing of the larger of weight and sum.
#[test]
fn merged_bf16_weights_are_those_of_diffusers_but_for_its_rounding_of_the_change() {
    let (source, reference) = merged("bf16");
    assert_eq!(source.main_dtype(), Some(StoredDType::Bf16));
    let base = Component::open("bf16", "transformer");
    let (mut equal, mut count) = (0, 0);
    for (name, (info, expected)) in &reference.0 {
        let Some(path) = name.strip_suffix(".fused") else {
            continue;
        };
        assert_eq!(info.dtype, StoredDType::Bf16);
        let (found, weight) = {
            let name = format!("{path}.weight");
            (source.bytes(&name), base.bytes(&name))
        };
        let found = f32s(&found).map(|it| bf16::from_f32(it).to_f32());
        for ((found, expected), weight) in found.zip(bf16s(expected)).zip(bf16s(&weight)) {
            let spacing = weight.abs().max(expected.abs()) / 128.0;
            assert!(
                (found - expected).abs() <= spacing,
                "{path}: {found} and {expected}"
            );
            equal += usize::from(found == expected);
            count += 1;
        }
    }
    println!("{equal} of {count} weights are equal");
    assert!(equal * 100 >= count * 99, "{equal} of {count}");
}

#[test]
fn a_merged_adapter_equals_the_adapter_at_run_time() {
    let base = parts("base");
    for kind in [Kind::LowRank(4), Kind::Kronecker, Kind::Dense] {
        let adapter = adapter(&base, kind, 1, |_| true);
        for scale in [0.35, -1.0] {
            let source = Arc::clone(&base.transformer);
            let merged = CheckpointParts {
                transformer: Arc::new(MergedSource::new(source, Arc::clone(&adapter), scale)),
                ..base.clone()
            };
            let merged = generate(&mut *open(&merged), 1, recorded(job(2)));
            let plain = generate(&mut *open(&base), 1, recorded(job(2)));
            let job = with(&[(&adapter, scale)], recorded(job(2)));
            let at_run_time = generate(&mut *open(&base), 1, job);
            assert!(difference(&plain, &merged) > 1e-2);
            let error = difference(&at_run_time, &merged);
            println!("{kind:?} with scale {scale}: {error:e}");
            assert!(error < 5e-6, "{kind:?} with scale {scale}: {error:e}");
        }
    }
}
