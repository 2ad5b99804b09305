"""Quantization-aware training: layers compute on int8 grids, and the weights that learn stay float.

Gradients pass the rounding as if it were not there, but for what a grid cuts off (Jacob et al., arXiv 1712.05877,
section 3). The ranges are those of the batch at hand, so a run keeps no state for them; `package` measures its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from edgesd.compress.layouts import WEIGHT_HIGH, weight_scales
from edgesd.compress.observe import functional, grid, on_grid
from edgesd.compress.quantize import quantizable


@contextmanager
def on_int8_grids(*modules: nn.Module) -> Iterator[None]:
    """Within it every convolution and linear layer of `modules` rounds its input, per tensor, and its weight, per
    output channel, to int8, as `edgesd package --precision int8` does where no layer is spared."""
    layers = [module.get_submodule(name) for module in modules for name in quantizable(module)]
    for layer in layers:
        layer.forward = partial(_rounded, layer)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _rounded(layer: Any, x: torch.Tensor) -> torch.Tensor:
    low, high = x.detach().aminmax()
    inputs = on_grid(x.float(), grid(float(low), float(high)))
    scales = weight_scales(layer.weight, layer.bias, None)
    zeros = torch.zeros_like(scales, dtype=torch.int32)
    weight = torch.fake_quantize_per_channel_affine(layer.weight, scales, zeros, 0, -WEIGHT_HIGH, WEIGHT_HIGH)
    return functional(layer, inputs, weight)
