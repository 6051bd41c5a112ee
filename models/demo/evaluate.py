# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.15.0", "diffusers==0.42.1", "transformers==5.23.0", "safetensors", "numpy", "pillow"]
# ///
"""Measures how often the images of the demo model match their prompts.

    python models/demo/evaluate.py                                # with diffusers
    python models/demo/evaluate.py --server http://127.0.0.1:8091 # with a running `kiln serve`
    python models/demo/evaluate.py --lora models/demo/lora/stripes.safetensors

Generates images of attribute combinations that `train.py` holds out, classifies each by geometry
(scenes.py) and prints the share of images with each attribute right, and how clearly the shapes are striped. With
--server it needs only numpy and pillow.
"""

from __future__ import annotations

import argparse
import base64
import collections
import io
import json
import math
import random
import urllib.request
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from scenes import HELD_OUT, caption, classify, stripe_contrast

ATTRIBUTES = ("background", "colour", "place", "size", "shape")
BOUNDS = {"background": 0.95, "colour": 0.95, "place": 0.95, "size": 0.95, "shape": 0.90}
OTHER_SIZES = ((96, 160), (192, 128))
# From this contrast on (scenes.stripe_contrast) a shape counts as striped.
STRIPED = 0.5
# Generates one image from prompt, height, width, steps, scale and seed.
Generate = Callable[[str, int, int, int, float, int], np.ndarray]


def diffusers_generate(model: Path, lora: Path | None, lora_scale: float, shift: float | None) -> Generate:
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline

    pipe = QwenImagePipeline.from_pretrained(model, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    if lora:
        pipe.load_lora_weights(lora, adapter_name="evaluated")
        pipe.set_adapters("evaluated", lora_scale)
    if shift:
        pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(
            pipe.scheduler.config, base_shift=math.log(shift), max_shift=math.log(shift), shift_terminal=None
        )

    def generate(prompt: str, height: int, width: int, steps: int, scale: float, seed: int) -> np.ndarray:
        image = pipe(
            prompt=prompt, negative_prompt=" ", true_cfg_scale=scale, height=height, width=width,
            num_inference_steps=steps, generator=torch.Generator("cpu").manual_seed(seed),
        ).images[0]  # fmt: skip
        return np.asarray(image)

    return generate


def server_generate(url: str, lora: Path | None, lora_scale: float, shift: float | None) -> Generate:
    def generate(prompt: str, height: int, width: int, steps: int, scale: float, seed: int) -> np.ndarray:
        settings = dict(
            height=height, width=width, num_inference_steps=steps, true_cfg_scale=scale, negative_prompt=" ",
            seed=seed,
        )  # fmt: skip
        if lora:
            settings["lora"] = {"name": lora.stem, "scale": lora_scale}
        if shift:
            settings["shift"] = shift
        body = {"messages": [{"role": "user", "content": prompt}], "extra_body": settings}
        request = urllib.request.Request(
            url.rstrip("/") + "/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as response:
            part = json.load(response)["choices"][0]["message"]["content"][0]
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(part["image_url"]["url"].split(",")[1]))))

    return generate


def measure(generate: Generate, count: int, height: int, width: int, steps: int, scale: float, save: Path | None) -> dict:
    """The share of `count` images with each attribute right, the share of images with a striped shape, and the
    mean contrast of the stripes."""
    rng = random.Random(f"evaluation {height} {width}")
    scenes = [rng.choice(HELD_OUT) for _ in range(count)]
    right = collections.Counter()
    contrasts = []
    for i, scene in enumerate(scenes):
        prompt = caption(scene, rng)
        image = generate(prompt, height, width, steps, scale, 10_000_000 + i)
        assert image.shape == (height, width, 3), image.shape
        found = classify(image)
        wrong = [name for name in ATTRIBUTES if found[name] != getattr(scene, name)]
        right.update(name for name in ATTRIBUTES if name not in wrong)
        right["all"] += not wrong
        contrasts.append(stripe_contrast(image, scene.size))
        if wrong:
            print(f"  {prompt!r}: " + ", ".join(f"{name} {found[name]}" for name in wrong), flush=True)
        if save:
            save.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(save / f"{height}x{width}-{i:03}{'-wrong' if wrong else ''}.png")
    shares = {name: right[name] / count for name in (*ATTRIBUTES, "all")}
    return shares | {"striped": np.mean(np.array(contrasts) >= STRIPED), "contrast": np.mean(contrasts)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", help="URL of a kiln server that serves the model")
    parser.add_argument("--model", type=Path, default=Path(__file__).parent, help="checkpoint to load with diffusers")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--lora", type=Path, help="adapter file; a server has it in its folder of adapters")
    parser.add_argument("--lora-scale", type=float, default=1.0)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--scale", type=float, default=4.0)
    parser.add_argument("--shift", type=float, help="fixed time shift, not stretched to a terminal sigma")
    parser.add_argument("--side", type=int, default=128)
    parser.add_argument("--other-count", type=int, default=40, help="number of images of each of the other sizes")
    parser.add_argument("--save", type=Path, help="folder for the images")
    args = parser.parse_args()
    if args.server:
        generate = server_generate(args.server, args.lora, args.lora_scale, args.shift)
    else:
        generate = diffusers_generate(args.model, args.lora, args.lora_scale, args.shift)
    failed = False
    for (height, width), count in [((args.side, args.side), args.count), *((s, args.other_count) for s in OTHER_SIZES)]:
        if count == 0:
            continue
        shares = measure(generate, count, height, width, args.steps, args.scale, args.save)
        print(f"{width}x{height}, {count} images: " + ", ".join(f"{k} {v:.1%}" for k, v in shares.items()), flush=True)
        bounds = BOUNDS if (height, width) == (args.side, args.side) else {k: BOUNDS[k] for k in ("background", "colour")}
        failed |= any(shares[name] < bound for name, bound in bounds.items())
    if failed:
        raise SystemExit("below the bounds")


if __name__ == "__main__":
    main()
