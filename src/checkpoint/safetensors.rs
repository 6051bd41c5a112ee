//! Safetensors files, memory-mapped or embedded in the binary, as the tensors of one component.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fs::File;
use std::ops::Range;
use std::path::Path;
use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use kiln_models::StoredDType;
use kiln_models::TensorInfo;
use kiln_models::TensorSource;
use memmap2::Mmap;
use safetensors::Dtype;
use safetensors::tensor::Metadata;

use super::CheckpointError;
use super::files::{is_lfs_pointer, list_folder, read_text};

/// The length field before a safetensors header.
const LENGTH_BYTES: usize = 8;

/// The format's own limit on its header: a longer one means the file is something else.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// Memory is released in multiples of this, the largest page size in use (64 KiB, on some ARM
/// machines): a multiple of it is a page boundary everywhere.
const RELEASE_BYTES: usize = 64 * 1024;

/// The tensors of one component, from one or several safetensors files.
#[derive(Debug)]
pub(super) struct SafetensorsWeights {
    folder: PathBuf,
    tensors: BTreeMap<String, StoredTensor>,
}

/// The index of a sharded component. Its `metadata` is not read.
#[derive(serde::Deserialize)]
struct ShardIndex {
    /// Tensor name to file name.
    weight_map: BTreeMap<String, String>,
}

#[derive(Debug)]
struct StoredTensor {
    info: TensorInfo,
    file: FileBytes,
    /// Where the tensor lies in the file, in bytes.
    range: Range<usize>,
}

/// A whole file.
#[derive(Debug, Clone)]
enum FileBytes {
    Mapped(Arc<Mmap>),
    Embedded(&'static [u8]),
}

impl SafetensorsWeights {
    /// Opens `{stem}.safetensors.index.json` and its shards, or `{stem}.safetensors` if there is
    /// no index.
    pub(super) fn open(folder: &Path, stem: &'static str) -> Result<Self, CheckpointError> {
        let mut weights = Self::new(folder);
        let index = folder.join(format!("{stem}.safetensors.index.json"));
        let single = folder.join(format!("{stem}.safetensors"));
        if index.exists() {
            weights.add_shards(&index)?;
        } else if single.exists() {
            weights.add_file(&single)?;
        } else {
            let found = list_folder(folder)?;
            return Err(CheckpointError::NoWeights {
                folder: folder.to_owned(),
                stem,
                found,
            });
        }
        Ok(weights)
    }

    /// No tensors; `folder` is the origin that messages name.
    pub(super) fn new(folder: &Path) -> Self {
        Self {
            folder: folder.to_owned(),
            tensors: BTreeMap::new(),
        }
    }

    /// Adds every shard that an index names.
    fn add_shards(&mut self, index: &Path) -> Result<(), CheckpointError> {
        let ShardIndex { weight_map } =
            serde_json::from_str(&read_text(index)?).map_err(|source| {
                CheckpointError::IndexInvalid {
                    path: index.to_owned(),
                    source,
                }
            })?;

        let mut shards: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for (tensor, shard) in &weight_map {
            shards.entry(shard).or_default().push(tensor);
        }
        for (name, tensors) in shards {
            // The index came from the network: it must not reach outside its folder.
            if Path::new(name).file_name() != Some(name.as_ref()) {
                return Err(CheckpointError::ShardName {
                    path: index.to_owned(),
                    tensor: tensors[0].to_owned(),
                    shard: name.to_owned(),
                });
            }
            let shard = self.folder.join(name);
            let index = index.to_owned();
            if !shard.exists() {
                return Err(CheckpointError::ShardMissing {
                    shard,
                    index,
                    tensors: tensors.len(),
                });
            }
            self.add_file(&shard)?;
            if let Some(tensor) = tensors.into_iter().find(|tensor| !self.has(tensor, &shard)) {
                return Err(CheckpointError::TensorMissing {
                    tensor: tensor.to_owned(),
                    shard,
                    index,
                });
            }
        }
        Ok(())
    }

    /// Maps a safetensors file and adds its tensors.
    fn add_file(&mut self, path: &Path) -> Result<(), CheckpointError> {
        let map = Arc::new(map_file(path)?);
        let header = read_header(path, &map)?;
        self.add(path, &FileBytes::Mapped(map), header)
    }

    /// Adds the tensors of a safetensors file in the binary; `path` is for messages.
    pub(super) fn add_embedded(
        &mut self,
        path: &Path,
        bytes: &'static [u8],
    ) -> Result<(), CheckpointError> {
        let header = read_header(path, bytes)?;
        self.add(path, &FileBytes::Embedded(bytes), header)
    }

    fn add(
        &mut self,
        path: &Path,
        file: &FileBytes,
        (data_start, metadata): (usize, Metadata),
    ) -> Result<(), CheckpointError> {
        for (name, stored) in metadata.tensors() {
            let (start, end) = stored.data_offsets;
            let tensor = StoredTensor {
                info: TensorInfo {
                    shape: stored.shape.clone(),
                    dtype: stored_dtype(stored.dtype),
                    file: path.display().to_string(),
                },
                file: file.clone(),
                range: data_start + start..data_start + end,
            };
            match self.tensors.entry(name) {
                Entry::Vacant(entry) => entry.insert(tensor),
                Entry::Occupied(entry) => {
                    return Err(CheckpointError::DuplicateTensor {
                        tensor: entry.key().clone(),
                        first: entry.get().info.file.clone(),
                        second: tensor.info.file,
                    });
                }
            };
        }
        Ok(())
    }

    /// Whether the tensor lies in this file.
    fn has(&self, name: &str, file: &Path) -> bool {
        self.tensors
            .get(name)
            .is_some_and(|it| Path::new(&it.info.file) == file)
    }
}

impl TensorSource for SafetensorsWeights {
    fn origin(&self) -> String {
        self.folder.display().to_string()
    }

    fn names(&self) -> Vec<String> {
        self.tensors.keys().cloned().collect()
    }

    fn info(&self, name: &str) -> Option<TensorInfo> {
        self.tensors.get(name).map(|it| it.info.clone())
    }

    fn bytes(&self, name: &str) -> Bytes {
        let StoredTensor { file, range, .. } = &self.tensors[name];
        match file {
            FileBytes::Mapped(map) => Bytes::from_owner(MappedBytes {
                map: Arc::clone(map),
                range: range.clone(),
            }),
            FileBytes::Embedded(bytes) => Bytes::from_static(&bytes[range.clone()]),
        }
    }
}

/// A tensor's bytes in a map. When it drops, which [`Bytes`] sees to with its last clone, the
/// memory behind it is released, so that converting a checkpoint while loading it does not keep
/// both copies resident.
struct MappedBytes {
    map: Arc<Mmap>,
    range: Range<usize>,
}

impl AsRef<[u8]> for MappedBytes {
    fn as_ref(&self) -> &[u8] {
        &self.map[self.range.clone()]
    }
}

impl Drop for MappedBytes {
    fn drop(&mut self) {
        // Pages at the ends may hold parts of the neighbours, which may be in use: they stay.
        let start = self.range.start.next_multiple_of(RELEASE_BYTES);
        let end = self.range.end / RELEASE_BYTES * RELEASE_BYTES;
        if start < end {
            release(&self.map, start..end);
        }
    }
}

#[cfg(unix)]
#[expect(
    unsafe_code,
    reason = "memmap2 marks DontNeed unsafe because of private, writable maps"
)]
fn release(map: &Mmap, pages: Range<usize>) {
    // SAFETY: `map` is a read-only map of a file: the system forgets which memory holds the pages,
    // and a later read of them, through whatever slice, finds the file's bytes again.
    let released = unsafe {
        map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, pages.start, pages.len())
    };
    // Nothing depends on it but the memory in use.
    if let Err(error) = released {
        tracing::debug!(%error, "cannot release the memory of a loaded tensor");
    }
}

#[cfg(not(unix))]
fn release(_map: &Mmap, _pages: Range<usize>) {}

#[expect(unsafe_code, reason = "the only way to map a file")]
fn map_file(path: &Path) -> Result<Mmap, CheckpointError> {
    let file = File::open(path).map_err(|source| CheckpointError::io(path, source))?;
    // SAFETY: sound as long as nobody changes or shortens the file while it is mapped. Nothing here
    // does, and what replaces model files writes a new file and renames it (Git, the Hub's tools);
    // every program that maps weights relies on that.
    unsafe { Mmap::map(&file) }.map_err(|source| CheckpointError::io(path, source))
}

/// Reads and checks a header: the offset of the data in the file, and what lies in it.
fn read_header(path: &Path, file: &[u8]) -> Result<(usize, Metadata), CheckpointError> {
    let wrong_size = |expected| CheckpointError::WrongSize {
        path: path.to_owned(),
        expected,
        actual: file.len() as u64,
    };
    let not_safetensors = |reason| CheckpointError::NotSafetensors {
        path: path.to_owned(),
        reason,
    };

    if is_lfs_pointer(file) {
        return Err(CheckpointError::LfsPointer {
            path: path.to_owned(),
        });
    }
    let Some((length, rest)) = file.split_first_chunk::<LENGTH_BYTES>() else {
        return Err(wrong_size(LENGTH_BYTES as u64));
    };
    let header_bytes = u64::from_le_bytes(*length);
    if header_bytes > MAX_HEADER_BYTES || rest.first().is_some_and(|byte| *byte != b'{') {
        return Err(not_safetensors(
            "it does not begin with a header".to_owned(),
        ));
    }
    let data_start = LENGTH_BYTES + header_bytes as usize;
    let Some(header) = file.get(LENGTH_BYTES..data_start) else {
        return Err(wrong_size(data_start as u64));
    };
    // The crate checks that the tensors have the sizes of their shapes and lie end to end.
    let metadata: Metadata = serde_json::from_slice(header)
        .map_err(|error| not_safetensors(format!("its header is invalid: {error}")))?;
    let file_bytes = data_start.saturating_add(metadata.data_len());
    if file_bytes != file.len() {
        return Err(wrong_size(file_bytes as u64));
    }
    Ok((data_start, metadata))
}

fn stored_dtype(dtype: Dtype) -> StoredDType {
    match dtype {
        Dtype::F32 => StoredDType::F32,
        Dtype::F16 => StoredDType::F16,
        Dtype::BF16 => StoredDType::Bf16,
        other => StoredDType::Other(other.to_string()),
    }
}
