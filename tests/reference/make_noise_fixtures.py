#!/usr/bin/env python3
"""Writes tests/fixtures/noise/noise_torch_2_15_0.safetensors for `kiln_models::noise`.

Needs torch==2.15.0, numpy==2.4.6, safetensors==0.8.0, an x86-64 CPU with AVX2, no GPU.

Tensors, by name:
- `cpu/<seed>/<count>`: `torch.randn(count)` of a CPU generator, f32.
- `cpu_checksum/<seed>/<count>`: one u64 for a longer sequence: the sum over i of (i + 1) * bits of value i,
  modulo 2^64.
- `cuda/<seed>/<count>/<multiprocessors>`: the values of a CUDA generator on a GPU with 2048 threads per
  multiprocessor. No GPU is used: the launch is simulated with numpy, thread by thread, from the
  published Philox4x32-10, in f64 after the random integers. It is checked against the known answers of
  Random123 and against torch's own Philox on the CPU.
- `cpu_nth/<seed>/<count>/<draws>`, `cuda_nth/<seed>/<count>/<multiprocessors>/<draws>`: the same after `draws`
  draws of `count` values.

With `--check` it also prints the measurements that the module's documentation states.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file

OUTPUT = Path(__file__).parents[1] / "fixtures" / "noise" / "noise_torch_2_15_0.safetensors"
SEEDS = [0, 1, 42, 2**31 - 1, 2**32 + 7, 2**63 + 11, 2**64 - 1]
LATENT = 16 * 128 * 128  # 1024x1024 pixels
BLOCK = 256


def cpu(seed: int, count: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator("cpu").manual_seed(seed), dtype=dtype)


def cpu_nth(seed: int, count: int, draws: int) -> torch.Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return [torch.randn(count, generator=generator) for _ in range(draws + 1)][-1]


def checksum(values: np.ndarray) -> np.ndarray:
    weights = np.arange(1, len(values) + 1, dtype=np.uint64)
    return (values.view(np.uint32).astype(np.uint64) * weights).sum(dtype=np.uint64, keepdims=True)


def philox(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Philox4x32-10: counters `[n, 4]` to words `[n, 4]`."""
    low = np.uint64(0xFFFFFFFF)
    word = [counter[:, i].astype(np.uint64) for i in range(4)]
    for turn in range(10):
        bump0 = np.uint64((key[0] + turn * 0x9E3779B9) & 0xFFFFFFFF)
        bump1 = np.uint64((key[1] + turn * 0xBB67AE85) & 0xFFFFFFFF)
        a = word[0] * np.uint64(0xD2511F53)
        b = word[2] * np.uint64(0xCD9E8D57)
        shift = np.uint64(32)
        high0, high1 = (b >> shift) ^ word[1] ^ bump0, (a >> shift) ^ word[3] ^ bump1
        word = [high0, b & low, high1, a & low]
    return np.stack(word, axis=1)


def normal4(words: np.ndarray) -> np.ndarray:
    """Converts four words to four normal values as cuRAND does: two pairs, sine before cosine."""
    unit = 2.0**-32
    turn = float(np.float32(unit) * np.float32(2 * np.pi))
    as_f32 = words.astype(np.float32).astype(np.float64)
    uniform = (as_f32[:, 0::2] * unit + unit / 2).astype(np.float32).astype(np.float64)
    angle = (as_f32[:, 1::2] * turn + turn / 2).astype(np.float32).astype(np.float64)
    radius = np.sqrt(-2 * np.log(uniform))
    pairs = np.stack([radius * np.sin(angle), radius * np.cos(angle)], axis=2)
    return pairs.reshape(-1, 4).astype(np.float32)


def cuda(seed: int, count: int, multiprocessors: int, draws: int = 0) -> np.ndarray:
    """The grid-stride loop of PyTorch's distribution kernels, all threads of an iteration at once, after
    `draws` draws of the same size."""
    blocks = min(-(-count // BLOCK), multiprocessors * (2048 // BLOCK))
    threads = np.arange(blocks * BLOCK)
    out = np.full(count, np.nan, np.float32)
    starts = range(0, count, 4 * len(threads))
    for offset, start in enumerate(starts, draws * len(starts)):
        counter = np.zeros((len(threads), 4), np.uint64)
        counter[:, 0] = offset
        counter[:, 2] = threads
        normals = normal4(philox(counter, (seed & 0xFFFFFFFF, seed >> 32)))
        for lane in range(4):
            index = start + threads + lane * len(threads)
            out[index[index < count]] = normals[index < count, lane]
    assert not np.isnan(out).any()
    return out


def check_philox() -> None:
    known = [
        ([0] * 4, (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, (0xFFFFFFFF, 0xFFFFFFFF), "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ]
    for counter, key, answer in known:
        words = philox(np.array([counter], np.uint64), key)[0]
        assert " ".join(f"{word:08x}" for word in words) == answer
    # torch's stateless Philox is the stream of thread 0, with the values of each pair swapped.
    seed, count = 2**40 + 5, 4096
    key = torch.tensor([seed, 0], dtype=torch.uint64)
    expected = torch.ops.aten._philox_normal(torch.empty(count), key).numpy()
    counter = np.zeros((count // 4, 4), np.uint64)
    counter[:, 0] = np.arange(count // 4)
    ours = normal4(philox(counter, (seed & 0xFFFFFFFF, seed >> 32))).reshape(-1, 2)[:, ::-1]
    worst = np.abs(ours.reshape(-1) - expected).max()
    assert worst < 1e-6, worst
    print(f"largest difference from torch's stateless Philox: {worst:.2e}")


def print_facts() -> None:
    print("capability:", torch.backends.cpu.get_cpu_capability())
    equal = {"below 16": 0, "multiple of 16": 0, "other": 0}
    total = dict.fromkeys(equal, 0)
    for seed in SEEDS:
        for count in [*range(1, 200), 1000, 4101, LATENT]:
            kind = "below 16" if count < 16 else "multiple of 16" if count % 16 == 0 else "other"
            same = cpu(seed, count, torch.bfloat16) == cpu(seed, count).bfloat16()
            assert same[: max(count - 16, 0)].all()
            total[kind] += 1
            equal[kind] += bool(same.all())
    for kind in equal:
        print(f"bf16 draws equal to the rounded f32 draw, {kind}: {equal[kind]} of {total[kind]}")


def main() -> None:
    assert torch.__version__.split("+")[0] == "2.15.0", torch.__version__
    assert torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    check_philox()
    tensors = {}
    for seed in SEEDS:
        for count in range(1, 71) if seed in (0, 2**64 - 1) else (1, 2, 15, 16, 17, 31, 70):
            tensors[f"cpu/{seed}/{count}"] = cpu(seed, count).numpy()
        tensors[f"cpu/{seed}/1000"] = cpu(seed, 1000).numpy()
        for count in (4096 + 5, 65536):
            tensors[f"cpu_checksum/{seed}/{count}"] = checksum(cpu(seed, count).numpy())
    tensors[f"cpu_checksum/42/{LATENT}"] = checksum(cpu(42, LATENT).numpy())
    for seed in SEEDS:
        for count in (1, 257, 1000):
            tensors[f"cuda/{seed}/{count}/132"] = cuda(seed, count, 132)
    for count in (2048, 2049, 8192, 8193, 20000):  # one wave of this GPU is 2048
        tensors[f"cuda/1234/{count}/1"] = cuda(1234, count, 1)
    draws_of_cpu = [(0, 7, 3), (42, 15, 2), (7, 16, 1), (7, 17, 2), (7, 33, 5), (3, 640, 4), (2**64 - 1, 1000, 3)]
    for seed, count, draws in draws_of_cpu:
        tensors[f"cpu_nth/{seed}/{count}/{draws}"] = cpu_nth(seed, count, draws).numpy()
    for count, draws in [(1000, 2), (8192, 1), (8193, 1), (20000, 3)]:
        tensors[f"cuda_nth/1234/{count}/1/{draws}"] = cuda(1234, count, 1, draws)
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, OUTPUT, metadata={"made_with": f"torch 2.15.0, numpy {np.__version__}"})
    print(f"{OUTPUT}: {OUTPUT.stat().st_size} bytes")
    if "--check" in sys.argv[1:]:
        print_facts()


if __name__ == "__main__":
    main()
