//! Requests for jobs.

use std::error::Error as _;
use std::io::{self, Read};
use std::net::IpAddr;
use std::thread;
use std::time::Duration;

use reqwest::blocking::{Client as HttpClient, RequestBuilder, Response};
use reqwest::header::{AUTHORIZATION, HeaderValue, RETRY_AFTER};
use reqwest::{Method, Url};
use serde_json::{Map, Value};

use crate::cli::error::CliError;
use crate::jobs::JobId;
use crate::request::random_u64;

use super::args::ServerArgs;
use super::error::JobsError;
use super::job::Job;

/// Time until an answer, besides what the server waits.
const TIMEOUT: Duration = Duration::from_secs(30);

/// Time for a file.
const FILE_TIMEOUT: Duration = Duration::from_mins(10);

/// Largest answer in JSON, and largest file whose size is not known.
const MAX_JSON: u64 = 64 << 20;
const MAX_FILE: u64 = 4 << 30;

/// Longest message of an answer that is not kiln's, in characters.
const MAX_QUOTE: usize = 200;

/// Waits before further tries of a request that may succeed later.
const WAITS: [Duration; 3] = [
    Duration::from_millis(200),
    Duration::from_millis(500),
    Duration::from_secs(1),
];

/// Longest wait that a server can ask for between these tries.
const MAX_RETRY_AFTER: u64 = 10;

/// A server.
pub(super) struct Client {
    http: HttpClient,
    /// Without a slash at its end.
    base: Url,
    authorization: Option<HeaderValue>,
}

/// Some jobs of a list.
#[derive(Debug)]
pub(super) struct Page {
    pub(super) jobs: Vec<Job>,
    pub(super) has_more: bool,
}

impl Client {
    pub(super) fn new(args: &ServerArgs) -> Result<Self, CliError> {
        let base = base(&args.server)?;
        let key = args.key()?;
        let authorization = key.map(|key| {
            let value = HeaderValue::from_str(&format!("Bearer {key}"));
            let mut value = value.map_err(|_| JobsError::ApiKey)?;
            value.set_sensitive(true);
            Ok::<_, JobsError>(value)
        });
        crate::hub::install_tls();
        let mut http = HttpClient::builder()
            .user_agent(concat!("kiln/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(TIMEOUT);
        if is_this_machine(&base) {
            // The proxy of the environment stands for another machine.
            http = http.no_proxy();
        }
        let http = http.build().map_err(JobsError::Client)?;
        Ok(Self {
            http,
            base,
            authorization: authorization.transpose()?,
        })
    }

    /// Submits a job. Without a key of the user's, it has a random one, so that it can be repeated.
    pub(super) fn submit(
        &self,
        body: &Map<String, Value>,
        key: Option<&str>,
    ) -> Result<Job, JobsError> {
        let random = format!("kiln-{:016x}{:016x}", random_u64(), random_u64());
        let key = key.unwrap_or(&random);
        let is_visible = |byte: u8| byte.is_ascii_graphic() || byte == b' ';
        if !(1..=255).contains(&key.len()) || !key.bytes().all(is_visible) {
            return Err(JobsError::IdempotencyKey);
        }
        let body = Value::from(body.clone()).to_string();
        retried(|| {
            let request = self.request(&Method::POST, "", &[]);
            let request = request.header("idempotency-key", key);
            let request = request.header("content-type", "application/json");
            self.job_of(request.body(body.clone()))
        })
    }

    pub(super) fn job(&self, id: &JobId) -> Result<Job, JobsError> {
        retried(|| self.poll(id, Duration::ZERO))
    }

    /// The job after its end, or after about this time. Is not tried again.
    pub(super) fn poll(&self, id: &JobId, wait: Duration) -> Result<Job, JobsError> {
        let seconds = wait.as_secs_f64().to_string();
        let query: &[_] = if wait.is_zero() {
            &[]
        } else {
            &[("wait", seconds.as_str())]
        };
        let request = self.request(&Method::GET, &format!("/{id}"), query);
        self.job_of(request.timeout(TIMEOUT + wait))
    }

    pub(super) fn cancel(&self, id: &JobId) -> Result<Job, JobsError> {
        let path = format!("/{id}/cancel");
        retried(|| self.job_of(self.request(&Method::POST, &path, &[])))
    }

    pub(super) fn list(
        &self,
        limit: usize,
        after: Option<&JobId>,
        status: Option<&str>,
    ) -> Result<Page, JobsError> {
        let limit = limit.to_string();
        let query = [
            Some(("limit", limit.as_str())),
            after.map(|id| ("after", id.as_str())),
            status.map(|status| ("status", status)),
        ];
        let query: Vec<_> = query.into_iter().flatten().collect();
        let list = retried(|| self.json(self.request(&Method::GET, "", &query)))?;
        let data = list.get("data").and_then(Value::as_array);
        let jobs = data.map(|data| data.iter().cloned().map(Job::new).collect());
        let jobs: Option<Vec<Job>> = jobs.flatten();
        Ok(Page {
            jobs: jobs.ok_or_else(|| self.junk("a list of jobs"))?,
            has_more: list.get("has_more").and_then(Value::as_bool) == Some(true),
        })
    }

    /// A file of a completed job. One that is larger than `bytes` is cut.
    pub(super) fn file(
        &self,
        id: &JobId,
        index: usize,
        bytes: Option<u64>,
    ) -> Result<Vec<u8>, JobsError> {
        let index = index.to_string();
        let path = format!("/{id}/content");
        let most = bytes.unwrap_or(MAX_FILE).saturating_add(1);
        retried(|| {
            let request = self.request(&Method::GET, &path, &[("index", &index)]);
            let answer = self.send(request.timeout(FILE_TIMEOUT))?;
            self.read(answer, most)
        })
    }

    /// A request for a path below that of all jobs.
    fn request(&self, method: &Method, path: &str, query: &[(&str, &str)]) -> RequestBuilder {
        let mut url = self.base.clone();
        let root = url.path().trim_end_matches('/').to_owned();
        url.set_path(&format!("{root}/v1/images/jobs{path}"));
        if !query.is_empty() {
            url.query_pairs_mut().extend_pairs(query);
        }
        let request = self.http.request(method.clone(), url).timeout(TIMEOUT);
        match &self.authorization {
            Some(authorization) => request.header(AUTHORIZATION, authorization.clone()),
            None => request,
        }
    }

    fn job_of(&self, request: RequestBuilder) -> Result<Job, JobsError> {
        let value = self.json(request)?;
        Job::new(value).ok_or_else(|| self.junk("a job"))
    }

    fn json(&self, request: RequestBuilder) -> Result<Value, JobsError> {
        let answer = self.send(request)?;
        let body = self.read(answer, MAX_JSON)?;
        serde_json::from_slice(&body).map_err(|_| self.junk("JSON"))
    }

    /// An answer with success.
    fn send(&self, request: RequestBuilder) -> Result<Response, JobsError> {
        let answer = request.send().map_err(|error| self.unanswered(error))?;
        let status = answer.status();
        if status.is_success() {
            return Ok(answer);
        }
        let retry_after = answer.headers().get(RETRY_AFTER);
        let retry_after = retry_after.and_then(|value| value.to_str().ok()?.trim().parse().ok());
        let body = self.read(answer, MAX_JSON).unwrap_or_default();
        let (message, param) = message(&body);
        let reason = status.canonical_reason().unwrap_or("no reason given");
        Err(JobsError::Status {
            status,
            message: message.unwrap_or_else(|| format!("{} answers: {reason}", self.name())),
            param,
            retry_after,
        })
    }

    fn read(&self, answer: Response, most: u64) -> Result<Vec<u8>, JobsError> {
        let mut body = Vec::new();
        let read = answer.take(most).read_to_end(&mut body);
        read.map_err(|error| match error.downcast::<reqwest::Error>() {
            Ok(error) => self.unanswered(error),
            Err(_) => JobsError::Slow {
                server: self.name(),
            },
        })?;
        Ok(body)
    }

    fn unanswered(&self, error: reqwest::Error) -> JobsError {
        let server = self.name();
        if error.is_timeout() {
            return JobsError::Slow { server };
        }
        if is_refused(&error) {
            return JobsError::Refused { server };
        }
        JobsError::Connection {
            server,
            source: error.without_url(),
        }
    }

    fn junk(&self, expected: &'static str) -> JobsError {
        JobsError::Junk {
            server: self.name(),
            expected,
        }
    }

    /// The server in messages.
    fn name(&self) -> String {
        self.base.as_str().trim_end_matches('/').to_owned()
    }
}

/// The URL below which the routes are.
fn base(text: &str) -> Result<Url, JobsError> {
    let url = Url::parse(text.trim()).ok();
    let is_usable = |url: &Url| matches!(url.scheme(), "http" | "https") && url.has_host();
    let url = url.filter(is_usable);
    let mut url = url.ok_or_else(|| JobsError::Url {
        text: text.to_owned(),
    })?;
    url.set_query(None);
    url.set_fragment(None);
    // Clients of OpenAI's API have it in their base URL.
    let path = url.path().trim_end_matches('/');
    let path = path.strip_suffix("/v1").unwrap_or(path).to_owned();
    url.set_path(&path);
    Ok(url)
}

fn is_this_machine(url: &Url) -> bool {
    let host = url.host_str().unwrap_or_default();
    let address = host.trim_start_matches('[').trim_end_matches(']');
    let address = address.parse::<IpAddr>();
    host == "localhost" || address.is_ok_and(|address| address.is_loopback())
}

/// The message and the key of an error; a message that is not kiln's is shortened.
fn message(body: &[u8]) -> (Option<String>, Option<String>) {
    let text = |value: Option<&Value>| value.and_then(Value::as_str).map(str::to_owned);
    if let Ok(value) = serde_json::from_slice::<Value>(body)
        && let Some(error) = value.get("error")
        && let Some(message) = text(error.get("message"))
    {
        return (Some(message), text(error.get("param")));
    }
    let body: String = String::from_utf8_lossy(body)
        .trim()
        .chars()
        .take(MAX_QUOTE)
        .collect();
    ((!body.is_empty()).then_some(body), None)
}

/// Whether nothing listens at the address.
fn is_refused(error: &reqwest::Error) -> bool {
    let mut source = error.source();
    while let Some(cause) = source {
        if let Some(error) = cause.downcast_ref::<io::Error>()
            && error.kind() == io::ErrorKind::ConnectionRefused
        {
            return true;
        }
        source = cause.source();
    }
    false
}

/// Makes a request up to four times while it may succeed later.
fn retried<T>(request: impl Fn() -> Result<T, JobsError>) -> Result<T, JobsError> {
    for wait in WAITS {
        match request() {
            Err(error) if error.is_temporary() => {
                let asked = match &error {
                    JobsError::Status { retry_after, .. } => retry_after.unwrap_or(0),
                    _ => 0,
                };
                if asked > MAX_RETRY_AFTER {
                    return Err(error);
                }
                let wait = wait.max(Duration::from_secs(asked));
                tracing::warn!(
                    "{}; trying again in {:.1} s",
                    crate::error_chain(&error),
                    wait.as_secs_f64()
                );
                thread::sleep(wait);
            }
            outcome => return outcome,
        }
    }
    request()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_server_may_have_a_path_and_a_slash() {
        for (text, expected) in [
            ("http://127.0.0.1:8091", "http://127.0.0.1:8091/"),
            (" http://host/ ", "http://host/"),
            ("https://host/kiln/", "https://host/kiln"),
            ("https://host/kiln/v1/?a=b#c", "https://host/kiln"),
            ("http://[::1]:8091/v1", "http://[::1]:8091/"),
        ] {
            assert_eq!(base(text).unwrap().as_str(), expected);
        }
        for text in [
            "",
            "host",
            "host:8091",
            "127.0.0.1:8091",
            "ftp://host",
            "http://",
        ] {
            assert!(base(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_proxy_is_for_other_machines() {
        for (url, expected) in [
            ("http://127.0.0.1:8091", true),
            ("http://127.1", true),
            ("http://localhost:1/kiln", true),
            ("http://[::1]:8091", true),
            ("http://10.0.0.1", false),
            ("http://localhost.example", false),
        ] {
            assert_eq!(is_this_machine(&base(url).unwrap()), expected, "{url}");
        }
    }

    #[test]
    fn a_message_is_that_of_the_error() {
        let body = br#"{"error": {"message": "size is wrong", "param": "size"}}"#;
        let (text, param) = message(body);
        assert_eq!(text.as_deref(), Some("size is wrong"));
        assert_eq!(param.as_deref(), Some("size"));
        for body in [
            "<html>",
            r#"{"error": "x"}"#,
            r#"{"error": {"message": 3}}"#,
            "[]",
        ] {
            assert_eq!(message(body.as_bytes()), (Some(body.to_owned()), None));
        }
        assert_eq!(message(b" \n"), (None, None));
        let long = vec![0xff; 9000];
        assert_eq!(message(&long).0.unwrap().chars().count(), MAX_QUOTE);
    }
}
