"""Times kiln's flex kernels beside torch: the same shapes, the same number of threads, in turn.

    cargo bench -p kiln-ops --features flex --bench flex --no-run   # prints the path of the binary
    python benches/flex_against_torch.py BINARY [--threads 2] [--rounds 5]

Each round runs the binary (which names the ops and shapes, and times them), then torch. The figures
are medians over the rounds; the ratio is kiln's time to torch's. Needs torch.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
import torch.nn.functional as F

RUNS = 5
"""As many as the binary makes, after one that warms up."""


def torch_op(op: str, shape: list[int]) -> Callable[[], torch.Tensor]:
    """The same work in torch, on contiguous tensors."""
    randn = torch.randn
    if op == "silu_mul":
        gate, up = randn(shape), randn(shape)
        return lambda: F.silu(gate) * up
    if op == "gelu_tanh":
        x = randn(shape)
        return lambda: F.gelu(x, approximate="tanh")
    if op in ("linear_f32", "linear_bf16"):
        dtype = torch.float32 if op == "linear_f32" else torch.bfloat16
        tokens, d_in, d_out = shape
        x, weight, bias = (
            randn(size).to(dtype) for size in ((tokens, d_in), (d_out, d_in), (d_out,))
        )
        return lambda: F.linear(x, weight, bias)
    if op == "same_conv2d":
        channels, side = shape
        x, weight = randn(1, channels, side, side), randn(channels, channels, 3, 3)
        bias = randn(channels)
        return lambda: F.conv2d(x, weight, bias, padding=1)
    if op == "attention":
        heads, tokens, head_dim = shape
        # As the models have them: the heads of a token lie side by side.
        q, k, v = (randn(1, tokens, heads, head_dim).transpose(1, 2) for _ in range(3))
        return lambda: F.scaled_dot_product_attention(q, k, v)
    raise ValueError(f"the binary times {op}, and this script has no such op")


def time_torch(op: str, shape: list[int]) -> float:
    """Median in milliseconds."""
    run = torch_op(op, shape)
    run()
    times = []
    for _ in range(RUNS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def time_kiln(binary: Path, threads: int) -> dict[tuple[str, tuple[int, ...]], float]:
    environment = os.environ | {"RAYON_NUM_THREADS": str(threads)}
    lines = subprocess.run(
        [binary, "--json"], env=environment, check=True, capture_output=True, text=True
    ).stdout.splitlines()
    rows = [json.loads(line) for line in lines]
    return {(row["op"], tuple(row["shape"])): row["ms"] for row in rows}


def cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("binary", type=Path)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)

    kiln, peer = {}, {}
    with torch.inference_mode():
        for _ in range(arguments.rounds):
            for case, milliseconds in time_kiln(arguments.binary, arguments.threads).items():
                kiln.setdefault(case, []).append(milliseconds)
                peer.setdefault(case, []).append(time_torch(case[0], list(case[1])))

    print(f"{date.today()}, {cpu()}, {arguments.threads} threads, torch {torch.__version__}")
    print(f"({torch.backends.cpu.get_cpu_capability()}), medians of {arguments.rounds} rounds")
    print("\n| op | shape | kiln ms | torch ms | ratio |\n|---|---|---|---|---|")
    for (op, shape), times in kiln.items():
        ours, theirs = statistics.median(times), statistics.median(peer[op, shape])
        size = "x".join(map(str, shape))
        print(f"| {op} | {size} | {ours:.2f} | {theirs:.2f} | {ours / theirs:.2f} |")


if __name__ == "__main__":
    main()
