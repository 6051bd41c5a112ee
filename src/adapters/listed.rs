//! A listed adapter, and whether its file is still the one that was listed.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

use crate::checkpoint::EmbeddedAdapter;
use crate::request::AdapterInfo;

use super::error::AdapterError;
use super::folder::{self, PEFT_CONFIG, PEFT_WEIGHTS};

/// Maximum size of a sidecar in bytes.
const MAX_SIDECAR_BYTES: u64 = 1 << 20;

/// Where the content of an adapter is.
#[derive(Debug, Clone)]
pub(super) enum Source {
    /// A file, or a folder that PEFT has saved.
    File {
        /// Relative to the folder of adapters.
        file: String,
        path: PathBuf,
        /// The folder of adapters, without links.
        root: PathBuf,
    },
    /// In the binary.
    Embedded {
        file: String,
        bytes: &'static [u8],
        sidecar: Option<String>,
    },
}

/// An adapter on the list.
#[derive(Debug)]
pub struct Listed {
    pub info: Arc<AdapterInfo>,
    /// The metadata in the header of its file.
    pub metadata: Arc<BTreeMap<String, String>>,
    pub(super) source: Source,
    /// Differs for each content that is listed.
    pub(super) id: u64,
    /// State of the files when they were listed.
    stamps: Vec<Stamp>,
}

/// What tells whether a file was replaced or written.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Stamp {
    /// Its path without links.
    path: PathBuf,
    bytes: u64,
    modified: Option<SystemTime>,
    /// 0 where files have no number.
    number: u64,
}

impl Stamp {
    /// Refuses a file that is not below `root`.
    fn of(path: &Path, root: &Path) -> io::Result<Self> {
        let path = path.canonicalize()?;
        if !path.starts_with(root) {
            return Err(io::ErrorKind::NotFound.into());
        }
        let metadata = fs::metadata(&path)?;
        #[cfg(unix)]
        let number = std::os::unix::fs::MetadataExt::ino(&metadata);
        #[cfg(not(unix))]
        let number = 0;
        Ok(Self {
            bytes: metadata.len(),
            modified: metadata.modified().ok(),
            number,
            path,
        })
    }
}

impl Source {
    pub(super) fn file(file: &str, path: PathBuf, root: &Path) -> Self {
        Self::File {
            file: file.to_owned(),
            path,
            root: root.to_owned(),
        }
    }

    /// The name of an adapter in the binary, and its content.
    pub(super) fn embedded(&(file, bytes, sidecar): &EmbeddedAdapter) -> (String, Self) {
        let source = Self::Embedded {
            file: file.to_owned(),
            bytes,
            sidecar: sidecar.map(str::to_owned),
        };
        (folder::name_of(file).to_owned(), source)
    }

    /// Path relative to the folder of adapters, or the name of the file in the binary.
    pub(super) fn name(&self) -> &str {
        match self {
            Self::File { file, .. } | Self::Embedded { file, .. } => file,
        }
    }

    /// The JSON file beside it that has its recipe, by its name, if there is one.
    pub(super) fn sidecar(&self) -> Result<Option<(String, String)>, String> {
        let name = format!("{}.json", folder::name_of(self.name()));
        let (path, root) = match self {
            Self::Embedded { sidecar, .. } => return Ok(sidecar.clone().map(|text| (name, text))),
            Self::File { path, root, .. } => (path, root),
        };
        let path = path.to_string_lossy();
        let path = PathBuf::from(format!("{}.json", folder::name_of(&path)));
        let stamp = match Stamp::of(&path, root) {
            Ok(stamp) => stamp,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(format!("{name} cannot be read: {error}")),
        };
        if stamp.bytes > MAX_SIDECAR_BYTES {
            return Err(format!("{name} has more than {MAX_SIDECAR_BYTES} bytes"));
        }
        let text = fs::read_to_string(&stamp.path);
        let text = text.map_err(|error| format!("{name} cannot be read: {error}"))?;
        Ok(Some((name, crate::without_mark(text))))
    }

    fn stamps(&self) -> io::Result<Vec<Stamp>> {
        let (path, root) = match self {
            Self::Embedded { .. } => return Ok(Vec::new()),
            Self::File { path, root, .. } => (path, root),
        };
        let files = if path.is_dir() {
            vec![path.join(PEFT_CONFIG), path.join(PEFT_WEIGHTS)]
        } else {
            vec![path.clone()]
        };
        files.iter().map(|file| Stamp::of(file, root)).collect()
    }
}

impl Listed {
    /// Lists what `describe` says about a file, if the file stays as it is meanwhile.
    pub(super) fn new(
        source: Source,
        describe: impl FnOnce(&Source) -> Result<(AdapterInfo, BTreeMap<String, String>), String>,
    ) -> Result<Self, String> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let stamps = |source: &Source| {
            let stamps = source.stamps();
            stamps.map_err(|error| format!("the file cannot be read: {error}"))
        };
        let before = stamps(&source)?;
        let (info, metadata) = describe(&source)?;
        if before != stamps(&source)? {
            return Err("the file was being written: load it again once it is complete".to_owned());
        }
        Ok(Self {
            info: Arc::new(info),
            metadata: Arc::new(metadata),
            source,
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            stamps: before,
        })
    }

    /// Path of its file relative to the folder of adapters.
    pub fn file(&self) -> &str {
        self.source.name()
    }

    /// Refuses a file that is not the listed one any more.
    pub(super) fn check(&self) -> Result<(), AdapterError> {
        let name = || self.info.name.clone();
        match self.source.stamps() {
            Ok(stamps) if stamps == self.stamps => Ok(()),
            Ok(_) => Err(AdapterError::Changed { name: name() }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Err(AdapterError::Gone { name: name() })
            }
            Err(source) => Err(AdapterError::Io {
                name: name(),
                source,
            }),
        }
    }

    /// Whether the content is that of another entry.
    pub(super) fn is_same_file(&self, other: &Self) -> bool {
        self.stamps == other.stamps && self.info.hash == other.info.hash
    }

    pub(super) fn with_id(&self, id: u64) -> Self {
        Self {
            info: Arc::clone(&self.info),
            metadata: Arc::clone(&self.metadata),
            source: self.source.clone(),
            id,
            stamps: self.stamps.clone(),
        }
    }
}
