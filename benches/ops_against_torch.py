"""Compares the speed of kiln's fused ops and of torch, with the same shapes, dtypes and device.

    cargo bench -p kiln-ops --features flex --bench flex --no-run   # prints the path of the binary
    python benches/ops_against_torch.py BINARY [--threads 2] [--rounds 5]

    cargo bench -p kiln-cuda --no-run
    python benches/ops_against_torch.py BINARY --device cuda --dtype bf16 --shapes qwen-image

Each round runs the binary, which selects the ops and shapes and times them, then torch. The figures are
medians over the rounds; the ratio is kiln's time to torch's, and `default` is the time of burn's plain
ops. The time of an op's first call is given for the first and for the last process: on a GPU it includes
compiling and autotuning kernels that no earlier process has cached. Needs torch.
"""

from __future__ import annotations

import argparse
import json
import math
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
BATCH_SECONDS = 0.02
MAX_CALLS = 16
"""As in the binary: the number of timed batches, the duration of a batch, and its largest number of calls."""
EPS = 1e-6


def torch_op(op: str, shape: list[int], device: str, dtype: torch.dtype) -> Callable[[], object]:
    """The same operation in torch, on contiguous tensors."""

    def randn(*size: int) -> torch.Tensor:
        return torch.randn(size, device=device).to(dtype)

    if op in ("linear", "linear_bf16"):
        if op == "linear_bf16":
            dtype = torch.bfloat16
        tokens, d_in, d_out = shape
        x, weight, bias = randn(tokens, d_in), randn(d_out, d_in), randn(d_out)
        return lambda: F.linear(x, weight, bias)
    if op == "rms_norm":
        x, weight = randn(*shape), randn(shape[1])
        return lambda: F.rms_norm(x, [shape[1]], weight, EPS)
    if op == "layer_norm_modulate":
        x, shift, scale = randn(*shape), randn(1, shape[1]), randn(1, shape[1])
        return lambda: F.layer_norm(x, [shape[1]], eps=EPS) * (1 + scale) + shift
    if op == "gated_residual":
        residual, x, gate = randn(*shape), randn(*shape), randn(1, shape[1])
        return lambda: residual + gate * x
    if op == "qk_norm_rope":
        heads, tokens, head_dim = shape
        x, weight = randn(tokens, heads, head_dim), randn(head_dim)
        angles = torch.randn(tokens, 1, head_dim // 2, device=device)
        turn = torch.polar(torch.ones_like(angles), angles)

        def qk_norm_rope() -> torch.Tensor:
            normed = F.rms_norm(x, [head_dim], weight, EPS)
            pairs = torch.view_as_complex(normed.float().unflatten(-1, (-1, 2)))
            return torch.view_as_real(pairs * turn).flatten(-2).to(dtype)

        return qk_norm_rope
    if op == "gelu_tanh":
        x = randn(*shape)
        return lambda: F.gelu(x, approximate="tanh")
    if op == "silu_mul":
        gate, up = randn(*shape), randn(*shape)
        return lambda: F.silu(gate) * up
    if op in ("attention", "causal_attention"):
        heads, tokens, head_dim = shape
        # The layout of the models: the heads of a token are contiguous.
        q, k, v = (randn(1, tokens, heads, head_dim).transpose(1, 2) for _ in range(3))
        causal = op == "causal_attention"
        return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    channels, side = shape
    x = randn(1, channels, side, side)
    if op == "conv2d_same":
        weight, bias = randn(channels, channels, 3, 3), randn(channels)
        return lambda: F.conv2d(x, weight, bias, padding=1)
    if op == "channel_norm_silu":
        gamma = randn(channels, 1, 1)
        return lambda: F.silu(F.normalize(x, dim=1) * channels**0.5 * gamma)
    if op == "upsample_nearest":
        return lambda: F.interpolate(x, scale_factor=2.0, mode="nearest-exact")
    raise ValueError(f"the binary times {op}, and this script has no such op")


def time_torch(op: str, shape: list[int], device: str, dtype: torch.dtype) -> float:
    """Median time of a call in milliseconds."""
    run = torch_op(op, shape, device, dtype)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None

    def seconds(calls: int) -> float:
        start = time.perf_counter()
        results = [run() for _ in range(calls)]
        wait()
        taken = time.perf_counter() - start
        del results
        return taken / calls

    seconds(1)
    calls = min(max(math.ceil(BATCH_SECONDS / seconds(1)), 1), MAX_CALLS)
    return statistics.median(seconds(calls) for _ in range(RUNS)) * 1e3


def time_kiln(command: list[str], threads: int) -> list[dict]:
    environment = os.environ | {"RAYON_NUM_THREADS": str(threads)}
    lines = subprocess.run(
        command, env=environment, check=True, stdout=subprocess.PIPE, text=True
    ).stdout.splitlines()
    return [json.loads(line) for line in lines]


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            capability = torch.backends.cpu.get_cpu_capability()
            return f"{line.split(':')[1].strip()} ({capability} in torch)"
    return platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("binary", type=Path)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="torch's device")
    parser.add_argument("--dtype", choices=["f32", "bf16", "f16"], default="f32")
    parser.add_argument("--shapes", choices=["small", "qwen-image"], default="small")
    parser.add_argument("--only", help="one op")
    parser.add_argument("--no-default", action="store_true", help="do not time burn's plain ops")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    dtype = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}[arguments.dtype]
    command = [str(arguments.binary), "--json", "--shapes", arguments.shapes]
    command += ["--dtype", arguments.dtype]
    if arguments.only:
        command += ["--only", arguments.only]
    if arguments.no_default:
        command.append("--no-default")

    ours: dict[tuple, list[dict]] = {}
    theirs: dict[tuple, list[float]] = {}
    with torch.inference_mode():
        for _ in range(arguments.rounds):
            for row in time_kiln(command, arguments.threads):
                case = (row["op"], *row["shape"])
                ours.setdefault(case, []).append(row)
                milliseconds = time_torch(row["op"], row["shape"], arguments.device, dtype)
                theirs.setdefault(case, []).append(milliseconds)

    print(f"{date.today()}, {device_name(arguments.device)}, {arguments.dtype},")
    print(f"{arguments.threads} threads, torch {torch.__version__}, {arguments.rounds} rounds")
    print("\n| op | shape | kiln ms | torch ms | ratio | default ms | first call ms |")
    print("|---|---|---|---|---|---|---|")
    for (op, *shape), rows in ours.items():
        ms = statistics.median(row["ms"] for row in rows)
        default_ms = "-"
        if not arguments.no_default:
            default_ms = f"{statistics.median(row['default_ms'] for row in rows):.3f}"
        torch_ms = statistics.median(theirs[op, *shape])
        size = "x".join(map(str, shape))
        first = f"{rows[0]['first_ms']:.1f}, {rows[-1]['first_ms']:.1f}"
        print(
            f"| {op} | {size} | {ms:.3f} | {torch_ms:.3f} | {ms / torch_ms:.2f} "
            f"| {default_ms} | {first} |"
        )


if __name__ == "__main__":
    main()
