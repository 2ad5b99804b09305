"""The embedded model's world: captions of coloured shapes (grammar version 1), and the pictures they are true of.

Grammar, with `a` or `an` as English has it and all colours of a picture different:

    a [small|large] COLOR SHAPE on a COLOR background
    a COLOR SHAPE RELATION a COLOR SHAPE on a COLOR background

Version 1 is frozen: every quality figure refers to it, so `sample` must draw the same stream from a given
`random.Random` for ever. Lengths are fractions of the picture's side, y points down.
"""

from __future__ import annotations

import math
import random
import re
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from edgesd.errors import RequestError

GRAMMAR_VERSION = 1
SIZE_PX = 128
COLORS = {
    "red": (220, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (245, 220, 60),
    "green": (50, 160, 70),
    "cyan": (60, 200, 210),
    "blue": (45, 80, 210),
    "purple": (130, 60, 180),
    "pink": (245, 140, 190),
    "white": (245, 245, 245),
    "black": (25, 25, 25),
}
SHAPES = ("circle", "square", "triangle", "star", "heart", "ring", "cross", "diamond")
ROUND = ("circle", "ring")  # the others are polygons
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}  # first seen from second
SIZES = {"small": (0.15, 0.19), "": (0.20, 0.27), "large": (0.29, 0.37)}  # half-extent, lowest and highest
PAIR_SIZE = (0.15, 0.22)
RING_HOLE = 0.55
HELD_OUT_SEED = 77  # evaluation captions; training must not use this stream

_THING = rf"({'|'.join(COLORS)}) ({'|'.join(SHAPES)})"
_CAPTION = re.compile(
    rf"an? (?:(?:small|large) )?{_THING}(?: ({'|'.join(RELATIONS)}) an? {_THING})?"
    rf" on an? ({'|'.join(COLORS)}) background"
)


@dataclass(frozen=True)
class Placed:
    """One object: its centre x, y and its half-extent, all 0..1."""

    color: str
    shape: str
    x: float
    y: float
    extent: float


@dataclass(frozen=True)
class Scene:
    """A picture to be: what `render` draws."""

    background: str
    objects: tuple[Placed, ...]


@dataclass(frozen=True)
class Description:
    """What a caption says: objects as (color, shape), one or two; relation of the first to the second."""

    background: str
    objects: tuple[tuple[str, str], ...]
    relation: str | None


def sample(rng: random.Random) -> tuple[str, Scene]:
    """One caption and a scene it is true of. The order of draws is part of the grammar's version."""
    background = rng.choice(list(COLORS))
    rest = [color for color in COLORS if color != background]
    draw = _sample_one if rng.random() < 0.5 else _sample_two
    words, objects = draw(rng, rest)
    return f"{words} on {_with_article(background)} background", Scene(background, objects)


def _sample_one(rng: random.Random, colors: list[str]) -> tuple[str, tuple[Placed, ...]]:
    size = rng.choice(list(SIZES))
    extent = rng.uniform(*SIZES[size])
    color, shape = rng.choice(colors), rng.choice(SHAPES)
    edge = extent + 0.03
    placed = Placed(color, shape, rng.uniform(edge, 1 - edge), rng.uniform(edge, 1 - edge), extent)
    return _with_article(f"{size} {color} {shape}".lstrip()), (placed,)


def _sample_two(rng: random.Random, colors: list[str]) -> tuple[str, tuple[Placed, ...]]:
    relation = rng.choice(list(RELATIONS))
    dx, dy = RELATIONS[relation]
    color1, shape1, shape2 = rng.choice(colors), rng.choice(SHAPES), rng.choice(SHAPES)
    color2 = rng.choice([color for color in colors if color != color1])
    extents = rng.uniform(*PAIR_SIZE), rng.uniform(*PAIR_SIZE)
    across = rng.uniform(0.38, 0.62)  # on the axis that the relation says nothing about
    centres = []
    for side in (0.26, -0.26):
        along = 0.5 + side * (dx + dy)
        x, y = (along, across) if dx else (across, along)
        centres.append((x + rng.uniform(-0.03, 0.03), y + rng.uniform(-0.03, 0.03)))
    things = ((color1, shape1), (color2, shape2))
    objects = tuple(Placed(*thing, *centre, e) for thing, centre, e in zip(things, centres, extents, strict=True))
    return f"{_with_article(f'{color1} {shape1}')} {relation} {_with_article(f'{color2} {shape2}')}", objects


def _with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def held_out_captions(count: int, seed: int = 0) -> list[str]:
    """Captions for evaluation: the stream of random.Random(77 + seed); seed 0 is what the model card measures."""
    rng = random.Random(HELD_OUT_SEED + seed)
    return [sample(rng)[0] for _ in range(count)]


def parse(caption: str) -> Description:
    """What a caption of the grammar says. Raises RequestError for any other text."""
    match = _CAPTION.fullmatch(caption)
    if match is None:
        allowed = "grammar version 1, such as 'a red star above a blue ring on a white background'"
        raise RequestError(f"caption {caption[:200]!r}", allowed, "Write it that way")
    color1, shape1, relation, color2, shape2, background = match.groups()
    second = () if relation is None else ((color2, shape2),)
    return Description(background, ((color1, shape1), *second), relation)


def render(scene: Scene, size_px: int = SIZE_PX) -> np.ndarray:
    """The scene as [size_px, size_px, 3] u8, drawn at twice the size and reduced with Lanczos."""
    side = 2 * size_px
    image = Image.new("RGB", (side, side), COLORS[scene.background])
    draw = ImageDraw.Draw(image)
    for placed in scene.objects:
        _draw_shape(draw, placed, side, COLORS[scene.background])
    return np.asarray(image.resize((size_px, size_px), Image.Resampling.LANCZOS))


def _draw_shape(draw: ImageDraw.ImageDraw, placed: Placed, side: int, hole: tuple[int, int, int]) -> None:
    x, y, r, ink = placed.x * side, placed.y * side, placed.extent * side, COLORS[placed.color]
    if placed.shape in ROUND:
        draw.ellipse((x - r, y - r, x + r, y + r), fill=ink)
        if placed.shape == "ring":
            q = r * RING_HOLE
            draw.ellipse((x - q, y - q, x + q, y + q), fill=hole)
    else:
        draw.polygon([(x + r * px, y + r * py) for px, py in outline(placed.shape)], fill=ink)


def outline(shape: str) -> list[tuple[float, float]]:
    """Corners of a shape that is not ROUND, within -1..1; the heart is a polygon too."""
    if shape == "star":
        radii = (1.0, 0.42)
        return [
            (radii[k % 2] * math.sin(math.pi * k / 5), -radii[k % 2] * math.cos(math.pi * k / 5)) for k in range(10)
        ]
    if shape == "heart":
        return [_heart(2 * math.pi * k / 40) for k in range(40)]
    return _CORNERS[shape]


def _heart(t: float) -> tuple[float, float]:
    y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
    return math.sin(t) ** 3, -y / 16


_A = 0.33  # half the width of a cross's arm
_CORNERS: dict[str, list[tuple[float, float]]] = {
    "square": [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
    "diamond": [(0, -1), (0.8, 0), (0, 1), (-0.8, 0)],
    "triangle": [(0, -0.95), (1, 0.85), (-1, 0.85)],
    "cross": [
        (-_A, -1), (_A, -1), (_A, -_A), (1, -_A), (1, _A), (_A, _A),
        (_A, 1), (-_A, 1), (-_A, _A), (-1, _A), (-1, -_A), (-_A, -_A),
    ],
}  # fmt: skip
