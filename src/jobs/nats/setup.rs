//! Creates the streams and consumers, or checks those that exist.

use std::time::Duration;

use async_nats::jetstream::ErrorCode;
use async_nats::jetstream::consumer::{AckPolicy, pull};
use async_nats::jetstream::context::{CreateStreamErrorKind, GetStreamErrorKind};
use async_nats::jetstream::stream::{Config, DiscardPolicy, RetentionPolicy, StorageType};

use super::link::{Failure, Link};
use super::names;
use crate::jobs::{StoreError, StoreSettings};

/// Copies of each stream, if the cluster has so many servers.
const REPLICAS: usize = 3;
/// Time in which a message with the id of an earlier one is dropped.
const DUPLICATE_WINDOW: Duration = Duration::from_mins(10);
/// Most jobs that workers may have at once.
const MAX_ACK_PENDING: i64 = 1000;
/// The oldest version that has not lost acknowledged messages, as far as is known.
const SAFE_VERSION: (i64, i64, i64) = (2, 12, 3);
/// Times that more replicas are tried before fewer are taken: a cluster may just be starting.
const PATIENCE: usize = 10;

/// What is to be set up.
#[derive(Debug)]
pub(super) struct Setup<'a> {
    pub(super) link: &'a Link,
    pub(super) settings: &'a StoreSettings,
    /// The model as part of a subject.
    pub(super) model: &'a str,
    pub(super) replicas: Option<usize>,
    /// Whether files are stored in NATS.
    pub(super) results: bool,
}

/// What was found, for messages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Found {
    version: String,
    clustered: bool,
    replicas: usize,
}

impl Setup<'_> {
    /// Sets up everything. `tries` counts the calls before this one that failed.
    pub(super) async fn run(&self, tries: usize) -> Result<Found, Failure> {
        let info = self.link.client.try_server_info();
        let info = info.filter(|_| self.link.is_connected());
        let info = info.ok_or_else(|| Failure::again("there is no connection"))?;
        if !info.jetstream {
            return Err(self.broken("the server has no JetStream: start it with `-js`"));
        }
        let clustered = info.cluster.is_some();
        let mut replicas = 0;
        for config in self.streams() {
            replicas = self.stream(config, clustered, tries).await?;
        }
        let lease = self.settings.lease;
        self.consumer(
            names::JOBS,
            self.model,
            names::model_filter(self.model),
            lease,
        )
        .await?;
        let filter = names::ALL_WEBHOOKS.to_owned();
        self.consumer(names::WEBHOOKS, names::WEBHOOK_CONSUMER, filter, lease)
            .await?;
        Ok(Found {
            version: info.version,
            clustered,
            replicas,
        })
    }

    fn streams(&self) -> Vec<Config> {
        let queue = |name: &str, subjects: &str| Config {
            name: name.to_owned(),
            subjects: vec![subjects.to_owned()],
            retention: RetentionPolicy::WorkQueue,
            storage: StorageType::File,
            discard: DiscardPolicy::New,
            duplicate_window: DUPLICATE_WINDOW,
            max_messages: -1,
            max_bytes: -1,
            max_messages_per_subject: -1,
            ..Default::default()
        };
        let kept = |name: &str, subjects: &[&str]| Config {
            name: name.to_owned(),
            subjects: subjects.iter().map(|&subject| subject.to_owned()).collect(),
            storage: StorageType::File,
            discard: DiscardPolicy::New,
            max_messages: -1,
            max_bytes: -1,
            max_messages_per_subject: -1,
            allow_rollup: true,
            // Any replica would answer a direct read, and might not have the newest record yet.
            allow_direct: false,
            ..Default::default()
        };
        let mut streams = vec![
            Config {
                max_messages: self.max_messages(),
                ..queue(names::JOBS, names::ALL_JOBS)
            },
            queue(names::WEBHOOKS, names::ALL_WEBHOOKS),
            Config {
                max_messages_per_subject: 1,
                deny_delete: true,
                ..kept(names::RECORDS, &[names::ALL_RECORDS])
            },
        ];
        if self.results {
            let bucket = names::RESULTS_BUCKET;
            let subjects = [format!("$O.{bucket}.C.>"), format!("$O.{bucket}.M.>")];
            streams.push(kept(names::RESULTS, &[&subjects[0], &subjects[1]]));
        }
        streams
    }

    /// Jobs that wait, and jobs that workers have.
    fn max_messages(&self) -> i64 {
        let queued = i64::try_from(self.settings.max_queued).unwrap_or(i64::MAX);
        queued.saturating_add(MAX_ACK_PENDING)
    }

    /// Creates a stream, or checks the existing one. Returns its number of replicas.
    async fn stream(
        &self,
        config: Config,
        clustered: bool,
        tries: usize,
    ) -> Result<usize, Failure> {
        let name = config.name.clone();
        let found = match self.link.jetstream.get_stream(&name).await {
            Ok(stream) => stream.cached_info().config.clone(),
            Err(error) => match error.kind() {
                GetStreamErrorKind::JetStream(error)
                    if error.error_code() == ErrorCode::STREAM_NOT_FOUND =>
                {
                    return self.create(config, clustered, tries).await;
                }
                GetStreamErrorKind::JetStream(error) => return Err(self.api_failure(&error)),
                _ => return Err(Failure::again(error)),
            },
        };
        if found.retention != config.retention || found.subjects != config.subjects {
            let text = format!(
                "stream {name} was not made by kiln: its subjects are {:?}, and its retention is \
                 {:?}; give kiln a NATS account of its own",
                found.subjects, found.retention
            );
            return Err(self.broken(&text));
        }
        let mut wanted = found.clone();
        if found.max_messages > 0 && found.max_messages < config.max_messages {
            wanted.max_messages = config.max_messages;
        }
        if let Some(replicas) = self.replicas {
            wanted.num_replicas = replicas;
        }
        let replicas = wanted.num_replicas;
        if wanted != found {
            let updated = self.link.jetstream.update_stream(&wanted).await;
            updated.map_err(|error| match error.kind() {
                CreateStreamErrorKind::JetStream(error) => self.api_failure(&error),
                _ => Failure::again(error),
            })?;
        }
        Ok(replicas)
    }

    async fn create(
        &self,
        config: Config,
        clustered: bool,
        tries: usize,
    ) -> Result<usize, Failure> {
        let name = &config.name;
        let single = !clustered && self.replicas.is_none();
        let mut num_replicas = if single {
            1
        } else {
            self.replicas.unwrap_or(REPLICAS)
        };
        loop {
            let created = self.link.jetstream.create_stream(Config {
                num_replicas,
                ..config.clone()
            });
            let Err(error) = created.await else {
                return Ok(num_replicas);
            };
            let CreateStreamErrorKind::JetStream(error) = error.kind() else {
                return Err(Failure::again(format!("stream {name}: {error}")));
            };
            let too_many = [
                ErrorCode::CLUSTER_NO_PEERS,
                ErrorCode::INSUFFICIENT_RESOURCES,
                ErrorCode::STREAM_REPLICAS_NOT_SUPPORTED,
            ];
            if !too_many.contains(&error.error_code()) {
                return Err(self.api_failure(&error));
            }
            if num_replicas == 1 || self.replicas.is_some() || tries < PATIENCE {
                let text = format!("stream {name} with {num_replicas} replicas: {error}");
                return Err(Failure::Again(text));
            }
            num_replicas = 1;
        }
    }

    async fn consumer(
        &self,
        stream: &str,
        name: &str,
        filter: String,
        lease: Duration,
    ) -> Result<(), Failure> {
        let config = pull::Config {
            durable_name: Some(name.to_owned()),
            filter_subject: filter,
            ack_policy: AckPolicy::Explicit,
            ack_wait: lease,
            max_deliver: -1,
            // A webhook that is tried again later counts as pending.
            max_ack_pending: if stream == names::JOBS {
                MAX_ACK_PENDING
            } else {
                -1
            },
            ..Default::default()
        };
        let jetstream = &self.link.jetstream;
        let created = jetstream.create_consumer_on_stream(config, stream).await;
        created.map_err(|error| Failure::again(format!("consumer {name} of {stream}: {error}")))?;
        Ok(())
    }

    /// Logs what was found, and what may lose jobs.
    pub(super) fn report(&self, found: &Found) {
        let Found {
            version,
            clustered,
            replicas,
        } = found;
        let servers = &self.link.servers;
        tracing::info!(
            "jobs are stored in NATS {version} at {servers}: stream {}, consumer {}, replicas {replicas}",
            names::JOBS,
            self.model
        );
        if parse_version(version).is_some_and(|version| version < SAFE_VERSION) {
            tracing::warn!(
                "NATS {version} can lose acknowledged jobs when a machine loses power: use 2.12.3 or \
                 later with `sync_interval: always`"
            );
        }
        if *clustered && *replicas < REPLICAS {
            tracing::warn!(
                "the streams of jobs have {replicas} replicas in a cluster: jobs wait or are lost with \
                 the server that has them; add `?replicas=3` to the URL of --jobs"
            );
        }
    }

    fn api_failure(&self, error: &async_nats::jetstream::Error) -> Failure {
        let is_disabled = [
            ErrorCode::JETSTREAM_NOT_ENABLED,
            ErrorCode::JETSTREAM_NOT_ENABLED_FOR_ACCOUNT,
            ErrorCode::STREAM_SUBJECT_OVERLAP,
        ];
        if is_disabled.contains(&error.error_code()) {
            return self.broken(&error.to_string());
        }
        Failure::again(error)
    }

    fn broken(&self, why: &str) -> Failure {
        Failure::Store(StoreError::Broken(format!(
            "jobs cannot be stored in NATS at {}: {why}",
            self.link.servers
        )))
    }
}

fn parse_version(version: &str) -> Option<(i64, i64, i64)> {
    let number = version.split('-').next()?;
    let mut parts = number.split('.').map(|part| part.parse().ok());
    Some((parts.next()??, parts.next()??, parts.next()??))
}
