//! A memory-mapped weight file that notices when it is changed, or fails to be read, while it is in
//! use.

use std::fs::{File, Metadata};
use std::io;
use std::ops::Range;
use std::path::Path;
use std::time::SystemTime;

use kiln_models::{FileFault, FileProblem};
use memmap2::Mmap;

use super::CheckpointError;
#[cfg(unix)]
use super::bus_errors::Guard;

/// A read-only map of a whole file.
#[derive(Debug)]
pub(super) struct MappedFile {
    map: Mmap,
    /// Kept open, so that a file that another one takes the place of by renaming counts as
    /// unchanged: the map is still of the old one.
    file: File,
    /// The file's name with its folder's, for messages to clients.
    name: String,
    opened: Version,
    #[cfg(unix)]
    guard: Guard,
}

/// What tells one content of a file from another.
#[derive(Debug, PartialEq, Eq)]
struct Version {
    bytes: u64,
    /// `None` on systems that do not know it.
    modified: Option<SystemTime>,
}

impl Version {
    fn of(metadata: &Metadata) -> Self {
        Self {
            bytes: metadata.len(),
            modified: metadata.modified().ok(),
        }
    }
}

impl MappedFile {
    pub(super) fn open(path: &Path) -> Result<Self, CheckpointError> {
        Self::map(path).map_err(|source| CheckpointError::io(path, source))
    }

    fn map(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        let metadata = file.metadata()?;
        if metadata.is_dir() {
            return Err(io::ErrorKind::IsADirectory.into());
        }
        let map = map(&file)?;
        Ok(Self {
            name: short_name(path),
            opened: Version::of(&metadata),
            #[cfg(unix)]
            guard: Guard::new(&map),
            file,
            map,
        })
    }

    /// The file's content. It is what was opened only as long as [`MappedFile::check`] says so.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.map
    }

    /// Checks that the file is as it was opened.
    pub(super) fn check(&self) -> Result<(), FileFault> {
        let fault = |problem| FileFault {
            file: self.name.clone(),
            problem,
        };
        match self.file.metadata() {
            Ok(metadata) if Version::of(&metadata) != self.opened => {
                return Err(fault(FileProblem::Changed));
            }
            Ok(_) => {}
            Err(error) => {
                tracing::error!(file = self.name, %error, "a weight file cannot be looked at");
                return Err(fault(FileProblem::Unreadable));
            }
        }
        #[cfg(unix)]
        if self.guard.is_broken() {
            return Err(fault(FileProblem::Unreadable));
        }
        Ok(())
    }

    /// Drops the resident memory of a part of the file that begins and ends between pages.
    #[cfg(unix)]
    #[expect(
        unsafe_code,
        reason = "memmap2 marks DontNeed unsafe because of private, writable maps"
    )]
    pub(super) fn release(&self, pages: Range<usize>) {
        let advice = memmap2::UncheckedAdvice::DontNeed;
        // SAFETY: `map` is a read-only map of a file. The system drops its resident pages, and a
        // later read through any slice loads the same bytes from the file again.
        let released =
            unsafe { (self.map).unchecked_advise_range(advice, pages.start, pages.len()) };
        // A failure only costs memory.
        if let Err(error) = released {
            tracing::debug!(%error, "cannot release the memory of a loaded tensor");
        }
    }

    #[cfg(not(unix))]
    pub(super) fn release(&self, _pages: Range<usize>) {}
}

#[expect(unsafe_code, reason = "mapping a file has no safe interface")]
fn map(file: &File) -> io::Result<Mmap> {
    // SAFETY: sound as long as the file is not modified or truncated while it is mapped. kiln does not
    // write to model files, and tools that replace them (Git, the Hub's tools) write a new file and
    // rename it. Against other programs `bus_errors` keeps the process alive, and
    // `MappedFile::check` keeps wrong bytes out of images.
    unsafe { Mmap::map(file) }
}

/// The name of a file with the name of its folder: `vae/diffusion_pytorch_model.safetensors`.
fn short_name(path: &Path) -> String {
    let file = path.file_name().unwrap_or(path.as_os_str());
    let folder = path.parent().and_then(Path::file_name);
    match folder {
        Some(folder) => format!("{}/{}", folder.display(), file.display()),
        None => file.display().to_string(),
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, OpenOptions};

    use super::*;

    /// A folder `vae` with a file of 1 MiB, and the file's map.
    fn mapped() -> (tempfile::TempDir, std::path::PathBuf, MappedFile) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vae/weights");
        fs::create_dir(folder.path().join("vae")).unwrap();
        fs::write(&path, vec![7; 1 << 20]).unwrap();
        let mapped = MappedFile::open(&path).unwrap();
        (folder, path, mapped)
    }

    #[test]
    fn a_file_that_is_left_alone_is_fine() {
        let (_folder, _, mapped) = mapped();
        assert!(mapped.bytes().iter().all(|&byte| byte == 7));
        assert_eq!(mapped.check(), Ok(()));
    }

    #[test]
    fn a_file_that_is_written_to_has_changed() {
        let (_folder, path, mapped) = mapped();
        let file = OpenOptions::new().append(true).open(&path).unwrap();
        file.set_len((1 << 20) + 1).unwrap();
        let fault = mapped.check().unwrap_err();
        assert_eq!(
            fault.to_string(),
            "vae/weights changed while it was in use: put the right file in its place and restart \
             kiln"
        );

        let (_folder, path, mapped) = self::mapped();
        let opened = mapped.opened.modified.unwrap();
        let file = OpenOptions::new().write(true).open(&path).unwrap();
        file.set_modified(opened + std::time::Duration::from_secs(1))
            .unwrap();
        assert_eq!(mapped.check().unwrap_err().problem, FileProblem::Changed);
    }

    #[test]
    fn a_file_that_another_takes_the_place_of_is_still_the_old_one() {
        let (folder, path, mapped) = mapped();
        let new = folder.path().join("new");
        fs::write(&new, "new").unwrap();
        fs::rename(&new, &path).unwrap();
        assert_eq!(mapped.check(), Ok(()));
        assert!(mapped.bytes().iter().all(|&byte| byte == 7));
        fs::remove_file(&path).unwrap();
        assert_eq!(mapped.check(), Ok(()));
    }

    #[cfg(unix)]
    #[test]
    fn reading_past_the_end_of_a_file_that_was_cut_short_does_not_end_the_process() {
        let (_folder, path, mapped) = mapped();
        let (_other_folder, _, other) = self::mapped();
        let file = OpenOptions::new().write(true).open(&path).unwrap();
        file.set_len(100).unwrap();
        let sum = |file: &MappedFile| {
            file.bytes()
                .iter()
                .map(|&byte| u64::from(byte))
                .sum::<u64>()
        };
        assert!(sum(&mapped) < 7 << 20);
        assert!(mapped.guard.is_broken());
        assert_eq!(mapped.check().unwrap_err().problem, FileProblem::Changed);
        // Whatever the file is made to look like afterwards.
        file.set_len(1 << 20).unwrap();
        file.set_modified(mapped.opened.modified.unwrap()).unwrap();
        assert_eq!(
            mapped.check().unwrap_err().to_string(),
            "vae/weights could not be read while it was in use: put the right file in its place \
             and restart kiln"
        );
        assert_eq!(sum(&other), 7 << 20);
        assert_eq!(other.check(), Ok(()));
    }
}
