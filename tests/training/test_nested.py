"""Narrow forms while training: the same function as the cut module, and gradients that reach the dense weights."""

import pytest
import tiny
import torch

from edgesd.compress.groups import cut, find_groups
from edgesd.compress.widths import leading
from edgesd.models.plain import share
from edgesd.training.nested import Nested


def inputs():
    torch.manual_seed(3)
    return torch.randn(2, 4, 8, 8), torch.tensor([10, 700]), torch.randn(2, tiny.TOKENS, tiny.TEXT)


@pytest.mark.parametrize("width", [0.75, 0.5])
def test_a_narrow_call_equals_the_cut_module(width):
    unet = tiny.unet(heads=4).requires_grad_(True)
    smaller = share(unet)
    for group in find_groups(smaller):
        cut(smaller, group, range(leading(group, width)))
    with torch.no_grad():
        assert torch.allclose(
            Nested(unet, (1, width)).call(width, *inputs()).sample, smaller(*inputs()).sample, atol=1e-6
        )


def test_gradients_reach_the_leading_part_of_the_dense_weights():
    unet = tiny.unet(heads=4).requires_grad_(True)
    nested = Nested(unet, (1, 0.5))
    nested.call(0.5, *inputs()).sample.square().sum().backward()
    group = next(g for g in find_groups(unet) if g.kind == "self_attention")
    gradient = unet.get_submodule(group.consumer).weight.grad
    half = leading(group, 0.5) * group.unit_size
    assert gradient[:, :half].abs().sum() > 0
    assert gradient[:, half:].abs().sum() == 0


def test_the_sandwich_has_the_narrowest_and_one_between():
    nested = Nested(tiny.unet(heads=4), (0.5, 1, 0.75, 0.25))
    rng = torch.Generator().manual_seed(0)
    drawn = {nested.chosen(rng) for _ in range(30)}
    assert drawn == {(0.25, 0.75), (0.25, 0.5)}
    assert Nested(tiny.unet(heads=4), (1, 0.5)).chosen(rng) == (0.5,)


def test_every_group_keeps_something_and_narrow_lies_inside_wide():
    for group in find_groups(tiny.unet(heads=4)):
        sizes = [leading(group, w) for w in (0.01, 0.5, 0.75, 1.0)]
        assert sizes[0] >= 1
        assert sizes == sorted(sizes)
        assert sizes[-1] == group.units
