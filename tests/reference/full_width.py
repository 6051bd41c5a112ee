"""Builds a Qwen-Image checkpoint of full width and two layers, runs diffusers on it, compares dumps.

The real model has 58 GB. This checkpoint has its configuration except for the depth (2 transformer and 2
text encoder layers, a minimal vision tower), sharded random bf16 weights, the real vocabulary and the
whole VAE. It is too large for the fixtures, and serves to test memory layout, dtypes and speed at full
width. Not run in CI. Needs the versions pinned in requirements.txt (torch 2.15.0,
diffusers 0.42.1, transformers 5.23.0), about 12 GB of memory (mostly for f32), and a folder outside the repository:

    python tests/reference/full_width.py make DIR --tokenizer TOKENIZER_DIR
    python tests/reference/full_width.py reference DIR OUT.safetensors --dtype f32 --prompt "a red fox"
    python tests/reference/full_width.py compare A.safetensors B.safetensors
"""

from __future__ import annotations

import argparse
import math
import shutil
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from make_fixtures import REAL_SCHEDULER, Case, fill, load, run
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

LAYERS = 2
SHARD = "1GB"
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}

TRANSFORMER = dict(
    patch_size=2, in_channels=64, out_channels=16, num_layers=LAYERS, attention_head_dim=128,
    num_attention_heads=24, joint_attention_dim=3584, axes_dims_rope=(16, 56, 56),
)  # fmt: skip
TEXT = dict(
    vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=LAYERS,
    num_attention_heads=28, num_key_value_heads=4, rms_norm_eps=1e-6, max_position_embeddings=128000,
    rope_parameters={"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [16, 24, 24]},
)  # fmt: skip
VISION = dict(
    depth=1, hidden_size=8, intermediate_size=8, num_heads=2, patch_size=2, out_hidden_size=3584,
    fullatt_block_indexes=[0], window_size=8,
)  # fmt: skip


def make(folder: Path, tokenizer: Path, seed: int) -> None:
    """Builds the modules directly in bf16 (5 GB instead of 10) and saves them with the pipeline."""
    torch.set_default_dtype(torch.bfloat16)
    text_encoder = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=TEXT, vision_config=VISION))
    transformer = QwenImageTransformer2DModel(**TRANSFORMER)
    vae = AutoencoderKLQwenImage()  # the defaults are Qwen-Image's
    torch.set_default_dtype(torch.float32)
    for i, module in enumerate((text_encoder, transformer, vae)):
        assert module.dtype == torch.bfloat16
        fill(module, seed + i)
    pipe = QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**REAL_SCHEDULER),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=AutoTokenizer.from_pretrained(tokenizer),
        transformer=transformer,
    )
    pipe.save_pretrained(folder, max_shard_size=SHARD)
    shutil.rmtree(folder / "tokenizer")
    (folder / "tokenizer").mkdir()
    for path in tokenizer.iterdir():
        shutil.copyfile(path, folder / "tokenizer" / path.name)


def reference(folder: Path, out: Path, case: Case, dtype: torch.dtype) -> None:
    """Runs diffusers once and writes the stages to a file."""
    stages = run(load(folder, dtype), case)
    save_file(stages, out)
    image = stages["image_float"]
    print(f"{out}: {len(stages)} stages, image mean {image.mean():.3f}, std {image.std():.3f}")


def compare(path_a: Path, path_b: Path) -> None:
    """Prints the differences between the stages, relative to the largest magnitude of each stage of A."""
    a, b = load_file(path_a), load_file(path_b)
    for path, names in ((path_a, a.keys() - b.keys()), (path_b, b.keys() - a.keys())):
        if names:
            print(f"only in {path}: {', '.join(sorted(names))}")
    print(f"{'stage':28}{'largest':>10}{'max diff':>11}{'mean diff':>11}{'cosine':>12}")
    for name in sorted(a.keys() & b.keys()):
        if a[name].shape != b[name].shape:
            print(f"{name:28} shapes differ: {list(a[name].shape)} and {list(b[name].shape)}")
            continue
        if not a[name].is_floating_point():
            equal = (a[name] == b[name]).double().mean().item()
            print(f"{name:28} {100 * equal:.3f} % equal")
            continue
        x, y = a[name].double().flatten(), b[name].double().flatten()
        largest = max(x.abs().max().item(), 1e-30)
        diff = (x - y).abs() / largest
        cosine = torch.dot(x, y) / (x.norm() * y.norm()).clamp(min=1e-30)
        print(f"{name:28}{largest:10.4g}{diff.max():11.3g}{diff.mean():11.3g}{cosine:12.8f}")
    if a["image_float"].shape == b["image_float"].shape:
        mse = (a["image_float"].double() - b["image_float"].double()).square().mean().item()
        psnr = -10 * math.log10(mse) if mse > 0 else math.inf
        print(f"image: PSNR {psnr:.2f} dB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    commands = parser.add_subparsers(dest="command", required=True)

    command = commands.add_parser("make", help="build the checkpoint")
    command.add_argument("folder", type=Path, help="output folder outside the repository, 5 GB")
    command.add_argument("--tokenizer", type=Path, required=True, help="folder with Qwen's tokenizer files")
    command.add_argument("--seed", type=int, default=1000)

    command = commands.add_parser("reference", help="run diffusers and write its stages")
    command.add_argument("folder", type=Path)
    command.add_argument("out", type=Path)
    command.add_argument("--dtype", choices=DTYPES, default="f32")
    command.add_argument("--prompt", required=True)
    command.add_argument("--negative")
    command.add_argument("--scale", type=float, default=4.0)
    command.add_argument("--steps", type=int, default=4)
    command.add_argument("--height", type=int, default=256)
    command.add_argument("--width", type=int, default=256)
    command.add_argument("--seed", type=int, default=42)

    command = commands.add_parser("compare", help="compare two dumps")
    command.add_argument("a", type=Path)
    command.add_argument("b", type=Path)

    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.command == "make":
        make(args.folder, args.tokenizer, args.seed)
    elif args.command == "reference":
        case = Case(
            "full_width",
            prompt=args.prompt,
            negative_prompt=args.negative,
            true_cfg_scale=args.scale,
            height=args.height,
            width=args.width,
            num_inference_steps=args.steps,
            seed=args.seed,
            details=True,
        )
        reference(args.folder, args.out, case, DTYPES[args.dtype])
    else:
        compare(args.a, args.b)


if __name__ == "__main__":
    main()
