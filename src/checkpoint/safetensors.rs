//! Safetensors files, memory-mapped, in memory or embedded in the binary, as the tensors of one component.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fs;
use std::ops::Range;
use std::path::Path;
use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use kiln_models::FileFault;
use kiln_models::StoredDType;
use kiln_models::TensorInfo;
use kiln_models::TensorSource;
use safetensors::Dtype;
use safetensors::tensor::Metadata;

use super::files::{is_lfs_pointer, is_there, list_folder, read_text};
use super::mapped::MappedFile;
use super::{CheckpointError, WeightAccess};

/// Size of the length field that precedes a safetensors header.
pub(super) const LENGTH_BYTES: usize = 8;

/// Largest header that the format allows; a larger length means that the file is not safetensors.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// Granularity of releasing memory: the largest page size in use (64 KiB, on some ARM machines), so
/// that its multiples are page boundaries on every machine.
const RELEASE_BYTES: usize = 64 * 1024;

/// The tensors of one component, from one or several safetensors files.
#[derive(Debug)]
pub(super) struct SafetensorsWeights {
    folder: PathBuf,
    tensors: BTreeMap<String, StoredTensor>,
    files: Vec<Arc<MappedFile>>,
    access: WeightAccess,
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
    /// Byte range of the tensor in the file.
    range: Range<usize>,
}

/// The contents of a whole file.
#[derive(Debug, Clone)]
enum FileBytes {
    Mapped(Arc<MappedFile>),
    InMemory(Bytes),
}

impl SafetensorsWeights {
    /// Opens `{stem}.safetensors.index.json` and its shards; if there is no index,
    /// `{stem}.safetensors`; if there is neither, every safetensors file in the folder.
    pub(super) fn open(
        folder: &Path,
        stem: &'static str,
        access: WeightAccess,
    ) -> Result<Self, CheckpointError> {
        let mut weights = Self {
            access,
            ..Self::new(folder)
        };
        let index = folder.join(format!("{stem}.safetensors.index.json"));
        let single = folder.join(format!("{stem}.safetensors"));
        if is_there(&index)? {
            weights.add_shards(&index)?;
        } else if is_there(&single)? {
            weights.add_file(&single)?;
        } else {
            let found = list_folder(folder)?;
            let shards = found.iter().filter(|name| name.ends_with(".safetensors"));
            let shards: Vec<&String> = shards.collect();
            if shards.is_empty() {
                return Err(CheckpointError::NoWeights {
                    folder: folder.to_owned(),
                    stem,
                    found,
                });
            }
            if let Some(missing) = shards.iter().find_map(|name| missing_shard(name, &shards)) {
                return Err(CheckpointError::ShardMissingOf {
                    shard: folder.join(missing),
                    index,
                });
            }
            for name in shards {
                weights.add_file(&folder.join(name))?;
            }
        }
        Ok(weights)
    }

    /// No tensors; `folder` is the origin that messages name.
    pub(super) fn new(folder: &Path) -> Self {
        Self {
            folder: folder.to_owned(),
            tensors: BTreeMap::new(),
            files: Vec::new(),
            access: WeightAccess::Mapped,
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
            // The index may come from an untrusted source: it must not name a file outside its
            // folder.
            if Path::new(name).file_name() != Some(name.as_ref()) {
                return Err(CheckpointError::ShardName {
                    path: index.to_owned(),
                    tensor: tensors[0].to_owned(),
                    shard: name.to_owned(),
                });
            }
            let shard = self.folder.join(name);
            let index = index.to_owned();
            if !is_there(&shard)? {
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

    /// Maps or reads a safetensors file and adds its tensors.
    fn add_file(&mut self, path: &Path) -> Result<(), CheckpointError> {
        is_there(path)?;
        if self.access == WeightAccess::InMemory {
            let bytes = fs::read(path).map_err(|source| CheckpointError::io(path, source))?;
            let header = read_header(path, &bytes)?;
            return self.add(path, &FileBytes::InMemory(bytes.into()), header);
        }
        let file = Arc::new(MappedFile::open(path)?);
        let header = read_header(path, file.bytes());
        file.check()?;
        self.files.push(Arc::clone(&file));
        self.add(path, &FileBytes::Mapped(file), header?)
    }

    /// Adds the tensors of a safetensors file embedded in the binary. `path` is its name in
    /// messages.
    pub(super) fn add_embedded(
        &mut self,
        path: &Path,
        bytes: &'static [u8],
    ) -> Result<(), CheckpointError> {
        let header = read_header(path, bytes)?;
        self.add(
            path,
            &FileBytes::InMemory(Bytes::from_static(bytes)),
            header,
        )
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

    /// Whether the tensor is stored in this file.
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
            FileBytes::Mapped(file) => Bytes::from_owner(MappedBytes {
                file: Arc::clone(file),
                range: range.clone(),
            }),
            FileBytes::InMemory(bytes) => bytes.slice(range.clone()),
        }
    }

    fn check_files(&self) -> Result<(), FileFault> {
        self.files.iter().try_for_each(|file| file.check())
    }
}

/// The bytes of a tensor in a memory map. Dropping it, which happens with the last clone of its
/// [`Bytes`], releases its resident pages, so that a checkpoint that is converted while it is loaded
/// is not in memory twice.
struct MappedBytes {
    file: Arc<MappedFile>,
    range: Range<usize>,
}

impl AsRef<[u8]> for MappedBytes {
    fn as_ref(&self) -> &[u8] {
        &self.file.bytes()[self.range.clone()]
    }
}

impl Drop for MappedBytes {
    fn drop(&mut self) {
        // The pages at both ends may hold parts of other tensors that are in use: they stay.
        let start = self.range.start.next_multiple_of(RELEASE_BYTES);
        let end = self.range.end / RELEASE_BYTES * RELEASE_BYTES;
        if start < end {
            self.file.release(start..end);
        }
    }
}

/// The names of the tensors in a safetensors file.
pub(super) fn tensor_names(path: &Path) -> Result<Vec<String>, CheckpointError> {
    let mut weights = SafetensorsWeights::new(path);
    weights.add_file(path)?;
    Ok(weights.tensors.into_keys().collect())
}

/// The first shard that is not there, of those that the name of one shard implies: it ends in
/// `-00001-of-00009.safetensors`.
fn missing_shard(name: &str, found: &[&String]) -> Option<String> {
    let rest = name.strip_suffix(".safetensors")?;
    let (rest, count) = rest.rsplit_once("-of-")?;
    let (stem, number) = rest.rsplit_once('-')?;
    number.parse::<usize>().ok()?;
    let (digits, shards) = (count.len(), count.parse::<usize>().ok()?);
    // Not as many as a name may claim: one of the first is missing.
    (1..=shards.min(found.len() + 1))
        .map(|number| format!("{stem}-{number:0digits$}-of-{count}.safetensors"))
        .find(|shard| !found.contains(&shard))
}

/// Reads and checks the header of a whole file. Returns the offset of the data in the file and the
/// parsed header.
fn read_header(path: &Path, file: &[u8]) -> Result<(usize, Metadata), CheckpointError> {
    parse_header(path, file, file.len() as u64)
}

/// Where the header of a file ends that begins with these bytes; at most where the format allows.
pub(super) fn header_end(start: &[u8]) -> u64 {
    let length = start.first_chunk::<LENGTH_BYTES>();
    let length = length.map_or(0, |length| u64::from_le_bytes(*length));
    LENGTH_BYTES as u64 + length.min(MAX_HEADER_BYTES)
}

/// Reads and checks the header of a file of `file_bytes` bytes, of which `start` has at least the
/// header. Returns the offset of the data in the file and the parsed header.
pub(super) fn parse_header(
    path: &Path,
    start: &[u8],
    file_bytes: u64,
) -> Result<(usize, Metadata), CheckpointError> {
    let wrong_size = |expected| CheckpointError::WrongSize {
        path: path.to_owned(),
        expected,
        actual: file_bytes,
    };
    let not_safetensors = |reason| CheckpointError::NotSafetensors {
        path: path.to_owned(),
        reason,
    };

    if is_lfs_pointer(start) {
        return Err(CheckpointError::LfsPointer {
            path: path.to_owned(),
        });
    }
    let Some((length, rest)) = start.split_first_chunk::<LENGTH_BYTES>() else {
        return Err(wrong_size(LENGTH_BYTES as u64));
    };
    let header_bytes = u64::from_le_bytes(*length);
    if header_bytes > MAX_HEADER_BYTES || rest.first().is_some_and(|byte| *byte != b'{') {
        return Err(not_safetensors(
            "it does not begin with a header".to_owned(),
        ));
    }
    let data_start = LENGTH_BYTES + header_bytes as usize;
    let Some(header) = start.get(LENGTH_BYTES..data_start) else {
        return Err(wrong_size(data_start as u64));
    };
    // The safetensors crate checks that tensors have the sizes of their shapes and are contiguous.
    let metadata: Metadata = serde_json::from_slice(header)
        .map_err(|error| not_safetensors(format!("its header is invalid: {error}")))?;
    let expected = data_start.saturating_add(metadata.data_len()) as u64;
    if expected != file_bytes {
        return Err(wrong_size(expected));
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
