//! Sends batches of spans to a collector, from a thread of their own.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use opentelemetry_http::{Bytes, HttpClient, HttpError, Request, Response};
use opentelemetry_otlp::{
    Protocol, SpanExporter as OtlpExporter, WithExportConfig, WithHttpConfig,
};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::trace::{SpanData, SpanExporter};
use reqwest::Url;
use reqwest::blocking::Client;
use reqwest::redirect::Policy;

use super::super::TelemetryError;
use super::super::settings::TRACES_ENDPOINT;

/// Time between two warnings that spans are not sent.
const WARN_EVERY: Duration = Duration::from_mins(10);

/// The default of `OTEL_EXPORTER_OTLP_TIMEOUT`.
const TIMEOUT: Duration = Duration::from_secs(10);

/// The URL that spans are posted to.
pub(super) fn url(variable: &'static str, value: &str) -> Result<Url, TelemetryError> {
    let fault = |reason: &str| TelemetryError::Endpoint {
        variable,
        value: value.to_owned(),
        reason: format!("{reason}. Give one such as http://collector:4318"),
    };
    let mut url = Url::parse(value).map_err(|error| fault(&error.to_string()))?;
    if !matches!(url.scheme(), "http" | "https") {
        return Err(fault("it begins with neither http:// nor https://"));
    }
    if variable != TRACES_ENDPOINT {
        let path = format!("{}/v1/traces", url.path().trim_end_matches('/'));
        url.set_path(&path);
    }
    Ok(url)
}

/// A URL as the log shows it.
pub(super) fn without_secrets(url: &Url) -> String {
    let mut url = url.clone();
    // They fail for URLs that cannot have them.
    url.set_username("").ok();
    url.set_password(None).ok();
    url.set_query(None);
    url.to_string()
}

/// Sends spans to this URL. Headers, the timeout and the rest come from the environment.
pub(super) fn exporter(url: &Url) -> Result<Exporter, TelemetryError> {
    // An embedding program may have installed one.
    rustls::crypto::ring::default_provider()
        .install_default()
        .ok();
    let client = Client::builder()
        .user_agent(concat!("kiln/", env!("CARGO_PKG_VERSION")))
        .redirect(Policy::none())
        .timeout(timeout())
        .build()
        .map_err(|error| TelemetryError::Client(crate::error_chain(&error)))?;
    let fault = Arc::default();
    let client = CollectorClient {
        client,
        fault: Arc::clone(&fault),
    };
    let exporter = OtlpExporter::builder()
        .with_http()
        .with_http_client(client)
        .with_endpoint(url.as_str())
        .with_protocol(Protocol::HttpBinary)
        .build()
        .map_err(|error| TelemetryError::Client(crate::error_chain(&error)))?;
    Ok(Exporter {
        inner: exporter,
        url: without_secrets(url),
        port: url.port_or_known_default(),
        fault,
        losses: Mutex::default(),
    })
}

/// Milliseconds, as the OTLP exporter reads them.
fn timeout() -> Duration {
    let names = [
        "OTEL_EXPORTER_OTLP_TRACES_TIMEOUT",
        "OTEL_EXPORTER_OTLP_TIMEOUT",
    ];
    let given = names
        .iter()
        .find_map(|name| std::env::var(name).ok()?.parse().ok());
    given.map_or(TIMEOUT, Duration::from_millis)
}

/// An exporter that logs its failures rarely.
#[derive(Debug)]
pub(super) struct Exporter {
    inner: OtlpExporter,
    /// Without secrets.
    url: String,
    port: Option<u16>,
    fault: LastFault,
    losses: Mutex<Losses>,
}

/// Spans that were not sent.
#[derive(Debug, Default)]
struct Losses {
    /// Since the last warning.
    spans: usize,
    warned: Option<Instant>,
}

impl SpanExporter for Exporter {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let spans = batch.len();
        let outcome = self.inner.export(batch).await;
        if let Err(error) = &outcome {
            self.lose(spans, &error.to_string());
        }
        outcome
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.inner.shutdown_with_timeout(timeout)
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.inner.set_resource(resource);
    }
}

impl Exporter {
    /// Counts spans that were not sent, and warns of them unless it did so shortly before.
    fn lose(&self, spans: usize, error: &str) {
        let mut losses = self.losses.lock().unwrap_or_else(PoisonError::into_inner);
        losses.spans += spans;
        if losses.warned.is_some_and(|at| at.elapsed() < WARN_EVERY) {
            return;
        }
        let fault = self.fault.lock().unwrap_or_else(PoisonError::into_inner);
        let fault = fault.as_deref().unwrap_or(error);
        let hint = match self.port {
            Some(4317) => {
                "; port 4317 is usually that of OTLP/gRPC, and kiln sends OTLP/HTTP, usually to 4318"
            }
            _ => "",
        };
        tracing::warn!(
            spans = losses.spans,
            "traces cannot be sent to {}: {fault}{hint}. Requests are not affected; further failures \
             are counted, and logged again after {} minutes",
            self.url,
            WARN_EVERY.as_secs() / 60
        );
        *losses = Losses {
            spans: 0,
            warned: Some(Instant::now()),
        };
    }
}

type LastFault = Arc<Mutex<Option<String>>>;

/// The program's HTTP client. It keeps the text of its last error, which the exporter does not report.
#[derive(Debug)]
struct CollectorClient {
    client: Client,
    fault: LastFault,
}

#[async_trait::async_trait]
impl HttpClient for CollectorClient {
    async fn send_bytes(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let outcome = self.client.send_bytes(request).await;
        let fault = match &outcome {
            Ok(response) if response.status().is_success() => None,
            Ok(response) => Some(format!("it answers with status {}", response.status())),
            Err(error) => Some(describe(error.as_ref())),
        };
        *self.fault.lock().unwrap_or_else(PoisonError::into_inner) = fault;
        outcome
    }
}

/// The last cause of an error; the others name the URL, which may contain secrets.
fn describe(error: &(dyn std::error::Error + 'static)) -> String {
    if let Some(error) = error
        .downcast_ref::<reqwest::Error>()
        .filter(|error| error.is_timeout())
    {
        let what = if error.is_connect() {
            "connection"
        } else {
            "answer"
        };
        return format!("no {what} within the time limit");
    }
    let mut cause = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}
