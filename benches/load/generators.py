"""Runs the load generators of vLLM-Omni and SGLang, and AIPerf, unmodified against `kiln serve`, and writes tables.

    python generators.py --kiln BINARY --files FOLDER --aiperf PROGRAM

scripts/load-test.sh installs what this needs and passes it. FOLDER has `vllm-omni/`, the folder benchmarks/diffusion of
vLLM-Omni, and `sglang/`, the folder multimodal_gen/benchmarks of SGLang's package. docs/performance.md says what to
take care of when servers are compared with these programs.

Every run has a server of its own, as the programs send the same prompts in every run and kiln keeps their embeddings.
All requests have guidance, by a negative prompt.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from server import arguments, machine, report, serving, table

# vLLM-Omni's mix of sizes ("Dataset C"), relative to its third size, which is --size here: part of the side, of the
# steps, of the requests.
MIX = [(0.5, 0.8, 0.15), (0.75, 0.8, 0.25), (1.0, 1.0, 0.45), (1.5, 1.4, 0.15)]
# Parts of the capacity at which requests arrive at random times.
ARRIVALS = [0.5, 0.8, 0.95]
SLO_SCALE = "3"

# SGLang's benchmark imports these from its package, which needs torch: its log, and its functions that print. What
# measures and what sends requests is SGLang's own.
STAND_INS = {
    "runtime/utils/logging_utils.py": """\
import logging


def init_logger(name):
    return logging.getLogger(name)


def configure_logger(arguments):
    logging.basicConfig(level=arguments.log_level)
""",
    "test/test_utils.py": """\
def print_divider(width):
    print("-" * width)


def print_value_formatted(name, value):
    print(f"{name:<40} {value}")
""",
    "../srt/utils/network.py": """\
class NetworkAddress:
    \"\"\"Only for calls without --base-url.\"\"\"
""",
}

# Names of the stages in `stage_durations`, and heads of their columns.
STAGES = {
    "queue": "queue",
    "QwenImagePipeline.text_encoder.forward": "prompts",
    "QwenImagePipeline.diffuse": "steps",
    "QwenImagePipeline.vae.decode": "decoding",
    "paused": "paused for others",
}


@dataclass
class Run:
    """One run of a load generator."""

    tool: str
    load: str
    # Makes the command from the server's URL and the folder for results.
    command: Callable[[str, Path], list[str]]
    # Reads the results from that folder.
    read: Callable[[Path], "Results"]
    # Variables of the environment, and the working folder.
    variables: dict[str, str] = field(default_factory=dict)
    folder: Path | None = None


@dataclass
class Results:
    """Seconds, requests per second, MiB; None where the program does not tell."""

    completed: int
    rate: float
    mean: float
    median: float
    p95: float
    p99: float
    peak: float | None = None
    slo: float | None = None
    stages: dict[str, float] = field(default_factory=dict)


class Tools:
    def __init__(self, settings: argparse.Namespace) -> None:
        self.settings = settings
        self.vllm_omni = settings.files.resolve() / "vllm-omni"
        self.sglang = settings.files.resolve() / "sglang"
        self.runs = settings.files.resolve() / "runs"
        shutil.rmtree(self.runs, ignore_errors=True)
        self.runs.mkdir()
        self.package = self.make_sglang_package()
        self.prompts = self.runs / "prompts.jsonl"
        prompts = [f"a large red circle, number {index}" for index in range(settings.requests)]
        self.prompts.write_text("".join(json.dumps({"text": prompt}) + "\n" for prompt in prompts))

    def make_sglang_package(self) -> Path:
        """A package `sglang` of the two modules of its benchmark, and of stand-ins for what they import."""
        root = self.runs / "package"
        package = root / "sglang" / "multimodal_gen"
        shutil.copytree(self.sglang, package / "benchmarks")
        for name, text in STAND_INS.items():
            path = (package / name).resolve()
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        for folder, _, _ in os.walk(root / "sglang"):
            Path(folder, "__init__.py").touch()
        return root

    def sources(self) -> str:
        """The files of the programs, as they were obtained."""
        files = [
            *(self.vllm_omni / name for name in ["diffusion_benchmark_serving.py", "backends.py"]),
            *(self.sglang / name for name in ["bench_serving.py", "datasets.py"]),
        ]
        lines = [
            f"- `{path.parent.name}/{path.name}`, SHA-256 {hashlib.sha256(path.read_bytes()).hexdigest()[:16]}…"
            for path in files
        ]
        version = subprocess.run([self.settings.aiperf, "--version"], capture_output=True, text=True, check=True)
        return "\n".join([*lines, f"- AIPerf {version.stdout.strip()}"])

    def mix(self) -> str:
        """The mix of sizes as --random-request-config."""
        sizes = []
        for side, steps, weight in MIX:
            side = max(16, int(self.settings.size * side) // 16 * 16)
            steps = max(1, round(self.settings.steps * steps))
            sizes.append({"width": side, "height": side, "num_inference_steps": steps, "weight": weight})
        return json.dumps(sizes, separators=(",", ":"))

    def vllm(self, backend: str, load: str, concurrency: int, *further: str, mixed: bool = False) -> Run:
        settings = self.settings
        size = ["--random-request-config", self.mix()] if mixed else []

        def command(url: str, folder: Path) -> list[str]:
            return [
                sys.executable, "diffusion_benchmark_serving.py", "--base-url", url, "--backend", backend,
                "--dataset", "random", "--task", "t2i", "--model", settings.model, "--enable-negative-prompt",
                "--num-prompts", str(settings.requests), "--max-concurrency", str(concurrency),
                "--width", str(settings.size), "--height", str(settings.size),
                "--num-inference-steps", str(settings.steps), *size, *further,
                "--seed", "42", "--warmup-requests", "4", "--warmup-num-inference-steps", str(settings.steps),
                "--slo", "--slo-scale", SLO_SCALE, "--disable-tqdm",
                "--output-file", str(folder / "results.json"),
            ]

        return Run(f"vLLM-Omni, `{backend}`", load, command, read_benchmark, folder=self.vllm_omni)

    def sglang_run(self, load: str, concurrency: int) -> Run:
        settings = self.settings

        def command(url: str, folder: Path) -> list[str]:
            return [
                sys.executable, "-m", "sglang.multimodal_gen.benchmarks.bench_serving", "--base-url", url,
                "--dataset", "random", "--task", "text-to-image", "--model", settings.model,
                "--num-prompts", str(settings.requests), "--max-concurrency", str(concurrency),
                "--width", str(settings.size), "--height", str(settings.size),
                "--num-inference-steps", str(settings.steps),
                "--extra-body", '{"negative_prompt":" ","true_cfg_scale":4}',
                "--warmup-requests", "4", "--warmup-inference-steps", str(settings.steps),
                "--slo", "--slo-scale", SLO_SCALE, "--disable-tqdm",
                "--output-file", str(folder / "results.json"),
            ]

        variables = {"PYTHONPATH": str(self.package)}
        return Run("SGLang", load, command, read_benchmark, variables)

    def aiperf(self, load: str, concurrency: int, *further: str) -> Run:
        settings = self.settings
        inputs = {
            "size": f"{settings.size}x{settings.size}", "num_inference_steps": settings.steps,
            "negative_prompt": " ",
        }

        def command(url: str, folder: Path) -> list[str]:
            return [
                str(settings.aiperf), "profile", "--url", url, "--model", settings.model,
                "--endpoint-type", "image_generation", "--tokenizer", str(settings.tokenizer),
                "--input-file", str(self.prompts), "--custom-dataset-type", "single_turn",
                "--extra-inputs", json.dumps(inputs, separators=(",", ":")), *further,
                "--concurrency", str(concurrency), "--request-count", str(settings.requests),
                "--warmup-request-count", "4", "--ui", "none", "--no-gpu-telemetry",
                "--output-artifact-dir", str(folder),
            ]

        return Run("AIPerf", load, command, read_aiperf)

    def run(self, number: int, run: Run) -> tuple[str, Results]:
        """Runs one program against a server of its own, and returns the command and the results."""
        settings = self.settings
        folder = self.runs / f"{number:02}"
        folder.mkdir()
        # A refused request would count as a failed one.
        with serving(settings, f"--max-queue={settings.requests + 8}") as url:
            command = run.command(url, folder)
            shown = self.shown(shlex.join(command), url, folder)
            print(f"{run.tool}, {run.load}", file=sys.stderr)
            with (folder / "output.txt").open("w") as output:
                code = subprocess.run(
                    command, cwd=run.folder or folder, env={**os.environ, **run.variables},
                    stdout=output, stderr=subprocess.STDOUT,
                ).returncode
        text = (folder / "output.txt").read_text()
        if code != 0:
            raise SystemExit(f"code {code} of {shown}\n{text[-5000:]}")
        results = run.read(folder)
        if results.completed != settings.requests:
            raise SystemExit(f"only {results.completed} requests succeeded of {shown}\n{text[-5000:]}")
        return shown, results

    def shown(self, command: str, url: str, folder: Path) -> str:
        """A command without what differs from machine to machine."""
        for part, short in [
            (url, "$URL"), (str(folder), "$RESULTS"), (str(self.prompts), "$PROMPTS"),
            (sys.executable, "python"),
            (shlex.quote(self.mix()), "$MIX"), (str(self.settings.aiperf), "aiperf"), (str(self.settings.tokenizer), "$TOKENIZER"),
        ]:
            command = command.replace(part, short)
        return command


def read_benchmark(folder: Path) -> Results:
    """The results of vLLM-Omni's and SGLang's programs, which have the same form."""
    found = json.loads((folder / "results.json").read_text())
    return Results(
        completed=found["completed_requests"], rate=found["throughput_qps"], mean=found["latency_mean"],
        median=found["latency_median"], p95=found["latency_p95"], p99=found["latency_p99"],
        peak=found["peak_memory_mb_max"] or None, slo=found.get("slo_attainment_rate"),
        stages=found.get("stage_durations_mean", {}),
    )


def read_aiperf(folder: Path) -> Results:
    found = json.loads((folder / "profile_export_aiperf.json").read_text())
    latency = {name: found["request_latency"][name] / 1e3 for name in ["avg", "p50", "p95", "p99"]}
    return Results(
        completed=int(found["request_count"]["avg"]), rate=found["request_throughput"]["avg"],
        mean=latency["avg"], median=latency["p50"], p95=latency["p95"], p99=latency["p99"],
    )


def write_tables(settings: argparse.Namespace, done: list[tuple[Run, str, Results]]) -> None:
    rows, stages, commands = [], [], []
    for run, command, results in done:
        rows.append([
            run.tool, run.load, f"{results.rate:.2f}",
            *(f"{value:.3f}" for value in [results.mean, results.median, results.p95, results.p99]),
            f"{results.peak:.0f}" if results.peak else "–",
            f"{results.slo:.0%}" if results.slo is not None else "–",
        ])
        if results.stages:
            stages.append([run.tool, run.load, *(f"{results.stages[name]:.3f}" for name in STAGES)])
        commands.append(command)
    head = ["load generator", "load", "requests/s", "mean", "median", "p95", "p99", "peak MiB", "SLO"]
    report(settings, table(head, rows) + "\n")
    report(settings, "Seconds of a request by stage, on average (`stage_durations`):\n")
    report(settings, table(["load generator", "load", *STAGES.values()], stages) + "\n")
    report(settings, "Commands:\n\n```sh\n" + "\n".join(commands) + "\n```\n")


def main() -> None:
    parser = arguments(__doc__.split(",")[0])
    parser.add_argument("--files", type=Path, required=True, help="folder with the programs")
    parser.add_argument("--aiperf", type=Path, required=True, help="the program aiperf")
    parser.add_argument("--requests", type=int, default=64, help="requests of each run")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--tokenizer", help="of AIPerf: a folder, or `builtin`, which is downloaded")
    settings = parser.parse_args()
    if settings.tokenizer is None:
        demo = Path(__file__).resolve().parents[2] / "models" / "demo"
        model = demo if settings.model == "demo" else Path(settings.model)
        settings.tokenizer = model / "tokenizer" if model.is_dir() else "builtin"

    tools = Tools(settings)
    report(settings, "## Load generators\n")
    report(
        settings,
        f"{machine(settings)} {settings.size}², {settings.steps} steps, guidance, {settings.requests} requests a run, "
        f"a new server for each run. Latencies are in seconds; SLO: requests within {SLO_SCALE} times the time that "
        f"the four warm-up requests took one by one. Mix: `{tools.mix()}`.\n\n{tools.sources()}\n",
    )
    done: list[tuple[Run, str, Results]] = []

    def go(run: Run) -> Results:
        command, results = tools.run(len(done), run)
        done.append((run, command, results))
        return results

    most = max(settings.concurrency)
    for concurrency in settings.concurrency:
        go(tools.vllm("vllm-omni", f"{concurrency} at a time", concurrency))
    go(tools.vllm("openai", f"{most} at a time", most))
    go(tools.sglang_run(f"{most} at a time", most))
    go(tools.aiperf(f"{most} at a time", most))
    go(tools.aiperf(f"{most} at a time, streams", most, "--streaming"))
    capacity = go(tools.vllm("vllm-omni", f"mix, {most} at a time", most, mixed=True)).rate
    for part in ARRIVALS:
        rate = ["--request-rate", f"{capacity * part:.3f}"]
        load = f"mix, Poisson at {part:.0%} of {capacity:.2f}/s"
        go(tools.vllm("vllm-omni", load, settings.requests, *rate, mixed=True))
    write_tables(settings, done)


if __name__ == "__main__":
    main()
