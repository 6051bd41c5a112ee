//! Tracing with OpenTelemetry's libraries.

mod export;

use std::collections::HashMap;
use std::env;
use std::sync::OnceLock;
use std::time::Duration;

use opentelemetry::propagation::TextMapPropagator;
use opentelemetry::trace::{Span as _, SpanKind, Status, TraceContextExt, Tracer, TracerProvider};
use opentelemetry::{Context, KeyValue};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{SdkTracer, SdkTracerProvider};
use tracing::Span;
use tracing_subscriber::Registry;
use tracing_subscriber::registry::LookupSpan;

use super::{Attribute, Kind, Stage, TelemetryError, Value, settings};

/// How long the end of the program waits for the last spans to be sent.
const LAST_SPANS: Duration = Duration::from_secs(3);

/// Makes the spans. It is set when tracing is started.
static TRACER: OnceLock<SdkTracer> = OnceLock::new();

/// Sends traces from its start until it is dropped.
#[derive(Debug)]
pub struct Tracing {
    /// `None` if tracing is off.
    started: Option<Started>,
}

#[derive(Debug)]
struct Started {
    provider: SdkTracerProvider,
    url: String,
    warnings: Vec<String>,
}

impl Tracing {
    /// Reads the environment, and starts a thread that sends spans if it says where to.
    /// `instance` names this server among others.
    ///
    /// # Errors
    ///
    /// If the environment names something that is not a URL.
    pub fn start(instance: &str) -> Result<Self, TelemetryError> {
        let get = |name: &str| env::var(name).ok();
        let Some((variable, value)) = settings::endpoint(get) else {
            return Ok(Self { started: None });
        };
        let url = export::url(variable, &value)?;
        settings::check_compression(get)?;
        let provider = SdkTracerProvider::builder()
            .with_resource(resource(instance))
            .with_batch_exporter(export::exporter(&url)?)
            .build();
        TRACER.get_or_init(|| provider.tracer("kiln"));
        let started = Started {
            provider,
            url: export::without_secrets(&url),
            warnings: settings::warnings(get),
        };
        Ok(Self {
            started: Some(started),
        })
    }

    /// Logs what is sent where, and what is not as the environment says.
    pub fn report(&self) {
        if let Some(started) = &self.started {
            tracing::info!("traces are sent to {}", started.url);
            for warning in &started.warnings {
                tracing::warn!("{warning}");
            }
        }
    }
}

impl Drop for Tracing {
    fn drop(&mut self) {
        if let Some(started) = &self.started {
            let sent = started.provider.shutdown_with_timeout(LAST_SPANS);
            if sent.is_err() {
                tracing::warn!(
                    "the last spans were not sent to {} within {} s",
                    started.url,
                    LAST_SPANS.as_secs()
                );
            }
        }
    }
}

/// What is said of this program with every span. The environment has the last word.
fn resource(instance: &str) -> Resource {
    let own = Resource::builder_empty().with_attributes([
        KeyValue::new("service.version", env!("CARGO_PKG_VERSION")),
        KeyValue::new("service.instance.id", instance.to_owned()),
    ]);
    let given = Resource::builder().build();
    let name = given.get(&"service.name".into());
    let is_unknown = name.is_none_or(|name| name.as_str().starts_with("unknown_service"));
    let attributes = given.iter();
    let attributes = attributes.map(|(key, value)| KeyValue::new(key.clone(), value.clone()));
    let resource = own.with_attributes(attributes);
    if is_unknown {
        resource.with_service_name("kiln").build()
    } else {
        resource.build()
    }
}

/// A span that is sent, in the extensions of a span of the log.
struct Attached(Context);

/// When the span of the log is closed.
impl Drop for Attached {
    fn drop(&mut self) {
        self.0.span().end();
    }
}

/// The parent of recorded stages.
#[derive(Debug, Clone, Default)]
pub struct Parent(Context);

impl Parent {
    /// What is attached to the span of the log that is entered now, or to the nearest parent of it.
    pub fn current() -> Self {
        Self(context_of(&Span::current()).unwrap_or_default())
    }

    /// Sends a span below this one.
    pub fn record(&self, stage: &Stage<'_>) {
        let is_sampled = self.0.span().span_context().is_sampled();
        let Some(tracer) = TRACER.get().filter(|_| is_sampled) else {
            return;
        };
        let builder = tracer
            .span_builder(stage.name)
            .with_kind(SpanKind::Internal)
            .with_start_time(stage.start)
            .with_attributes(stage.attributes.iter().map(key_value));
        let mut span = builder.start_with_context(tracer, &self.0);
        if let Some(error) = stage.error {
            span.set_status(Status::error(error.to_owned()));
        }
        // A clock that is set back must not make a span of negative length.
        span.end_with_timestamp(stage.end.max(stage.start));
    }
}

pub(super) fn is_on() -> bool {
    TRACER.get().is_some()
}

pub(super) fn attach(
    span: &Span,
    trace: Option<(&str, Option<&str>)>,
    kind: Kind,
    name: &str,
    attributes: &[Attribute<'_>],
) -> bool {
    let Some(tracer) = TRACER.get() else {
        return false;
    };
    let parent = match trace {
        Some(trace) => remote(trace),
        None => context_of(span).unwrap_or_default(),
    };
    let builder = tracer
        .span_builder(name.to_owned())
        .with_kind(span_kind(kind))
        .with_attributes(attributes.iter().map(key_value));
    let sent = builder.start_with_context(tracer, &parent);
    span.record("trace_id", sent.span_context().trace_id().to_string());
    let attached = Attached(parent.with_span(sent));
    span.with_subscriber(|(id, subscriber)| {
        let registry = subscriber.downcast_ref::<Registry>()?;
        registry.span(id)?.extensions_mut().replace(attached);
        Some(())
    });
    true
}

/// The context that these headers name.
fn remote((parent, state): (&str, Option<&str>)) -> Context {
    let mut headers = HashMap::from([("traceparent".to_owned(), parent.to_owned())]);
    headers.extend(state.map(|state| ("tracestate".to_owned(), state.to_owned())));
    TraceContextPropagator::new().extract_with_context(&Context::new(), &headers)
}

/// The context of what is attached to a span of the log or to its nearest parent.
fn context_of(span: &Span) -> Option<Context> {
    let found = span.with_subscriber(|(id, subscriber)| {
        let registry = subscriber.downcast_ref::<Registry>()?;
        let mut spans = registry.span(id)?.scope();
        spans.find_map(|span| Some(span.extensions().get::<Attached>()?.0.clone()))
    });
    found.flatten()
}

pub(super) fn set(span: &Span, attributes: &[Attribute<'_>]) {
    if let Some(context) = context_of(span) {
        context
            .span()
            .set_attributes(attributes.iter().map(key_value));
    }
}

pub(super) fn fail(span: &Span, error_type: &str, message: &str) {
    if let Some(context) = context_of(span) {
        let sent = context.span();
        sent.set_attribute(KeyValue::new("error.type", error_type.to_owned()));
        sent.set_status(Status::error(message.to_owned()));
    }
}

pub(super) fn trace_of(span: &Span) -> Option<(String, Option<String>)> {
    let context = context_of(span)?;
    let mut headers = HashMap::new();
    TraceContextPropagator::new().inject_context(&context, &mut headers);
    let state = headers.remove("tracestate");
    let state = state.filter(|state| !state.is_empty());
    Some((headers.remove("traceparent")?, state))
}

const fn span_kind(kind: Kind) -> SpanKind {
    match kind {
        Kind::Server => SpanKind::Server,
        Kind::Producer => SpanKind::Producer,
        Kind::Consumer => SpanKind::Consumer,
        Kind::Internal => SpanKind::Internal,
    }
}

fn key_value((name, value): &Attribute<'_>) -> KeyValue {
    match *value {
        Value::Text(text) => KeyValue::new(*name, text.to_owned()),
        Value::Integer(number) => KeyValue::new(*name, number),
        Value::Number(number) => KeyValue::new(*name, number),
        Value::Flag(flag) => KeyValue::new(*name, flag),
    }
}
