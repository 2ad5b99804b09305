"""Reads a picture of the embedded model's world back and says what of its caption is true.

Every pixel takes the nearest palette colour. Background: the commonest colour along the border. Colours: each
object's colour covers enough pixels. Shape: of that colour's largest connected part, the best overlap with the eight
shapes stretched to its bounding box. Relation: from the centroids of these parts.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

from edgesd.errors import RequestError
from edgesd.shapes.world import COLORS, RELATIONS, ROUND, SHAPES, SIZE_PX, outline, parse

BORDER_PX = 3
MIN_AREA_PX = 120  # of a colour, for its object to count as there
MIN_OVERLAP = 0.6  # intersection over union
MIN_DISTANCE_PX = 8  # between centroids, along the relation's axis
_HOLE = (0.225, 0.775)  # where a ring's hole begins and ends: (1 -+ RING_HOLE) / 2


@dataclass(frozen=True)
class Verdict:
    """What of a caption a picture shows. color, shape: of all objects; relation: true where the caption has none."""

    background: bool
    color: bool
    shape: bool
    relation: bool

    @property
    def all(self) -> bool:
        return not self.failed

    @property
    def failed(self) -> tuple[str, ...]:
        return tuple(key for key, good in asdict(self).items() if not good)


def judge(image: np.ndarray, caption: str) -> Verdict:
    """The verdict on a picture [128,128,3] u8. Raises RequestError for another size or a foreign caption."""
    if image.shape != (SIZE_PX, SIZE_PX, 3):
        came = f"a picture of {image.shape[1]}x{image.shape[0]} px"
        raise RequestError(came, f"{SIZE_PX}x{SIZE_PX} px, what the oracle is made for", "Use a model of this world")
    said = parse(caption)
    nearest = nearest_color(image)
    parts = [_object(nearest, color) for color, _ in said.objects]
    shapes = [part is not None and _is_shape(part, shape) for part, (_, shape) in zip(parts, said.objects, strict=True)]
    return Verdict(
        background=_border_color(nearest) == said.background,
        color=all(part is not None for part in parts),
        shape=all(shapes),
        relation=said.relation is None or _holds(said.relation, parts[0], parts[1]),
    )


def nearest_color(image: np.ndarray) -> np.ndarray:
    """[H,W,3] u8 -> [H,W] index into COLORS of the nearest in RGB."""
    palette = np.array(list(COLORS.values()), np.int32)
    return ((image.astype(np.int32)[:, :, None] - palette) ** 2).sum(-1).argmin(-1)


def _border_color(nearest: np.ndarray) -> str:
    n = BORDER_PX
    border = np.concatenate([side.ravel() for side in (nearest[:n], nearest[-n:], nearest[:, :n], nearest[:, -n:])])
    return list(COLORS)[np.bincount(border).argmax()]


def _object(nearest: np.ndarray, color: str) -> np.ndarray | None:
    """The largest connected part of a colour as [H,W] bool; None where there is too little of the colour."""
    mask = nearest == list(COLORS).index(color)
    return largest_part(mask) if mask.sum() >= MIN_AREA_PX else None


def largest_part(mask: np.ndarray) -> np.ndarray:
    """The largest 4-connected part of a mask that is not empty, as a mask; of equal ones the first in reading order.

    Union by hooking and pointer jumping on whole arrays (Shiloach and Vishkin 1982): a part's root is its first pixel.
    """
    index = np.arange(mask.size).reshape(mask.shape)
    right, down = mask[:, :-1] & mask[:, 1:], mask[:-1] & mask[1:]
    a = np.concatenate([index[:, :-1][right], index[:-1][down]])
    b = np.concatenate([index[:, 1:][right], index[1:][down]])
    root = index.ravel()
    while (root[a] != root[b]).any():
        low, high = np.minimum(root[a], root[b]), np.maximum(root[a], root[b])
        np.minimum.at(root, high, low)
        while (root[root] != root).any():
            root = root[root]
    labels = root.reshape(mask.shape)
    return mask & (labels == np.bincount(labels[mask]).argmax())


def _is_shape(part: np.ndarray, shape: str) -> bool:
    """Whether `shape` overlaps the part best among all shapes, and well enough."""
    ys, xs = np.nonzero(part)
    crop = part[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
    overlap = {name: _overlap(crop, _template(name, *crop.shape)) for name in SHAPES}
    return max(overlap, key=overlap.__getitem__) == shape and overlap[shape] > MIN_OVERLAP


def _overlap(a: np.ndarray, b: np.ndarray) -> float:
    return (a & b).sum() / max(1, (a | b).sum())


@lru_cache(maxsize=4096)
def _template(shape: str, height: int, width: int) -> np.ndarray:
    """The shape as [height, width] bool, stretched so that it touches all four sides."""
    image = Image.new("L", (width, height), 0)
    draw = ImageDraw.Draw(image)
    if shape in ROUND:
        draw.ellipse((0, 0, width - 1, height - 1), fill=255)
        if shape == "ring":
            near, far = _HOLE
            draw.ellipse((width * near, height * near, width * far, height * far), fill=0)
    else:
        corners = np.array(outline(shape))
        low, high = corners.min(axis=0), corners.max(axis=0)
        stretched = (corners - low) / (high - low) * [width - 1, height - 1]
        draw.polygon([tuple(corner) for corner in stretched], fill=255)
    return np.asarray(image) > 127


def _holds(relation: str, first: np.ndarray | None, second: np.ndarray | None) -> bool:
    if first is None or second is None:
        return False
    apart = _centroid(first) - _centroid(second)
    return bool(apart @ RELATIONS[relation] > MIN_DISTANCE_PX)


def _centroid(part: np.ndarray) -> np.ndarray:
    ys, xs = np.nonzero(part)
    return np.array([xs.mean(), ys.mean()])
