//! The numbers of adapters.

use std::collections::BTreeSet;

use super::page::{Kind, Page};
use crate::adapters::CacheUse;
use crate::engine::{AdapterStats, Outcomes};

/// Adds the numbers of adapters. `now` is the Unix time in seconds.
pub(super) fn add(page: &mut Page, stats: &AdapterStats, host: CacheUse, now: f64) {
    let ended = stats.outcomes.iter().flat_map(|(adapter, outcomes)| {
        let numbers = numbers(outcomes).into_iter().filter(|it| it.1 > 0.0);
        numbers.map(|(outcome, number)| {
            (
                [("adapter", adapter.as_str()), ("outcome", outcome)],
                number,
            )
        })
    });
    let ended: Vec<_> = ended.collect();
    page.family(
        Kind::Counter,
        "kiln_lora_requests_total",
        "Ended requests by adapter and outcome; a request with several adapters counts for each.",
        ended.iter().map(|(labels, number)| (&labels[..], *number)),
    );
    let device = stats.cache;
    for (name, help, [host, device]) in [
        (
            "kiln_lora_loads_total",
            "Adapters that were read into host memory, and uploaded to the device.",
            [host.loads, device.misses],
        ),
        (
            "kiln_lora_evictions_total",
            "Adapters that were dropped to make room for others.",
            [host.evictions, device.evictions],
        ),
    ] {
        let values = [("host", host as f64), ("device", device as f64)];
        page.labelled((Kind::Counter, name, help), "cache", values);
    }
    for (name, help, bytes) in [
        (
            "kiln_lora_host_cache_bytes",
            "Size of the adapters in host memory.",
            host.bytes,
        ),
        (
            "kiln_lora_host_cache_max_bytes",
            "Limit of the size of the adapters in host memory.",
            host.max_bytes,
        ),
        (
            "kiln_lora_device_cache_bytes",
            "Size of the adapters on the device.",
            device.bytes as u64,
        ),
        (
            "kiln_lora_device_cache_max_bytes",
            "Limit of the size of the adapters on the device.",
            device.max_bytes as u64,
        ),
    ] {
        page.gauge(name, help, bytes as f64);
    }
    // vLLM's form, which routers read to send requests to where their adapter is: the value is the
    // time, the labels are in the order of the alphabet.
    let [max, running, waiting] = [
        stats.max_running.to_string(),
        joined(&stats.running),
        joined(&stats.waiting),
    ];
    let labels: &[(&str, &str)] = &[
        ("max_lora", &max),
        ("running_lora_adapters", &running),
        ("waiting_lora_adapters", &waiting),
    ];
    page.family(
        Kind::Gauge,
        "vllm:lora_requests_info",
        "Adapters of the requests in progress and in the queue.",
        [(labels, now)],
    );
}

/// The numbers of all ways in which requests end.
pub(super) fn numbers(outcomes: &Outcomes) -> [(&'static str, f64); 7] {
    [
        ("finished", outcomes.finished),
        ("cancelled", outcomes.cancelled),
        ("deadline_passed", outcomes.deadline_passed),
        ("too_late", outcomes.too_late),
        ("failed", outcomes.failed),
        ("stopped", outcomes.stopped),
        ("rejected", outcomes.rejected),
    ]
    .map(|(outcome, number)| (outcome, number as f64))
}

fn joined(names: &BTreeSet<String>) -> String {
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    names.join(",")
}
