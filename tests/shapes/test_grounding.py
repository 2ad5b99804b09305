"""The lesson of where to look: what it takes for the truth, and what it calls right."""

import math

import pytest
import torch

from edgesd.models.load import load
from edgesd.shapes.grounding import HEADS, NOWHERE, grounding_loss, looking, standing
from edgesd.shapes.reading import PLACES, stands
from edgesd.shapes.world import COLORS, render
from edgesd.training.pool import numbered_scenes

SIDE = 16
SCENES = list(numbered_scenes(64))


def test_objects_stand_where_the_picture_shows_their_colour():
    seen = missed = 0
    for (caption, scene), cells in zip(SCENES, standing(SCENES, SIDE), strict=True):
        middles = torch.from_numpy(render(scene).copy())[4::8, 4::8].long()
        background = torch.tensor(COLORS[scene.background])
        assert set(cells.unique().tolist()) - {NOWHERE} == {PLACES.index(place) for place in stands(caption)}
        for place, placed in zip(stands(caption), scene.objects, strict=False):
            own = (middles - torch.tensor(COLORS[placed.color])).abs().sum(-1) < 30
            assert set(cells[own].tolist()) <= {PLACES.index(place), NOWHERE}
            seen, missed = seen + int(own.sum()), missed + int((cells[own] == NOWHERE).sum())
        if stands(caption):
            assert ((middles - background).abs().sum(-1) < 60)[cells == NOWHERE].float().mean() > 0.95
    assert seen > 500
    assert missed < 0.03 * seen  # the picture's pixels lie half of one beside a cell's middle


def test_a_caption_of_one_object_has_no_places():
    singles = [scene for scene in SCENES if not stands(scene[0])]
    assert singles
    assert (standing(singles, SIDE) == NOWHERE).all()


@pytest.mark.parametrize("side", [16, 8, 4])
def test_looking_at_what_stands_there_costs_nothing_and_looking_anywhere_the_log_of_all_tokens(side):
    pairs = [scene for scene in SCENES if stands(scene[0])][:4]
    here, tokens, width = standing(pairs, SIDE), 24, 8
    keys = torch.zeros(4, tokens, 16)  # one head of eight channels twice: a channel of its own for each place
    queries = torch.zeros(4, SIDE * SIDE, 16)
    for head in range(HEADS):
        for place in range(len(PLACES)):
            keys[:, tokens - len(PLACES) + place, head * width + place] = 100.0
            queries[..., head * width + place] = (here == place).flatten(1).float()
    anywhere = grounding_loss([(torch.zeros(4, side * side, 16), keys, width)], here)
    assert float(anywhere) == pytest.approx(math.log(tokens), rel=1e-4)
    if side == SIDE:
        assert float(grounding_loss([(queries, keys, width)], here)) < 1e-3
        swapped = queries.flip(1)  # the picture turned around: left is where right was
        assert float(grounding_loss([(swapped, keys, width)], here)) > 5


def test_pictures_without_places_cost_nothing():
    nothing = torch.full((2, SIDE, SIDE), NOWHERE, dtype=torch.uint8)
    assert float(grounding_loss([(torch.randn(2, 64, 16), torch.randn(2, 24, 16), 8)], nothing)) == 0


def test_every_cross_attention_layer_is_seen_and_none_afterwards():
    unet = load().modules["unet"]
    told = (torch.randn(2, 4, 16, 16), torch.tensor([10, 900]), torch.randn(2, 24, 128))
    with torch.no_grad():
        with looking(unet) as looks:
            unet(*told)
        assert sorted(queries.shape[1] for queries, _, _ in looks) == [16, 64, 64, 64, 256, 256, 256]
        assert all(queries.shape[-1] == keys.shape[-1] == 8 * width for queries, keys, width in looks)
        unet(*told)
    assert len(looks) == 7
