"""What a plan's sensitivities rest on. Whole plans: tests/test_quantstages.py."""

import pytest
import tiny
import torch

from edgesd.compress import quantizing
from edgesd.compress.calls import Batch
from edgesd.manifest import Axes
from edgesd.models.modules import build


def pictures(side, name, count=3):
    shape = (count, 3, side, side) if name == "image" else (count, 4, side, side)
    inputs = {name: torch.arange(count * shape[1] * side * side, dtype=torch.float32).reshape(shape)}
    return Batch("vae", lambda *_: {}, inputs, torch.ones(count), torch.ones(count), False, (0,) * count, None)


@pytest.mark.parametrize(("name", "key"), [("vae_decoder", "latents"), ("vae_encoder", "image")])
def test_a_large_picture_is_ranked_by_its_corner(name, key, monkeypatch):
    monkeypatch.setattr(quantizing, "RANK_PX", 32)
    component = build(name, tiny.modules(), tiny.spec(), Axes(size_px=(64, 64)))
    batch = pictures(component.inputs[0].shape[-1], key)
    (few,) = quantizing._few(component, [batch])
    half = batch.inputs[key].shape[-1] // 2
    assert torch.equal(few.inputs[key], batch.inputs[key][..., :half, :half])
    with torch.no_grad():
        made = component.module(few.inputs[key] / few.inputs[key].max())
    assert made.shape[-1] * 2 == component.outputs[0].shape[-1]
