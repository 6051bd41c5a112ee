//! `GET /metrics`: counters of the engine, and times of the start, in Prometheus' text format.
//!
//! Each part of the server has a module that adds its families to the page.

mod adapters;
mod engine;
mod jobs;
mod page;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};

use kiln_models::pipeline::ModelInfo;

use crate::engine::{Engine, State as EngineState};

use self::page::{Kind, Page};
use super::connections::{Closed, Connections};
use super::error::ApiError;
use super::{App, LoadedApp};

/// Returns counters and timings in Prometheus' text format.
#[utoipa::path(
    get,
    path = "/metrics",
    tag = "metrics",
    responses((status = 200, body = String, content_type = "text/plain")),
)]
pub(super) async fn metrics(State(app): State<Arc<App>>) -> Result<Response, ApiError> {
    let loaded = app.loaded();
    let engine = loaded.and_then(|app| app.engine.as_ref());
    let stats = engine.map(Engine::stats).unwrap_or_default();
    let mut page = Page::default();
    add_start(&mut page, &app);
    if let Some(loaded) = loaded {
        add_info(&mut page, loaded);
    }
    engine::add(&mut page, &stats);
    let store = loaded.map(|app| &app.adapters);
    if let Some(store) = store.filter(|store| store.may_have_any()) {
        adapters::add(&mut page, &stats.adapters, store.cache_use(), unix_time());
    }
    if let Some(store) = &app.jobs {
        jobs::add(&mut page, &store.settings().stats);
    }
    add_connections(&mut page, &app.connections);
    let text = page
        .text()
        .map_err(|error| ApiError::Metrics(error.to_string()))?;
    Ok(([(CONTENT_TYPE, page::CONTENT_TYPE)], text).into_response())
}

/// Seconds since 1970.
fn unix_time() -> f64 {
    let time = SystemTime::now().duration_since(UNIX_EPOCH);
    time.unwrap_or_default().as_secs_f64()
}

/// Adds when the process began, how long its start took, and whether it is over.
fn add_start(page: &mut Page, app: &App) {
    page.gauge(
        "process_start_time_seconds",
        "Unix time at which the server started.",
        app.started as f64,
    );
    let is_ready = matches!(app.state(), Some(EngineState::Ready));
    page.gauge(
        "kiln_ready",
        "Whether requests are accepted: 1 or 0.",
        f64::from(u8::from(is_ready)),
    );
    let times = app.start.times();
    page.labelled(
        (
            Kind::Gauge,
            "kiln_start_seconds",
            "Time that each stage of the start has taken so far.",
        ),
        "stage",
        times
            .into_iter()
            .map(|(stage, time)| (stage.name(), time.as_secs_f64())),
    );
}

/// Adds what the server is, and how long a request would wait.
fn add_info(page: &mut Page, app: &LoadedApp) {
    let info = app.engine.as_ref().map(Engine::info);
    let device = info.map_or_else(|| "none".to_owned(), ModelInfo::device);
    let labels: &[(&str, &str)] = &[
        ("model", app.model_name(None)),
        ("version", crate::version::TAG),
        ("backend", info.map_or("none", |info| info.backend)),
        ("device", &device),
        ("instance", &app.settings.instance),
    ];
    page.family(
        Kind::Gauge,
        "kiln_info",
        "The model, the program, the backend and the devices of this server; the value is 1.",
        [(labels, 1.0)],
    );
    if let Some(wait) = app.expected_wait() {
        page.gauge(
            "kiln_queue_wait_seconds",
            "Time that a request with the default parameters would wait in the queue if it arrived \
             now, by the measured speed.",
            wait.as_secs_f64(),
        );
    }
}

/// Adds the numbers of connections.
fn add_connections(page: &mut Page, connections: &Connections) {
    page.gauge(
        "kiln_connections",
        "Open connections.",
        connections.count() as f64,
    );
    page.labelled(
        (
            Kind::Counter,
            "kiln_connections_closed_total",
            "Connections that the server closed, by reason.",
        ),
        "reason",
        Closed::ALL.map(|reason| (reason.name(), connections.closed(reason) as f64)),
    );
}
