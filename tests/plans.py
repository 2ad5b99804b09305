"""Quantization plans of tiny components, from the ranges of one call: enough to lower and to compare."""

from __future__ import annotations

import torch

from edgesd.compress.quantize import LayerPlan, QuantPlan, Scale, quantizable
from edgesd.models.count import count


def grid(x: torch.Tensor) -> Scale:
    """Asymmetric, over the whole range of x and 0."""
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 1e-6)
    scale = (high - low) / 255
    return Scale(scale=scale, zero_point=max(-128, min(127, round(-128 - low / scale))))


def simple_plan(component, precision: str = "int8", floats: tuple[str, ...] = ()) -> QuantPlan:
    """Every layer in int8 (hybrid: linears weight-only; w8: all weight-only) but `floats`, ranges of the example."""
    seen, hooks = {}, []
    for name in quantizable(component.module):

        def keep(layer, inputs, output, name=name):
            seen[name] = grid(inputs[0]), grid(output)

        hooks.append(component.module.get_submodule(name).register_forward_hook(keep))
    with torch.no_grad():
        component.module(*component.example)
    for hook in hooks:
        hook.remove()
    modes = {"int8": {}, "hybrid": {"linear": "w8"}, "w8": {"linear": "w8", "conv": "w8"}}[precision]
    macs = count(component.module, component.example).by_module
    layers = tuple(
        LayerPlan(
            name=name, kind=kind, mode="float" if name in floats else modes.get(kind, "int8"), why="test",
            input=seen[name][0], output=seen[name][1], macs=macs[name],
            params=sum(p.numel() for p in component.module.get_submodule(name).parameters()),
        )
        for name, kind in quantizable(component.module).items()
        if name in seen
    )  # fmt: skip
    return QuantPlan(
        component=component.name, precision=precision, source_sha256="0" * 64, calibration="example", layers=layers
    )


def ends(component) -> tuple[str, ...]:
    """The layers that meet the component's border, and those of the time path: what no plan of edgesd's quantizes."""
    marks = ("conv_in", "conv_out", "time_emb", "quant_conv", "layers.0", "to_k", "to_v", "add_embedding", "projection")
    return tuple(name for name in quantizable(component.module) if any(mark in name for mark in marks))
