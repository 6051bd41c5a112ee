//! The format of the page.

use std::collections::BTreeMap;
use std::io::Write;
use std::process::{Command, Stdio};

use kiln_models::pipeline::{CacheUse, DeviceUse, MemoryUse};

use super::super::Settings;
use super::*;
use crate::adapters::CacheUse as HostUse;
use crate::engine::{AdapterStats, BUCKET_BOUNDS, EngineStats, Outcomes};

fn text(stats: &EngineStats) -> String {
    let mut page = Page::default();
    add_start(&mut page, &App::new(Settings::new("m")));
    engine::add(&mut page, stats);
    page.text().unwrap()
}

/// Every sample by its name and labels.
fn samples(text: &str) -> BTreeMap<&str, f64> {
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    lines
        .map(|line| {
            let (name, value) = line.rsplit_once(' ').unwrap();
            (name, value.parse().unwrap())
        })
        .collect()
}

#[test]
fn buckets_are_cumulative() {
    let mut stats = EngineStats::default();
    stats.step_time.counts[0] = 2;
    stats.step_time.counts[1] = 3;
    stats.step_time.counts[BUCKET_BOUNDS.len()] = 1;
    stats.step_time.sum = 2000.5;
    let text = text(&stats);
    let samples = samples(&text);
    for (name, value) in [
        ("kiln_step_seconds_bucket{le=\"0.001\"}", 2.0),
        ("kiln_step_seconds_bucket{le=\"0.0025\"}", 5.0),
        ("kiln_step_seconds_bucket{le=\"1000\"}", 5.0),
        ("kiln_step_seconds_bucket{le=\"+Inf\"}", 6.0),
        ("kiln_step_seconds_count", 6.0),
        ("kiln_step_seconds_sum", 2000.5),
    ] {
        assert_eq!(samples.get(name), Some(&value), "{name}");
    }
}

fn device(device: &str, in_use: Option<u64>, busy_seconds: f64, forwards: u64) -> DeviceUse {
    DeviceUse {
        device: device.to_owned(),
        memory: MemoryUse {
            in_use,
            ..MemoryUse::default()
        },
        busy_seconds,
        forwards,
    }
}

#[test]
fn devices_are_told_apart_by_a_label() {
    let stats = EngineStats {
        memory: MemoryUse {
            in_use: Some(5),
            ..MemoryUse::default()
        },
        devices: vec![
            device("cuda:0", Some(5), 1.5, 3),
            device("cuda:1", Some(7), 0.5, 2),
            device("cuda:0", Some(6), 2.0, 4),
        ],
        ..EngineStats::default()
    };
    let text = text(&stats);
    let samples = samples(&text);
    for (name, value) in [
        ("kiln_memory_in_use_bytes", 5.0),
        ("kiln_device_memory_in_use_bytes{device=\"cuda:0\"}", 6.0),
        ("kiln_device_memory_in_use_bytes{device=\"cuda:1\"}", 7.0),
        ("kiln_device_busy_seconds_total{device=\"cuda:0\"}", 3.5),
        ("kiln_device_busy_seconds_total{device=\"cuda:1\"}", 0.5),
        ("kiln_device_forwards_total{device=\"cuda:0\"}", 7.0),
        ("kiln_device_forwards_total{device=\"cuda:1\"}", 2.0),
    ] {
        assert_eq!(samples.get(name), Some(&value), "{name}");
    }
    assert!(
        !text.contains("kiln_device_memory_reserved_bytes"),
        "{text}"
    );
}

#[test]
fn every_family_is_typed_once() {
    let text = text(&EngineStats {
        devices: vec![device("a", Some(1), 1.0, 1), device("b", None, 1.0, 1)],
        ..EngineStats::default()
    });
    let types: Vec<&str> = text
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE "))
        .filter_map(|line| line.split(' ').next())
        .collect();
    let mut unique = types.clone();
    unique.sort_unstable();
    unique.dedup();
    assert_eq!(types.len(), unique.len());
    for name in samples(&text).keys() {
        let family = name.split('{').next().unwrap();
        let family = ["_bucket", "_sum", "_count"]
            .iter()
            .find_map(|suffix| family.strip_suffix(suffix))
            .unwrap_or(family);
        assert!(types.contains(&family), "{name}");
    }
}

/// The form that vLLM has, which routers parse.
#[test]
fn adapters_are_counted_and_routers_see_which_are_in_use() {
    let names = |names: &[&str]| names.iter().map(|&it| it.to_owned()).collect();
    let finished = Outcomes {
        finished: 3,
        failed: 1,
        ..Outcomes::default()
    };
    let stats = AdapterStats {
        waiting: names(&["b"]),
        running: names(&["style/c", "a\"\\"]),
        max_running: 2,
        outcomes: BTreeMap::from([("style/c".to_owned(), finished)]),
        cache: CacheUse {
            entries: 2,
            bytes: 70,
            max_bytes: 100,
            hits: 9,
            misses: 5,
            evictions: 3,
        },
    };
    let mut page = Page::default();
    let host = HostUse {
        bytes: 300,
        max_bytes: 400,
        loads: 8,
        evictions: 6,
        ..HostUse::default()
    };
    adapters::add(&mut page, &stats, host, 1_764_000_000.25);
    let text = page.text().unwrap();
    let samples = samples(&text);
    let expected = [
        (
            "kiln_lora_requests_total{adapter=\"style/c\",outcome=\"finished\"}",
            3.0,
        ),
        (
            "kiln_lora_requests_total{adapter=\"style/c\",outcome=\"failed\"}",
            1.0,
        ),
        ("kiln_lora_loads_total{cache=\"host\"}", 8.0),
        ("kiln_lora_loads_total{cache=\"device\"}", 5.0),
        ("kiln_lora_evictions_total{cache=\"host\"}", 6.0),
        ("kiln_lora_evictions_total{cache=\"device\"}", 3.0),
        ("kiln_lora_host_cache_bytes", 300.0),
        ("kiln_lora_host_cache_max_bytes", 400.0),
        ("kiln_lora_device_cache_bytes", 70.0),
        ("kiln_lora_device_cache_max_bytes", 100.0),
        (
            "vllm:lora_requests_info{max_lora=\"2\",running_lora_adapters=\"a\\\"\\\\,style/c\",\
             waiting_lora_adapters=\"b\"}",
            1_764_000_000.25,
        ),
    ];
    assert_eq!(samples, BTreeMap::from(expected));
}

/// Names of adapters are paths below a folder, so they may contain anything.
#[test]
fn labels_are_escaped() {
    let names = [
        "quote\"",
        "back\\slash",
        "new\nline",
        "\\n\"}",
        "é 雪, a=\"b\"",
    ];
    let one = Outcomes {
        finished: 1,
        ..Outcomes::default()
    };
    let stats = AdapterStats {
        running: names.iter().map(|&name| name.to_owned()).collect(),
        outcomes: names.iter().map(|&name| (name.to_owned(), one)).collect(),
        ..AdapterStats::default()
    };
    let mut page = Page::default();
    adapters::add(&mut page, &stats, HostUse::default(), 1.0);
    let text = page.text().unwrap();
    let samples = samples(&text);
    for escaped in [
        r#"quote\""#,
        r"back\\slash",
        r"new\nline",
        r#"\\n\"}"#,
        r#"é 雪, a=\"b\""#,
    ] {
        let sample =
            format!("kiln_lora_requests_total{{adapter=\"{escaped}\",outcome=\"finished\"}}");
        assert_eq!(
            samples.get(sample.as_str()),
            Some(&1.0),
            "{sample} in {text}"
        );
    }
    if let Some(lint) = lint(&text) {
        assert_eq!(
            lint,
            ["vllm:lora_requests_info metric names should not contain ':'"]
        );
    }
}

#[test]
fn help_texts_are_escaped_and_families_without_samples_are_left_out() {
    let mut page = Page::default();
    page.gauge("a", "one\ntwo \\ \"three\"", 1.5);
    page.family(Kind::Gauge, "b", "no samples", []);
    let expected = "# HELP a one\\ntwo \\\\ \"three\"\n# TYPE a gauge\na 1.5\n";
    assert_eq!(page.text().unwrap(), expected);
}

/// What `promtool check metrics` says about a page that it can read, sorted; `None` where it is not
/// installed.
fn lint(text: &str) -> Option<Vec<String>> {
    let promtool = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let mut promtool = promtool.ok()?;
    let mut input = promtool.stdin.take().unwrap();
    input.write_all(text.as_bytes()).unwrap();
    drop(input);
    let output = promtool.wait_with_output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    // 3 is for names that it would have otherwise, 1 for a page that it cannot read.
    assert!(matches!(output.status.code(), Some(0 | 3)), "{said}");
    let mut lines: Vec<String> = said.lines().map(str::to_owned).collect();
    lines.sort_unstable();
    Some(lines)
}

/// The names of vLLM, which routers read, are the only ones that promtool would have otherwise.
#[test]
fn promtool_reads_the_page() {
    let text = text(&EngineStats {
        devices: vec![device("a", Some(1), 1.0, 1)],
        ..EngineStats::default()
    });
    if let Some(lint) = lint(&text) {
        let expected = ["running", "waiting"]
            .map(|state| format!("vllm:num_requests_{state} metric names should not contain ':'"));
        assert_eq!(lint, expected);
    }
}
