//! What the values of `--jobs` and `--results` name.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use super::local::LocalStore;
use super::{JobStore, StoreError, StoreSettings};

/// Where jobs are kept: the value of `--jobs`.
#[derive(Clone, PartialEq, Eq)]
pub enum JobsLocation {
    /// A folder of this machine.
    Folder(PathBuf),
    /// Servers of one NATS system, each as `nats://HOST:PORT` or `tls://HOST:PORT`, with a user and a
    /// password before the host where they were given.
    Nats(Vec<String>),
}

/// Where the files of completed jobs on NATS are kept: the value of `--results`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ResultsLocation {
    /// A folder that every server can read and write.
    Folder(PathBuf),
    Bucket {
        service: BucketService,
        bucket: String,
        /// Begin of the names of all files: empty, or a path that ends with `/`.
        prefix: String,
    },
}

/// Who keeps a bucket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BucketService {
    /// Amazon S3, or a server with its protocol.
    S3,
    /// Google Cloud Storage.
    Gcs,
}

/// Why a text is not a [`JobsLocation`] or a [`ResultsLocation`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidLocation {
    #[error("must be a folder or nats://HOST[:PORT][,HOST...], and is empty")]
    NoJobs,
    #[error("must be a folder or nats://HOST[:PORT][,HOST...], got the scheme {0}://")]
    JobsScheme(String),
    #[error("names no host between its commas: write nats://HOST[:PORT][,HOST...]")]
    NoHost,
    #[error("{0} is not a port: a port is a number from 1 to 65535")]
    Port(String),
    #[error("{0} is not the name or the address of a host")]
    Host(String),
    #[error(
        "has a path, which the address of a NATS server does not: write nats://HOST[:PORT][,HOST...]"
    )]
    Path,
    #[error("must be s3://BUCKET[/PREFIX], gs://BUCKET[/PREFIX] or file:///FOLDER, got {0:?}")]
    Results(String),
    #[error("file:// must be followed by an absolute path, such as file:///srv/results, got {0:?}")]
    RelativeFolder(String),
    #[error("names no bucket: write {0}://BUCKET[/PREFIX]")]
    NoBucket(&'static str),
}

/// Port of a NATS server.
const NATS_PORT: u16 = 4222;

/// Opens the store at a location. `results` is for jobs on NATS alone.
pub async fn open(
    jobs: &JobsLocation,
    results: Option<&ResultsLocation>,
    settings: StoreSettings,
) -> Result<Arc<dyn JobStore>, StoreError> {
    match jobs {
        JobsLocation::Folder(folder) if results.is_some() => Err(StoreError::Broken(format!(
            "--results is for jobs on NATS: the files of jobs in the folder {0} are kept in {0}/results. \
             Remove --results",
            folder.display()
        ))),
        JobsLocation::Folder(folder) => Ok(LocalStore::open(folder, settings).await?),
        #[cfg(feature = "nats")]
        JobsLocation::Nats(servers) => {
            let results = results.map(ToString::to_string);
            let nats = super::NatsSettings::new(servers, results)?;
            Ok(Arc::new(super::NatsStore::open(&nats, settings).await?))
        }
        #[cfg(not(feature = "nats"))]
        JobsLocation::Nats(_) => Err(StoreError::Broken(
            "this kiln was built without the feature `nats`, which --jobs nats://... needs: build it with \
             --features nats, or keep jobs in a folder"
                .to_owned(),
        )),
    }
}

impl JobsLocation {
    /// Whether several servers can have these jobs at once.
    pub fn is_shared(&self) -> bool {
        matches!(self, Self::Nats(_))
    }
}

impl FromStr for JobsLocation {
    type Err = InvalidLocation;

    fn from_str(text: &str) -> Result<Self, InvalidLocation> {
        let Some((scheme, rest)) = text.split_once("://") else {
            return match text {
                "" => Err(InvalidLocation::NoJobs),
                folder => Ok(Self::Folder(PathBuf::from(folder))),
            };
        };
        if !is_nats(scheme) {
            return Err(InvalidLocation::JobsScheme(scheme.to_owned()));
        }
        let mut servers = Vec::new();
        for server in rest.split(',').map(str::trim) {
            let (scheme, address) = server.split_once("://").unwrap_or((scheme, server));
            if !is_nats(scheme) {
                return Err(InvalidLocation::JobsScheme(scheme.to_owned()));
            }
            servers.push(nats_server(scheme, address)?);
        }
        Ok(Self::Nats(servers))
    }
}

fn is_nats(scheme: &str) -> bool {
    matches!(scheme, "nats" | "tls")
}

/// The URL of a server, with its port.
fn nats_server(scheme: &str, address: &str) -> Result<String, InvalidLocation> {
    let address = address.strip_suffix('/').unwrap_or(address);
    let (user, address) = match address.rsplit_once('@') {
        Some((user, address)) => (format!("{user}@"), address),
        None => (String::new(), address),
    };
    if address.contains('/') {
        return Err(InvalidLocation::Path);
    }
    // An IPv6 address is in brackets.
    let host_end = if address.starts_with('[') {
        address.find(']').map(|end| end + 1)
    } else {
        address.find(':')
    };
    let (host, port) = address.split_at(host_end.unwrap_or(address.len()));
    if host.is_empty() {
        return Err(InvalidLocation::NoHost);
    }
    let is_name = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
    let is_host = match host
        .strip_prefix('[')
        .and_then(|host| host.strip_suffix(']'))
    {
        Some(host) => host.parse::<std::net::Ipv6Addr>().is_ok(),
        None => host.chars().all(is_name),
    };
    if !is_host {
        return Err(InvalidLocation::Host(host.to_owned()));
    }
    let port = match port.strip_prefix(':') {
        None if port.is_empty() => NATS_PORT,
        None => return Err(InvalidLocation::Host(address.to_owned())),
        Some(port) => match port.parse() {
            Ok(0) | Err(_) => return Err(InvalidLocation::Port(port.to_owned())),
            Ok(port) => port,
        },
    };
    Ok(format!("{scheme}://{user}{host}:{port}"))
}

impl fmt::Display for JobsLocation {
    /// Without users and passwords.
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Folder(folder) => folder.display().fmt(formatter),
            Self::Nats(servers) => {
                for (index, server) in servers.iter().enumerate() {
                    let comma = if index == 0 { "" } else { "," };
                    let (scheme, address) = server.split_once("://").unwrap_or(("nats", server));
                    let host = address.rsplit_once('@').map_or(address, |(_, host)| host);
                    write!(formatter, "{comma}{scheme}://{host}")?;
                }
                Ok(())
            }
        }
    }
}

impl fmt::Debug for JobsLocation {
    /// Without users and passwords.
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "JobsLocation({self})")
    }
}

impl FromStr for ResultsLocation {
    type Err = InvalidLocation;

    fn from_str(text: &str) -> Result<Self, InvalidLocation> {
        let (service, rest) = match text.split_once("://") {
            Some(("s3", rest)) => (BucketService::S3, rest),
            Some(("gs", rest)) => (BucketService::Gcs, rest),
            Some(("file", path)) if Path::new(path).is_absolute() => {
                return Ok(Self::Folder(PathBuf::from(path)));
            }
            Some(("file", path)) => return Err(InvalidLocation::RelativeFolder(path.to_owned())),
            _ => return Err(InvalidLocation::Results(text.to_owned())),
        };
        let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        if bucket.is_empty() {
            return Err(InvalidLocation::NoBucket(service.scheme()));
        }
        let prefix = prefix.trim_matches('/');
        let prefix = match prefix {
            "" => String::new(),
            prefix => format!("{prefix}/"),
        };
        Ok(Self::Bucket {
            service,
            bucket: bucket.to_owned(),
            prefix,
        })
    }
}

impl fmt::Display for ResultsLocation {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Folder(folder) => write!(formatter, "file://{}", folder.display()),
            Self::Bucket {
                service,
                bucket,
                prefix,
            } => write!(formatter, "{}://{bucket}/{prefix}", service.scheme()),
        }
    }
}

impl BucketService {
    /// The scheme of its URLs.
    pub const fn scheme(self) -> &'static str {
        match self {
            Self::S3 => "s3",
            Self::Gcs => "gs",
        }
    }
}

#[cfg(test)]
mod tests;
