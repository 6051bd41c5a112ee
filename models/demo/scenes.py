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
# Number of bands of a striped shape.
BANDS = {"small": 2, "large": 3}
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


def render(
    scene: Scene, height: int, width: int, rng: random.Random, jitter: float = 1.0, striped: bool = False
) -> np.ndarray:
    """Renders the scene antialiased, with random deviations of size and place in proportion to `jitter`.

    The bands of a striped shape are horizontal, and the gaps between them show the background. Returns uint8 values, [height, width, 3].
    """
    side = min(height, width)
    box = SIZES[scene.size] * side * (1 + jitter * rng.uniform(-0.07, 0.07))
    x, y = PLACES[scene.place]
    x = (x + jitter * rng.uniform(-0.025, 0.025)) * width
    y = (y + jitter * rng.uniform(-0.025, 0.025)) * height
    bands = BANDS[scene.size] if striped else 1
    return render_shape(scene.shape, scene.colour, scene.background, x, y, box, height, width, bands)


def render_shape(
    shape: str, colour: str, background: str, x: float, y: float, box: float, height: int, width: int, bands: int = 1
) -> np.ndarray:
    """Renders a shape whose square bounding box of side `box` pixels is centred on (x, y), cut into
    horizontal `bands` with gaps of the same height."""
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
    if bands > 1:
        stripe = box / (2 * bands - 1)
        # From the middle of the nearest band.
        from_band = np.abs((dy + half) % (2 * stripe) - stripe / 2)
        distance = np.maximum(distance, np.minimum(from_band, 2 * stripe - from_band) - stripe / 2)
    inside = np.clip(0.5 - distance, 0, 1)[..., None]
    image = np.array(COLOURS[background]) * (1 - inside) + np.array(COLOURS[colour]) * inside
    return np.round(image).astype(np.uint8)


def nearest_colour(colour: np.ndarray, tolerance: float = 70) -> str | None:
    """The name of the colour nearest to `colour` [3]; None if its distance exceeds `tolerance`."""
    distances = {name: np.linalg.norm(colour - np.array(rgb)) for name, rgb in COLOURS.items()}
    name = min(distances, key=distances.get)
    return name if distances[name] <= tolerance else None


@dataclasses.dataclass(frozen=True)
class Found:
    """What an image shows, by its colours alone."""

    # Median colours of the border, and of the pixels that differ from it.
    background: np.ndarray
    colour: np.ndarray | None
    # The pixels nearer to the shape's colour than to the background's, [height, width], and the columns and
    # the rows that have at least two of them.
    mask: np.ndarray
    columns: np.ndarray
    rows: np.ndarray

    @property
    def box(self) -> tuple[int, int, int, int]:
        """The bounding box of the shape: left, right, top, bottom."""
        return self.columns[0], self.columns[-1] + 1, self.rows[0], self.rows[-1] + 1


def find(image: np.ndarray) -> Found:
    """Separates shape and background of an image (uint8, [height, width, 3])."""
    height, width, _ = image.shape
    image = image.astype(np.float64)
    border = np.concatenate([image[:2].reshape(-1, 3), image[-2:].reshape(-1, 3),
                             image[:, :2].reshape(-1, 3), image[:, -2:].reshape(-1, 3)])  # fmt: skip
    background = np.median(border, axis=0)
    different = np.linalg.norm(image - background, axis=-1) > 60
    nothing = np.array([], dtype=int)
    if different.sum() < 0.005 * height * width:
        return Found(background, None, different & False, nothing, nothing)
    colour = np.median(image[different], axis=0)
    mask = np.linalg.norm(image - colour, axis=-1) < np.linalg.norm(image - background, axis=-1)
    columns, rows = (np.flatnonzero(mask.sum(axis=axis) >= 2) for axis in (0, 1))
    return Found(background, colour, mask, columns, rows)


def classify(image: np.ndarray) -> dict[str, str | None]:
    """Finds the attributes of the scene in an image (uint8, [height, width, 3]); None for those not found.

    The background is the median of the border. Pixels that differ from it are the shape; its bounding
    box gives place and size, and the share of the box that it fills gives the shape. The gaps of a
    striped shape do not count.
    """
    height, width, _ = image.shape
    attributes: dict[str, str | None] = dict.fromkeys(field.name for field in dataclasses.fields(Scene))
    found = find(image)
    attributes["background"] = nearest_colour(found.background)
    if found.colour is None:
        return attributes
    attributes["colour"] = nearest_colour(found.colour)
    if len(found.columns) == 0 or len(found.rows) == 0:
        return attributes
    left, right, top, bottom = found.box
    side = np.sqrt((right - left) * (bottom - top)) / min(height, width)
    attributes["size"] = "large" if side >= SMALLEST_LARGE else "small"
    centre = np.array([(left + right) / 2 / width, (top + bottom) / 2 / height])
    attributes["place"] = min(PLACES, key=lambda name: np.abs(centre - np.array(PLACES[name])).max())
    filled = found.mask[found.rows, left:right].mean()
    if filled >= LEAST_FILLED_SQUARE:
        attributes["shape"] = "square"
    else:
        attributes["shape"] = "circle" if filled >= LEAST_FILLED_CIRCLE else "triangle"
    return attributes


def stripe_contrast(image: np.ndarray, size: str) -> float:
    """How clearly the shape is striped: 1 if the gaps between its bands show the background, 0 if the shape is
    solid or not found.

    Divides the shape's bounding box into as many rows as a striped shape of this size has bands and gaps,
    and compares bands with gaps in its middle columns. The colour of a pixel counts as its share of the way
    from the background's colour to the shape's.
    """
    found = find(image)
    if len(found.columns) == 0 or len(found.rows) == 0:
        return 0.0
    towards = found.colour - found.background
    share = np.clip((image - found.background) @ towards / (towards @ towards), 0, 1)
    left, right, top, bottom = found.box
    middle, third = (left + right) // 2, max((right - left) // 3, 1)
    profile = share[:, middle - third // 2 : middle - third // 2 + third].mean(axis=1)
    stripe = (bottom - top) / (2 * BANDS[size] - 1)
    # The middle half of each stripe.
    starts = top + (np.arange(2 * BANDS[size] - 1) + 0.25) * stripe
    stripes = [profile[round(start) : max(round(start + stripe / 2), round(start) + 1)].mean() for start in starts]
    return float(np.mean(stripes[::2]) - np.mean(stripes[1::2]))
