//! A Hub in this process, which can be made to misbehave.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use std::{fs, iter, thread};

use ring::digest::{SHA1_FOR_LEGACY_USE_ONLY, SHA256, digest};
use tempfile::TempDir;

use crate::hub::HubSettings;

pub(super) const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
pub(super) const NEXT_COMMIT: &str = "fedcba9876543210fedcba9876543210fedcba98";

/// Files of a repository that text-to-image generation needs.
pub(super) const NEEDED: [&str; 14] = [
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

/// A server that answers as the Hub does, for any model but the names in [`FakeHub::answer`].
#[derive(Clone)]
pub(super) struct FakeHub {
    pub(super) endpoint: String,
    /// Every request since the last call of [`Self::take_requests`].
    requests: Arc<Mutex<Vec<Request>>>,
    /// Number of requests by method and path.
    counts: Arc<Mutex<HashMap<String, usize>>>,
    fault: Arc<Mutex<Fault>>,
}

/// What becomes of an answer.
pub(super) type Fault = Arc<dyn Fn(&Request, Answer) -> Deed + Send + Sync>;

pub(super) enum Deed {
    Send(Answer),
    /// Sends the head and so many bytes of the body, then closes the connection.
    Cut(Answer, usize),
    /// Sends the head and so many bytes of the body, then nothing.
    Stall(Answer, usize),
    /// Sends nothing, and leaves the connection open.
    Silence,
    /// Closes the connection without an answer.
    Close,
}

#[derive(Debug, Clone)]
pub(super) struct Request {
    pub(super) method: String,
    pub(super) path: String,
    pub(super) token: Option<String>,
    /// First byte of the range.
    pub(super) start: Option<usize>,
    /// How many requests for the same there were before.
    pub(super) earlier: usize,
}

#[derive(Debug, Clone)]
pub(super) struct Answer {
    pub(super) status: u16,
    pub(super) headers: Vec<(&'static str, String)>,
    pub(super) body: Vec<u8>,
    /// `Content-Length`, if it is not that of the body.
    pub(super) length: Option<usize>,
}

impl Answer {
    pub(super) fn new(status: u16) -> Self {
        Self {
            status,
            headers: Vec::new(),
            body: Vec::new(),
            length: None,
        }
    }

    pub(super) fn header(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }

    pub(super) fn body(mut self, body: Vec<u8>) -> Self {
        self.body = body;
        self
    }

    fn json(value: &serde_json::Value) -> Self {
        Self::new(200).body(value.to_string().into_bytes())
    }
}

impl Request {
    fn read(connection: &TcpStream) -> Option<Self> {
        let lines = BufReader::new(connection).lines().map_while(Result::ok);
        let lines: Vec<String> = lines.take_while(|line| !line.is_empty()).collect();
        let mut words = lines.first()?.split(' ');
        let header = |name: &str| {
            lines.iter().find_map(|line| {
                let (key, value) = line.split_once(": ")?;
                key.eq_ignore_ascii_case(name).then(|| value.to_owned())
            })
        };
        let start = header("range").map(|range| {
            let start = range.strip_prefix("bytes=").unwrap();
            start.trim_end_matches('-').parse().unwrap()
        });
        let (method, url) = (words.next()?, words.next()?);
        // A proxy is asked for a whole URL.
        let path = url
            .strip_prefix("http://")
            .and_then(|it| it.find('/').map(|at| &it[at..]));
        Some(Self {
            method: method.to_owned(),
            path: path.unwrap_or(url).to_owned(),
            token: header("authorization"),
            start,
            earlier: 0,
        })
    }

    /// The file that is requested, from the Hub or from its storage.
    pub(super) fn file(&self) -> Option<&str> {
        let resolved = self.path.split_once("/resolve/");
        let resolved = resolved.and_then(|(_, rest)| rest.split_once('/'));
        resolved
            .map(|(_, file)| file)
            .or_else(|| self.path.strip_prefix("/storage/"))
    }

    /// Whether the bytes of a file of weights are requested from the storage.
    pub(super) fn is_storage(&self) -> bool {
        self.path.starts_with("/storage/")
    }

    pub(super) fn is_api(&self) -> bool {
        self.path.starts_with("/api/")
    }
}

impl FakeHub {
    pub(super) fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let hub = Self {
            endpoint: format!("http://{}", listener.local_addr().unwrap()),
            requests: Arc::default(),
            counts: Arc::default(),
            fault: Arc::new(Mutex::new(Arc::new(|_, answer| Deed::Send(answer)))),
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

    /// Settings with this server, an empty cache, and retries without much of a wait.
    pub(super) fn settings(&self, home: &TempDir) -> HubSettings {
        HubSettings {
            endpoint: Some(self.endpoint.clone()),
            cache: Some(home.path().join("hub")),
            retry_wait: Some(Duration::from_millis(1)),
            ..HubSettings::default()
        }
    }

    /// The same with short timeouts.
    pub(super) fn hasty_settings(&self, home: &TempDir) -> HubSettings {
        HubSettings {
            etag_timeout: Some(Duration::from_millis(300)),
            download_timeout: Some(Duration::from_millis(300)),
            ..self.settings(home)
        }
    }

    /// Misbehaves from now on.
    pub(super) fn misbehave(
        &self,
        fault: impl Fn(&Request, Answer) -> Deed + Send + Sync + 'static,
    ) {
        *self.fault.lock().unwrap() = Arc::new(fault);
        self.counts.lock().unwrap().clear();
    }

    pub(super) fn behave(&self) {
        self.misbehave(|_, answer| Deed::Send(answer));
    }

    /// Every request since the last call.
    pub(super) fn requests(&self) -> Vec<Request> {
        std::mem::take(&mut *self.requests.lock().unwrap())
    }

    /// Method and path of every request since the last call, sorted.
    pub(super) fn take_requests(&self) -> Vec<String> {
        let requests = self.requests();
        let mut requests: Vec<String> = requests
            .iter()
            .map(|request| format!("{} {}", request.method, request.path))
            .collect();
        requests.sort();
        requests
    }

    fn serve(&self, mut connection: &TcpStream) {
        let Some(mut request) = Request::read(connection) else {
            return;
        };
        {
            let mut counts = self.counts.lock().unwrap();
            let key = format!("{} {}", request.method, request.path);
            let count = counts.entry(key).or_default();
            request.earlier = *count;
            *count += 1;
        }
        self.requests.lock().unwrap().push(request.clone());
        let fault = Arc::clone(&*self.fault.lock().unwrap());
        let (answer, sent, stalls) = match fault(&request, self.answer(&request)) {
            Deed::Send(answer) => (answer, usize::MAX, false),
            Deed::Cut(answer, sent) => (answer, sent, false),
            Deed::Stall(answer, sent) => (answer, sent, true),
            Deed::Silence => return wait_for_end(connection),
            Deed::Close => return,
        };
        let length = answer.length.unwrap_or(answer.body.len());
        let mut head = format!("HTTP/1.1 {} Some Reason\r\n", answer.status);
        for (name, value) in &answer.headers {
            write!(head, "{name}: {value}\r\n").unwrap();
        }
        write!(
            head,
            "Content-Length: {length}\r\nConnection: close\r\n\r\n"
        )
        .unwrap();
        let mut bytes = head.into_bytes();
        // The response to HEAD is that to GET without the body.
        if request.method == "GET" {
            bytes.extend(&answer.body[..answer.body.len().min(sent)]);
        }
        // The client may have gone.
        drop(connection.write_all(&bytes));
        if stalls {
            wait_for_end(connection);
        }
    }

    fn answer(&self, request: &Request) -> Answer {
        let token = request.token.as_deref();
        let refusal = |status, code: &str| Answer::new(status).header("X-Error-Code", code);
        let moved = || {
            let location = request.path.replace("own/renamed", "own/private");
            Answer::new(307).header("Location", location)
        };
        if request.is_storage() {
            assert_eq!(token, None, "the token goes to the Hub alone");
            return part(request, content(request.file().unwrap()));
        }
        if let Some(rest) = request.path.strip_prefix("/api/models/") {
            let parts = rest.splitn(4, '/').collect::<Vec<_>>();
            let (model, kind) = (parts[..2].join("/"), parts[2]);
            let revision = parts[3].split('?').next().unwrap();
            return match (model.as_str(), revision) {
                ("own/private", _) if token != Some("Bearer secret") => {
                    refusal(401, "RepoNotFound")
                }
                ("own/renamed", _) => moved(),
                ("own/blocked", _) => Answer::new(403),
                ("own/full", _) => Answer::new(507),
                ("own/odd", _) => Answer::new(200).body(b"<html>".into()),
                ("own/plain", _) if kind == "tree" => list(&["README.md"]),
                ("own/nothing", _) => refusal(404, "RepoNotFound"),
                (_, COMMIT | NEXT_COMMIT) if kind == "tree" => {
                    list(&[&NOT_NEEDED[..], &NEEDED[..]].concat())
                }
                (_, "main" | "refs%2Fpr%2F1") => {
                    Answer::json(&serde_json::json!({"id": model, "sha": COMMIT}))
                }
                (_, "next") => Answer::json(&serde_json::json!({"sha": NEXT_COMMIT})),
                _ => refusal(404, "RevisionNotFound"),
            };
        }
        let file = request.file().unwrap();
        let answer = Answer::new(200)
            .header("X-Repo-Commit", COMMIT)
            .header("ETag", format!("\"{}\"", hash(file)));
        match request.path[1..].split("/resolve/").next().unwrap() {
            "own/gated" => refusal(401, "GatedRepo"),
            "own/private" if token != Some("Bearer secret") => refusal(401, "RepoNotFound"),
            "own/renamed" => moved(),
            _ if is_large(file) => {
                // `localhost` counts as another host than `127.0.0.1`.
                let storage = self.endpoint.replace("127.0.0.1", "localhost") + "/storage";
                Answer {
                    status: 302,
                    ..answer
                }
                .header("Location", format!("{storage}/{file}"))
                .header("X-Linked-ETag", format!("\"{}\"", hash(file)))
                .header("X-Linked-Size", content(file).len().to_string())
            }
            _ => {
                let mut whole = part(request, content(file));
                whole.headers.extend(answer.headers);
                whole
            }
        }
    }
}

/// The part of a file that is requested.
fn part(request: &Request, content: Vec<u8>) -> Answer {
    match request.start {
        None => Answer::new(200).body(content),
        Some(start) if start >= content.len() => Answer::new(416),
        Some(start) => {
            let (last, length) = (content.len() - 1, content.len());
            Answer::new(206)
                .header("Content-Range", format!("bytes {start}-{last}/{length}"))
                .body(content[start..].to_vec())
        }
    }
}

/// Waits until the client closes the connection.
fn wait_for_end(mut connection: &TcpStream) {
    let minute = Some(Duration::from_mins(1));
    connection.set_read_timeout(minute).unwrap();
    // Nothing more comes.
    connection.read_exact(&mut [0]).ok();
}

/// The answer that lists files.
pub(super) fn list(files: &[&str]) -> Answer {
    let folder = serde_json::json!({"type": "directory", "oid": "0", "size": 0, "path": "vae"});
    let files = files.iter().map(|path| {
        let (size, oid) = (content(path).len(), hash(path));
        let mut file = serde_json::json!({"type": "file", "oid": oid, "size": size, "path": path});
        if is_large(path) {
            // The hash and the size beside are those of the pointer.
            file["oid"] = "1".repeat(40).into();
            file["size"] = 135.into();
            file["lfs"] = serde_json::json!({"oid": oid, "size": size, "pointerSize": 135});
        }
        file
    });
    Answer::json(&iter::once(folder).chain(files).collect())
}

pub(super) fn is_large(path: &str) -> bool {
    path.ends_with("safetensors")
}

/// The hash of a file that is its entity tag on the Hub.
pub(super) fn hash(path: &str) -> String {
    hash_of(&content(path), is_large(path))
}

pub(super) fn hash_of(content: &[u8], large: bool) -> String {
    let digest = if large {
        digest(&SHA256, content)
    } else {
        let mut blob = format!("blob {}\0", content.len()).into_bytes();
        blob.extend(content);
        digest(&SHA1_FOR_LEGACY_USE_ONLY, &blob)
    };
    let digits = digest.as_ref().iter().map(|byte| format!("{byte:02x}"));
    digits.collect()
}

pub(super) fn content(path: &str) -> Vec<u8> {
    let shards: &[&str] = match path {
        "text_encoder/model.safetensors.index.json" => &[
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
        ],
        "transformer/diffusion_pytorch_model.safetensors.index.json" => {
            &["diffusion_pytorch_model.safetensors"]
        }
        _ => {
            return path
                .repeat(if is_large(path) { 5_000 } else { 1 })
                .into_bytes();
        }
    };
    let map = shards.iter().map(|shard| (*shard, *shard));
    let map: HashMap<&str, &str> = map.collect();
    serde_json::to_vec(&serde_json::json!({ "weight_map": map })).unwrap()
}

/// Every needed file with its content.
pub(super) fn model() -> HashMap<String, Vec<u8>> {
    HashMap::from(NEEDED.map(|path| (path.to_owned(), content(path))))
}

/// Every file below a folder by relative path, with links followed.
pub(super) fn tree(folder: &Path) -> HashMap<String, Vec<u8>> {
    let mut files = HashMap::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(next) = folders.pop() {
        for entry in fs::read_dir(next).into_iter().flatten() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else {
                let name = path.strip_prefix(folder).unwrap().to_str().unwrap();
                files.insert(name.to_owned(), fs::read(&path).unwrap());
            }
        }
    }
    files
}
