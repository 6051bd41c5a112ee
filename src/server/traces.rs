//! The spans of a request, by the semantic conventions of OpenTelemetry for HTTP: one for the request,
//! and below it one for each stage of its images.

use std::time::{Duration, SystemTime};

use axum::extract::{MatchedPath, Request};
use axum::http::header::{HOST, USER_AGENT};
use axum::http::uri::Authority;
use axum::http::{HeaderMap, HeaderName, Method, StatusCode};
use kiln_models::step_cache::StepCounts;
use tracing::Span;

use crate::engine::Timings;
use crate::jobs::TraceContext;
use crate::telemetry::{self, Attribute, Kind, Parent, Stage};

use super::error::ApiError;
use super::jobs::trace_context;

/// The trace that the worker of a job continues: that of `span` if tracing is on, else the client's.
pub(super) fn stored_trace(span: &Span, headers: &HeaderMap) -> Option<TraceContext> {
    match telemetry::trace_of(span) {
        Some((traceparent, tracestate)) => Some(TraceContext {
            traceparent,
            tracestate,
        }),
        None => trace_context(headers),
    }
}

/// Begins the span of a request. It ends with `span`, the span of the request's log lines.
pub(super) fn begin(request: &Request, span: &Span) {
    let route = request.extensions().get::<MatchedPath>();
    let route = route.map(MatchedPath::as_str);
    let (method, other_method) = known_method(request.method());
    let name_method = other_method.map_or(method, |_| "HTTP");
    let name = route.map_or_else(
        || name_method.to_owned(),
        |route| format!("{name_method} {route}"),
    );
    let trace = trace_context(request.headers());
    let trace = trace.as_ref().map(TraceContext::headers);
    if !telemetry::attach(span, trace, Kind::Server, &name, &[]) {
        return;
    }
    let header = |name: HeaderName| request.headers().get(name)?.to_str().ok();
    let host: Option<Authority> = header(HOST).and_then(|host| host.parse().ok());
    let mut attributes: Vec<Attribute<'_>> = vec![
        ("http.request.method", method.into()),
        ("url.path", request.uri().path().into()),
        ("url.scheme", "http".into()),
    ];
    let address = host.as_ref().map(Authority::host);
    let texts = [
        ("http.request.method_original", other_method),
        ("http.route", route),
        (
            "server.address",
            address.map(|host| host.trim_matches(['[', ']'])),
        ),
        ("user_agent.original", header(USER_AGENT)),
    ];
    for (name, text) in texts {
        attributes.extend(text.map(|text| (name, text.into())));
    }
    if let Some(port) = host.as_ref().and_then(Authority::port_u16) {
        attributes.push(("server.port", port.into()));
    }
    telemetry::set(span, &attributes);
}

/// The method as an attribute, and the original if it is not one of those that are named.
fn known_method(method: &Method) -> (&'static str, Option<&str>) {
    const KNOWN: [&str; 9] = [
        "GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH", "CONNECT", "TRACE",
    ];
    let known = KNOWN.into_iter().find(|known| *known == method.as_str());
    known.map_or(("_OTHER", Some(method.as_str())), |known| (known, None))
}

/// Adds the status of the response to the span of a request.
pub(super) fn responded(span: &Span, status: StatusCode) {
    telemetry::set(
        span,
        &[("http.response.status_code", status.as_u16().into())],
    );
    if status.is_server_error() {
        telemetry::fail(span, status.as_str(), "");
    }
}

/// What the spans of the stages say about the images.
#[derive(Debug, Clone)]
pub(super) struct Images {
    /// `WIDTHxHEIGHT` in pixels.
    pub(super) size: String,
    pub(super) count: usize,
    pub(super) steps: usize,
}

/// Records a span for each stage of a job of the engine, below the span that is entered when this is
/// made. A job that does not finish has spans up to its last stage.
#[derive(Debug)]
pub(super) struct StageSpans {
    parent: Parent,
    /// The span that is entered when this is made.
    span: Span,
    images: Images,
    submitted: SystemTime,
    started: Option<SystemTime>,
    steps_done: usize,
    counts: StepCounts,
    is_over: bool,
}

impl StageSpans {
    /// For a job that is submitted now.
    pub(super) fn new(images: Images) -> Self {
        Self {
            parent: Parent::current(),
            span: Span::current(),
            images,
            submitted: SystemTime::now(),
            started: None,
            steps_done: 0,
            counts: StepCounts::default(),
            is_over: false,
        }
    }

    /// The engine starts the job.
    pub(super) fn started(&mut self) {
        self.started = Some(SystemTime::now());
    }

    /// The job has made this many steps.
    pub(super) fn stepped(&mut self, done: usize, counts: StepCounts) {
        self.steps_done = done;
        self.counts = counts;
    }

    /// The engine has finished the job.
    pub(super) fn finished(&mut self, timings: Timings, counts: StepCounts) {
        self.is_over = true;
        self.steps_done = self.images.steps;
        self.counts = counts;
        let started = self.submitted + timings.queue;
        let encoded = started + timings.encode;
        // With previews, and the time of other jobs.
        let denoised = encoded + timings.denoise + timings.previews + timings.paused;
        self.record("queue", self.submitted, started, None);
        self.record("encode", started, encoded, None);
        self.denoise(encoded, denoised, Some(timings.paused), None);
        self.record("decode", denoised, denoised + timings.decode, None);
    }

    /// The job, or what follows it, has failed.
    pub(super) fn failed(&mut self, error: &ApiError) {
        let status = error.status();
        let message = crate::error_chain(error);
        self.end(Some(&message));
        if status.is_server_error() {
            telemetry::fail(&self.span, status.as_str(), &message);
        }
    }

    /// Records that the images' files were made from `start` until now. Called on any thread.
    pub(super) fn written(parent: &Parent, start: SystemTime, format: &str, files: &[Vec<u8>]) {
        let bytes: usize = files.iter().map(Vec::len).sum();
        parent.record(&Stage {
            name: "write",
            start,
            end: SystemTime::now(),
            attributes: &[
                ("kiln.format", format.into()),
                ("kiln.images", files.len().into()),
                ("kiln.bytes", bytes.into()),
            ],
            error: None,
        });
    }

    /// What [`StageSpans::written`] needs.
    pub(super) fn parent(&self) -> Parent {
        self.parent.clone()
    }

    /// The job ends in its current stage.
    fn end(&mut self, error: Option<&str>) {
        if self.is_over {
            return;
        }
        self.is_over = true;
        let now = SystemTime::now();
        let Some(started) = self.started else {
            return self.record("queue", self.submitted, now, error);
        };
        self.record("queue", self.submitted, started, None);
        if self.steps_done == 0 {
            self.record("encode", started, now, error);
        } else {
            self.denoise(started, now, None, error);
        }
    }

    fn record(&self, name: &'static str, start: SystemTime, end: SystemTime, error: Option<&str>) {
        self.parent.record(&Stage {
            name,
            start,
            end,
            attributes: &[],
            error,
        });
    }

    fn denoise(
        &self,
        start: SystemTime,
        end: SystemTime,
        paused: Option<Duration>,
        error: Option<&str>,
    ) {
        let images = &self.images;
        let mut attributes = vec![
            ("kiln.size", (&images.size).into()),
            ("kiln.images", images.count.into()),
            ("kiln.steps", images.steps.into()),
            ("kiln.steps_done", self.steps_done.into()),
            ("kiln.skipped_steps", self.counts.skipped.into()),
            ("kiln.gated_steps", self.counts.gated.into()),
        ];
        attributes
            .extend(paused.map(|paused| ("kiln.paused_seconds", paused.as_secs_f64().into())));
        self.parent.record(&Stage {
            name: "denoise",
            start,
            end,
            attributes: &attributes,
            error,
        });
    }
}

/// Of a job that is cancelled.
impl Drop for StageSpans {
    fn drop(&mut self) {
        if !self.is_over {
            telemetry::set(&self.span, &[("kiln.cancelled", true.into())]);
            self.end(None);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn methods_that_nobody_defined_are_not_part_of_names() {
        assert_eq!(known_method(&Method::POST), ("POST", None));
        let other = Method::from_bytes(b"PAINT").unwrap();
        assert_eq!(known_method(&other), ("_OTHER", Some("PAINT")));
    }
}
