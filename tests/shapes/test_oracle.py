"""The oracle on truths, on lies, and on pictures damaged in one way each."""

import random

import numpy as np
import pytest

from edgesd.errors import RequestError
from edgesd.shapes.oracle import Verdict, judge, largest_part
from edgesd.shapes.world import COLORS, SHAPES, Placed, Scene, render, sample

TWO = "a red star above a white ring on a blue background"


def two(first: str = "star", x: float = 0.5, y: float = 0.25) -> np.ndarray:
    return render(Scene("blue", (Placed("red", first, x, y, 0.2), Placed("white", "ring", 0.5, 0.75, 0.2))))


def test_rendered_truths_are_read_as_true():
    rng = random.Random(0)
    truths = [sample(rng) for _ in range(300)]
    wrong = [caption for caption, scene in truths if not judge(render(scene), caption).all]
    assert len(wrong) <= 0.005 * len(truths), wrong


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_told_from_the_others(shape):
    picture = render(Scene("black", (Placed("pink", shape, 0.5, 0.5, 0.25),)))
    assert [s for s in SHAPES if judge(picture, f"a pink {s} on a black background").shape] == [shape]


@pytest.mark.parametrize(
    ("caption", "failed"),
    [
        (TWO, ()),
        ("a white ring below a red star on a blue background", ()),
        ("a red star on a blue background", ()),
        ("a red star above a white ring on a green background", ("background",)),
        ("a red heart above a white ring on a blue background", ("shape",)),
        ("a red star below a white ring on a blue background", ("relation",)),
        ("a red star left of a white ring on a blue background", ("relation",)),
        ("a pink star above a white ring on a blue background", ("color", "shape", "relation")),
        ("a red heart below a white ring on a pink background", ("background", "shape", "relation")),
    ],
)
def test_lies_are_named(caption, failed):
    verdict = judge(two(), caption)
    assert verdict.failed == failed
    assert verdict.all == (not failed)


def test_a_relation_needs_distance():
    beside = "a red star right of a white ring on a blue background"
    assert not judge(two(x=0.55), beside).relation
    assert judge(two(x=0.60), beside).relation


def test_crumbs_of_the_colour_do_not_disturb():
    picture = two().copy()
    picture[5:10, 5:10] = picture[100:104, 3:8] = COLORS["red"]
    assert judge(picture, TWO).all


def test_too_little_of_a_colour_is_not_there():
    picture = np.full((128, 128, 3), COLORS["blue"], np.uint8)
    picture[10:20, 10:21] = COLORS["red"]
    caption = "a red square on a blue background"
    assert judge(picture, caption) == Verdict(background=True, color=False, shape=False, relation=True)
    picture[20, 10:21] = COLORS["red"]
    assert judge(picture, caption).all


def test_half_a_shape_is_none():
    picture = two().copy()
    picture[:, 64:] = COLORS["blue"]
    assert judge(picture, "a red star on a blue background").failed == ("shape",)


def test_grey_and_noise_are_judged_without_a_crash():
    for picture in (np.full((128, 128, 3), 128), np.random.RandomState(0).randint(0, 256, (128, 128, 3))):
        assert not judge(picture.astype(np.uint8), TWO).all


def test_other_sizes_are_refused():
    with pytest.raises(RequestError):
        judge(np.zeros((64, 64, 3), np.uint8), TWO)


@pytest.mark.parametrize("share", [0.001, 0.3, 0.5, 0.59, 0.7, 1.0])
def test_the_largest_part_equals_scipys(share):
    ndimage = pytest.importorskip("scipy.ndimage")
    for seed in range(5):
        mask = np.random.RandomState(seed).rand(60, 90) < share
        labels, count = ndimage.label(mask)
        sizes = ndimage.sum(mask, labels, range(1, count + 1))
        assert (largest_part(mask) == (labels == 1 + np.argmax(sizes))).all()


def test_a_winding_part_is_one():
    mask = np.zeros((65, 64), bool)
    mask[::2] = True
    mask[1::4, -1] = mask[3::4, 0] = True
    assert (largest_part(mask) == mask).all()
