//! `GET /metrics`: counters of the engine, and times of the start, in Prometheus' text format.

mod adapters;

use std::collections::BTreeMap;
use std::fmt::{Display, Write};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use kiln_models::pipeline::{CacheUse, DeviceUse};

use crate::engine::{BUCKET_BOUNDS, Engine, EngineStats, Histogram, State as EngineState};

use super::App;
use super::connections::{Closed, Connections};

/// Returns counters and timings in Prometheus' text format.
#[utoipa::path(
    get,
    path = "/metrics",
    tag = "metrics",
    responses((status = 200, body = String, content_type = "text/plain")),
)]
pub(super) async fn metrics(State(app): State<Arc<App>>) -> Response {
    let loaded = app.loaded();
    let engine = loaded.and_then(|app| app.engine.as_ref());
    let stats = engine.map(Engine::stats).unwrap_or_default();
    let is_ready = matches!(app.state(), Some(EngineState::Ready));
    let mut page = Page::default();
    page.start(&app, is_ready);
    page.engine(&stats);
    let store = loaded.map(|app| &app.adapters);
    if let Some(store) = store.filter(|store| store.may_have_any()) {
        page.adapters(&stats.adapters, store.cache_use(), unix_time());
    }
    page.connections(&app.connections);
    let text = page.text;
    ([(CONTENT_TYPE, "text/plain; version=0.0.4")], text).into_response()
}

/// Seconds since 1970.
fn unix_time() -> f64 {
    let time = SystemTime::now().duration_since(UNIX_EPOCH);
    time.unwrap_or_default().as_secs_f64()
}

/// The text that is being written.
#[derive(Default)]
struct Page {
    text: String,
}

impl Page {
    /// Writes when the process began, how long its start took, and whether it is over.
    fn start(&mut self, app: &App, is_ready: bool) {
        self.gauge(
            "process_start_time_seconds",
            "Unix time at which the server started.",
            app.started,
        );
        self.gauge(
            "kiln_ready",
            "Whether requests are accepted: 1 or 0.",
            u8::from(is_ready),
        );
        let name = "kiln_start_seconds";
        let help = "Time that each stage of the start has taken so far.";
        self.head(name, "gauge", help);
        for (stage, time) in app.start.times() {
            let (stage, seconds) = (stage.name(), time.as_secs_f64());
            self.line(format_args!("{name}{{stage=\"{stage}\"}} {seconds}"));
        }
    }

    /// Writes the numbers of connections.
    fn connections(&mut self, connections: &Connections) {
        self.gauge("kiln_connections", "Open connections.", connections.count());
        self.labelled(
            (
                "kiln_connections_closed_total",
                "counter",
                "Connections that the server closed, by reason.",
            ),
            "reason",
            &Closed::ALL.map(|reason| (reason.name(), connections.closed(reason))),
        );
    }

    /// Writes a snapshot of the engine's numbers.
    fn engine(&mut self, stats: &EngineStats) {
        // The second name is vLLM's, which routers read.
        for name in ["kiln_requests_waiting", "vllm:num_requests_waiting"] {
            self.gauge(name, "Requests in the queue.", stats.waiting);
        }
        for name in ["kiln_requests_running", "vllm:num_requests_running"] {
            self.gauge(
                name,
                "Requests whose images are being generated.",
                stats.running,
            );
        }
        self.labelled(
            (
                "kiln_requests_total",
                "counter",
                "Ended requests by outcome.",
            ),
            "outcome",
            &adapters::numbers(&stats.outcomes),
        );
        self.counter(
            "kiln_requests_made_cheaper_total",
            "Requests whose images were made with a step cache or a guidance gate because of the load.",
            stats.made_cheaper,
        );
        self.steps(stats);
        self.counter(
            "kiln_shared_steps_total",
            "Denoising steps that a request shared with others, part of kiln_steps_total.",
            stats.shared_steps,
        );
        self.gauge(
            "kiln_max_step_tokens",
            "Image tokens up to which several requests share a denoising step; 0 if they never do.",
            stats.max_step_tokens,
        );
        self.counter("kiln_images_total", "Generated images.", stats.images);
        self.counter(
            "kiln_pixels_total",
            "Pixels of the generated images.",
            stats.pixels,
        );
        for (name, help, histogram) in [
            (
                "kiln_queue_seconds",
                "Time of a request in the queue.",
                &stats.waiting_time,
            ),
            (
                "kiln_encode_seconds",
                "Time to encode the prompts of a request and to make its noise and schedule.",
                &stats.encode_time,
            ),
            (
                "kiln_step_seconds",
                "Time of one denoising step of one request.",
                &stats.step_time,
            ),
            (
                "kiln_denoise_seconds",
                "Time of all denoising steps of a request.",
                &stats.denoise_time,
            ),
            (
                "kiln_decode_seconds",
                "Time to decode all images of a request.",
                &stats.decode_time,
            ),
            (
                "kiln_preview_seconds",
                "Time to make one preview.",
                &stats.preview_time,
            ),
            (
                "kiln_request_seconds",
                "Time from the arrival of a request in the queue to its last image.",
                &stats.total_time,
            ),
        ] {
            self.histogram(name, help, histogram);
        }
        self.caches(&[
            ("embeddings", stats.embedding_cache),
            ("modulation", stats.modulation_cache),
        ]);
        self.memory(stats);
        self.devices(&stats.devices);
    }

    fn steps(&mut self, stats: &EngineStats) {
        self.counter(
            "kiln_steps_total",
            "Denoising steps, including those of unfinished requests.",
            stats.steps,
        );
        for (name, help, steps) in [
            (
                "kiln_steps_computed_total",
                "Denoising steps that ran the whole transformer.",
                stats.computed_steps,
            ),
            (
                "kiln_steps_skipped_total",
                "Denoising steps that reused an earlier one, because of a step cache.",
                stats.skipped_steps,
            ),
            (
                "kiln_steps_gated_total",
                "Denoising steps that left the half of the negative prompt out, because of \
                 cfg_gate_step.",
                stats.gated_steps,
            ),
        ] {
            self.counter(name, help, steps);
        }
    }

    fn line(&mut self, line: impl Display) {
        // Writing to a string cannot fail.
        let _ = writeln!(self.text, "{line}");
    }

    fn head(&mut self, name: &str, kind: &str, help: &str) {
        self.line(format_args!("# HELP {name} {help}"));
        self.line(format_args!("# TYPE {name} {kind}"));
    }

    fn memory(&mut self, stats: &EngineStats) {
        let memory = [
            (
                "kiln_memory_in_use_bytes",
                "Memory in use on the device.",
                stats.memory.in_use,
            ),
            (
                "kiln_memory_reserved_bytes",
                "Memory reserved on the device.",
                stats.memory.reserved,
            ),
            (
                "kiln_memory_planned_bytes",
                "Memory that the requests in progress take at most, by plan.",
                Some(stats.planned_memory),
            ),
            (
                "kiln_memory_free_bytes",
                "Memory that could still be allocated when a request last needed it.",
                stats.free_memory,
            ),
        ];
        for (name, help, bytes) in memory {
            // Not every device reports its memory.
            if let Some(bytes) = bytes {
                self.gauge(name, help, bytes);
            }
        }
    }

    /// Writes the use of each device. The work of a device that is used twice is added up; its memory
    /// is the larger number, as both numbers may be those of the process.
    fn devices(&mut self, uses: &[DeviceUse]) {
        type Field = fn(&DeviceUse) -> Option<f64>;

        let mut devices: BTreeMap<&str, DeviceUse> = BTreeMap::new();
        for DeviceUse {
            device,
            memory,
            busy_seconds,
            forwards,
        } in uses
        {
            let sum = devices.entry(device).or_default();
            sum.memory.in_use = sum.memory.in_use.max(memory.in_use);
            sum.memory.reserved = sum.memory.reserved.max(memory.reserved);
            sum.busy_seconds += busy_seconds;
            sum.forwards += forwards;
        }
        let families: [(&str, &str, &str, Field); 4] = [
            (
                "kiln_device_busy_seconds_total",
                "counter",
                "Time in which the device computed steps.",
                |device| Some(device.busy_seconds),
            ),
            (
                "kiln_device_forwards_total",
                "counter",
                "Forward passes of the transformer on the device.",
                |device| Some(device.forwards as f64),
            ),
            (
                "kiln_device_memory_in_use_bytes",
                "gauge",
                "Memory in use on the device.",
                |device| device.memory.in_use.map(|bytes| bytes as f64),
            ),
            (
                "kiln_device_memory_reserved_bytes",
                "gauge",
                "Memory reserved on the device.",
                |device| device.memory.reserved.map(|bytes| bytes as f64),
            ),
        ];
        for (name, kind, help, field) in families {
            let values = devices
                .iter()
                .filter_map(|(device, it)| Some((device, field(it)?)));
            let values: Vec<_> = values.collect();
            if values.is_empty() {
                // Not every device reports its memory.
                continue;
            }
            self.head(name, kind, help);
            for (device, value) in values {
                self.line(format_args!("{name}{{device=\"{device}\"}} {value}"));
            }
        }
    }

    fn gauge(&mut self, name: &str, help: &str, value: impl Display) {
        self.head(name, "gauge", help);
        self.line(format_args!("{name} {value}"));
    }

    fn counter(&mut self, name: &str, help: &str, value: u64) {
        self.head(name, "counter", help);
        self.line(format_args!("{name} {value}"));
    }

    fn labelled(
        &mut self,
        (name, kind, help): (&str, &str, &str),
        label: &str,
        values: &[(&str, u64)],
    ) {
        self.head(name, kind, help);
        for (value, number) in values {
            self.line(format_args!("{name}{{{label}=\"{value}\"}} {number}"));
        }
    }

    fn histogram(&mut self, name: &str, help: &str, histogram: &Histogram) {
        self.head(name, "histogram", help);
        let mut below = 0;
        for (bound, count) in BUCKET_BOUNDS.iter().zip(histogram.counts) {
            below += count;
            self.line(format_args!("{name}_bucket{{le=\"{bound}\"}} {below}"));
        }
        let all = histogram.count();
        self.line(format_args!("{name}_bucket{{le=\"+Inf\"}} {all}"));
        self.line(format_args!("{name}_sum {}", histogram.sum));
        self.line(format_args!("{name}_count {all}"));
    }

    fn caches(&mut self, caches: &[(&str, CacheUse)]) {
        type Field = fn(&CacheUse) -> u64;
        let families: [(&str, &str, &str, Field); 5] = [
            (
                "kiln_cache_entries",
                "gauge",
                "Entries of the cache.",
                |cache| cache.entries as u64,
            ),
            (
                "kiln_cache_bytes",
                "gauge",
                "Size of the entries of the cache.",
                |cache| cache.bytes as u64,
            ),
            (
                "kiln_cache_max_bytes",
                "gauge",
                "Limit of the size of the cache.",
                |cache| cache.max_bytes as u64,
            ),
            (
                "kiln_cache_hits_total",
                "counter",
                "Lookups that found an entry.",
                |cache| cache.hits,
            ),
            (
                "kiln_cache_misses_total",
                "counter",
                "Lookups that found no entry.",
                |cache| cache.misses,
            ),
        ];
        for (name, kind, help, field) in families {
            let values: Vec<_> = caches
                .iter()
                .map(|(cache, used)| (*cache, field(used)))
                .collect();
            self.labelled((name, kind, help), "cache", &values);
        }
    }
}

#[cfg(test)]
mod tests;
