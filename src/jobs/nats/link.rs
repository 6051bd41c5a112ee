//! The connection to the servers: requests that are repeated for some seconds, and their failures.

use std::error::Error as _;
use std::fmt::Display;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use async_nats::connection::State;
use async_nats::jetstream::context::PublishErrorKind;
use async_nats::jetstream::message::PublishMessage;
use async_nats::jetstream::{self, AckKind, Context};
use async_nats::{Client, ConnectErrorKind, Event, Message, Subscriber};
use futures_util::StreamExt as _;
use serde_json::json;
use tokio::sync::{oneshot, watch};
use tokio::time::{Instant, sleep, timeout};

use super::settings::NatsSettings;
use crate::jobs::StoreError;

/// Most time for one request.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(2);
/// Time for which a failed request is repeated: an election takes up to some seconds.
const RETRY_FOR: Duration = Duration::from_secs(6);
/// Time without a connection after which requests fail at once.
const LOST_AFTER: Duration = Duration::from_secs(3);
/// Time for which the server holds a request for a message.
const PULL_WAIT: Duration = Duration::from_secs(5);
/// Wait after a request for a message that failed.
pub(super) const PULL_DELAY: Duration = Duration::from_millis(500);
const RETRY_DELAY: Duration = Duration::from_millis(200);
/// Most time for the first connection.
const FIRST_CONNECT: Duration = Duration::from_secs(6);

/// A connection to one of the servers, which is made again when it is lost.
#[derive(Debug, Clone)]
pub(super) struct Link {
    pub(super) client: Client,
    pub(super) jetstream: Context,
    /// Names of the servers in messages.
    pub(super) servers: Arc<str>,
    /// Since when there is a connection, or none.
    connected: watch::Receiver<(bool, Instant)>,
}

/// Why one try of a request failed.
#[derive(Debug)]
pub(super) enum Failure {
    /// The same request may work later.
    Again(String),
    /// It never will.
    Store(StoreError),
}

impl Failure {
    pub(super) fn again(error: impl Display) -> Self {
        Self::Again(error.to_string())
    }
}

/// The outcome of [`Link::publish`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Published {
    /// The message has this sequence.
    Stored(u64),
    /// The stream had a message of this id.
    Duplicate,
    /// The last message of the subject is another one than expected.
    Conflict,
    /// The stream has as many messages as it may.
    Full,
}

impl Link {
    /// Connects. Without an answer of any server, the connection is made later; a server that refuses
    /// the credentials is an error.
    pub(super) async fn connect(
        settings: &NatsSettings,
        instance: &str,
    ) -> Result<Self, StoreError> {
        // An embedding program may have installed one.
        rustls::crypto::ring::default_provider()
            .install_default()
            .ok();
        let servers: Arc<str> = settings.names().into();
        let addresses = settings.addresses()?;
        let (sender, connected) = watch::channel((false, Instant::now()));
        let options = settings.options(instance).await?;
        let options = {
            let servers = Arc::clone(&servers);
            options.event_callback(move |event| {
                log_event(&event, &servers);
                match event {
                    Event::Connected => drop(sender.send((true, Instant::now()))),
                    Event::Disconnected => drop(sender.send((false, Instant::now()))),
                    _ => {}
                }
                std::future::ready(())
            })
        };
        let first = timeout(FIRST_CONNECT, options.clone().connect(addresses.clone())).await;
        let failure = match first {
            Ok(Ok(client)) => return Ok(Self::new(client, servers, connected)),
            Ok(Err(error)) => match error.kind() {
                ConnectErrorKind::AuthorizationViolation
                | ConnectErrorKind::Authentication
                | ConnectErrorKind::Tls
                | ConnectErrorKind::ServerParse => {
                    return Err(StoreError::Broken(format!(
                        "the NATS server at {servers} does not take this connection: {error}"
                    )));
                }
                _ => error.to_string(),
            },
            Err(_) => "timed out".to_owned(),
        };
        tracing::warn!(
            "no NATS server answers at {servers}: {failure}; jobs are refused until one does"
        );
        let client = options
            .retry_on_initial_connect()
            .connect(addresses)
            .await
            .map_err(|error| StoreError::Broken(format!("{servers}: {error}")))?;
        Ok(Self::new(client, servers, connected))
    }

    fn new(client: Client, servers: Arc<str>, connected: watch::Receiver<(bool, Instant)>) -> Self {
        let mut jetstream = jetstream::new(client.clone());
        jetstream.set_timeout(REQUEST_TIMEOUT);
        Self {
            client,
            jetstream,
            servers,
            connected,
        }
    }

    pub(super) fn is_connected(&self) -> bool {
        self.client.connection_state() == State::Connected
    }

    /// Changes whenever the connection is lost or made.
    pub(super) fn connections(&self) -> watch::Receiver<(bool, Instant)> {
        self.connected.clone()
    }

    /// Fails if there has been no connection for some seconds.
    pub(super) fn check(&self) -> Result<(), StoreError> {
        let (_, since) = *self.connected.borrow();
        if !self.is_connected() && since.elapsed() > LOST_AFTER {
            return Err(self.unavailable("there is no connection"));
        }
        Ok(())
    }

    pub(super) fn unavailable(&self, why: impl Display) -> StoreError {
        StoreError::Unavailable(format!("NATS at {}: {why}", self.servers))
    }

    pub(super) fn failed(&self, failure: Failure) -> StoreError {
        match failure {
            Failure::Again(why) => self.unavailable(why),
            Failure::Store(error) => error,
        }
    }

    /// Repeats a request for some seconds until it works.
    pub(super) async fn retry<T, F>(&self, mut call: impl FnMut() -> F) -> Result<T, StoreError>
    where
        F: Future<Output = Result<T, Failure>>,
    {
        let begin = Instant::now();
        loop {
            self.check()?;
            match call().await {
                Ok(value) => return Ok(value),
                Err(Failure::Store(error)) => return Err(error),
                Err(Failure::Again(why)) if begin.elapsed() > RETRY_FOR => {
                    return Err(self.unavailable(why));
                }
                Err(Failure::Again(_)) => sleep(RETRY_DELAY).await,
            }
        }
    }

    /// Publishes one message and waits until the stream has stored it.
    pub(super) async fn publish(
        &self,
        subject: String,
        message: PublishMessage,
    ) -> Result<Published, Failure> {
        let acknowledged = async { self.jetstream.send_publish(subject, message).await?.await };
        let error = match acknowledged.await {
            Ok(ack) if ack.duplicate => return Ok(Published::Duplicate),
            Ok(ack) => return Ok(Published::Stored(ack.sequence)),
            Err(error) => error,
        };
        match error.kind() {
            PublishErrorKind::WrongLastSequence => Ok(Published::Conflict),
            PublishErrorKind::StreamNotFound => {
                let text = "no stream takes the message: the cluster may have lost its quorum";
                Err(Failure::again(text))
            }
            _ => {
                let source = error.source().map(ToString::to_string).unwrap_or_default();
                if source.contains("maximum messages exceeded") {
                    return Ok(Published::Full);
                }
                Err(Failure::again(error))
            }
        }
    }

    /// Waits for a message of a durable consumer, and asks again after a failure. Fails if the caller is gone,
    /// or if there has been no connection for some seconds.
    pub(super) async fn next_message<T>(
        &self,
        stream: &str,
        consumer: &str,
        caller: &mut oneshot::Sender<T>,
    ) -> Result<jetstream::Message, StoreError> {
        loop {
            match self.pull(stream, consumer, caller.closed()).await {
                Ok(Some(message)) => return Ok(message),
                Ok(None) if caller.is_closed() => {
                    return Err(self.unavailable("nobody waits for a message"));
                }
                Ok(None) => {}
                Err(error) => {
                    self.check()?;
                    if caller.is_closed() {
                        return Err(error);
                    }
                    sleep(PULL_DELAY).await;
                }
            }
        }
    }

    /// Waits for one message of a durable consumer, or until nobody waits for it any more: a message
    /// that still arrives then is offered to others.
    async fn pull(
        &self,
        stream: &str,
        consumer: &str,
        gone: impl Future<Output = ()>,
    ) -> Result<Option<jetstream::Message>, StoreError> {
        if !self.is_connected() {
            // A request that is sent after the next connection would have nobody to answer to.
            return Err(self.unavailable("there is no connection"));
        }
        let mut connections = self.connections();
        connections.mark_unchanged();
        let inbox = self.client.new_inbox();
        let request = json!({ "batch": 1, "expires": PULL_WAIT.as_nanos() as u64 });
        let subject = format!("$JS.API.CONSUMER.MSG.NEXT.{stream}.{consumer}");
        let ask = async {
            let messages = self.client.subscribe(inbox.clone()).await;
            let messages = messages.map_err(|error| self.unavailable(error))?;
            let payload = request.to_string().into();
            let sent = self
                .client
                .publish_with_reply(subject, inbox, payload)
                .await;
            sent.map_err(|error| self.unavailable(error))?;
            Ok(messages)
        };
        let mut messages = timeout(REQUEST_TIMEOUT, ask)
            .await
            .map_err(|_| self.unavailable("the connection does not take a request"))??;
        let message = tokio::select! {
            message = timeout(PULL_WAIT + REQUEST_TIMEOUT, messages.next()) => message,
            _ = connections.changed() => return Err(self.unavailable("the connection was lost")),
            () = gone => {
                self.give_back(messages).await;
                return Ok(None);
            }
        };
        let Ok(Some(message)) = message else {
            return Ok(None);
        };
        match message.status.map(|status| status.as_u16()) {
            None => Ok(Some(self.jetstream_message(message))),
            // No message within the time.
            Some(404 | 408) => Ok(None),
            Some(status) => {
                let text = message.description.unwrap_or_default();
                Err(self.unavailable(format!("consumer {consumer}: {status} {text}")))
            }
        }
    }

    /// Ends a subscription, and offers what the server has sent to it meanwhile to others.
    async fn give_back(&self, mut messages: Subscriber) {
        if messages.drain().await.is_err() {
            return;
        }
        while let Ok(Some(message)) = timeout(REQUEST_TIMEOUT, messages.next()).await {
            if message.status.is_none() {
                let message = self.jetstream_message(message);
                acknowledge(&message, AckKind::Nak(None)).await.ok();
            }
        }
    }

    fn jetstream_message(&self, message: Message) -> jetstream::Message {
        jetstream::Message {
            message,
            context: self.jetstream.clone(),
        }
    }
}

/// Says that the worker of a message is alive, without waiting for an answer.
pub(super) async fn acknowledge(
    message: &jetstream::Message,
    kind: AckKind,
) -> Result<(), Failure> {
    match timeout(REQUEST_TIMEOUT, message.ack_with(kind)).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => Err(Failure::again(error)),
        Err(_) => Err(Failure::again("timed out")),
    }
}

fn log_event(event: &Event, servers: &str) {
    match event {
        Event::Connected => tracing::info!("connected to NATS at {servers}"),
        Event::Disconnected => tracing::warn!("lost the connection to NATS at {servers}"),
        Event::ServerError(error) => tracing::warn!("NATS at {servers}: {error}"),
        Event::ClientError(error) => tracing::debug!("client of NATS at {servers}: {error}"),
        Event::SlowConsumer(_) => {
            tracing::warn!("NATS at {servers}: messages were dropped, as too many waited");
        }
        Event::LameDuckMode => tracing::info!("a NATS server at {servers} is about to stop"),
        Event::Draining | Event::Closed => {}
    }
}
