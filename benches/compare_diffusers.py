"""Compares the speed of kiln on flex and of diffusers on torch, with the same weights on the same two cores.

    python benches/compare_diffusers.py make FOLDER          # a mid-size checkpoint, once
    cargo bench --bench stages --no-run                      # prints the path of the binary
    python benches/compare_diffusers.py run FOLDER BINARY [--sizes 256 512] [--rounds 3]

Needs tests/reference/requirements.txt. The checkpoint has random weights: a transformer of width
768 (6 heads of 128, 4 layers), a text encoder of width 768 (4 layers), and the real VAE's
configuration. The figures are medians over the rounds; the ratio is kiln's time to torch's.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

PROMPT = "A red fox in the snow, watercolor"
THREADS = 2
STEPS = 3


def make(folder: Path) -> None:
    """Saves the checkpoint with diffusers' classes and the tokenizer of a test fixture."""
    import torch
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )
    from transformers import AutoTokenizer, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(0)
    fixtures = Path(__file__).parent.parent / "tests" / "fixtures" / "checkpoints" / "base"
    tokenizer = AutoTokenizer.from_pretrained(fixtures / "tokenizer")
    text_encoder = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config={
                "vocab_size": len(tokenizer) + 16,
                "hidden_size": 768,
                "intermediate_size": 2048,
                "num_hidden_layers": 4,
                "num_attention_heads": 6,
                "num_key_value_heads": 2,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 1e6,
                    "mrope_section": [16, 24, 24],
                },
            },
            vision_config={
                "depth": 1,
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_heads": 2,
                "out_hidden_size": 768,
            },
        )
    )
    transformer = QwenImageTransformer2DModel(
        num_layers=4, num_attention_heads=6, attention_head_dim=128, joint_attention_dim=768
    )
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        max_image_seq_len=8192,
        max_shift=0.9,
        shift_terminal=0.02,
    )
    pipeline = QwenImagePipeline(
        scheduler=scheduler,
        vae=AutoencoderKLQwenImage(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=transformer,
    )
    pipeline.save_pretrained(folder)
    # As on the Hub, without tokenizer.json.
    (folder / "tokenizer" / "tokenizer.json").unlink(missing_ok=True)
    for file in (fixtures / "tokenizer").iterdir():
        (folder / "tokenizer" / file.name).write_bytes(file.read_bytes())


def peak_mib() -> float:
    """Peak resident memory since the last call."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            peak = int(line.split()[1]) / 1024
    Path("/proc/self/clear_refs").write_text("5")
    return peak


def torch_stages(folder: Path, size: int) -> None:
    """Generates one image with diffusers; prints the same JSON as the bench `stages`."""
    start = time.perf_counter()
    import torch
    from diffusers import QwenImagePipeline

    torch.set_num_threads(THREADS)
    peak_mib()
    before = time.perf_counter()
    pipeline = QwenImagePipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    result: dict = {"load": {"seconds": time.perf_counter() - before, "peak_mib": peak_mib()}}

    def timed(function, record):
        def wrapper(*args, **kwargs):
            peak_mib()
            began = time.perf_counter()
            value = function(*args, **kwargs)
            record({"seconds": time.perf_counter() - began, "peak_mib": peak_mib()})
            return value

        return wrapper

    encodes: list[dict] = []
    pipeline.encode_prompt = timed(pipeline.encode_prompt, encodes.append)
    decode: list[dict] = []
    pipeline.vae.decode = timed(pipeline.vae.decode, decode.append)
    marks: list[float] = []
    peaks: list[float] = []
    step = pipeline.scheduler.step

    def stepped(*args, **kwargs):
        value = step(*args, **kwargs)
        marks.append(time.perf_counter())
        peaks.append(peak_mib())
        return value

    set_timesteps = pipeline.scheduler.set_timesteps

    @functools.wraps(set_timesteps)  # the pipeline inspects its signature
    def started(*args, **kwargs):
        value = set_timesteps(*args, **kwargs)
        marks.append(time.perf_counter())
        result["process_start_to_first_step"] = marks[0] - start
        return value

    pipeline.scheduler.step = stepped
    pipeline.scheduler.set_timesteps = started
    pipeline(
        PROMPT,
        negative_prompt=" ",
        true_cfg_scale=4.0,
        height=size,
        width=size,
        num_inference_steps=STEPS,
        generator=torch.Generator("cpu").manual_seed(42),
        output_type="np",
    )
    result["encode"] = {
        "seconds": sum(e["seconds"] for e in encodes),
        "peak_mib": max(e["peak_mib"] for e in encodes),
    }
    result["steps"] = [
        {"seconds": b - a, "peak_mib": peak} for a, b, peak in zip(marks, marks[1:], peaks)
    ]
    result["decode"] = decode[0]
    print(json.dumps(result))


def run(folder: Path, binary: Path, sizes: list[int], rounds: int) -> None:
    """Runs the two programs alternately and prints a table."""
    print("| image | stage | kiln s | torch s | ratio | kiln peak MiB | torch peak MiB |")
    print("|---|---|---|---|---|---|---|")
    for size in sizes:
        ours, theirs = [], []
        for _ in range(rounds):
            kiln = [str(binary), str(folder), str(size), str(size), str(STEPS), "f32"]
            torch = [sys.executable, __file__, "torch", str(folder), str(size)]
            for command, results in ((kiln, ours), (torch, theirs)):
                output = subprocess.run(command, check=True, capture_output=True, text=True)
                results.append(json.loads(output.stdout.splitlines()[-1]))
        for name, stage in (
            ("load", lambda r: r["load"]),
            ("prompts and schedule", lambda r: r["encode"]),
            ("first step", lambda r: r["steps"][0]),
            ("later step", lambda r: r["steps"][-1]),
            ("VAE decode", lambda r: r["decode"]),
        ):
            row(size, name, [stage(r) for r in ours], [stage(r) for r in theirs])
        to_first = "process_start_to_first_step"
        row(size, "process start to first step", *(
            [{"seconds": r[to_first], "peak_mib": None} for r in results]
            for results in (ours, theirs)
        ))


def row(size: int, name: str, ours: list[dict], theirs: list[dict]) -> None:
    seconds = [statistics.median(r["seconds"] for r in side) for side in (ours, theirs)]
    ratios = [a["seconds"] / b["seconds"] for a, b in zip(ours, theirs)]
    peaks = [
        "" if side[0]["peak_mib"] is None else f"{statistics.median(r['peak_mib'] for r in side):.0f}"
        for side in (ours, theirs)
    ]
    print(
        f"| {size}² | {name} | {seconds[0]:.3f} | {seconds[1]:.3f} "
        f"| {statistics.median(ratios):.2f} | {peaks[0]} | {peaks[1]} |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("make").add_argument("folder", type=Path)
    one = commands.add_parser("torch", help="generate one image with diffusers; used by run")
    one.add_argument("folder", type=Path)
    one.add_argument("size", type=int)
    all_ = commands.add_parser("run")
    all_.add_argument("folder", type=Path)
    all_.add_argument("binary", type=Path)
    all_.add_argument("--sizes", type=int, nargs="+", default=[256, 512])
    all_.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    if args.command == "make":
        make(args.folder)
    elif args.command == "torch":
        torch_stages(args.folder, args.size)
    else:
        run(args.folder, args.binary, args.sizes, args.rounds)


if __name__ == "__main__":
    main()
