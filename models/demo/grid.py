# /// script
# requires-python = ">=3.11"
# dependencies = ["numpy", "pillow"]
# ///
"""Generates the grid of eight images in kiln's README with a running `kiln serve`.

    python models/demo/grid.py docs/demo.png --server http://127.0.0.1:8091
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from evaluate import server_generate

PROMPTS = (
    "a large red circle on a blue background",
    "a small yellow square in the top left corner on a purple background",
    "a big white triangle at the bottom on a green background",
    "black background with a tiny orange circle on the right",
    "a large green square on a white background",
    "orange background with a small black triangle at the top",
    "a picture of a large blue circle on the left, yellow background",
    "little white square in the bottom right corner, red background",
)
COLUMNS, GAP, SEED, STEPS, SCALE = 4, 8, 42, 20, 4.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--server", default="http://127.0.0.1:8091")
    parser.add_argument("--side", type=int, default=128)
    args = parser.parse_args()
    generate = server_generate(args.server)
    images = [generate(prompt, args.side, args.side, STEPS, SCALE, SEED) for prompt in PROMPTS]
    framed = [np.pad(image, ((GAP, 0), (GAP, 0), (0, 0)), constant_values=128) for image in images]
    rows = [np.concatenate(framed[i : i + COLUMNS], axis=1) for i in range(0, len(framed), COLUMNS)]
    grid = np.pad(np.concatenate(rows), ((0, GAP), (0, GAP), (0, 0)), constant_values=128)
    Image.fromarray(grid).save(args.output)


if __name__ == "__main__":
    main()
