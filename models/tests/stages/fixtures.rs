//! Reads the committed checkpoints and recorded stages, and compares with them.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use burn::tensor::{DType, Tensor, TensorData};
use bytes::Bytes;
use kiln_models::config::ConfigText;
use kiln_models::families::{CheckpointConfigs, CheckpointParts};
use kiln_models::{Precision, StoredDType, TensorInfo, TensorSource};
use kiln_ops::FusedOps;
use safetensors::{Dtype, SafeTensors};

pub(crate) const F32: Precision = Precision {
    model: DType::F32,
    activations: DType::F32,
};

/// The root package's folder of fixtures. Tests of several crates include this file, so it is looked
/// for in every parent folder of the crate.
pub(crate) fn folder() -> PathBuf {
    let parents = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors();
    let mut fixtures = parents.map(|parent| parent.join("tests/fixtures"));
    fixtures.find(|folder| folder.is_dir()).unwrap()
}

pub(crate) fn checkpoint(name: &str) -> PathBuf {
    match name {
        "demo" => folder().join("../../models/demo"),
        name => folder().join("checkpoints").join(name),
    }
}

pub(crate) fn config(checkpoint_name: &str, component: &str) -> ConfigText {
    config_file(checkpoint_name, &format!("{component}/config.json"))
}

pub(crate) fn config_file(checkpoint_name: &str, path: &str) -> ConfigText {
    let file = checkpoint(checkpoint_name).join(path);
    ConfigText {
        text: fs::read_to_string(&file).unwrap(),
        file: file.display().to_string(),
    }
}

/// Reads a whole checkpoint.
pub(crate) fn parts(checkpoint_name: &str) -> CheckpointParts {
    CheckpointParts {
        configs: CheckpointConfigs {
            model_index: config_file(checkpoint_name, "model_index.json"),
            scheduler: config_file(checkpoint_name, "scheduler/scheduler_config.json"),
            text_encoder: config(checkpoint_name, "text_encoder"),
            transformer: config(checkpoint_name, "transformer"),
            vae: config(checkpoint_name, "vae"),
        },
        text_encoder: Component::open(checkpoint_name, "text_encoder"),
        transformer: Component::open(checkpoint_name, "transformer"),
        vae: Component::open(checkpoint_name, "vae"),
    }
}

/// The tensors of one component of a checkpoint, in memory.
#[derive(Debug)]
pub(crate) struct Component {
    origin: String,
    tensors: BTreeMap<String, (TensorInfo, Bytes)>,
}

impl Component {
    pub(crate) fn open(checkpoint_name: &str, component: &str) -> Arc<dyn TensorSource> {
        let origin = checkpoint(checkpoint_name).join(component);
        let files = fs::read_dir(&origin)
            .unwrap()
            .map(|entry| entry.unwrap().path());
        let mut tensors = BTreeMap::new();
        for file in files.filter(|file| file.extension().is_some_and(|e| e == "safetensors")) {
            tensors.extend(read(&file));
        }
        Arc::new(Self {
            origin: origin.display().to_string(),
            tensors,
        })
    }
}

impl TensorSource for Component {
    fn origin(&self) -> String {
        self.origin.clone()
    }

    fn names(&self) -> Vec<String> {
        self.tensors.keys().cloned().collect()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        self.tensors.get(name).map(|(info, _)| info.clone())
    }

    fn bytes(&self, name: &str) -> Bytes {
        self.tensors[name].1.clone()
    }
}

/// The recorded stages of a case.
pub(crate) struct Stages(pub(crate) BTreeMap<String, (TensorInfo, Bytes)>);

impl Stages {
    pub(crate) fn open(case: &str) -> Self {
        Self::read(&folder().join("cases").join(format!("{case}.safetensors")))
    }

    pub(crate) fn read(file: &Path) -> Self {
        Self(read(file))
    }

    pub(crate) fn shape(&self, name: &str) -> Vec<usize> {
        self.0[name].0.shape.clone()
    }

    pub(crate) fn values(&self, name: &str) -> Vec<f32> {
        let (info, bytes) = self
            .0
            .get(name)
            .unwrap_or_else(|| panic!("no stage {name}"));
        assert_eq!(info.dtype, StoredDType::F32, "{name}");
        bytes
            .chunks_exact(4)
            .map(|v| f32::from_le_bytes(v.try_into().unwrap()))
            .collect()
    }

    pub(crate) fn ids(&self, name: &str) -> Vec<u32> {
        let ids = self.0[name].1.chunks_exact(8);
        ids.map(|v| i64::from_le_bytes(v.try_into().unwrap()) as u32)
            .collect()
    }

    /// Makes a tensor of rank `D` of a stage. Drops leading dimensions of 1 to reach that rank.
    pub(crate) fn tensor<B: FusedOps, const D: usize>(
        &self,
        name: &str,
        device: &B::Device,
    ) -> Tensor<B, D> {
        let mut shape = self.shape(name);
        while shape.len() > D && shape[0] == 1 {
            shape.remove(0);
        }
        let data = TensorData::new(self.values(name), shape);
        Tensor::from_data(data, (device, DType::F32))
    }

    /// Asserts that a tensor equals a stage, relative to the stage's largest magnitude.
    pub(crate) fn assert_close<B: FusedOps, const D: usize>(
        &self,
        name: &str,
        actual: Tensor<B, D>,
        tolerance: f32,
    ) {
        let actual: Vec<f32> = actual.cast(DType::F32).into_data().into_vec().unwrap();
        assert_close(name, &actual, &self.values(name), tolerance);
    }
}

/// Asserts that the largest difference is within `tolerance` of the largest expected magnitude.
pub(crate) fn assert_close(name: &str, actual: &[f32], expected: &[f32], tolerance: f32) {
    assert_eq!(actual.len(), expected.len(), "{name}: number of values");
    let magnitude = expected
        .iter()
        .fold(0.0_f32, |largest, v| largest.max(v.abs()));
    assert!(magnitude > 0.0, "{name}: the reference is all zeros");
    let difference = actual
        .iter()
        .zip(expected)
        .fold(0.0_f32, |largest, (a, e)| largest.max((a - e).abs()));
    let relative = difference / magnitude;
    println!("{name}: {relative:.2e}");
    assert!(
        relative <= tolerance && actual.iter().all(|v| v.is_finite()),
        "{name}: off by {relative:.2e} of the largest magnitude, allowed is {tolerance:.0e}"
    );
}

pub(crate) fn read(file: &Path) -> BTreeMap<String, (TensorInfo, Bytes)> {
    let bytes = Bytes::from(fs::read(file).unwrap());
    let parsed = SafeTensors::deserialize(&bytes).unwrap();
    let tensors = parsed.iter().map(|(name, view)| {
        let dtype = match view.dtype() {
            Dtype::F32 => StoredDType::F32,
            Dtype::F16 => StoredDType::F16,
            Dtype::BF16 => StoredDType::Bf16,
            other => StoredDType::Other(format!("{other:?}")),
        };
        let shape = view.shape().to_vec();
        let info = TensorInfo {
            shape,
            dtype,
            file: file.display().to_string(),
        };
        (name.to_owned(), (info, bytes.slice_ref(view.data())))
    });
    tensors.collect()
}
