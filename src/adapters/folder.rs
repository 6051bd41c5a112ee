//! The folder of adapters: which of its files are adapters, and their names.
//!
//! A file `style/ink.safetensors`, and a folder `style/ink` as PEFT saves it, is the adapter
//! `style/ink`. Nothing outside the folder is read, also not through links.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{self, Component, Path, PathBuf};

use super::error::AdapterError;
use super::listed::Source;
use super::name;

const EXTENSION: &str = "safetensors";

/// The files of a folder that PEFT saves.
pub(super) const PEFT_CONFIG: &str = "adapter_config.json";
pub(super) const PEFT_WEIGHTS: &str = "adapter_model.safetensors";

/// Extensions of Python's pickle, which runs code when it is read.
const PICKLES: &[&str] = &["bin", "ckpt", "pkl", "pickle", "pt", "pth"];

/// A folder of adapters.
#[derive(Debug)]
pub(super) struct Folder {
    /// Without links.
    root: PathBuf,
    /// As given, made absolute.
    given: PathBuf,
}

/// A file of the folder that is an adapter, or looks like one.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) name: String,
    /// The reason if it cannot be one.
    pub(super) source: Result<Source, String>,
}

/// What a path in the folder is.
enum Kind {
    Adapter(Source),
    Refused(String),
    Folder(PathBuf),
    Other,
}

/// The name of the adapter in a file, a path relative to the folder.
pub(super) fn name_of(file: &str) -> &str {
    match file.rsplit_once('.') {
        Some((stem, extension)) if is_one_of(extension, &[EXTENSION]) => stem,
        _ => file,
    }
}

impl Folder {
    pub(super) fn open(dir: &Path) -> Result<Self, AdapterError> {
        let failed = |source| AdapterError::Open {
            path: dir.to_owned(),
            source,
        };
        let root = dir.canonicalize().map_err(failed)?;
        fs::read_dir(&root).map_err(failed)?;
        let given = path::absolute(dir).map_err(failed)?;
        Ok(Self { root, given })
    }

    /// All adapters of the folder and of the folders in it, one for each name.
    pub(super) fn scan(&self) -> Result<Vec<Found>, AdapterError> {
        let mut found = BTreeMap::new();
        let mut seen = BTreeSet::from([self.root.clone()]);
        self.scan_folder(&self.root, "", &mut found, &mut seen)
            .map_err(AdapterError::Folder)?;
        let found = found.into_iter();
        Ok(found.map(|(name, source)| Found { name, source }).collect())
    }

    /// Finds the adapters of a folder, whose path relative to the root ends with a slash. `seen` has the
    /// folders that were looked at: a link may lead to one of them.
    fn scan_folder(
        &self,
        folder: &Path,
        relative: &str,
        found: &mut BTreeMap<String, Result<Source, String>>,
        seen: &mut BTreeSet<PathBuf>,
    ) -> io::Result<()> {
        let mut entries: Vec<_> = fs::read_dir(folder)?.collect::<Result<_, _>>()?;
        // Files before folders of the same name.
        entries.sort_by_key(|entry| (entry.path().is_dir(), entry.file_name()));
        for entry in entries {
            let file_name = entry.file_name();
            let file = format!("{relative}{}", file_name.to_string_lossy());
            if file_name.to_string_lossy().starts_with('.') {
                continue;
            }
            let name = name_of(&file).to_owned();
            let mut source = match self.kind(&entry.path(), &file) {
                Kind::Other => continue,
                Kind::Folder(inner) => {
                    if seen.insert(inner.clone()) {
                        let place = format!("{file}/");
                        // A folder that cannot be read hides no other one.
                        if let Err(error) = self.scan_folder(&inner, &place, found, seen) {
                            tracing::warn!(folder = file, "cannot be read: {error}");
                        }
                    }
                    continue;
                }
                Kind::Adapter(source) => name::check(&name)
                    .map(|()| source)
                    .map_err(|reason| format!("the name of an adapter {reason}: rename the file")),
                Kind::Refused(reason) => Err(reason),
            };
            if found.contains_key(&name) {
                // A pickle beside a safetensors file of the same name is no loss.
                if source.is_err() {
                    continue;
                }
                if found[&name].is_ok() {
                    source = Err(format!(
                        "{file} and another file both have the name {name}: rename one of them"
                    ));
                }
            }
            found.insert(name, source);
        }
        Ok(())
    }

    /// What there is at a path whose last part may be a link. `file` is the path relative to the root.
    fn kind(&self, path: &Path, file: &str) -> Kind {
        let extension = Path::new(file).extension().unwrap_or_default();
        let extension = extension.to_string_lossy();
        let is_pickle = is_one_of(&extension, PICKLES);
        let is_weights = is_one_of(&extension, &[EXTENSION]);
        let Ok(real) = path.canonicalize() else {
            if is_weights && path.is_symlink() {
                return Kind::Refused("it is a link to a file that is not there".to_owned());
            }
            return Kind::Other;
        };
        let is_inside = real.starts_with(&self.root);
        if real.is_dir() {
            return match is_inside {
                true => self.folder_kind(real, file),
                false => Kind::Refused(outside("folder")),
            };
        }
        if !real.is_file() {
            Kind::Other
        } else if is_pickle {
            Kind::Refused(format!(
                "{file} is a pickle file, which can run any code when it is read: convert it to \
                 .safetensors"
            ))
        } else if !is_weights {
            Kind::Other
        } else if is_inside {
            Kind::Adapter(Source::file(file, path.to_owned(), &self.root))
        } else {
            Kind::Refused(outside("file"))
        }
    }

    /// What a folder is: an adapter if PEFT has saved it.
    fn folder_kind(&self, real: PathBuf, file: &str) -> Kind {
        let config = real.join(PEFT_CONFIG);
        if !config.exists() {
            return Kind::Folder(real);
        }
        let weights = real.join(PEFT_WEIGHTS);
        if !weights.exists() {
            return Kind::Refused(format!(
                "the folder {file} has {PEFT_CONFIG} and no {PEFT_WEIGHTS}: save the adapter as \
                 safetensors"
            ));
        }
        let is_inside = |path: &Path| {
            let real = path.canonicalize();
            real.is_ok_and(|real| real.starts_with(&self.root))
        };
        if is_inside(&config) && is_inside(&weights) {
            Kind::Adapter(Source::file(file, real, &self.root))
        } else {
            Kind::Refused(outside("file"))
        }
    }

    /// The adapter in a file below the folder: an absolute path, or one relative to the folder, with or
    /// without its extension.
    pub(super) fn find(&self, file: &str) -> Result<Source, AdapterError> {
        let outside = || AdapterError::Outside { file: file.into() };
        let relative = self.relative(file).ok_or_else(outside)?;
        for file in [format!("{relative}.{EXTENSION}"), relative] {
            match self.kind(&self.root.join(&file), &file) {
                Kind::Adapter(source) => return Ok(source),
                Kind::Refused(reason) => return Err(AdapterError::Kind(reason)),
                Kind::Folder(_) | Kind::Other => {}
            }
        }
        Err(AdapterError::NoFile { file: file.into() })
    }

    /// A path below the folder, relative to the folder, if its parts say so. Looks at no files.
    pub(super) fn relative(&self, file: &str) -> Option<String> {
        let path = Path::new(file);
        let path = if path.is_absolute() {
            let below = path.strip_prefix(&self.given);
            below.or_else(|_| path.strip_prefix(&self.root)).ok()?
        } else {
            path
        };
        let mut parts = Vec::new();
        for part in path.components() {
            match part {
                Component::Normal(part) => parts.push(part.to_str()?),
                Component::CurDir => {}
                Component::ParentDir | Component::RootDir | Component::Prefix(_) => return None,
            }
        }
        let hidden = parts.iter().any(|part| part.starts_with('.'));
        (!parts.is_empty() && !hidden).then(|| parts.join("/"))
    }
}

fn is_one_of(extension: &str, all: &[&str]) -> bool {
    all.iter().any(|one| extension.eq_ignore_ascii_case(one))
}

fn outside(what: &str) -> String {
    format!("it is a link to a {what} outside the folder of adapters: copy that {what} here")
}
