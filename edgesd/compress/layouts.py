"""One layer on int8 grids: its weight's scales, and the forms in which converters read both.

Each form is a module that emits PyTorch's reference operators (`quantized_decomposed`), or their arithmetic in float.
"""

from __future__ import annotations

from contextlib import suppress
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from edgesd.compress.quantplan import HIGH, LOW, OWN_INTEGERS, OWN_SCALES
from edgesd.errors import SetupError

if TYPE_CHECKING:
    from edgesd.compress.quantplan import LayerPlan, Scale

WEIGHT_HIGH = 127  # weights: -127..127, so that their negatives fit
# Bias and products meet in an int32. The products of 2^15 inputs stay below 2^30; the bias gets the other 2^30.
MAX_BIAS = 2**30


def weight_scales(
    weight: torch.Tensor, bias: torch.Tensor | None, input_scale: float | None, given: torch.Tensor | None = None
) -> torch.Tensor:
    """Scales of an int8 weight, [out] float32: the largest magnitude of each output channel comes to 127, or as given.

    A scale grows where the bias, an integer in units of input_scale * scale, would leave no room in an int32
    (input_scale None: a weight-only layer, whose bias stays float). A channel of zeros has a scale all the same.
    """
    scales = weight.detach().float().flatten(1).abs().amax(1) / WEIGHT_HIGH if given is None else given
    if bias is not None and input_scale is not None:
        scales = torch.maximum(scales, bias.detach().float().abs() / (input_scale * MAX_BIAS))
    return scales.clamp_min(torch.finfo(torch.float32).tiny * 2**16)


def grid_of(layer: Any, input_scale: float | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(weight [out, ...], scales [out]) that a layer's integers come from: of those it brings, else of its weight."""
    integers, given = getattr(layer, OWN_INTEGERS, None), getattr(layer, OWN_SCALES, None)
    weight = layer.weight.detach()
    if integers is not None and given is not None:
        weight = integers.float() * given.view(-1, *[1] * (integers.ndim - 1))
    return weight, weight_scales(weight, layer.bias, input_scale, given)


def raised_channels(layer: Any, input_scale: float) -> int:
    """Output channels whose scale `weight_scales` raised for the bias."""
    raised = grid_of(layer, input_scale)[1] > grid_of(layer, None)[1]
    return int(raised.sum())


def quantize_weight(weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """int8 integers -127..127 of a weight [out, ...]; ties to even, as every runtime rounds."""
    per_channel = scales.view(-1, *[1] * (weight.ndim - 1))
    return (weight.detach().float() / per_channel).round().clamp(-WEIGHT_HIGH, WEIGHT_HIGH).to(torch.int8)


def dequantized_weight(weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """A weight rounded to its grid, as floats."""
    return quantize_weight(weight, scales).float() * scales.view(-1, *[1] * (weight.ndim - 1))


@cache
def _ops() -> Any:
    """PyTorch's reference quantization operators, which all four converters read."""
    with suppress(ImportError):
        import torch.ao.quantization.fx._decomposed
    if not hasattr(torch.ops.quantized_decomposed, "dequantize_per_channel"):
        raise SetupError(
            f"torch {torch.__version__} has no quantized_decomposed operators", "a torch that has",
            "Install the torch of constraints.txt",
        )  # fmt: skip
    return torch.ops.quantized_decomposed


class _Quantized(nn.Module):
    """A convolution or linear on a grid. Subclasses say how its weight and its activations meet that grid."""

    transposed = False

    def __init__(self, layer: Any, plan: LayerPlan, outputs: bool) -> None:
        super().__init__()
        _ops()  # before an exporter looks for them
        for name in ("out_features", "in_features", "out_channels", "in_channels"):
            if hasattr(layer, name):
                setattr(self, name, getattr(layer, name))
        self.conv = plan.kind == "conv"
        if self.conv:
            self.stride, self.padding = layer.stride, layer.padding
            self.dilation, self.groups = layer.dilation, layer.groups
        self.bias = layer.bias
        self.input = plan.input if plan.mode == "int8" else None
        self.output = plan.output if plan.mode == "int8" and outputs else None
        self.float_weight, self.scales = grid_of(layer, self.input.scale if self.input is not None else None)

    def finish(self) -> _Quantized:
        """Stores the weight as this layout has it."""
        raise NotImplementedError

    def stored(self) -> torch.Tensor:
        raise NotImplementedError

    def on_grid(self, x: torch.Tensor, grid: Scale) -> torch.Tensor:
        ops, (scale, zero) = _ops(), (grid.scale, grid.zero_point)
        integers = ops.quantize_per_tensor(x, scale, zero, LOW, HIGH, torch.int8)
        return ops.dequantize_per_tensor(integers, scale, zero, LOW, HIGH, torch.int8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.input is not None:
            x = self.on_grid(x, self.input)
        weight = self.stored()
        if self.conv:
            made = nn.functional.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        elif self.transposed:
            made = x @ weight if self.bias is None else x @ weight + self.bias
        else:
            made = nn.functional.linear(x, weight, self.bias)
        return made if self.output is None else self.on_grid(made, self.output)


class _Folded(_Quantized):
    def finish(self) -> _Quantized:
        integers = quantize_weight(self.float_weight, self.scales)
        self.register_buffer("weight", integers.T.contiguous() if self.transposed else integers)
        self.register_buffer("weight_scale", self.scales)
        self.register_buffer("weight_zero", torch.zeros_like(self.scales, dtype=torch.int64))
        del self.float_weight, self.scales
        return self

    def stored(self) -> torch.Tensor:
        return _ops().dequantize_per_channel(
            self.weight, self.weight_scale, self.weight_zero, int(self.transposed), -WEIGHT_HIGH, WEIGHT_HIGH,
            torch.int8,
        )  # fmt: skip


class _Unfolded(_Quantized):
    def finish(self) -> _Quantized:
        self.weight = nn.Parameter(self.float_weight, requires_grad=False)
        self.register_buffer("weight_scale", self.scales)
        self.register_buffer("weight_zero", torch.zeros_like(self.scales, dtype=torch.int64))
        del self.float_weight, self.scales
        return self

    def stored(self) -> torch.Tensor:
        grid: tuple = (self.weight_scale, self.weight_zero, 0, -WEIGHT_HIGH, WEIGHT_HIGH, torch.int8)
        return _ops().dequantize_per_channel(_ops().quantize_per_channel(self.weight, *grid), *grid)


class Simulated(_Quantized):
    """The reference numerics in float arithmetic; the weight is rounded once."""

    def finish(self) -> _Quantized:
        self.weight = nn.Parameter(dequantized_weight(self.float_weight, self.scales), requires_grad=False)
        del self.float_weight, self.scales
        return self

    def stored(self) -> torch.Tensor:
        return self.weight

    def on_grid(self, x: torch.Tensor, grid: Scale) -> torch.Tensor:
        return torch.fake_quantize_per_tensor_affine(x, grid.scale, grid.zero_point, LOW, HIGH)


LAYOUTS: dict[str, type[_Quantized]] = {"folded": _Folded, "unfolded": _Unfolded, "simulated": Simulated}
