# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.15.0", "diffusers==0.42.1", "transformers==5.23.0", "safetensors", "numpy", "pillow"]
# ///
"""Measures how often the demo model draws what the prompt says.

    python models/demo/evaluate.py                                # with diffusers
    python models/demo/evaluate.py --server http://127.0.0.1:8091 # with a running `kiln serve`

Draws prompts of attribute combinations that `train.py` never trains on, reads every picture back by
geometry (scenes.py) and prints the share of pictures with each attribute right. With --server it needs
numpy and pillow only.
"""

from __future__ import annotations

import argparse
import base64
import collections
import io
import json
import random
import urllib.request
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from scenes import HELD_OUT, caption, classify

ATTRIBUTES = ("background", "colour", "place", "size", "shape")
BOUNDS = {"background": 0.95, "colour": 0.95, "place": 0.95, "size": 0.95, "shape": 0.90}
OTHER_SIZES = ((96, 160), (192, 128))
# Draws one picture from prompt, height, width, steps, scale and seed.
Draw = Callable[[str, int, int, int, float, int], np.ndarray]


def diffusers_draw(model: Path) -> Draw:
    import torch
    from diffusers import QwenImagePipeline

    pipe = QwenImagePipeline.from_pretrained(model, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)

    def draw(prompt: str, height: int, width: int, steps: int, scale: float, seed: int) -> np.ndarray:
        image = pipe(
            prompt=prompt, negative_prompt=" ", true_cfg_scale=scale, height=height, width=width,
            num_inference_steps=steps, generator=torch.Generator("cpu").manual_seed(seed),
        ).images[0]  # fmt: skip
        return np.asarray(image)

    return draw


def server_draw(url: str) -> Draw:
    def draw(prompt: str, height: int, width: int, steps: int, scale: float, seed: int) -> np.ndarray:
        settings = dict(
            height=height, width=width, num_inference_steps=steps, true_cfg_scale=scale, negative_prompt=" ",
            seed=seed,
        )  # fmt: skip
        body = {"messages": [{"role": "user", "content": prompt}], "extra_body": settings}
        request = urllib.request.Request(
            url.rstrip("/") + "/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as response:
            part = json.load(response)["choices"][0]["message"]["content"][0]
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(part["image_url"]["url"].split(",")[1]))))

    return draw


def measure(draw: Draw, count: int, height: int, width: int, steps: int, scale: float, save: Path | None) -> dict:
    """Share of `count` pictures with each attribute right."""
    rng = random.Random(f"evaluation {height} {width}")
    scenes = [rng.choice(HELD_OUT) for _ in range(count)]
    right = collections.Counter()
    for i, scene in enumerate(scenes):
        prompt = caption(scene, rng)
        picture = draw(prompt, height, width, steps, scale, 10_000_000 + i)
        assert picture.shape == (height, width, 3), picture.shape
        found = classify(picture)
        wrong = [name for name in ATTRIBUTES if found[name] != getattr(scene, name)]
        right.update(name for name in ATTRIBUTES if name not in wrong)
        right["all"] += not wrong
        if wrong:
            print(f"  {prompt!r}: " + ", ".join(f"{name} {found[name]}" for name in wrong), flush=True)
        if save:
            save.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(save / f"{height}x{width}-{i:03}{'-wrong' if wrong else ''}.png")
    return {name: right[name] / count for name in (*ATTRIBUTES, "all")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", help="URL of a kiln server that serves the model")
    parser.add_argument("--model", type=Path, default=Path(__file__).parent, help="checkpoint to draw with diffusers")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--scale", type=float, default=4.0)
    parser.add_argument("--side", type=int, default=128)
    parser.add_argument("--other-count", type=int, default=40, help="pictures of each of the other sizes")
    parser.add_argument("--save", type=Path, help="folder for the pictures")
    args = parser.parse_args()
    draw = server_draw(args.server) if args.server else diffusers_draw(args.model)
    failed = False
    for (height, width), count in [((args.side, args.side), args.count), *((s, args.other_count) for s in OTHER_SIZES)]:
        if count == 0:
            continue
        shares = measure(draw, count, height, width, args.steps, args.scale, args.save)
        print(f"{width}x{height}, {count} pictures: " + ", ".join(f"{k} {v:.1%}" for k, v in shares.items()), flush=True)
        bounds = BOUNDS if (height, width) == (args.side, args.side) else {k: BOUNDS[k] for k in ("background", "colour")}
        failed |= any(shares[name] < bound for name, bound in bounds.items())
    if failed:
        raise SystemExit("below the bounds")


if __name__ == "__main__":
    main()
