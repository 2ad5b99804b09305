"""A component and its quantization plan, shaped so that litert-torch keeps every integer.

Its converter makes integer operations of layers between quantize/dequantize pairs on input, weight and output. Two of
its ways have to be met: it takes pairs that touch the model's border for the border's own type, and it widens the
weight of a linear layer that computes in float, though not that of a convolution.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from edgesd.manifest import Downgrade

if TYPE_CHECKING:
    from edgesd.compress.quantplan import QuantPlan
    from edgesd.models.modules import Component


def without_border(component: Component, plan: QuantPlan) -> tuple[QuantPlan, tuple[Downgrade, ...]]:
    """The plan with the int8 layers that LiteRT has no place for as weight-only ones, and what that changed.

    Those are layers at the model's very inputs or outputs, and layers whose output goes straight into a concatenation:
    the converter puts all its parts on the scale of one, and clips the others.
    """
    border, joined = _touching(component)
    lost = []
    for layer in plan.layers:
        if layer.mode == "int8" and layer.name in border | joined:
            why = "LiteRT would make the model's own input or output int8"
            if layer.name in joined:
                why = "LiteRT would put the concatenation behind it on this layer's scale"
            plan = plan.with_mode(layer.name, "w8", why)
            lost.append(Downgrade(component=component.name, what=f"{layer.name}: int8 -> w8", why=why))
    return plan, tuple(lost)


def shaped(component: Component, plan: QuantPlan, outputs: tuple[Any, ...]) -> Component:
    """The quantized component in the unfolded layout, weight-only linears as 1x1 convolutions."""
    from edgesd.compress.quantize import put, quantized
    from edgesd.models.plain import Pointwise, share

    module, layers = share(component.module), []
    for layer in plan.layers:
        if layer.mode == "w8" and layer.kind == "linear":
            put(module, layer.name, Pointwise(module.get_submodule(layer.name)))
            layer = layer.model_copy(update={"name": f"{layer.name}.conv", "kind": "conv"})
        layers.append(layer)
    plan = plan.model_copy(update={"layers": tuple(layers)})
    return quantized(replace(component, module=module), plan, "unfolded", outputs)


@contextlib.contextmanager
def layouts_kept() -> Iterator[None]:
    """Mends litert-torch's layout pass while the body runs.

    Where a channels-last dequantize feeds a channels-first operation, the pass (0.10) overwrites the marks of that
    dequantize, and its other users then read it in the wrong layout. Here each user gets a dequantize of its own.
    """
    from litert_torch._convert.fx_passes.optimize_layout_transposes_pass.pass_body import OptimizeLayoutTransposesPass

    original = OptimizeLayoutTransposesPass.insert_t_q_dq

    def insert(self: Any, graph: Any, input_dq: Any, target: Any, *rest: Any) -> Any:
        with graph.inserting_before(target):
            own = graph.node_copy(input_dq)
        target.replace_input_with(input_dq, own)
        return original(self, graph, own, target, *rest)

    OptimizeLayoutTransposesPass.insert_t_q_dq = insert
    try:
        yield
    finally:
        OptimizeLayoutTransposesPass.insert_t_q_dq = original


def _touching(component: Component) -> tuple[set[str], set[str]]:
    """Layers that meet the model's inputs or outputs, and layers that meet a concatenation behind them.

    Met directly, or through nothing but changes of shape.
    """
    import torch
    from torch import nn
    from torch.utils._python_dispatch import TorchDispatchMode

    parts: set[int] = set()

    class Concatenations(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function is torch.ops.aten.cat.default:
                parts.update(map(_place, args[0]))
            return function(*args, **({} if kwargs is None else kwargs))

    border = set(map(_place, component.example))
    found: set[str] = set()
    made: dict[str, Any] = {}  # kept, so that no other result takes a layer's place in memory

    def note(name: str) -> Any:
        def hook(layer: Any, given: Any, result: Any) -> None:
            if _place(given[0]) in border:
                found.add(name)
            made[name] = result

        return hook

    hooks = [
        layer.register_forward_hook(note(name))
        for name, layer in component.module.named_modules()
        if isinstance(layer, nn.Conv2d | nn.Linear)
    ]
    try:
        with torch.no_grad(), Concatenations():
            results = component.module(*component.example)
    finally:
        for handle in hooks:
            handle.remove()
    ends = set(map(_place, results if isinstance(results, tuple) else (results,)))
    found |= {name for name, x in made.items() if _place(x) in ends}
    return found, {name for name, x in made.items() if _place(x) in parts}


def _place(x: Any) -> int:
    return int(x.untyped_storage().data_ptr())
