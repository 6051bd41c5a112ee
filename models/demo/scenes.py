"""The scenes of the demo model: one coloured shape of a given size and place on a coloured background.

Renders scenes as images, writes captions for them, and classifies an image by geometry.
"""

from __future__ import annotations

import dataclasses
import itertools
import random

import numpy as np

COLOURS = {
    "red": (214, 40, 44),
    "orange": (246, 128, 18),
    "yellow": (252, 222, 64),
    "green": (42, 158, 72),
    "blue": (38, 84, 204),
    "purple": (136, 52, 164),
    "white": (244, 244, 244),
    "black": (18, 18, 20),
}
SHAPES = ("circle", "square", "triangle")
# Side of the shape's bounding box, as a share of the image's shorter side.
SIZES = {"small": 0.24, "large": 0.44}
SMALLEST_LARGE = 0.34
# Centre of the shape's bounding box, as shares of the image's width and height.
NEAR, MIDDLE, FAR = 0.27, 0.5, 0.73
PLACES = {
    "top left": (NEAR, NEAR),
    "top": (MIDDLE, NEAR),
    "top right": (FAR, NEAR),
    "left": (NEAR, MIDDLE),
    "center": (MIDDLE, MIDDLE),
    "right": (FAR, MIDDLE),
    "bottom left": (NEAR, FAR),
    "bottom": (MIDDLE, FAR),
    "bottom right": (FAR, FAR),
}
# Share of the bounding box that each shape fills: square 1, circle pi/4, triangle 1/2.
LEAST_FILLED_SQUARE, LEAST_FILLED_CIRCLE = 0.89, 0.64

SIZE_WORDS = {"small": ("small", "small", "little", "tiny"), "large": ("large", "large", "big", "huge")}
PLACE_WORDS = {
    "top": ("at the top",),
    "bottom": ("at the bottom",),
    "left": ("on the left", "at the left"),
    "right": ("on the right", "at the right"),
    "center": ("in the center", "in the centre", "in the middle"),
}
WORDINGS = (
    "a {size} {colour} {shape}{place} on a {background} background",
    "a {size} {colour} {shape} on a {background} background{place}",
    "{background} background with a {size} {colour} {shape}{place}",
    "a picture of a {size} {colour} {shape}{place}, {background} background",
    "{size} {colour} {shape}{place}, {background} background",
)


@dataclasses.dataclass(frozen=True)
class Scene:
    background: str
    colour: str
    shape: str
    size: str
    place: str


SCENES = [
    Scene(*values)
    for values in itertools.product(COLOURS, COLOURS, SHAPES, SIZES, PLACES)
    if values[0] != values[1]
]
# A tenth of all combinations is held out from training; `evaluate.py` generates these.
HELD_OUT = random.Random("held out").sample(SCENES, len(SCENES) // 10)
TRAINED = [scene for scene in SCENES if scene not in HELD_OUT]


def caption(scene: Scene, rng: random.Random) -> str:
    """A random caption of the scene. Without a place it means the centre, without a size a large shape."""
    if scene.place in PLACE_WORDS:
        place = " " + rng.choice(PLACE_WORDS[scene.place])
    else:
        place = " " + rng.choice(("in the {}", "in the {} corner", "at the {}")).format(scene.place)
    if scene.place == "center" and rng.random() < 0.6:
        place = ""
    size = rng.choice(SIZE_WORDS[scene.size])
    if scene.size == "large" and rng.random() < 0.2:
        size = ""
    wording = WORDINGS[0] if rng.random() < 0.3 else rng.choice(WORDINGS)
    words = wording.format(
        size=size, colour=scene.colour, shape=scene.shape, place=place, background=scene.background
    ).split()
    for i, word in enumerate(words[:-1]):
        if word == "a" and words[i + 1] == "orange":
            words[i] = "an"
    text = " ".join(words)
    if rng.random() < 0.15:
        text = text[0].upper() + text[1:]
    return text + "." if rng.random() < 0.15 else text


def render(scene: Scene, height: int, width: int, rng: random.Random, jitter: float = 1.0) -> np.ndarray:
    """Renders the scene antialiased, with random deviations of size and place in proportion to `jitter`.

    Returns uint8 values, [height, width, 3].
    """
    side = min(height, width)
    box = SIZES[scene.size] * side * (1 + jitter * rng.uniform(-0.07, 0.07))
    x, y = PLACES[scene.place]
    x = (x + jitter * rng.uniform(-0.025, 0.025)) * width
    y = (y + jitter * rng.uniform(-0.025, 0.025)) * height
    return render_shape(scene.shape, scene.colour, scene.background, x, y, box, height, width)


def render_shape(
    shape: str, colour: str, background: str, x: float, y: float, box: float, height: int, width: int
) -> np.ndarray:
    """Renders a shape whose square bounding box of side `box` pixels is centred on (x, y)."""
    dx = np.abs(np.arange(width)[None, :] + 0.5 - x)
    dy = np.arange(height)[:, None] + 0.5 - y
    half = box / 2
    if shape == "circle":
        distance = np.hypot(dx, dy) - half
    elif shape == "square":
        distance = np.maximum(dx, np.abs(dy)) - half
    else:
        # Two sides of slope 2 from the apex at the top, and the base.
        distance = np.maximum((2 * dx - dy - half) / np.sqrt(5), dy - half)
    inside = np.clip(0.5 - distance, 0, 1)[..., None]
    image = np.array(COLOURS[background]) * (1 - inside) + np.array(COLOURS[colour]) * inside
    return np.round(image).astype(np.uint8)


def nearest_colour(pixels: np.ndarray, tolerance: float = 70) -> str | None:
    """The colour nearest to the median of pixels [n, 3]; None if its distance exceeds `tolerance`."""
    median = np.median(pixels, axis=0)
    distances = {name: np.linalg.norm(median - np.array(rgb)) for name, rgb in COLOURS.items()}
    name = min(distances, key=distances.get)
    return name if distances[name] <= tolerance else None


def classify(image: np.ndarray) -> dict[str, str | None]:
    """Finds the attributes of the scene in an image (uint8, [height, width, 3]); None for those not found.

    The background is the median of the border. Pixels that differ from it are the shape; its bounding
    box gives place and size, and the share of the box that it fills gives the shape.
    """
    height, width, _ = image.shape
    image = image.astype(np.float64)
    border = np.concatenate([image[:2].reshape(-1, 3), image[-2:].reshape(-1, 3),
                             image[:, :2].reshape(-1, 3), image[:, -2:].reshape(-1, 3)])  # fmt: skip
    found: dict[str, str | None] = dict.fromkeys(field.name for field in dataclasses.fields(Scene))
    found["background"] = nearest_colour(border)
    background = np.median(border, axis=0)
    different = np.linalg.norm(image - background, axis=-1) > 60
    if different.sum() < 0.005 * height * width:
        return found
    colour = np.median(image[different], axis=0)
    found["colour"] = nearest_colour(image[different])
    mask = np.linalg.norm(image - colour, axis=-1) < np.linalg.norm(image - background, axis=-1)
    columns, rows = (np.flatnonzero(mask.sum(axis=axis) >= 2) for axis in (0, 1))
    if len(columns) == 0 or len(rows) == 0:
        return found
    left, right, top, bottom = columns[0], columns[-1] + 1, rows[0], rows[-1] + 1
    box_width, box_height = right - left, bottom - top
    side = np.sqrt(box_width * box_height) / min(height, width)
    found["size"] = "large" if side >= SMALLEST_LARGE else "small"
    centre = np.array([(left + right) / 2 / width, (top + bottom) / 2 / height])
    found["place"] = min(PLACES, key=lambda name: np.abs(centre - np.array(PLACES[name])).max())
    filled = mask[top:bottom, left:right].mean()
    if filled >= LEAST_FILLED_SQUARE:
        found["shape"] = "square"
    else:
        found["shape"] = "circle" if filled >= LEAST_FILLED_CIRCLE else "triangle"
    return found
