//! The intermediate results of a run as a safetensors file, to compare runs.

mod read;

pub(super) use self::read::read;

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};

use kiln_models::job::TraceTensor;
use safetensors::tensor::{Dtype, SafeTensorError, TensorView};

use crate::files;
use crate::request::PromptTokens;
use crate::version;

use super::interrupt;

/// Why a dump cannot be written, or cannot be compared with.
#[derive(Debug, thiserror::Error)]
pub(super) enum DumpError {
    #[error("cannot write the dump {}", path.display())]
    Write {
        path: PathBuf,
        source: SafeTensorError,
    },
    #[error("cannot read {}", path.display())]
    Io { path: PathBuf, source: io::Error },
    #[error("{} is not a safetensors file", path.display())]
    Format {
        path: PathBuf,
        source: SafeTensorError,
    },
    #[error("{name} in {} is {dtype} of shape {shape:?}, and not {expected}", path.display())]
    Tensor {
        path: PathBuf,
        name: String,
        dtype: Dtype,
        shape: Vec<usize>,
        expected: &'static str,
    },
    #[error("{} has neither image_u8 nor image_float: it is not the dump of a whole run", path.display())]
    NoImage { path: PathBuf },
    #[error("{} was made from another prompt: its {name} differ from the given prompt's", path.display())]
    OtherPrompt { path: PathBuf, name: &'static str },
}

/// Writes `token_ids` and `negative_token_ids` (i64, `[tokens]`) and every tensor of the trace
/// (f32). The file's metadata has kiln's version.
pub(super) fn write(
    path: &Path,
    tokens: &PromptTokens,
    trace: &[TraceTensor],
) -> Result<(), DumpError> {
    let mut entries = vec![Entry::ids("token_ids", &tokens.prompt)];
    entries.extend(
        tokens
            .negative_prompt
            .as_ref()
            .map(|ids| Entry::ids("negative_token_ids", ids)),
    );
    entries.extend(trace.iter().map(Entry::trace));

    let failed = |source| DumpError::Write {
        path: path.to_owned(),
        source,
    };
    let views: Vec<(&str, TensorView<'_>)> = entries
        .iter()
        .map(|entry| {
            let view = TensorView::new(entry.dtype, entry.shape.clone(), &entry.bytes);
            Ok((entry.name.as_str(), view?))
        })
        .collect::<Result<_, _>>()
        .map_err(failed)?;
    let metadata = HashMap::from([("kiln".to_owned(), version::VERSION.to_owned())]);
    let file = safetensors::serialize(views, Some(metadata)).map_err(failed)?;
    interrupt::clean_up_on_signals();
    files::write_private(path, &file).map_err(|error| failed(error.into()))
}

struct Entry {
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

impl Entry {
    fn ids(name: &str, ids: &[u32]) -> Self {
        Self {
            name: name.to_owned(),
            dtype: Dtype::I64,
            shape: vec![ids.len()],
            bytes: ids
                .iter()
                .flat_map(|id| i64::from(*id).to_le_bytes())
                .collect(),
        }
    }

    fn trace(tensor: &TraceTensor) -> Self {
        Self {
            name: tensor.name.clone(),
            dtype: Dtype::F32,
            shape: tensor.shape.clone(),
            bytes: tensor
                .values
                .iter()
                .flat_map(|value| value.to_le_bytes())
                .collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use safetensors::SafeTensors;

    use super::*;

    #[test]
    fn a_dump_reads_back() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run.safetensors");
        let tokens = PromptTokens {
            prompt: vec![5, 7],
            negative_prompt: Some(vec![9]),
        };
        let noise = TraceTensor {
            name: "initial_noise".to_owned(),
            shape: vec![1, 2],
            values: vec![0.5, -1.0],
        };
        write(&path, &tokens, &[noise]).unwrap();

        let bytes = std::fs::read(&path).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let ids = file.tensor("token_ids").unwrap();
        assert_eq!((ids.dtype(), ids.shape()), (Dtype::I64, [2].as_slice()));
        assert_eq!(
            ids.data(),
            [5_i64.to_le_bytes(), 7_i64.to_le_bytes()].concat()
        );
        assert_eq!(file.tensor("negative_token_ids").unwrap().shape(), [1]);
        let noise = file.tensor("initial_noise").unwrap();
        assert_eq!(
            (noise.dtype(), noise.shape()),
            (Dtype::F32, [1, 2].as_slice())
        );
        assert_eq!(
            noise.data(),
            [0.5_f32.to_le_bytes(), (-1.0_f32).to_le_bytes()].concat()
        );
    }
}
