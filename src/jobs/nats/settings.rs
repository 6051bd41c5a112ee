//! Where the servers are, and how to log in to them.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use async_nats::{ConnectOptions, ServerAddr};

use crate::jobs::StoreError;

/// Most time for one TCP connection and its handshake.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// Time between pings: two missed ones end a connection.
const PING_INTERVAL: Duration = Duration::from_secs(5);
/// Most time between two tries to connect again.
const MAX_RECONNECT_DELAY: Duration = Duration::from_secs(2);

/// The servers of one NATS cluster, and where results are stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NatsSettings {
    /// URLs without credentials.
    servers: Vec<String>,
    /// From the first URL that has one.
    login: Option<Login>,
    /// Copies of each stream; as many as the cluster can give, up to 3, without it.
    pub replicas: Option<usize>,
    /// URL of a folder in an object store; the NATS object store without it.
    pub results: Option<String>,
}

/// Credentials in a URL.
#[derive(Clone, PartialEq, Eq)]
enum Login {
    Token(String),
    Password { user: String, password: String },
}

impl fmt::Debug for Login {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("[hidden]")
    }
}

impl NatsSettings {
    /// Servers as `nats://[USER:PASSWORD@|TOKEN@]HOST:PORT` or `tls://…`, and results as
    /// `s3://BUCKET/PREFIX`, `gs://BUCKET/PREFIX` or `file:///FOLDER`. The number of replicas comes from
    /// the environment variable `KILN_JOBS_REPLICAS`.
    pub fn new(servers: &[String], results: Option<String>) -> Result<Self, StoreError> {
        let replicas = match text("KILN_JOBS_REPLICAS") {
            None => None,
            Some(number) => match number.parse() {
                Ok(number @ 1..=5) => Some(number),
                _ => {
                    return Err(StoreError::Broken(format!(
                        "KILN_JOBS_REPLICAS must be from 1 to 5, got `{number}`"
                    )));
                }
            },
        };
        let mut settings = Self {
            servers: Vec::with_capacity(servers.len()),
            login: None,
            replicas,
            results,
        };
        for server in servers {
            let (scheme, rest) = server.split_once("://").unwrap_or(("nats", server));
            let (login, host) = match rest.rsplit_once('@') {
                Some((login, host)) => (Some(Login::parse(login)?), host),
                None => (None, rest),
            };
            settings.login = settings.login.or(login);
            settings.servers.push(format!("{scheme}://{host}"));
        }
        Ok(settings)
    }

    /// The servers in messages.
    pub(super) fn names(&self) -> String {
        self.servers.join(", ")
    }

    pub(super) fn addresses(&self) -> Result<Vec<ServerAddr>, StoreError> {
        let parse = |server: &String| {
            let address = server.parse::<ServerAddr>();
            address.map_err(|error| StoreError::Broken(format!("{server}: {error}")))
        };
        self.servers.iter().map(parse).collect()
    }

    /// Options with the credentials of the URL, or those of NATS' own environment variables.
    pub(super) async fn options(&self, instance: &str) -> Result<ConnectOptions, StoreError> {
        let mut options = ConnectOptions::new()
            .name(format!("kiln {instance}"))
            .connection_timeout(CONNECT_TIMEOUT)
            .ping_interval(PING_INTERVAL)
            .reconnect_delay_callback(|tries| {
                let tries = u32::try_from(tries).unwrap_or(u32::MAX).clamp(1, 8);
                (Duration::from_millis(250) * tries).min(MAX_RECONNECT_DELAY)
            });
        if let Some(file) = path("NATS_CREDS") {
            options = options.credentials_file(&file).await.map_err(|error| {
                StoreError::Broken(format!("NATS_CREDS: {}: {error}", file.display()))
            })?;
        }
        if let Some(seed) = text("NATS_NKEY") {
            options = options.nkey(read_nkey(&seed)?);
        }
        let login = self.login.clone().or_else(|| {
            let password = text("NATS_PASSWORD").unwrap_or_default();
            let user = text("NATS_USER").map(|user| Login::Password { user, password });
            user.or_else(|| text("NATS_TOKEN").map(Login::Token))
        });
        options = match login {
            Some(Login::Token(token)) => options.token(token),
            Some(Login::Password { user, password }) => options.user_and_password(user, password),
            None => options,
        };
        if let Some(file) = path("NATS_CA") {
            options = options.add_root_certificates(file);
        }
        options = match (path("NATS_CERT"), path("NATS_KEY")) {
            (Some(certificate), Some(key)) => options.add_client_certificate(certificate, key),
            (None, None) => options,
            _ => {
                let text = "NATS_CERT and NATS_KEY name a certificate and its key: set both";
                return Err(StoreError::Broken(text.to_owned()));
            }
        };
        Ok(options)
    }
}

impl Login {
    fn parse(text: &str) -> Result<Self, StoreError> {
        let decode = |text: &str| {
            let decoded = percent_decoded(text);
            decoded.ok_or_else(|| {
                let why =
                    "the credentials of a NATS server have a `%` without two hexadecimal digits";
                StoreError::Broken(why.to_owned())
            })
        };
        Ok(match text.split_once(':') {
            Some((user, password)) => Self::Password {
                user: decode(user)?,
                password: decode(password)?,
            },
            None => Self::Token(decode(text)?),
        })
    }
}

/// A variable of the environment that is not empty.
fn text(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|text| !text.is_empty())
}

fn path(name: &str) -> Option<PathBuf> {
    text(name).map(PathBuf::from)
}

/// The seed in a file, as NATS' own tools read it, or the seed itself.
fn read_nkey(value: &str) -> Result<String, StoreError> {
    if value.starts_with("SU") && !value.contains('/') {
        return Ok(value.to_owned());
    }
    let file = std::fs::read_to_string(value)
        .map_err(|error| StoreError::Broken(format!("NATS_NKEY: {value}: {error}")))?;
    Ok(file.trim().to_owned())
}

/// Text with `%41` as `A`.
fn percent_decoded(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, after)) = rest.split_first() {
        if first == b'%' {
            let digits = std::str::from_utf8(after.get(..2)?).ok()?;
            bytes.push(u8::from_str_radix(digits, 16).ok()?);
            rest = &after[2..];
        } else {
            bytes.push(first);
            rest = after;
        }
    }
    String::from_utf8(bytes).ok()
}
