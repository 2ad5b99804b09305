"""Components on the grids of a quantization plan: the modules that carry one set of numbers into any converter."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Literal

import torch
from torch import nn

from edgesd.compress.layouts import LAYOUTS
from edgesd.compress.quantplan import OWN_INTEGERS, OWN_SCALES, Kind, LayerPlan, Mode, QuantPlan, Scale, Sensitivity
from edgesd.errors import DataError, RequestError
from edgesd.models.modules import Component
from edgesd.models.plain import share

__all__ = [
    "Kind",
    "LayerPlan",
    "Mode",
    "QuantPlan",
    "Scale",
    "Sensitivity",
    "adjusted",
    "put",
    "quantizable",
    "quantized",
]
Layout = Literal["folded", "unfolded", "simulated"]  # see `edgesd.compress.layouts`


def quantizable(module: nn.Module) -> dict[str, Kind]:
    """Paths of the layers a plan can hold, in order of definition."""
    kinds: dict[type, Kind] = {nn.Conv2d: "conv", nn.Linear: "linear"}
    return {name: kinds[type(layer)] for name, layer in module.named_modules() if type(layer) in kinds}


def quantized(
    component: Component,
    plan: QuantPlan,
    layout: Layout,
    outputs: Collection[Kind] = (),
    *,
    linear_form: Literal["linear", "matmul"] = "linear",
) -> Component:
    """The component with each planned layer replaced by one that carries its grids; weights elsewhere are shared.

    layout: how an int8 weight appears to a converter. folded: int8 constants behind `dequantize_per_channel`. unfolded:
    float weights through `quantize_per_channel` and back. simulated: float arithmetic of the same numbers, the
    reference of all targets, and the fastest in torch. outputs: kinds whose int8 layers quantize their output
    too, as a target's `Capabilities.int8_outputs` says. linear_form: "matmul" writes linears as x @ w with a folded
    weight [in, out].
    The component's weights must be those the plan was made for (`adjusted`). Raises DataError: a plan of another model.
    """
    _check(component, plan)
    module = share(component.module)
    for layer in plan.layers:
        if layer.mode != "float":
            made = LAYOUTS[layout](module.get_submodule(layer.name), layer, layer.kind in outputs)
            made.transposed = linear_form == "matmul" and layout == "folded" and layer.kind == "linear"
            put(module, layer.name, made.finish())
    return replace(component, module=module.eval())


def adjusted(component: Component, tensors: Mapping[str, torch.Tensor]) -> Component:
    """The component with some parameters replaced, by their paths within its module: smoothed weights, new biases.

    A layer's own integers and scales (`quantplan.OWN_INTEGERS`, `OWN_SCALES`) become buffers of it. Raises DataError
    for a tensor that does not fit.
    """
    module = share(component.module)
    for path, tensor in tensors.items():
        owner, _, name = path.rpartition(".")
        try:
            layer = module.get_submodule(owner)
        except AttributeError:
            layer = nn.Module()
        if name in (OWN_INTEGERS, OWN_SCALES) and hasattr(layer, "weight"):
            layer.register_buffer(name, tensor)
            continue
        old = getattr(layer, name, None)
        if not hasattr(layer, name) or (old is not None and old.shape != tensor.shape):
            raise DataError(f"an adjusted weight {path} that the model has not", "weights of this model", _AGAIN)
        setattr(layer, name, nn.Parameter(tensor, requires_grad=False))
    return replace(component, module=module.eval())


def put(module: nn.Module, path: str, layer: nn.Module) -> None:
    """Replaces the submodule at a dotted path, in place."""
    owner, _, name = path.rpartition(".")
    setattr(module.get_submodule(owner), name, layer)


_AGAIN = "Package the model again"


def _check(component: Component, plan: QuantPlan) -> None:
    if plan.component != component.name:
        raise RequestError(f"a plan of {plan.component} for {component.name}", "its own plan", _AGAIN)
    have = quantizable(component.module)
    for layer in plan.layers:
        if have.get(layer.name) != layer.kind:
            raise DataError(f"the plan's {layer.kind} {layer.name} is not in the model", "a plan of this model", _AGAIN)
