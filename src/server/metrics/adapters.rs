//! The numbers of adapters.

use std::collections::BTreeSet;

use super::Page;
use crate::adapters::CacheUse;
use crate::engine::{AdapterStats, Outcomes};

impl Page {
    /// Writes the numbers of adapters. `now` is the Unix time in seconds.
    pub(super) fn adapters(&mut self, stats: &AdapterStats, host: CacheUse, now: f64) {
        let name = "kiln_lora_requests_total";
        let help = "Ended requests by adapter and outcome; a request with several adapters counts for \
                    each.";
        self.head(name, "counter", help);
        for (adapter, outcomes) in &stats.outcomes {
            let adapter = escaped(adapter);
            let ended = numbers(outcomes).into_iter().filter(|it| it.1 > 0);
            for (outcome, number) in ended {
                self.line(format_args!(
                    "{name}{{adapter=\"{adapter}\",outcome=\"{outcome}\"}} {number}"
                ));
            }
        }
        let device = stats.cache;
        for (name, help, numbers) in [
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
            let [host, device] = numbers;
            let values = [("host", host), ("device", device)];
            self.labelled((name, "counter", help), "cache", &values);
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
            self.gauge(name, help, bytes);
        }
        // vLLM's form, which routers read to send requests to where their adapter is: the value is the
        // time, the labels are in the order of the alphabet.
        let name = "vllm:lora_requests_info";
        self.head(
            name,
            "gauge",
            "Adapters of the requests in progress and in the queue.",
        );
        self.line(format_args!(
            "{name}{{max_lora=\"{}\",running_lora_adapters=\"{}\",waiting_lora_adapters=\"{}\"}} {now}",
            stats.max_running,
            joined(&stats.running),
            joined(&stats.waiting),
        ));
    }
}

/// The numbers of all ways in which requests end.
pub(super) fn numbers(outcomes: &Outcomes) -> [(&'static str, u64); 7] {
    [
        ("finished", outcomes.finished),
        ("cancelled", outcomes.cancelled),
        ("deadline_passed", outcomes.deadline_passed),
        ("too_late", outcomes.too_late),
        ("failed", outcomes.failed),
        ("stopped", outcomes.stopped),
        ("rejected", outcomes.rejected),
    ]
}

fn joined(names: &BTreeSet<String>) -> String {
    let names: Vec<String> = names.iter().map(|name| escaped(name)).collect();
    names.join(",")
}

/// A label's value in Prometheus' text format.
fn escaped(value: &str) -> String {
    value
        .replace('\\', "\\\\")
        .replace('"', "\\\"")
        .replace('\n', "\\n")
}
