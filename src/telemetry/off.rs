//! Tracing in a program without the feature `otel`: nothing, but a warning if it was asked for.

use tracing::Span;

use super::{Attribute, Kind, Stage, TelemetryError, settings};

/// Sends traces from its start until it is dropped.
#[derive(Debug)]
pub struct Tracing {
    asked_by: Option<&'static str>,
}

impl Tracing {
    /// Reads the environment. `instance` names this server among others.
    pub fn start(_instance: &str) -> Result<Self, TelemetryError> {
        let endpoint = settings::endpoint(|name| std::env::var(name).ok());
        Ok(Self {
            asked_by: endpoint.map(|(variable, _)| variable),
        })
    }

    /// Logs what is sent where, and what is not as the environment says.
    pub fn report(&self) {
        if let Some(variable) = self.asked_by {
            tracing::warn!(
                "{variable} is set, but no traces are sent: this kiln was built without the feature \
                 otel. Build it with --features otel, or unset {variable}"
            );
        }
    }
}

/// The parent of recorded stages.
#[derive(Debug, Clone, Default)]
pub struct Parent;

impl Parent {
    /// What is attached to the span of the log that is entered now, or to the nearest parent of it.
    pub fn current() -> Self {
        Self
    }

    /// Sends a span below this one.
    pub fn record(&self, _stage: &Stage<'_>) {}
}

pub(super) const fn is_on() -> bool {
    false
}

pub(super) fn attach(
    _: &Span,
    _: Option<(&str, Option<&str>)>,
    _: Kind,
    _: &str,
    _: &[Attribute<'_>],
) -> bool {
    false
}

pub(super) fn set(_: &Span, _: &[Attribute<'_>]) {}

pub(super) fn fail(_: &Span, _: &str, _: &str) {}

pub(super) fn trace_of(_: &Span) -> Option<(String, Option<String>)> {
    None
}
