"""Writes the two files that are generated:

- packaging/kubernetes/components/monitoring/prometheusrule.yaml from packaging/prometheus/kiln.rules.yaml;
- packaging/grafana/kiln.json, the dashboard, from the panels below.

    python scripts/deploy/generate.py            # writes them; needs PyYAML
    python scripts/deploy/generate.py --check    # fails if they are not up to date
"""

import json
import sys
from pathlib import Path

import yaml

RULES = Path("packaging/prometheus/kiln.rules.yaml")
PROMETHEUS_RULE = Path("packaging/kubernetes/components/monitoring/prometheusrule.yaml")
DASHBOARD = Path("packaging/grafana/kiln.json")

SERVERS = 'namespace=~"$namespace", job=~"$job", instance=~"$instance"'
STAGES = ["queue", "encode", "step", "denoise", "decode", "request"]
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}


def one(name, labels=""):
    """The samples of the chosen servers."""
    return f"{name}{{{SERVERS}{', ' if labels else ''}{labels}}}"


def total(name, labels="", by=""):
    """Their sum, by some labels."""
    return f"sum by ({by}) ({one(name, labels)})" if by else f"sum({one(name, labels)})"


def rate(name, labels="", by=""):
    """Increase per second of their sum, by some labels."""
    inner = f"rate({one(name, labels)}[$__rate_interval])"
    return f"sum by ({by}) ({inner})" if by else f"sum({inner})"


def quantile(share, stage):
    buckets = rate(f"kiln_{stage}_seconds_bucket", by="le")
    return f"histogram_quantile({share}, {buckets})"


def quantiles(share):
    return [(quantile(share, stage), stage) for stage in STAGES]


def by_instance(name):
    return [(one(name), "{{instance}}")]


FAILED = rate("kiln_requests_total", 'outcome="failed"')
FINISHED_OR_FAILED = rate("kiln_requests_total", 'outcome=~"finished|failed"')

ROWS = [
    ("Now", [
        ("stat", "Servers ready", "short", [(total("kiln_ready"), "")], "Servers that answer requests."),
        ("stat", "Running", "short", [(total("kiln_requests_running"), "")], "Requests whose images are being generated."),
        ("stat", "Waiting", "short", [(total("kiln_requests_waiting"), "")], "Requests in the queues of the servers."),
        ("stat", "Expected wait", "s", [(f"max({one('kiln_queue_wait_seconds')})", "")], "Time that a new default request would wait on the busiest server."),
        ("stat", "Images/s", "short", [(rate("kiln_images_total"), "")], "Generated images."),
        ("stat", "Failed", "percentunit", [(f"{FAILED} / {FINISHED_OR_FAILED}", "")], "Share of the requests that failed."),
        ("stat", "Jobs waiting", "short", [(f"max({one('kiln_jobs_queued')})", "")], "Durable jobs that no worker has taken."),
        ("stat", "Oldest job", "s", [(f"max({one('kiln_jobs_oldest_queued_seconds')})", "")], "Time that the oldest of them has waited."),
    ]),
    ("Requests", [
        ("timeseries", "Queue", "short", by_instance("kiln_requests_waiting"), "Requests that wait, by server."),
        ("timeseries", "Running", "short", by_instance("kiln_requests_running"), "Requests in progress, by server."),
        ("timeseries", "Expected wait", "s", by_instance("kiln_queue_wait_seconds"), "Time that a new default request would wait, by server."),
        ("bars", "Ended requests", "reqps", [(rate("kiln_requests_total", by="outcome"), "{{outcome}}")], "By outcome; rejected ones were never in a queue."),
        ("timeseries", "Time of requests", "s", [(quantile(0.5, "request"), "p50"), (quantile(0.95, "request"), "p95")], "From the arrival in the queue to the last image."),
        ("timeseries", "Made cheaper", "reqps", [(rate("kiln_requests_made_cheaper_total"), "requests")], "Requests that got a step cache or a guidance gate because of the load."),
    ]),
    ("Stages", [
        ("timeseries", "Median by stage", "s", quantiles(0.5), "`step` is one denoising step, `denoise` all of a request."),
        ("timeseries", "95 % by stage", "s", quantiles(0.95), "One in twenty takes longer."),
        ("timeseries", "Mean step by server", "s", [(
            f"{rate('kiln_step_seconds_sum', by='instance')} / {rate('kiln_step_seconds_count', by='instance')}", "{{instance}}",
        )], "A server that differs has a slower device, or other requests."),
    ]),
    ("Throughput", [
        ("timeseries", "Images/s", "short", [(rate("kiln_images_total", by="instance"), "{{instance}}")], "Generated images, by server."),
        ("timeseries", "Pixel-steps/s", "short", [(rate("kiln_pixel_steps_total", by="instance"), "{{instance}}")], "Pixels of the images times their denoising steps: the work of a server, whatever the sizes."),
        ("timeseries", "Steps/s", "short", [
            (rate("kiln_steps_computed_total"), "computed"),
            (rate("kiln_steps_skipped_total"), "skipped by a step cache"),
            (rate("kiln_steps_gated_total"), "gated"),
            (rate("kiln_shared_steps_total"), "shared with other requests"),
        ], "Denoising steps by kind; gated and shared ones are part of the computed ones."),
        ("timeseries", "Devices busy", "percentunit", [(rate("kiln_device_busy_seconds_total", by="instance, device"), "{{instance}} {{device}}")], "Part of the time in which a device computed steps."),
    ]),
    ("Memory and caches", [
        ("timeseries", "Device memory in use", "bytes", [(one("kiln_device_memory_in_use_bytes"), "{{instance}} {{device}}")], "As far as the backend counts it."),
        ("timeseries", "Planned and free", "bytes", [
            (one("kiln_memory_planned_bytes"), "{{instance}} planned"), (one("kiln_memory_free_bytes"), "{{instance}} free"),
        ], "What the requests in progress take at most, and what was free when one last asked."),
        ("timeseries", "Cache hits", "percentunit", [(
            f"{rate('kiln_cache_hits_total', by='cache')} / ({rate('kiln_cache_hits_total', by='cache')} + {rate('kiln_cache_misses_total', by='cache')})", "{{cache}}",
        )], "Share of the look-ups of prompt embeddings and modulation tables."),
        ("timeseries", "Caches", "bytes", [(total("kiln_cache_bytes", by="instance, cache"), "{{instance}} {{cache}}")], "Size of the caches of each server."),
    ]),
    ("Adapters", [
        ("bars", "Requests by adapter", "reqps", [(rate("kiln_lora_requests_total", by="adapter"), "{{adapter}}")], "A request with several adapters counts for each."),
        ("timeseries", "Loads and evictions", "ops", [
            (rate("kiln_lora_loads_total", by="cache"), "load, {{cache}}"),
            (rate("kiln_lora_evictions_total", by="cache"), "eviction, {{cache}}"),
        ], "Many of both: the caches are too small for the adapters in use."),
        ("timeseries", "Adapters in memory", "bytes", [
            (one("kiln_lora_host_cache_bytes"), "{{instance}} host"), (one("kiln_lora_device_cache_bytes"), "{{instance}} device"),
        ], "Size of the adapters in host memory and on the device."),
    ]),
    ("Jobs", [
        ("timeseries", "Jobs", "short", [
            (f"max({one('kiln_jobs_queued')})", "waiting"), (f"max({one('kiln_jobs_in_progress')})", "in progress"),
        ], "Every server of a store reports the same numbers."),
        ("timeseries", "Oldest waiting job", "s", [(f"max({one('kiln_jobs_oldest_queued_seconds')})", "age")], "An alert fires above 30 minutes."),
        ("bars", "Submitted and ended jobs", "ops", [
            (rate("kiln_jobs_submitted_total"), "submitted"), (rate("kiln_jobs_ended_total", by="outcome"), "{{outcome}}"),
        ], "Jobs per second."),
        ("timeseries", "Attempts and failures", "ops", [
            (rate("kiln_jobs_attempts_total"), "attempts"), (rate("kiln_jobs_failed_total", by="reason"), "failed: {{reason}}"),
        ], "More attempts than ended jobs: workers were lost or stopped."),
        ("timeseries", "Results", "bytes", [(f"max({one('kiln_jobs_bytes')})", "bytes")], "Size of all stored files; --jobs-max-bytes is the limit."),
        ("bars", "Webhooks", "ops", [(rate("kiln_webhooks_total", by="outcome"), "{{outcome}}")], "Messages to clients about the ends of their jobs."),
    ]),
    ("Servers", [
        ("table", "Servers", "short", [(one("kiln_info"), "")], "Model, version, backend and device of each server."),
        ("timeseries", "Connections", "short", by_instance("kiln_connections"), "Open connections."),
        ("bars", "Closed by the server", "ops", [(rate("kiln_connections_closed_total", by="reason"), "{{reason}}")], "By reason."),
        ("timeseries", "Start", "s", [(total("kiln_start_seconds", by="instance, stage"), "{{instance}} {{stage}}")], "Time that each stage of the start took."),
    ]),
]


def panel(number, place, kind, title, unit, queries, description):
    targets = [
        {
            "refId": chr(ord("A") + index),
            "datasource": DATASOURCE,
            "expr": expression,
            "legendFormat": legend or "__auto",
            **({"format": "table", "instant": True} if kind == "table" else {}),
        }
        for index, (expression, legend) in enumerate(queries)
    ]
    custom = {"fillOpacity": 10, "showPoints": "never"}
    if kind == "bars":
        custom = {"drawStyle": "bars", "fillOpacity": 80, "stacking": {"mode": "normal"}}
    result = {
        "id": number,
        "type": "timeseries" if kind == "bars" else kind,
        "title": title,
        "description": description,
        "datasource": DATASOURCE,
        "gridPos": place,
        "fieldConfig": {
            "defaults": {"unit": unit, "min": 0, **({"custom": custom} if kind in ("timeseries", "bars") else {})},
            "overrides": [],
        },
        "options": {},
        "targets": targets,
    }
    if kind in ("timeseries", "bars"):
        result["options"] = {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}}
    if kind == "stat":
        result["options"] = {"reduceOptions": {"calcs": ["lastNotNull"]}, "graphMode": "area", "colorMode": "none"}
    if kind == "table":
        hidden = {"Time": True, "Value": True, "__name__": True, "namespace": True, "endpoint": True, "service": True, "container": True}
        result["transformations"] = [{"id": "organize", "options": {"excludeByName": hidden}}]
    return result


def variable(name, label, query):
    return {
        "name": name,
        "label": label,
        "type": "query",
        "datasource": DATASOURCE,
        "query": {"query": query, "refId": name},
        "definition": query,
        "refresh": 2,
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }


def dashboard():
    panels, number, top = [], 1, 0
    for title, contents in ROWS:
        panels.append({"id": number, "type": "row", "title": title, "collapsed": False, "panels": [], "gridPos": {"x": 0, "y": top, "w": 24, "h": 1}})
        number, top = number + 1, top + 1
        width, height = (3, 4) if contents[0][0] == "stat" else (8, 8) if len(contents) % 3 == 0 else (6, 8)
        for index, content in enumerate(contents):
            place = {"x": index * width % 24, "y": top + index * width // 24 * height, "w": width, "h": height}
            panels.append(panel(number, place, *content))
            number += 1
        top += -(-len(contents) * width // 24) * height
    return {
        "uid": "kiln",
        "title": "kiln",
        "description": "Servers of kiln: requests, stages, throughput, memory, caches, adapters, jobs, webhooks.",
        "tags": ["kiln"],
        "schemaVersion": 39,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {
            "list": [
                {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus", "current": {}},
                variable("namespace", "Namespace", "label_values(kiln_ready, namespace)"),
                variable("job", "Job", 'label_values(kiln_ready{namespace=~"$namespace"}, job)'),
                variable("instance", "Server", 'label_values(kiln_ready{namespace=~"$namespace", job=~"$job"}, instance)'),
            ]
        },
        "annotations": {"list": []},
        "links": [],
        "panels": panels,
    }


def prometheus_rule():
    rules = yaml.safe_load(RULES.read_text())
    document = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "kiln", "labels": {"app": "kiln"}},
        "spec": rules,
    }
    text = yaml.safe_dump(document, sort_keys=False, width=120)
    return f"# Generated by scripts/deploy/generate.py from {RULES}.\n{text}"


def main():
    files = {
        PROMETHEUS_RULE: prometheus_rule(),
        DASHBOARD: json.dumps(dashboard(), indent=1) + "\n",
    }
    for path, text in files.items():
        if "--check" not in sys.argv[1:]:
            path.write_text(text)
        elif path.read_text() != text:
            sys.exit(f"{path} is out of date: run python scripts/deploy/generate.py")


if __name__ == "__main__":
    main()
