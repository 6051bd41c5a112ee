"""Draws docs/dashboard.png: the panels of packaging/grafana/kiln.json, with what Prometheus answers to their queries after it
has scraped two kilns and a worker under load. It is no screenshot of Grafana.

    python scripts/deploy/picture.py KILN OUTPUT.png [--seconds 240]

Needs prometheus and nats-server in PATH, and matplotlib and PyYAML.
"""

import argparse
import base64
import http.server
import json
import math
import random
import socket
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from PIL import Image

from generate import DASHBOARD, RULES

SECRET = "--webhook-secret=whsec_" + base64.b64encode(bytes(32)).decode()
STEP = 2  # seconds between two scrapes
WINDOW = 24  # seconds of a rate


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def call(url, body=None, timeout=120, **headers):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json", **headers})
    with urllib.request.urlopen(request, timeout=timeout) as response:
        return response.read()


def wait_for(url):
    for _ in range(600):
        try:
            return call(url)
        except OSError:
            time.sleep(0.1)
    raise SystemExit(f"{url} does not answer")


class Receiver(http.server.BaseHTTPRequestHandler):
    """Takes webhooks, and refuses one in five, so that it is sent again."""

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(503 if random.random() < 0.2 else 204)
        self.end_headers()

    def log_message(self, *_):
        pass


def load(servers, hook, end):
    """Requests of several kinds, until `end`: many in the middle of the time."""
    begin = time.monotonic()

    def client(seed):
        dice = random.Random(seed)
        while time.monotonic() < end:
            done = (time.monotonic() - begin) / (end - begin)
            time.sleep(dice.expovariate(0.1 + 1.2 * math.sin(math.pi * done) ** 4))
            side = dice.choice([64, 128, 128, 192])
            body = {"prompt": "a red circle", "size": f"{side}x{side}", "num_inference_steps": dice.choice([8, 16, 24])}
            if dice.random() < 0.3:
                body["lora"] = "stripes"
            if dice.random() < 0.2:
                body["cache"] = "balanced"
            if dice.random() < 0.5:
                body["negative_prompt"] = " "
            try:
                if dice.random() < 0.4:
                    call(f"{dice.choice(servers)}/v1/images/jobs", {**body, "webhook": hook})
                else:
                    # Some clients leave.
                    call(f"{dice.choice(servers)}/v1/images/generations", body, dice.choice([120, 120, 120, 0.5]))
            except OSError:
                pass

    threads = [threading.Thread(target=client, args=(seed,), daemon=True) for seed in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0, end + 5 - time.monotonic()))


def answers(prometheus, expression, begin, end):
    parameters = urllib.parse.urlencode({"query": expression, "start": begin, "end": end, "step": STEP})
    found = json.loads(call(f"{prometheus}/api/v1/query_range?{parameters}"))["data"]["result"]
    return [(it["metric"], [float(t) - begin for t, _ in it["values"]], [float(v) for _, v in it["values"]]) for it in found]


def readable(value, unit):
    if unit == "bytes":
        power = 20 if value >= 2**20 else 10
        return f"{value / 2**power:.0f} {'MiB' if power == 20 else 'KiB'}"
    if unit == "percentunit":
        return f"{100 * value:.1f} %"
    return f"{value:.3g}" + (" s" if unit == "s" else "")


def legend(pattern, metric):
    for name, value in metric.items():
        pattern = pattern.replace("{{" + name + "}}", value)
    return pattern


def draw_panel(axes, panel, series, seconds):
    axes.set_title(panel["title"], loc="left", fontsize=9)
    unit = panel["fieldConfig"]["defaults"]["unit"]
    if panel["type"] in ("stat", "table"):
        axes.axis("off")
    if panel["type"] == "stat":
        values = [value for _, _, _, numbers in series for value in numbers if math.isfinite(value)]
        axes.text(0, 0.3, readable(values[-1], unit) if values else "–", fontsize=17, transform=axes.transAxes)
    elif panel["type"] == "table":
        lines = [" · ".join(metric.get(key, "") for key in ("instance", "model", "version", "backend")) for _, metric, _, _ in series]
        axes.text(0, 0.95, "\n".join(sorted(lines)), fontsize=7, va="top", transform=axes.transAxes)
    else:
        for pattern, metric, times, numbers in series:
            axes.plot(times, numbers, linewidth=1, label=legend(pattern, metric))
        axes.set_xlim(0, seconds)
        axes.set_ylim(bottom=0)
        axes.tick_params(labelsize=6)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0f} s")
        axes.yaxis.set_major_formatter(lambda value, _: readable(value, unit))
        axes.grid(alpha=0.3)
        if series:
            axes.legend(fontsize=5, loc="upper left", framealpha=0.6)


def draw(prometheus, begin, end, output):
    dashboard = json.loads(DASHBOARD.read_text())
    height = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in dashboard["panels"])
    figure = pyplot.figure(figsize=(14, height * 0.27), dpi=80)
    empty = []
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        left, bottom = place["x"] / 24, 1 - (place["y"] + place["h"]) / height
        if panel["type"] == "row":
            figure.text(0.012, bottom + 0.2 / height, panel["title"], fontsize=12, weight="bold")
            continue
        margin = 0.35 if panel["type"] in ("stat", "table") else 1.1
        axes = figure.add_axes((left + margin / 24, bottom + 0.9 / height, (place["w"] - margin - 0.5) / 24, (place["h"] - 2.3) / height))
        series = []
        for target in panel["targets"]:
            expression = target["expr"].replace("$__rate_interval", f"{WINDOW}s")
            for variable in ("namespace", "job", "instance"):
                expression = expression.replace(f"${variable}", ".*")
            series += [(target["legendFormat"], *it) for it in answers(prometheus, expression, begin, end)]
        if not series:
            empty.append(panel["title"])
        draw_panel(axes, panel, series, end - begin)
    figure.savefig(output)
    # Few colours make a small file.
    Image.open(output).convert("RGB").quantize(64, dither=0).save(output, optimize=True)
    print(f"{output}; panels without data: {empty or 'none'}")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("kiln")
    parser.add_argument("output")
    parser.add_argument("--seconds", type=int, default=240)
    arguments = parser.parse_args()
    processes = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def start(program, *options):
            with (folder / f"log{len(processes)}").open("w") as log:
                processes.append(subprocess.Popen([program, *options], stdout=log, stderr=log))

        try:
            queue, web = free_port(), free_port()
            receiver = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
            threading.Thread(target=receiver.serve_forever, daemon=True).start()
            start("nats-server", "--addr=127.0.0.1", f"--port={queue}", "--jetstream", f"--store_dir={folder / 'nats'}")
            ports = {"k1": free_port(), "k2": free_port(), "w1": free_port()}
            for server, port in ports.items():
                role = "worker" if server.startswith("w") else "all"
                start(
                    arguments.kiln, "serve", "demo", f"--port={port}", f"--instance={server}", "--max-queue=8", f"--role={role}",
                    "--lora-dir=models/demo/lora", f"--jobs=nats://127.0.0.1:{queue}", "--webhook-host=127.0.0.1",
                    "--webhook-allow-private", SECRET, "--max-step-tokens=512", "--no-warm-up",
                )
            for port in ports.values():
                wait_for(f"http://127.0.0.1:{port}/health/ready")
            targets = [{"targets": [f"127.0.0.1:{port}"], "labels": {"instance": server}} for server, port in ports.items()]
            config = {
                "global": {"scrape_interval": f"{STEP}s", "evaluation_interval": f"{STEP}s"},
                "rule_files": [str(RULES.resolve())],
                "scrape_configs": [{"job_name": "kiln", "honor_labels": True, "static_configs": targets}],
            }
            (folder / "prometheus.yml").write_text(json.dumps(config))
            start(
                "prometheus", f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address=127.0.0.1:{web}",
            )
            prometheus = f"http://127.0.0.1:{web}"
            wait_for(f"{prometheus}/-/ready")
            begin = time.time()
            servers = [f"http://127.0.0.1:{ports[server]}" for server in ("k1", "k2")]
            hook = f"http://127.0.0.1:{receiver.server_port}/"
            load(servers, hook, time.monotonic() + arguments.seconds)
            time.sleep(2 * STEP)
            draw(prometheus, begin, time.time(), arguments.output)
            for process in processes:
                assert process.poll() is None, f"{process.args} has ended"
        finally:
            for process in processes:
                process.terminate()
            for process in processes:
                process.wait(timeout=90)


if __name__ == "__main__":
    main()
