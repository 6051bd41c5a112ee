//! What a name of a model is: a path, a Hub id, or an address.

use std::ffi::OsStr;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use reqwest::Url;

use super::HubError;
use super::environment::expand_home;

/// Hosts whose addresses are ids of the Hub that is in use.
const HUB_HOSTS: [&str; 3] = ["huggingface.co", "www.huggingface.co", "hf.co"];

/// What a name of a model stands for.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Name {
    Path(PathBuf),
    Id(HubId),
}

/// Hub id of a model. Both parts are safe in URLs and in paths.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct HubId {
    /// `owner/name`.
    pub(super) repo: String,
    /// A branch, a tag, a ref such as `refs/pr/1`, or a commit hash.
    pub(super) revision: String,
}

impl Name {
    /// Reads a name that is not the path of anything that exists.
    ///
    /// `endpoint` is the Hub whose addresses stand for ids.
    pub(super) fn read(model: &str, endpoint: &Url) -> Result<Self, HubError> {
        if let Some(path) = as_path(model) {
            return Ok(Self::Path(path));
        }
        if let Some(address) = address(model) {
            return read_address(model, &address, endpoint);
        }
        if let Some(repo) = repo_of_folder(model) {
            return Ok(Self::Id(HubId::parse(&repo)?));
        }
        HubId::parse(model).map(Self::Id)
    }
}

impl HubId {
    /// Reads `owner/name` or `owner/name@revision`.
    pub(super) fn parse(model: &str) -> Result<Self, HubError> {
        let (repo, revision) = model.split_once('@').unwrap_or((model, "main"));
        let valid = repo.split('/').count() == 2
            && repo.split('/').all(is_plain_name)
            && revision.split('/').all(is_plain_name);
        if !valid {
            return Err(HubError::InvalidId {
                model: model.to_owned(),
            });
        }
        Ok(Self {
            repo: repo.to_owned(),
            revision: revision.to_owned(),
        })
    }

    /// Whether the revision is a full commit hash, whose files never change.
    pub(super) fn is_commit(&self) -> bool {
        is_commit(&self.revision)
    }
}

impl fmt::Display for HubId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.repo)?;
        if self.revision != "main" {
            write!(f, "@{}", self.revision)?;
        }
        Ok(())
    }
}

/// Whether a text is a full commit hash.
pub(super) fn is_commit(revision: &str) -> bool {
    let digit = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
    revision.len() == 40 && revision.bytes().all(digit)
}

/// Whether a name consists of ASCII letters, digits, `-`, `_` and `.` and does not begin with a dot.
pub(super) fn is_plain_name(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    !name.is_empty() && !name.starts_with('.') && name.chars().all(plain)
}

/// The name of a model's folder in the cache.
pub(super) fn folder_of_repo(repo: &str) -> String {
    format!("models--{}", repo.replace('/', "--"))
}

/// The id whose folder in the cache has this name, if only one id has.
fn repo_of_folder(folder: &str) -> Option<String> {
    let id = probable_repo_of_folder(folder)?;
    (id.contains('/') && !id.contains("--")).then_some(id)
}

/// The id whose folder in the cache has this name, if the owner's name has no `--`.
fn probable_repo_of_folder(folder: &str) -> Option<String> {
    let id = folder.strip_prefix("models--")?;
    Some(id.replacen("--", "/", 1))
}

/// The id of a folder in the Hub's cache: `OWNER/NAME` for `models--OWNER--NAME` and the snapshots in
/// it.
pub fn id_in_cache(path: &Path) -> Option<String> {
    let parent = path.parent()?;
    let folder = if parent.file_name() == Some(OsStr::new("snapshots")) {
        parent.parent()?
    } else {
        path
    };
    probable_repo_of_folder(folder.file_name()?.to_str()?)
}

/// The snapshot in a model's folder of the Hub cache, `models--OWNER--NAME`, and the model's id;
/// `None` if the folder is not such a one.
pub(super) fn snapshot_in(folder: &Path) -> Result<Option<(PathBuf, String)>, HubError> {
    let snapshots = folder.join("snapshots");
    let name = folder.canonicalize().ok();
    let name = name.as_deref().unwrap_or(folder).file_name();
    let name = name.and_then(|name| name.to_str()).unwrap_or_default();
    if !name.starts_with("models--") || folder.join("model_index.json").exists() {
        return Ok(None);
    }
    let repo = repo_of_folder(name).unwrap_or_else(|| name.to_owned());
    if let Ok(commit) = fs::read_to_string(folder.join("refs/main")) {
        let snapshot = snapshots.join(commit.trim());
        if is_commit(commit.trim()) && snapshot.is_dir() {
            return Ok(Some((snapshot, repo)));
        }
    }
    let entries = fs::read_dir(&snapshots).into_iter().flatten().flatten();
    let mut found: Vec<PathBuf> = entries.map(|entry| entry.path()).collect();
    found.sort();
    let reason = match found.as_slice() {
        [snapshot] => return Ok(Some((snapshot.clone(), repo))),
        [] => format!("has no snapshot: give {repo} to download it"),
        [first, ..] => format!(
            "has several snapshots: give one of them, such as {}",
            first.display()
        ),
    };
    let folder = folder.to_owned();
    Err(HubError::CacheFolder { folder, reason })
}

/// The path, with `~` expanded, if the name can only be a path; it need not exist.
pub(super) fn as_path(model: &str) -> Option<PathBuf> {
    if address(model).is_some() {
        return None;
    }
    let before_revision = model.split('@').next().unwrap_or(model);
    let is_path = model.starts_with(['.', '/', '~'])
        || model.contains('\\')
        || before_revision.matches('/').count() > 1
        || before_revision.ends_with('/');
    is_path.then(|| expand_home(Path::new(model)))
}

/// The URL, if the name is one; `https://` may be left out before the Hub's hosts.
fn address(model: &str) -> Option<String> {
    let (scheme, _) = model.split_once("://").unwrap_or_default();
    let host = model.split_once('/').map_or(model, |(host, _)| host);
    if !scheme.is_empty() || model.starts_with("file:/") {
        Some(model.to_owned())
    } else if HUB_HOSTS.contains(&host) && model.matches('/').count() > 1 {
        Some(format!("https://{model}"))
    } else {
        None
    }
}

fn read_address(model: &str, address: &str, endpoint: &Url) -> Result<Name, HubError> {
    let error = |hint: &str| HubError::Address {
        address: model.to_owned(),
        hint: hint.to_owned(),
    };
    let general = "give owner/name such as Qwen/Qwen-Image, or the path of a model folder";
    let url = Url::parse(address).map_err(|_| error(general))?;
    match url.scheme() {
        "file" => {
            let path = url.to_file_path();
            return path
                .map(Name::Path)
                .map_err(|()| error("give the path of a folder on this machine"));
        }
        "hf" => {
            let id = address.trim_start_matches("hf://");
            let id = id.strip_prefix("models/").unwrap_or(id);
            return HubId::parse(id.trim_end_matches('/'))
                .map(Name::Id)
                .map_err(|_| error(general));
        }
        "http" | "https" => {}
        _ => return Err(error(general)),
    }
    let host = url.host_str().unwrap_or_default();
    let of_endpoint = url.host_str() == endpoint.host_str() && url.port() == endpoint.port();
    if !of_endpoint && !HUB_HOSTS.contains(&host) {
        let hint = "only addresses of the Hub are taken; give owner/name, and set HF_ENDPOINT to \
                    use another Hub";
        return Err(error(hint));
    }
    let path = if of_endpoint {
        let prefix = endpoint.path().trim_end_matches('/');
        url.path().strip_prefix(prefix).unwrap_or(url.path())
    } else {
        url.path()
    };
    let path = path.replace("%2F", "/");
    let parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty()).collect();
    let id = match parts.as_slice() {
        [owner, name] | [owner, name, "tree"] => format!("{owner}/{name}"),
        [owner, name, "tree" | "commit", revision] => format!("{owner}/{name}@{revision}"),
        [owner, name, "tree", "refs", kind, number] => {
            format!("{owner}/{name}@refs/{kind}/{number}")
        }
        [owner, name, "tree" | "blob" | "resolve", ..] => {
            return Err(error(&format!(
                "it is a file or a folder in one: give {owner}/{name}"
            )));
        }
        _ => return Err(error(general)),
    };
    HubId::parse(&id).map(Name::Id).map_err(|_| error(general))
}

#[cfg(test)]
mod tests {
    use std::env;

    use super::*;

    fn read(model: &str) -> Result<Name, HubError> {
        Name::read(model, &Url::parse("http://mirror:81/hub").unwrap())
    }

    /// The id that a name stands for.
    fn id(model: &str) -> String {
        match read(model) {
            Ok(Name::Id(id)) => format!("{}@{}", id.repo, id.revision),
            other => panic!("{model}: {other:?}"),
        }
    }

    fn message(model: &str) -> String {
        read(model).unwrap_err().to_string()
    }

    #[test]
    fn names_that_can_only_be_paths_are_paths() {
        for path in [
            "./model",
            "../model",
            "/no/where",
            "models/Qwen/Image",
            "models/image/",
            ".",
        ] {
            assert_eq!(read(path).unwrap(), Name::Path(path.into()));
        }
        let user = env::home_dir().unwrap();
        let expected = Name::Path(user.join("no-such-model"));
        assert_eq!(read("~/no-such-model").unwrap(), expected);
    }

    #[test]
    fn ids_have_an_owner_a_name_and_a_revision() {
        assert_eq!(id("Qwen/Qwen-Image"), "Qwen/Qwen-Image@main");
        assert_eq!(id("a/b@refs/pr/1"), "a/b@refs/pr/1");
        for model in [
            "",
            "Qwen-Image",
            "a/b@",
            "a/b@../c",
            "a/b c",
            "a/..",
            "a/b@c?d",
            "ü/b",
        ] {
            assert!(
                matches!(read(model), Err(HubError::InvalidId { .. })),
                "{model}"
            );
        }
        assert_eq!(
            message("Qwen-Image"),
            "\"Qwen-Image\" is neither a folder that exists nor a Hub id: give the path of a model \
             folder, or owner/name such as Qwen/Qwen-Image, if need be with @revision"
        );
    }

    #[test]
    fn addresses_of_the_hub_are_ids() {
        for address in [
            "https://huggingface.co/Qwen/Qwen-Image",
            "http://hf.co/Qwen/Qwen-Image/",
            "huggingface.co/Qwen/Qwen-Image",
            "https://huggingface.co/Qwen/Qwen-Image/tree/main",
            "https://huggingface.co/Qwen/Qwen-Image?library=diffusers#use",
            "http://mirror:81/hub/Qwen/Qwen-Image",
            "hf://Qwen/Qwen-Image",
            "hf://models/Qwen/Qwen-Image",
            "models--Qwen--Qwen-Image",
        ] {
            assert_eq!(id(address), "Qwen/Qwen-Image@main", "{address}");
        }
        for address in [
            "https://huggingface.co/a/b/tree/refs%2Fpr%2F1",
            "https://huggingface.co/a/b/tree/refs/pr/1",
            "hf://a/b@refs/pr/1",
        ] {
            assert_eq!(id(address), "a/b@refs/pr/1", "{address}");
        }
    }

    #[test]
    fn addresses_of_files_are_paths() {
        for address in [
            "file:///a/b%20c",
            "file://localhost/a/b%20c",
            "file:/a/b%20c",
        ] {
            assert_eq!(
                read(address).unwrap(),
                Name::Path("/a/b c".into()),
                "{address}"
            );
        }
    }

    #[test]
    fn other_addresses_say_what_to_give() {
        assert_eq!(
            message("https://example.org/Qwen/Qwen-Image"),
            "https://example.org/Qwen/Qwen-Image is not the address of a model: only addresses of \
             the Hub are taken; give owner/name, and set HF_ENDPOINT to use another Hub"
        );
        assert_eq!(
            message("https://huggingface.co/a/b/blob/main/vae/config.json"),
            "https://huggingface.co/a/b/blob/main/vae/config.json is not the address of a model: it \
             is a file or a folder in one: give a/b"
        );
        for address in [
            "https://huggingface.co/datasets/a/b",
            "https://huggingface.co/a",
            "s3://bucket/model",
            "hf://datasets/a/b",
        ] {
            let general = "give owner/name such as Qwen/Qwen-Image, or the path of a model folder";
            assert!(message(address).ends_with(general), "{address}");
        }
    }

    #[test]
    fn a_folder_of_the_cache_stands_for_its_snapshot() {
        let cache = tempfile::tempdir().unwrap();
        let folder = cache.path().join("models--a--b");
        let message = || snapshot_in(&folder).unwrap_err().to_string();
        fs::create_dir_all(folder.join("snapshots")).unwrap();
        assert!(message().ends_with("has no snapshot: give a/b to download it"));

        let snapshot = |digit: &str| folder.join("snapshots").join(digit.repeat(40));
        fs::create_dir(snapshot("1")).unwrap();
        let found = || snapshot_in(&folder).unwrap().unwrap();
        assert_eq!(found(), (snapshot("1"), "a/b".to_owned()));
        fs::create_dir(snapshot("2")).unwrap();
        assert!(message().contains("has several snapshots: give one of them, such as "));
        fs::create_dir(folder.join("refs")).unwrap();
        fs::write(folder.join("refs/main"), "2".repeat(40)).unwrap();
        assert_eq!(found().0, snapshot("2"));
        assert_eq!(snapshot_in(cache.path()).unwrap(), None);
    }
}
