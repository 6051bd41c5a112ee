"""Checks the manifests, rules and the dashboard against a real kiln:

    python scripts/deploy/monitoring.py KILN

- kiln understands the arguments and variables of every container that runs it;
- promtool accepts and tests packaging/prometheus, and every alert is tested firing and not firing;
- the dashboard's panels have ids, places and data sources, and promtool parses their queries and those of KEDA;
- every metric that the rules, the dashboard, KEDA, llm-d's configurations or docs/ name is in /metrics of a server that has
  generated an image, an image with an adapter and the images of a job.

Run by scripts/lint-packaging.sh, with kubectl and promtool in PATH.
"""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import yaml

from generate import DASHBOARD, RULES
from manifests import kiln_containers, load_overlays, picker_configs

METRIC = re.compile(r"\b(?:kiln|vllm:num|vllm:lora)_[a-z0-9_]+")
SUFFIX = re.compile(r"_(bucket|sum|count)$")
# Words of docs/ that look like metrics and are crates, folders or examples.
NOT_METRICS = re.compile(r"^kiln_(models|ops|flex|ndarray|wgpu|cuda)$")

# Only with a backend whose allocator reserves memory: not on a CPU.
ON_GPUS = {"kiln_memory_reserved_bytes", "kiln_device_memory_reserved_bytes"}


def fail_unless(holds, message):
    if not holds:
        sys.exit(message)


def check_arguments(kiln, overlays):
    """Runs kiln with the arguments and variables of each container, but a model that does not exist."""
    checked = 0
    for overlay, documents in overlays.items():
        for document, container in kiln_containers(documents):
            name = f"{overlay}: {document['metadata']['name']}"
            model, *rest = container["args"]
            fail_unless(not model.startswith("-"), f"{name}: the first argument is no model")
            fixed = {it["name"]: it["value"] for it in container.get("env", [])}
            environment = {"PATH": os.environ["PATH"], **fixed}
            command = [kiln, "serve", "--host", "127.0.0.1", "--port", "0", "/nonexistent/model", *rest]
            ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
            said = ended.stderr.strip()
            # 2 is the exit code of a wrong command line.
            fail_unless(ended.returncode == 1 and "/nonexistent/model" in said, f"{name}: kiln says {said!r}")
            checked += 1
    print(f"arguments and variables of {checked} containers: ok")


def check_rules():
    folder = RULES.parent
    tests = RULES.with_name("kiln.rules.test.yaml")
    for command in (["check", "config", "prometheus.yml"], ["test", "rules", tests.name]):
        subprocess.run(["promtool", *command], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    fires, silent = set(), set()
    for test in yaml.safe_load(tests.read_text())["tests"]:
        for case in test["promql_expr_test"]:
            alert = re.match(r'ALERTS\{alertname="(\w+)", alertstate="firing"\}$', case["expr"])
            if alert:
                (fires if case["exp_samples"] else silent).add(alert[1])
    rules = [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]
    alerts = {rule["alert"]: rule for rule in rules if "alert" in rule}
    fail_unless(fires == silent == alerts.keys(), f"alerts {sorted(alerts)}, firing {fires}, silent {silent}")
    for name, rule in alerts.items():
        wanted = {"summary", "description", "runbook"}
        fail_unless(rule["annotations"].keys() == wanted and rule["labels"]["severity"], f"{name} has no runbook")
    print(f"{len(rules)} rules: ok")
    return [rule["expr"] for rule in rules]


def check_dashboard():
    """Returns the queries of the panels."""
    dashboard = json.loads(DASHBOARD.read_text())
    panels = dashboard["panels"]
    ids = [panel["id"] for panel in panels]
    fail_unless(len(set(ids)) == len(ids), "panels share an id")
    cells = set()
    for panel in panels:
        place = panel["gridPos"]
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                fail_unless(x < 24 and (x, y) not in cells, f"{panel['title']} overlaps another panel")
                cells.add((x, y))
    charts = [panel for panel in panels if panel["type"] != "row"]
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    queries = []
    for panel in charts:
        fail_unless(panel["description"] and panel["fieldConfig"]["defaults"]["unit"], f"{panel['title']} has no unit")
        references = [target["refId"] for target in panel["targets"]]
        fail_unless(len(set(references)) == len(references), f"{panel['title']} has a name twice")
        for part in (panel, *panel["targets"]):
            fail_unless(part["datasource"]["uid"] == "${datasource}", f"{panel['title']} has a fixed data source")
        for target in panel["targets"]:
            named = set(re.findall(r"\$(\w+)", target["expr"])) - {"__rate_interval"}
            fail_unless(named == {"namespace", "job", "instance"} <= variables, f"{panel['title']} has other variables")
            queries.append(target["expr"].replace("$__rate_interval", "5m"))
    print(f"{len(charts)} panels: ok")
    return queries


def check_queries(queries, folder):
    """Lets promtool parse queries, as rules."""
    rules = [{"record": f"query:{index}", "expr": query} for index, query in enumerate(queries)]
    path = folder / "queries.yaml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": rules}]}))
    # Without the lint for equal rules: panels may share a query.
    subprocess.run(["promtool", "check", "rules", "--lint=none", path], check=True, stdout=subprocess.DEVNULL)


def other_queries(overlays):
    """The queries of KEDA, and the names in the configurations of llm-d's router."""
    queries, names = set(), set()
    for documents in overlays.values():
        for document in documents:
            for trigger in document["spec"].get("triggers", []) if document["kind"] == "ScaledObject" else []:
                queries |= {trigger["metadata"]["query"]} if "query" in trigger["metadata"] else set()
        for config in picker_configs(documents):
            names |= set(METRIC.findall(str(config)))
    return sorted(queries), names


def answer(url, body=None):
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=60) as response:
        return response.read()


def metrics_of(kiln, folder):
    """The names in /metrics of a server that has done something of everything."""
    log = folder / "log"
    command = [kiln, "serve", "demo", "--port=0", "--no-warm-up", "--lora-dir=models/demo/lora", f"--jobs={folder / 'jobs'}"]
    with log.open("w") as file:
        server = subprocess.Popen(command, stderr=file)
    try:
        for _ in range(600):
            found = re.search(r"listening on (http:\S+)", log.read_text())
            if found:
                url = found[1]
                try:
                    answer(f"{url}/health/ready")
                    break
                except OSError:
                    pass
            fail_unless(server.poll() is None, log.read_text())
            time.sleep(0.1)
        request = {"prompt": "a red circle", "size": "64x64", "num_inference_steps": 1, "seed": 1}
        answer(f"{url}/v1/images/generations", request)
        answer(f"{url}/v1/images/generations", {**request, "lora": "stripes"})
        job = json.loads(answer(f"{url}/v1/images/jobs", request))
        ended = json.loads(answer(f"{url}/v1/images/jobs/{job['id']}?wait=30"))
        fail_unless(ended["status"] == "completed", f"the job ended as {ended}")
        page = answer(f"{url}/metrics").decode()
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(timeout=90)
    return set(re.findall(r"^# TYPE (\S+)", page, re.MULTILINE))


def check_names(named, served):
    """Checks that each name that is used somewhere is one of /metrics."""
    problems = []
    for place, text in named.items():
        for name in sorted(set(METRIC.findall(text))):
            # `kiln_cache_` stands for all names that begin with it.
            known = {name, SUFFIX.sub("", name)} & served or name.endswith("_") and any(it.startswith(name) for it in served)
            if not known and not NOT_METRICS.match(name):
                problems.append(f"{place} names {name}, which /metrics has not")
    fail_unless(not problems, "\n".join(problems))
    print(f"metrics named in {len(named)} places, of {len(served)} in /metrics: ok")


def main():
    kiln = os.path.realpath(sys.argv[1])
    overlays = load_overlays()
    check_arguments(kiln, overlays)
    rules = check_rules()
    panels = check_dashboard()
    keda, router = other_queries(overlays)
    named = {
        str(RULES): "\n".join(rules),
        str(DASHBOARD): "\n".join(panels),
        "a ScaledObject": "\n".join(keda),
        "an EndpointPickerConfig": " ".join(router),
    }
    named |= {str(path): path.read_text() for path in [*Path("docs").glob("*.md"), Path("README.md"), Path("packaging/README.md")]}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        check_queries(panels + keda, folder)
        served = metrics_of(kiln, folder)
    # Names that the rules make are not metrics of a server.
    check_names({place: re.sub(r"\bjob\w*:kiln_\w+", "", text) for place, text in named.items()}, served | ON_GPUS)


if __name__ == "__main__":
    main()
