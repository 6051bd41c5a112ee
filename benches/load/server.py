"""What the load tests share: a `kiln serve` process, the machine in words, Markdown tables. Needs only Python."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path


def arguments(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--kiln", type=Path, required=True, help="the binary")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--size", type=int, default=128, help="height and width of the images")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument(
        "--serve", action="append", default=[], metavar="ARGUMENT",
        help="a further argument of kiln serve, as in --serve=--backend=cuda; repeatable",
    )
    parser.add_argument("--output", type=Path, help="Markdown file to which the results are appended")
    return parser


@contextlib.contextmanager
def serving(settings: argparse.Namespace, *further: str) -> Iterator[str]:
    """Runs `kiln serve` until the block ends. Begins the block with the server's URL when it is ready."""
    command = [settings.kiln, "serve", settings.model, "--port", "0", *settings.serve, *further]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    log: list[str] = []

    def read() -> None:
        for line in process.stderr:
            log.append(line)

    threading.Thread(target=read, daemon=True).start()
    try:
        url = None
        while url is None or not is_ready(url):
            if process.poll() is not None:
                raise SystemExit(f"{' '.join(map(str, command))}: code {process.returncode}\n{''.join(log)}")
            time.sleep(0.05)
            found = re.search(r"listening on (http:\S+)", "".join(log[:100]))
            url = url or (found and found[1])
        yield url
    finally:
        process.terminate()
        process.wait()


def is_ready(url: str) -> bool:
    try:
        urllib.request.urlopen(f"{url}/health/ready", timeout=10).close()
    except urllib.error.HTTPError:
        return False
    return True


def machine(settings: argparse.Namespace) -> str:
    """Date, processor, other load and the version of kiln, in one line."""
    cpu = "unknown processor"
    with contextlib.suppress(OSError):
        names = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        cpu = names[0] if names else cpu
    version = subprocess.run([settings.kiln, "--version"], capture_output=True, text=True, check=True)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    busy = busy_part()
    other = "idle" if busy < 0.05 else f"**{busy:.0%} busy with other programs**"
    served = " ".join(["kiln serve", settings.model, *settings.serve])
    return (
        f"{time.strftime('%Y-%m-%d')}, {cpu}, {cores} cores, {other} before the test; {version.stdout.splitlines()[0]}, "
        f"`{served}`."
    )


def busy_part(seconds: float = 2) -> float:
    """The part of the processors' time that programs take now; 0 where /proc does not tell."""

    def times() -> tuple[int, int]:
        # user, nice, system, idle, waiting for files, interrupts, stolen by other machines
        values = [int(value) for value in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
        return sum(values), values[3] + values[4]

    try:
        (all_before, idle_before), _, (all_after, idle_after) = times(), time.sleep(seconds), times()
    except OSError:
        return 0.0
    return 1 - (idle_after - idle_before) / max(1, all_after - all_before)


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def report(settings: argparse.Namespace, text: str) -> None:
    """Prints a part of the results, and appends it to the file of results."""
    print(text, flush=True)
    if settings.output:
        with settings.output.open("a") as file:
            file.write(text + "\n")
