//! Kernels that were compiled, and which of them were found to be the fastest, kept for the next
//! start.
//!
//! Each program, driver, compiler and GPU has a folder of its own, as what is kept for one is of no
//! use to another. Several processes may use a folder at a time: each holds a lock on its file
//! `in-use`, and only who is alone with a folder repairs or removes it.

use std::env;
use std::fs::{self, File, TryLockError};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::SystemTime;

/// The most that is kept, in bytes: what was used longest ago goes first.
const MAX_BYTES: u64 = 1 << 30;
/// Folders that are kept.
const MAX_FOLDERS: usize = 4;
/// With less free on the disk nothing is kept: `CubeCL` panics where it cannot write.
const MIN_FREE_BYTES: u64 = 512 << 20;

const IN_USE: &str = "in-use";

/// The locks of this process, held until it ends.
static HELD: Mutex<Vec<File>> = Mutex::new(Vec::new());

/// The folder of all folders.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KernelCache {
    root: PathBuf,
}

/// What is kept for one program, driver, compiler and GPU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KernelFolder {
    pub name: String,
    pub bytes: u64,
    /// Compiled.
    pub kernels: usize,
    /// Of the fastest among several kernels.
    pub choices: usize,
    pub last_used: Option<SystemTime>,
}

/// What was removed, and what was not as a process uses it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Cleared {
    pub bytes: u64,
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

    /// The folder for kernels of this program that depend on `device`, ready to be used until the
    /// process ends. Removes what is damaged or too much.
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
        // Nothing else tells whether files can be written here.
        let probe = folder.join(format!("probe-{}", std::process::id()));
        fs::write(&probe, [0; 4096]).and_then(|()| fs::remove_file(&probe))?;
        if in_use.try_lock().is_ok() {
            repair(&folder)?;
            in_use.unlock()?;
        }
        // Where there are no locks, nobody removes what is in use either.
        in_use.try_lock_shared().ok();
        HELD.lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(in_use);
        self.prune(&name)?;
        Ok(folder)
    }

    /// All folders, the last used first.
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

    /// Removes every folder that no process uses.
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

    /// Removes what was used longest ago, down to the limits. `current` stays.
    fn prune(&self, current: &str) -> io::Result<()> {
        let folders = self.folders()?;
        let (mut count, mut bytes) = (0, 0);
        // The current one first: it was used last, but clocks differ.
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

/// Where kernels for a device are kept, if that is possible. A cache that does not work is a
/// warning, and a path where nothing can be is used.
pub(crate) fn folder_for(device: &str) -> PathBuf {
    let Some(cache) = KernelCache::from_env() else {
        tracing::warn!("kernels are not kept: neither XDG_CACHE_HOME nor HOME is set");
        return nowhere();
    };
    cache.take(device).unwrap_or_else(|error| {
        let root = cache.root().display();
        tracing::warn!("kernels are not kept, so each start takes longer: {root}: {error}");
        nowhere()
    })
}

/// A path in which no file can be, as it is below a file.
fn nowhere() -> PathBuf {
    env::current_exe().unwrap_or_default().join("kernels")
}

/// This build of kiln: kernels are kept by name, and what a name stands for changes with it.
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

/// Leaves nothing in a folder that a process which was killed may have left behind. To be called
/// by who is alone with it.
fn repair(folder: &Path) -> io::Result<()> {
    let mut bytes = 0;
    let mut damaged = None;
    for file in files(folder)? {
        let is = |extension| file.extension().is_some_and(|it| it == extension);
        // Whoever wants it next would wait for half a minute, or for ever.
        if is("lock") {
            fs::remove_file(&file)?;
            continue;
        }
        bytes += fs::metadata(&file)?.len();
        if is("cbor") && !is_whole(&fs::read(&file)?) {
            damaged = Some(file);
        }
    }
    let reason = match damaged {
        Some(file) => format!("{} is damaged", file.display()),
        None if bytes > MAX_BYTES => format!("there are {} MiB of them", bytes >> 20),
        None => return Ok(()),
    };
    tracing::warn!("kept kernels are removed and compiled again: {reason}");
    files(folder)?
        .iter()
        .filter(|file| !file.ends_with(IN_USE))
        .try_for_each(fs::remove_file)
}

/// Whether a file holds whole entries and nothing else: maps of `key` and `value` in CBOR.
fn is_whole(bytes: &[u8]) -> bool {
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

/// What follows a CBOR item of a definite length; `None` if it is not whole, or nested too deeply.
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
        // Numbers, and simple values.
        0 | 1 | 7 => return Some(rest),
        // Bytes, and text.
        2 | 3 => return rest.get(usize::try_from(argument).ok()?..),
        4 => argument,
        5 => argument.checked_mul(2)?,
        // A tag, of one item.
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
        // Others may remove it meanwhile.
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

/// False if a process uses the folder.
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

    fn keep(folder: &Path, path: &str, bytes: &[u8]) {
        let file = folder.join(path);
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(file, bytes).unwrap();
    }

    #[test]
    fn only_whole_entries_are_whole() {
        assert!(is_whole(b""));
        assert!(is_whole(&ENTRY.repeat(3)));
        for end in 1..ENTRY.len() {
            assert!(!is_whole(&ENTRY[..end]), "{end}");
        }
        // What was written after a part of an entry.
        let part = &ENTRY[..ENTRY.len() - 1];
        assert!(!is_whole(&[ENTRY, part, ENTRY].concat()));
        // What a disk gives for bytes that were not written before the power failed.
        assert!(!is_whole(&[ENTRY, &[0; 64]].concat()));
        assert!(!is_whole(
            b"\xa2\x63key\x9b\xff\xff\xff\xff\xff\xff\xff\xff\x00"
        ));
        assert!(!is_whole(
            &[b"\xa2\x63key".as_slice(), &vec![0x81; 100_000]].concat()
        ));
    }

    #[test]
    fn a_folder_is_named_by_what_its_kernels_depend_on() {
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
    fn what_a_killed_process_left_is_removed() {
        let root = tempfile::tempdir().unwrap();
        let cache = KernelCache::at(root.path());
        let folder = root.path().join(folder_name("gpu", &program()));
        keep(&folder, "cuda/1/ptx/chunk0.cbor", &ENTRY.repeat(2));
        keep(&folder, "cuda/1/ptx/toc.json.log", b"{}\n{}\n");
        keep(&folder, "cuda/1/ptx/toc.json.log.lock", b"");
        keep(&folder, "autotune/1/d/matmul.json.log", b"{}\n{}\n{}\n");
        assert_eq!(cache.take("gpu").unwrap(), folder);
        let kept = cache.folders().unwrap().remove(0);
        assert_eq!((kept.kernels, kept.choices), (2, 3));
        assert!(!folder.join("cuda/1/ptx/toc.json.log.lock").exists());
        // It is in use now, so nobody touches it.
        let cleared = cache.clear().unwrap();
        assert_eq!(cleared.in_use, [kept.name]);
        keep(&folder, "cuda/1/ptx/chunk0.cbor", &ENTRY[..9]);
        cache.take("gpu").unwrap();
        assert!(folder.join("cuda/1/ptx/chunk0.cbor").exists());

        HELD.lock().unwrap().clear();
        cache.take("gpu").unwrap();
        let kept = cache.folders().unwrap().remove(0);
        assert_eq!((kept.kernels, kept.choices), (0, 0));
    }

    #[test]
    fn the_oldest_folders_go() {
        let root = tempfile::tempdir().unwrap();
        let cache = KernelCache::at(root.path());
        for age in 1..8 {
            let folder = root.path().join(format!("age-{age}"));
            keep(&folder, IN_USE, b"");
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
    fn a_folder_that_cannot_be_is_an_error() {
        let root = tempfile::tempdir().unwrap();
        fs::write(root.path().join("file"), "").unwrap();
        let cache = KernelCache::at(&root.path().join("file/kernels"));
        cache.take("gpu").unwrap_err();
        assert!(!nowhere().exists());
        fs::create_dir_all(nowhere()).unwrap_err();
    }

    #[test]
    fn nothing_is_kept_in_a_folder_that_is_not_there() {
        let root = tempfile::tempdir().unwrap();
        let cache = KernelCache::at(&root.path().join("none"));
        assert_eq!(cache.folders().unwrap(), []);
        assert_eq!(cache.clear().unwrap(), Cleared::default());
    }
}
