"""What int8 comes to in an artefact, held against the plan it was made from: every integer accounted for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgesd.compress.quantplan import OWN_INTEGERS, OWN_SCALES, QUANTIZED
from edgesd.errors import GateError, RequestError
from edgesd.targets import Capabilities, Coverage

if TYPE_CHECKING:
    from edgesd.compress.quantplan import QuantPlan
    from edgesd.manifest import Axes, Downgrade
    from edgesd.models.modules import Component

LEAST_SHARE = 0.98  # of the MACs planned in int8, and of the weights planned in a byte
MOST_BYTES = 1.02  # of the bytes that the plan predicts for weights
SLACK_BYTES = 64 << 10  # constants that are no weights: masks, frequencies, shapes, zero points


@dataclass(frozen=True)
class Expected:
    """What a quantized component should come to. int8, w8, floating: MACs of its layers; bytes: of its weights."""

    int8: int
    w8: int
    floating: int
    bytes: int


def planned(
    component: Component, axes: Axes, plan: QuantPlan | None, capabilities: Capabilities
) -> tuple[QuantPlan | None, tuple[Downgrade, ...]]:
    """The plan as a target honours it, and what it changed; (None, ()) for float precisions.

    Raises RequestError: a precision that needs a plan without one, a plan where none belongs or of another precision.
    """
    if axes.precision not in QUANTIZED:
        if plan is not None:
            raise RequestError(f"a quantization plan for {axes.precision}", ", ".join(QUANTIZED), "Leave it out")
        return None, ()
    if plan is None or plan.precision != axes.precision:
        came = "no quantization plan" if plan is None else f"a plan for {plan.precision}"
        raise RequestError(
            f"{component.name} in {axes.precision} with {came}", f"a plan for {axes.precision}",
            "Package the model with edgesd package, which makes one",
        )  # fmt: skip
    return plan.for_target(capabilities)


def expected(component: Component, plan: QuantPlan, float_bytes: int) -> Expected:
    """What the plan comes to on a component, or on a piece of one: quantized already or not.

    float_bytes: of one number that stays float. A layer with int8 weights takes a byte a weight, and four a scale.
    """
    modes = {layer.name: layer for layer in plan.layers}
    macs = dict.fromkeys(("int8", "w8", "float"), 0)
    stored, seen = 0, set()
    for path, module in component.module.named_modules():
        layer = modes.get(path)
        if layer is not None:
            macs[layer.mode] += layer.macs
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if id(tensor) in seen or name in (OWN_INTEGERS, OWN_SCALES, "weight_zero"):
                continue
            seen.add(id(tensor))
            each = tensor.element_size() if not tensor.is_floating_point() else float_bytes
            if layer is not None and layer.mode != "float" and name == "weight":
                stored += tensor.numel() + 4 * max(tensor.shape[:2])
            elif layer is not None and layer.mode == "int8":
                stored += 4 * tensor.numel()  # the bias of an integer layer: int32
            else:
                stored += each * tensor.numel()
    return Expected(macs["int8"], macs["w8"], macs["float"], stored)


def hold(name: str, wanted: Expected, found: Coverage) -> None:
    """Raises GateError where an artefact has less int8 than its plan, or keeps a float copy of an int8 weight."""
    if found.int8 < LEAST_SHARE * wanted.int8:
        raise GateError(
            f"{name} computes {_share(found.int8, wanted.int8)} of the planned int8 MACs in integers",
            f"at least {LEAST_SHARE:.0%}",
            "Report this as a bug: a layer fell back to float",
        )
    if found.int8 + found.w8 < LEAST_SHARE * (wanted.int8 + wanted.w8):
        raise GateError(
            f"{name} holds {_share(found.int8 + found.w8, wanted.int8 + wanted.w8)} of the planned int8 weights "
            "(by MACs) as int8", f"at least {LEAST_SHARE:.0%}", "Report this as a bug: a weight was widened",
        )  # fmt: skip
    if found.weight_bytes > MOST_BYTES * wanted.bytes + SLACK_BYTES:
        raise GateError(
            f"{name} stores {found.weight_bytes} bytes of weights, {found.weight_bytes / wanted.bytes:.3f} times the "
            "plan's", f"up to {MOST_BYTES} times ({wanted.bytes} bytes)",
            "Report this as a bug: a float copy of an int8 weight was kept",
        )  # fmt: skip


def same(name: str, before: Coverage, after: Coverage) -> None:
    """Raises GateError where an artefact computes with fewer integers on shared weights than it did on its own."""
    if (after.int8, after.w8, after.floating) != (before.int8, before.w8, before.floating):
        raise GateError(
            f"{name} on shared weights computes {_share(after.int8, before.int8)} of its int8 MACs in integers, "
            f"{_share(after.w8, before.w8)} of the rest with int8 weights", "what it computed on its own",
            "Choose --width-mode separate, and report this as a bug",
        )  # fmt: skip


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "none"
