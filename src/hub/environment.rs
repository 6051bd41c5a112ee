//! Settings from the variables of `huggingface_hub`.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use reqwest::Url;

use super::{HubError, HubSettings, HubToken};

const DEFAULT_ENDPOINT: &str = "https://huggingface.co";

/// Default of `HF_HUB_ETAG_TIMEOUT` and `HF_HUB_DOWNLOAD_TIMEOUT`.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(10);

const DEFAULT_RETRY_WAIT: Duration = Duration::from_secs(1);

/// [`HubSettings`] with the values of variables where it has none.
#[derive(Debug)]
pub(super) struct Environment {
    pub(super) endpoint: Url,
    pub(super) token: Option<HubToken>,
    /// Folder of the cache.
    pub(super) cache: PathBuf,
    /// The variable that forbids network access, if one does.
    pub(super) offline: Option<&'static str>,
    /// Limit on each read of a file.
    pub(super) download_timeout: Duration,
    /// Limit on each read of a look-up.
    pub(super) etag_timeout: Duration,
    /// Wait before the first retry.
    pub(super) retry_wait: Duration,
    pub(super) progress_bars: bool,
    /// Whether only configurations and the tokenizer are needed.
    pub(super) without_weights: bool,
    /// Whether files of a snapshot are links to blobs.
    pub(super) symlinks: bool,
    pub(super) user_agent: String,
}

/// The value of a variable.
type Lookup<'a> = &'a dyn Fn(&str) -> Option<OsString>;

impl Environment {
    pub(super) fn read(settings: &HubSettings) -> Result<Self, HubError> {
        Self::from_variables(settings, &|name| env::var_os(name))
    }

    fn from_variables(settings: &HubSettings, get: Lookup) -> Result<Self, HubError> {
        let get = &|name: &str| get(name).filter(|value| !value.is_empty());
        let home = home(get)?;
        let cache = match &settings.cache {
            Some(cache) => cache.clone(),
            None => path("HF_HUB_CACHE", get)?
                .or(path("HUGGINGFACE_HUB_CACHE", get)?)
                .unwrap_or_else(|| home.join("hub")),
        };
        let token = match &settings.token {
            Some(token) => Some(token.clone()),
            None if is_on("HF_HUB_DISABLE_IMPLICIT_TOKEN", get) => None,
            None => token(&home, get)?,
        };
        let offline = settings.offline.then(|| offline_variable(get));
        let timeout = |given: Option<Duration>, name| match given {
            Some(timeout) => Ok(timeout),
            None => seconds(name, get),
        };
        let mut user_agent = concat!("kiln/", env!("CARGO_PKG_VERSION")).to_owned();
        if let Some(origin) = text("HF_HUB_USER_AGENT_ORIGIN", get) {
            user_agent = format!("{user_agent}; origin/{origin}");
        }
        Ok(Self {
            endpoint: read_endpoint(settings, get)?,
            token,
            cache,
            offline: offline.map(|it| it.unwrap_or("HF_HUB_OFFLINE")),
            download_timeout: timeout(settings.download_timeout, "HF_HUB_DOWNLOAD_TIMEOUT")?,
            etag_timeout: timeout(settings.etag_timeout, "HF_HUB_ETAG_TIMEOUT")?,
            retry_wait: settings.retry_wait.unwrap_or(DEFAULT_RETRY_WAIT),
            progress_bars: !is_on("HF_HUB_DISABLE_PROGRESS_BARS", get),
            without_weights: settings.without_weights,
            symlinks: !is_on("HF_HUB_DISABLE_SYMLINKS", get),
            user_agent,
        })
    }

    /// The endpoint for messages: without a final slash, and without a password in it.
    pub(super) fn endpoint_name(&self) -> String {
        let mut shown = self.endpoint.clone();
        // Fails for URLs that can have no password.
        shown.set_password(None).ok();
        shown.set_username("").ok();
        shown.as_str().trim_end_matches('/').to_owned()
    }
}

/// The base URL of the Hub: the given one, or that of `HF_ENDPOINT`.
pub(super) fn endpoint(settings: &HubSettings) -> Result<Url, HubError> {
    read_endpoint(settings, &|name| env::var_os(name))
}

/// Whether `HF_HUB_OFFLINE`, or else `TRANSFORMERS_OFFLINE`, forbids network access.
pub(super) fn is_offline() -> bool {
    offline_variable(&|name| env::var_os(name).filter(|value| !value.is_empty())).is_some()
}

fn offline_variable(get: Lookup) -> Option<&'static str> {
    let variables = ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"];
    let set = variables.into_iter().find(|name| get(name).is_some());
    set.filter(|name| is_on(name, get))
}

/// Whether a variable has one of the values that count as true. Any other value counts as false.
fn is_on(name: &str, get: Lookup) -> bool {
    let value = text(name, get).unwrap_or_default().to_lowercase();
    let on = ["1", "on", "yes", "true"].contains(&value.as_str());
    if !on && !["", "0", "off", "no", "false"].contains(&value.as_str()) {
        tracing::warn!("{name} is {value:?}, which counts as off: 1, on, yes and true are on");
    }
    on
}

fn text(name: &str, get: Lookup) -> Option<String> {
    let value = get(name)?.to_string_lossy().trim().to_owned();
    (!value.is_empty()).then_some(value)
}

fn seconds(variable: &'static str, get: Lookup) -> Result<Duration, HubError> {
    let Some(value) = text(variable, get) else {
        return Ok(DEFAULT_TIMEOUT);
    };
    match value.parse().map(Duration::try_from_secs_f64) {
        // As in `huggingface_hub`.
        Ok(Ok(Duration::ZERO)) => Ok(DEFAULT_TIMEOUT),
        Ok(Ok(timeout)) => Ok(timeout),
        _ => Err(HubError::Variable {
            variable,
            expected: "a number of seconds above 0",
            value,
        }),
    }
}

fn read_endpoint(settings: &HubSettings, get: Lookup) -> Result<Url, HubError> {
    let variable = "HF_ENDPOINT";
    let given = settings.endpoint.clone();
    let value = given.or_else(|| text(variable, get));
    let value = value.unwrap_or_else(|| DEFAULT_ENDPOINT.to_owned());
    let url = Url::parse(value.trim_end_matches('/')).ok();
    url.filter(|url| matches!(url.scheme(), "http" | "https") && url.has_host())
        .ok_or(HubError::Endpoint { variable, value })
}

/// `HF_HOME`, or its default.
fn home(get: Lookup) -> Result<PathBuf, HubError> {
    if let Some(home) = path("HF_HOME", get)? {
        return Ok(home);
    }
    let caches = path("XDG_CACHE_HOME", get)?;
    let caches = caches.unwrap_or_else(|| expand_home(Path::new("~/.cache")));
    Ok(caches.join("huggingface"))
}

fn token(home: &Path, get: Lookup) -> Result<Option<HubToken>, HubError> {
    for variable in ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"] {
        if let Some(token) = text(variable, get) {
            return Ok(HubToken::new(&token));
        }
    }
    let file = path("HF_TOKEN_PATH", get)?.unwrap_or_else(|| home.join("token"));
    match fs::read_to_string(&file) {
        Ok(token) => Ok(HubToken::new(&token)),
        Err(error) => {
            if file.exists() {
                tracing::warn!("no token is used: cannot read {}: {error}", file.display());
            }
            Ok(None)
        }
    }
}

/// A path with `~` and variables expanded, as Python's `expandvars(expanduser(path))` does.
fn path(variable: &'static str, get: Lookup) -> Result<Option<PathBuf>, HubError> {
    let Some(value) = get(variable) else {
        return Ok(None);
    };
    let Some(text) = value.to_str() else {
        return Ok(Some(value.into()));
    };
    if text.starts_with('~') && !(text == "~" || text.starts_with("~/")) {
        return Err(HubError::Variable {
            variable,
            expected: "an absolute path or one that begins with ~/",
            value: text.to_owned(),
        });
    }
    let home = expand_home(Path::new(text));
    let expanded = match home.to_str() {
        Some(text) => expand_variables(variable, text, get).into(),
        None => home,
    };
    Ok(Some(expanded))
}

/// Replaces a first component `~` by the home folder.
pub(super) fn expand_home(path: &Path) -> PathBuf {
    match (path.strip_prefix("~"), env::home_dir()) {
        (Ok(rest), Some(home)) if rest.as_os_str().is_empty() => home,
        (Ok(rest), Some(home)) => home.join(rest),
        _ => path.to_owned(),
    }
}

/// Replaces `$NAME` and `${NAME}`. A variable that is not set stays as it is written.
fn expand_variables(variable: &str, text: &str, get: Lookup) -> String {
    let mut expanded = String::new();
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        expanded.push_str(&rest[..at]);
        let after = &rest[at + 1..];
        let braced = after.strip_prefix('{').and_then(|it| it.split_once('}'));
        let (name, length) = if let Some((name, _)) = braced {
            (name, name.len() + 2)
        } else {
            let word = |c: char| c.is_ascii_alphanumeric() || c == '_';
            let length = after.find(|c| !word(c)).unwrap_or(after.len());
            (&after[..length], length)
        };
        if let Some(value) = (!name.is_empty()).then(|| get(name)).flatten() {
            expanded.push_str(&value.to_string_lossy());
        } else {
            if !name.is_empty() {
                tracing::warn!("{variable} contains ${name}, which is not set");
            }
            expanded.push('$');
            expanded.push_str(&after[..length]);
        }
        rest = &after[length..];
    }
    expanded + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(variables: &[(&str, &str)]) -> Result<Environment, HubError> {
        let get = |name: &str| {
            let found = variables.iter().find(|(key, _)| *key == name);
            found.map(|(_, value)| OsString::from(value))
        };
        Environment::from_variables(&HubSettings::default(), &get)
    }

    fn cache(variables: &[(&str, &str)]) -> PathBuf {
        read(variables).unwrap().cache
    }

    fn message(variables: &[(&str, &str)]) -> String {
        read(variables).unwrap_err().to_string()
    }

    #[test]
    fn the_cache_is_where_huggingface_hub_has_it() {
        let home = env::home_dir().unwrap();
        let default = home.join(".cache/huggingface/hub");
        assert_eq!(cache(&[]), default);
        assert_eq!(cache(&[("HF_HOME", ""), ("HF_HUB_CACHE", "")]), default);
        assert_eq!(
            cache(&[("XDG_CACHE_HOME", "/c")]),
            Path::new("/c/huggingface/hub")
        );
        assert_eq!(
            cache(&[("XDG_CACHE_HOME", "/c"), ("HF_HOME", "/h")]),
            Path::new("/h/hub")
        );
        let all = [
            ("HF_HOME", "/h"),
            ("HUGGINGFACE_HUB_CACHE", "/old"),
            ("HF_HUB_CACHE", "/new"),
        ];
        assert_eq!(cache(&all[..2]), Path::new("/old"));
        assert_eq!(cache(&all), Path::new("/new"));
    }

    #[test]
    fn tilde_and_variables_in_paths_are_expanded() {
        let home = env::home_dir().unwrap();
        assert_eq!(cache(&[("HF_HOME", "~/hf")]), home.join("hf/hub"));
        assert_eq!(cache(&[("HF_HUB_CACHE", "~")]), home);
        let with = |value| cache(&[("HF_HOME", value), ("A_1", "/a"), ("B", "b")]);
        assert_eq!(with("$A_1/x"), Path::new("/a/x/hub"));
        assert_eq!(with("${A_1}${B}"), Path::new("/ab/hub"));
        assert_eq!(with("/x$B-y"), Path::new("/xb-y/hub"));
        assert_eq!(with("/$NONE/${NONE}/$"), Path::new("/$NONE/${NONE}/$/hub"));
        assert_eq!(
            cache(&[("HUGGINGFACE_HUB_CACHE", "$A"), ("A", "/a")]),
            Path::new("/a")
        );
        assert_eq!(
            message(&[("HF_HOME", "~someone/hf")]),
            "HF_HOME must be an absolute path or one that begins with ~/, it is \"~someone/hf\""
        );
    }

    #[test]
    fn tokens_are_read_as_huggingface_hub_reads_them() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("token");
        fs::write(&file, " in-file\n").unwrap();
        let home = ("HF_HOME", folder.path().to_str().unwrap());
        let token = |variables: &[(&str, &str)]| read(variables).unwrap().token;
        let some = |token| HubToken::new(token);
        assert_eq!(token(&[home]), some("in-file"));
        assert_eq!(token(&[home, ("HF_TOKEN", "")]), some("in-file"));
        let old = ("HUGGING_FACE_HUB_TOKEN", "old");
        assert_eq!(token(&[home, old]), some("old"));
        assert_eq!(token(&[home, old, ("HF_TOKEN", "new\n")]), some("new"));
        let disabled = ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "yes");
        assert_eq!(token(&[home, old, disabled]), None);
        let elsewhere = [("P", home.1), ("HF_TOKEN_PATH", "$P/token")];
        assert_eq!(token(&elsewhere), some("in-file"));
        assert_eq!(token(&[("HF_TOKEN_PATH", "/no/where")]), None);
    }

    #[test]
    fn the_endpoint_must_be_an_address() {
        let name = |value| read(&[("HF_ENDPOINT", value)]).unwrap().endpoint_name();
        assert_eq!(read(&[]).unwrap().endpoint_name(), "https://huggingface.co");
        assert_eq!(name("http://mirror:80/"), "http://mirror");
        assert_eq!(name("HTTPS://mirror/hub//"), "https://mirror/hub");
        assert_eq!(name("https://user:secret@mirror"), "https://mirror");
        for value in [
            "127.0.0.1:1",
            "localhost:80",
            "mirror",
            "ftp://mirror",
            "http://",
        ] {
            assert_eq!(
                message(&[("HF_ENDPOINT", value)]),
                format!("HF_ENDPOINT must begin with http:// or https://, it is {value:?}")
            );
        }
    }

    #[test]
    fn timeouts_are_seconds() {
        let timeout = |value| {
            let variables = [("HF_HUB_DOWNLOAD_TIMEOUT", value)];
            read(&variables).unwrap().download_timeout.as_secs_f64()
        };
        assert_eq!(timeout(""), 10.0);
        assert_eq!(timeout("0"), 10.0);
        assert_eq!(timeout("30"), 30.0);
        assert_eq!(timeout(" 0.5 "), 0.5);
        let etag = read(&[("HF_HUB_ETAG_TIMEOUT", "3")]).unwrap().etag_timeout;
        assert_eq!(etag, Duration::from_secs(3));
        for value in ["10s", "-1", "inf", "NaN"] {
            assert_eq!(
                message(&[("HF_HUB_ETAG_TIMEOUT", value)]),
                format!("HF_HUB_ETAG_TIMEOUT must be a number of seconds above 0, it is {value:?}")
            );
        }
    }

    #[test]
    fn transformers_offline_counts_unless_hf_hub_offline_is_set() {
        let offline = |variables: &[(&str, &str)]| {
            offline_variable(&|name| {
                let found = variables.iter().find(|(key, _)| *key == name);
                found.map(|(_, value)| OsString::from(value))
            })
        };
        assert_eq!(offline(&[]), None);
        for value in ["1", "ON", "Yes", "true"] {
            assert_eq!(
                offline(&[("HF_HUB_OFFLINE", value)]),
                Some("HF_HUB_OFFLINE")
            );
            assert_eq!(
                offline(&[("TRANSFORMERS_OFFLINE", value)]),
                Some("TRANSFORMERS_OFFLINE")
            );
        }
        let both = [("HF_HUB_OFFLINE", "0"), ("TRANSFORMERS_OFFLINE", "1")];
        assert_eq!(offline(&both), None);
        assert_eq!(offline(&[("HF_HUB_OFFLINE", "maybe")]), None);
    }

    #[test]
    fn small_settings_are_read() {
        let all = read(&[
            ("HF_HUB_DISABLE_PROGRESS_BARS", "1"),
            ("HF_HUB_DISABLE_SYMLINKS", "true"),
            ("HF_HUB_USER_AGENT_ORIGIN", "lab"),
        ])
        .unwrap();
        assert!(!all.progress_bars && !all.symlinks);
        assert!(all.user_agent.ends_with("; origin/lab"));
        let none = read(&[]).unwrap();
        assert!(none.progress_bars && none.symlinks && none.offline.is_none());
    }
}
