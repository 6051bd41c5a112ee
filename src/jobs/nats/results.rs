//! Where files of completed jobs are stored: the NATS object store, S3, Google Cloud Storage or a folder
//! that all servers see.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use async_nats::jetstream::object_store::{
    DeleteErrorKind, GetErrorKind, ObjectMetadata, ObjectStore as NatsObjects,
};
use bytes::Bytes;
use object_store::aws::AmazonS3Builder;
use object_store::gcp::GoogleCloudStorageBuilder;
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::signer::{Method, Signer};
use object_store::{
    Attribute, BackoffConfig, ObjectStore, ObjectStoreExt as _, PutOptions, RetryConfig,
};
use tokio::io::AsyncReadExt as _;
use tokio::sync::OnceCell;
use tokio::time::timeout;

use super::link::{Failure, Link};
use super::names;
use crate::jobs::StoreError;

/// Time for which a signed URL can be used.
const URL_LIFETIME: Duration = Duration::from_mins(15);
/// Most time to read or write one file.
const FILE_TIMEOUT: Duration = Duration::from_mins(1);
/// Most time for all tries of a request to an object store.
const CLOUD_RETRY: Duration = Duration::from_secs(10);
/// Part of a file in one message of the NATS object store.
const CHUNK_BYTES: usize = 128 << 10;

/// A store of files.
pub(super) enum Results {
    Nats {
        link: Box<Link>,
        objects: Box<OnceCell<NatsObjects>>,
    },
    Other(Other),
}

/// A store of files outside of NATS.
#[derive(Debug)]
pub(super) struct Other {
    store: Arc<dyn ObjectStore>,
    signer: Option<Arc<dyn Signer>>,
    /// Whether files can have a media type.
    attributes: bool,
    prefix: Path,
    /// The URL in messages.
    url: String,
}

/// How the client gets a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Found {
    Content(Bytes),
    Url(String),
}

impl fmt::Debug for Results {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Nats { .. } => formatter.write_str("Nats"),
            Self::Other(other) => other.fmt(formatter),
        }
    }
}

impl Results {
    /// The store of this URL; the NATS object store without one.
    pub(super) fn open(url: Option<&str>, link: &Link) -> Result<Self, StoreError> {
        let Some(url) = url else {
            return Ok(Self::Nats {
                link: Box::new(link.clone()),
                objects: Box::default(),
            });
        };
        Self::open_other(url)
    }

    /// The store of this URL.
    pub(super) fn open_other(url: &str) -> Result<Self, StoreError> {
        Self::open_with(url, AmazonS3Builder::from_env())
    }

    /// The same with these settings of S3.
    pub(super) fn open_with(url: &str, s3: AmazonS3Builder) -> Result<Self, StoreError> {
        let other = Other::open(url, s3);
        let other = other.map_err(|why| StoreError::Broken(format!("--results {url}: {why}")))?;
        Ok(Self::Other(other))
    }

    pub(super) const fn is_nats(&self) -> bool {
        matches!(self, Self::Nats { .. })
    }

    /// Stores a file. When this returns, it is durable.
    pub(super) async fn put(
        &self,
        path: &str,
        media_type: &str,
        content: Bytes,
    ) -> Result<(), StoreError> {
        match self {
            Self::Nats { link, objects } => {
                link.retry(|| async {
                    let objects = nats_objects(link, objects).await?;
                    let meta = ObjectMetadata {
                        name: path.to_owned(),
                        chunk_size: Some(CHUNK_BYTES),
                        ..Default::default()
                    };
                    let put = timeout(FILE_TIMEOUT, objects.put(meta, &mut content.as_ref())).await;
                    put.map_err(Failure::again)?.map_err(Failure::again)?;
                    Ok(())
                })
                .await
            }
            Self::Other(other) => {
                let mut options = PutOptions::default();
                if other.attributes {
                    let value = media_type.to_owned().into();
                    options.attributes.insert(Attribute::ContentType, value);
                }
                let path = other.path(path);
                let put = other.store.put_opts(&path, content.into(), options);
                let put = timeout(FILE_TIMEOUT, put).await;
                let put = put.map_err(|error| other.unavailable(error))?;
                put.map_err(|error| other.unavailable(error))?;
                Ok(())
            }
        }
    }

    /// A file, or where it is; `None` if there is none.
    pub(super) async fn get(&self, path: &str) -> Result<Option<Found>, StoreError> {
        match self {
            Self::Nats { link, objects } => {
                link.retry(|| async {
                    let objects = nats_objects(link, objects).await?;
                    let read = timeout(FILE_TIMEOUT, read_nats(objects, path)).await;
                    read.map_err(Failure::again)?
                })
                .await
            }
            Self::Other(other) => other.get(path).await,
        }
    }

    /// Deletes a file, if there is one.
    pub(super) async fn delete(&self, path: &str) -> Result<(), StoreError> {
        match self {
            Self::Nats { link, objects } => {
                link.retry(|| async {
                    let objects = nats_objects(link, objects).await?;
                    match objects.delete(path).await {
                        Ok(()) => Ok(()),
                        Err(error) if error.kind() == DeleteErrorKind::NotFound => Ok(()),
                        Err(error) => Err(Failure::again(error)),
                    }
                })
                .await
            }
            Self::Other(other) => match other.store.delete(&other.path(path)).await {
                Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
                Err(error) => Err(other.unavailable(error)),
            },
        }
    }
}

async fn nats_objects<'a>(
    link: &Link,
    objects: &'a OnceCell<NatsObjects>,
) -> Result<&'a NatsObjects, Failure> {
    let open = || link.jetstream.get_object_store(names::RESULTS_BUCKET);
    objects.get_or_try_init(open).await.map_err(Failure::again)
}

async fn read_nats(objects: &NatsObjects, path: &str) -> Result<Option<Found>, Failure> {
    let mut object = match objects.get(path).await {
        Ok(object) => object,
        Err(error) if error.kind() == GetErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Failure::again(error)),
    };
    let mut content = Vec::with_capacity(object.info.size);
    let read = object.read_to_end(&mut content).await;
    read.map_err(Failure::again)?;
    Ok(Some(Found::Content(content.into())))
}

impl Other {
    /// Opens `s3://BUCKET[/PREFIX]`, `gs://BUCKET[/PREFIX]` or `file:///FOLDER`. Credentials and
    /// endpoints come from the environment variables of these services. `KILN_RESULTS_PRESIGN=false` has
    /// files sent through kiln, for clients that do not reach the service.
    fn open(url: &str, s3: AmazonS3Builder) -> Result<Self, String> {
        let presign = std::env::var("KILN_RESULTS_PRESIGN").map_or(true, |value| value != "false");
        let (scheme, rest) = url.split_once("://").ok_or("it is not a URL")?;
        let cloud = || {
            let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
            let prefix =
                Path::parse(prefix.trim_matches('/')).map_err(|error| error.to_string())?;
            if bucket.is_empty() {
                return Err("it has no bucket".to_owned());
            }
            Ok((bucket.to_owned(), prefix))
        };
        let opened = |store, signer, prefix| Self {
            store,
            signer: if presign { signer } else { None },
            attributes: scheme != "file",
            prefix,
            url: url.to_owned(),
        };
        let fault = |error: object_store::Error| error.to_string();
        match scheme {
            "s3" => {
                let (bucket, prefix) = cloud()?;
                let store = s3.with_bucket_name(bucket).with_retry(retries()).build();
                let store = Arc::new(store.map_err(fault)?);
                let signer: Arc<dyn Signer> = store.clone();
                Ok(opened(store, Some(signer), prefix))
            }
            "gs" => {
                let (bucket, prefix) = cloud()?;
                let store = GoogleCloudStorageBuilder::from_env()
                    .with_bucket_name(bucket)
                    .with_retry(retries())
                    .build();
                let store = Arc::new(store.map_err(fault)?);
                let signer: Arc<dyn Signer> = store.clone();
                Ok(opened(store, Some(signer), prefix))
            }
            "file" => {
                if !rest.starts_with('/') {
                    return Err("write file:///FOLDER, with three slashes".to_owned());
                }
                std::fs::create_dir_all(rest).map_err(|error| error.to_string())?;
                let store = LocalFileSystem::new_with_prefix(rest).map_err(fault)?;
                let store = store.with_fsync(true).with_automatic_cleanup(true);
                Ok(opened(Arc::new(store), None, Path::default()))
            }
            _ => Err("the URL must begin with s3://, gs:// or file:///".to_owned()),
        }
    }

    fn path(&self, path: &str) -> Path {
        let parts = path.split('/').map(Into::into);
        self.prefix.parts().chain(parts).collect()
    }

    async fn get(&self, path: &str) -> Result<Option<Found>, StoreError> {
        let path = self.path(path);
        if let Some(signer) = &self.signer {
            match signer.signed_url(Method::GET, &path, URL_LIFETIME).await {
                Ok(url) => return Ok(Some(Found::Url(url.into()))),
                Err(error) => {
                    tracing::warn!("{}: no URL can be signed: {error}", self.url);
                }
            }
        }
        let read = async { self.store.get(&path).await?.bytes().await };
        match timeout(FILE_TIMEOUT, read).await {
            Ok(Ok(content)) => Ok(Some(Found::Content(content))),
            Ok(Err(object_store::Error::NotFound { .. })) => Ok(None),
            Ok(Err(error)) => Err(self.unavailable(error)),
            Err(error) => Err(self.unavailable(error)),
        }
    }

    fn unavailable(&self, error: impl fmt::Display) -> StoreError {
        StoreError::Unavailable(format!("{}: {error}", self.url))
    }
}

fn retries() -> RetryConfig {
    RetryConfig {
        backoff: BackoffConfig {
            max_backoff: Duration::from_secs(2),
            ..Default::default()
        },
        max_retries: 4,
        retry_timeout: CLOUD_RETRY,
    }
}
