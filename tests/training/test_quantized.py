"""Training on int8 grids: the numbers that `package` simulates, gradients that pass them, layers left as they were."""

import tiny
import torch
from torch import nn

from edgesd.compress.layouts import dequantized_weight, weight_scales
from edgesd.compress.observe import grid, on_grid
from edgesd.training.quantized import on_int8_grids


def test_a_layer_computes_what_the_plans_simulate():
    torch.manual_seed(0)
    layer, x = nn.Conv2d(3, 4, 3, padding=1), torch.randn(2, 3, 8, 8) + 1
    weight = dequantized_weight(layer.weight, weight_scales(layer.weight, layer.bias, None))
    inputs = on_grid(x, grid(float(x.min()), float(x.max())))
    expected = nn.functional.conv2d(inputs, weight, layer.bias, padding=1)
    with on_int8_grids(nn.Sequential(layer)):
        assert torch.allclose(layer(x), expected, atol=1e-6)
    assert not torch.allclose(layer(x), expected, atol=1e-3)


def test_gradients_reach_every_weight_and_nothing_stays_behind():
    unet = tiny.unet(heads=4).requires_grad_(True)
    told = torch.randn(2, 4, 8, 8), torch.tensor([10, 700]), torch.randn(2, tiny.TOKENS, tiny.TEXT)
    float_output = unet(*told).sample
    with on_int8_grids(unet):
        rounded = unet(*told).sample
        rounded.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in unet.parameters())
    share = (rounded - float_output).square().sum() / float_output.square().sum()
    assert 15 < -10 * share.log10().item() < 60
    assert torch.equal(unet(*told).sample, float_output)


def test_weights_that_learn_on_the_grids_bear_them_better():
    """Inputs that move together: what one weight's rounding takes, another's can give."""
    torch.manual_seed(0)
    layer, x = nn.Linear(16, 8), torch.randn(256, 2) @ torch.randn(2, 16)
    x[:, 0] = 0
    with torch.no_grad():
        layer.weight[:, 0] = 8.0  # never used, but the grid must reach it
        wanted = layer(x)

    def error():
        with on_int8_grids(nn.Sequential(layer)):
            return (layer(x) - wanted).square().mean()

    before, optimizer = error().item(), torch.optim.Adam(layer.parameters(), lr=2e-4)
    for _ in range(300):
        optimizer.zero_grad()
        error().backward()
        optimizer.step()
    assert error().item() < 0.5 * before
