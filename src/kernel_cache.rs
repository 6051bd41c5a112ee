//! Cache of compiled GPU kernels and autotuning results on disk.
//!
//! Each combination of kiln build, driver, compiler and GPU has a folder of its own, as their entries
//! are not interchangeable. Several processes may use a folder at the same time: each holds a shared
//! lock on the folder's file `in-use`, and only a process that gets the exclusive lock repairs or
//! removes the folder.

use std::env;
use std::fs::{self, File, TryLockError};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::SystemTime;

/// Largest size of all folders together, in bytes. The least recently used folders are removed
/// first.
const MAX_BYTES: u64 = 1 << 30;
/// Largest number of folders.
const MAX_FOLDERS: usize = 4;
/// Smallest free space on the disk for using the cache: `CubeCL` panics if it cannot write.
const MIN_FREE_BYTES: u64 = 512 << 20;

const IN_USE: &str = "in-use";

/// The locked files of this process, held until it ends.
static HELD: Mutex<Vec<File>> = Mutex::new(Vec::new());

/// The folder that contains the cache folders.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KernelCache {
    root: PathBuf,
}

/// Contents of the cache folder of one kiln build, driver, compiler and GPU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KernelFolder {
    pub name: String,
    pub bytes: u64,
    /// Number of compiled kernels.
    pub kernels: usize,
    /// Number of autotuning results: choices of the fastest of several kernels.
    pub choices: usize,
    pub last_used: Option<SystemTime>,
}

/// Result of clearing the cache.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Cleared {
    /// Size of the removed folders.
    pub bytes: u64,
    /// Names of the folders that were kept because a process uses them.
    pub in_use: Vec<String>,
}

impl KernelCache {
    /// `$XDG_CACHE_HOME/kiln/kernels`, or `~/.cache/kiln/kernels`; `None` without a home.
    pub fn from_env() -> Option<Self> {
        let folder = |name| {
            env::var_os(name)
                .filter(|it| !it.is_empty())
                .map(PathBuf::from)
        };
        let cache = folder("XDG_CACHE_HOME").or_else(|| Some(env::home_dir()?.join(".cache")))?;
        Some(Self::at(&cache.join("kiln/kernels")))
    }

    pub fn at(root: &Path) -> Self {
        Self {
            root: root.to_owned(),
        }
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Creates the cache folder of this kiln build for `device`, and locks it until the process ends.
    /// Removes damaged entries, and other folders that exceed the limits.
    ///
    /// # Errors
    /// If the folder cannot be written, or the disk has too little free space.
    pub fn take(&self, device: &str) -> io::Result<PathBuf> {
        let name = folder_name(device, &program());
        let folder = self.root.join(&name);
        fs::create_dir_all(&folder)?;
        require_space(&folder)?;
        let in_use = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(folder.join(IN_USE))?;
        in_use.set_modified(SystemTime::now())?;
        // Only writing a file shows whether the folder is writable.
        tempfile::tempfile_in(&folder)?.write_all(&[0; 4096])?;
        if in_use.try_lock().is_ok() {
            repair(&folder)?;
            in_use.unlock()?;
        }
        // On file systems without locks no process gets the exclusive lock that removing needs.
        in_use.try_lock_shared().ok();
        HELD.lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(in_use);
        self.prune(&name)?;
        Ok(folder)
    }

    /// All cache folders, the most recently used first.
    pub fn folders(&self) -> io::Result<Vec<KernelFolder>> {
        let entries = match fs::read_dir(&self.root) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries?,
        };
        let mut folders = Vec::new();
        for entry in entries {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                folders.push(describe(&entry.path())?);
            }
        }
        folders.sort_by(|a, b| (b.last_used, &b.name).cmp(&(a.last_used, &a.name)));
        Ok(folders)
    }

    /// Removes every cache folder that no process uses.
    pub fn clear(&self) -> io::Result<Cleared> {
        let mut cleared = Cleared::default();
        for folder in self.folders()? {
            if remove_unused(&self.root.join(&folder.name))? {
                cleared.bytes += folder.bytes;
            } else {
                cleared.in_use.push(folder.name);
            }
        }
        Ok(cleared)
    }

    /// Removes the least recently used folders that exceed the limits. `current` is kept.
    fn prune(&self, current: &str) -> io::Result<()> {
        let folders = self.folders()?;
        let (mut count, mut bytes) = (0, 0);
        // The current folder comes first whatever its timestamp, as clocks may differ.
        let (current, others): (Vec<_>, Vec<_>) =
            folders.iter().partition(|folder| folder.name == current);
        for folder in current.into_iter().chain(others) {
            count += 1;
            bytes += folder.bytes;
            if count > 1 && (count > MAX_FOLDERS || bytes > MAX_BYTES) {
                remove_unused(&self.root.join(&folder.name))?;
            }
        }
        Ok(())
    }
}

/// The cache folder for a device. If the cache cannot be used, logs a warning and returns a path that
/// cannot exist.
pub(crate) fn folder_for(device: &str) -> PathBuf {
    let Some(cache) = KernelCache::from_env() else {
        tracing::warn!("kernels are not cached: neither XDG_CACHE_HOME nor HOME is set");
        return impossible_path();
    };
    cache.take(device).unwrap_or_else(|error| {
        let root = cache.root().display();
        tracing::warn!("kernels are not cached, so each start takes longer: {root}: {error}");
        impossible_path()
    })
}

/// A path that cannot exist, as it is below a file.
pub(crate) fn impossible_path() -> PathBuf {
    env::current_exe().unwrap_or_default().join("kernels")
}

/// Identifies this build of kiln: kernels are cached by name, and another build may have another
/// kernel of the same name.
fn program() -> String {
    let file = env::current_exe().and_then(fs::metadata);
    let mut hasher = DefaultHasher::new();
    if let Ok(file) = file {
        (file.len(), file.modified().ok()).hash(&mut hasher);
    }
    let build = hasher.finish() as u32;
    format!("{}-{build:08x}", env!("CARGO_PKG_VERSION"))
}

fn folder_name(device: &str, program: &str) -> String {
    let words = format!("{program} {device}");
    let is_plain = |letter: char| letter.is_ascii_alphanumeric() || matches!(letter, '.' | '_');
    let words = words.split(|letter| !is_plain(letter));
    let words: Vec<&str> = words.filter(|word| !word.is_empty()).collect();
    words.join("-").to_lowercase().chars().take(200).collect()
}

#[cfg(unix)]
fn require_space(folder: &Path) -> io::Result<()> {
    let disk = rustix::fs::statvfs(folder)?;
    let free = disk.f_bavail.saturating_mul(disk.f_frsize);
    if free < MIN_FREE_BYTES {
        return Err(io::Error::other(format!(
            "the disk has {} MiB free; {} MiB are needed",
            free >> 20,
            MIN_FREE_BYTES >> 20
        )));
    }
    Ok(())
}

#[cfg(not(unix))]
fn require_space(_folder: &Path) -> io::Result<()> {
    Ok(())
}

/// Removes the lock files of killed processes, and all entries if one is damaged or they exceed the
/// size limit. The caller holds the exclusive lock.
fn repair(folder: &Path) -> io::Result<()> {
    let mut bytes = 0;
    let mut damaged = None;
    for file in files(folder)? {
        let is = |extension| file.extension().is_some_and(|it| it == extension);
        // CubeCL would wait for this lock for half a minute, or for ever.
        if is("lock") {
            fs::remove_file(&file)?;
            continue;
        }
        bytes += fs::metadata(&file)?.len();
        if is("cbor") && !is_complete(&fs::read(&file)?) {
            damaged = Some(file);
        }
    }
    let reason = match damaged {
        Some(file) => format!("{} is damaged", file.display()),
        None if bytes > MAX_BYTES => format!("they take {} MiB", bytes >> 20),
        None => return Ok(()),
    };
    tracing::warn!("cached kernels are removed and compiled again: {reason}");
    files(folder)?
        .iter()
        .filter(|file| !file.ends_with(IN_USE))
        .try_for_each(fs::remove_file)
}

/// Whether a file consists of complete entries: CBOR maps of `key` and `value`.
fn is_complete(bytes: &[u8]) -> bool {
    const ENTRY: &[u8] = b"\xa2\x63key";
    let mut rest = bytes;
    while !rest.is_empty() {
        if !rest.starts_with(ENTRY) {
            return false;
        }
        match after_item(rest, 16) {
            Some(after) => rest = after,
            None => return false,
        }
    }
    true
}

/// The bytes after a CBOR item of definite length; `None` if the item is incomplete or nested too
/// deeply.
fn after_item(bytes: &[u8], depth: u32) -> Option<&[u8]> {
    let depth = depth.checked_sub(1)?;
    let (&first, rest) = bytes.split_first()?;
    let width = match first & 0x1f {
        0..24 => 0,
        width @ 24..28 => 1 << (width - 24),
        _ => return None,
    };
    let (argument, mut rest) = rest.split_at_checked(width)?;
    let argument = match width {
        0 => u64::from(first & 0x1f),
        _ => argument
            .iter()
            .fold(0, |number, &byte| number << 8 | u64::from(byte)),
    };
    let items = match first >> 5 {
        // Integers and simple values.
        0 | 1 | 7 => return Some(rest),
        // Byte strings and text strings.
        2 | 3 => return rest.get(usize::try_from(argument).ok()?..),
        4 => argument,
        5 => argument.checked_mul(2)?,
        // A tag contains one item.
        _ => 1,
    };
    for _ in 0..items {
        rest = after_item(rest, depth)?;
    }
    Some(rest)
}

fn describe(folder: &Path) -> io::Result<KernelFolder> {
    let name = folder.file_name().unwrap_or_default().to_string_lossy();
    let mut described = KernelFolder {
        name: name.into_owned(),
        bytes: 0,
        kernels: 0,
        choices: 0,
        last_used: None,
    };
    for file in files(folder)? {
        // Another process may have removed the file.
        let Ok(metadata) = fs::metadata(&file) else {
            continue;
        };
        described.bytes += metadata.len();
        if file.ends_with(IN_USE) {
            described.last_used = metadata.modified().ok();
        } else if file.ends_with("toc.json.log") {
            described.kernels += lines(&file);
        } else if file.extension().is_some_and(|it| it == "log") {
            described.choices += lines(&file);
        }
    }
    Ok(described)
}

fn lines(file: &Path) -> usize {
    let bytes = fs::read(file).unwrap_or_default();
    bytes.split(|byte| *byte == b'\n').count() - 1
}

/// All files below a folder.
fn files(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                folders.push(entry.path());
            } else {
                found.push(entry.path());
            }
        }
    }
    Ok(found)
}

/// Removes a folder unless a process uses it. Returns whether it was removed.
fn remove_unused(folder: &Path) -> io::Result<bool> {
    let in_use = match File::options().write(true).open(folder.join(IN_USE)) {
        Ok(file) => Some(file),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(error),
    };
    match in_use.as_ref().map(File::try_lock) {
        Some(Err(TryLockError::WouldBlock)) => return Ok(false),
        Some(Err(TryLockError::Error(error))) => return Err(error),
        Some(Ok(())) | None => {}
    }
    fs::remove_dir_all(folder).map(|()| true)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    /// `{"key": 1, "value": {"ptx": [-2, "ab", tag h'00']}}`
    const ENTRY: &[u8] = b"\xa2\x63key\x01\x65value\xa1\x63ptx\x83\x21\x62ab\xc2\x41\x00";

    fn write(folder: &Path, path: &str, bytes: &[u8]) {
        let file = folder.join(path);
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(file, bytes).unwrap();
    }

    #[test]
    fn incomplete_entries_are_detected() {
        assert!(is_complete(b""));
        assert!(is_complete(&ENTRY.repeat(3)));
        for end in 1..ENTRY.len() {
            assert!(!is_complete(&ENTRY[..end]), "{end}");
        }
        // A complete entry after an incomplete one.
        let part = &ENTRY[..ENTRY.len() - 1];
        assert!(!is_complete(&[ENTRY, part, ENTRY].concat()));
        // Zeros, as after a power failure.
        assert!(!is_complete(&[ENTRY, &[0; 64]].concat()));
        assert!(!is_complete(
            b"\xa2\x63key\x9b\xff\xff\xff\xff\xff\xff\xff\xff\x00"
        ));
        assert!(!is_complete(
            &[b"\xa2\x63key".as_slice(), &vec![0x81; 100_000]].concat()
        ));
    }

    #[test]
    fn folder_names_combine_build_and_device() {
        assert_eq!(
            folder_name(
                "cuda 12.8, nvrtc 12.8, sm_90, NVIDIA H100 80GB/HBM3",
                "0.1.0-5a"
            ),
            "0.1.0-5a-cuda-12.8-nvrtc-12.8-sm_90-nvidia-h100-80gb-hbm3"
        );
        assert_eq!(program(), program());
    }

    #[test]
    fn remains_of_killed_processes_are_removed() {
        let root = tempfile::tempdir().unwrap();
        let cache = KernelCache::at(root.path());
        let folder = root.path().join(folder_name("gpu", &program()));
        write(&folder, "cuda/1/ptx/chunk0.cbor", &ENTRY.repeat(2));
        write(&folder, "cuda/1/ptx/toc.json.log", b"{}\n{}\n");
        write(&folder, "cuda/1/ptx/toc.json.log.lock", b"");
        write(&folder, "autotune/1/d/matmul.json.log", b"{}\n{}\n{}\n");
        assert_eq!(cache.take("gpu").unwrap(), folder);
        let kept = cache.folders().unwrap().remove(0);
        assert_eq!((kept.kernels, kept.choices), (2, 3));
        assert!(!folder.join("cuda/1/ptx/toc.json.log.lock").exists());
        // The folder is in use, so it is neither removed nor repaired.
        let cleared = cache.clear().unwrap();
        assert_eq!(cleared.in_use, [kept.name]);
        write(&folder, "cuda/1/ptx/chunk0.cbor", &ENTRY[..9]);
        cache.take("gpu").unwrap();
        assert!(folder.join("cuda/1/ptx/chunk0.cbor").exists());

        HELD.lock().unwrap().clear();
        cache.take("gpu").unwrap();
        let kept = cache.folders().unwrap().remove(0);
        assert_eq!((kept.kernels, kept.choices), (0, 0));
    }

    #[test]
    fn the_least_recently_used_folders_are_removed() {
        let root = tempfile::tempdir().unwrap();
        let cache = KernelCache::at(root.path());
        for age in 1..8 {
            let folder = root.path().join(format!("age-{age}"));
            write(&folder, IN_USE, b"");
            let file = File::options()
                .write(true)
                .open(folder.join(IN_USE))
                .unwrap();
            let hours = Duration::from_hours(age);
            file.set_modified(SystemTime::now() - hours).unwrap();
        }
        let folder = cache.take("other gpu").unwrap();
        let names: Vec<String> = cache
            .folders()
            .unwrap()
            .into_iter()
            .map(|it| it.name)
            .collect();
        let current = folder.file_name().unwrap().to_str().unwrap();
        assert_eq!(names, [current, "age-1", "age-2", "age-3"]);

        let large = File::create(root.path().join("age-1/large")).unwrap();
        large.set_len(MAX_BYTES + 1).unwrap();
        cache.prune(current).unwrap();
        assert_eq!(cache.folders().unwrap().len(), 1);
    }

    #[test]
    fn a_folder_that_cannot_be_created_is_an_error() {
        let root = tempfile::tempdir().unwrap();
        fs::write(root.path().join("file"), "").unwrap();
        let cache = KernelCache::at(&root.path().join("file/kernels"));
        cache.take("gpu").unwrap_err();
        assert!(!impossible_path().exists());
        fs::create_dir_all(impossible_path()).unwrap_err();
    }

    #[test]
    fn a_missing_cache_is_empty() {
        let root = tempfile::tempdir().unwrap();
        let cache = KernelCache::at(&root.path().join("none"));
        assert_eq!(cache.folders().unwrap(), []);
        assert_eq!(cache.clear().unwrap(), Cleared::default());
    }
}
