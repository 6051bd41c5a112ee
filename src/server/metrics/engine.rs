//! The numbers of the engine.

use std::collections::BTreeMap;

use kiln_models::pipeline::{CacheUse, DeviceUse};

use super::adapters;
use super::page::{Kind, Page};
use crate::engine::EngineStats;

/// Adds a snapshot of the engine's numbers.
pub(super) fn add(page: &mut Page, stats: &EngineStats) {
    // The second name is vLLM's, which routers read.
    for name in ["kiln_requests_waiting", "vllm:num_requests_waiting"] {
        page.gauge(name, "Requests in the queue.", stats.waiting as f64);
    }
    for name in ["kiln_requests_running", "vllm:num_requests_running"] {
        page.gauge(
            name,
            "Requests whose images are being generated.",
            stats.running as f64,
        );
    }
    page.labelled(
        (
            Kind::Counter,
            "kiln_requests_total",
            "Ended requests by outcome.",
        ),
        "outcome",
        adapters::numbers(&stats.outcomes),
    );
    page.counter(
        "kiln_requests_made_cheaper_total",
        "Requests whose images were made with a step cache or a guidance gate because of the load.",
        stats.made_cheaper,
    );
    add_steps(page, stats);
    page.counter(
        "kiln_shared_steps_total",
        "Denoising steps that a request shared with others, part of kiln_steps_total.",
        stats.shared_steps,
    );
    page.gauge(
        "kiln_max_step_tokens",
        "Image tokens up to which several requests share a denoising step; 0 if they never do.",
        stats.max_step_tokens as f64,
    );
    page.counter("kiln_images_total", "Generated images.", stats.images);
    page.counter(
        "kiln_pixels_total",
        "Pixels of the generated images.",
        stats.pixels,
    );
    page.counter(
        "kiln_pixel_steps_total",
        "Pixels of the generated images times their denoising steps.",
        stats.pixel_steps,
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
        page.histogram(name, help, histogram);
    }
    add_caches(
        page,
        &[
            ("embeddings", stats.embedding_cache),
            ("modulation", stats.modulation_cache),
        ],
    );
    add_memory(page, stats);
    add_devices(page, &stats.devices);
}

fn add_steps(page: &mut Page, stats: &EngineStats) {
    page.counter(
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
        page.counter(name, help, steps);
    }
}

fn add_memory(page: &mut Page, stats: &EngineStats) {
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
            page.gauge(name, help, bytes as f64);
        }
    }
}

/// Writes the use of each device. The work of a device that is used twice is added up; its memory
/// is the larger number, as both numbers may be those of the process.
fn add_devices(page: &mut Page, uses: &[DeviceUse]) {
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
    let families: [(&str, Kind, &str, Field); 4] = [
        (
            "kiln_device_busy_seconds_total",
            Kind::Counter,
            "Time in which the device computed steps.",
            |device| Some(device.busy_seconds),
        ),
        (
            "kiln_device_forwards_total",
            Kind::Counter,
            "Forward passes of the transformer on the device.",
            |device| Some(device.forwards as f64),
        ),
        (
            "kiln_device_memory_in_use_bytes",
            Kind::Gauge,
            "Memory in use on the device.",
            |device| device.memory.in_use.map(|bytes| bytes as f64),
        ),
        (
            "kiln_device_memory_reserved_bytes",
            Kind::Gauge,
            "Memory reserved on the device.",
            |device| device.memory.reserved.map(|bytes| bytes as f64),
        ),
    ];
    for (name, kind, help, field) in families {
        let values = devices
            .iter()
            // Not every device reports its memory.
            .filter_map(|(device, it)| Some((*device, field(it)?)));
        page.labelled((kind, name, help), "device", values);
    }
}

fn add_caches(page: &mut Page, caches: &[(&str, CacheUse)]) {
    type Field = fn(&CacheUse) -> u64;
    let families: [(&str, Kind, &str, Field); 5] = [
        (
            "kiln_cache_entries",
            Kind::Gauge,
            "Entries of the cache.",
            |cache| cache.entries as u64,
        ),
        (
            "kiln_cache_bytes",
            Kind::Gauge,
            "Size of the entries of the cache.",
            |cache| cache.bytes as u64,
        ),
        (
            "kiln_cache_max_bytes",
            Kind::Gauge,
            "Limit of the size of the cache.",
            |cache| cache.max_bytes as u64,
        ),
        (
            "kiln_cache_hits_total",
            Kind::Counter,
            "Lookups that found an entry.",
            |cache| cache.hits,
        ),
        (
            "kiln_cache_misses_total",
            Kind::Counter,
            "Lookups that found no entry.",
            |cache| cache.misses,
        ),
    ];
    for (name, kind, help, field) in families {
        let values = caches.iter();
        let values = values.map(|(cache, used)| (*cache, field(used) as f64));
        page.labelled((kind, name, help), "cache", values);
    }
}
