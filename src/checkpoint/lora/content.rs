//! The bytes of an adapter file, on disk or in memory, and its safetensors header.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, ErrorKind, Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use bytes::Bytes;
use ring::digest;
use safetensors::Dtype;

use super::error::{LoraFault, shown};
use super::{MAX_FILE_BYTES, PEFT_CONFIG, PEFT_WEIGHTS};
use crate::checkpoint::CheckpointError;
use crate::checkpoint::files::is_lfs_pointer;
use crate::checkpoint::safetensors::{LENGTH_BYTES, header_end, parse_header};

/// Endings of files that PyTorch saves as pickles.
const PICKLES: [&str; 6] = ["pt", "pth", "bin", "ckpt", "pkl", "pickle"];

/// The largest `adapter_config.json` that is read.
const MAX_CONFIG_BYTES: u64 = 4 << 20;

/// Where the bytes of an adapter are.
#[derive(Debug)]
pub(super) enum Source {
    File {
        path: PathBuf,
        /// The content of `adapter_config.json` beside it.
        peft_config: Option<String>,
    },
    Memory(Bytes),
}

impl Source {
    /// The files that a path stands for: a file; or PEFT's two, of a folder, or if `path` is the one
    /// with the weights.
    pub(super) fn files(path: &Path) -> Vec<PathBuf> {
        if path.is_dir() {
            return vec![path.join(PEFT_WEIGHTS), path.join(PEFT_CONFIG)];
        }
        let mut files = vec![path.to_owned()];
        if path.file_name().is_some_and(|name| name == PEFT_WEIGHTS) {
            files.push(path.with_file_name(PEFT_CONFIG));
        }
        files
    }

    /// Finds the file of the weights, and reads PEFT's configuration.
    pub(super) fn find(path: &Path) -> Result<Self, LoraFault> {
        let is_folder = fs::metadata(path).map_err(fault_of_io)?.is_dir();
        let mut files = Self::files(path).into_iter();
        let weights = files.next().unwrap_or_default();
        let peft_config = match files.next() {
            Some(config) if config.exists() => Some(read_config(&config)?),
            Some(_) if is_folder => return Err(LoraFault::NotInFolder(PEFT_CONFIG)),
            // Another file, or the weights of PEFT without their folder.
            _ => None,
        };
        if is_folder && !weights.exists() {
            let pickle = path.join("adapter_model.bin").exists();
            return Err(if pickle {
                LoraFault::Pickle
            } else {
                LoraFault::NotInFolder(PEFT_WEIGHTS)
            });
        }
        if has_pickle_name(&weights) {
            return Err(LoraFault::Pickle);
        }
        Ok(Self::File {
            path: weights,
            peft_config,
        })
    }

    /// The same source, with PEFT's configuration read again.
    pub(super) fn find_again(&self) -> Result<Self, LoraFault> {
        match self {
            Self::File { path, .. } => Self::find(path),
            Self::Memory(bytes) => Ok(Self::Memory(bytes.clone())),
        }
    }

    pub(super) fn peft_config(&self) -> Option<&str> {
        match self {
            Self::File { peft_config, .. } => peft_config.as_deref(),
            Self::Memory(_) => None,
        }
    }
}

fn read_config(path: &Path) -> Result<String, LoraFault> {
    let metadata = fs::metadata(path).map_err(fault_of_io)?;
    if !metadata.is_file() {
        return Err(LoraFault::NotInFolder(PEFT_CONFIG));
    }
    if metadata.len() > MAX_CONFIG_BYTES {
        return Err(LoraFault::TooLarge {
            what: "adapter_config.json has",
            bytes: metadata.len(),
            most: MAX_CONFIG_BYTES,
        });
    }
    let text = fs::read_to_string(path).map_err(fault_of_io)?;
    if is_lfs_pointer(text.as_bytes()) {
        return Err(LoraFault::LfsPointer);
    }
    Ok(crate::without_mark(text))
}

fn has_pickle_name(path: &Path) -> bool {
    let extension = path.extension().unwrap_or_default();
    PICKLES.iter().any(|it| extension.eq_ignore_ascii_case(it))
}

fn fault_of_io(error: io::Error) -> LoraFault {
    match error.kind() {
        ErrorKind::NotFound | ErrorKind::NotADirectory => LoraFault::Missing,
        // Shorter than its length said.
        ErrorKind::UnexpectedEof => LoraFault::Changed,
        _ => LoraFault::Io(error),
    }
}

/// The bytes of an adapter file while it is read.
#[derive(Debug)]
pub(super) struct Content {
    bytes: u64,
    data: Data,
}

#[derive(Debug)]
enum Data {
    File {
        file: File,
        /// When the file was last modified, where the system knows.
        modified: Option<SystemTime>,
    },
    Memory(Bytes),
}

impl Content {
    pub(super) fn open(source: &Source) -> Result<Self, LoraFault> {
        let content = match source {
            Source::File { path, .. } => {
                // Opening a named pipe would wait for a writer.
                if !fs::metadata(path).map_err(fault_of_io)?.is_file() {
                    return Err(LoraFault::NotAFile);
                }
                let file = File::open(path).map_err(fault_of_io)?;
                let metadata = file.metadata().map_err(fault_of_io)?;
                let modified = metadata.modified().ok();
                Self {
                    bytes: metadata.len(),
                    data: Data::File { file, modified },
                }
            }
            Source::Memory(bytes) => Self {
                bytes: bytes.len() as u64,
                data: Data::Memory(bytes.clone()),
            },
        };
        if content.bytes == 0 {
            return Err(LoraFault::Empty);
        }
        if content.bytes > MAX_FILE_BYTES {
            return Err(LoraFault::TooLarge {
                what: "the file has",
                bytes: content.bytes,
                most: MAX_FILE_BYTES,
            });
        }
        Ok(content)
    }

    /// Reads a range of bytes, which must lie in the file.
    pub(super) fn read(&self, range: Range<u64>) -> Result<Bytes, LoraFault> {
        if range.start > range.end || range.end > self.bytes {
            return Err(LoraFault::Changed);
        }
        match &self.data {
            Data::File { file, .. } => {
                let mut file: &File = file;
                let mut bytes = vec![0; (range.end - range.start) as usize];
                file.seek(SeekFrom::Start(range.start))
                    .and_then(|_| file.read_exact(&mut bytes))
                    .map_err(fault_of_io)?;
                Ok(bytes.into())
            }
            Data::Memory(bytes) => Ok(bytes.slice(range.start as usize..range.end as usize)),
        }
    }

    /// Refuses a file that was written to since it was opened.
    pub(super) fn check_unchanged(&self) -> Result<(), LoraFault> {
        let Data::File { file, modified } = &self.data else {
            return Ok(());
        };
        let now = file.metadata().map_err(fault_of_io)?;
        if now.len() != self.bytes || now.modified().ok() != *modified {
            return Err(LoraFault::Changed);
        }
        Ok(())
    }
}

/// The header of a safetensors file.
#[derive(Debug, PartialEq)]
pub(super) struct Header {
    /// SHA-256 of the header's JSON, in hexadecimal.
    pub(super) hash: String,
    pub(super) metadata: BTreeMap<String, String>,
    pub(super) tensors: BTreeMap<String, Stored>,
}

/// A stored tensor.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Stored {
    pub(super) dtype: Dtype,
    pub(super) shape: Vec<usize>,
    /// Its bytes in the file.
    pub(super) range: Range<u64>,
}

impl Header {
    pub(super) fn read(content: &Content) -> Result<Self, LoraFault> {
        let first = content.read(0..content.bytes.min(64))?;
        let end = header_end(&first).min(content.bytes);
        let start = content.read(0..end.max(first.len() as u64))?;
        // The path is not in the messages of this module.
        let parsed = parse_header(Path::new(""), &start, content.bytes);
        let (data_start, parsed) = parsed.map_err(|error| fault_of_header(&first, error))?;
        let json = &start[LENGTH_BYTES..data_start];
        let hash = digest::digest(&digest::SHA256, json);
        let hash = hash.as_ref().iter().map(|byte| format!("{byte:02x}"));
        let stored = |tensor: &safetensors::tensor::TensorInfo| {
            let (start, end) = tensor.data_offsets;
            Stored {
                dtype: tensor.dtype,
                shape: tensor.shape.clone(),
                range: (data_start + start) as u64..(data_start + end) as u64,
            }
        };
        let tensors = parsed.tensors().into_iter();
        Ok(Self {
            hash: hash.collect(),
            tensors: tensors.map(|(name, it)| (name, stored(it))).collect(),
            metadata: parsed
                .metadata()
                .clone()
                .unwrap_or_default()
                .into_iter()
                .collect(),
        })
    }
}

fn fault_of_header(first: &[u8], error: CheckpointError) -> LoraFault {
    match error {
        CheckpointError::LfsPointer { .. } => LoraFault::LfsPointer,
        _ if is_pickle(first) => LoraFault::Pickle,
        CheckpointError::WrongSize {
            expected, actual, ..
        } => LoraFault::WrongSize { expected, actual },
        CheckpointError::NotSafetensors { reason, .. } => LoraFault::NotSafetensors(shown(&reason)),
        other => LoraFault::NotSafetensors(shown(&other.to_string())),
    }
}

/// Whether a file begins as those that `torch.save` writes: a ZIP archive, or a bare pickle.
fn is_pickle(first: &[u8]) -> bool {
    let is_header = first.get(LENGTH_BYTES) == Some(&b'{');
    !is_header && (first.starts_with(b"PK\x03\x04") || matches!(first, [0x80, 2..=5, ..]))
}
