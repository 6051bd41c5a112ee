//! Downloads from a fake Hub in this process.

use std::collections::HashMap;
use std::error::Error;
use std::io::BufRead;
use std::io::BufReader;
use std::io::Write;
use std::iter;
use std::net::TcpListener;
use std::net::TcpStream;
use std::process::Command;
use std::sync::Mutex;
use std::thread;

use tempfile::TempDir;

use super::*;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// Files of a repository that text-to-image generation needs.
const NEEDED: [&str; 14] = [
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model-00001-of-00002.safetensors",
    "text_encoder/model-00002-of-00002.safetensors",
    "text_encoder/model.safetensors.index.json",
    "tokenizer/merges.txt",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
    "transformer/config.json",
    "transformer/diffusion_pytorch_model.safetensors",
    "transformer/diffusion_pytorch_model.safetensors.index.json",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
];

const NOT_NEEDED: [&str; 11] = [
    ".gitattributes",
    "README.md",
    "assets/image.png",
    "processor/tokenizer.json",
    "qwen_image_bf16.safetensors",
    "text_encoder/model.fp16.safetensors",
    "text_encoder/model.fp16-00001-of-00002.safetensors",
    "tokenizer/extra/vocab.json",
    "transformer/diffusion_pytorch_model.bin",
    "transformer/model.gguf",
    "vae/old/diffusion_pytorch_model.safetensors",
];

/// A server that answers as the Hub does for the models of the test below.
#[derive(Clone)]
struct FakeHub {
    endpoint: String,
    /// The head of every request since the last call of [`Self::take_requests`].
    requests: Arc<Mutex<Vec<String>>>,
}

impl FakeHub {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let hub = Self {
            endpoint,
            requests: Arc::default(),
        };
        let served = hub.clone();
        thread::spawn(move || {
            for connection in listener.incoming() {
                let hub = served.clone();
                thread::spawn(move || hub.serve(&connection.unwrap()));
            }
        });
        hub
    }

    /// Settings with this server and an empty cache.
    fn settings(&self, home: &TempDir) -> HubSettings {
        HubSettings {
            endpoint: Some(self.endpoint.clone()),
            cache: Some(home.path().join("hub")),
            ..HubSettings::default()
        }
    }

    /// Method and path of every request since the last call, sorted.
    fn take_requests(&self) -> Vec<String> {
        let heads = std::mem::take(&mut *self.requests.lock().unwrap());
        let mut requests = heads
            .iter()
            .map(|head| head.split(" HTTP/").next().unwrap().to_owned())
            .collect::<Vec<_>>();
        requests.sort();
        requests
    }

    fn serve(&self, mut connection: &TcpStream) {
        let lines = BufReader::new(connection).lines().map(Result::unwrap);
        let head = lines
            .take_while(|line| !line.is_empty())
            .collect::<Vec<_>>()
            .join("\n");
        let (status, headers, body) = self.answer(&head);
        let is_first = {
            let mut requests = self.requests.lock().unwrap();
            requests.push(head.clone());
            !requests.iter().rev().skip(1).any(|it| *it == head)
        };
        // The response to HEAD is that to GET without the body.
        let mut answer = format!(
            "HTTP/1.1 {status}\r\n{headers}Content-Length: {}\r\nConnection: close\r\n\r\n",
            body.len()
        )
        .into_bytes();
        if head.starts_with("GET /own/flaky") && is_first && !body.is_empty() {
            answer.extend(&body[..body.len() / 2]);
        } else if head.starts_with("GET") {
            answer.extend(body);
        }
        connection.write_all(&answer).unwrap();
    }

    fn answer(&self, head: &str) -> (&'static str, String, Vec<u8>) {
        let path = head.split(' ').nth(1).unwrap();
        let token = head
            .lines()
            .find_map(|line| line.strip_prefix("authorization: "));
        let ok = |body: Vec<u8>| ("200 OK", String::new(), body);
        let refusal = |status, code| (status, format!("X-Error-Code: {code}\r\n"), Vec::new());
        let moved = || {
            let location = path.replace("own/renamed", "own/private");
            let header = format!("Location: {location}\r\n");
            ("307 Temporary Redirect", header, Vec::new())
        };

        if let Some(file) = path.strip_prefix("/storage/") {
            assert_eq!(token, None, "the token goes to the Hub alone");
            return match file.strip_prefix("own/expired/") {
                Some(_) => ("403 Forbidden", String::new(), b"link has expired".into()),
                None => ok(content(file)),
            };
        }
        if let Some(rest) = path.strip_prefix("/api/models/") {
            let parts = rest.splitn(4, '/').collect::<Vec<_>>();
            let (model, kind) = (parts[..2].join("/"), parts[2]);
            let revision = parts[3].trim_end_matches("?recursive=true");
            return match (model.as_str(), revision) {
                ("own/private", _) if token != Some("Bearer secret") => {
                    refusal("401 Unauthorized", "RepoNotFound")
                }
                ("own/renamed", _) => moved(),
                ("own/blocked", _) => ("403 Forbidden", String::new(), Vec::new()),
                ("own/full", _) => ("507 Insufficient Storage", String::new(), Vec::new()),
                ("own/odd", _) => ok(b"<html>".into()),
                ("own/plain", _) => ok(list(&["README.md"])),
                ("own/nothing", _) => refusal("404 Not Found", "RepoNotFound"),
                (_, "main" | "refs%2Fpr%2F1" | COMMIT) if kind == "tree" => {
                    ok(list(&[&NOT_NEEDED[..], &NEEDED[..]].concat()))
                }
                (_, "main" | "refs%2Fpr%2F1") => {
                    let info = serde_json::json!({"id": model, "sha": COMMIT});
                    ok(info.to_string().into())
                }
                _ => refusal("404 Not Found", "RevisionNotFound"),
            };
        }
        let (model, file) = path[1..]
            .split_once(&format!("/resolve/{COMMIT}/"))
            .unwrap();
        let etag = hash(file);
        let headers = format!("X-Repo-Commit: {COMMIT}\r\nETag: \"{etag}\"\r\n");
        match model {
            "own/gated" => refusal("401 Unauthorized", "GatedRepo"),
            "own/private" if token != Some("Bearer secret") => {
                refusal("401 Unauthorized", "RepoNotFound")
            }
            "own/renamed" => moved(),
            _ if is_large(file) => {
                // `localhost` counts as another host than `127.0.0.1`.
                let storage = self.endpoint.replace("127.0.0.1", "localhost") + "/storage";
                let folder = if model == "own/expired" {
                    "own/expired/"
                } else {
                    ""
                };
                let size = content(file).len();
                let headers = format!(
                    "{headers}Location: {storage}/{folder}{file}\r\n\
                     X-Linked-ETag: \"{etag}\"\r\nX-Linked-Size: {size}\r\n"
                );
                ("302 Found", headers, Vec::new())
            }
            _ => ("200 OK", headers, content(file)),
        }
    }
}

/// The response body that lists the files of a revision.
fn list(files: &[&str]) -> Vec<u8> {
    let folder = serde_json::json!({"type": "directory", "oid": "0", "size": 0, "path": "vae"});
    let files = files.iter().map(|path| {
        let (size, oid) = (content(path).len(), hash(path));
        let mut file = serde_json::json!({"type": "file", "oid": oid, "size": size, "path": path});
        if is_large(path) {
            file["lfs"] = serde_json::json!({"oid": oid, "size": size, "pointerSize": 135});
        }
        file
    });
    let tree = iter::once(folder).chain(files).collect::<Vec<_>>();
    serde_json::to_vec(&tree).unwrap()
}

fn is_large(path: &str) -> bool {
    path.ends_with("safetensors")
}

/// A stand-in for the hash of a file.
fn hash(path: &str) -> String {
    path.replace('/', "-")
}

fn content(path: &str) -> Vec<u8> {
    path.repeat(if is_large(path) { 50_000 } else { 1 })
        .into_bytes()
}

/// Every file below a folder by relative path, with links followed.
fn tree(folder: &Path) -> HashMap<String, Vec<u8>> {
    let mut files = HashMap::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(next) = folders.pop() {
        for entry in fs::read_dir(next).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else {
                let name = path
                    .strip_prefix(folder)
                    .unwrap()
                    .to_str()
                    .unwrap()
                    .to_owned();
                files.insert(name, fs::read(path).unwrap());
            }
        }
    }
    files
}

/// The messages of the error and its sources, with endpoint and cache replaced by placeholders.
fn resolve_error(model: &str, settings: &HubSettings) -> String {
    let error = resolve(model, settings, &|_| ()).unwrap_err();
    let chain = iter::successors(Some(&error as &dyn Error), |error| (*error).source());
    let message = chain
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(": ");
    message
        .replace(settings.endpoint.as_deref().unwrap(), "ENDPOINT")
        .replace(settings.cache.as_ref().unwrap().to_str().unwrap(), "CACHE")
}

#[test]
fn downloads_what_is_needed_then_works_offline() {
    let (hub, home) = (FakeHub::start(), tempfile::tempdir().unwrap());
    let settings = hub.settings(&home);
    let folder = resolve("own/model", &settings, &|_| ()).unwrap();
    let repo = home.path().join("hub/models--own--model");
    assert_eq!(folder, repo.join("snapshots").join(COMMIT));
    let expected = NEEDED.map(|path| (path.to_owned(), content(path)));
    assert_eq!(tree(&folder), HashMap::from(expected));
    assert_eq!(fs::read_to_string(repo.join("refs/main")).unwrap(), COMMIT);
    let got = hub.take_requests();
    let got = got.iter().filter(|it| it.starts_with("GET /own/"));
    assert_eq!(got.count(), NEEDED.len(), "every file is fetched once");

    // A second call downloads no file, nor does another name of the same commit.
    for model in ["own/model", "own/model@refs/pr/1"] {
        assert_eq!(resolve(model, &settings, &|_| ()).unwrap(), folder);
        let requests = hub.take_requests();
        assert!(
            requests.iter().all(|it| it.starts_with("GET /api/")),
            "{requests:?}"
        );
    }

    let offline = HubSettings {
        offline: true,
        ..settings
    };
    for model in ["own/model", &format!("own/model@{COMMIT}")] {
        assert_eq!(resolve(model, &offline, &|_| ()).unwrap(), folder);
    }
    for (repo, revision) in [
        ("own/model", "v2"),
        ("own/other", "main"),
        ("own/other", COMMIT),
    ] {
        assert_eq!(
            resolve_error(&format!("{repo}@{revision}"), &offline),
            format!(
                "HF_HUB_OFFLINE is set and revision {revision:?} of {repo} is not in the cache \
                 CACHE: unset HF_HUB_OFFLINE to download it, or set HF_HOME or HF_HUB_CACHE to \
                 where it is"
            )
        );
    }
    fs::remove_file(folder.join("model_index.json")).unwrap();
    assert!(resolve_error("own/model", &offline).starts_with("HF_HUB_OFFLINE is set"));
    assert_eq!(hub.take_requests(), [""; 0]);
}

#[test]
fn an_interrupted_download_resumes() {
    let (hub, home) = (FakeHub::start(), tempfile::tempdir().unwrap());
    let settings = hub.settings(&home);
    let mut attempts = iter::repeat_with(|| resolve("own/flaky", &settings, &|_| ()));
    assert!(matches!(
        attempts.next(),
        Some(Err(HubError::Network { .. }))
    ));
    // Every download is interrupted at most once.
    let folder = attempts.take(NEEDED.len()).find_map(Result::ok).unwrap();
    assert_eq!(
        tree(&folder),
        HashMap::from(NEEDED.map(|it| (it.to_owned(), content(it))))
    );
}

#[test]
fn files_of_another_size_than_the_hub_lists_are_removed() {
    let (hub, home) = (FakeHub::start(), tempfile::tempdir().unwrap());
    let settings = hub.settings(&home);
    let snapshot = home
        .path()
        .join("hub/models--own--expired/snapshots")
        .join(COMMIT);
    let error = resolve_error("own/expired", &settings);
    let expected = "model-00001-of-00002.safetensors has 16 bytes where the Hub lists 2250000, \
                    and was removed: try again";
    assert!(error.ends_with(expected), "{error}");
    for path in NEEDED {
        assert_eq!(snapshot.join(path).exists(), !is_large(path), "{path}");
    }
}

#[test]
fn processes_can_download_at_the_same_time() {
    let (hub, home) = (FakeHub::start(), tempfile::tempdir().unwrap());
    let settings = hub.settings(&home);
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| resolve("own/model", &settings, &|_| ()).unwrap());
        }
    });
    let folder = resolve("own/model", &settings, &|_| ()).unwrap();
    assert_eq!(
        tree(&folder),
        HashMap::from(NEEDED.map(|it| (it.to_owned(), content(it))))
    );
}

#[test]
fn private_models_need_a_valid_token() {
    let (hub, home) = (FakeHub::start(), tempfile::tempdir().unwrap());
    let mut settings = hub.settings(&home);
    for token in [None, HubToken::new("wrong\n")] {
        settings.token = token;
        assert_eq!(
            resolve_error("own/private", &settings),
            "own/private does not exist, is private, or the token in use is not valid (HTTP 401): \
             check the spelling; if it is private, set HF_TOKEN to a token of an account that may \
             read it from ENDPOINT/settings/tokens"
        );
    }
    settings.token = HubToken::new("secret\n");
    resolve("own/private", &settings, &|_| ()).unwrap();
    resolve("own/renamed", &settings, &|_| ()).unwrap();
    assert!(!format!("{settings:?}").contains("secret"));
}

#[test]
fn errors_of_the_hub_say_how_to_fix_them() {
    let (hub, home) = (FakeHub::start(), tempfile::tempdir().unwrap());
    let settings = hub.settings(&home);
    let assert_error = |model: &str, expected: &str| {
        let error = resolve_error(model, &settings);
        assert!(error.starts_with(expected), "{error}");
    };
    assert_error(
        "own/nothing",
        "ENDPOINT has no model own/nothing: check the spelling of owner/name",
    );
    assert_error(
        "own/model@v9",
        "own/model has no revision \"v9\": give a branch, a tag or a full commit hash after the @, \
         or leave it out",
    );
    assert_error(
        "own/gated",
        "own/gated is gated (HTTP 401): accept its conditions at ENDPOINT/own/gated, and set \
         HF_TOKEN to a token of the same account from ENDPOINT/settings/tokens",
    );
    assert_error(
        "own/blocked",
        "own/blocked does not exist, is private, or the token",
    );
    assert_error(
        "own/full",
        "cannot download own/full: try again later: HTTP error: 507 Insufficient Storage",
    );
    assert_error(
        "own/odd",
        "ENDPOINT cannot be reached or does not answer as the Hub does",
    );
    assert_error(
        "own/plain",
        "own/plain has no model_index.json, so it is not a model in diffusers layout: single-file \
         checkpoints and other formats cannot be loaded; use one such as Qwen/Qwen-Image",
    );
}

#[test]
fn the_error_of_an_unreachable_hub_names_it() {
    let home = tempfile::tempdir().unwrap();
    // Nothing listens on the port of a dropped listener.
    let port = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let mut settings = HubSettings {
        endpoint: Some(format!("http://127.0.0.1:{port}")),
        cache: Some(home.path().to_owned()),
        ..HubSettings::default()
    };
    let error = resolve_error("own/model", &settings);
    let expected = "ENDPOINT cannot be reached or does not answer as the Hub does: check the \
                    network and HF_ENDPOINT; with HF_HUB_OFFLINE=1 a model that is in the cache is \
                    used without the network: HTTP request error: error sending request";
    assert!(error.starts_with(expected), "{error}");

    settings.endpoint = Some("mirror".to_owned());
    let error = resolve_error("own/model", &settings);
    assert!(
        error.starts_with("the Hub cannot be used: check HF_ENDPOINT: "),
        "{error}"
    );
}

#[test]
fn the_error_of_an_unusable_cache_names_it() {
    let (hub, home) = (FakeHub::start(), tempfile::tempdir().unwrap());
    fs::write(home.path().join("hub"), "a file in the way").unwrap();
    let error = resolve_error("own/model", &hub.settings(&home));
    let expected = "cannot use the Hub cache CACHE: check its permissions and the disk's free \
                    space, or set HF_HOME to a folder elsewhere: ";
    assert!(error.starts_with(expected), "{error}");
}

#[test]
fn paths_and_hub_ids_are_distinguished() {
    let home = tempfile::tempdir().unwrap();
    let settings = HubSettings {
        endpoint: Some("http://unused.invalid".to_owned()),
        cache: Some(home.path().to_owned()),
        offline: true,
        ..HubSettings::default()
    };
    let existing = home.path().to_str().unwrap();
    assert_eq!(resolve(existing, &settings, &|_| ()).unwrap(), home.path());
    for path in [
        "./model",
        "../model",
        "/no/where",
        "models/Qwen/Image",
        "models/image/",
        ".",
    ] {
        assert_eq!(resolve(path, &settings, &|_| ()).unwrap(), Path::new(path));
    }
    let user = env::home_dir().unwrap();
    assert_eq!(
        resolve("~/no-such-model", &settings, &|_| ()).unwrap(),
        user.join("no-such-model")
    );

    let id = |model| HubId::parse(model).map(|id| (id.repo, id.revision)).ok();
    assert_eq!(id("Qwen/Qwen-Image"), Some(("Qwen/Qwen-Image", "main")));
    assert_eq!(id("a/b@refs/pr/1"), Some(("a/b", "refs/pr/1")));
    for model in [
        "",
        "Qwen-Image",
        "a/",
        "a/b@",
        "a/b@../c",
        "a/b c",
        "a/..",
        "a/b@c?d",
        "ü/b",
    ] {
        assert_eq!(id(model), None, "{model}");
    }
    assert_eq!(
        resolve_error("Qwen-Image", &settings),
        "\"Qwen-Image\" is neither a folder that exists nor a Hub id: give the path of a model \
         folder, or owner/name such as Qwen/Qwen-Image, if need be with @revision"
    );
}

/// Runs this test again in a child process that has the variables set.
#[test]
fn settings_come_from_the_variables_of_huggingface_hub() {
    if env::var_os("KILN_TEST_INNER").is_some() {
        let folder = resolve("own/private", &HubSettings::from_env(), &|_| ()).unwrap();
        return assert!(folder.ends_with(COMMIT));
    }
    let (hub, home) = (FakeHub::start(), tempfile::tempdir().unwrap());
    let run = |offline: &str, endpoint: &str| {
        let output = Command::new(env::current_exe().unwrap())
            .args(["--exact", thread::current().name().unwrap()])
            .env_remove("HF_HUB_CACHE")
            .env_remove("HUGGINGFACE_HUB_CACHE")
            .env_remove("HF_HUB_DISABLE_IMPLICIT_TOKEN")
            .env("KILN_TEST_INNER", "1")
            .env("HF_HOME", home.path())
            .env("HF_ENDPOINT", endpoint)
            .env("HF_TOKEN", "secret")
            .env("HF_HUB_OFFLINE", offline)
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
    };
    run("0", &hub.endpoint);
    assert!(
        home.path()
            .join("hub/models--own--private/refs/main")
            .exists()
    );
    for offline in ["1", "ON", "Yes", "true"] {
        run(offline, "http://unused.invalid");
    }
}
