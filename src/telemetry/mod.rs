//! Traces for OpenTelemetry: which spans are recorded, and how they are sent.
//!
//! A span that is sent is attached to a span of the log, and ends with it. Without the feature `otel`,
//! or with tracing off, every function here does nothing.

mod context;
#[cfg(not(feature = "otel"))]
mod off;
#[cfg(feature = "otel")]
mod on;
mod settings;
#[cfg(test)]
mod tests;

#[cfg(not(feature = "otel"))]
use self::off as spans;
#[cfg(feature = "otel")]
use self::on as spans;

use std::time::SystemTime;

use tracing::Span;

pub use self::context::is_trace_parent;
pub use self::spans::{Parent, Tracing};

/// Why traces cannot be sent as the environment asks.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    #[error("{variable} is {value:?}, which is not the URL of a collector: {reason}")]
    Endpoint {
        variable: &'static str,
        value: String,
        reason: String,
    },
    #[error("{variable} is {value:?}, and traces can be sent with gzip or none only")]
    Compression {
        variable: &'static str,
        value: String,
    },
    #[error("the client that sends traces cannot be made: {0}")]
    Client(String),
}

/// The part of a span in the exchange between programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Answers a request.
    Server,
    /// Makes a job that another program or thread runs.
    Producer,
    /// Runs a job.
    Consumer,
    Internal,
}

/// The name and the value of an attribute.
pub type Attribute<'a> = (&'static str, Value<'a>);

/// The value of an attribute.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Value<'a> {
    Text(&'a str),
    Integer(i64),
    Number(f64),
    Flag(bool),
}

impl<'a> From<&'a str> for Value<'a> {
    fn from(text: &'a str) -> Self {
        Self::Text(text)
    }
}

impl<'a> From<&'a String> for Value<'a> {
    fn from(text: &'a String) -> Self {
        Self::Text(text)
    }
}

impl From<u16> for Value<'_> {
    fn from(number: u16) -> Self {
        Self::Integer(number.into())
    }
}

impl From<u32> for Value<'_> {
    fn from(number: u32) -> Self {
        Self::Integer(number.into())
    }
}

impl From<usize> for Value<'_> {
    fn from(number: usize) -> Self {
        Self::Integer(i64::try_from(number).unwrap_or(i64::MAX))
    }
}

impl From<f64> for Value<'_> {
    fn from(number: f64) -> Self {
        Self::Number(number)
    }
}

impl From<bool> for Value<'_> {
    fn from(flag: bool) -> Self {
        Self::Flag(flag)
    }
}

/// A span whose begin and end are known.
#[derive(Debug)]
pub struct Stage<'a> {
    pub name: &'static str,
    pub start: SystemTime,
    pub end: SystemTime,
    pub attributes: &'a [Attribute<'a>],
    /// Why it did not succeed.
    pub error: Option<&'a str>,
}

/// A span of the log that ends when the last clone of it is dropped, with a span attached that is
/// sent: see [`attach`]. Its lines have the field `trace_id`. Disabled if tracing is off.
pub fn span_for(
    trace: Option<(&str, Option<&str>)>,
    kind: Kind,
    name: &str,
    attributes: &[Attribute<'_>],
) -> Span {
    if !spans::is_on() {
        return Span::none();
    }
    let span = tracing::info_span!("trace", trace_id = tracing::field::Empty);
    attach(&span, trace, kind, name, attributes);
    span
}

/// Begins a span that ends with `span`, a span of the log, and records its trace in the field
/// `trace_id` of `span`. It is sent if its trace is sampled. Returns whether tracing is on.
///
/// With `trace`, the values of `traceparent` and `tracestate`, it continues that trace. Without, or
/// if they are not valid, its parent is the span that is attached to a parent of `span`, and without
/// one it begins a trace.
pub fn attach(
    span: &Span,
    trace: Option<(&str, Option<&str>)>,
    kind: Kind,
    name: &str,
    attributes: &[Attribute<'_>],
) -> bool {
    let trace = trace.filter(|(parent, _)| is_trace_parent(parent));
    spans::attach(span, trace, kind, name, attributes)
}

/// Adds attributes to what is attached to a span of the log, or to the nearest parent of it.
pub fn set(span: &Span, attributes: &[Attribute<'_>]) {
    spans::set(span, attributes);
}

/// Marks what is attached as failed. `error_type` is the attribute `error.type`, a word for programs.
pub fn fail(span: &Span, error_type: &str, message: &str) {
    spans::fail(span, error_type, message);
}

/// The values of `traceparent` and `tracestate` with which another program continues the trace.
/// `None` if tracing is off.
pub fn trace_of(span: &Span) -> Option<(String, Option<String>)> {
    spans::trace_of(span)
}
