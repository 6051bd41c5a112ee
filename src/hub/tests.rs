use std::collections::HashMap;
use std::error::Error;
use std::io::BufRead;
use std::io::BufReader;
use std::io::Write;
use std::iter;
use std::net::TcpListener;
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::Mutex;
use std::thread;

use tempfile::TempDir;

use super::*;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// Of a repository's files, those that text-to-image needs.
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

const NOT_NEEDED: [&str; 12] = [
    ".gitattributes",
    "README.md",
    "assets/picture.png",
    "processor/tokenizer.json",
    "qwen_image_bf16.safetensors",
    "text_encoder/model.fp16.safetensors",
    "text_encoder/model.fp16-00001-of-00002.safetensors",
    "tokenizer/extra/vocab.json",
    "tokenizer/..",
    "transformer/diffusion_pytorch_model.bin",
    "transformer/model.gguf",
    "vae/old/diffusion_pytorch_model.safetensors",
];

/// A server that answers as the Hub does for the models of the test below.
#[derive(Clone)]
struct FakeHub {
    endpoint: String,
    /// The head of every request so far.
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
                thread::spawn(move || hub.answer(&connection.unwrap()));
            }
        });
        hub
    }

    /// Settings with this server and an empty cache.
    fn settings(&self, home: &TempDir) -> HubSettings {
        HubSettings {
            endpoint: self.endpoint.clone(),
            token: None,
            cache: home.path().join("hub"),
            offline: false,
        }
    }

    /// The paths that were asked for, without the common beginning of files.
    fn take_requests(&self) -> Vec<String> {
        let heads = std::mem::take(&mut *self.requests.lock().unwrap());
        let path = |head: &String| head.split(' ').nth(1).unwrap().to_owned();
        let mut paths = heads.iter().map(path).collect::<Vec<_>>();
        paths.sort();
        paths
    }

    fn answer(&self, mut connection: &TcpStream) {
        let mut lines = BufReader::new(connection).lines().map(Result::unwrap);
        let head = lines
            .by_ref()
            .take_while(|line| !line.is_empty())
            .collect::<Vec<_>>();
        let header = |name: &str| {
            let line = head.iter().find(|it| it.to_lowercase().starts_with(name));
            line.map(|it| it[name.len()..].trim().to_owned())
        };
        let path = head[0].split(' ').nth(1).unwrap().to_owned();
        let first_time = {
            let mut requests = self.requests.lock().unwrap();
            let seen = requests.iter().any(|it| it.starts_with(&head[0]));
            requests.push(head.join("\n"));
            !seen
        };
        let token = header("authorization:").unwrap_or_default();

        if let Some(rest) = path.strip_prefix("/api/models/") {
            let (model, revision) = rest.split_once("/revision/").unwrap();
            let revision = revision.strip_suffix("?blobs=true").unwrap();
            return match (model, revision) {
                ("own/private", _) if token != "Bearer secret" => send(
                    connection,
                    "401 Unauthorized",
                    "X-Error-Code: RepoNotFound",
                    b"",
                ),
                ("own/renamed", _) => {
                    let location = "Location: /api/models/own/private/revision/main?blobs=true";
                    send(connection, "307 Temporary Redirect", location, b"");
                }
                ("own/blocked", _) => send(connection, "403 Forbidden", "", b""),
                ("own/busy", _) => send(connection, "503 Service Unavailable", "", b""),
                ("own/odd", _) => send(connection, "200 OK", "", b"<html>"),
                ("own/evil", _) => send(connection, "200 OK", "", &info("../../x", &NEEDED)),
                ("own/plain", _) => send(connection, "200 OK", "", &info(COMMIT, &["README.md"])),
                ("own/nothing", _) => send(
                    connection,
                    "404 Not Found",
                    "X-Error-Code: RepoNotFound",
                    b"",
                ),
                (_, "main" | "refs%2Fpr%2F1" | COMMIT) => {
                    let files = [&NOT_NEEDED[..], &NEEDED[..]].concat();
                    send(connection, "200 OK", "", &info(COMMIT, &files));
                }
                _ => send(
                    connection,
                    "404 Not Found",
                    "X-Error-Code: RevisionNotFound",
                    b"",
                ),
            };
        }
        if let Some(file) = path.strip_prefix("/storage/") {
            assert_eq!(token, "", "the token goes to the Hub alone");
            let content = content(file);
            let range = header("range:").map(|it| it["bytes=".len()..].trim_matches('-').parse());
            let start: usize = range.map_or(0, Result::unwrap);
            let status = if start > 0 {
                "206 Partial Content"
            } else {
                "200 OK"
            };
            return send(connection, status, "", &content[start..]);
        }
        let (model, file) = path[1..]
            .split_once(&format!("/resolve/{COMMIT}/"))
            .unwrap();
        if model == "own/gated" {
            return send(
                connection,
                "401 Unauthorized",
                "X-Error-Code: GatedRepo",
                b"",
            );
        }
        if model == "own/flaky" && file.starts_with("vae/") && first_time {
            // Promises all and sends a part.
            let content = content(file);
            let head = format!(
                "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n",
                content.len()
            );
            connection.write_all(head.as_bytes()).unwrap();
            return connection.write_all(&content[..content.len() / 2]).unwrap();
        }
        if is_large(file) {
            // Another host by name.
            let endpoint = self.endpoint.replace("127.0.0.1", "localhost");
            let location = format!("Location: {endpoint}/storage/{file}");
            return send(connection, "302 Found", &location, b"");
        }
        send(connection, "200 OK", "", &content(file));
    }
}

fn send(mut connection: &TcpStream, status: &str, header: &str, body: &[u8]) {
    let header = if header.is_empty() {
        String::new()
    } else {
        format!("{header}\r\n")
    };
    let length = body.len();
    let head = format!(
        "HTTP/1.1 {status}\r\n{header}Content-Length: {length}\r\nConnection: close\r\n\r\n"
    );
    connection.write_all(head.as_bytes()).unwrap();
    connection.write_all(body).unwrap();
}

/// The answer about a revision, of which the fields that the Hub has besides are left out.
fn info(commit: &str, files: &[&str]) -> Vec<u8> {
    let sibling = |path: &&str| {
        let mut sibling = serde_json::json!({
            "rfilename": path,
            "size": content(path).len(),
            "blobId": hash("b", path),
        });
        if is_large(path) {
            sibling["lfs"] = serde_json::json!({
                "sha256": hash("f", path), "size": content(path).len(), "pointerSize": 135,
            });
        }
        sibling
    };
    let siblings = files.iter().map(sibling).collect::<Vec<_>>();
    let info = serde_json::json!({"id": "own/model", "sha": commit, "siblings": siblings});
    info.to_string().into_bytes()
}

fn is_large(path: &str) -> bool {
    path.ends_with("safetensors")
}

/// Stands in for a hash.
fn hash(kind: &str, path: &str) -> String {
    path.bytes()
        .fold(kind.to_owned(), |hash, byte| hash + &format!("{byte:02x}"))
}

fn content(path: &str) -> Vec<u8> {
    path.repeat(if is_large(path) { 50_000 } else { 1 })
        .into_bytes()
}

/// Every file below a folder, by path, through links.
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

/// The messages of the error and its sources, with what differs between runs replaced.
fn resolve_error(model: &str, settings: &HubSettings) -> String {
    let error = resolve(model, settings).unwrap_err();
    let chain = iter::successors(Some(&error as &dyn Error), |error| (*error).source());
    let message = chain
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(": ");
    message
        .replace(&settings.endpoint, "ENDPOINT")
        .replace(&settings.cache.display().to_string(), "CACHE")
}

#[test]
fn downloads_what_is_needed_then_works_offline() {
    let (hub, home) = (FakeHub::start(), tempfile::tempdir().unwrap());
    let settings = hub.settings(&home);
    let folder = resolve("own/model", &settings).unwrap();
    let repo = settings.cache.join("models--own--model");
    assert_eq!(folder, repo.join("snapshots").join(COMMIT));
    let expected = NEEDED.map(|path| (path.to_owned(), content(path)));
    assert_eq!(tree(&folder), HashMap::from(expected));

    // As huggingface_hub lays it out.
    assert_eq!(fs::read_to_string(repo.join("refs/main")).unwrap(), COMMIT);
    let vae = hash("f", "vae/diffusion_pytorch_model.safetensors");
    if cfg!(unix) {
        let link = fs::read_link(folder.join("vae/diffusion_pytorch_model.safetensors")).unwrap();
        assert_eq!(link, Path::new("../../../blobs").join(&vae));
        let link = fs::read_link(folder.join("model_index.json")).unwrap();
        assert_eq!(
            link,
            Path::new("../../blobs").join(hash("b", "model_index.json"))
        );
        let blobs = tree(&repo.join("blobs"));
        assert_eq!(blobs.len(), NEEDED.len());
        assert!(blobs.contains_key(&vae));
    }

    // A second time only the list is asked for; with the same commit by another name too.
    hub.take_requests();
    assert_eq!(resolve("own/model", &settings).unwrap(), folder);
    assert_eq!(
        hub.take_requests(),
        ["/api/models/own/model/revision/main?blobs=true"]
    );
    assert_eq!(resolve("own/model@refs/pr/1", &settings).unwrap(), folder);
    assert_eq!(
        hub.take_requests(),
        ["/api/models/own/model/revision/refs%2Fpr%2F1?blobs=true"]
    );

    // A file that is gone from the snapshot comes back from the blobs.
    #[cfg(unix)]
    {
        fs::remove_file(folder.join("vae/config.json")).unwrap();
        resolve("own/model", &settings).unwrap();
        assert_eq!(
            fs::read(folder.join("vae/config.json")).unwrap(),
            content("vae/config.json")
        );
        assert_eq!(hub.take_requests().len(), 1);
        assert_eq!(tree(&repo.join("blobs")).len(), NEEDED.len());
    }

    let offline = HubSettings {
        offline: true,
        ..settings
    };
    assert_eq!(resolve("own/model", &offline).unwrap(), folder);
    assert_eq!(
        resolve(&format!("own/model@{COMMIT}"), &offline).unwrap(),
        folder
    );
    assert_eq!(hub.take_requests(), [""; 0]);
    assert_eq!(
        resolve_error("own/model@v2", &offline),
        "HF_HUB_OFFLINE is set and revision \"v2\" of own/model is not in the cache CACHE: unset \
         HF_HUB_OFFLINE to download it, or set HF_HOME or HF_HUB_CACHE to where it is"
    );
    assert_eq!(hub.take_requests(), [""; 0]);
}

#[test]
fn a_download_goes_on_where_it_broke_off() {
    let (hub, home) = (FakeHub::start(), tempfile::tempdir().unwrap());
    let settings = hub.settings(&home);
    let folder = resolve("own/flaky", &settings).unwrap();
    assert_eq!(
        tree(&folder),
        HashMap::from(NEEDED.map(|it| (it.to_owned(), content(it))))
    );

    let requests = hub.requests.lock().unwrap();
    let half = content("vae/diffusion_pytorch_model.safetensors").len() / 2;
    let range = format!("range: bytes={half}-");
    let resumed = requests
        .iter()
        .filter(|it| it.to_lowercase().contains(&range));
    assert_eq!(
        resumed.count(),
        2,
        "the Hub and the storage are asked for the rest"
    );
}

#[test]
fn processes_can_download_at_the_same_time() {
    let (hub, home) = (FakeHub::start(), tempfile::tempdir().unwrap());
    let settings = hub.settings(&home);
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| resolve("own/model", &settings).unwrap());
        }
    });
    let folder = resolve("own/model", &settings).unwrap();
    assert_eq!(
        tree(&folder),
        HashMap::from(NEEDED.map(|it| (it.to_owned(), content(it))))
    );
    let files = hub
        .take_requests()
        .into_iter()
        .filter(|it| it.starts_with("/own/model/resolve/"));
    assert_eq!(files.count(), NEEDED.len(), "every file is fetched once");
}

#[test]
fn the_token_opens_private_models() {
    let (hub, home) = (FakeHub::start(), tempfile::tempdir().unwrap());
    let mut settings = hub.settings(&home);
    assert_eq!(
        resolve_error("own/private", &settings),
        "own/private does not exist, or is private (HTTP 401): check the spelling; if it is \
         private, set HF_TOKEN to a token with read access from ENDPOINT/settings/tokens"
    );
    settings.token = HubToken::new("wrong\n");
    assert_eq!(
        resolve_error("own/private", &settings),
        "the Hub does not give own/private to the account of the token in use (HTTP 401): set \
         HF_TOKEN to a valid token of an account that may read it"
    );
    settings.token = HubToken::new("secret");
    resolve("own/private", &settings).unwrap();
    resolve("own/renamed", &settings).unwrap();
    assert!(!format!("{settings:?}").contains("secret"));
}

#[test]
fn refusals_say_what_to_do() {
    let (hub, home) = (FakeHub::start(), tempfile::tempdir().unwrap());
    let settings = hub.settings(&home);
    let error = |model: &str| resolve_error(model, &settings);
    assert_eq!(
        error("own/nothing"),
        "ENDPOINT has no model own/nothing: check the spelling of owner/name"
    );
    assert_eq!(
        error("own/model@v9"),
        "own/model has no revision \"v9\": give a branch, a tag or a full commit hash after the \
         @, or leave it out"
    );
    assert_eq!(
        error("own/gated"),
        "own/gated is gated (HTTP 401): accept its conditions at ENDPOINT/own/gated, and set \
         HF_TOKEN to a token of the same account from ENDPOINT/settings/tokens"
    );
    assert!(
        error("own/blocked").contains("is private (HTTP 403)"),
        "{}",
        error("own/blocked")
    );
    assert_eq!(
        error("own/busy"),
        "ENDPOINT/api/models/own/busy/revision/main?blobs=true answered HTTP 503: try again later"
    );
    assert_eq!(
        error("own/odd"),
        "ENDPOINT/api/models/own/odd/revision/main?blobs=true does not answer as the Hub does \
         (expected value at line 1 column 1): check HF_ENDPOINT"
    );
    assert_eq!(
        error("own/evil"),
        "ENDPOINT/api/models/own/evil/revision/main?blobs=true does not answer as the Hub does \
         (\"../../x\" is not a hash): check HF_ENDPOINT"
    );
    assert_eq!(
        error("own/plain"),
        "own/plain has no model_index.json, so it is not a model in diffusers layout: single-file \
         checkpoints and other formats cannot be loaded; use one such as Qwen/Qwen-Image"
    );

    // Nobody listens on the port of a listener that is gone.
    let port = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let endpoint = format!("http://127.0.0.1:{port}");
    let settings = HubSettings {
        endpoint,
        ..settings
    };
    let error = resolve_error("own/model", &settings);
    let expected = "cannot reach ENDPOINT/api/models/own/model/revision/main?blobs=true: check \
                    the network and HF_ENDPOINT; with HF_HUB_OFFLINE=1 a model that is in the \
                    cache is used without the network: io: Connection refused";
    assert!(error.starts_with(expected), "{error}");
}

#[test]
fn a_cache_that_cannot_be_written_is_named() {
    let (hub, home) = (FakeHub::start(), tempfile::tempdir().unwrap());
    fs::write(home.path().join("hub"), "a file in the way").unwrap();
    let error = resolve_error("own/model", &hub.settings(&home));
    let expected = "cannot use CACHE/models--own--model/blobs in the Hub cache: check its \
                    permissions and the disk's free space, or set HF_HOME to a folder elsewhere: ";
    assert!(error.starts_with(expected), "{error}");
}

#[test]
fn paths_and_ids_are_told_apart() {
    let home = tempfile::tempdir().unwrap();
    let settings = HubSettings {
        endpoint: "http://unused.invalid".to_owned(),
        token: None,
        cache: home.path().to_owned(),
        offline: true,
    };
    let existing = home.path().to_str().unwrap();
    assert_eq!(resolve(existing, &settings).unwrap(), home.path());
    for path in [
        "./model",
        "../model",
        "/no/where",
        "models/Qwen/Image",
        "models/image/",
        ".",
    ] {
        assert_eq!(resolve(path, &settings).unwrap(), Path::new(path));
    }
    let user = env::home_dir().unwrap();
    assert_eq!(
        resolve("~/no-such-model", &settings).unwrap(),
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

#[test]
fn settings_come_from_the_variables_of_huggingface_hub() {
    let home = tempfile::tempdir().unwrap();
    let home_text = home.path().to_str().unwrap();
    let settings = |variables: &[(&str, &str)]| {
        HubSettings::from_variables(|name| {
            let found = variables.iter().find(|(it, _)| *it == name);
            found.map(|(_, value)| (*value).to_owned())
        })
    };
    let user = env::home_dir().unwrap();
    let defaults = settings(&[("HF_TOKEN", " ")]);
    assert_eq!(defaults.endpoint, "https://huggingface.co");
    assert_eq!(defaults.cache, user.join(".cache/huggingface/hub"));
    assert_eq!(defaults.token, None);
    assert!(!defaults.offline);

    fs::write(home.path().join("token"), "from-file\n").unwrap();
    let set = settings(&[("HF_HOME", home_text), ("HF_ENDPOINT", "http://mirror/")]);
    assert_eq!(set.cache, home.path().join("hub"));
    assert_eq!(set.token, HubToken::new("from-file"));
    assert_eq!(set.endpoint, "http://mirror");

    let set = settings(&[
        ("HF_HOME", home_text),
        ("HF_TOKEN", "x"),
        ("HF_HUB_CACHE", "~/models"),
    ]);
    assert_eq!(set.token, HubToken::new("x"));
    assert_eq!(set.cache, user.join("models"));
    assert_eq!(
        settings(&[("XDG_CACHE_HOME", "/x")]).cache,
        Path::new("/x/huggingface/hub")
    );
    for (value, offline) in [
        ("1", true),
        ("ON", true),
        ("Yes", true),
        ("true", true),
        ("0", false),
    ] {
        assert_eq!(
            settings(&[("HF_HUB_OFFLINE", value)]).offline,
            offline,
            "{value}"
        );
    }
}
