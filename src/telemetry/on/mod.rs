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
use tracing::level_filters::LevelFilter;
use tracing::{Span, Subscriber};
use tracing_opentelemetry::OpenTelemetrySpanExt;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::Layer;
use tracing_subscriber::registry::LookupSpan;

use crate::version;

use super::{Attribute, Kind, Stage, TARGET, TelemetryError, Value, settings};

/// How long the end of the program waits for the last spans to be sent.
const LAST_SPANS: Duration = Duration::from_secs(3);

/// Makes the spans of stages. It is set when tracing is started.
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

    /// What records the spans.
    pub fn layer<S>(&self) -> Option<Box<dyn Layer<S> + Send + Sync>>
    where
        S: Subscriber + for<'a> LookupSpan<'a> + Send + Sync,
    {
        let started = self.started.as_ref()?;
        let layer = tracing_opentelemetry::layer()
            .with_tracer(started.provider.tracer("kiln"))
            .with_location(false)
            .with_threads(false)
            .with_target(false)
            .with_tracked_inactivity(false);
        let filter = Targets::new().with_target(TARGET, LevelFilter::INFO);
        Some(layer.with_filter(filter).boxed())
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
        KeyValue::new("service.version", version::PACKAGE),
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

/// The span that is the parent of recorded stages.
#[derive(Debug, Clone, Default)]
pub struct Parent(Context);

impl Parent {
    /// The span that is entered now.
    pub fn current() -> Self {
        Self(Context::current())
    }

    /// Whether stages below this span are sent.
    pub fn is_recorded(&self) -> bool {
        self.0.span().span_context().is_sampled()
    }

    /// Sends a span below this one.
    pub fn record(&self, stage: &Stage<'_>) {
        let Some(tracer) = TRACER.get().filter(|_| self.is_recorded()) else {
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

pub(super) fn span_for(
    trace: Option<(&str, Option<&str>)>,
    kind: Kind,
    name: &str,
    attributes: &[Attribute<'_>],
) -> Span {
    let kind = kind.name();
    let span = tracing::info_span!(target: TARGET, "span", otel.name = name, otel.kind = kind);
    if span.is_disabled() {
        return span;
    }
    if let Some((parent, state)) = trace {
        let mut headers = HashMap::from([("traceparent".to_owned(), parent.to_owned())]);
        headers.extend(state.map(|state| ("tracestate".to_owned(), state.to_owned())));
        let parent = TraceContextPropagator::new().extract_with_context(&Context::new(), &headers);
        // It fails without the layer, and then there is nothing to continue.
        span.set_parent(parent).ok();
    }
    set(&span, attributes);
    span
}

pub(super) fn set(span: &Span, attributes: &[Attribute<'_>]) {
    for attribute in attributes {
        let KeyValue { key, value, .. } = key_value(attribute);
        span.set_attribute(key, value);
    }
}

pub(super) fn fail(span: &Span, error_type: &str, message: &str) {
    span.set_attribute("error.type", error_type.to_owned());
    span.set_status(Status::error(message.to_owned()));
}

pub(super) fn trace_of(span: &Span) -> Option<(String, Option<String>)> {
    let context = span.context();
    context.span().span_context().is_valid().then(|| {
        let mut headers = HashMap::new();
        TraceContextPropagator::new().inject_context(&context, &mut headers);
        let mut take = |name: &str| headers.remove(name).unwrap_or_default();
        let (parent, state) = (take("traceparent"), take("tracestate"));
        (parent, (!state.is_empty()).then_some(state))
    })
}

pub(super) fn trace_id(span: &Span) -> Option<String> {
    let context = span.context();
    let span = context.span();
    let context = span.span_context();
    context.is_valid().then(|| context.trace_id().to_string())
}

fn key_value((name, value): &Attribute<'_>) -> KeyValue {
    match *value {
        Value::Text(text) => KeyValue::new(*name, text.to_owned()),
        Value::Integer(number) => KeyValue::new(*name, number),
        Value::Number(number) => KeyValue::new(*name, number),
        Value::Flag(flag) => KeyValue::new(*name, flag),
    }
}
